"""When an agent has drivers that go by containerd, and what it says where their package is missing. Nothing is started."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from edge_runtime.config.schema import EdgeConfig, WorkloadsConfig
from edge_runtime.workloads import drivers, node_drivers
from edge_runtime.workloads.drivers import programs
from edge_runtime.workloads.drivers.container_laying import Settings


def wanted(folder: Path, monkeypatch: pytest.MonkeyPatch, *runtimes: str, shim: bool = False) -> tuple[dict[str, Any], list[str]]:
    monkeypatch.setattr(programs, "searched", lambda name: "/somewhere" if shim and name == "containerd-shim-kata-v2" else None)
    return node_drivers.by_containerd(EdgeConfig(workloads=WorkloadsConfig(runtimes=runtimes)), folder, None, Settings())  # type: ignore[arg-type]


def test_none_where_nobody_asks_for_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert wanted(tmp_path, monkeypatch, "runc", "crun") == ({}, [])


def test_where_it_is_named_where_katas_shim_is_and_where_an_earlier_configuration_left_something(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("grpc")
    for folder, runtimes, shim, names in (("a", ("containerd", "runc"), False, ["containerd"]), ("b", ("runc",), True, ["kata"]), ("a", ("runc",), False, ["containerd"])):
        found, why = wanted(tmp_path / folder, monkeypatch, *runtimes, shim=shim)
        assert list(found) == names and not why
        for driver in found.values():
            driver.close()


def test_without_its_package_the_reason_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "edge_runtime.workloads.drivers.containerd", None)
    monkeypatch.delattr(drivers, "containerd", raising=False)
    found, (why,) = wanted(tmp_path, monkeypatch, "containerd")
    assert found == {} and why.startswith("containerd: it needs a package that is not there") and "pip install 'novacron[containerd]'" in why


def test_an_agent_that_runs_containers_directly_loads_no_grpc() -> None:
    program = "import sys; from edge_runtime.workloads import node, runner; from edge_runtime.workloads.drivers import container, container_probe; sys.exit('grpc' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], cwd=Path(__file__).parents[3]).returncode == 0
