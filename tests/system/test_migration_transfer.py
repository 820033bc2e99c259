"""Whole transfers on loopback: what arrives is what was sent, or nothing; whatever the wire, the other end or the disk does."""

import contextlib
import os
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from gpu_migration import keys, sender, wire
from gpu_migration.errors import DestinationError, KeyRefused, MigrationError, Refused, SourceError, TransferLost
from gpu_migration.layout import EXTENT, PAGE
from gpu_migration.receiver import Received, Receiver, add_base
from gpu_migration.sender import Sender, Sent
from gpu_migration.sources import FileSource
from tests.unit.migration.memory import changed, memory
from tools.bench.migration_proxy import WIRE_FAULTS, Fault, Proxy, cut, cut_all

KEY = bytes(range(32))
PATIENCE = 20.0


class Far:
    """A receiver on a thread."""

    def __init__(self, path: Path, key: bytes = KEY, patience: float = PATIENCE, **options: object) -> None:
        self.receiver = Receiver(path, key, ("127.0.0.1", 0), patience=patience, **options)  # type: ignore[arg-type]
        self.result: Received | None = None
        self.error: MigrationError | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self.result = self.receiver.serve()
        except MigrationError as error:
            self.error = error

    def end(self) -> "Far":
        self._thread.join(60)
        assert not self._thread.is_alive()
        return self

    def kill(self) -> None:
        """As if the process died: no farewell, no commit."""
        self.receiver._failure = TransferLost("killed")
        with self.receiver._state:
            self.receiver._state.notify_all()
        self._thread.join(60)


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """12.5 extents of memory with holes."""
    path = tmp_path / "image"
    with path.open("wb") as file:
        for n in range(12):
            if n % 5 == 3:
                file.seek(EXTENT, os.SEEK_CUR)
            else:
                file.write(memory(48, n) * 5 + memory(16, n + 100))
        file.write(memory(100, 77)[:-777])
    return path


def send(path: Path, address: tuple[str, int], **options: object) -> Sent:
    source = FileSource(path)
    base = options.pop("base", None)
    try:
        with contextlib.ExitStack() as stack:
            if base is not None:
                options["base"] = base_source = FileSource(base)  # type: ignore[arg-type]
                stack.callback(base_source.close)
            return Sender(source, options.pop("key", KEY), address, **{"patience": PATIENCE, "transfer": "t", **options}).run()  # type: ignore[arg-type]
    finally:
        source.close()


@pytest.mark.parametrize("told, there", [(0, 2), (3, 3)])
def test_ends_on_one_machine_leave_each_other_half_of_its_processors(image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, told: int, there: int) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 4)
    far = Far(tmp_path / "out")
    source = FileSource(image)
    sending = Sender(source, KEY, far.receiver.address, transfer="t", patience=PATIENCE, threads=told)
    sending.run()
    assert far.end().result is not None and sum(one.name.startswith("encode") for one in sending._workers) == there
    source.close()


@contextlib.contextmanager
def proxied(far: Far) -> Iterator[Proxy]:
    proxy = Proxy(far.receiver.address)
    try:
        yield proxy
    finally:
        proxy.close()


def clean(path: Path) -> bool:
    """Nothing is left beside the destination."""
    return sorted(one.name for one in path.parent.glob(path.name + "*")) == [path.name]


@pytest.mark.parametrize("streams", [(1, 1), (2, 2), (8, 8)])
def test_a_file_arrives_whole(image: Path, tmp_path: Path, streams: tuple[int, int]) -> None:
    far = Far(tmp_path / "out")
    sent = send(image, far.receiver.address, streams=streams)
    assert far.end().result is not None and far.result is not None and far.result.root == sent.root
    assert (tmp_path / "out").read_bytes() == image.read_bytes() and clean(tmp_path / "out")
    assert sent.wire_bytes < image.stat().st_size / 2 and sent.high_water <= 17 << 20
    assert (tmp_path / "out").stat().st_blocks * 512 < image.stat().st_size  # holes stay holes


@pytest.mark.parametrize("size", [1, PAGE, EXTENT, EXTENT + 1])
def test_small_files(tmp_path: Path, size: int) -> None:
    (tmp_path / "small").write_bytes(os.urandom(size))
    far = Far(tmp_path / "out")
    send(tmp_path / "small", far.receiver.address)
    assert far.end().error is None and (tmp_path / "out").read_bytes() == (tmp_path / "small").read_bytes()


def test_small_extents_share_records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    groups: list[int] = []
    grouped = wire.grouped

    def counted(parts: Sequence[tuple[int, bytes]]) -> bytes:
        groups.append(len(parts))
        return grouped(parts)

    monkeypatch.setattr(wire, "grouped", counted)
    with (tmp_path / "small").open("wb") as file:
        for n in range(2 * wire.GROUP_MOST):
            file.write(bytes((n + 1,)) * PAGE + bytes(EXTENT - PAGE))
    far = Far(tmp_path / "out")
    send(tmp_path / "small", far.receiver.address, threads=1, streams=(1, 1))
    assert far.end().result is not None and (tmp_path / "out").read_bytes() == (tmp_path / "small").read_bytes()
    assert groups == [wire.GROUP_MOST, wire.GROUP_MOST]


@pytest.mark.parametrize("name", sorted(WIRE_FAULTS))
@pytest.mark.parametrize("way", ["there", "back"])
def test_whatever_the_wire_does_the_transfer_goes_on(image: Path, tmp_path: Path, name: str, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # Bytes that never come are only told from slow ones by waiting.
    monkeypatch.setattr(wire, "HELLO_S", 0.5)
    monkeypatch.setattr(sender, "STALL_S", 1.0)
    far = Far(tmp_path / "out")
    with proxied(far) as proxy:
        for at in (5_000, 60_000, 500_000, 1_500_000) if way == "there" else (100, 900, 1500):
            proxy.plan(at, WIRE_FAULTS[name], way)
        send(image, proxy.address)
        assert proxy.fired >= 2
    assert far.end().error is None and (tmp_path / "out").read_bytes() == image.read_bytes()


@pytest.mark.parametrize("at", [0, 130, 300, 200_000, 1_200_000])
def test_a_receiver_that_dies_is_taken_up_again(image: Path, tmp_path: Path, at: int) -> None:
    """The second receiver takes only what it has not got, and another port."""
    out = tmp_path / "out"
    first = Far(out)
    died = threading.Event()

    def die(proxy: Proxy, _: bytes) -> None:
        died.set()
        proxy.cut_all()

    with proxied(first) as proxy:
        proxy.plan(at, die)
        result: list[object] = []
        sending = threading.Thread(target=lambda: result.append(send(image, proxy.address, codecs=("store",))))
        sending.start()
        assert died.wait(30)
        first.kill()
        assert not out.exists()
        second = Far(out)
        proxy.target = second.receiver.address
        sending.join(60)
    assert result and second.end().error is None and out.read_bytes() == image.read_bytes() and clean(out)


def test_a_sender_that_dies_is_taken_up_again(image: Path, tmp_path: Path) -> None:
    far = Far(tmp_path / "out")
    with proxied(far) as proxy:
        proxy.plan(1_000_000, cut_all)
        source = FileSource(image)
        first = Sender(source, KEY, proxy.address, transfer="t", patience=0.2, codecs=("store",))
        first.start()
        with contextlib.suppress(TransferLost):
            proxy._listener.close()  # nothing can be reached any more once it is cut
            first.pass_over()
        first.close()
        source.close()
    assert not (tmp_path / "out").exists() and image.exists()
    sent = send(image, far.receiver.address)
    assert sent.skipped > 0
    assert far.end().error is None and (tmp_path / "out").read_bytes() == image.read_bytes()


def test_a_cut_between_commit_and_its_answer(image: Path, tmp_path: Path) -> None:
    """The sender asks again, the same receiver or the next one, and learns that it is done."""
    far = Far(tmp_path / "out")
    answered = threading.Event()
    with proxied(far) as proxy:
        commit = far.receiver._take

        def watch(stream: object) -> None:
            sink = far.receiver._sink
            assert sink is not None
            real = sink.commit

            def committing(root: bytes) -> None:
                real(root)
                answered.set()
                proxy.cut_all()

            sink.commit = committing  # type: ignore[method-assign]
            commit(stream)  # type: ignore[arg-type]

        far.receiver._take = watch  # type: ignore[method-assign]
        send(image, proxy.address)
    assert answered.is_set() and far.end().error is None and (tmp_path / "out").read_bytes() == image.read_bytes()


def test_a_receiver_that_died_after_its_commit_still_answers(image: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    far = Far(out)
    source = FileSource(image)
    sending = Sender(source, KEY, far.receiver.address, transfer="t", patience=PATIENCE)
    sending.start()
    sending.pass_over()
    sending._farewell = far.kill  # type: ignore[method-assign]
    root = sending.commit().root
    sending.close()
    assert out.exists() and out.with_name("out.journal").exists()
    again = Far(out)
    assert send(image, again.receiver.address).root == root
    other = tmp_path / "other"
    other.write_bytes(changed(image.read_bytes(), 3))
    again.end()
    source.close()


def test_another_key(image: Path, tmp_path: Path) -> None:
    far = Far(tmp_path / "out", patience=1.0)
    with pytest.raises(KeyRefused):
        send(image, far.receiver.address, key=bytes(32))
    assert far.end().error is not None and not (tmp_path / "out").exists()
    assert far.receiver._refused >= 1


def test_what_is_recorded_and_played_again_opens_nothing(image: Path, tmp_path: Path) -> None:
    recorded: list[bytes] = []

    def record(proxy: Proxy, data: bytes) -> bytes:
        recorded.append(data)
        proxy.plan(0, record)
        return data

    far = Far(tmp_path / "out")
    with proxied(far) as proxy:
        proxy.plan(0, record)
        send(image, proxy.address, streams=(1, 1))
    far.end()
    import socket

    again = Far(tmp_path / "again", patience=1.0)
    with socket.create_connection(again.receiver.address) as sock, contextlib.suppress(OSError):
        for part in recorded:
            sock.sendall(part)
        sock.recv(1 << 16)
    assert again.end().error is not None and not (tmp_path / "again").exists() and not (tmp_path / "again.partial").exists()


def test_the_bytes_on_the_wire_tell_nothing(tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(b"the secret word is swordfish " * 5000)
    seen: list[bytes] = []

    def look(proxy: Proxy, data: bytes) -> bytes:
        seen.append(data)
        proxy.plan(0, look)
        return data

    far = Far(tmp_path / "out")
    with proxied(far) as proxy:
        proxy.plan(0, look)
        send(tmp_path / "secret", proxy.address, codecs=("store",))
    assert far.end().error is None
    assert len(b"".join(seen)) > 100_000 and b"swordfish" not in b"".join(seen)


def test_a_base_spares_what_is_there(image: Path, tmp_path: Path) -> None:
    bases = tmp_path / "bases"
    add_base(image, bases, 2)
    later = tmp_path / "later"
    later.write_bytes(changed(image.read_bytes(), 5, 0.02))
    far = Far(tmp_path / "out", bases=bases)
    sent = send(later, far.receiver.address, base=image)
    assert far.end().error is None and (tmp_path / "out").read_bytes() == later.read_bytes()
    assert sent.pages["unchanged"] > 1000 and sent.wire_bytes < later.stat().st_size / 50


def test_a_base_that_is_not_what_its_name_says_costs_bytes_and_no_more(image: Path, tmp_path: Path) -> None:
    bases = tmp_path / "bases"
    root = add_base(image, bases, 2)
    (bases / root.hex()).write_bytes(changed(image.read_bytes(), 6, 0.2))
    later = tmp_path / "later"
    later.write_bytes(changed(image.read_bytes(), 5, 0.02))
    far = Far(tmp_path / "out", bases=bases)
    send(later, far.receiver.address, base=image)
    assert far.end().error is None and (tmp_path / "out").read_bytes() == later.read_bytes()


def test_a_base_that_is_not_there(image: Path, tmp_path: Path) -> None:
    far = Far(tmp_path / "out", bases=tmp_path / "none")
    assert send(image, far.receiver.address, base=image).pages["unchanged"] == 0
    assert far.end().error is None


def test_a_destination_that_is_there_already(image: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.write_bytes(b"mine")
    far = Far(out)
    with pytest.raises(Refused, match="there already"):
        send(image, far.receiver.address)
    assert isinstance(far.end().error, DestinationError) and out.read_bytes() == b"mine"
    far = Far(out, replace=True)
    with proxied(far) as proxy:
        proxy.plan(300_000, cut)
        send(image, proxy.address)
    assert far.end().error is None and out.read_bytes() == image.read_bytes() and clean(out)


def test_a_disk_that_is_full(image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the write it is; afterwards there is room, and the next receiver takes what came."""
    import errno

    out, real, left = tmp_path / "out", os.pwrite, [6]

    def full(fd: int, data: bytes, at: int) -> int:
        if len(data) > 1000:
            left[0] -= 1
            if left[0] < 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(fd, data, at)

    far = Far(out)
    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(Refused, match="make room"):
        send(image, far.receiver.address)
    assert isinstance(far.end().error, DestinationError) and not out.exists()
    monkeypatch.setattr(os, "pwrite", real)
    far = Far(out)
    assert send(image, far.receiver.address).skipped > 0
    assert far.end().error is None and out.read_bytes() == image.read_bytes()


def test_a_partial_file_that_was_damaged_is_not_believed(image: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    far = Far(out)
    source = FileSource(image)
    sending = Sender(source, KEY, far.receiver.address, transfer="t", patience=PATIENCE)
    sending.start()
    sending.pass_over()
    far.kill()
    sending.close()
    source.close()
    partial = out.with_name("out.partial")
    with partial.open("r+b") as file:
        file.seek(5 * EXTENT + 1000)
        file.write(b"torn")
    with out.with_name("out.journal").open("ab") as journal:
        journal.write(b"torn entry")
    far = Far(out)
    sent = send(image, far.receiver.address)
    assert sent.skipped == 12 and far.end().error is None and out.read_bytes() == image.read_bytes()


def test_negative_control_a_sink_that_writes_something_else_never_commits(image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from gpu_migration import sinks

    real = sinks.FileSink.write

    def wrong(self: sinks.FileSink, index: int, raw: memoryview, digest: bytes, classes: object) -> None:
        real(self, index, raw, digest if index != 2 else bytes(31) + b"\1", classes)  # type: ignore[arg-type]

    monkeypatch.setattr(sinks.FileSink, "write", wrong)
    far = Far(tmp_path / "out")
    with pytest.raises(MigrationError):
        send(image, far.receiver.address)
    assert far.end().error is not None and not (tmp_path / "out").exists()


def test_a_source_that_cannot_be_read(tmp_path: Path) -> None:
    for path in (tmp_path / "none", tmp_path):
        with pytest.raises(SourceError):
            FileSource(path)
    (tmp_path / "empty").touch()
    with pytest.raises(SourceError, match="length 0"):
        FileSource(tmp_path / "empty")


def test_a_source_that_becomes_shorter(image: Path, tmp_path: Path) -> None:
    far = Far(tmp_path / "out", patience=1.0)
    source = FileSource(image)
    os.truncate(image, 3 * EXTENT)
    with pytest.raises(SourceError, match="shorter"):
        Sender(source, KEY, far.receiver.address, patience=PATIENCE).run()
    source.close()
    assert far.end().error is not None and not (tmp_path / "out").exists()


def test_nobody_there(image: Path, tmp_path: Path) -> None:
    far = Far(tmp_path / "out", patience=0.2)
    assert isinstance(far.end().error, TransferLost)
    with pytest.raises(TransferLost):
        send(image, far.receiver.address, patience=0.2)


def test_keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "key"
    path.write_text(keys.new_key())
    path.chmod(0o644)
    with pytest.raises(KeyRefused, match="chmod 600"):
        keys.load_key(path)
    path.chmod(0o600)
    assert len(keys.load_key(path)) == 32
    for text, match in (("ab" * 31, "31 bytes"), ("xyz", "hexadecimal")):
        path.write_text(text)
        with pytest.raises(KeyRefused, match=match):
            keys.load_key(path)
    monkeypatch.delenv(keys.KEY_VARIABLE, raising=False)
    with pytest.raises(KeyRefused, match=keys.KEY_VARIABLE):
        keys.load_key(None)


def test_fault_names_are_all_tried() -> None:
    fault: Fault = cut
    assert WIRE_FAULTS["cut"] is fault and len(WIRE_FAULTS) == 7
