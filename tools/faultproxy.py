"""A TCP proxy whose link can be cut, held and healed: a real link to break between real processes. Loopback only.

    python -m tools.faultproxy --to 127.0.0.1:1883 --listen 0        then on standard input: cut, heal, hold, quit
"""

import argparse
import asyncio
import errno
import socket
import struct
import sys

CHUNK_BYTES = 65_536
"""Bytes read at once; also what one direction may hold back."""

_RESET = struct.pack("ii", 1, 0)
"""SO_LINGER that makes close send RST: what a device that lost its power looks like to a stateful firewall."""

TAKEN_S = 60.0
"""While the port is closed, the kernel may give it to somebody's outgoing connection: those end."""


class FaultProxy:
    """Forwards `listen_port` to `(target_host, target_port)`.

    Attributes:
        port: where it listens; connections, bytes: counters.
    """

    def __init__(self, target_host: str, target_port: int, listen_port: int = 0) -> None:
        self._target = (target_host, target_port)
        self._listen_port = listen_port
        self._server: asyncio.Server | None = None
        self._writers: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._flow = asyncio.Event()
        self._flow.set()
        self.port = 0
        self.connections = 0
        self.bytes = 0
        self.cuts = 0

    async def start(self) -> None:
        """Listen. Raises OSError where the port stays taken for `TAKEN_S`."""
        end = asyncio.get_running_loop().time() + TAKEN_S
        while True:
            try:
                self._server = await asyncio.start_server(self._serve, "127.0.0.1", self.port or self._listen_port)
                break
            except OSError as error:
                if error.errno != errno.EADDRINUSE or not self.port or asyncio.get_running_loop().time() >= end:
                    raise
                await asyncio.sleep(0.05)
        self.port = self._server.sockets[0].getsockname()[1]

    async def cut(self) -> None:
        """Reset every connection and refuse new ones."""
        self.cuts += 1
        if self._server is not None:
            self._server.close()
            self._server = None
        for writer in list(self._writers):
            sock = writer.get_extra_info("socket")
            if sock is not None:
                try:
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
                except OSError:
                    pass  # closed by the peer already
            writer.transport.abort()
        self._writers.clear()

    async def heal(self) -> None:
        """Take connections again, on the same port; let bytes pass."""
        self._flow.set()
        if self._server is None:
            await self.start()

    def hold(self) -> None:
        """Let connections stand and no byte pass, either way: a black hole."""
        self._flow.clear()

    async def close(self) -> None:
        """End."""
        await self.cut()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            far_reader, far_writer = await asyncio.open_connection(*self._target)
        except OSError:
            writer.transport.abort()
            return
        for one in (writer, far_writer):
            one.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._writers.add(one)
        pumps = [asyncio.create_task(self._pump(reader, far_writer)), asyncio.create_task(self._pump(far_reader, writer))]
        self._tasks.update(pumps)
        await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
        for one in (writer, far_writer):
            one.transport.abort()
            self._writers.discard(one)
        for pump in pumps:
            pump.cancel()
            self._tasks.discard(pump)

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while data := await reader.read(CHUNK_BYTES):
                await self._flow.wait()
                self.bytes += len(data)
                writer.write(data)
                await writer.drain()
        except (OSError, asyncio.CancelledError):
            return


async def _main(listen: int, to: str) -> None:
    host, _, port = to.rpartition(":")
    proxy = FaultProxy(host, int(port), listen)
    await proxy.start()
    print(f"listening on 127.0.0.1:{proxy.port}", flush=True)
    loop = asyncio.get_running_loop()
    while True:
        line = (await loop.run_in_executor(None, sys.stdin.readline)).strip()
        if line in ("quit", ""):
            await proxy.close()
            return
        if line == "cut":
            await proxy.cut()
        elif line == "heal":
            await proxy.heal()
        elif line == "hold":
            proxy.hold()
        print(f"{line}: connections {proxy.connections}, bytes {proxy.bytes}", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--listen", type=int, default=0)
    parser.add_argument("--to", required=True)
    arguments = parser.parse_args()
    asyncio.run(_main(arguments.listen, arguments.to))
