"""The probe of the drivers that go by containerd: runs a container by it, with everything, then with less; where it shall have a kernel of its own, looks whether it has."""

import asyncio
import platform
import tempfile
import uuid
from pathlib import Path

from ..images import Config
from . import containerd_wire, outside
from .cgroups import Groups
from .container_laying import Settings, Ways
from .container_probe import flags, tried, with_network
from .containerd import ContainerdDriver, Handler
from .containerd_client import Client
from .face import Ability, Capabilities, Failed, Key, Order, Phase, Refused
from .probe_program import program, teller
from .programs import searched

ASKED_S = 10.0
"""containerd that does not tell its version within this is taken as absent."""

LOOK_S = 0.05
TOLD_S = 30.0
"""Between two looks at what the probe's program has written, and in which time it has: by then it is known to run."""


async def find(driver: ContainerdDriver, settings: Settings, groups: Groups, handler: Handler, client: Client) -> tuple[Ways | None, Capabilities]:
    """The best of the ways that worked, and the report."""
    cannot = dict.fromkeys((Ability.MIGRATE_OUT, Ability.MIGRATE_IN, Ability.LIVE, Ability.INCREMENTAL, Ability.LAZY), "this driver has no code for it yet") | {
        Ability.ROOTLESS: "containerd's own socket and control groups are root's",
    } | dict.fromkeys((Ability.CHECKPOINT, Ability.RESTORE), "only the driver that runs runc directly takes states (workloads.runtimes without containerd)")
    ways, version = None, ""
    reason = _lacks(driver, groups, handler)
    if not reason:
        try:
            version = (await client.call(containerd_wire.VERSION, ASKED_S))["version"]
            ways, lacking = await (_kata(driver, handler) if handler.own_kernel else _runc(driver, settings, groups, handler))
        except (Failed, Refused, OSError) as error:
            reason = str(error)
        else:
            cannot |= lacking
            if handler.own_kernel:
                cannot[Ability.SNAPSHOT] = "Kata's machines write to their roots by a way of their own, which has not been tried"
            elif Ability.PAUSE in cannot:
                cannot[Ability.SNAPSHOT] = f"it would not stand still meanwhile: {cannot[Ability.PAUSE]}"
    if ways is None:
        cannot |= dict.fromkeys((ability for ability in Ability if ability not in cannot), reason or cannot.get(Ability.START, "the probe failed"))
    runtime = f"containerd {version} ({handler.runtime})" if version else ""
    return ways, Capabilities(handler.name, "container", runtime, platform.machine(), flags(), groups.layout, platform.release(), cannot)


def _lacks(driver: ContainerdDriver, groups: Groups, handler: Handler) -> str:
    """What a probe need not run for, in words; empty where there is nothing."""
    if short := outside.short_of_root():
        return short
    if searched(handler.shim) is None:
        how = "Debian has no package of it; see the Kata Containers project for one" if handler.own_kernel else "as root: apt install containerd"
        return f"{handler.shim} is not installed ({how})"
    if odd := set(",:\\") & set(str(driver.scratch)):
        return f"the data folder's path has {' '.join(sorted(odd))} in it, which overlayfs takes for its own"
    return groups.lacks or ("" if (teller if handler.own_kernel else program)(platform.machine()) else f"there is no program to probe with for {platform.machine()}")


async def _runc(driver: ContainerdDriver, settings: Settings, groups: Groups, handler: Handler) -> tuple[Ways | None, dict[Ability, str]]:
    code = program(platform.machine())
    assert code is not None
    ways, lacking = await tried(driver, settings, groups, handler.runtime, code)
    if ways is None:
        return None, lacking
    ways, without = await with_network(driver, settings, groups, ways, code)
    return ways, lacking | without


async def _kata(driver: ContainerdDriver, handler: Handler) -> tuple[Ways | None, dict[Ability, str]]:
    """A container whose program tells by which boot of which kernel it runs. That it started proves nothing: a shim of that name could be any."""
    code = teller(platform.machine())
    assert code is not None
    ways = Ways((handler.runtime,), False, False, unconnected="this driver has no code for it yet")
    key = Key(f"probe-{uuid.uuid4().hex[:12]}", 1)
    with tempfile.TemporaryDirectory(dir=driver.scratch) as top:
        layer = Path(top, "layer")
        layer.mkdir(mode=0o755)
        (layer / "probe").write_bytes(code)
        (layer / "probe").chmod(0o755)
        try:
            await asyncio.to_thread(driver.lay_out, Order(key, ""), Config((), ("/probe",), (), "/", "", "", ("0" * 64,)), [layer], ways)
            status = await driver.begin(key)
            if status.phase is not Phase.RUNNING:
                raise Failed("start", f"the probe's container did not stay: {status.reason or status.phase.value}", "see the reason")
            told = await _told(driver, key)
            if told == Path("/proc/sys/kernel/random/boot_id").read_text().strip():
                raise Failed("isolation", f"what {handler.shim} starts runs on this node's own kernel: it does not isolate", "install Kata Containers' shim under that name")
        finally:
            await driver.delete(key)
    return ways, dict.fromkeys((Ability.NETWORK, Ability.STATS, Ability.DISK_LIMIT, Ability.PAUSE), "this driver has no code for it yet") | dict.fromkeys(
        (Ability.SECCOMP, Ability.USER_NAMESPACE), "it has a kernel of its own instead")


async def _told(driver: ContainerdDriver, key: Key) -> str:
    """The line that the probe's program writes."""
    try:
        async with asyncio.timeout(TOLD_S):
            while b"\n" not in (said := (await driver.logs(key, 1024)).stdout):
                await asyncio.sleep(LOOK_S)
    except TimeoutError:
        raise Failed("start", f"the probe's program wrote nothing within {TOLD_S:g} s", "see the node's log of containerd") from None
    return said.decode("ascii", "replace").strip()
