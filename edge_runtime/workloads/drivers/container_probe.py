"""The probe of the container driver: runs a container of the smallest program with everything, then with less, and says what worked and why the rest did not."""

import asyncio
import os
import platform
import subprocess
import tempfile
import uuid
from dataclasses import replace
from pathlib import Path

from .. import rootless
from ..images import Config
from . import criu, outside
from .cgroups import Groups
from .container import ContainerDriver
from .container_laying import Settings, Ways
from .container_spec import MIN_PIDS
from .criu import Criu
from .face import Ability, Capabilities, Failed, Key, Order, Phase, Refused
from .network import PROGRAM
from .probe_program import program
from .programs import searched

MEMORY = 16 << 20
"""Bytes that the probe's container may have."""


VERSION_S = 10.0
"""A runtime that does not tell its version within this is taken as absent."""

async def find(driver: ContainerDriver, settings: Settings, groups: Groups) -> tuple[Ways | None, Criu | None, Capabilities]:
    """The best of the ways that worked, the CRIU that did, and the report."""
    cannot = dict.fromkeys(
        (Ability.LIVE, Ability.INCREMENTAL, Ability.LAZY), "this driver has no code for it yet",
    ) | ({Ability.ROOTLESS: "the agent is the machine's root here; one of another user's can, with workloads.rootless"} if outside.UID is None else {})
    ways, runtime, reasons = None, "", []
    code = program(platform.machine())
    if short := outside.short_of_root(of_machine=False):
        reasons.append(f"{short}, and {rootless.why or 'workloads.rootless is not set'}" if os.geteuid() != 0 else short)
    elif odd := set(",:\\") & set(str(driver.scratch)):
        reasons.append(f"the data folder's path has {' '.join(sorted(odd))} in it, which overlayfs takes for its own")
    elif groups.lacks and not groups.undelegated():
        reasons.append(groups.lacks)
    elif code is None:
        reasons.append(f"there is no program to probe with for {platform.machine()}")
    elif not settings.runtimes:
        reasons.append("no program that does it is named (workloads.runtimes)")
    else:
        for name in settings.runtimes:
            path = searched(name)
            if path is None:
                reasons.append(f"{name} is not installed")
                continue
            ways, lacking = await tried(driver, settings, groups, path, code)
            if ways is not None:
                runtime = await asyncio.to_thread(_version, path)
                ways, without = await with_network(driver, settings, groups, ways, code)
                cannot |= lacking | without | (dict.fromkeys((Ability.LIMITS, Ability.STATS, Ability.PAUSE), ways.unlimited) if ways.unlimited else {})
                break
            reasons.append(f"{name}: {lacking[Ability.START]}")
    if outside.UID is not None:
        cannot[Ability.SNAPSHOT] = "files in its root belong to ids which the agent's user is not, and cannot read for"
    elif Ability.PAUSE in cannot:
        cannot[Ability.SNAPSHOT] = f"it would not stand still meanwhile: {cannot[Ability.PAUSE]}"
    if ways is None:
        reason = "; ".join(reasons) + " (as root: apt install runc)" * any("not installed" in one for one in reasons)
        cannot |= dict.fromkeys((ability for ability in Ability if ability not in cannot), reason)
    told = Capabilities("container", "container", runtime, platform.machine(), flags(), groups.layout, platform.release(), cannot)
    if ways is None or code is None:
        return ways, None, told
    found: Criu | str
    if outside.UID is not None:
        found = "CRIU has to be the machine's root"
    else:
        found = await asyncio.to_thread(criu.find, searched(settings.criu)) if settings.criu else "switched off by the configuration"
    driver.capabilities = told
    why = found if isinstance(found, str) else await _checkpointed(driver, ways, code, found)
    if why:
        return ways, None, replace(told, cannot=cannot | dict.fromkeys((Ability.CHECKPOINT, Ability.RESTORE, Ability.MIGRATE_OUT, Ability.MIGRATE_IN), why))
    assert isinstance(found, Criu)
    return ways, found, told


async def tried(driver: ContainerDriver, settings: Settings, groups: Groups, path: str, code: bytes) -> tuple[Ways | None, dict[Ability, str]]:
    """With user namespace and seccomp, then without the one, the other, both; what had to be left out, with the words of the try in which it was there."""
    lacking: dict[Ability, str] = {}
    tries = [(True, True), (False, True), (True, False), (False, False)]
    if outside.UID is not None:
        lacking[Ability.USER_NAMESPACE], tries = "the agent's own user namespace has no ids for others: a container's root is the agent's user outside", tries[1::2]
    for users, seccomp in tries:
        if users and not settings.users:
            lacking[Ability.USER_NAMESPACE] = "switched off by the configuration"
            continue
        ways = Ways((path,), users, seccomp, unlimited=groups.undelegated())
        try:
            more = await _run(driver, groups, ways, code)
        except (Refused, Failed, OSError) as error:
            why = error.problem if isinstance(error, (Refused, Failed)) else str(error)
            lacking[Ability.USER_NAMESPACE if users else Ability.SECCOMP if seccomp else Ability.START] = why
            continue
        if users:
            lacking.pop(Ability.USER_NAMESPACE, None)
        if seccomp:
            lacking.pop(Ability.SECCOMP, None)
        return ways, lacking | more
    return None, lacking


async def with_network(driver: ContainerDriver, settings: Settings, groups: Groups, ways: Ways, code: bytes) -> tuple[Ways, dict[Ability, str]]:
    """The same ways, with a network where a container got one."""
    program = searched(PROGRAM)
    if not settings.network:
        why = "switched off by the configuration"
    elif program is None:
        why = f"{PROGRAM} is not installed (as root: apt install {PROGRAM})"
    else:
        found = replace(ways, connector=program, unconnected="")
        try:
            await _run(driver, groups, found, code)
        except (Refused, Failed, OSError) as error:
            why = error.problem if isinstance(error, (Refused, Failed)) else str(error)
        else:
            return found, {}
    return replace(ways, unconnected=why), {Ability.NETWORK: why}


async def _run(driver: ContainerDriver, groups: Groups, ways: Ways, code: bytes) -> dict[Ability, str]:
    """One container from its beginning to its end; raises where it does not run as it should, returns what else did not work."""
    key = Key(f"probe-{uuid.uuid4().hex[:12]}", 1)
    more: dict[Ability, str] = {}
    with tempfile.TemporaryDirectory(dir=driver.scratch) as top:
        layer, order, config = _container(Path(top), key, code, bool(ways.connector))
        if ways.unlimited:
            order = replace(order, spec={name: value for name, value in order.spec.items() if name != "limits"})
        try:
            await asyncio.to_thread(driver.lay_out, order, config, [layer], ways)
            status = await driver.begin(key)
            group = driver.group(key)
            if status.phase is not Phase.RUNNING:
                raise Failed("start", f"the probe's container did not stay: {status.reason or status.phase.value}", "see the reason")
            if not ways.unlimited and groups.memory_limit(group) != MEMORY:
                raise Failed("limits", f"its memory limit is {groups.memory_limit(group)} instead of {MEMORY}", "give containers control groups of their own")
            if ways.connector and not has_route(Path(f"/proc/{status.pid}/net/route").read_text()):
                raise Failed("network", f"{PROGRAM} gave it no way out", "see its keeper's network.err")
            if ways.users and _outside_root(status.pid) == 0:
                raise Failed("users", "its root is the host's in spite of the user namespace", "look at the kernel")
            try:
                if not ways.unlimited:
                    await driver.freeze(key)
            except Failed as error:
                more[Ability.PAUSE] = error.problem
            ended = await driver.stop(key, 0.0)
            if ended.exit is None or not ended.exit.signal:
                raise Failed("stop", f"the probe's container was killed, and ended by {ended.reason or ended.phase.value}", "see the reason")
        finally:
            await driver.delete(key)
    return more


def _container(top: Path, key: Key, code: bytes, connected: bool = False) -> tuple[Path, Order, Config]:
    """A layer with the program, and what shall be run of it."""
    layer = top / "layer"
    layer.mkdir(mode=0o755)
    (layer / "probe").write_bytes(code)
    (layer / "probe").chmod(0o755)
    if connected:
        (layer / "etc").mkdir()
        for name in ("resolv.conf", "hosts"):
            (layer / "etc" / name).touch()
    return layer, Order(key, "", {}, {"limits": {"memory": MEMORY, "pids": MIN_PIDS}, "read_only_root": True, **({"network": {}} if connected else {})}), Config((), ("/probe",), (), "/", "", "", ("0" * 64,))


async def _checkpointed(driver: ContainerDriver, ways: Ways, code: bytes, found: Criu) -> str:
    """Take a container's state and bring it back, by CRIU; why that did not work, empty where it did."""
    name = f"probe-{uuid.uuid4().hex[:12]}"
    keys = Key(name, 1), Key(name, 2)
    with tempfile.TemporaryDirectory(dir=driver.scratch) as top:
        layer, order, config = _container(Path(top), keys[0], code)
        try:
            checkpoints = driver.checkpoints()
            await asyncio.to_thread(driver.lay_out, order, config, [layer], ways)
            await driver.begin(keys[0])
            await checkpoints.take(keys[0], Path(top, "state"), found, leave_running=False)
            manifest = await checkpoints.look_through(Path(top, "state"), found)
            status = await driver.again(replace(order, key=keys[1]), config, [layer], ways, found, Path(top, "state"), manifest, window_s=0.0)
            return "" if status.phase is Phase.RUNNING else f"the probe's container did not stay after it was brought back: {status.reason or status.phase.value}"
        except (Refused, Failed, OSError) as error:
            return f"CRIU {found.version}: {error}"
        finally:
            for key in keys:
                await driver.delete(key)


def has_route(table: str) -> bool:
    """Whether a table as in /proc/net/route has a default route."""
    return any(line.split()[1:2] == ["00000000"] for line in table.splitlines()[1:])


def _outside_root(pid: int) -> int:
    """The user id on the host of a process; -1 where it is gone."""
    try:
        return next(int(line.split()[1]) for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("Uid:"))
    except (OSError, StopIteration):
        return -1


def _version(path: str) -> str:
    try:
        said = subprocess.run([path, "--version"], stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=VERSION_S).stdout
    except (OSError, subprocess.SubprocessError):
        return os.path.basename(path)
    return (said.splitlines() or [os.path.basename(path)])[0][:200]


def flags() -> tuple[str, ...]:
    """The processor's features, as the kernel tells them."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() in ("flags", "Features", "isa"):
                return tuple(sorted(value.split()))
    except OSError:
        pass
    return ()
