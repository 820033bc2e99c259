"""Ground that gives way: a small file system of the agent's own, and a network namespace of its own whose links can be cut. Both need root."""

import asyncio
import ctypes
import json
import os
import subprocess
import sys
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Self

import pytest

from tests.integration.waiting import until_sync
from tools.bench.harness import die_with_parent, stop
from tools.powercut.fuse_disk import FuseDisk
from tools.powercut.mounts import attach, mount, program, reason_against, unmount

CLONE_NEWNET = 0x4000_0000


def made_ext4(image: Path, size: int, *, journal: bool = True) -> None:
    """An empty ext4 in a file."""
    with open(image, "wb") as handle:
        handle.truncate(size)
    subprocess.run([program("mkfs.ext4"), "-q", "-b", "4096", *(("-J", "size=4") if journal else ("-O", "^has_journal")), "-m", "0", "-E", "lazy_itable_init=0,lazy_journal_init=0,nodiscard", str(image)], check=True)


class SmallDisk:
    """An ext4 of `size` bytes, mounted at `path`; it goes read-only when it meets an error, as Debian mounts it."""

    def __init__(self, folder: Path, size: int = 48 << 20) -> None:
        if reason := reason_against():
            pytest.skip(reason)
        folder.mkdir()
        self._image = folder / "image"
        self.path = folder / "disk"
        self.path.mkdir()
        self._device = ""
        made_ext4(self._image, size)

    def insert(self) -> None:
        """Mount it."""
        self._device, descriptor = attach(self._image)
        mount(self._device, self.path, "ext4", "errors=remount-ro")
        os.close(descriptor)

    def remove(self) -> None:
        """Unmount it, where it is mounted; what a failed test still has open goes with that test."""
        if os.path.ismount(self.path):
            unmount(self.path, detach=True)

    def meet_an_error(self) -> None:
        """The file system finds something wrong and stops all writing at once."""
        Path(f"/sys/fs/ext4/{os.path.basename(self._device)}/trigger_fs_error").write_text("planted by a test")

    def repair(self) -> None:
        """What a machine does at its next start."""
        self.remove()
        subprocess.run([program("e2fsck"), "-f", "-y", str(self._image)], capture_output=True, timeout=60)
        self.insert()

    def fill(self) -> None:
        """Write until nothing fits any more."""
        try:
            with open(self.path / "filler", "ab", buffering=0) as handle:
                while True:
                    handle.write(bytes(65_536))
        except OSError:
            pass  # full

    def make_room(self) -> None:
        """Delete what filled it."""
        (self.path / "filler").unlink()


class StubbornCard(FuseDisk):
    """A flash card of `size` bytes, mounted at `path` while used as a context manager. While it `refuses`, it takes no writes, as a card at its end does."""

    def __init__(self, folder: Path, size: int = 48 << 20) -> None:
        if reason := reason_against():
            pytest.skip(reason)
        folder.mkdir()
        target, self.path = folder / "card", folder / "disk"
        target.touch()
        self.path.mkdir()
        # Without a journal of its own, as cards often are: with one the file system would give up for good at the first refusal.
        made_ext4(folder / "image", size, journal=False)
        self._content = bytearray((folder / "image").read_bytes())
        super().__init__(size, target)
        self.refuses = False
        self.refused = 0

    def __enter__(self) -> Self:
        super().__enter__()
        device, descriptor = attach(self._target)
        mount(device, self.path, "ext4", "errors=continue")
        os.close(descriptor)
        return self

    def __exit__(self, *details: object) -> None:
        unmount(self.path, detach=True)
        self.error = None  # what it refused
        super().__exit__(*details)

    def read(self, offset: int, size: int) -> bytes:
        return bytes(self._content[offset : offset + size])

    def write(self, offset: int, data: bytes) -> None:
        self._take()
        self._content[offset : offset + len(data)] = data

    def flush(self) -> None:
        self._take()

    def _take(self) -> None:
        if self.refuses:
            self.refused += 1
            raise PermissionError("the card takes no writes")


class Namespace:
    """A network namespace with its own loopback and links to here.

    Args:
        links: how many; link `n` has `here(n)` at our end and is cut with `cut(n)`.
    """

    def __init__(self, links: int) -> None:
        if os.getuid() != 0 or subprocess.run(["unshare", "-n", "true"], capture_output=True).returncode != 0:
            pytest.skip("a network namespace cannot be made here (needs root)")
        self._links = links
        # Numbers from the process id: tests in other processes have others.
        self._base = os.getpid() % 4096 * 16
        self._holder = subprocess.Popen(["unshare", "-n", sys.executable, "-c", "import signal; signal.pause()"], preexec_fn=die_with_parent)
        own = os.readlink("/proc/self/ns/net")
        until_sync(lambda: os.readlink(f"/proc/{self._holder.pid}/ns/net") != own, what="a network namespace")
        self.wrap = ("nsenter", f"--net=/proc/{self._holder.pid}/ns/net")
        """To run a command inside."""
        self._descriptor = os.open(f"/proc/{self._holder.pid}/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        self._inside = ThreadPoolExecutor(1, initializer=self._enter)
        try:
            self._ip_inside("link", "set", "lo", "up")
            for number in range(links):
                self._ip("link", "add", self._name(number), "type", "veth", "peer", "name", f"e{number}", "netns", str(self._holder.pid))
                self._ip("addr", "add", f"{self.here(number)}/30", "dev", self._name(number))
                self._ip("link", "set", self._name(number), "up")
                self._ip_inside("addr", "add", f"{self._address(number, 2)}/30", "dev", f"e{number}")
                self._ip_inside("link", "set", f"e{number}", "up")
        except subprocess.CalledProcessError as error:
            self.close()
            pytest.skip(f"no veth here: {error.stderr}")

    def _enter(self) -> None:
        if ctypes.CDLL(None, use_errno=True).setns(self._descriptor, CLONE_NEWNET) != 0:
            raise OSError(ctypes.get_errno(), "setns")

    def _name(self, number: int) -> str:
        return f"nc{os.getpid()}.{number}"

    def _address(self, number: int, end: int) -> str:
        value = self._base + 4 * number + end
        return f"10.203.{value >> 8}.{value & 255}"

    def here(self, number: int) -> str:
        """Our address on link `number`."""
        return self._address(number, 1)

    @staticmethod
    def _ip(*words: str) -> None:
        subprocess.run([program("ip"), *words], check=True, capture_output=True, text=True)

    def _ip_inside(self, *words: str) -> None:
        subprocess.run([*self.wrap, program("ip"), *words], check=True, capture_output=True, text=True)

    def cut(self, number: int) -> None:
        """The cable is out: nothing passes, nobody is told."""
        self._ip("link", "set", self._name(number), "down")

    def heal(self, number: int) -> None:
        """The cable is in again."""
        self._ip("link", "set", self._name(number), "up")

    def thin(self, number: int, kbit: int) -> None:
        """That link carries so much each way from now on, and holds 60 KB that wait, as a modem does."""
        for wrap, device in (((), self._name(number)), (self.wrap, f"e{number}")):
            try:
                done = subprocess.run([*wrap, program("tc"), "qdisc", "add", "dev", device, "root", "tbf", "rate", f"{kbit}kbit", "burst", "3000", "limit", "60000"], capture_output=True, text=True)
            except FileNotFoundError as error:
                pytest.skip(f"no link can be made thin here: {error}")
            if done.returncode:
                pytest.skip(f"no link can be made thin here: {done.stderr.strip()}")

    async def get(self, port: int, path: str) -> Any:
        """A GET from inside, of what listens there on loopback; JSON, or text where it is not."""

        def ask() -> Any:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=10) as answer:
                text = answer.read().decode()
                return json.loads(text) if answer.headers.get_content_type() == "application/json" else text

        return await asyncio.get_running_loop().run_in_executor(self._inside, ask)

    def close(self) -> None:
        """End it and its links: by itself the kernel takes them away some time later, and the next of this process has their names."""
        for number in range(self._links):
            subprocess.run([program("ip"), "link", "del", self._name(number)], capture_output=True)
        self._inside.shutdown()
        os.close(self._descriptor)
        stop(self._holder)
