"""A detector's state as text: one array of doubles with a magic word, a version and a checksum, base64. Pure.

Doubles keep every bit, so a detector goes on after a restart exactly as it would have without one.
"""

import base64
import binascii
import math
import struct
import sys
import zlib
from array import array
from collections.abc import Iterable

VERSION = 1
"""Grows with every change of what is learned: another version is refused and the detector starts anew."""

MAX_STATE_CHARS = 65_536
"""Characters of one state; what is longer is none of ours."""

_HEAD = struct.Struct("<4sHHI")  # magic, version, reserved, CRC-32 of the doubles
_MAGIC = b"NDET"


class DetectorStateError(ValueError):
    """A state that is refused as a whole: damaged, or of an unknown form."""


class Packer:
    """Collects numbers in order."""

    def __init__(self) -> None:
        self._values = array("d")

    def put(self, *values: float) -> None:
        """Single numbers (integers up to 2**53 stay exact)."""
        self._values.extend(values)

    def put_list(self, values: Iterable[float]) -> None:
        """A list, with its length before it."""
        found = list(values)
        self._values.append(len(found))
        self._values.extend(found)

    def text(self) -> str:
        """All of it."""
        values = self._values
        if sys.byteorder == "big":
            values = array("d", values)
            values.byteswap()
        data = values.tobytes()
        return base64.b64encode(_HEAD.pack(_MAGIC, VERSION, 0, zlib.crc32(data)) + data).decode()


class Unpacker:
    """Gives back what `Packer` collected, in the same order; raises `DetectorStateError` at whatever does not fit."""

    def __init__(self, state: object) -> None:
        if not isinstance(state, str) or len(state) > MAX_STATE_CHARS:
            raise DetectorStateError(f"state: is not text of at most {MAX_STATE_CHARS} characters; start the detector anew")
        try:
            raw = base64.b64decode(state, validate=True)
            magic, version, _, checksum = _HEAD.unpack_from(raw)
        except (binascii.Error, ValueError, struct.error):
            raise DetectorStateError("state: is not a detector's state; start the detector anew") from None
        if magic != _MAGIC:
            raise DetectorStateError("state: is not a detector's state; start the detector anew")
        if version != VERSION:
            raise DetectorStateError(f"state: is of version {version}, not {VERSION}; start the detector anew")
        data = raw[_HEAD.size:]
        if zlib.crc32(data) != checksum or len(data) % 8:
            raise DetectorStateError("state: is damaged (its checksum is wrong); start the detector anew")
        values = array("d")
        values.frombytes(data)
        if sys.byteorder == "big":
            values.byteswap()
        if not all(map(math.isfinite, values)):
            raise DetectorStateError("state: holds numbers that are not finite; start the detector anew")
        self._values = values
        self._at = 0

    def take(self) -> float:
        """The next number."""
        if self._at >= len(self._values):
            raise DetectorStateError("state: is too short; start the detector anew")
        self._at += 1
        return self._values[self._at - 1]

    def take_count(self, maximum: int = 2**53) -> int:
        """The next number, which must be an integer from 0 to `maximum`."""
        value = self.take()
        if value != int(value) or not 0 <= value <= maximum:
            raise DetectorStateError(f"state: {value:g} is not a count up to {maximum}; start the detector anew")
        return int(value)

    def take_time(self) -> int:
        """The next number, a time in milliseconds (of either sign)."""
        return int(self.take())

    def take_list(self, maximum: int) -> list[float]:
        """The next list, of at most `maximum` numbers."""
        count = self.take_count(maximum)
        if self._at + count > len(self._values):
            raise DetectorStateError("state: is too short; start the detector anew")
        self._at += count
        return list(self._values[self._at - count:self._at])

    @staticmethod
    def expect(true: bool, what: str) -> None:
        """What must hold between the numbers."""
        if not true:
            raise DetectorStateError(f"state: its {what} make no sense; start the detector anew")

    def end(self) -> None:
        """Nothing may be left."""
        if self._at != len(self._values):
            raise DetectorStateError("state: is too long; start the detector anew")
