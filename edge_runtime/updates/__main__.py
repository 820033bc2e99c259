"""`python -m edge_runtime.updates turn|gate|lasted|no-data`: the root's half of an update, run by systemd in an image (novacron-update.service, novacron-gate.service, novacron-lasted.service, novacron-no-data.service).

The agent has no rights over disks. It writes a request into its own folder; this looks at it, and does it only where the bundle is signed, and where it is next. What it says back stands in its own folder, which the agent reads.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from ..contract.errors import ContractError
from ..contract.updates import parse_order, trusted_file
from . import signature
from .fat import Fat
from .install import Installer, Places, alone, read_document
from .slots import ENTRIES, SLOTS
from .source import Interrupted

DATA = Path("/var/lib/novacron")
STATE, REQUEST = DATA / "updates", DATA / "edge" / "updates" / "request.json"
IMAGE, KEYS = Path("/usr/lib/novacron/image.json"), Path("/usr/lib/novacron/update-keys")
ESP_MOUNT = Path("/run/novacron-update/esp")
ESP_NAME, DATA_NAME = "novacron-esp", "novacron-data"
ROOT_BELOW = Path("/sys/block/dm-0/slaves")
"""What the root's dm-verity lies on: the running slot."""

LATER = 75
"""Exit status (EX_TEMPFAIL of sysexits.h): the download was cut; systemd calls again."""

TURNS_MAX = 16
"""Requests in one run; an update has three."""

FOLLOW_S, LOOK_S = 20.0, 0.25
"""The agent answers `written` with the next request within seconds, and systemd does not tell of a change while we are still ending: it is waited for."""

AGENT = "novacron-edge.service"


def say(text: str) -> None:
    """To the journal of the system and the console."""
    print(f"novacron: {text}", flush=True)


def partitions() -> dict[str, Path]:
    """Devices by the partitions' names, of the disk that this system runs from (another one may bear the same names). Raises OSError."""
    slot = next(ROOT_BELOW.iterdir(), None)
    if slot is None:
        raise OSError("the root lies on no disk")
    told = (dict(line.partition("=")[::2] for line in found.read_text().splitlines()) for found in sorted(slot.resolve().parent.glob("*/uevent")))
    return {one["PARTNAME"]: Path("/dev") / one["DEVNAME"] for one in told if "PARTNAME" in one}


def make_room(device: Path) -> None:
    """Room behind the names of the boot loader's entries, on a boot partition that is not mounted."""
    with device.open("r+b", buffering=0) as file:
        try:
            for at, data in Fat(lambda at, size: os.pread(file.fileno(), size, at)).cleaned(ENTRIES):
                os.pwrite(file.fileno(), data, at)
                os.fsync(file.fileno())
        except (ValueError, FileNotFoundError) as error:
            say(f"the boot partition: {error}")


@contextmanager
def boot_partition(check: bool, write: bool = True) -> Iterator[Path]:
    """The boot partition, mounted for us alone (the unit has mounts of its own); looked over before, where something is to be written that needs room: a cut leaves clusters that belong to nothing.

    Mounting it for writing writes to its first sector, so it is read where that will do.
    """
    device = partitions()[ESP_NAME]
    if check:
        # 1: something was put right. Anything else is told and goes on: what can be mounted can be used.
        done = subprocess.run(["fsck.fat", "-a", "-w", str(device)], stdin=subprocess.DEVNULL, capture_output=True)
        if done.returncode not in (0, 1):
            say(f"fsck.fat: {done.stdout.decode(errors='replace')[-300:]}")
        make_room(device)
    ESP_MOUNT.mkdir(parents=True, exist_ok=True)
    subprocess.run(["mount", "-t", "vfat", "-o", f"{'rw' if write else 'ro'},noatime,nodev,nosuid,noexec,umask=0077", str(device), str(ESP_MOUNT)], check=True, stdin=subprocess.DEVNULL)
    try:
        yield ESP_MOUNT
    finally:
        subprocess.run(["umount", str(ESP_MOUNT)], check=True, stdin=subprocess.DEVNULL)


def places(esp: Path) -> Places:
    """This device. Raises OSError, KeyError, ValueError where it is not an image of ours."""
    disk = partitions()
    return Places(esp, {name: disk[name] for name in SLOTS}, STATE, Path("/proc/cmdline").read_text(), json.loads(IMAGE.read_text()), partial(signature.verified, KEYS))


def request() -> dict[str, Any]:
    """What the agent asks; empty where it asks for nothing that it may. It has checked its order too, but what runs with root's rights does not rely on that."""
    asked = read_document(REQUEST)
    try:
        if asked.get("action") != "install":
            return asked
        return {**parse_order(asked), "ca_file": trusted_file(asked.get("ca_file")), "action": "install", "asked": asked.get("asked")}
    except ContractError as error:
        say(f"the request is not looked at: {error}")
        return {}


def next_request(order: dict[str, Any], seconds: float) -> dict[str, Any]:
    """Another request than `order`, waited for so long at most; `order` where none came."""
    end = time.monotonic() + seconds
    while (newer := request()) == order and time.monotonic() < end:
        time.sleep(LOOK_S)
    return newer


def settled(esp: Path) -> Installer:
    """The installer, which looks once in each start at how that came about."""
    installer = Installer(places(esp), say)
    marked = Path("/run/novacron-update/settled")
    if not marked.exists():
        installer.settle()
        marked.touch()
    return installer


def lasted() -> int:
    """Called when a start has lasted for a while."""
    with alone(STATE):
        with boot_partition(check=False, write=False) as esp:
            installer = Installer(places(esp), say)
            installer.lasted()
            due = installer.to_settle()
        if due:
            with boot_partition(check=False) as esp:
                settled(esp)
    return 0


def turn() -> int:
    """What the request asks, as long as there is something next."""
    order = request()
    again = False
    with alone(STATE), boot_partition(check=order.get("action") == "install") as esp:
        installer = settled(esp)
        try:
            for _ in range(TURNS_MAX):
                again = installer.turn(order)
                newer = next_request(order, FOLLOW_S if installer.status.get("state") == "written" else 0.0)
                if again or newer == order:
                    break
                order = newer
        except Interrupted:
            return LATER
    if again:
        subprocess.run(["systemctl", "reboot"], check=True, stdin=subprocess.DEVNULL)
    return 0


def gate() -> int:
    """Called again and again while an image is on trial: past its time it is given up, and the device starts again."""
    trial = read_document(STATE / "trial.json")
    up_s = float(Path("/proc/uptime").read_text().split()[0])
    if not trial or up_s < int(trial.get("gate_s", 0)):
        return 0
    with alone(STATE), boot_partition(check=False) as esp:
        installer = Installer(places(esp), say)
        if not installer.on_trial():
            return 0
        told = read_document(REQUEST.with_name("gate.json")).get("missing")
        agent = subprocess.run(["systemctl", "show", AGENT, "-p", "ActiveState,Result,NRestarts"], capture_output=True, text=True, stdin=subprocess.DEVNULL).stdout.split()
        # What the agent last said of itself counts only while it lives.
        missing = "; ".join(str(line)[:200] for line in told[:5]) if isinstance(told, list) and "ActiveState=active" in agent else f"the agent does not run ({', '.join(agent)})"
        say(f"the image on trial has not proven itself within {trial.get('gate_s')} s: {missing}")
        installer.give_up(f"not proven within {trial.get('gate_s')} s: {missing}")
    subprocess.run(["systemctl", "--force", "reboot"], check=True, stdin=subprocess.DEVNULL)
    return 0


def no_data() -> int:
    """Called where the data partition cannot be mounted, before the unit starts the device again."""
    reason = "the data partition was not there in time" if not (Path("/dev/disk/by-partlabel") / DATA_NAME).exists() else "the data partition cannot be mounted"
    say(f"{reason}; starting again")
    with boot_partition(check=False) as esp:
        Installer(places(esp), say).no_data(reason)
    return 0


def main() -> int:
    """The command; returns the exit status."""
    parser = argparse.ArgumentParser(prog="edge_runtime.updates", description="the root's half of an update")
    parser.add_argument("what", choices=("turn", "gate", "lasted", "no-data"))
    options = parser.parse_args()
    os.umask(0o022)
    return {"turn": turn, "gate": gate, "lasted": lasted, "no-data": no_data}[options.what]()


if __name__ == "__main__":
    sys.exit(main())
