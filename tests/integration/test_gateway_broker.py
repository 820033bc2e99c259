"""What lets devices into a gateway's broker, run as it is on this machine: the scripts of its image in a folder instead of the data partition, and a mosquitto with what they made."""

import asyncio
import json
import os
import shutil
import ssl
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path

import aiomqtt
import pytest

from edge_runtime import bus_place, cli
from edge_runtime.config import EdgeConfig
from edge_runtime.config.schema import BusConfig, DutiesConfig
from edge_runtime.provisioned import provisioned
from firmware_images import broker, layout
from tools.bench.harness import die_with_parent, free_port, stop, wait_for_port

from .edges import MOSQUITTO, Device, Edge, Edges, LocalBroker
from .site_edges import served_by, site_config
from .waiting import until

REPOSITORY = Path(__file__).resolve().parents[2]
EDGE = "gw-1"
REFUSED = r"(?i)not authori[sz]ed|bad user name or password"
PASSWORD_PROGRAM = shutil.which("mosquitto_passwd") or ""

pytestmark = pytest.mark.skipif(not (MOSQUITTO and PASSWORD_PROGRAM and shutil.which("busybox") and shutil.which("openssl")), reason="mosquitto, busybox or openssl is not installed")


class Gateway:
    """A data folder, what is handed over as credentials, and what the broker would read."""

    def __init__(self, top: Path) -> None:
        self.top, self.data, self.ready, self.given = top, top / "data", top / "ready", top / "given"
        self.kept, self.state = self.data / "config" / "broker", self.data / "mosquitto"
        for folder in (self.data / "config", self.state, self.ready, self.given, top / "bin"):
            folder.mkdir(parents=True)
        (top / "bin" / "python3").write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')  # a link would not find this environment's packages
        (top / "bin" / "python3").chmod(0o755)
        self.environment = top / "bus.env"
        self.port, self.devices_port = free_port(), free_port()

    def text(self, script: str) -> str:
        """One of the image's texts, for this machine."""
        for old, new in ((broker.READY, str(self.ready)), (layout.DATA, str(self.data)), (layout.TOLD, str(self.top / "told")), ("mosquitto:mosquitto", f"{os.getuid()}:{os.getgid()}"), ("/usr/sbin/mosquitto", MOSQUITTO), (broker.AGENT_ENVIRONMENT, str(self.environment)), ("/etc/mosquitto", str(self.top)), (f"listener {broker.DEVICES_PORT}", f"listener {self.devices_port}"), (f"listener {broker.PORT} ", f"listener {self.port} ")):
            script = script.replace(old, new)
        return script.replace("allow_anonymous false\n", "allow_anonymous false\nuser root\n") if os.getuid() == 0 else script

    def run(self, script: str, **env: str) -> str:
        """Run one; what it says."""
        known = {"PATH": f"{self.top / 'bin'}:{os.environ['PATH']}", "CREDENTIALS_DIRECTORY": str(self.given), "PYTHONPATH": str(REPOSITORY), "HOME": str(self.top)}
        done = subprocess.run(["sh", "-c", self.text(script)], capture_output=True, text=True, env={**known, **env})
        assert done.returncode == 0, done.stderr
        return done.stdout

    def give(self, *users: str, key_of: str = "broker") -> None:
        """Passwords of these users (each its own name), a certificate and its key."""
        passwords = self.given / f"novacron.{broker.PASSWORDS}"
        passwords.unlink(missing_ok=True)
        for number, user in enumerate(users):
            subprocess.run([PASSWORD_PROGRAM, *([] if number else ["-c"]), "-b", str(passwords), user, user], check=True, capture_output=True)
        for name in {"broker", key_of}:
            subprocess.run(["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2", "-subj", "/CN=g", "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(self.top / f"{name}.key"), "-out", str(self.top / f"{name}.pem")], check=True, capture_output=True)
        shutil.copy(self.top / "broker.pem", self.given / f"novacron.{broker.CERTIFICATE}")
        shutil.copy(self.top / f"{key_of}.key", self.given / f"novacron.{broker.KEY}")

    def broker(self) -> "subprocess.Popen[bytes]":
        """Its mosquitto, with what is ready for it."""
        (self.top / "novacron.conf").write_text(self.text(broker.CONFIGURATION))
        self.run(broker.MAKE_READY)
        process = subprocess.Popen([MOSQUITTO, "-c", str(self.top / "novacron.conf")], preexec_fn=die_with_parent, stderr=subprocess.DEVNULL)
        wait_for_port(self.port)
        return process

    def configure(self, url: str = "") -> None:
        """Its agent's configuration, with the quick form that a first boot makes."""
        path = self.data / "config" / "edge.yaml"
        path.write_text(f"edge_id: {EDGE}\nuplink: {{enabled: false}}\nbus: {{url: '{url or f'mqtt://127.0.0.1:{self.port}'}'}}\n")
        assert cli.main(["check", "--quick", "--config", str(path)]) == 0

    def agent(self) -> tuple[str, str]:
        """User and password that the agent's unit gets."""
        told = dict(line.split("=", 1) for line in self.environment.read_text().splitlines())
        return told["NOVACRON_EDGE__BUS__USERNAME"], told["NOVACRON_EDGE__BUS__PASSWORD"]

    def client(self, user: str, password: str = "", name: str = "") -> aiomqtt.Client:
        """A device's connection, over the network's listener."""
        context = ssl.create_default_context(cafile=str(self.top / "broker.pem"))
        return aiomqtt.Client("127.0.0.1", self.devices_port, username=user, password=password or user, identifier=name or user, tls_context=context, protocol=aiomqtt.ProtocolVersion.V311)


@pytest.fixture
def gateway(tmp_path: Path) -> Gateway:
    made = Gateway(tmp_path)
    made.configure()
    return made


def test_what_lets_devices_in_is_taken_over_whole_at_each_boot_that_brings_another(gateway: Gateway) -> None:
    assert "no device reaches the broker over the network" in gateway.run(broker.TAKE) and not gateway.kept.exists()
    gateway.give("oven-1")
    assert "taken over" in gateway.run(broker.TAKE) and provisioned(gateway.top / "told") == [{"what": "broker", "outcome": "taken", "reason": ""}]
    assert sorted(path.name for path in gateway.kept.iterdir()) == sorted(layout.BROKER_FILES[:3]) and {path.stat().st_mode & 0o777 for path in gateway.kept.iterdir()} == {0o600}
    assert gateway.run(broker.TAKE) == "", "the same again"
    gateway.give("oven-1", "oven-2")
    (gateway.given / f"novacron.{broker.RIGHTS}").write_text("# all\nuser oven-1\ntopic readwrite #\n")
    assert "taken over" in gateway.run(broker.TAKE) and "oven-2" in (gateway.kept / broker.PASSWORDS).read_text() and (gateway.kept / broker.RIGHTS).exists()
    for path in gateway.given.iterdir():
        path.unlink()
    assert gateway.run(broker.TAKE) == "" and "oven-2" in (gateway.kept / broker.PASSWORDS).read_text(), "nothing given: what there is stays"


@pytest.mark.parametrize(("spoil", "why"), [
    (lambda given: (given / f"novacron.{broker.KEY}").unlink(), f"there is no {broker.KEY} beside the others"),
    (lambda given: (given / f"novacron.{broker.PASSWORDS}").write_text("oven-1:secret\n"), "has a line that mosquitto_passwd did not write"),
    (lambda given: (given / f"novacron.{broker.PASSWORDS}").write_text(f"{broker.AGENT}:$7$101$c2FsdA==$aGFzaA==\n"), "which is the agent's"),
    (lambda given: (given / f"novacron.{broker.CERTIFICATE}").write_text("-----BEGIN CERTIFICATE-----\n"), "is no certificate"),
    (lambda given: shutil.copy(given.parent / "other.key", given / f"novacron.{broker.KEY}"), "is not the key"),
    (lambda given: (given / f"novacron.{broker.RIGHTS}").write_text("allow all\n"), "begins with none of user, topic"),
])
def test_nothing_is_taken_over_of_what_would_lock_devices_out(gateway: Gateway, spoil: Callable[[Path], object], why: str) -> None:
    gateway.give("oven-1", key_of="other")
    shutil.copy(gateway.top / "broker.key", gateway.given / f"novacron.{broker.KEY}")
    gateway.run(broker.TAKE)
    before = {path.name: path.read_bytes() for path in gateway.kept.iterdir()}
    spoil(gateway.given)
    assert why in (said := gateway.run(broker.TAKE)) and "Nothing of it was taken over" in said
    [told] = provisioned(gateway.top / "told")
    assert (told["what"], told["outcome"]) == ("broker", "refused") and why in told["reason"]
    assert {path.name: path.read_bytes() for path in gateway.kept.iterdir()} == before and not (gateway.data / "config" / ".broker").exists()


@pytest.fixture
async def served(gateway: Gateway) -> AsyncIterator[Gateway]:
    """One whose broker runs, with two devices' passwords."""
    gateway.give("oven-1", "oven-2")
    gateway.run(broker.TAKE)
    process = gateway.broker()
    yield gateway
    stop(process)


async def test_a_device_speaks_for_itself_alone_and_no_stranger_is_let_in(served: Gateway) -> None:
    heard: list[str] = []
    user, password = served.agent()
    with pytest.raises(aiomqtt.MqttError, match=REFUSED):
        async with aiomqtt.Client("127.0.0.1", served.port):
            pass
    async with aiomqtt.Client("127.0.0.1", served.port, username=user, password=password, identifier="novacron-bus-g") as inside:  # as the agent
        await inside.subscribe("#", 1)
        for user, password in (("oven-1", "guessed"), ("nobody", "nobody")):
            with pytest.raises(aiomqtt.MqttError, match=REFUSED):
                async with served.client(user, password):
                    pass
        async with served.client("oven-1", name="novacron-bus-g") as oven:  # another's name of client takes nothing over
            await oven.subscribe("#", 1)
            for topic in ("device/oven-2/telemetry", "device/oven-1/command", "site/s/claim", "edge/g/desired", "device/oven-1/telemetry"):
                await oven.publish(f"novacron/1/{topic}", b"1", qos=1)
            await oven.subscribe("novacron/1/device/oven-1/command", 1)
            for topic in ("device/oven-2/command", "device/oven-1/command"):
                await inside.publish(f"novacron/1/{topic}", topic.encode(), qos=1)
            async for message in oven.messages:
                assert message.payload == b"device/oven-1/command", "it hears what it is told, and no other"
                break
        async for message in inside.messages:
            heard.append(str(message.topic))
            if heard[-1] == "novacron/1/device/oven-1/command":
                break
    assert heard == ["novacron/1/device/oven-1/telemetry", "novacron/1/device/oven-2/command", "novacron/1/device/oven-1/command"]


async def test_a_broker_that_has_kept_nothing_keeps_what_devices_say_until_the_agent_is_there(gateway: Gateway, edges: Edges) -> None:
    gateway.give("boiler-1")
    gateway.run(broker.TAKE)
    process = gateway.broker()
    try:
        async with gateway.client("boiler-1") as boiler:
            for temp in (90, 91):
                await boiler.publish("novacron/1/device/boiler-1/telemetry", f'{{"temp": {temp}}}', qos=1)
        user, password = gateway.agent()
        edge = await edges.start(bus=BusConfig(url=f"mqtt://{user}:{password}@127.0.0.1:{gateway.port}"))
        await until(lambda: edge.runtime.pipeline.decided == 2, what="decisions on what was said before it was there")
    finally:
        stop(process)


def test_the_agents_password_is_for_the_gateways_own_broker_and_stays_until_the_next_boot(gateway: Gateway) -> None:
    (gateway.top / "novacron.conf").write_text(gateway.text(broker.CONFIGURATION))
    gateway.run(broker.MAKE_READY)
    before = gateway.agent()
    assert before[0] == broker.AGENT and len(before[1]) == 32 and gateway.environment.stat().st_mode & 0o777 == 0o600
    gateway.run(broker.MAKE_READY)
    assert gateway.agent() == before
    gateway.environment.unlink()
    gateway.configure("mqtt://10.0.0.5:1883")
    gateway.run(broker.MAKE_READY)
    assert not gateway.environment.exists(), "another broker's user and password are the configuration's"


def test_what_a_broker_cannot_read_is_set_aside_and_what_a_killed_one_kept_is_not(gateway: Gateway) -> None:
    kept = gateway.state / "mosquitto.db"
    kept.write_bytes(b"damaged")
    for result in ("success", "signal", "oom-kill", "watchdog"):
        assert gateway.run(broker.ENDED, SERVICE_RESULT=result) == "" and kept.exists()
    assert "set aside" in gateway.run(broker.ENDED, SERVICE_RESULT="exit-code", EXIT_STATUS="1")
    assert not kept.exists() and (gateway.state / "mosquitto.db.damaged").read_bytes() == b"damaged"
    assert gateway.run(broker.ENDED, SERVICE_RESULT="exit-code", EXIT_STATUS="1") == ""


async def test_the_agents_place_is_taken_where_the_broker_is_to_keep_anything_for_it(broker: LocalBroker, edges: Edges) -> None:
    config = EdgeConfig(edge_id=EDGE, bus=BusConfig(url=f"mqtt://127.0.0.1:{broker.port}"))
    assert bus_place.wanted(config) and not bus_place.wanted(replace(config, duties=DutiesConfig(enabled=True))) and not bus_place.wanted(replace(config, bus=BusConfig()))
    async with Device(broker.port, "client") as device:
        await device.say("telemetry", {"temp": 90}, name="boiler-1")  # the control: nobody gets it
        await bus_place.take(config)
        await device.say("telemetry", {"temp": 91}, name="boiler-1")
        edge = await edges.start(port=broker.port)
        await until(lambda: edge.runtime.pipeline.decided == 1, what="the decision on the second")
        await device.say("telemetry", {"temp": 92}, name="boiler-1")
        await until(lambda: edge.runtime.pipeline.decided == 2, what="the decision on the third")
    assert [body["values"]["temp"] for body in await edge.records("telemetry")] == [91, 92]


async def test_other_edges_of_the_site_have_the_gateways_broker_as_their_common_bus(gateway: Gateway, tmp_path: Path) -> None:
    """By TLS and password, with rights that the gateway was given for them: duties are shared, and taken over."""
    gateway.give("gw-2", "boiler-1")
    (gateway.given / f"novacron.{broker.RIGHTS}").write_text(f"{broker.OWN_RIGHTS}\nuser gw-2\ntopic readwrite novacron/#\n")
    gateway.run(broker.TAKE)
    process = gateway.broker()
    user, password = gateway.agent()
    (tmp_path / "secret").write_text("gw-2\n")
    buses = {
        "gw-1": BusConfig(url=f"mqtt://127.0.0.1:{gateway.port}", username=user, password=password),
        "gw-2": BusConfig(url=f"mqtts://127.0.0.1:{gateway.devices_port}", username="gw-2", password_file=str(tmp_path / "secret"), ca_file=str(gateway.top / "broker.pem")),
    }
    edges = {name: Edge(replace(site_config(name, tmp_path, gateway.port), bus=bus)) for name, bus in buses.items()}
    try:
        for edge in edges.values():
            await edge.start()
        async with gateway.client("boiler-1") as boiler:
            await boiler.subscribe("novacron/1/device/boiler-1/command", 1)
            await boiler.publish("novacron/1/device/boiler-1/register", b"{}", qos=1)
            for number, (server, other) in enumerate((("gw-1", "gw-2"), ("gw-2", "gw-1"))):
                await served_by(edges, "boiler-1", server)
                await boiler.publish("novacron/1/device/boiler-1/telemetry", json.dumps({"n": number}), qos=1)
                await until(lambda server=server: edges[server].runtime.pipeline.decided == 1, what=f"{server} decides")  # type: ignore[misc]
                command = json.loads(bytes((await asyncio.wait_for(anext(boiler.messages), 60)).payload))  # type: ignore[arg-type]
                assert command["args"] == {"n": number} and edges[other].runtime.pipeline.decided == (1 if number else 0)
                await edges["gw-1"].stop()
    finally:
        for edge in edges.values():
            await edge.stop()
        stop(process)
