"""Who may take part, and what nobody else can read or change: one key known to both ends, fresh keys of every stream, every record sealed.

Both ends have a key of at least 32 random bytes, from a file or the environment. Each stream begins with one hello each way: a nonce, an ephemeral X25519 key
and an HMAC under a key derived from the shared one. The stream's two keys come by HKDF-SHA256 from the shared key and the X25519 secret, salted with the hash
of both hellos; so they are fresh as soon as one end is, they differ between streams and directions, and a shared key that leaks later opens nothing recorded
before. Records are sealed by AES-256-GCM, the nonce being the count of records of that direction, which is not sent: a record that is missing, repeated,
reordered or of another stream does not open. The record's header, with type, extent and attempt, and the transfer's id are authenticated with it.
"""

import hashlib
import hmac
import os
import stat
import struct
from dataclasses import dataclass
from pathlib import Path

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from .errors import KeyRefused, Unauthentic

KEY_VARIABLE = "NOVACRON_MIGRATION_KEY"
"""Environment variable with the key in hexadecimal digits; never the command line, which every user of the machine can read."""
KEY_LEAST = 32
"""Bytes of a shared key at the least: nothing that can be guessed."""
KEY_FILE_MOST = 4096
"""Bytes of a key file at the most."""
TAG = 16
NONCE = 32
TRANSFER_ID = 16
_HELLO = struct.Struct("<4sB3s16s32s32s")
_MAGIC = b"NVXH"
_VERSION = 2
"""2: several small extents may come in one record, and acknowledgements of several."""
_MAC = 32
HELLO = _HELLO.size + _MAC
"""Bytes of a hello."""
RECORDS_MOST = 1 << 32
"""Records under one key: far below where AES-GCM with counted nonces weakens (2^64 blocks), and at 1 MiB each beyond any object."""


def new_key() -> str:
    """A fresh key, as it stands in a file or in the environment."""
    return os.urandom(KEY_LEAST).hex()


def load_key(path: Path | None) -> bytes:
    """The shared key, from a file that only its owner may read, or from the environment. Raises KeyRefused."""
    if path is None:
        text, where = os.environ.get(KEY_VARIABLE, ""), KEY_VARIABLE
        if not text:
            raise KeyRefused(f"no key: give --key-file, or the key in {KEY_VARIABLE}; `python -m gpu_migration key` makes one")
    else:
        where = str(path)
        try:
            with path.open("rb") as file:
                if stat.S_IMODE(os.fstat(file.fileno()).st_mode) & 0o077:
                    raise KeyRefused(f"key file {path}: others may read it; chmod 600 {path}")
                text = file.read(KEY_FILE_MOST).decode("ascii", "replace")
        except OSError as error:
            raise KeyRefused(f"key file {path}: {error.strerror or error}") from None
    try:
        key = bytes.fromhex(text.strip())
    except ValueError:
        raise KeyRefused(f"{where}: the key is not hexadecimal digits; `python -m gpu_migration key` makes one") from None
    if len(key) < KEY_LEAST:
        raise KeyRefused(f"{where}: the key has {len(key)} bytes and needs {KEY_LEAST}; `python -m gpu_migration key` makes one")
    return key


def _derive(key: bytes, salt: bytes, purpose: bytes) -> bytes:
    return HKDF(algorithm=SHA256(), length=32, salt=salt, info=b"novacron migration 1 " + purpose).derive(key)


class Seal:
    """One direction of one stream: seals or opens records in their order. Not to be shared between threads."""

    def __init__(self, key: bytes, transfer: bytes) -> None:
        self._cipher = AESGCM(key)
        self._transfer = transfer
        self._count = 0

    def _nonce(self) -> bytes:
        if self._count >= RECORDS_MOST:
            raise Unauthentic("stream: too many records under one key; open another stream")
        self._count += 1
        return struct.pack("<IQ", 0, self._count)

    def seal(self, header: bytes, data: bytes | bytearray | memoryview, out: memoryview) -> None:
        """Ciphertext and tag to `out`, which is 16 bytes longer than `data`."""
        self._cipher.encrypt_into(self._nonce(), data, self._transfer + header, out)

    def open(self, header: bytes, data: memoryview, out: memoryview) -> None:
        """Plain bytes to `out`, which is 16 bytes shorter than `data`; raises Unauthentic, and `out` then holds nothing to be read."""
        try:
            self._cipher.decrypt_into(self._nonce(), data, self._transfer + header, out)
        except InvalidTag:
            raise Unauthentic("stream: a record was forged, damaged, reordered or replayed; the stream is given up") from None


@dataclass(frozen=True, slots=True)
class Seals:
    """Both directions, as one end sees them."""

    out: Seal
    into: Seal


class Hello:
    """One end's part of a handshake."""

    def __init__(self, key: bytes, transfer: bytes, *, sender: bool) -> None:
        self._key, self._transfer, self._sender = key, transfer, sender
        self._private = X25519PrivateKey.generate()
        self._nonce = os.urandom(NONCE)

    @staticmethod
    def _mac(key: bytes, body: bytes, before: bytes, *, sender: bool) -> bytes:
        return hmac.digest(_derive(key, b"", b"sender's hello" if sender else b"receiver's hello"), before + body, "sha256")

    def message(self, before: bytes = b"") -> bytes:
        """Our hello; the receiver's answers the sender's, `before`."""
        body = _HELLO.pack(_MAGIC, _VERSION, b"", self._transfer, self._nonce, self._private.public_key().public_bytes_raw())
        return body + self._mac(self._key, body, before, sender=self._sender)

    def finish(self, mine: bytes, theirs: bytes) -> Seals:
        """The stream's keys from both hellos; raises KeyRefused where the other end has another key."""
        public = check_hello(self._key, theirs, b"" if not self._sender else mine, sender=not self._sender)[1]
        try:
            secret = self._private.exchange(X25519PublicKey.from_public_bytes(public))
        except ValueError:
            raise KeyRefused("hello: its public key is of no use") from None
        first, second = (mine, theirs) if self._sender else (theirs, mine)
        salt = hashlib.sha256(first + second).digest()
        to_receiver = Seal(_derive(self._key + secret, salt, b"to receiver"), self._transfer)
        to_sender = Seal(_derive(self._key + secret, salt, b"to sender"), self._transfer)
        return Seals(to_receiver, to_sender) if self._sender else Seals(to_sender, to_receiver)


def check_hello(key: bytes, hello: bytes, before: bytes, *, sender: bool) -> tuple[bytes, bytes]:
    """The transfer's id and public key of a hello; raises KeyRefused."""
    body, mac = hello[: _HELLO.size], hello[_HELLO.size :]
    if len(hello) != HELLO or body[:4] != _MAGIC:
        raise KeyRefused("hello: the other end does not speak this protocol")
    if body[4] != _VERSION:
        raise KeyRefused(f"hello: version {body[4]} is not {_VERSION}; use the same release at both ends")
    if not hmac.compare_digest(mac, Hello._mac(key, body, before, sender=sender)):
        raise KeyRefused("hello: the other end has another key; give both the same")
    _, _, _, transfer, _, public = _HELLO.unpack(body)
    return transfer, public
