"""Whose is the guest? How a source asks it, what it writes down before, and what resumes the guest where the source is killed before it has asked."""

import contextlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

from blake3 import blake3

from . import keys, wire
from .errors import Refused, SourceError, TransferLost, Unauthentic
from .receiver import TEXT_MOST
from .sender import RETRY_S
from .wire import Kind

TRANSFER = blake3(b"novacron guest 1").digest(keys.TRANSFER_ID)
"""Name of the stream by which both ends agree; the memory's is another."""


class Journal:
    """That the target was asked, whose the guest is therefore not known here."""

    def __init__(self, control: Path) -> None:
        self.path = control.with_name(control.name + ".moving")

    def read(self) -> tuple[bytes, tuple[str, int]] | None:
        """Session and target; None where nothing is open. Raises SourceError."""
        try:
            text = self.path.read_text()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise SourceError(f"journal {self.path}: {error.strerror or error}") from None
        try:
            found = json.loads(text)
            session = bytes.fromhex(found["session"])
            if len(session) == wire.SESSION:
                return session, (str(found["host"]), int(found["port"]))
        except (ValueError, KeyError, TypeError):
            pass
        raise SourceError(f"journal {self.path}: it cannot be read; find out whether the guest runs at its target, then remove it")

    def write(self, session: bytes, address: tuple[str, int]) -> None:
        part = self.path.with_name(self.path.name + ".part")
        try:
            with part.open("w") as file:
                json.dump({"session": session.hex(), "host": address[0], "port": address[1]}, file)
                file.flush()
                os.fsync(file.fileno())
            part.rename(self.path)
        except OSError as error:
            raise SourceError(f"journal {self.path}: {error.strerror or error}") from None

    def remove(self) -> None:
        self.path.unlink(missing_ok=True)


class Guard:
    """Resumes the guest if we are killed."""

    def __init__(self, control: Path, journal: Path) -> None:
        package = Path(__file__).resolve().parent
        self._process = subprocess.Popen(
            [sys.executable, "-m", f"{package.name}.guard", str(control.resolve()), str(journal.resolve())], cwd=package.parent, start_new_session=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        assert self._process.stdin is not None and self._process.stdout is not None
        self._in, self._out = self._process.stdin, self._process.stdout

    def ready(self) -> None:
        """Wait until it watches. Raises SourceError."""
        if self._out.readline() != b"ready\n":
            raise SourceError("the guard that resumes the guest if this program is killed did not start")

    def say(self, letter: bytes) -> None:
        self._in.write(letter)
        self._in.flush()

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self.say(b"d")
        self._in.close()
        self._out.close()
        self._process.wait()


def call(address: tuple[str, int], key: bytes, patience: float) -> wire.Stream:
    """A stream to the target, for as long as the patience lasts. Raises TransferLost, KeyRefused."""
    end, wait = time.monotonic() + patience, RETRY_S[0]
    while True:
        try:
            stream = wire.call(address, key, TRANSFER)
            stream.timeout(patience)
            return stream
        except (OSError, Unauthentic) as error:
            if time.monotonic() + wait > end:
                raise TransferLost(f"target {address[0]}:{address[1]}: out of reach for {patience:g} s ({error})") from None
        time.sleep(wait)
        wait = min(RETRY_S[1], wait * 2)


def expect(stream: wire.Stream, kind: Kind) -> memoryview:
    """The next record, which is to be of that kind. Raises Refused with the target's words, TransferLost."""
    try:
        found, _, _, payload = stream.receive()
    except (OSError, Unauthentic) as error:
        raise TransferLost(f"the target is gone: {error}") from None
    if found == Kind.REFUSED:
        raise Refused(f"the target gave up: {bytes(payload[:TEXT_MOST]).decode(errors='replace')}")
    if found != kind:
        raise TransferLost(f"the target said {found} where {kind.name} was due")
    return payload


def ask(address: tuple[str, int], key: bytes, session: bytes, patience: float) -> float | None:
    """Whose is the guest? Since when it runs at the target (seconds since 1970), None: it is ours, for good. Raises TransferLost where nobody answers in time."""
    end = time.monotonic() + patience
    while True:
        try:
            stream = call(address, key, max(0.1, end - time.monotonic()))
            try:
                stream.send(Kind.ASK, session)
                return answer(expect(stream, Kind.VERDICT))
            finally:
                with contextlib.suppress(OSError):
                    stream.send(Kind.BYE)
                stream.close()
        except (OSError, TransferLost, Refused):
            if time.monotonic() > end:
                raise TransferLost(f"target {address[0]}:{address[1]}: it did not say whose the guest is") from None
            time.sleep(RETRY_S[0])


def answer(payload: memoryview) -> float | None:
    if len(payload) != wire.VERDICT_GUEST.size:
        raise TransferLost("the target's verdict is not understood")
    taken, since = wire.VERDICT_GUEST.unpack(payload)
    return float(since) if taken else None
