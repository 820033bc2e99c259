"""What `test_units` runs in a guest: hub and edge installed as docs/operate.md says, under systemd. It ends with 0 where all of it holds; what it looks at is on the console."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from hub.broker.mosquitto import free_port
from tests.integration.certificates import Authority
from tests.integration.container_side import base
from tests.system.steps import until
from tests.unit.workloads.image_side import archive, layout
from tools.bench.harness import ROOT
from tools.novactl.client import Api

ETC, UNITS, OPT, LIB = Path("/etc/novacron"), Path("/etc/systemd/system"), Path("/opt/novacron"), Path("/var/lib/novacron")
NAME = "gw-1"


def run(*words: str) -> str:
    """What a command says; it has to end well."""
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        raise AssertionError(f"{' '.join(words)}: {done.returncode}\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return done.stdout


def installed(unit: str) -> None:
    """A unit, as it is copied. The code is this repository's, which is not installed."""
    (UNITS / unit).write_text((ROOT / "tools/systemd" / unit).read_text())
    more = UNITS / f"{unit}.d"
    more.mkdir()
    (more / "code.conf").write_text(f"[Service]\nEnvironment=PYTHONPATH={ROOT}\n")


def shown(unit: str, name: str) -> str:
    """A property of a unit."""
    return run("systemctl", "show", "--property", name, "--value", unit).strip()


def main(control: str) -> None:
    """All of it. `control`: what is planted."""
    whole = control == "-"
    OPT.parent.mkdir(exist_ok=True)
    OPT.symlink_to(ROOT)
    ETC.mkdir()
    run("useradd", "--system", "--home-dir", "/", "--shell", "/usr/sbin/nologin", "novacron-hub")
    ours = Authority(ETC / "made", "ours")
    api, broker = free_port("127.0.0.1"), free_port("127.0.0.1")
    for name, pair in (("hub", ours.gives("hub")), (NAME, ours.gives(NAME))):
        for source, ending in zip(pair, ("pem", "key"), strict=True):
            run("install", "-m", "600" if ending == "key" else "644", *(["-o", "novacron-hub"] if name == "hub" else []), source, str(ETC / f"{name}.{ending}"))
    (ETC / "ca.pem").write_bytes(ours.ca.read_bytes())
    (ETC / "hub.env").write_text("".join(f"NOVACRON_HUB_{name}={value}\n" for name, value in {
        "BROKER": "mosquitto", "BROKER_LISTEN": f"0.0.0.0:{broker}", "LISTEN": f"0.0.0.0:{api}", "TLS_CERT": ETC / "hub.pem", "TLS_KEY": ETC / "hub.key", "BROKER_CLIENT_CA": ETC / "ca.pem",
    }.items()))
    for unit in ("novacron-hub.service", "novacron-edge.service"):
        installed(unit)
    if control == "walls":
        (UNITS / "novacron-edge.service.d/z.conf").write_text("[Service]\nPrivateDevices=yes\nProtectHostname=yes\n")
    if control == "mode":
        os.chmod(ETC / "hub.key", 0o600)
        os.chown(ETC / "hub.key", 0, 0)
    run("systemctl", "daemon-reload")
    run("systemctl", "enable", "--now", "novacron-hub")
    os.environ["NOVACRON_CA_FILE"] = str(ETC / "ca.pem")
    token = until("the hub has its token", lambda: (LIB / "hub/token").read_text().strip())
    hub = Api(f"https://127.0.0.1:{api}", token)
    until("the hub answers", lambda: isinstance(hub.get("/api/v1/edges"), list))
    assert (LIB / "hub").stat().st_mode & 0o077 == 0

    data = LIB / "edge"
    # Without containers first: a user of its own, which cannot read the key.
    config: dict[str, Any] = {  # which is YAML
        "edge_id": NAME, "data_dir": str(data), "bus": {"enabled": False}, "journal": {"min_free_bytes": 0, "ballast_bytes": 0, "target_hours": 0},
        "uplink": {"url": f"mqtts://127.0.0.1:{broker}", "ca_file": str(ETC / "ca.pem"), "cert_file": str(ETC / f"{NAME}.pem"), "key_file": "/run/credentials/novacron-edge.service/edge.key"},
    }
    workloads = {"workloads": {"enabled": True, "runtimes": ["runc"], "functions": False, "reserve_cpu_milli": 0, "reserve_memory_bytes": 0, "evict_memory_bytes": 0, "evict_disk_bytes": 0, "reserve_disk_bytes": 0}}
    (UNITS / "novacron-edge.service.d/secrets.conf").write_text(f"[Service]\nLoadCredential=edge.key:{ETC / NAME}.key\n")
    run("systemctl", "daemon-reload")

    def online() -> list[str]:
        return [one["edge"] for one in hub.get("/api/v1/edges") if one["state"] == "online"]

    if whole:
        (ETC / "edge.yaml").write_text(json.dumps(config))
        run("systemctl", "start", "novacron-edge")
        until("the edge is at its hub", lambda: online() == [NAME])
        assert shown("novacron-edge", "UID") not in ("0", "[not set]") and (LIB / "edge").is_symlink()
        run("systemctl", "stop", "novacron-edge")
        until("it has said goodbye", lambda: online() == [])

    (UNITS / "novacron-edge.service.d/containers.conf").write_text((ROOT / "tools/systemd/novacron-edge.service.d/containers.conf").read_text())
    run("systemctl", "daemon-reload")
    (ETC / "edge.yaml").write_text(json.dumps(config))
    run("systemctl", "start", "novacron-edge")  # systemd takes the folder back from the user that had it
    run("systemctl", "stop", "novacron-edge")
    # Containers' roots are overlays, and the guest's own root is one already.
    for folder in (Path("/tmp/novacron/archives"), data / "workloads"):
        folder.mkdir(parents=True)
    run("mount", "--bind", "/tmp/novacron", str(data / "workloads"))
    archive(layout(ETC / "in", [base()], name="box:1"), data / "workloads/archives/box.tar")
    (ETC / "edge.yaml").write_text(json.dumps(config | workloads))
    run("systemctl", "enable", "--now", "novacron-edge")  # until it says that it is ready
    print("units: the edge is ready", flush=True)
    until("the edge is at its hub", lambda: online() == [NAME])
    if whole:
        # What is new goes before what waited.
        until("it is the same edge with the same journal", lambda: [one["body"]["boot_n"] for one in hub.get(f"/api/v1/edges/{NAME}/records?stream=event&limit=100") if one["kind"] == "boot"] == [1, 2, 3])

    # A container, killed agent, the same container.
    out = data / "workloads/containers/counts.1/stdout.log"
    until("the node is known", lambda: hub.get("/api/v1/nodes"))
    hub.call("POST", "/api/v1/workloads", {"id": "counts", "image": "box:1", "requests": {"cpu": "100m", "memory": "32Mi"}, "spec": {"command": ["sh", "-c", "i=0; while :; do echo $i; i=$((i+1)); sleep 0.2; done"]}})
    try:
        until("the container says numbers", lambda: len(out.read_bytes().splitlines()) > 3)
    except AssertionError:
        print(hub.get("/api/v1/workloads/counts"), hub.get(f"/api/v1/events?edge={NAME}"), flush=True)
        raise
    first, pid = shown("novacron-edge", "MainPID"), shown("novacron-hub", "MainPID")
    os.kill(int(first), 9)
    until("systemd has started the agent again", lambda: shown("novacron-edge", "MainPID") not in ("0", first) and shown("novacron-edge", "ActiveState") == "active")
    seen = len(out.read_bytes().splitlines())
    until("the container has gone on", lambda: len(out.read_bytes().splitlines()) > seen + 3)
    numbers = [int(line) for line in out.read_bytes().splitlines()]
    assert numbers == list(range(len(numbers))), numbers[-10:]

    # Reload, and an orderly end: the hub has said goodbye by its own broker.
    run("systemctl", "reload", "novacron-hub")
    until("it has taken its certificate anew", lambda: "taken anew" in run("journalctl", "-u", "novacron-hub", "-o", "cat", "--no-pager"))
    assert shown("novacron-hub", "MainPID") == pid
    until("the edge is at its hub again", lambda: [one["state"] for one in hub.get("/api/v1/edges")] == ["online"])
    run("systemctl", "stop", "novacron-hub")
    said = run("journalctl", "-u", "novacron-hub", "-o", "cat", "--no-pager")
    assert "no connection to the broker" not in said.rpartition("Stopping")[2] and shown("novacron-hub", "Result") == "success", said[-2000:]
    assert f"hub: https://0.0.0.0:{api}/\n" in said and token not in said, "the token is in its file, and not in the journal"
    run("systemctl", "stop", "novacron-edge")
    assert shown("novacron-edge", "Result") == "success"


if __name__ == "__main__":
    try:
        main(sys.argv[1])
    except Exception:
        for name in ("hub", "edge"):
            print(subprocess.run(["journalctl", "-u", f"novacron-{name}", "-o", "cat", "--no-pager", "-n", "40"], capture_output=True, text=True, check=False).stdout)
        raise
