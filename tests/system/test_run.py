"""`make run` and `novactl run` beside it, as the first page of the README has it: a sample is run, answers, and is removed."""

import json
import os
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.integration import container_side, function_side
from tests.unit.workloads.image_side import AS_ROOT
from tools.bench.harness import ROOT, die_with_parent
from tools.novactl import samples
from tools.novactl.client import CommandError

pytestmark = pytest.mark.system


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A running `make run`; gives what runs novactl against it."""
    home = tmp_path_factory.mktemp("run") / "demo"
    process = subprocess.Popen([sys.executable, "-m", "tools.demo", "--port", "0", "--home", str(home)], stdout=subprocess.PIPE, text=True, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, preexec_fn=die_with_parent)
    assert process.stdout is not None
    told = {}
    for line in process.stdout:
        words = line.split()
        if words and words[0] in ("page", "edge"):
            told[words[0]] = words[1].partition("/#")[0].removesuffix("/api/v1/status")
        if words[:1] == ["end"]:
            break
    env = {**os.environ, "PYTHONPATH": str(ROOT), "NOVACRON_HUB_URL": told["page"], "NOVACRON_EDGE_URL": told["edge"], "NOVACRON_TOKEN": (home / "hub/token").read_text().strip(), "COLUMNS": "200"}

    def novactl(*arguments: str) -> tuple[int, str, str]:
        done = subprocess.run([sys.executable, "-m", "tools.novactl", *arguments], capture_output=True, text=True, timeout=90, cwd=ROOT, env=env)
        return done.returncode, done.stdout, done.stderr

    novactl.edge = told["edge"]  # type: ignore[attr-defined]
    yield novactl
    left = [json.loads(file.read_text())["pid"] for file in home.glob("edge/workloads/*/*/running.json")]
    process.terminate()
    process.stdout.close()
    process.wait(60)
    assert not list(home.glob("edge/workloads/*/*/instance.json")) and not any(Path(f"/proc/{pid}/root").exists() for pid in left), "what was left running ends with it"


def states(novactl: Any) -> set[str]:
    return {one["state"] for one in json.loads(novactl("workload", "list", "--json")[1])}


def test_a_sample_function_answers_and_is_removed(demo: Any) -> None:
    if reason := function_side.reason_against():
        pytest.skip(reason)
    status, out, err = demo("run", "--kind", "function", "--rm", "--input", "you\x1b[2J")
    assert status == 0, err
    assert out.startswith("hello, you\N{REPLACEMENT CHARACTER}[2J\n") and "ran on gateway-1, and was removed" in out and "placed" not in states(demo)


def test_a_sample_container_speaks_and_is_removed_and_a_short_one_is_heard_too(demo: Any) -> None:
    if reason := container_side.reason_against():
        pytest.skip(reason)
    status, out, err = demo("run", "--kind", "container", "--rm")
    assert status == 0 and "a container on Linux" in out, err
    status, out, err = demo("run", "--kind", "container", "--rm", "--", "sh", "-c", "echo short; echo trouble >&2; exit 3")
    assert status == 1 and out.startswith("short\ntrouble\n") and "failed: exit code 3" in out, (out, err)
    status, out, err = demo("run", "--kind", "container", "--name", "stays", "--json", "--", "sh", "-c", "trap 'exit 0' TERM; echo up; sleep 999 & wait")
    assert status == 0 and json.loads(out)["stdout"] == "up\n", err
    listed = json.loads(urllib.request.urlopen(f"{demo.edge}/api/v1/workloads", timeout=10).read())
    assert [(one["id"], one["phase"]) for one in listed] == [("stays", "running")]
    assert demo("workload", "cancel", "stays")[0] == 0


def test_what_cannot_run_is_told_with_the_reason_and_removed(demo: Any) -> None:
    kind = "container" if not container_side.reason_against() else "function"
    if kind == "function" and function_side.reason_against():
        pytest.skip("nothing runs here")
    status, out, err = demo("run", "--kind", kind, "--rm", "--image", "nosuch:1")
    assert status == 1 and out == "" and "gateway-1 refused it: image: nosuch:1 is not on this node" in err and "placed" not in states(demo)
    status, _, err = demo("run", "--kind", kind, "--timeout", "-1")
    assert status == 1 and "is no time" in err


@pytest.mark.parametrize(("kind", "switch"), [("microvm", "microvms"), pytest.param("vm", "vms", marks=pytest.mark.slow)])
def test_a_kind_that_no_node_was_asked_to_run_is_told_with_what_helps(demo: Any, kind: str, switch: str) -> None:
    status, _, err = demo("run", "--kind", kind, "--rm")
    assert status == 1 and f"workloads.{switch}: true (make run ARGS=--{switch})" in err and "placed" not in states(demo)


def test_the_samples_are_what_they_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from edge_runtime.workloads.images import ImageStore, Limits

    store = ImageStore(tmp_path / "store", limits=Limits(keep_free=0), own=AS_ROOT)
    image = store.add(samples.make("function", tmp_path / "archives"))
    assert image.names == ("sample-greet:1",) and image.config.module and (store.lower(image)[0] / "module.wasm").read_bytes() == samples.GREET
    if samples.BUSYBOX.exists():
        image = store.add(samples.make("container", tmp_path / "archives"))
        assert image.names == ("sample-box:1",) and os.readlink(store.lower(image)[0] / "bin/sh") == "busybox"
    store.close()
    monkeypatch.setattr(samples, "BUSYBOX", tmp_path / "none")
    with pytest.raises(CommandError, match="apt install busybox-static"):
        samples.make("container", tmp_path / "archives")
    wasmtime = pytest.importorskip("wasmtime")
    assert bytes(wasmtime.wat2wasm(samples.GREET_TEXT)) == samples.GREET


def test_why_an_edge_has_no_driver_is_told_in_the_words_of_its_probe(monkeypatch: pytest.MonkeyPatch) -> None:
    from argparse import Namespace

    from tools.novactl import run

    def probe(usable: bool, words: str) -> dict[str, Any]:
        return {"kind": "workload.driver", "body": {"driver": "container", "usable": usable, "cannot": {"start": words}}}

    class Edge:
        def __init__(self, records: Any) -> None:
            self.records = records

        def get(self, path: str) -> Any:
            if self.records is None:
                raise CommandError("away")
            return self.records

    for records, says in (([probe(False, "needs root"), probe(True, "")], "needs root"), ([probe(True, ""), probe(False, "needs root")], ""), ([], ""), (None, "")):
        monkeypatch.setattr(run, "edge_api", lambda url, records=records: Edge(records))
        told = run._driver_lacks(Namespace(edge_api=None, kind="container"))
        assert says in told and bool(told) == bool(says)


def test_one_that_nobody_removes_ends_with_make_run(demo: Any) -> None:
    """Looked at when all is over."""
    for kind, reason in (("function", function_side.reason_against()), ("container", container_side.reason_against())):
        if not reason:
            status, _, err = demo("run", "--kind", kind, "--name", f"left-{kind}")
            assert status == 0, err
