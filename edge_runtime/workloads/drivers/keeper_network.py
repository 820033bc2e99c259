"""What connects a container to its node's network; of its keeper, which sees to it. Nothing of ours is imported but what stands beside it."""

import json
import os
import select
import selectors
import socket
import subprocess
import time

if __package__:
    from . import outside
    from .keeping import SAID, Taken, Trouble
else:  # of a script: its neighbours, without the package, which would load the agent
    import outside  # type: ignore[import-not-found,no-redef]
    from keeping import SAID, Taken, Trouble  # type: ignore[import-not-found,no-redef]

ANSWER = 65_536
"""Bytes of an answer, at most."""

CONNECT_S = 5.0
"""What connects a container has done so within milliseconds; more means that it hangs."""

RECONNECT_S = 1.0
"""Pause before what connects a container is started again where it ended."""


class Network:
    """What connects the container to the node's network: a process that ends with this one. Started again where it ends by itself.

    In its command stand PID (the container's first process), READY and EXIT (descriptors: it writes when it is ready, and ends when the other end of EXIT is closed), and SOCKET, where it takes
    requests for ports.
    """

    def __init__(self, told: dict, pid: int, folder: str) -> None:  # type: ignore[type-arg]
        self._told, self._pid, self._errors = told, pid, os.path.join(folder, "network.err")
        self._socket = f"{outside.RUN}/network-{os.getpid()}"  # not in the folder, whose path may be longer than a socket's name can be
        self._process: subprocess.Popen | None = None  # type: ignore[type-arg]
        self._line = -1
        self.ended = -1
        """Readable when it has ended; -1 where it does not run."""
        self.again_at = 0.0

    def start(self) -> None:
        """Returns when the container is connected and its ports are open; raises `Trouble`."""
        (ready, its_ready), (its_end, self._line) = os.pipe(), os.pipe()
        places = {"PID": str(self._pid), "READY": str(its_ready), "EXIT": str(its_end), "SOCKET": self._socket}
        words = []
        for word in self._told["command"]:
            for place, value in places.items():
                word = word.replace(place, value)
            words.append(word)
        outside.made(outside.RUN)
        try:
            with open(self._errors, "wb") as errors:
                self._process = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=errors, stderr=errors, cwd="/", pass_fds=(its_ready, its_end))
            os.close(its_ready)
            its_ready = -1
            self.ended = os.pidfd_open(self._process.pid)
            if not select.select([ready], [], [], CONNECT_S)[0] or not os.read(ready, 1):
                with open(self._errors, "rb") as said:
                    lines = [line.strip() for line in said.read(SAID).decode("utf-8", "replace").splitlines() if not line.startswith("WARNING")]
                raise Trouble(f"spec.network: {'; '.join(lines) or 'the container was not connected'}")
            for request in self._told["ports"]:
                self._ask(request)
        except BaseException:
            self.stop()
            raise
        finally:
            for descriptor in (ready, its_ready, its_end):
                if descriptor >= 0:
                    os.close(descriptor)
            try:
                os.unlink(self._socket)  # nobody shall ask for more
            except FileNotFoundError:
                pass

    def _ask(self, request: dict) -> None:  # type: ignore[type-arg]
        with socket.socket(socket.AF_UNIX) as line:
            line.settimeout(CONNECT_S)
            try:
                line.connect(self._socket)
                line.sendall(json.dumps(request).encode())
                line.shutdown(socket.SHUT_WR)
                answer = json.loads(line.recv(ANSWER))
            except (OSError, ValueError) as error:
                answer = {"error": {"desc": str(error)}}
        if "error" in answer:
            told = request["arguments"]
            raise Taken(f"port {told['host_port']} ({told['proto']}) of {told['host_addr']} cannot be had on this node: it is taken, or the address is not here")

    def stop(self) -> None:
        """End it."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None
        for descriptor in (self.ended, self._line):
            if descriptor >= 0:
                os.close(descriptor)
        self.ended = self._line = -1

    def tend(self, selector: selectors.BaseSelector) -> float:
        """It has ended: start it again when its pause is over. Seconds until it wants to be tended, 0: it runs."""
        now = time.monotonic()
        if self.ended >= 0:
            selector.unregister(self.ended)
            self.stop()
            self.again_at = now + RECONNECT_S
        if now < self.again_at:
            return self.again_at - now
        try:
            self.start()
        except (Trouble, OSError):
            self.again_at = time.monotonic() + RECONNECT_S
            return RECONNECT_S
        selector.register(self.ended, selectors.EVENT_READ, self)
        return 0.0
