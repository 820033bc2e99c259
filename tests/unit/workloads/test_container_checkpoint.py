"""What stands of a checkpoint while it is being taken, against a driver of which a container is only told."""

from pathlib import Path

import pytest

from edge_runtime.workloads.drivers import cgroups
from edge_runtime.workloads.drivers.checkpoint_state import DISK, IMAGES, Writer, seal
from edge_runtime.workloads.drivers.container import ContainerDriver
from edge_runtime.workloads.drivers.container_checkpoint import Checkpoints
from edge_runtime.workloads.drivers.face import Exit, Failed, Key, Phase, Status
from edge_runtime.workloads.drivers.instance import NOTE, read
from edge_runtime.workloads.drivers.keeping import write
from edge_runtime.workloads.images import ImageStore, Limits

from .test_checkpoint_state import DOCUMENT


class Ended:
    """A driver whose container was killed; but for what it is."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def folder(self, key: Key) -> Path:
        return self._folder

    async def status(self, key: Key) -> Status:
        return Status(key, Phase.ENDED, exit=Exit(137, 9))


def whole(folder: Path) -> Path:
    """A state with the token `t`."""
    (folder / IMAGES).mkdir(parents=True)
    with Writer(folder, DISK, "zlib") as target:
        target.write(b"")
    seal(folder, {**DOCUMENT, "token": "t"}, [target.entry], "zlib")
    return folder


async def test_what_its_state_has_ended_stays_checkpointed_when_that_has_another_name(tmp_path: Path) -> None:
    """As the source of a move gives it one, before it goes on from it."""
    (own := tmp_path / "own").mkdir()
    state = whole(tmp_path / "move-1")
    write(str(own / NOTE), {"folder": str(state), "new": str(tmp_path / ".new"), "leave_running": False, "token": "t"})
    checkpoints = Checkpoints(Ended(own), cgroups.read(), Limits())  # type: ignore[arg-type]
    await checkpoints.settle(Key("a", 1))
    state.rename(tmp_path / "back-move-1")
    await checkpoints.settle(Key("a", 1))
    assert (read(own / NOTE) or {}).get("folder") == str(state)


async def test_what_was_not_whole_is_taken_back(tmp_path: Path) -> None:
    (own := tmp_path / "own").mkdir()
    (new := tmp_path / ".new").mkdir()
    write(str(own / NOTE), {"folder": str(tmp_path / "state"), "new": str(new), "leave_running": False, "token": "t"})
    await Checkpoints(Ended(own), cgroups.read(), Limits()).settle(Key("a", 1))  # type: ignore[arg-type]
    assert not (own / NOTE).exists() and not new.exists()


async def test_what_nobody_saw_the_end_of_is_checkpointed_where_its_state_is_whole(tmp_path: Path) -> None:
    """The power went right after: it must not begin anew, as its state may be on its way to another node by now."""
    store = ImageStore(tmp_path / "images")
    driver, key, state = ContainerDriver(tmp_path, store), Key("a", 1), tmp_path / "move-1"
    (own := driver.folder(key)).mkdir(parents=True)
    (own / "lock").touch()
    write(str(own / "instance.json"), {"id": "a", "epoch": 1})
    write(str(own / "running.json"), {"pid": 1, "started": 0, "boot": "another", "keeper": 1})
    write(str(own / NOTE), {"folder": str(state), "new": str(tmp_path / ".new"), "leave_running": False, "token": "t"})
    assert (await driver.status(key)).phase is Phase.LOST
    whole(state)
    await Checkpoints(driver, cgroups.read(), Limits()).settle(key)
    assert (await driver.status(key)).phase is Phase.CHECKPOINTED
    driver.close()
    store.close()


async def test_one_that_got_away_from_the_runtime_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a busy node; a checkpoint failed for it."""
    store, tries = ImageStore(tmp_path / "images"), []
    driver = ContainerDriver(tmp_path, store)

    async def freeze(key: Key) -> None:
        tries.append(key)
        raise Failed("pause", "the runtime says: unable to freeze" if len(tries) < 3 else "the end of this test", "look at the node")

    monkeypatch.setattr(driver, "_freeze", freeze)
    monkeypatch.setattr(driver, "_running", lambda key: Status(key, Phase.RUNNING))
    with pytest.raises(Failed, match="the end of this test"):
        await driver.checkpoints()._written(Key("a", 1), tmp_path / "state", None, {}, 0, lambda _: None)  # type: ignore[arg-type]
    assert tries == [Key("a", 1)] * 3
    driver.close()
    store.close()
