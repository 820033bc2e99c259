"""A workload's own network (`segment`) as the agent has it: made, plugged, held and ended. All block, for milliseconds."""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from ..drivers import network
from ..drivers.face import Failed, Refused
from ..drivers.instance import held, line, read, write
from ..drivers.keeping import Trouble, started_ticks
from ..drivers.programs import searched
from . import segment

START_S = 30.0
"""A network that is not there by then will not be."""

PROGRAM = Path(segment.__file__)

CONTAINER, GUEST = "container", "guest"
"""Its ports."""


class Segment:
    """The network of one workload.

    Args:
        folder: its own; must be there.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def start(self, wanted: network.Network) -> None:
        """Make it, with these ports published on the node. Raises `Refused` where there is no program for it, and `Failed`."""
        program = searched(network.PROGRAM)
        if program is None or searched("ip") is None:
            raise Refused("spec.network", f"{network.PROGRAM} or ip is not installed", f"as root: apt install {network.PROGRAM} iproute2")
        words = [program, f"--mtu={segment.MTU}", "--disable-host-loopback", "--enable-sandbox", "--enable-seccomp", "--ready-fd=READY", "--exit-fd=EXIT", "--api-socket=SOCKET", "--netns-type=path", "NAMESPACE", segment.UPLINK]
        write(self.folder / "network.json", {"command": words, "ports": network.connection(program, wanted, False)["ports"]})
        lock = os.open(self.folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        said, its_end = os.pipe()
        try:
            import fcntl

            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            with open(self.folder / "network.log", "wb") as errors:
                subprocess.Popen(
                    [sys.executable, "-I", "-S", str(PROGRAM), "serve", str(self.folder), str(lock)], stdin=subprocess.DEVNULL, stdout=its_end, stderr=errors, cwd="/", start_new_session=True, pass_fds=(lock,),
                    env={"PATH": os.environ.get("PATH", os.defpath), "LC_ALL": "C.UTF-8"},
                )
            os.close(its_end)
            its_end = -1
            word = line(said, START_S)
        except OSError as error:
            raise Failed("spec.network", f"its network cannot be started: {error.strerror}", "look at the node") from None
        finally:
            for descriptor in (lock, said, its_end):
                if descriptor >= 0:
                    os.close(descriptor)
        if word != "running":
            told: dict[str, Any] = read(self.folder / "failed.json") or {}
            raise Failed("spec.network", str(told.get("failed") or "its network ended without a word"), "see the reason")

    @property
    def lives(self) -> bool:
        """Whether it is there."""
        return held(self.folder)

    def hook(self) -> list[dict[str, Any]]:
        """What a runtime has to run so that a container is in it, plugged in."""
        return [{"path": sys.executable, "args": [sys.executable, "-I", "-S", str(PROGRAM), "attach", str(self.folder), CONTAINER, "plugged"]}]

    def hold(self) -> None:
        """Nothing is sent to the workload any more, and nothing of it is taken; what others write waits in the node's kernel."""
        self._connector(signal.SIGSTOP)

    def release(self) -> None:
        """It goes on."""
        self._connector(signal.SIGCONT)

    def _connector(self, number: signal.Signals) -> None:
        told = self._known()
        with suppress(OSError, IndexError):
            if started_ticks(told["connector"]) == told["connector_started"]:
                os.kill(told["connector"], number)
                return
        if number == signal.SIGSTOP:
            raise Failed("network", "what connects the workload has just ended, and is being started again", "try again in a second")

    def plug(self, port: str) -> None:
        """The port takes part."""
        self._ip("link", "set", port, "master", segment.BRIDGE)

    def unplug(self, port: str) -> None:
        """It does not, whether it is there or not."""
        with suppress(Failed):
            self._ip("link", "set", port, "nomaster")

    def tap(self) -> int:
        """The guest's port, as a descriptor."""
        told = self._known()
        before = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        try:
            segment.enter(told["namespace"])  # of this thread alone
            try:
                return segment.tap(GUEST)
            finally:
                segment.enter(f"/proc/self/fd/{before}")
        except (OSError, Trouble) as error:
            raise Failed("network", f"no port can be made for the guest: {error}", "look at the node") from None
        finally:
            os.close(before)

    def _ip(self, *words: str) -> None:
        done = subprocess.run(["nsenter", f"--net={self._known()['namespace']}", "ip", *words], stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=segment.COMMAND_S)
        if done.returncode:
            raise Failed("network", f"ip {' '.join(words)}: {done.stderr.strip()[:300]}", "look at the node")

    def _known(self) -> dict[str, Any]:
        try:
            return segment.known(str(self.folder))
        except Trouble as error:
            raise Failed("network", str(error), "stop the workload, and start it anew") from None

    def end(self) -> None:
        """End it, where it is there; waits for it."""
        with suppress(Failed, OSError):
            told = self._known()
            descriptor = os.pidfd_open(told["pid"])
            try:
                if started_ticks(told["pid"]) == told["started"]:
                    with suppress(OSError):
                        os.kill(told["connector"], signal.SIGCONT)
                    signal.pidfd_send_signal(descriptor, signal.SIGTERM)
                    import select

                    if not select.select([descriptor], [], [], START_S)[0]:
                        signal.pidfd_send_signal(descriptor, signal.SIGKILL)
            finally:
                os.close(descriptor)
        (self.folder / "segment.json").unlink(missing_ok=True)


def remove(folder: Path) -> None:
    """A folder with all in it."""
    shutil.rmtree(folder, ignore_errors=True)


Ports = Sequence[network.Port]
