"""Snapshots of real containers and virtual machines: what is in them, that what is begun from one has it, and that what they were taken of goes on."""

import asyncio
import hashlib
import os
import tarfile
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from edge_runtime.config.schema import ApiConfig
from edge_runtime.contract.desired import parse_desired
from edge_runtime.workloads.drivers import container_snapshot
from edge_runtime.workloads.drivers.container import ContainerDriver
from edge_runtime.workloads.drivers.face import Failed, Key, Phase, Refused, Snapshots
from edge_runtime.workloads.drivers.instance import SNAPSHOT
from tests.system.operation_agent import EDGE, config
from tests.unit.workloads.image_side import archive, layer, layout

from .container_side import base, driver, reason_against, started
from .edges import Edge
from .test_edge_operations import done, empty
from .vm_side import kernel_folder, kernel_store
from .vm_side import reason_against as reason_against_vms
from .waiting import until

__all__ = ["driver"]

pytestmark = pytest.mark.skipif(bool(reason_against()), reason=reason_against())

ROOM_S = 120.0
"""For what takes seconds on a machine of one's own."""

CHANGES = "echo new > /srv/new; echo x >> /srv/old/c; rm /srv/old/a; ln /srv/new /srv/hard; ln -s new /srv/soft; mkdir -p /srv/deep/er; echo n > /srv/deep/er/n; "
"""A script that changes what the image has, in each way."""

STAYS = "echo ready; while true; do sleep 0.05; done"

SHOWS = "cd /srv; cat new hard soft old/c old/b deep/er/n; ls old; stat -c '%a %u %h' new; "


async def test_a_snapshot_has_what_was_changed_with_its_owners_and_the_container_goes_on(driver: ContainerDriver, tmp_path: Path) -> None:
    assert isinstance(driver, Snapshots)
    key = await started(driver, "changing", "echo a > /srv/file; chmod 640 /srv/file; rm -r /srv/old; echo ready; i=0; while true; do echo $i; i=$((i+1)); sleep 0.01; done")
    await until(lambda: _says(driver, key, b"ready"))
    (tmp_path / "copy").mkdir()
    told = await driver.snapshot(key, tmp_path / "copy")
    assert (told["file"], told["format"], told["image"]) == ("changed.tar", "layer", driver._store.find("box:1").digest) and 0 < told["paused_ms"] < 60_000
    assert driver.snapshot_bytes(key) > 0
    with tarfile.open(tmp_path / "copy/changed.tar") as found:
        names = {member.name: member for member in found}
    assert names["srv/file"].mode == 0o640 and names["srv/file"].uid == names["srv/file"].gid == 0 and "srv/.wh.old" in names
    before = (await driver.logs(key, 100)).stdout
    await until(lambda: _other(driver, key, before), what="it goes on")
    with pytest.raises(Refused, match="is not empty"):
        await driver.snapshot(key, tmp_path / "copy")
    await driver.delete(key)


async def test_one_that_is_paused_stays_so_and_one_that_has_ended_is_copied(driver: ContainerDriver, tmp_path: Path) -> None:
    key = await started(driver, "pausing", "echo a > /srv/file; echo ready; sleep 1000")
    await until(lambda: _says(driver, key, b"ready"))
    await driver.pause(key)
    for name in ("paused", "ended"):
        (tmp_path / name).mkdir()
        assert (await driver.snapshot(key, tmp_path / name))["paused_ms"] == 0
        with tarfile.open(tmp_path / name / "changed.tar") as found:
            assert "srv/file" in found.getnames()
        if name == "paused":
            assert (await driver.status(key)).phase is Phase.PAUSED
            await driver.stop(key, 1.0)
    await driver.delete(key)
    (tmp_path / "gone").mkdir()
    with pytest.raises(Refused, match="no container"):
        await driver.snapshot(key, tmp_path / "gone")


async def test_what_cannot_be_in_a_layer_is_named_and_it_goes_on(driver: ContainerDriver, tmp_path: Path) -> None:
    key = await started(driver, "odd", "echo a > /srv/.wh.odd; echo ready; i=0; while true; do echo $i; i=$((i+1)); sleep 0.01; done")
    await until(lambda: _says(driver, key, b"ready"))
    with pytest.raises(Refused, match=r"/srv/\.wh\.odd has a name that means something else"):
        await driver.snapshot(key, tmp_path)
    assert (await driver.status(key)).phase is Phase.RUNNING and not (driver.folder(key) / SNAPSHOT).exists()
    await driver.delete(key)


async def test_one_whose_copy_fails_or_is_given_up_goes_on(driver: ContainerDriver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk is full; and the agent ends while it stands still."""
    key = await started(driver, "failing", "echo ready; sleep 1000")
    await until(lambda: _says(driver, key, b"ready"))

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(container_snapshot, "_pack", full)
    with pytest.raises(Failed, match="No space left"):
        await driver.snapshot(key, tmp_path)
    assert (await driver.status(key)).phase is Phase.RUNNING
    begun = asyncio.Event()
    loop = asyncio.get_running_loop()
    monkeypatch.setattr(container_snapshot, "_pack", lambda *_: loop.call_soon_threadsafe(begun.set))
    real = asyncio.to_thread

    async def waits(function: Any, *words: Any) -> Any:
        await real(function, *words)
        if function is container_snapshot._pack:
            await asyncio.Event().wait()

    monkeypatch.setattr(container_snapshot.asyncio, "to_thread", waits)
    task = asyncio.create_task(driver.snapshot(key, tmp_path))
    await begun.wait()
    assert (await driver.status(key)).phase is Phase.PAUSED and (driver.folder(key) / SNAPSHOT).exists()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert (await driver.status(key)).phase is Phase.RUNNING and not (driver.folder(key) / SNAPSHOT).exists()
    await driver.delete(key)


async def _says(driver: ContainerDriver, key: Key, text: bytes) -> bool:
    return text in (await driver.logs(key, 1 << 16)).stdout


async def _other(driver: ContainerDriver, key: Key, before: bytes) -> bool:
    return (await driver.logs(key, 100)).stdout != before


# -- as operations of an edge ------------------------------------------------------------------------------------------------


@pytest.fixture
async def edge(tmp_path: Path) -> AsyncIterator[Edge]:
    """An edge with an image in two layers."""
    (tmp_path / "shared").mkdir()
    (tmp_path / "data/workloads/archives").mkdir(parents=True)
    more = [layer([("file", "srv/.wh.gone", b""), ("file", "srv/old/c", b"c")])]
    archive(layout(tmp_path / "in", [base(), *more], name="box:1"), tmp_path / "data/workloads/archives/box.tar")
    found = Edge(replace(config(tmp_path), api=ApiConfig(port=0)))
    await found.start()
    try:
        yield found
    finally:
        runner = found.runtime.workload_node()._runner
        for one in found.runtime.workload_node().here.all.values():
            await runner.take([])
            await until(lambda one=one: empty(one), ROOM_S)
        await found.stop()


def names(folder: Path) -> tuple[str, str]:
    """Two workloads of this test: control groups are the machine's."""
    word = hashlib.sha256(str(folder).encode()).hexdigest()[:10]
    return f"snap-{word}", f"from-{word}"


def wanted(generation: int, *workloads: tuple[str, str, str], epoch: int = 1) -> Any:
    """Each as its name, its image and its script."""
    return parse_desired({"v": 1, "edge": EDGE, "generation": generation, "spec": {"workloads": [
        {"id": name, "epoch": epoch, "wanted": "running", "kind": "container", "image": image, "document": {"id": name, "image": image, "spec": {"command": ["sh", "-c", f"trap 'exit 0' TERM; {script}"], "restart": "never"}}} for name, image, script in workloads
    ]}}, EDGE)


async def wrote(edge: Edge, name: str, enough: Callable[[str], bool]) -> str:
    """What a workload has written, once it is enough."""
    async def said() -> str | None:
        status, told = await edge.ask(f"/api/v1/workloads/{name}/logs")
        return told["stdout"] if status == 200 and enough(told["stdout"]) else None

    found: str = await until(said, ROOM_S, f"the output of {name}")
    return found


async def test_a_workload_is_begun_from_a_snapshot_and_sees_what_was_there(edge: Edge, tmp_path: Path) -> None:
    first, second = names(tmp_path)
    edge.runtime.desired_state.receive(wanted(1, (first, "box:1", CHANGES + STAYS)))
    await wrote(edge, first, lambda said: "ready" in said)
    taken = await done(edge, first, {"kind": "snapshot", "name": "a"})
    assert (taken["state"], taken["reason"]) == ("succeeded", ""), taken
    [kept] = await edge.get(f"/api/v1/workloads/{first}/snapshots")
    assert {key: value for key, value in taken["detail"].items() if key != "paused_ms"} == kept and kept["image"] == f"snapshots/{first}:a" and os.path.getsize(kept["file"]) == kept["bytes"]
    assert (await edge.get("/api/v1/snapshots")) == [kept] and os.stat(kept["file"]).st_mode & 0o777 == 0o600
    records = [one["body"] for one in await edge.get("/api/v1/journal/event?limit=100") if one["kind"] == "workload.snapshots"]
    assert records == [{"snapshots": [kept]}]
    edge.runtime.desired_state.receive(wanted(2, (second, kept["image"], SHOWS + "ls gone; echo over")))  # the one that it is of goes, it stays
    assert (await wrote(edge, second, lambda said: "over" in said)).split() == ["new", "new", "new", "cx", "bn", "b", "c", "644", "0", "2", "over"]
    assert (await edge.get("/api/v1/snapshots")) == [kept]
    assert kept["image"] in edge.runtime.workload_node().images.held()
    # Of a snapshot that is made anew under its name, the new one counts.
    changed = (first, "box:1", "echo newer > /srv/new; " + STAYS)
    edge.runtime.desired_state.receive(wanted(3, changed, epoch=2))
    await until(lambda: _placed(edge, 2), ROOM_S)
    await wrote(edge, first, lambda said: "ready" in said)
    assert (again := await done(edge, first, {"kind": "snapshot", "name": "a"}))["state"] == "failed" and "has a snapshot a already" in again["reason"]
    assert (await done(edge, first, {"kind": "delete-snapshot", "name": "a"}))["state"] == "succeeded" and await edge.get("/api/v1/snapshots") == []
    assert (await done(edge, first, {"kind": "delete-snapshot", "name": "a"}))["state"] == "failed"
    assert (await done(edge, first, {"kind": "snapshot", "name": "a"}))["state"] == "succeeded"
    edge.runtime.desired_state.receive(wanted(4, changed, (f"{second}-b", kept["image"], "cat /srv/new; echo over"), epoch=2))
    assert (await wrote(edge, f"{second}-b", lambda said: "over" in said)).split() == ["newer", "over"]
    assert not list((tmp_path / "data/workloads/snapshots/.new").iterdir())


async def _placed(edge: Edge, epoch: int) -> bool:
    return [one["epoch"] for one in await edge.get("/api/v1/workloads") if one["phase"] == "running"] == [epoch]


BAD: list[tuple[dict[str, Any], str]] = [({"kind": "snapshot", "stop": True}, "stop: is for checkpoints"), ({"kind": "snapshot", "name": "../x"}, "name: '../x' is not a name"), ({"kind": "delete-snapshot", "name": "none"}, "has no snapshot none")]


async def test_what_cannot_be_done_is_told_and_nothing_is_left(edge: Edge, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, _ = names(tmp_path)
    edge.runtime.desired_state.receive(wanted(1, (first, "box:1", STAYS)))
    await wrote(edge, first, lambda said: "ready" in said)
    for asked, why in BAD:
        told = await done(edge, first, asked)
        assert told["state"] == "failed" and why in told["reason"], told
    snapshotting = edge.runtime.workload_node().asked.snapshotting
    assert snapshotting is not None
    for name, value, why in (("_budget", 1 << 20, "with the images they may have 1048576"), ("_store", _Layers(snapshotting._store), "layers, and with one more")):
        with monkeypatch.context() as planted:
            planted.setattr(snapshotting, name, value)
            told = await done(edge, first, {"kind": "snapshot", "name": "a"})
            assert told["state"] == "failed" and why in told["reason"], told
    assert await edge.get("/api/v1/snapshots") == [] and not list((tmp_path / "data/workloads/snapshots/.new").iterdir())
    async with snapshotting._one:  # the first is copied, and is not an image yet
        _, one = await edge.ask(f"/api/v1/workloads/{first}/operations", "POST", body={"kind": "snapshot", "name": "a"})
        await until(lambda: snapshotting._writing, ROOM_S)
        assert "or it is being written" in (await done(edge, first, {"kind": "snapshot", "name": "a"}))["reason"]

    async def succeeded() -> bool:
        return bool((await edge.get(f"/api/v1/operations/{one['id']}"))["state"] == "succeeded")

    await until(succeeded, ROOM_S, "the first, which the second left alone")
    assert (await done(edge, first, {"kind": "snapshot"}))["detail"]["image"].startswith(f"snapshots/{first}:local-")


class _Layers:
    """A store that takes images of two layers at most."""

    def __init__(self, store: Any) -> None:
        self._store, self.limits = store, replace(store.limits, layers=2)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)


# -- of virtual machines -----------------------------------------------------------------------------------------------------


@pytest.mark.skipif(bool(reason_against_vms()), reason=reason_against_vms())
async def test_a_machine_is_begun_from_a_snapshot_of_another(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    kernel_store(tmp_path / "images").close()
    (tmp_path / "data/workloads/archives").mkdir(parents=True)
    archive(tmp_path / "images/kernel", tmp_path / "data/workloads/archives/kernel.tar")
    told = config(tmp_path)
    edge = Edge(replace(told, api=ApiConfig(port=0), workloads=replace(told.workloads, vms=True, guest_kernel=kernel_folder())))
    await edge.start()
    first, second = names(tmp_path)

    def machine(name: str, image: str, script: str) -> dict[str, Any]:
        spec = {"cloud_init": {"user_data": "#!/bin/sh\n" + script}, "boot_s": ROOM_S}
        return {"id": name, "epoch": 1, "wanted": "running", "kind": "vm", "image": image, "requests": {"memory": 128 << 20}, "document": {"id": name, "image": image, "spec": spec}}

    def desired(generation: int, *machines: dict[str, Any]) -> Any:
        return parse_desired({"v": 1, "edge": EDGE, "generation": generation, "spec": {"workloads": list(machines)}}, EDGE)

    try:
        edge.runtime.desired_state.receive(desired(1, machine(first, "kernel:1", "echo kept > /data/mark; sync; echo ready")))
        await wrote(edge, first, lambda said: "ready" in said)
        taken = await done(edge, first, {"kind": "snapshot", "name": "a"})
        assert (taken["state"], taken["reason"], taken["detail"]["paused_ms"]) == ("succeeded", "", 0), taken
        assert {one["id"]: one["phase"] for one in await edge.get("/api/v1/workloads")} == {first: "running"}
        edge.runtime.desired_state.receive(desired(2, machine(second, taken["detail"]["image"], "cat /data/mark; echo over")))
        found = await wrote(edge, second, lambda said: "over" in said)
        assert "kept" in found and "start 2" in found, "it has the other's disk"
    finally:
        runner = edge.runtime.workload_node()._runner
        await runner.take([])
        for one in edge.runtime.workload_node().here.all.values():
            await until(lambda one=one: empty(one), ROOM_S)  # type: ignore[misc]
        await edge.stop()
