"""Devices: the registry against a plain oracle, readings that come early, twins, and the host read two ways."""

import asyncio
import json
import math
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_runtime.contract import jsoncodec
from edge_runtime.contract.device_messages import Reading
from edge_runtime.contract.errors import ContractError
from edge_runtime.contract.limits import MAX_BODY_BYTES, MAX_METRICS
from edge_runtime.contract.records import CHAIN_START, Record, encode_batch, parse_batch
from edge_runtime.devices.host import HostSampler
from edge_runtime.devices.registry import MAX_LAST_ERRORS, MAX_TWIN_PROPERTIES, DeviceRegistry


def message(**changes: Any) -> dict[str, Any]:
    return {"kind": "generic", "name": "", "parent": None, "meta": {}, **changes}


def reading(number: int) -> Reading:
    return Reading({"n": number})


def numbers(readings: list[Reading]) -> list[Any]:
    return [item.values["n"] for item in readings]


# -- readings that come early --------------------------------------------------------------------------------------------------


def test_early_readings_are_kept_handed_out_once_and_in_order() -> None:
    registry = DeviceRegistry(auto_register=False)
    for number in range(3):
        assert registry.seen("a", reading(number), number) == (None, False)
    assert registry.early_waiting == 3 and registry.devices == {}
    device, changed, early = registry.register("a", message(kind="boiler"), 10)
    assert (device.kind, changed, numbers(early)) == ("boiler", True, [0, 1, 2])
    assert registry.register("a", message(kind="boiler"), 11)[1:] == (False, []) and registry.early_waiting == 0
    assert registry.seen("a", reading(9), 12) == (device, False) and device.readings == 1
    assert registry.register("a", message(kind="fan"), 13)[1] is True


def test_early_readings_past_the_bounds_go_oldest_first_and_are_counted() -> None:
    registry = DeviceRegistry(auto_register=False, early_max_devices=2, early_max_readings=3)
    for number in range(5):
        registry.seen("a", reading(number), 0)
    assert registry.early_dropped == 2 and registry.early_waiting == 3
    registry.seen("b", reading(0), 0)
    registry.seen("a", reading(5), 0)  # `a` spoke last, so `b` is the one that goes
    registry.seen("c", reading(0), 0)
    assert numbers(registry.register("b", message(), 0)[2]) == [] and numbers(registry.register("a", message(), 0)[2]) == [3, 4, 5]
    assert registry.early_dropped == 4


def test_early_readings_that_are_too_old_are_not_handed_out_but_counted() -> None:
    registry = DeviceRegistry(auto_register=False, early_ttl_ms=100)
    registry.seen("a", reading(1), 0)
    registry.seen("a", reading(2), 50)
    assert numbers(registry.register("a", message(), 150)[2]) == [2]
    assert registry.early_dropped == 1


def test_keeping_none_at_all_is_a_bound_too() -> None:
    registry = DeviceRegistry(auto_register=False, early_max_devices=0)
    for number in range(3):
        assert registry.seen("a", reading(number), 0) == (None, False)
    assert registry.early_waiting == 0 and registry.early_dropped == 3


early_ops = st.lists(st.tuples(st.sampled_from(["seen", "register"]), st.sampled_from("abcd"), st.integers(0, 40)), max_size=80)


@settings(max_examples=200)
@given(early_ops, st.integers(0, 3), st.integers(1, 4), st.integers(0, 100))
def test_early_readings_follow_a_plain_oracle(ops: list[tuple[str, str, int]], most_devices: int, most_readings: int, ttl: int) -> None:
    registry = DeviceRegistry(auto_register=False, early_max_devices=most_devices, early_max_readings=most_readings, early_ttl_ms=ttl)
    waiting: list[tuple[str, list[tuple[int, int]]]] = []  # least recently heard first
    known: set[str] = set()
    now = sent = given_out = live = 0
    for op, name, step in ops:
        now += step
        mine = dict(waiting).get(name)
        if op == "seen":
            sent += 1
            registry.seen(name, reading(sent), now)
            if name in known:
                live += 1
                continue
            if most_devices == 0:
                continue
            if mine is None:
                waiting = waiting[len(waiting) + 1 - most_devices :] if len(waiting) >= most_devices else waiting
                mine = []
            waiting = [item for item in waiting if item[0] != name] + [(name, [*mine, (now, sent)][-most_readings:])]
        else:
            early = numbers(registry.register(name, message(), now)[2])
            assert early == [number for at, number in mine or () if now - at <= ttl]
            given_out += len(early)
            known.add(name)
            waiting = [item for item in waiting if item[0] != name]
        assert registry.early_waiting == sum(len(queue) for _, queue in waiting)
    # Nothing vanishes uncounted: taken at once, handed out, still waiting, or dropped.
    assert sent == live + given_out + registry.early_waiting + registry.early_dropped


# -- the registry --------------------------------------------------------------------------------------------------------------


def test_a_first_reading_registers_and_a_full_registry_says_so_and_keeps_what_it_has() -> None:
    registry = DeviceRegistry(max_devices=2)
    assert registry.seen("a", reading(1), 5)[1] is True and registry.seen("a", reading(2), 6)[1] is False
    registry.register("b", message(), 6)
    for attempt in (lambda: registry.seen("c", reading(1), 7), lambda: registry.register("c", message(), 7), lambda: registry.report("c", {"x": 1}), lambda: registry.desire("c", {"x": 1})):
        with pytest.raises(ContractError) as caught:
            attempt()
        assert caught.value.reason == "limit" and "registry_max" in caught.value.remedy
    assert set(registry.devices) == {"a", "b"} and registry.devices["a"].values == {"n": 2}
    assert registry.seen("a", reading(3), 8)[0] is registry.devices["a"]


def test_early_readings_of_a_device_that_does_not_fit_stay() -> None:
    registry = DeviceRegistry(max_devices=1, auto_register=False)
    registry.register("a", message(), 0)
    registry.seen("b", reading(1), 0)
    with pytest.raises(ContractError):
        registry.register("b", message(), 0)
    assert registry.early_waiting == 1


@given(st.lists(st.dictionaries(st.sampled_from([f"m{n}" for n in range(200)]), st.integers(), min_size=1, max_size=MAX_METRICS), max_size=30))
def test_the_newest_values_are_bounded(messages: list[dict[str, Any]]) -> None:
    registry = DeviceRegistry()
    for values in messages:
        device, _ = registry.seen("a", Reading(values), 0)
        assert device is not None and len(device.values) <= MAX_METRICS and device.values.items() >= values.items()


def test_errors_are_remembered_bounded_and_touch_their_own_device_only() -> None:
    registry = DeviceRegistry()
    registry.seen("a", reading(1), 0)
    registry.seen("b", reading(1), 0)
    for number in range(MAX_LAST_ERRORS + 10):
        registry.failed("a", ContractError("temp", f"bad {number}", "send better"), number)
    registry.failed("stranger", ContractError("payload", "bad", "send better"), 0)
    assert len(registry.errors) == MAX_LAST_ERRORS and registry.errors[-1]["device"] == "stranger"
    assert registry.devices["a"].errors == MAX_LAST_ERRORS + 10 and "send better" in registry.devices["a"].last_error
    assert (registry.devices["b"].errors, registry.devices["b"].last_error) == (0, "") and "stranger" not in registry.devices


# -- twins ---------------------------------------------------------------------------------------------------------------------

properties = st.dictionaries(st.sampled_from(["speed", "mode", "target", "x"]), st.none() | st.integers(0, 3) | st.text(max_size=2) | st.lists(st.integers(0, 1), max_size=2), max_size=4)


@settings(max_examples=200)
@given(st.lists(st.tuples(st.sampled_from(["report", "desire", "replace", "restart"]), properties), max_size=30))
def test_twins_follow_a_plain_oracle_also_over_restarts(ops: list[tuple[str, dict[str, Any]]]) -> None:
    registry = DeviceRegistry()
    registry.register("a", message(kind="fan"), 0)
    state: dict[str, dict[str, Any]] = {"reported": {}, "desired": {}}
    versions = {"reported": 0, "desired": 0}
    for op, patch in ops:
        if op == "restart":
            kept = json.loads(json.dumps(registry.devices["a"].to_state()))
            registry = DeviceRegistry()
            registry.restore("a", kept)
            assert registry.devices["a"].kind == "fan"
            continue
        which = "reported" if op == "report" else "desired"
        base = {} if op == "replace" else state[which]
        expected = {key: value for key, value in {**base, **patch}.items() if value is not None}
        changed = registry.report("a", patch) if op == "report" else registry.desire("a", patch, op == "replace")
        assert (changed is not None) == (expected != state[which])
        versions[which] += expected != state[which]
        state[which] = expected
        assert registry.devices["a"].twin() == {
            "desired": state["desired"], "desired_version": versions["desired"], "reported": state["reported"], "reported_version": versions["reported"],
            "delta": {key: value for key, value in state["desired"].items() if state["reported"].get(key) != value},
        }


def test_the_twin_oracle_can_fail() -> None:
    registry = DeviceRegistry()
    registry.register("a", message(), 0)
    registry.devices["a"].desired = {"speed": 3}  # as a merge that forgets the version would
    assert registry.desire("a", {"speed": 3}) is None and registry.devices["a"].twin()["desired_version"] == 0


@pytest.mark.parametrize("patch", [[], 3, "x", None, True])
def test_a_twin_that_is_no_object_is_refused(patch: Any) -> None:
    registry = DeviceRegistry()
    for attempt in (registry.report, registry.desire):
        with pytest.raises(ContractError) as caught:
            attempt("a", patch)
        assert caught.value.reason == "type" and caught.value.remedy
    assert registry.devices == {}


def nested(depth: int) -> dict[str, Any]:
    out: dict[str, Any] = {"leaf": 1}
    for _ in range(depth - 1):
        out = {"in": out}
    return out


@pytest.mark.parametrize("patch", [
    {f"p{number}": 1 for number in range(MAX_TWIN_PROPERTIES + 1)}, {"p" * 65: 1}, {"deep": nested(12)}, {"deep": [[[[[[[[[[[[1]]]]]]]]]]]]}, {"wide": "x" * MAX_BODY_BYTES}, {"wide": "\u20ac" * 20_000},
], ids=["properties", "name", "depth", "depth of lists", "bytes", "bytes as JSON"])
def test_a_twin_over_a_limit_is_refused_whole(patch: dict[str, Any]) -> None:
    registry = DeviceRegistry()
    registry.report("a", {"kept": 1})
    registry.desire("a", {"kept": 2})
    before = registry.devices["a"].to_state()
    for attempt in (registry.report, registry.desire, lambda device, change: registry.desire(device, change, True)):
        with pytest.raises(ContractError) as caught:
            attempt("a", {"other": 1, **patch})
        assert caught.value.reason in ("limit", "depth", "size") and caught.value.remedy
    assert registry.devices["a"].to_state() == before


def test_a_twin_within_the_limits_fits_a_record_a_batch_and_the_kept_state() -> None:
    # What a device may report must not become a record that the hub refuses: it would be sent again for ever.
    registry, largest = DeviceRegistry(), 0
    for depth in range(1, 20):
        try:
            registry.report("a", {"deep": nested(depth), "long": "\u20ac" * 2000})
        except ContractError:
            continue
        largest = depth
        device = registry.devices["a"]
        body = jsoncodec.encode({"device": "a", "reported": device.reported, "version": device.reported_version})
        record = Record(1, "b1", 1, 1, "rtc", "twin.reported", body)
        batch = encode_batch(
            edge="e", boot="b1", boot_n=1, stream="event", lane="live", floor=1, floor_chain=CHAIN_START, dropped=0, live=1, history=1, next_seq=2, records=[record], chain=record.chain(CHAIN_START)
        )
        assert parse_batch(jsoncodec.decode(batch), "e").records == (record,)
        assert jsoncodec.decode(jsoncodec.encode(device.to_state()).encode()) == device.to_state()
    assert largest >= 4


# -- the host ------------------------------------------------------------------------------------------------------------------

psutil = pytest.importorskip("psutil", reason="psutil is not installed")
RATES = {"context_switches_per_second", "disk_read_bytes_per_second", "disk_write_bytes_per_second", "network_receive_bytes_per_second", "network_transmit_bytes_per_second"}


class Ticks:
    """A clock that moves one second per look."""

    now = 0.0

    def __call__(self) -> float:
        self.now += 1
        return self.now


def busy() -> None:
    total = 0
    while os.times().user - busy.start < 0.05:  # type: ignore[attr-defined]
        total += sum(range(1000))


def test_both_readers_give_the_same_names_and_close_values() -> None:
    samplers = [HostSampler(use_psutil=True), HostSampler(use_psutil=False)]
    assert [sampler.reader for sampler in samplers] == ["psutil", "proc"]
    first = [sampler.sample() for sampler in samplers]
    busy.start = os.times().user  # type: ignore[attr-defined]
    busy()  # some ticks of CPU time must pass between two samples
    second = [sampler.sample() for sampler in samplers]
    assert first[0].keys() == first[1].keys() and second[0].keys() == second[1].keys()
    assert not RATES & first[0].keys() and second[0].keys() - first[0].keys() <= RATES | {"cpu_ratio"} and "cpu_ratio" in second[0]
    for name, by_psutil, by_proc in ((name, second[0][name], second[1][name]) for name in second[0]):
        assert math.isfinite(by_psutil) and math.isfinite(by_proc), name
        if name.endswith("_ratio") and name != "cpu_ratio":
            assert by_proc == pytest.approx(by_psutil, abs=0.05) and 0 <= by_proc <= 1, name
        elif name in ("load1", "load5", "load1_per_core", "uptime_seconds", "disk_free_bytes", "memory_available_bytes", "processes"):
            assert by_proc == pytest.approx(by_psutil, rel=0.2, abs=10), name
        assert name not in ("cpu_ratio",) or 0 < by_proc <= 1


@pytest.mark.parametrize("use_psutil", [True, False])
def test_a_sample_lets_others_have_their_turn_between_its_parts(use_psutil: bool) -> None:
    sampler = HostSampler(use_psutil=use_psutil)

    async def beside() -> tuple[dict[str, float], int]:
        turns = 0

        def turn() -> None:
            nonlocal turns
            turns += 1
            asyncio.get_running_loop().call_soon(turn)

        turn()
        return await sampler.sample_in_turns(), turns

    values, turns = asyncio.run(beside())
    assert turns >= len(sampler._parts) > 5
    assert values.keys() == HostSampler(use_psutil=use_psutil).sample().keys()


STAT = "cpu  {user} 0 100 {idle} 50 0 0 0 0 0\ncpu0 1 2 3\nctxt {ctxt}\n"
MEMINFO = "MemTotal: 1000 kB\nMemFree: 100 kB\nMemAvailable: 250 kB\nSwapTotal: 100 kB\nSwapFree: 25 kB\n"
DISKSTATS = (
    "   8 0 sda 1 2 {read} 4 5 6 {written} 8 9 10 11\n   8 1 sda1 1 2 999 4 5 6 999 8 9 10 11\n 259 0 nvme0n1 1 2 10 4 5 6 20 8 9 10 11\n"
    " 259 1 nvme0n1p1 1 2 999 4 5 6 999 8 9 10 11\n   7 0 loop0 1 2 999 4 5 6 999 8 9 10 11\n 253 0 dm-0 1 2 999 4 5 6 999 8 9 10 11\n"
)
NET = "Inter-| Receive\n face |bytes\n    lo: 999 0 0 0 0 0 0 0 999 0\n  eth0: {rx} 0 0 0 0 0 0 0 {tx} 0\nwlan0:5 0 0 0 0 0 0 0 7 0\n"


def root(folder: Path, user: int = 1000, idle: int = 5000, ctxt: int = 0, read: int = 0, written: int = 0, rx: int = 0, tx: int = 0) -> Path:
    """A /proc and /sys of our own."""
    (folder / "proc/net").mkdir(parents=True, exist_ok=True)
    for pid in ("1", "22", "self", "17x"):
        (folder / "proc" / pid).mkdir(exist_ok=True)
    for zone, text in (("thermal_zone0", "41500\n"), ("thermal_zone1", "62000\n"), ("thermal_zone2", "999000\n"), ("thermal_zone3", "hot\n")):
        (folder / "sys/class/thermal" / zone).mkdir(parents=True, exist_ok=True)
        (folder / "sys/class/thermal" / zone / "temp").write_text(text)
    for name, text in (("stat", STAT), ("meminfo", MEMINFO), ("diskstats", DISKSTATS), ("net/dev", NET), ("uptime", "12.5 40.0\n")):
        (folder / "proc" / name).write_text(text.format(user=user, idle=idle, ctxt=ctxt, read=read, written=written, rx=rx, tx=tx) if "{" in text else text)
    return folder


def test_the_proc_reader_counts_what_it_should(tmp_path: Path) -> None:
    sampler = HostSampler(use_psutil=False, root=root(tmp_path), clock=Ticks())
    first = sampler.sample()
    assert first["memory_used_ratio"] == 0.75 and first["memory_available_bytes"] == 250 * 1024 and first["swap_used_ratio"] == 0.75
    assert (first["processes"], first["uptime_seconds"], first["temperature_celsius"]) == (2, 12.5, 62.0)
    root(tmp_path, user=1030, idle=5070, ctxt=500, read=8, written=16, rx=1000, tx=2000)
    second = sampler.sample()
    assert second["cpu_ratio"] == pytest.approx(0.3) and second["context_switches_per_second"] == 500
    assert (second["disk_read_bytes_per_second"], second["disk_write_bytes_per_second"]) == (8 * 512, 16 * 512)
    assert (second["network_receive_bytes_per_second"], second["network_transmit_bytes_per_second"]) == (1000, 2000)


def test_counters_that_go_back_give_no_rate_and_then_rates_again(tmp_path: Path) -> None:
    sampler = HostSampler(use_psutil=False, root=root(tmp_path, ctxt=10**6, rx=10**6, user=9000), clock=Ticks())
    sampler.sample()
    root(tmp_path, ctxt=5, rx=5, tx=5, user=10, idle=10)
    second = sampler.sample()
    assert not {"context_switches_per_second", "network_receive_bytes_per_second", "cpu_ratio"} & second.keys() and second["network_transmit_bytes_per_second"] == 5
    root(tmp_path, ctxt=25, rx=25, user=20, idle=20)
    third = sampler.sample()
    assert third["context_switches_per_second"] == 20 and third["cpu_ratio"] == pytest.approx(0.5) and "network_transmit_bytes_per_second" not in third


def test_what_a_host_lacks_is_left_out_and_never_zero(tmp_path: Path) -> None:
    expected: list[tuple[Callable[[], None], set[str]]] = [
        ((tmp_path / "proc/meminfo").unlink, {"memory_available_bytes", "memory_used_ratio", "swap_used_ratio"}), ((tmp_path / "proc/diskstats").unlink, {"disk_read_bytes_per_second", "disk_write_bytes_per_second"}),
        ((tmp_path / "proc/net/dev").unlink, {"network_receive_bytes_per_second", "network_transmit_bytes_per_second"}), ((tmp_path / "proc/uptime").unlink, {"uptime_seconds"}),
        ((tmp_path / "proc/stat").unlink, {"cpu_ratio", "context_switches_per_second"}),
    ]
    sampler, user = HostSampler(use_psutil=False, root=root(tmp_path), clock=Ticks()), 1000
    left = sampler.sample().keys() | RATES | {"cpu_ratio"}
    for remove, names in expected:
        user += 100
        if (tmp_path / "proc/stat").exists():
            (tmp_path / "proc/stat").write_text(STAT.format(user=user, idle=5000, ctxt=0))
        remove()
        now = sampler.sample().keys()
        assert left - now == names
        left = now
    bare = HostSampler(use_psutil=False, root=tmp_path / "nowhere", disk=str(tmp_path / "nowhere"), clock=Ticks())
    assert {name for name in bare.sample() if not name.startswith("load")} == set()


@settings(max_examples=150)
@given(st.integers(0, 2**32), st.sampled_from(["stat", "meminfo", "diskstats", "net/dev", "uptime"]))
def test_garbage_in_proc_raises_nothing_and_gives_finite_numbers(tmp_path_factory: pytest.TempPathFactory, seed: int, name: str) -> None:
    draw = random.Random(seed)
    folder = root(tmp_path_factory.getbasetemp() / "garbage", user=draw.randrange(10**6))
    sampler = HostSampler(use_psutil=False, root=folder, clock=Ticks())
    sampler.sample()
    text = bytearray((folder / "proc" / name).read_bytes())
    for _ in range(draw.randrange(1, 30)):
        position = draw.randrange(len(text) + 1)
        text[position : position + draw.randrange(4)] = draw.choice([b"", b"nan", b"inf", b"-5", b"\xff\x00", b" ", b"\n", b":", b"9" * 400, b"cpu ", b"x"])
    (folder / "proc" / name).write_bytes(text)
    for _ in range(2):
        assert all(math.isfinite(value) for value in sampler.sample().values())
