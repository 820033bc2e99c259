"""Certificates for tests, made by openssl: one that vouches for itself, and an authority of one's own with those that it gives."""

import subprocess
from pathlib import Path

NAMES = "subjectAltName=DNS:localhost,IP:127.0.0.1"
"""What a server on this machine is reached by."""


def _openssl(*words: str) -> None:
    subprocess.run(["openssl", *words], check=True, capture_output=True)


def _new_key(key: Path, passphrase: str = "") -> list[str]:
    return ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", *(["-passout", f"pass:{passphrase}"] if passphrase else ["-nodes"]), "-keyout", str(key)]


def self_signed(folder: Path, name: str, passphrase: str = "") -> tuple[Path, Path]:
    """A certificate that vouches for itself, NAME.pem, and its key, NAME.key. Python 3.13 wants to be told what that key is for."""
    cert, key = folder / f"{name}.pem", folder / f"{name}.key"
    _openssl("req", "-x509", *_new_key(key, passphrase), "-out", str(cert), "-days", "2", "-subj", f"/CN={name}", "-addext", "keyUsage=critical,digitalSignature,keyCertSign,cRLSign")
    return cert, key


class Authority:
    """One of one's own; `ca` is its certificate."""

    def __init__(self, folder: Path, name: str) -> None:
        self.folder = folder
        folder.mkdir(exist_ok=True)
        self.ca, self._key = self_signed(folder, name)

    def gives(self, name: str) -> tuple[str, str]:
        """A certificate and its key for a common name, which is also good for this machine's address; anew each time."""
        cert, key, asked, names = (self.folder / f"{name}.{ending}" for ending in ("pem", "key", "csr", "ext"))
        _openssl("req", *_new_key(key), "-out", str(asked), "-subj", f"/CN={name}")
        names.write_text(f"{NAMES}\n")
        _openssl("x509", "-req", "-in", str(asked), "-CA", str(self.ca), "-CAkey", str(self._key), "-CAcreateserial", "-out", str(cert), "-days", "2", "-extfile", str(names))
        return str(cert), str(key)
