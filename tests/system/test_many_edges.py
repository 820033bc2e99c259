"""The benchmark of many edges in small, under a limit of open files that would turn most of them away."""

import json
import shutil
import sqlite3
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from hub.broker.mosquitto import find_mosquitto
from tools.bench import many_edges
from tools.demo import compare

pytestmark = [pytest.mark.system, pytest.mark.skipif(find_mosquitto() is None, reason="mosquitto is not installed (apt install mosquitto)")]


@pytest.mark.parametrize("tls", [False, pytest.param(True, marks=pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl is not installed (apt install openssl)"))])
def test_all_edges_come_back_after_broker_and_hub_were_killed_and_nothing_is_lost(tls: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NOVACRON_CA_FILE", "")
    kept: list[tuple[Path, Path]] = []

    def keeping(edge_data: Path, hub_data: Path, edge_id: str) -> dict[str, Any]:
        if not kept:
            shutil.copytree(edge_data, tmp_path / edge_id)
            shutil.copytree(hub_data, tmp_path / "hub")
            kept.append((tmp_path / edge_id, tmp_path / "hub"))
        return compare(edge_data, hub_data, edge_id)

    monkeypatch.setattr(many_edges, "compare", keeping)
    found = many_edges.run(SimpleNamespace(json=True, edges=90, processes=2, every=1.0, seconds=3.0, files=64, tls=tls))
    assert (found["lost"], found["duplicated"], found["left"], found["outages_open"]) == (0, 0, 0, 0), json.dumps(found)
    assert found["compared"] > 90 and found["readings_per_second"] > 9
    # Control: a row that the hub has not is found.
    edge, hub = kept[0]
    with sqlite3.connect(hub / "hub.db") as store:
        store.execute("DELETE FROM records WHERE edge=? AND stream='telemetry' AND seq=1", (edge.name,))
    assert compare(edge, hub, edge.name)["lost"] == 1
