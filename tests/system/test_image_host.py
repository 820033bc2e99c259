"""The host's image: boots, and its agent, root under systemd on control groups of version 2 alone, runs containers for a hub, keeps their limits, and finds them again after it was killed."""

import json
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

from firmware_images import recipes, tools
from firmware_images.boot import API_PORT, credentials
from firmware_images.build import Built, current
from firmware_images.errors import FirmwareError
from firmware_images.machine import HERE, Machine, Wiring, command, free_port, prepare
from tests.integration import registry_side
from tests.integration.container_side import base
from tests.integration.edges import MOSQUITTO
from tests.integration.waiting import until_sync
from tests.system.image_device import BOOT_S, HOME, planted, told_to
from tests.unit.workloads.image_side import layout
from tools.bench.image_inside import HubProcess

pytestmark = [pytest.mark.system, pytest.mark.slow, pytest.mark.timeout(7200), pytest.mark.skipif(bool(registry_side.reason_against()), reason=registry_side.reason_against())]

ARCH, PROFILE, NAME = recipes.architecture("amd64"), recipes.profile("host"), "host-1"

COUNTS = "echo begun; n=0; while sleep 1; do n=$((n+1)); echo $n; done"
"""Says how often it began, and each second a number more."""

_KILLS = """[Unit]
Description=Kill the agent once, when a container has run for a while

[Service]
RemainAfterExit=yes
ExecStart=/bin/sh -c 'until [ -e /var/lib/novacron/edge/workloads/containers/lasting.1/stdout.log ]; do busybox sleep 1; done; until busybox grep -q ^5 /var/lib/novacron/edge/workloads/containers/lasting.1/stdout.log; do busybox sleep 1; done; systemctl kill -s KILL --kill-whom=main novacron-edge.service'
"""
_AT_START = "[Unit]\nWants=kills.service\n"


class Host:
    """The image in a machine, at a hub; what the hub says of it."""

    def __init__(self, hub: HubProcess, folder: Path, machine: Machine, registry: str) -> None:
        self.hub, self.machine, self._folder, self.image = hub, machine, folder, f"{HERE}:{registry.rpartition(':')[2]}/box:1"

    def submit(self, name: str, script: str, **spec: Any) -> None:
        """A container with a shell script."""
        self.ask("/api/v1/workloads", {"id": name, "kind": "container", "image": self.image, "requests": {"cpu": "100m", "memory": "64Mi"}, "spec": {"command": ["sh", "-c", script], **spec}})

    def ask(self, path: str, body: Any = None) -> Any:
        """An answer of the hub; a POST where there is a body."""
        token = (self._folder / "hub/token").read_text().strip()
        request = urllib.request.Request(f"http://127.0.0.1:{self.hub.port}{path}", None if body is None else json.dumps(body).encode(), {"Authorization": f"Bearer {token}", "Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)

    def events(self, kind: str) -> list[dict[str, Any]]:
        """Of a kind, from the beginning."""
        return [record["body"] for record in self.hub.get(f"/api/v1/edges/{NAME}/records?stream=event&limit=500") or [] if record["kind"] == kind]

    def said(self, name: str) -> list[dict[str, Any]]:
        """What it said of a workload."""
        return [body for body in self.events("workload") if body["id"] == name]

    def waited(self, name: str, state: str) -> dict[str, Any]:
        """Until it says that of a workload; what it said."""
        def found() -> dict[str, Any] | None:
            told = self.said(name)
            assert not told or told[-1]["state"] not in ("refused", "failed", "done", "stopped") or any(one["state"] == state for one in told), told
            return next((one for one in told if one["state"] == state), None)

        try:
            one: dict[str, Any] = until_sync(found, BOOT_S, f"{name} {state}")
        except AssertionError as error:
            raise AssertionError(f"{error}; it said {self.said(name)}; the console:\n{self.machine.tail(40)}") from None
        return one

    def logs(self, name: str) -> str:
        """What a workload wrote; nothing while its edge does not answer."""
        try:
            return str(self.ask(f"/api/v1/workloads/{name}/logs")["stdout"])
        except urllib.error.HTTPError:
            return ""


@pytest.fixture(scope="module")
def built() -> Built:
    """The image of this code."""
    if not MOSQUITTO:
        pytest.skip("no mosquitto: apt install mosquitto")
    try:
        tools.require([*tools.BUILD, ARCH.qemu])
        return current(HOME, ARCH, PROFILE, print)
    except FirmwareError as error:
        if error.field in ("tools", "network", "space"):
            pytest.skip(f"no image can be built here: {error}")
        raise


@contextmanager
def host(built: Built, folder: Path, units: dict[str, str]) -> Iterator[Host]:
    """One that has said what it can. `units`: texts by credential, as `image_device.planted` takes them."""
    with HubProcess(folder) as hub, registry_side.registry(folder / "registry") as registry:
        registry_side.push(registry, "box", "1", layout(folder / "in", [base()], name="box:1"))
        port = registry.rpartition(":")[2]
        config = folder / "edge.yaml"
        config.write_text(yaml.safe_dump({
            "edge_id": NAME, "uplink": {"url": f"mqtt://{HERE}:{hub.broker_port}", "backoff_cap": "5s"}, "api": {"host": "0.0.0.0", "token_file": "/var/lib/novacron/config/api.token"},
            "workloads": {"enabled": True, "functions": False, "reserve_cpu_milli": 100, "reserve_disk_bytes": 200 << 20, "reserve_memory_bytes": 400 << 20, "registries": [{"host": f"{HERE}:{port}", "insecure": True}]},
        }))
        state = folder / "state"
        disk, flash = prepare(ARCH, built.image, state)
        handed, _ = credentials(state, config, [], True, NAME)
        line = [*command(ARCH, disk, flash, Wiring(PROFILE.memory_mib, {free_port(): API_PORT}, handed, online=True)), *planted(units)]
        with Machine(line, told_to(state / "console.log")) as machine:
            yield Host(hub, folder, machine, registry)


def test_the_image_of_a_host_runs_containers_keeps_their_limits_and_finds_them_again(built: Built, tmp_path: Path) -> None:
    with host(built, tmp_path, {"systemd.extra-unit.kills.service": _KILLS, "systemd.unit-dropin.novacron-edge.service~90-kills": _AT_START}) as node:
        reports = until_sync(lambda: [body for body in node.events("workload.driver") if body["driver"] == "container"], BOOT_S, "what its driver can")
        assert reports[0]["usable"] and reports[0]["cgroup"] == "v2", reports[0]["cannot"]
        assert {"start", "stop", "adopt", "pause", "stats", "logs", "exec", "limits", "network", "seccomp", "user-namespace"} <= set(reports[0]["can"]), reports[0]["cannot"]
        node.submit("lasting", COUNTS)
        node.submit("greedy", "exec busybox tail /dev/zero", limits={"memory": "24Mi"})
        node.waited("lasting", "running")
        assert "memory limit" in node.waited("greedy", "failed")["reason"]
        until_sync(lambda: any(body["boot_n"] == 2 for body in node.events("boot")), BOOT_S, "the agent again, after it was killed")
        before = until_sync(lambda: node.logs("lasting").split(), BOOT_S, "what the container says to the agent that has found it")
        after = until_sync(lambda: (found := node.logs("lasting").split()) and len(found) > len(before) + 3 and found, BOOT_S, "more of what the container says")
        assert after.count("begun") == 1 and after[1:] == [str(n + 1) for n in range(len(after) - 1)], "it went on, and began once"
        assert node.events("workload.restart") == [] and {one["epoch"] for one in node.said("lasting")} == {1}


def test_control_a_wall_around_the_agent_is_one_around_its_containers(built: Built, tmp_path: Path) -> None:
    """What the image had once: then no container starts, and the driver says so."""
    with host(built, tmp_path, {"systemd.unit-dropin.novacron-edge.service~90-wall": "[Service]\nProtectHostname=yes\n"}) as node:
        report = until_sync(lambda: [body for body in node.events("workload.driver") if body["driver"] == "container"], BOOT_S, "what its driver can")[0]
        assert not report["usable"] and "sethostname" in report["cannot"]["start"], report

