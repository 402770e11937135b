"""Sends every file of a directory as a message, by smtplib, to one address and to another.

Usage: send_smtplib.py DIRECTORY CLIENT PORT DOMAIN [PORT DOMAIN ...]. File NAME goes to <NAME.CLIENT@DOMAIN>.
Prints a line for each refusal.
"""

import pathlib
import smtplib
import sys


def main():
    directory, client, *targets = sys.argv[1:]
    refused = 0
    for port, domain in zip(targets[::2], targets[1::2]):
        with smtplib.SMTP("127.0.0.1", int(port), local_hostname="client.test") as server:
            for path in sorted(pathlib.Path(directory).iterdir()):
                content = path.read_bytes()
                server.ehlo_or_helo_if_needed()
                options = [] if content.isascii() else ["BODY=8BITMIME"]
                try:
                    recipient = f"{path.name}.{client}@{domain}"
                    server.sendmail("sender@sender.test", [recipient], content, mail_options=options)
                except smtplib.SMTPException as error:
                    refused += 1
                    print(f"{path.name} at {domain}: {error}")
    return 1 if refused else 0


if __name__ == "__main__":
    sys.exit(main())
