"""The host as a device: what /proc (or psutil) says of it, as flat metrics in base units.

psutil reads where it is installed; the /proc reader stands in where it has no wheel (riscv64, armv7) and gives the same names. What a host
lacks (a thermal sensor, a disk counter) is left out, never zero. Rates need two samples: the first one leaves them out.
"""

import asyncio
import math
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ..contract.lean_dataclass import dataclass, field

SECTOR_BYTES = 512
"""The unit of /proc/diskstats, whatever the disk's own sector is (Documentation/admin-guide/iostats.rst)."""

_PARTITIONS = ("loop", "ram", "zram", "dm-", "sr", "md")
"""Block devices that would be counted twice or hold no data of their own."""


@dataclass(slots=True)
class Counters:
    """One look at the host: `gauges` as they are, `totals` that only grow, `busy` and `total` CPU seconds."""

    gauges: dict[str, float] = field(default_factory=dict)
    totals: dict[str, float] = field(default_factory=dict)
    busy: float | None = None
    total: float | None = None


class HostSampler:
    """Samples the host.

    Args:
        use_psutil: True or False; None takes psutil where it can be imported.
        root: where /proc and /sys are looked up by the /proc reader.
        disk: the file system whose fill is told.
        clock: monotonic seconds.
    """

    def __init__(self, use_psutil: bool | None = None, root: Path = Path("/"), disk: str = "/", clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._disk = disk
        self._root = root
        self.reader = "proc"
        self._parts: tuple[Callable[[Counters], None], ...] = (self._common, self._processor, self._memory, self._processes, self._disks, self._links, self._temperature)
        if use_psutil is not False:
            try:
                import psutil
            except ImportError:
                if use_psutil:
                    raise
            else:
                self.reader = "psutil"
                self._psutil: Any = psutil
                self._parts = (
                    self._common, self._psutil_processor, self._psutil_memory, self._processes, self._psutil_disks, self._psutil_links, self._temperature,
                )
        self._last: tuple[float, Counters] | None = None

    def sample(self) -> dict[str, float]:
        """Metric to value; ratios 0 to 1, bytes, per second, degrees Celsius."""
        now, current = self._clock(), Counters()
        for part in self._parts:
            part(current)
        return self._rates(now, current)

    async def sample_in_turns(self) -> dict[str, float]:
        """`sample` in parts, each a file or two of /proc, with a turn of the loop between two: at once it takes a millisecond here and ten on a small board, in which nothing would be decided."""
        now, current = self._clock(), Counters()
        for part in self._parts:
            part(current)
            await asyncio.sleep(0)
        return self._rates(now, current)

    def _rates(self, now: float, current: Counters) -> dict[str, float]:
        out = dict(current.gauges)
        if self._last is not None:
            before_s, before = self._last
            elapsed = now - before_s
            if elapsed > 0:
                for name, value in current.totals.items():
                    old = before.totals.get(name)
                    if old is not None and value >= old:  # a counter that went back was reset or wrapped: no rate this time
                        out[f"{name}_per_second"] = (value - old) / elapsed
            if current.busy is not None and before.busy is not None and current.total is not None and before.total is not None:
                passed = current.total - before.total
                if passed > 0:
                    out["cpu_ratio"] = min(1.0, max(0.0, (current.busy - before.busy) / passed))
        self._last = (now, current)
        return out

    # -- both ----------------------------------------------------------------------------------------------------------------

    def _common(self, counters: Counters) -> None:
        try:
            one, five, _ = os.getloadavg()
            cores = os.cpu_count() or 1
            counters.gauges["load1"] = one
            counters.gauges["load1_per_core"] = one / cores
            counters.gauges["load5"] = five
        except OSError:
            pass  # not told on this host
        try:
            disk = os.statvfs(self._disk)
            usable = disk.f_blocks - disk.f_bfree + disk.f_bavail
            if usable:
                counters.gauges["disk_used_ratio"] = (disk.f_blocks - disk.f_bfree) / usable
            counters.gauges["disk_free_bytes"] = disk.f_bavail * disk.f_frsize
        except OSError:
            pass  # the file system has gone

    def _processes(self, counters: Counters) -> None:
        try:
            counters.gauges["processes"] = float(sum(1 for name in os.listdir(self._root / "proc") if name.isdigit()))
        except OSError:
            pass  # no /proc

    # -- psutil --------------------------------------------------------------------------------------------------------------

    def _psutil_processor(self, counters: Counters) -> None:
        times = self._psutil.cpu_times()
        total = sum(getattr(times, name, 0.0) for name in ("user", "system", "nice", "idle", "iowait", "irq", "softirq", "steal"))
        counters.total, counters.busy = total, total - times.idle - getattr(times, "iowait", 0.0)
        counters.totals["context_switches"] = self._psutil.cpu_stats().ctx_switches

    def _psutil_memory(self, counters: Counters) -> None:
        memory = self._psutil.virtual_memory()
        counters.gauges["memory_available_bytes"] = memory.available
        counters.gauges["memory_used_ratio"] = 1 - memory.available / memory.total if memory.total else 0.0
        swap = self._psutil.swap_memory()
        counters.gauges["swap_used_ratio"] = swap.used / swap.total if swap.total else 0.0

    def _psutil_disks(self, counters: Counters) -> None:
        disks = self._psutil.disk_io_counters(perdisk=True) or {}
        kept = [value for name, value in disks.items() if _whole_disk(name, disks)]
        if kept:
            counters.totals["disk_read_bytes"] = sum(item.read_bytes for item in kept)
            counters.totals["disk_write_bytes"] = sum(item.write_bytes for item in kept)

    def _psutil_links(self, counters: Counters) -> None:
        links = {name: value for name, value in self._psutil.net_io_counters(pernic=True).items() if name != "lo"}
        counters.totals["network_receive_bytes"] = sum(item.bytes_recv for item in links.values())
        counters.totals["network_transmit_bytes"] = sum(item.bytes_sent for item in links.values())
        counters.gauges["uptime_seconds"] = time.clock_gettime(time.CLOCK_BOOTTIME)

    # -- /proc ---------------------------------------------------------------------------------------------------------------

    def _text(self, path: str) -> str:
        try:
            return (self._root / path).read_text(errors="replace")
        except OSError:
            return ""

    def _processor(self, counters: Counters) -> None:
        for line in self._text("proc/stat").splitlines():
            words = line.split()
            if not words:
                continue
            if words[0] == "cpu":
                ticks = _numbers(words[1:9])  # user nice system idle iowait irq softirq steal; guest is inside user
                if len(ticks) >= 4:
                    hertz = os.sysconf("SC_CLK_TCK")
                    counters.total = sum(ticks) / hertz
                    counters.busy = (sum(ticks) - ticks[3] - (ticks[4] if len(ticks) > 4 else 0)) / hertz
            elif words[0] == "ctxt" and (value := _numbers(words[1:2])):
                counters.totals["context_switches"] = value[0]

    def _links(self, counters: Counters) -> None:
        received = sent = 0.0
        links = self._text("proc/net/dev").splitlines()[2:]
        for line in links:
            name, _, rest = line.partition(":")
            values = _numbers(rest.split())
            if name.strip() != "lo" and len(values) >= 9:
                received, sent = received + values[0], sent + values[8]
        if links:
            counters.totals["network_receive_bytes"], counters.totals["network_transmit_bytes"] = received, sent
        uptime = _numbers(self._text("proc/uptime").split()[:1])
        if uptime:
            counters.gauges["uptime_seconds"] = uptime[0]

    def _memory(self, counters: Counters) -> None:
        memory: dict[str, float] = {}
        for line in self._text("proc/meminfo").splitlines():
            name, _, rest = line.partition(":")
            values = _numbers(rest.split()[:1])
            if values:
                memory[name] = values[0] * 1024
        if memory.get("MemTotal") and "MemAvailable" in memory:
            counters.gauges["memory_available_bytes"] = memory["MemAvailable"]
            counters.gauges["memory_used_ratio"] = 1 - memory["MemAvailable"] / memory["MemTotal"]
            swap = memory.get("SwapTotal", 0.0)
            counters.gauges["swap_used_ratio"] = 1 - memory.get("SwapFree", 0.0) / swap if swap else 0.0

    def _disks(self, counters: Counters) -> None:
        disks: dict[str, tuple[float, float]] = {}
        for line in self._text("proc/diskstats").splitlines():
            words = line.split()
            if len(words) >= 10:
                values = _numbers([words[5], words[9]])
                if len(values) == 2:
                    disks[words[2]] = (values[0] * SECTOR_BYTES, values[1] * SECTOR_BYTES)
        kept = [value for name, value in disks.items() if _whole_disk(name, disks)]
        if kept:
            counters.totals["disk_read_bytes"] = sum(value[0] for value in kept)
            counters.totals["disk_write_bytes"] = sum(value[1] for value in kept)

    def _temperature(self, counters: Counters) -> None:
        hottest: float | None = None
        try:
            zones = list((self._root / "sys/class/thermal").glob("thermal_zone*/temp"))[:64]
        except OSError:
            zones = []
        for zone in zones:
            try:
                degrees = int(zone.read_text()) / 1000
            except (OSError, ValueError):
                continue
            if -60 < degrees < 200:
                hottest = degrees if hottest is None else max(hottest, degrees)
        if hottest is not None:
            counters.gauges["temperature_celsius"] = hottest


def _whole_disk(name: str, names: Mapping[str, object]) -> bool:
    """Whether a block device is a disk and not a part of one (sda1 of sda, nvme0n1p1 of nvme0n1)."""
    if name.startswith(_PARTITIONS):
        return False
    base = name.rstrip("0123456789")
    return not (base != name and (base in names or (base.endswith("p") and base[:-1] in names)))


def _numbers(words: list[str]) -> list[float]:
    """The words as numbers, up to the first that is none (nan and inf are none)."""
    out = []
    for word in words:
        try:
            number = float(word)
        except ValueError:
            break
        if not math.isfinite(number):
            break
        out.append(number)
    return out
