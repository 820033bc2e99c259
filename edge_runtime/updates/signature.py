"""Ed25519 signatures, checked by OpenSSL's own program: nothing is added to the agent's memory, and no cryptography is ours."""

import subprocess
import tempfile
from pathlib import Path

from .bundle import SIGNATURE_BYTES
from .source import Interrupted

OPENSSL_TIMEOUT_S = 600
"""A check takes some milliseconds; on an emulated machine that others starve, behind an agent that goes first, it took more than 60 s (2026-11-29)."""

KEYS_MAX = 16
"""Keys that are looked at: one in use, one that follows it, some to spare."""


def verified(keys: Path, message: bytes, signature: bytes) -> bool:
    """Whether one of the public keys (`*.pem`) in the folder `keys` made the signature over the message. Raises OSError where openssl cannot be run, Interrupted where it does not end in time."""
    if len(signature) != SIGNATURE_BYTES:
        return False
    with tempfile.TemporaryDirectory() as top:
        said, signed = Path(top) / "message", Path(top) / "signature"
        said.write_bytes(message)
        signed.write_bytes(signature)
        for key in sorted(keys.glob("*.pem"))[:KEYS_MAX]:
            command = ["openssl", "pkeyutl", "-verify", "-rawin", "-pubin", "-inkey", str(key), "-in", str(said), "-sigfile", str(signed)]
            try:
                done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=OPENSSL_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                raise Interrupted(f"the signature was not checked within {OPENSSL_TIMEOUT_S:g} s: the device is busy") from None
            if done.returncode == 0:
                return True
    return False
