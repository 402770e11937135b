"""An aiosmtpd server that offers STARTTLS and passes each message on as it came.

Usage: aiosmtpd_relay.py PORT TO_PORT DIRECTORY, where DIRECTORY has cert.pem and key.pem.
"""

import asyncio
import pathlib
import smtplib
import ssl
import sys

from aiosmtpd.smtp import SMTP


class Relay:
    def __init__(self, port):
        self.client = smtplib.SMTP("127.0.0.1", port)

    async def handle_DATA(self, server, session, envelope):
        options = [option for option in envelope.mail_options if not option.upper().startswith("SIZE")]
        self.client.sendmail(envelope.mail_from or "", envelope.rcpt_tos, envelope.content, options)
        return "250 2.0.0 passed on"


async def main():
    port, to_port, directory = int(sys.argv[1]), int(sys.argv[2]), pathlib.Path(sys.argv[3])
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(directory / "cert.pem", directory / "key.pem")
    relay = Relay(to_port)
    loop = asyncio.get_running_loop()

    def session():
        return SMTP(
            relay, enable_SMTPUTF8=True, decode_data=False, data_size_limit=None, tls_context=context, loop=loop
        )

    server = await loop.create_server(session, "127.0.0.1", port)
    await server.serve_forever()


asyncio.run(main())
