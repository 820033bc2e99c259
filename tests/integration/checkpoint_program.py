"""A program for a container whose state is taken: several processes and threads that hold on to all that a checkpoint has to carry, and check it themselves. Runs by itself, with the standard library alone.

Each part counts what it has done and found right. Every 50 ms the first process writes one line of JSON with all counts; where a part finds something wrong, the line has `wrong`.
"""

import fcntl
import hashlib
import json
import mmap
import os
import signal
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable

PARTS = ("tcp", "unix", "named", "pipe", "thread", "timer", "deleted", "memory", "lock", "child")
COUNTS = mmap.mmap(-1, 8 * len(PARTS))
WRONG = mmap.mmap(-1, 256)
PAUSE_S = 0.002


def add(part: str) -> None:
    at = 8 * PARTS.index(part)
    struct.pack_into("<Q", COUNTS, at, struct.unpack_from("<Q", COUNTS, at)[0] + 1)


def wrong(what: str) -> None:
    WRONG[:len(what)] = what.encode()
    os._exit(9)


def process(work: Callable[[], None]) -> None:
    if os.fork() == 0:
        try:
            work()
        except BaseException as error:
            wrong(f"{work.__name__}: {error!r}"[:250])


def numbers_out(line: socket.socket, part: str) -> None:
    """Send 0, 1, 2.. and want each back; a byte that is lost or doubled shows at once."""
    number = 0
    while True:
        line.sendall(struct.pack("<Q", number) * 64)
        data = b""
        while len(data) < 512:
            data += line.recv(512 - len(data)) or b"gone" * 200
        if data != struct.pack("<Q", number) * 64:
            wrong(f"{part}: {data[:16].hex()} in place of {number}")
        number += 1
        add(part)
        time.sleep(PAUSE_S)


def numbers_back(line: socket.socket) -> None:
    number = 0
    while True:
        data = b""
        while len(data) < 512:
            data += line.recv(512 - len(data)) or b"gone" * 200
        if data != struct.pack("<Q", number) * 64:
            wrong(f"other side: {data[:16].hex()} in place of {number}")
        line.sendall(data)
        number += 1


def tcp_server() -> None:
    server = socket.create_server(("127.0.0.1", 4000))
    numbers_back(server.accept()[0])


def tcp_client() -> None:
    while True:
        try:
            numbers_out(socket.create_connection(("127.0.0.1", 4000)), "tcp")
        except ConnectionRefusedError:
            time.sleep(PAUSE_S)


def named_server() -> None:
    server = socket.socket(socket.AF_UNIX)
    server.bind("/tmp/named.sock")
    server.listen()
    numbers_back(server.accept()[0])


def named_client() -> None:
    while True:
        line = socket.socket(socket.AF_UNIX)
        try:
            line.connect("/tmp/named.sock")
        except OSError:
            time.sleep(PAUSE_S)
            continue
        numbers_out(line, "named")


def pipes() -> None:
    out, into = os.pipe()
    if os.fork() == 0:
        number = 0
        while True:
            os.write(into, struct.pack("<Q", number))
            number += 1
            time.sleep(PAUSE_S)
    number = 0
    while True:
        if os.read(out, 8) != struct.pack("<Q", number):
            wrong("pipe: a number is lost")
        number += 1
        add("pipe")


def main() -> None:
    one, two = socket.socketpair()
    process(lambda: numbers_back(two))
    process(lambda: numbers_out(one, "unix"))
    for work in (tcp_server, tcp_client, named_server, named_client, pipes):
        process(work)

    deleted = open("/tmp/deleted", "w+b")  # noqa: SIM115
    content = os.urandom(1 << 20) * 2
    deleted.write(content)
    deleted.flush()
    os.unlink("/tmp/deleted")
    memory = os.urandom(4 << 20)
    digest = hashlib.sha256(memory).digest()
    locked = open("/tmp/locked", "wb")  # noqa: SIM115
    fcntl.flock(locked, fcntl.LOCK_EX)
    child = os.fork()
    if child == 0:
        signal.pause()
        os._exit(7)

    signal.signal(signal.SIGALRM, lambda *_: add("timer"))
    signal.setitimer(signal.ITIMER_REAL, 0.02, 0.02)

    def turns() -> None:
        while True:
            add("thread")
            time.sleep(PAUSE_S)

    threading.Thread(target=turns, daemon=True).start()
    while True:
        deleted.seek(0)
        if deleted.read() != content:
            wrong("the deleted file has another content")
        add("deleted")
        if hashlib.sha256(memory).digest() != digest:
            wrong("the memory has another content")
        add("memory")
        again = open("/tmp/locked", "wb")  # noqa: SIM115
        try:
            fcntl.flock(again, fcntl.LOCK_EX | fcntl.LOCK_NB)
            wrong("the lock is lost")
        except BlockingIOError:
            add("lock")
        again.close()
        if os.waitpid(child, os.WNOHANG) == (0, 0):
            add("child")
        else:
            wrong("the child is lost")
        told = dict(zip(PARTS, struct.unpack(f"<{len(PARTS)}Q", COUNTS[:]), strict=True))
        print(json.dumps({"at": time.monotonic(), "wrong": WRONG[:].rstrip(b"\0").decode(), **told}), flush=True)
        time.sleep(0.05)


if __name__ == "__main__":
    sys.exit(main())
