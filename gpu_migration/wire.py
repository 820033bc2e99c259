"""Records over a stream: a clear header that is authenticated with what it heads, then sealed bytes. Lengths are bounded before anything is read."""

import os
import select
import socket
import struct
import threading
from collections.abc import Sequence
from enum import IntEnum

from blake3 import blake3

from . import keys
from .errors import FormatError, KeyRefused, Unauthentic
from .layout import ENCODED_MAX, HASH

RECORD = struct.Struct("<B3sIQI")
"""Type, padding, bytes that follow (with the tag), extent, attempt."""
PAYLOAD_MAX = ENCODED_MAX
"""Bytes of a record's payload at the most: an encoded extent."""
CLAIMS_MAX = PAYLOAD_MAX // HASH // 2
"""Hashes in one record of claims at the most."""
_SOCKET_BUFFER = 4 << 20
"""Bytes that the kernel may hold of a stream each way: four extents, a round trip of 30 ms at 1 Gbit/s; the kernel may give less."""
_LITTLE = 64 << 10
"""Bytes of room for records: an end that gets no extents needs no more."""
_WHOLE, _LOOK = int(socket.MSG_WAITALL), int(socket.MSG_PEEK | socket.MSG_DONTWAIT)
"""How it is read: all that was asked for at once; what has come, without taking it."""
HELLO_S = 10.0
"""Seconds for a handshake: what cannot finish it holds a place of the few."""


class Kind(IntEnum):
    """Type of a record."""

    OPEN = 1
    """Sender: session 16, length u64, root of the base 32 (zeros: none)."""
    ACCEPT = 2
    """Receiver: base is here u8, committed root 32 (zeros: not committed), its host's id 16, its processors u16."""
    CLAIMS = 3
    """Receiver: hashes of what it holds, from `extent` on, zeros where it holds nothing. The last record is empty."""
    EXTENT = 4
    """Sender: an encoded extent."""
    ACK = 5
    """Receiver: extents that are written: of each its number u64, the attempt u32, and the processor time that it took, microseconds: u32 to receive and open, u32 to decode."""
    NAK = 6
    """Receiver: the base did not do for that attempt of that extent; send it without."""
    COMMIT = 7
    """Sender: root 32 of the whole."""
    COMMITTED = 8
    """Receiver: the object is in its place."""
    REFUSED = 9
    """Either: text; the transfer ends."""
    BYE = 10
    """Sender: it has understood that the transfer is done."""
    EXTENTS = 11
    """Sender: up to GROUP_MOST small encoded extents, before each its attempt u32 and its length u32."""

    # Of a guest that moves while it runs (qemu_source, qemu_target), on a stream of their own.
    ASK = 32
    """Source: session 16. Whose is the guest?"""
    HELLO = 33
    """Source: session 16, bytes of memory u64, then an offer of disks (guest_disks.py)."""
    GO = 34
    """Target: ready for the memory, as an object on further streams."""
    LIVE = 35
    """Source: root 32 of the memory as it went over."""
    READY = 36
    """Target: its QEMU waits."""
    PATCH = 37
    """Source: pages (patches.py), numbered by `attempt`."""
    APPLIED = 38
    """Target: that one is written."""
    STATE = 39
    """Source: the next bytes of the device state; `attempt` 1: QEMU may have them at once, as the memory that they go with is there."""
    LOAD = 40
    """Source: that was all: chain 32 of all patches, root 32 of the memory or zeros."""
    LOADED = 41
    """Target: memory and devices are as they were."""
    COMMIT_GUEST = 42
    """Source: session 16. From here on only the target's word tells whose the guest is."""
    VERDICT = 43
    """Target: u8, 1: the guest is the target's, and runs since f64 (seconds since 1970); 0: it never will be in that session."""
    DISKS = 44
    """Target: a byte for each disk of the offer, 1: that one is to be moved, by a stream of its own."""
    DISK = 45
    """Source, first on such a stream: session 16, which of the offer u8."""
    NBD = 46
    """Either, after DISK or CHANNEL: bytes of a local socket (tunnel.py). Without any, `attempt` says what became of its local end."""
    DISKED = 47
    """Source: all disks are at the target as the guest has left them."""
    PAGES = 48
    """Source: pages as they are (patches.py), numbered by `attempt` together with the others."""

    # Of connections of local processes that are carried (carry.py), each by a stream of its own.
    CHANNEL = 49
    """Who called, first: the name of the socket at the other end, ascii. The answer, the same or REFUSED: a local process is connected there."""


OPEN = struct.Struct("<16sQ32s")
ACCEPT = struct.Struct("<B32s16sH")
ACK = struct.Struct("<QIII")
NOTHING = bytes(HASH)
GROUPED = struct.Struct("<II")
SMALL = 4096
"""Bytes of an encoded extent up to which it may travel with others: of less, a record's way through threads and kernels costs more than the extent."""
GROUP_MOST = 32
"""Extents in one record at the most: what waits for the others waits some milliseconds, and a record stays below 132 KiB."""
HELLO_GUEST = struct.Struct("<16sQ")
DISK_GUEST = struct.Struct("<16sB")
LOAD_GUEST = struct.Struct("<32s32s")
VERDICT_GUEST = struct.Struct("<Bd")
SESSION = 16


def host_id() -> bytes:
    """The same for all processes of a running system, and for no other system: whose processors are shared. Random where the system does not say."""
    try:
        with open("/proc/sys/kernel/random/boot_id", "rb") as file:
            told = file.read(64)
    except OSError:
        told = os.urandom(32)
    return blake3(b"novacron host 1\0" + told).digest(16)


def _room(size: int) -> memoryview:
    """Room for a record of that size: for a small one little, for a larger one all that there may be, so that it is made twice at the most."""
    return memoryview(bytearray(_LITTLE if size <= _LITTLE else RECORD.size + PAYLOAD_MAX + keys.TAG))


def grouped(parts: Sequence[tuple[int, bytes]]) -> bytes:
    """The payload of EXTENTS, from attempts and encoded extents."""
    return b"".join(word for attempt, encoded in parts for word in (GROUPED.pack(attempt, len(encoded)), encoded))


def ungrouped(payload: memoryview) -> list[tuple[int, memoryview]]:
    """Attempts and encoded extents of EXTENTS. Raises FormatError."""
    found: list[tuple[int, memoryview]] = []
    at = 0
    while at < len(payload):
        start = at + GROUPED.size
        if start > len(payload) or len(found) == GROUP_MOST:
            raise FormatError(f"stream: a record of several extents has more than {GROUP_MOST}, or ends within one")
        attempt, length = GROUPED.unpack_from(payload, at)
        at = start + length
        if not 0 < length <= SMALL or at > len(payload):
            raise FormatError(f"stream: an extent of {length} bytes among several is not within 1 to {SMALL}, or not whole")
        found.append((attempt, payload[start:at]))
    return found


class Stream:
    """One connection after its handshake. Sending and receiving may be on two threads; each is by one at a time."""

    def __init__(self, sock: socket.socket, seals: keys.Seals) -> None:
        self._socket = sock
        self._seals = seals
        self._sending = threading.Lock()
        self._out, self._in, self._plain = memoryview(b""), memoryview(b""), memoryview(b"")  # as large as records become each way
        self._header, self._peeked = bytearray(RECORD.size), bytearray(1)
        self.timeout(HELLO_S)

    def send(self, kind: Kind, payload: bytes | memoryview = b"", extent: int = 0, attempt: int = 0) -> int:
        """Seal and send a record; the bytes that went out. Raises OSError where the stream is gone."""
        size = len(payload) + keys.TAG
        header = RECORD.pack(kind, b"", size, extent, attempt)
        end = RECORD.size + size
        with self._sending:
            if len(self._out) < end:
                self._out = _room(end)
            self._out[: RECORD.size] = header
            self._seals.out.seal(header, payload, self._out[RECORD.size : end])
            try:
                self._socket.sendall(self._out[:end])
            except BlockingIOError:
                raise TimeoutError("the other end takes nothing more") from None
        return end

    def _fill(self, view: memoryview) -> None:
        at = 0
        while at < len(view):
            try:
                count = self._socket.recv_into(view[at:], 0, _WHOLE)
            except BlockingIOError:
                raise TimeoutError("nothing comes from the other end") from None
            if not count:
                raise ConnectionResetError("the other end closed the stream")
            at += count

    def receive(self) -> tuple[int, int, int, memoryview]:
        """Kind, extent, attempt and payload of the next record; the payload holds until the next call. Raises OSError, Unauthentic."""
        self._fill(memoryview(self._header))
        kind, _, size, extent, attempt = RECORD.unpack(self._header)
        if not keys.TAG <= size <= PAYLOAD_MAX + keys.TAG:
            raise Unauthentic(f"stream: a record of {size} bytes is not within {keys.TAG} to {PAYLOAD_MAX + keys.TAG}; the stream is given up")
        if len(self._in) < size:
            self._in, self._plain = _room(size), _room(size)
        self._fill(self._in[:size])
        plain = self._plain[: size - keys.TAG]
        self._seals.into.open(bytes(self._header), self._in[:size], plain)
        return kind, extent, attempt, plain

    def waits(self) -> bool:
        """Something of another record has come already, or the end of the stream."""
        try:
            return self._socket.recv_into(self._peeked, 1, _LOOK) >= 0
        except BlockingIOError:
            return False

    def timeout(self, seconds: float | None) -> None:
        """For both ways. The kernel keeps it: Python's own asks before every call whether there is something, which is as many calls again."""
        value = struct.pack("@ll", int(seconds or 0), int((seconds or 0) % 1 * 1e6))
        self._socket.settimeout(None)
        for way in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
            self._socket.setsockopt(socket.SOL_SOCKET, way, value)

    def lasting(self, patience: float) -> None:
        """It may be silent for as long as the other end is there; one that is gone without a word is noticed after the patience, in seconds."""
        self.timeout(None)  # or what the handshake was given would end a silence
        whole = max(1, round(patience))
        for option, value in ((socket.TCP_USER_TIMEOUT, whole * 1000), (socket.TCP_KEEPIDLE, whole), (socket.TCP_KEEPINTVL, max(1, whole // 3))):
            self._socket.setsockopt(socket.IPPROTO_TCP, option, value)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)

    def speaks(self) -> bool:
        """Whether there is something to receive, be it the stream's end."""
        return bool(select.select([self._socket], [], [], 0)[0])

    def finish(self) -> None:
        """Nothing more is sent; the other end sees that after all that was. What comes from there still does. Raises OSError."""
        self._socket.shutdown(socket.SHUT_WR)

    def hang_up(self) -> None:
        """End the stream; a thread that waits on it wakes."""
        try:
            self._socket.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass

    def close(self) -> None:
        """The same, and its descriptor is given back."""
        self.hang_up()
        self._socket.close()


def tune(sock: socket.socket) -> None:
    """No delay for acknowledgements, and room for extents on their way."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SOCKET_BUFFER)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _SOCKET_BUFFER)


def read_exactly(sock: socket.socket, size: int) -> bytes:
    """So many bytes, for a hello; raises OSError."""
    out = bytearray()
    while len(out) < size:
        part = sock.recv(size - len(out))
        if not part:
            raise ConnectionResetError("the other end closed the stream during the handshake")
        out += part
    return bytes(out)


def call(address: tuple[str, int], key: bytes, transfer: bytes) -> Stream:
    """Connect to a receiver and shake hands. Raises OSError, KeyRefused."""
    sock = socket.create_connection(address, HELLO_S)
    try:
        tune(sock)
        hello = keys.Hello(key, transfer, sender=True)
        mine = hello.message()
        sock.sendall(mine)
        seals = hello.finish(mine, read_exactly(sock, keys.HELLO))
    except BaseException:
        sock.close()
        raise
    return Stream(sock, seals)


def answer(sock: socket.socket, key: bytes) -> tuple[Stream, bytes]:
    """Shake hands with a sender; the stream and the transfer's id. Raises OSError, KeyRefused."""
    sock.settimeout(HELLO_S)
    tune(sock)
    theirs = read_exactly(sock, keys.HELLO)
    try:
        transfer, _ = keys.check_hello(key, theirs, b"", sender=True)
    except KeyRefused:
        # With another key our hello tells the other end just that, and that at once.
        sock.sendall(keys.Hello(key, bytes(keys.TRANSFER_ID), sender=False).message(theirs))
        raise
    hello = keys.Hello(key, transfer, sender=False)
    mine = hello.message(theirs)
    sock.sendall(mine)
    return Stream(sock, hello.finish(mine, theirs)), transfer
