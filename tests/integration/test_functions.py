"""The function driver with real modules and the real engine: what a function may, what it may not, and how calls and lives end."""

import asyncio
import fcntl
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import termios
from pathlib import Path
from typing import Any

import pytest

from edge_runtime.workloads.drivers import function as function_module
from edge_runtime.workloads.drivers import function_host, function_seccomp, function_worker
from edge_runtime.workloads.drivers.face import Ability, Failed, Key, Order, Phase, Refused
from edge_runtime.workloads.drivers.function import FIRST_ID, FunctionDriver
from edge_runtime.workloads.drivers.function_call import Answer
from edge_runtime.workloads.drivers.function_code import NativeCode
from edge_runtime.workloads.images import ImageError, ImageStore, Limits
from tests.unit.workloads.image_side import AS_ROOT, layer, layout, sha

from .function_side import artefact, driver, job, made_store, module, reason_against, started, text
from .waiting import until

ROOT = Path(__file__).resolve().parents[2]

__all__ = ["driver"]

pytestmark = pytest.mark.skipif(bool(reason_against()), reason=reason_against())


async def called(driver: FunctionDriver, name: str, stdin: bytes = b"", image: str = "", **spec: Any) -> Answer:
    """One call of a function of its own."""
    key = await started(driver, name, image, **spec)
    try:
        return await driver.call(name, stdin)
    finally:
        await driver.delete(key)


def workers(driver: FunctionDriver, key: Key) -> list[int]:
    pid = json.loads((driver.folder(key) / "running.json").read_text())["pid"]
    return [int(one) for one in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


async def test_the_probe_runs_a_module_and_leaves_nothing(driver: FunctionDriver) -> None:
    told = await driver.probe()
    assert told.usable and told.runtime.startswith("wasmtime ") and {"start", "stop", "adopt", "stats", "logs", "limits"} | ({"seccomp"} if function_seccomp.there() else set()) <= set(told.to_json()["can"])
    with pytest.raises(Refused, match="keeps nothing between two calls"):
        told.demand(Ability.CHECKPOINT)
    assert await driver.instances() == [] and not any(driver._new.iterdir())


async def test_a_life_from_prepare_to_delete(driver: FunctionDriver) -> None:
    key = Key("life:a", 7)
    order = Order(key, "echo:1")
    assert (await driver.prepare(order)).phase is Phase.PREPARED
    assert (await driver.prepare(order)).phase is Phase.PREPARED
    running = await driver.start(key)
    assert running.phase is Phase.RUNNING and running.load_ms > 0 and await driver.start(key) == running
    for word in (b"world", b"", b"w" * 60_000):
        answer = await driver.call("life:a", word)
        assert (answer.what, answer.code, answer.stdout, answer.stderr, answer.cut, answer.cold) == ("exited", 0, b"hello " + word, b"heard\n", False, False)
    assert (await driver.logs(key, 100)).stderr == b"heard\n" * 3
    used = await driver.stats(key)
    assert used.processes == 2 and 1 << 20 < used.memory_bytes < 64 << 20
    ended = await driver.stop(key, 10.0)
    assert ended.phase is Phase.ENDED and ended.exit is not None and ended.exit.code == 0 and await driver.wait(key) == ended
    with pytest.raises(Refused, match="no function life:a runs here|cannot be reached"):
        await driver.call("life:a", b"")
    await driver.delete(key)
    await driver.delete(key)
    with pytest.raises(Refused, match="no function"):
        await driver.status(key)


async def test_arguments_and_variables(driver: FunctionDriver) -> None:
    answer = await called(driver, "args", args=["one", "zwölf"], env={"A": "b", "C": ""})
    assert answer.stdout[:100].rstrip(b"\0") == b"args\0one\0" + "zwölf".encode() and answer.stdout[100:].rstrip(b"\0") == b"A=b\0C="


@pytest.mark.parametrize(("name", "what", "code", "says"), [
    ("exit", "exited", 3, b""), ("trap", "trapped", 0, b"unreachable"), ("deep", "trapped", 0, b"stack"), ("early", "trapped", 0, b"unreachable"), ("stray", "exited", 21, b""),
])
async def test_what_goes_wrong_in_a_call_is_told_and_is_that_calls_alone(name: str, what: str, code: int, says: bytes, driver: FunctionDriver) -> None:
    key = await started(driver, name)
    for _ in range(2):
        answer = await driver.call(name, b"")
        assert (answer.what, answer.code) == (what, code) and says in answer.stderr
    assert (await driver.status(key)).phase is Phase.RUNNING
    await driver.delete(key)


async def test_an_instance_lives_for_one_call(driver: FunctionDriver) -> None:
    """The module counts in its memory: each call finds it as it was."""
    key = await started(driver, "count")
    assert [(await driver.call("count", b"")).code for _ in range(3)] == [1, 1, 1]
    await driver.delete(key)


@pytest.mark.parametrize("name", ["loop", "sleep"])
async def test_what_takes_too_long_is_ended_and_the_next_call_finds_another_instance(name: str, driver: FunctionDriver) -> None:
    key = await started(driver, name, timeout_s=0.3, concurrency=1, limits={"memory": "1Mi"})
    before = workers(driver, key)
    answer = await driver.call(name, b"")
    assert answer.what == "timed out" and answer.ran_us >= 250_000
    await until(lambda: len(workers(driver, key)) == 1 and workers(driver, key) != before, what="another worker")
    assert (await driver.call(name, b"", 0.05)).what == "timed out" and (await driver.status(key)).phase is Phase.RUNNING
    await driver.delete(key)


async def test_memory_is_limited_by_the_engine(driver: FunctionDriver) -> None:
    assert (await called(driver, "grow", limits={"memory": "1Mi"})).code == 15  # pages beyond the first
    assert (await called(driver, "grow", limits={"memory": 20 * 65_536})).code == 19


async def test_memory_is_limited_by_the_kernel_too(driver: FunctionDriver, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the engine's limit taken away, the process's own holds: a wall behind the wall."""
    if not AS_ROOT:
        pytest.skip("a worker's limit is set by root")
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            own = function_worker.engine()
            import wasmtime

            program = function_worker.Program(own, wasmtime.Module(own, module("grow")), [], [], 1 << 32, 0)
            function_worker.confine(FIRST_ID - 2, 8 << 20, 1 << 20)
            instance = program.ready(lambda _descriptor, _data: None)
            os.write(write, json.dumps(instance.run(b"")[:2]).encode())
            code = 0
        finally:
            os._exit(code)
    os.close(write)
    told = await asyncio.to_thread(os.read, read, 1000)
    os.close(read)
    assert (await asyncio.to_thread(os.waitpid, pid, 0))[1] == 0
    what, pages = json.loads(told)
    assert what == 1 and 8 * 16 <= pages <= (8 + 32) * 16 + 64, "it stopped growing at its share and the interpreter's, and not at 4 GiB"


async def test_a_flood_of_output_is_cut(driver: FunctionDriver) -> None:
    answer = await called(driver, "flood", output=1000)
    assert answer.what == "exited" and answer.cut and len(answer.stdout) == 1000


async def test_there_are_no_files_no_folders_no_sockets(driver: FunctionDriver) -> None:
    assert (await called(driver, "escape")).code == 7, "each of the three said that there is no such thing"


async def test_a_worker_has_given_up_what_it_could_do_harm_with(driver: FunctionDriver) -> None:
    if not AS_ROOT:
        pytest.skip("only root has something to give up")
    one, two = await started(driver, "loop", timeout_s=60), await started(driver, "other", "loop", timeout_s=60)
    call = asyncio.create_task(driver.call("loop", b""))
    try:
        await until(lambda: any(busy(pid) for pid in workers(driver, one)), what="a call that runs")
        for pid in workers(driver, one):
            status = dict(line.split(":\t", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
            assert {int(number) for number in status["Uid"].split()} == {json.loads((driver.folder(one) / "instance.json").read_text())["told"]["uid"]} and int(status["Uid"].split()[0]) >= FIRST_ID
            assert status["CapEff"] == status["CapPrm"] == "0" * 16 and status["NoNewPrivs"] == "1" and status["Groups"].strip() == ""
            assert not function_seccomp.there() or status["Seccomp"] == "2"
            limits = Path(f"/proc/{pid}/limits").read_text()
            for row in ("Max processes             0                    0", "Max core file size        0                    0"):
                assert row in limits
            files = {os.readlink(f"/proc/{pid}/fd/{one}") for one in os.listdir(f"/proc/{pid}/fd")}
            assert not any(str(driver._folder) in file for file in files), files
            assert os.readlink(f"/proc/{pid}/ns/net") != os.readlink("/proc/self/ns/net")
            assert os.getpriority(os.PRIO_PROCESS, pid) == max(0, os.getpriority(os.PRIO_PROCESS, 0))
        owners = {os.stat(f"/proc/{pid}/mem").st_uid for key in (one, two) for pid in workers(driver, key)}
        uids = {int(Path(f"/proc/{pid}/status").read_text().split("Uid:\t")[1].split()[0]) for key in (one, two) for pid in workers(driver, key)}
        assert len(uids) == 2 and owners == {0}, "each function has a user of its own, and none may look into another's process"
    finally:
        await driver.delete(one)
        await driver.delete(two)
    with pytest.raises(Refused, match="cannot be reached"):
        await call


def state(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def busy(pid: int) -> bool:
    """Whether it has had the processor for longer (5 ticks) than getting ready takes."""
    return sum(int(ticks) for ticks in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13]) >= 5


async def test_calls_beyond_concurrency_wait_and_beyond_the_queue_are_refused(driver: FunctionDriver) -> None:
    key = await started(driver, "loop", timeout_s=0.5, concurrency=2, queue=1, warm=1)
    calls = [asyncio.create_task(driver.call("loop", b"")) for _ in range(5)]
    done = await asyncio.gather(*calls, return_exceptions=True)
    refused = [one for one in done if isinstance(one, Refused)]
    answered = [one for one in done if isinstance(one, Answer)]
    assert len(refused) == 2 and all("as many calls run and wait as may" in one.problem for one in refused), done
    assert [one.what for one in answered] == ["timed out"] * 3 and sum(one.cold for one in answered) == 1
    assert sum(one.stderr == b"it waited for its turn" for one in answered) <= 1
    await driver.delete(key)


async def test_many_calls_at_once_are_all_answered(driver: FunctionDriver) -> None:
    key = await started(driver, "echo", concurrency=2, queue=200, warm=2)
    answers = await asyncio.gather(*(driver.call("echo", str(number).encode()) for number in range(100)))
    assert [one.stdout for one in answers] == [f"hello {number}".encode() for number in range(100)]
    await driver.delete(key)


async def test_nothing_kept_warm_means_that_each_call_is_cold_and_still_answered(driver: FunctionDriver, monkeypatch: pytest.MonkeyPatch) -> None:
    key = await started(driver, "echo", warm=0, concurrency=1)
    os.kill(workers(driver, key)[0], signal.SIGKILL)
    await until(lambda: workers(driver, key) == [], what="no worker")
    answer = await driver.call("echo", b"x")
    assert answer.cold and answer.stdout == b"hello x"
    await driver.delete(key)


HURRIED = """
import json, sys
sys.path.insert(0, sys.argv[1])
from edge_runtime.workloads.drivers import function_host, function_worker
function_host.KEEP_LEAST_S, function_host.HOLD_WORTH = 0.1, 0.0
function_host.host(function_worker.engine(), json.loads(sys.argv[2]), [int(one) for one in sys.argv[3:]])
"""
"""A host with less patience, in a process of its own: what it forks shall not be as large as a test's."""


async def test_workers_that_nobody_needs_any_more_end(driver: FunctionDriver, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[subprocess.Popen[bytes]] = []

    async def spawn(told: dict[str, Any], descriptors: list[int], seconds: float) -> str:
        read, write = os.pipe()
        given = (descriptors[0], write, descriptors[1])
        made.append(subprocess.Popen([sys.executable, "-I", "-c", HURRIED, str(ROOT), json.dumps(told), *map(str, given)], pass_fds=given))
        os.close(write)
        try:
            return (await asyncio.to_thread(os.read, read, 100)).decode().strip()
        finally:
            os.close(read)

    key = Key("patient", 1)
    await driver.prepare(Order(key, "echo:1", {}, {"concurrency": 3, "warm": 1}))
    try:
        monkeypatch.setattr(driver, "_spawn", spawn)
        await driver.start(key)
        for _ in range(100):  # a call is a millisecond: the worker that is ready may have done with the first before the others come
            answers = await asyncio.gather(*(driver.call("patient", b"x") for _ in range(3)))
            assert {one.stdout for one in answers} == {b"hello x"}, answers
            if any(one.cold for one in answers):
                break
        else:
            pytest.fail("one worker answered them all")
        await until(lambda: len(workers(driver, key)) == 1, what="only the one that is kept ready is left")
        assert not (await driver.call("patient", b"y")).cold
    finally:
        await driver.delete(key)
        for one in made:
            await asyncio.to_thread(one.wait)


def test_how_long_a_worker_is_kept_follows_what_it_holds_and_what_its_load_took() -> None:
    keep_s, mib = function_host.keep_s, 1 << 20
    assert keep_s(1.0, 128 * mib) == 600.0
    assert keep_s(0.01, 4 * mib) == pytest.approx(192.0) and keep_s(0.02, 4 * mib) == 2 * keep_s(0.01, 4 * mib) == 2 * keep_s(0.02, 8 * mib)
    assert keep_s(1e-6, 1 << 30) == function_host.KEEP_LEAST_S and keep_s(100.0, 1) == keep_s(1.0, 0) == function_host.KEEP_MOST_S
    assert mib < function_host.private_bytes(os.getpid()) < 1 << 36 and function_host.private_bytes(1 << 22) == 0


async def test_a_host_holds_nothing_of_calls_that_were_answered(driver: FunctionDriver) -> None:
    """1,500 calls of 60 KiB are 86 MiB, all of them within the 10 s that a slow caller is given."""
    key = await started(driver, "echo")
    body = bytes(60_000)
    pid = (await driver.status(key)).pid
    for _ in range(20):
        await driver.call("echo", body)
    before = function_host.private_bytes(pid)
    for _ in range(1_500):
        await driver.call("echo", body)
    assert function_host.private_bytes(pid) - before < 8 << 20
    await driver.delete(key)


async def test_a_host_that_ends_between_two_looks_has_ended_and_is_not_lost(driver: FunctionDriver, monkeypatch: pytest.MonkeyPatch) -> None:
    key = await started(driver, "echo")

    def ends_now(_: Any) -> bool:
        function_host.put(str(driver.folder(key)), "exit.json", {"code": 3, "signal": 0, "out_of_memory": False, "at_ms": 1})
        return False

    with monkeypatch.context() as patch:
        patch.setattr(function_module, "alive", ends_now)
        status = await driver.status(key)
    assert status.phase is Phase.ENDED and status.exit is not None and status.exit.code == 3
    (driver.folder(key) / "exit.json").unlink()
    with monkeypatch.context() as patch:
        patch.setattr(function_module, "alive", lambda _: False)
        assert (await driver.status(key)).phase is Phase.LOST
    await driver.delete(key)


async def test_a_worker_that_is_killed_costs_its_call_alone(driver: FunctionDriver) -> None:
    key = await started(driver, "loop", timeout_s=60, concurrency=1)
    call = asyncio.create_task(driver.call("loop", b""))
    await until(lambda: any(busy(pid) for pid in workers(driver, key)), what="a call that runs")
    os.kill(workers(driver, key)[0], signal.SIGKILL)
    answer = await call
    assert answer.what == "crashed" and b"signal 9" in answer.stderr
    assert (await driver.call("loop", b"", 0.05)).what == "timed out" and (await driver.status(key)).phase is Phase.RUNNING
    await driver.delete(key)


async def test_words_that_are_no_call_harm_nobody(driver: FunctionDriver) -> None:
    key = await started(driver, "echo")
    where = os.open(driver.folder(key), os.O_PATH)
    links = []
    for words in (b"", b"\0", b"\xff" * 7, b"\xff" * 100, b"\0\0\0\0\0\0\0\0more", b"\0\0\x10\0\0\0\0\x05ab"):
        link = socket.socket(socket.AF_UNIX)
        link.connect(f"/proc/self/fd/{where}/call.sock")
        link.sendall(words)
        links.append(link)
    assert (await driver.call("echo", b"still")).stdout == b"hello still"
    for link in links:
        link.close()
    os.close(where)
    assert (await driver.call("echo", b"there")).stdout == b"hello there" and (await driver.status(key)).phase is Phase.RUNNING
    with pytest.raises(Refused, match="over 65536"):
        await driver.call("echo", bytes(65_537))
    await driver.delete(key)


# -- jobs ------------------------------------------------------------------------------------------------------------------------


async def test_jobs_run_to_their_end_and_their_exit_status_and_output_are_kept(driver: FunctionDriver) -> None:
    ended, out, err = await job(driver, "exit")
    assert ended.exit is not None and (ended.exit.code, ended.reason) == (3, "exit code 3") and out == b"out\n"
    ended, out, err = await job(driver, "echo")
    assert ended.exit is not None and ended.exit.code == 0 and (out, err) == (b"hello ", b"heard\n")
    ended, _, err = await job(driver, "trap")
    assert ended.phase is Phase.ENDED and ended.exit is None and "unreachable" in ended.reason and b"unreachable" in err
    ended, out, _ = await job(driver, "flood")
    assert ended.exit is not None and ended.exit.code == 0 and (1 << 19) <= len(out) <= 1 << 20, "the end of what it wrote is kept, within the limit"
    ended, _, _ = await job(driver, "loop", timeout_s=1.0)  # more than a start takes on a busy machine
    assert ended.phase is Phase.ENDED and "longer than 1 s" in ended.reason


async def test_a_job_that_is_stopped_says_so(driver: FunctionDriver) -> None:
    key = await started(driver, "sleep", job=True)
    with pytest.raises(Refused, match="no function sleep runs here"):
        await driver.call("sleep", b"")
    ended = await driver.stop(key, 10.0)
    assert ended.exit is not None and ended.exit.signal == signal.SIGTERM
    await driver.delete(key)


# -- refusals --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("spec", "says"), [
    ({"command": ["x"]}, "spec.command"), ({"warm": 5}, "spec.warm"), ({"concurrency": 0}, "spec.concurrency"), ({"timeout_s": 0}, "spec.timeout_s"), ({"timeout_s": True}, "spec.timeout_s"),
    ({"limits": {"memory": "1Ki"}}, "spec.limits.memory"), ({"limits": {"memory": "64Mi"}}, "4 instances of 67108864 bytes are more than"), ({"limits": {"cpu": 1}}, "spec.limits"),
    ({"args": ["\0"]}, "spec.args"), ({"args": ["x" * 40_000]}, "over 32768 bytes"), ({"env": {"A=": "b"}}, "spec.env"), ({"env": {"A": "\ud800"}}, "spec.env"), ({"output": 1 << 21}, "spec.output"),
])
async def test_what_cannot_be_is_refused_before_anything_is_touched(spec: dict[str, Any], says: str, driver: FunctionDriver) -> None:
    with pytest.raises(Refused, match=says):
        await driver.prepare(Order(Key("refused", 1), "echo:1", {"memory": 64 << 20}, spec))
    assert await driver.instances() == [] and not any(driver._new.iterdir())


@pytest.mark.parametrize(("raw", "says"), [
    (b"\0asm\1\0\0\0junk", "no WebAssembly that can be compiled"), (b"not at all", "no WebAssembly that can be compiled"), ('(module (import "env" "f" (func)))', "imports env.f"),
    ('(module (func (export "_start")))', "does not export"), ('(module (memory (export "memory") 1))', "does not export"), ('(module (memory (export "_start") 1) (func (export "memory")))', "does not export"),
    ('(module (memory (export "memory") 1 1 shared) (func (export "_start")))', "can be compiled"),
])
async def test_modules_that_cannot_be_run_are_refused(raw: Any, says: str, driver: FunctionDriver, tmp_path: Path) -> None:
    driver._store.add(artefact(tmp_path, raw if isinstance(raw, bytes) else module(raw), "bad:1"), "bad:1")
    with pytest.raises(Refused, match=says):
        await driver.prepare(Order(Key("bad", 1), "bad:1"))
    assert await driver.instances() == [] and not any(driver._new.iterdir())


async def test_an_image_that_is_no_module_is_refused_and_a_module_beside_layers_too(driver: FunctionDriver, tmp_path: Path) -> None:
    driver._store.add(layout(tmp_path / "box", [layer([("file", "a", b"a")])], name="box:1"), "box:1")
    with pytest.raises(Refused, match="is not a WebAssembly module"):
        await driver.prepare(Order(Key("box", 1), "box:1"))
    with pytest.raises(ImageError, match="beside other layers"):
        driver._store.add(layout(tmp_path / "two", [module("echo"), module("exit")], name="two:1", packed=False, media="application/wasm"), "two:1")


def test_a_module_that_is_not_what_its_digest_says_never_gets_into_the_store(tmp_path: Path) -> None:
    store = ImageStore(tmp_path / "images", limits=Limits(keep_free=0), own=AS_ROOT)
    with pytest.raises(ImageError, match="is not what its digest"):
        store.add(artefact(tmp_path / "in", module("echo"), "echo:1", spoil=module("trap").ljust(len(module("echo")), b"\0")[:len(module("echo"))]), "echo:1")
    assert store.images() == [] and not any((tmp_path / "images/layers").iterdir())
    store.close()


# -- native code -----------------------------------------------------------------------------------------------------------------


async def test_native_code_is_made_once_and_what_was_changed_is_not_loaded(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = made_store(tmp_path)
    driver = FunctionDriver(tmp_path, store)
    digest = sha(module("echo"))
    try:
        await called(driver, "echo")
        path = driver._code.path(digest)
        made = path.stat().st_ino
        await called(driver, "echo")
        assert path.stat().st_ino == made, "it was not compiled again"
        good = path.read_bytes()
        changed = good[:9000] + bytes([good[9000] ^ 1]) + good[9001:]
        # Code of another module, whole and loadable, under this one's name; then a changed byte; then a forged hash; then another engine's.
        other = driver._code.path(sha(module("exit")))
        await called(driver, "exit")
        told = path.with_suffix(".hash").read_text()
        for data, hashed in ((other.read_bytes(), told), (changed, told), (changed, json.dumps({"hash": sha(changed)})), (other.read_bytes(), other.with_suffix(".hash").read_text()), (b"", told)):
            path.write_bytes(data)
            path.with_suffix(".hash").write_text(hashed)
            caplog.clear()
            answer = await called(driver, "echo", b"me")
            assert answer.stdout == b"hello me" and "not what was compiled here" in caplog.text
            assert path.read_bytes() == good
    finally:
        driver.close()
        store.close()


async def test_control_without_the_hash_another_modules_code_is_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = made_store(tmp_path)
    driver = FunctionDriver(tmp_path, store)
    try:
        await called(driver, "echo")
        await called(driver, "exit")
        driver._code.path(sha(module("echo"))).write_bytes(driver._code.path(sha(module("exit"))).read_bytes())
        monkeypatch.setattr(NativeCode, "_hash", lambda self, digest, data: json.loads(self.path(digest).with_suffix(".hash").read_text())["hash"] if self.path(digest).with_suffix(".hash").exists() else "0")
        assert (await called(driver, "echo", b"me")).code == 3
    finally:
        driver.close()
        store.close()


async def test_a_module_that_was_changed_on_the_disk_is_refused(tmp_path: Path) -> None:
    store = made_store(tmp_path)
    driver = FunctionDriver(tmp_path, store)
    try:
        await driver.probe()
        kept = store.lower(store.find("echo:1"))[0] / "module.wasm"
        kept.write_bytes(module("trap"))
        with pytest.raises(Refused, match="is not what its digest"):
            await driver.prepare(Order(Key("echo", 1), "echo:1"))
    finally:
        driver.close()
        store.close()


# -- agents that come and go -----------------------------------------------------------------------------------------------------


async def test_another_agent_takes_over_what_runs_and_starts_nothing_twice(driver: FunctionDriver) -> None:
    key = await started(driver, "echo")
    before = await driver.status(key)
    driver.close()  # as at an agent's end
    after = FunctionDriver(driver._folder.parent, driver._store)
    assert [one.key for one in await after.instances()] == [key] and await after.start(key) == before
    assert (await after.call("echo", b"again")).stdout == b"hello again"
    await after.stop(key, 10.0)
    await after.delete(key)
    after.close()


async def test_what_was_killed_is_told_as_lost_and_leaves_no_process(driver: FunctionDriver) -> None:
    key = await started(driver, "loop", timeout_s=60)
    call = asyncio.create_task(driver.call("loop", b""))
    await until(lambda: any(busy(pid) for pid in workers(driver, key)), what="a call that runs")
    left = workers(driver, key)
    os.kill((await driver.status(key)).pid, signal.SIGKILL)
    assert (await driver.wait(key)).phase is Phase.LOST
    with pytest.raises(Refused, match="cannot be reached"):
        await call
    await until(lambda: not any(Path(f"/proc/{pid}").exists() and state(pid) != "Z" for pid in left), what="workers go with their host")
    await driver.delete(key)


async def test_the_spawners_death_costs_nothing(driver: FunctionDriver) -> None:
    key = await started(driver, "echo")
    assert driver._spawner is not None
    driver._spawner[0].kill()
    other = await started(driver, "exit")
    assert (await driver.call("exit", b"")).code == 3 and (await driver.call("echo", b"x")).stdout == b"hello x"
    for one in (key, other):
        await driver.delete(one)
    assert driver._spawner is None, "no function, no spawner"


@pytest.mark.parametrize("what", ["run", "compile"])
async def test_what_a_spawner_was_asked_for_and_did_not_come_to_is_asked_of_the_next(driver: FunctionDriver, what: str) -> None:
    """A process that was killed may still be sent something: it is lost with it."""
    key = await started(driver, "echo")
    await driver.delete(await started(driver, "exit"))  # there is native code of it
    if what == "compile":
        driver._code.path(sha(module("exit"))).unlink()
    assert driver._spawner is not None
    process, channel = driver._spawner
    process.send_signal(signal.SIGSTOP)
    await asyncio.to_thread(os.waitid, os.P_PID, process.pid, os.WSTOPPED | os.WNOWAIT)
    other = asyncio.ensure_future(started(driver, "exit"))
    await until(lambda: struct.unpack("i", fcntl.ioctl(channel, termios.TIOCOUTQ, bytes(4)))[0] > 0, what="it has been asked")
    process.kill()
    assert (await driver.call((await other).id, b"")).code == 3 and (await driver.call("echo", b"x")).stdout == b"hello x"
    assert (driver._code.verified(sha(module("exit"))) is not None) and driver._spawner[0] is not process
    for one in (key, await other):
        await driver.delete(one)


async def test_a_function_that_never_gets_ready_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its memory is less than what the module begins with: the engine says so at each call, and the host lives."""
    store = ImageStore(tmp_path / "images", limits=Limits(keep_free=0), own=AS_ROOT)
    store.add(artefact(tmp_path / "in", module(text("", memory="32")), "large:1"), "large:1")
    driver = FunctionDriver(tmp_path, store)
    try:
        answer = await called(driver, "large", limits={"memory": "1Mi"})
        assert answer.what == "trapped" and b"memory" in answer.stderr
        # A host that cannot even begin: its folder is gone when it wants to listen.
        key = Key("broken", 1)
        await driver.prepare(Order(key, "large:1"))
        (driver.folder(key) / "call.sock").mkdir()
        with pytest.raises(Failed, match="OSError"):
            await driver.start(key)
        assert (await driver.status(key)).phase is Phase.ENDED
        await driver.delete(key)
    finally:
        driver.close()
        store.close()


def test_a_log_keeps_the_end_within_its_limit(tmp_path: Path) -> None:
    log = function_host.Log(str(tmp_path / "x.log"), 100)
    for number in range(50):
        log.take(f"line {number:04d}\n".encode())
    kept = (tmp_path / "x.log.1").read_bytes() + (tmp_path / "x.log").read_bytes()
    assert len(kept) <= 100 and kept.endswith(b"line 0049\n") and len(kept) >= 50
    os.close(log.file)
