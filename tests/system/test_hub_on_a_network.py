"""A hub that edges reach over a network: its broker lets in whom it knows, and it speaks TLS. The hub is a process as a site starts it, edges are agents as processes, certificates are made by openssl."""

import json
import os
import shutil
import signal
import socket
import ssl
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from edge_runtime.mqtt_session import Endpoint, MqttSession
from hub.broker.mosquitto import OWN_USER, find_mosquitto, free_port, hashed
from tests.integration.certificates import Authority
from tests.integration.test_mqtt_session import Inbox
from tests.integration.waiting import until
from tools.bench.agent import Agent
from tools.bench.harness import ROOT, die_with_parent
from tools.novactl.client import Api, CommandError

pytestmark = [
    pytest.mark.skipif(find_mosquitto() is None, reason="mosquitto is not installed (apt install mosquitto)"),
    pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl is not installed (apt install openssl)"), pytest.mark.system,
]

EVERYWHERE = "0.0.0.0"
"""An address that others reach too."""


class HubProcess:
    """`novacron-hub` with these options."""

    def __init__(self, folder: Path, **options: str) -> None:
        self.port, self.broker_port, self.tls = free_port("127.0.0.1"), free_port(EVERYWHERE), "tls_cert" in options
        self.words = [
            sys.executable, "-m", "hub", "--data-dir", str(folder / "hub"), "--broker", "mosquitto", "--broker-listen", f"{EVERYWHERE}:{self.broker_port}", "--listen", f"127.0.0.1:{self.port}",
            *(word for name, value in options.items() for word in (f"--{name.replace('_', '-')}", value)),
        ]
        self.folder = folder
        self.process: subprocess.Popen[str] | None = None

    def __enter__(self) -> "HubProcess":
        self.process = subprocess.Popen(self.words, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, text=True, preexec_fn=die_with_parent)
        assert self.process.stdout is not None
        self.said = [self.process.stdout.readline() for _ in range(2)]
        assert self.said[0].startswith("hub: http"), self.said
        return self

    def __exit__(self, *_: object) -> None:
        assert self.process is not None
        self.process.terminate()
        assert self.process.wait(30) == 0

    @property
    def token(self) -> str:
        return (self.folder / "hub/token").read_text().strip()

    def get(self, path: str) -> Any:
        return Api(f"{'https' if self.tls else 'http'}://127.0.0.1:{self.port}", self.token).get(path)

    def edges(self) -> dict[str, str]:
        """By name, how the hub sees it."""
        return {one["edge"]: one["state"] for one in self.get("/api/v1/edges")}

    @property
    def inside(self) -> int:
        """The port of the hub's own door."""
        lines = (self.folder / "hub/broker/mosquitto.conf").read_text().splitlines()
        return int(next(line.split()[1] for line in lines if line.startswith("listener") and line.endswith(" 127.0.0.1")))


@contextmanager
def agent(name: str, **uplink: Any) -> Iterator[Agent]:
    """An edge with this uplink."""
    with Agent(0, api=False, model="", host=False, extra={
        "edge_id": name, "bus": {"enabled": False}, "decisions": {}, "uplink": {"backoff_base_s": 0.05, "backoff_cap_s": 0.3, **uplink}, "journal": {"min_free_bytes": 0, "ballast_bytes": 0, "target_hours": 0},
    }) as made:
        yield made


async def refused(port: int, *, name: str = "stranger", **how: Any) -> str:
    """Why somebody is not let in; empty where they are."""
    session = MqttSession(Endpoint("127.0.0.1", port, **how), name, Inbox())
    try:
        await session.connect()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    await session.disconnect()
    return ""


async def test_edges_come_in_by_their_passwords_and_the_hub_by_a_door_of_its_own(tmp_path: Path) -> None:
    passwords = tmp_path / "passwords"
    passwords.write_text(f"edges:{hashed('right')}\n\n")
    with HubProcess(tmp_path, broker_password_file=str(passwords)) as hub:
        assert f"mqtt://{EVERYWHERE}:{hub.broker_port}" in hub.said[1]
        url = f"mqtt://127.0.0.1:{hub.broker_port}"
        with agent("gw-1", url=url, username="edges", password="right"):
            await until(lambda: hub.edges() == {"gw-1": "online"}, 30.0, what="the edge at its hub")
            for how in ({"username": "edges", "password": "wrong"}, {}, {"username": OWN_USER, "password": ""}):
                assert "uthori" in await refused(hub.broker_port, **how), how
                assert "uthori" in await refused(hub.inside, **how), "the hub's own door is open to nobody else"
        # A new user is let in as soon as the hub is told to look.
        passwords.write_text(passwords.read_text() + f"more:{hashed('new')}\n")
        assert await refused(hub.broker_port, username="more", password="new")
        assert hub.process is not None
        hub.process.send_signal(signal.SIGHUP)

        async def in_() -> bool:
            return not await refused(hub.broker_port, username="more", password="new")

        await until(in_, 20.0, what="the new user is let in")
        kept = hub.folder / "hub/broker"
        assert all((kept / name).stat().st_mode & 0o077 == 0 for name in ("passwords", "mosquitto.conf"))


def shown(port: int, ca: Path) -> int:
    """The serial number of the certificate that is shown there."""
    context = ssl.create_default_context(cafile=ca)
    with socket.create_connection(("127.0.0.1", port), 5) as plain, context.wrap_socket(plain, server_hostname="127.0.0.1") as line:
        told = line.getpeercert()
        assert told is not None
        return int(str(told["serialNumber"]), 16)


async def test_edges_come_in_by_certificates_and_have_their_own_topics_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ours, others = Authority(tmp_path / "ours", "ours"), Authority(tmp_path / "others", "others")
    cert, key = ours.gives("hub")
    with HubProcess(tmp_path, tls_cert=cert, tls_key=key, broker_client_ca=str(ours.ca)) as hub:
        assert hub.said[0].startswith("hub: https://") and " mqtts://" in hub.said[1]
        with pytest.raises(CommandError, match=r"is not trusted \(.*\); give --ca-file"):
            hub.get("/api/v1/edges")
        monkeypatch.setenv("NOVACRON_CA_FILE", str(tmp_path / "nowhere.pem"))
        with pytest.raises(CommandError, match="--ca-file: .*nowhere.pem holds no certificate authorities"):
            hub.get("/api/v1/edges")
        monkeypatch.setenv("NOVACRON_CA_FILE", str(ours.ca))
        url, mine = f"mqtts://127.0.0.1:{hub.broker_port}", dict(zip(("cert_file", "key_file"), ours.gives("gw-1"), strict=True))
        trust: dict[str, Any] = {"tls": True, "ca_file": str(ours.ca)}
        with agent("gw-1", url=url, ca_file=str(ours.ca), **mine):
            await until(lambda: hub.edges() == {"gw-1": "online"}, 30.0, what="the edge at its hub")

            # Nobody else comes in: without a certificate, with one of others, or without TLS; nor does who trusts others.
            foreign = dict(zip(("cert_file", "key_file"), others.gives("gw-1"), strict=True))
            assert (users := [line.split()[1] for line in (hub.folder / "hub/broker/topics").read_text().splitlines() if line.startswith("user ")]) and users[0].startswith(OWN_USER) and len(users[0]) > len(OWN_USER) + 8
            for how in (trust, {**trust, **foreign}, {}, {"tls": True, "ca_file": str(others.ca), **mine}):
                assert await refused(hub.broker_port, **how), how
            assert await refused(hub.broker_port, **trust, **dict(zip(("cert_file", "key_file"), ours.gives("gw-2"), strict=True))) == ""

            # Who comes in as gw-2 has no other's topics, to write or to read.
            inbox = Inbox()
            session = MqttSession(Endpoint("127.0.0.1", hub.broker_port, **trust, cert_file=str(ours.folder / "gw-2.pem"), key_file=str(ours.folder / "gw-2.key")), "gw-2", inbox)
            await session.connect()
            await session.subscribe(["novacron/1/edge/+/desired", "novacron/1/edge/+/up", "novacron/1/edge/gw-2/desired"])
            status = json.dumps({"v": 1, "state": "online"}).encode()
            for name in ("gw-1", "gw-3", "gw-2"):
                assert session.publish(f"novacron/1/edge/{name}/status", status)
            Api(f"https://127.0.0.1:{hub.port}", hub.token).call("PUT", "/api/v1/edges/gw-1/desired", {"twins": {"a": {"b": 1}}})
            Api(f"https://127.0.0.1:{hub.port}", hub.token).call("PUT", "/api/v1/edges/gw-2/desired", {"twins": {"a": {"b": 1}}})
            await until(lambda: [topic for topic, _ in inbox.messages if topic.endswith("gw-2/desired")], 20.0, what="its own desired state")
            assert {topic for topic, _ in inbox.messages} == {"novacron/1/edge/gw-2/desired"}, "none of another's"
            await until(lambda: "gw-2" in json.dumps(hub.get("/api/v1/errors")), 20.0, what="what gw-2 said of itself, which is none of the contract")
            assert "gw-3" not in json.dumps(hub.get("/api/v1/errors")) and hub.edges()["gw-1"] == "online"
            await session.disconnect()

            # A worker trusts the hub by what it is given.
            worker = tmp_path / "worker"
            worker.mkdir()
            (worker / "token").touch(0o600)
            (worker / "token").write_text(hub.get("/api/v1/migration-workers/w-1/token")["token"])
            words = [sys.executable, "-m", "gpu_migration", "worker", "--hub", f"https://127.0.0.1:{hub.port}", "--name", "w-1", "--token-file", str(worker / "token"), "--folder", str(worker)]
            with subprocess.Popen([*words, "--ca-file", str(ours.ca)], cwd=ROOT, preexec_fn=die_with_parent) as process:
                await until(lambda: [one["worker"] for one in hub.get("/api/v1/migration-workers")] == ["w-1"], 30.0, what="the worker at its hub")
                process.terminate()
            done = subprocess.run([*words, "--ca-file", str(worker / "none")], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
            assert done.returncode != 0 and "--ca-file" in done.stderr and "PEM" in done.stderr

            # A new certificate is shown without a restart; what is none leaves the old one.
            assert hub.process is not None
            before = shown(hub.port, ours.ca)
            Path(cert).write_text("no certificate")
            hub.process.send_signal(signal.SIGHUP)
            assert shown(hub.port, ours.ca) == before
            ours.gives("hub")
            hub.process.send_signal(signal.SIGHUP)
            await until(lambda: shown(hub.port, ours.ca) != before, 20.0, what="the new certificate")
            await until(lambda: hub.edges()["gw-1"] == "online", 30.0, what="the edge is at its hub again")
