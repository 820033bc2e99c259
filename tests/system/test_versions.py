"""Releases that meet: the store and the journal of an older one under today's code, an older edge at today's hub and today's edge at an older hub, and an edge that goes back to the older one.

The older ones are commits of this repository, with today's packages under them; each pair runs in turn on the same data, killed or stopped between two.
"""

import contextlib
import json
import os
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from hub.broker.mosquitto import find_mosquitto
from tests.integration.waiting import until_sync
from tools.bench.harness import ROOT, die_with_parent, free_port, stop
from tools.demo import compare

OLDER = {"the first": "a7f6470", "with workloads": "8be6846", "with images": "902aa87"}
"""Landmarks of the history, oldest first."""

RULES = [{"id": "each", "on": {"device": "host", "metric": "load1"}, "trigger": "each", "if": {"value": "load1", "op": ">=", "than": 0}, "then": [{"alert": {"severity": "info", "text": "load {load1}"}}]}]

pytestmark = [pytest.mark.system, pytest.mark.timeout(600), pytest.mark.skipif(find_mosquitto() is None, reason="mosquitto is not installed (apt install mosquitto)")]


@pytest.fixture(params=[pytest.param(name, id=name.replace(" ", "-"), marks=() if name == "the first" else pytest.mark.slow) for name in OLDER])
def older(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """That commit's files."""
    folder = tmp_path / "older"
    folder.mkdir()
    made = subprocess.run(["git", "archive", OLDER[request.param]], cwd=ROOT, capture_output=True, check=False)
    if made.returncode:
        pytest.skip(f"the history does not reach back to {OLDER[request.param]}: {made.stderr.decode()[:100]}")
    subprocess.run(["tar", "-x"], cwd=folder, input=made.stdout, check=True)
    return folder


class Pair:
    """A hub and an edge on data of their own; whichever release runs."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.api, self._broker = folder, free_port(), free_port()
        (folder / "hub").mkdir(parents=True)
        (folder / "edge.yaml").write_text(yaml.safe_dump({
            "edge_id": "gw-1", "data_dir": str(folder / "edge"), "bus": {"enabled": False}, "uplink": {"url": f"mqtt://127.0.0.1:{self._broker}"}, "api": {"enabled": False},
            "devices": {"host": {"enabled": True, "interval": "200ms"}}, "decisions": {"rules": RULES, "models": ["shipped:host-anomaly/portable"]},
        }))

    @contextlib.contextmanager
    def _runs(self, tree: Path, name: str, kill: bool, *words: str) -> Iterator[None]:
        with (self.folder / f"{name}.log").open("ab") as log:
            process = subprocess.Popen([sys.executable, "-m", *words], cwd=tree, env={**os.environ, "PYTHONPATH": str(tree)}, preexec_fn=die_with_parent, stdout=log, stderr=log)
        try:
            yield
        finally:
            if kill:
                process.kill()
                process.wait()
            else:
                stop(process, 30)

    def get(self, path: str, change: dict[str, Any] | None = None) -> Any:
        """An answer of the hub."""
        headers = {"Authorization": f"Bearer {(self.folder / 'hub/token').read_text().strip()}", "Content-Type": "application/json"}
        data = json.dumps(change).encode() if change is not None else None
        with urllib.request.urlopen(urllib.request.Request(f"http://127.0.0.1:{self.api}{path}", data, headers, method="PUT" if data else "GET"), timeout=10) as answer:
            return json.loads(answer.read())

    def row(self) -> dict[str, Any]:
        """The hub's word on the edge."""
        found: dict[str, Any] = next((one for one in self.get("/api/v1/edges") if one["edge"] == "gw-1"), {})
        return found

    def meet(self, hub: Path, edge: Path, generation: int, *, kill: bool = False) -> None:
        """They run until the edge is online with that desired state, and what it decided has come."""
        with self._runs(hub, "hub", kill, "hub", "--data-dir", str(self.folder / "hub"), "--broker", "mosquitto", "--broker-listen", f"127.0.0.1:{self._broker}", "--listen", f"127.0.0.1:{self.api}"):
            self._until(lambda: self.get("/readyz")["ready"], "the hub is ready")
            with self._runs(edge, "edge", kill, "edge_runtime", "run", "--config", str(self.folder / "edge.yaml")):
                self._until(lambda: self.row().get("state") == "online", "the edge is online")
                self.get("/api/v1/edges/gw-1/desired", {"twins": {"host": {"speed": generation}}})
                self._until(lambda: self.row()["generation"] == generation, f"generation {generation}")
                before = len(self.get("/api/v1/decisions?limit=500"))
                self._until(lambda: len(self.get("/api/v1/decisions?limit=500")) >= min(500, before + 5), "decisions come")

    def _until(self, what: Callable[[], Any], name: str) -> None:
        def holds() -> bool:
            with contextlib.suppress(OSError, ValueError, KeyError):
                return bool(what())
            return False

        try:
            until_sync(holds, what=name)
        except AssertionError as error:
            logs = "\n".join(f"{path.name}: {path.read_text()[-1500:]}" for path in sorted(self.folder.glob("*.log")))
            raise AssertionError(f"{error}\n{logs}") from None

    def whole(self) -> None:
        """All that the edge wrote is at the hub, once."""
        found = compare(self.folder / "edge", self.folder / "hub", "gw-1")
        assert (found["lost"], found["duplicated"]) == (0, 0) and found["compared"] > 20, found
        assert not [line for line in (self.folder / "hub.log").read_text().splitlines() if "ERROR" in line or "Traceback" in line]
        assert not [line for line in (self.folder / "edge.log").read_text().splitlines() if "ERROR" in line or "Traceback" in line]


def test_the_hub_first_then_the_edge(older: Path, tmp_path: Path) -> None:
    pair = Pair(tmp_path / "pair")
    pair.meet(older, older, 1, kill=True)
    pair.meet(ROOT, older, 2, kill=True)
    pair.meet(ROOT, older, 3)
    pair.meet(ROOT, ROOT, 4)
    pair.whole()


def test_the_edge_first_and_back_again(older: Path, tmp_path: Path) -> None:
    pair = Pair(tmp_path / "pair")
    pair.meet(older, older, 1)
    pair.meet(older, ROOT, 2, kill=True)
    pair.meet(older, ROOT, 3)
    pair.meet(older, older, 4)  # an update of its image that is gone back from
    pair.meet(ROOT, ROOT, 5)
    pair.whole()
