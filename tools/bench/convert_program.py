"""The workload of the conversion's benchmark and tests: this machine's Python with what the service needs of its library, as the files of an image; the service; and its client."""

import subprocess
from pathlib import Path

PYTHON = "/usr/bin/python3"

SERVICE = """
import hashlib, os, socket, selectors, sys, threading, time
memory = [hashlib.sha256(str(number).encode()).digest() * 1024 for number in range(int(os.environ.get("BLOCKS", "64")))]
def digest():
    told = hashlib.sha256()
    for block in memory:
        told.update(block)
    return told.hexdigest()
listener = socket.create_server(("0.0.0.0", 80))
selector = selectors.DefaultSelector()
selector.register(listener, selectors.EVENT_READ)
count, waits = 0, {}
print("ready", digest(), flush=True)
while True:
    for key, _ in selector.select():
        if key.fileobj is listener:
            line, _ = listener.accept()
            line.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            waits[line] = b""
            selector.register(line, selectors.EVENT_READ)
            continue
        line = key.fileobj
        data = line.recv(65536)
        if not data:
            selector.unregister(line)
            waits.pop(line)
            line.close()
            continue
        *asked, waits[line] = (waits[line] + data).split(b"\\n")
        for one in asked:
            count += 1
            said = digest() if one == b"digest" else os.uname().release if one == b"kernel" else repr(time.monotonic()) if one == b"clock" else ""
            line.sendall(b"%s %d %d %s\\n" % (one, count, os.getpid(), said.encode()))
"""
"""Answers each line with the line, how many it has answered, its pid, and what was asked for."""

_MODULES = "hashlib, os, socket, selectors, sys, threading, time, encodings.idna, encodings.ascii, encodings.latin_1"


def files() -> dict[str, bytes]:
    """By their paths without the first slash, the program first. Raises OSError where there is no such Python."""
    code = f"import {_MODULES}; print('\\n'.join(sorted(one.__file__ for one in list(sys.modules.values()) if getattr(one, '__file__', None))))"
    loaded = subprocess.run([PYTHON, "-I", "-S", "-c", code], capture_output=True, text=True, check=True).stdout.split()
    libraries: set[str] = set()
    for path in (PYTHON, *(one for one in loaded if one.endswith(".so"))):
        said = subprocess.run(["ldd", path], capture_output=True, text=True, check=True).stdout.split()
        libraries |= {word for word in said if word.startswith("/")}
    return {path[1:]: Path(path).read_bytes() for path in (PYTHON, *loaded, *sorted(libraries))}
