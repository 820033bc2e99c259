"""The commands, as processes; and the parts that keep the stages apart."""

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from gpu_migration import cli
from gpu_migration.flow import Bounded, Pace, Streams
from gpu_migration.ledger import Ledger
from tests.unit.migration.memory import memory

ROOT = Path(__file__).resolve().parents[2]


def run(*arguments: str, key: str = "", **environment: str) -> "subprocess.CompletedProcess[str]":
    variables = {**os.environ, "PYTHONPATH": str(ROOT), **({"NOVACRON_MIGRATION_KEY": key} if key else {}), **environment}
    return subprocess.run([sys.executable, "-m", "gpu_migration", *arguments], env=variables, capture_output=True, text=True, timeout=60)


def test_send_receive_and_verify(tmp_path: Path) -> None:
    source, key = tmp_path / "source", run("key").stdout.strip()
    source.write_bytes(memory(300, 1) * 3)
    receiver = subprocess.Popen(
        [sys.executable, "-m", "gpu_migration", "receive", str(tmp_path / "out"), "--patience", "20"], env={**os.environ, "PYTHONPATH": str(ROOT), "NOVACRON_MIGRATION_KEY": key},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )
    try:
        assert receiver.stderr is not None
        address = receiver.stderr.readline().split()[-1]
        assert key not in " ".join(receiver.args)  # type: ignore[arg-type]
        sent = run("send", str(source), address, key=key)
        assert sent.returncode == 0, sent.stderr
        out, _ = receiver.communicate(timeout=30)
    finally:
        receiver.kill()
        receiver.wait()
    root = json.loads(sent.stdout)["root"]
    assert receiver.returncode == 0 and json.loads(out)["root"] == root
    assert (tmp_path / "out").read_bytes() == source.read_bytes()
    assert run("verify", str(tmp_path / "out"), "--root", root).returncode == 0
    wrong = run("verify", str(tmp_path / "out"), "--root", "ab" * 32)
    assert wrong.returncode == 1 and root in wrong.stderr


def test_bench_of_itself(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "image").write_bytes(memory(600, 2))
    assert cli.main(["bench", str(tmp_path / "image")]) == 0
    assert json.loads(capsys.readouterr().out)["verified"] is True


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["send", "/none", "127.0.0.1:1"], "NOVACRON_MIGRATION_KEY"), (["verify", "/none"], "source /none"), (["receive", "/proc"], "NOVACRON_MIGRATION_KEY"),
        (["base", "/none", "--bases", "/none"], "source /none"),
    ],
)
def test_an_error_is_one_line(arguments: list[str], says: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NOVACRON_MIGRATION_KEY", raising=False)
    assert cli.main(arguments) == 1
    said = capsys.readouterr().err
    assert says in said and said.count("\n") == 1


@pytest.mark.parametrize("arguments", [["send", "x", "nowhere"], ["send", "x", "h:1", "--streams", "9"], ["send", "x", "h:1", "--codecs", "rot13"], ["send", "x", "h:1", "--limit-mbit", "nan"], ["receive"]])
def test_bad_arguments(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(arguments)
    assert "error:" in capsys.readouterr().err


def test_a_full_queue_holds_its_producer_back() -> None:
    queue: Bounded[int] = Bounded(100)
    entered: list[int] = []

    def produce() -> None:
        for n in range(50):
            assert queue.put(n, 30)
            entered.append(n)

    producer = threading.Thread(target=produce)
    producer.start()
    assert [queue.get() for _ in range(50)] == list(range(50))
    producer.join()
    assert queue.peak <= 100
    queue.put(1, 1000)  # larger than the mark: alone it goes through
    queue.close()
    assert queue.get() is None and not queue.put(1, 1)


def test_a_bandwidth_limit_is_kept_whatever_the_sizes() -> None:
    pace, now = Pace(1000.0), 10.0
    for size in (100, 1, 999, 50) * 20:
        now += pace.due(size, now)
    assert 22 <= now - 10 <= 24
    assert Pace(0).due(10**9, 0) == 0


def test_streams_are_added_as_long_as_they_bring_something() -> None:
    streams = Streams(8, 2)
    rates = {2: 1.0, 3: 1.5, 4: 1.8, 5: 1.82}
    for _ in range(10):
        count = streams.look(rates[streams.count], 0.9)
    assert count == 4
    idle = Streams(8, 2)
    assert all(idle.look(1.0, 0.1) == 2 for _ in range(5))


def test_ledger_what_is_cut_goes_back_and_old_attempts_count_for_nothing() -> None:
    ledger = Ledger(2)
    ledger.begin(range(2))
    assert [ledger.take(), ledger.take()] == [0, 1]
    first = ledger.sent(0, 1, b"a" * 32)
    ledger.sent(1, 2, b"b" * 32)
    assert ledger.lost(1) == 1 and ledger.take() == 0
    second = ledger.sent(0, 2, b"c" * 32)
    ledger.acked(0, first)
    assert ledger.remaining() == 2
    ledger.acked(0, second)
    ledger.refused(1, 1)
    assert ledger.take() == 1 and ledger.plain == {1}
    ledger.acked(1, ledger.sent(1, 2, b"d" * 32))
    assert ledger.wait(0) and ledger.known == {0: b"c" * 32, 1: b"d" * 32}
