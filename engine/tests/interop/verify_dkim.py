"""Verifies every DKIM signature of every message that smtp-sink has dumped.

Usage: verify_dkim.py DNS.JSON DUMPS. The JSON maps names (with final dot) to TXT records.
Prints a summary; exits with 1 when a message has no two good signatures.
"""

import json
import pathlib
import sys

import dkim


def main():
    records = {name.encode(): text.encode() for name, text in json.load(open(sys.argv[1])).items()}
    messages = good = bad = 0
    for path in sorted(pathlib.Path(sys.argv[2]).iterdir()):
        # smtp-sink writes LF, and puts fields of its own in front, which no signature covers.
        message = path.read_bytes().replace(b"\r\n", b"\n").replace(b"\n", b"\r\n")
        verifier = dkim.DKIM(message)
        fields = [name for name, _ in verifier.headers if name.lower() == b"dkim-signature"]
        messages += 1
        if len(fields) != 2:
            print(f"{path}: {len(fields)} signatures")
            bad += 1
        for index in range(len(fields)):
            try:
                valid = verifier.verify(idx=index, dnsfunc=lambda name, timeout=5: records.get(name))
            except dkim.DKIMException as error:
                print(f"{path}: signature {index}: {error}")
                valid = False
            good += valid
            bad += not valid
    print(f"{messages} messages, {good} good signatures, {bad} bad")
    return 1 if bad or not messages else 0


if __name__ == "__main__":
    sys.exit(main())
