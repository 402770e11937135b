"""An aiosmtpd server that keeps each message's content, octet by octet, in a file named after its recipient.

Usage: aiosmtpd_sink.py DIRECTORY. Prints its port, and the recipient of each message once its file is written.
"""

import asyncio
import pathlib
import sys

from aiosmtpd.smtp import SMTP


class Keeper:
    def __init__(self, directory):
        self.directory = directory

    async def handle_DATA(self, server, session, envelope):
        for recipient in envelope.rcpt_tos:
            path = self.directory / recipient
            if path.exists():
                print(f"twice {recipient}", flush=True)
            path.write_bytes(envelope.content)
            (self.directory / f"{recipient}.sender").write_text(envelope.mail_from or "")
            print(recipient, flush=True)
        return "250 2.0.0 kept"


async def main():
    keeper = Keeper(pathlib.Path(sys.argv[1]))
    loop = asyncio.get_running_loop()
    server = await loop.create_server(
        lambda: SMTP(keeper, enable_SMTPUTF8=True, decode_data=False, data_size_limit=None, loop=loop),
        "127.0.0.1",
        0,
    )
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


asyncio.run(main())
