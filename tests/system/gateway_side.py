"""A gateway's image in a machine of its own, at a hub; a device of its site, which comes to the gateway's broker over the network; a way to do to the broker what no one could do from outside."""

import json
import shutil
import socket
import ssl
import subprocess
import threading
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any

import paho.mqtt.client as mqtt
import yaml
from paho.mqtt.enums import CallbackAPIVersion

from firmware_images import broker, recipes
from firmware_images.boot import API_PORT, credentials, taken
from firmware_images.build import Built
from firmware_images.machine import HERE, Machine, Wiring, command, free_port, prepare
from tests.integration.waiting import until_sync
from tests.system.image_device import BOOT_S, planted, told_to
from tools.bench.image_inside import HubProcess

ARCH, PROFILE, NAME, OVEN = recipes.architecture("amd64"), recipes.profile("gateway"), "gateway-1", "oven-1"

PASSWORD = "of the oven"

RULES = [{"id": "hot", "on": {"device": "oven-*", "metric": "temp"}, "if": {"value": "temp", "op": ">", "than": 100}, "trigger": "each", "then": [{"command": {"device": "$device", "name": "vent", "args": {"n": "$value:n"}, "expires": "1h"}}]}]

_DOES = {
    "kill": "systemctl kill -s KILL novacron-broker",
    "damage": "busybox head -c 100 /var/lib/novacron/mosquitto/mosquitto.db > /var/lib/novacron/mosquitto/cut; busybox mv /var/lib/novacron/mosquitto/cut /var/lib/novacron/mosquitto/mosquitto.db; systemctl kill -s KILL novacron-broker",
    "look": "systemctl show novacron-broker -p NRestarts --value; busybox ls /var/lib/novacron/mosquitto",
}
"""What is done in the gateway when somebody connects to the port of that name; what it says comes back."""

PORTS = {name: 7001 + number for number, name in enumerate(_DOES)}


def doors() -> dict[str, str]:
    """Units that do it, as `image_device.planted` takes them."""
    units = {"systemd.unit-dropin.novacron-broker.service~90-doors": f"[Unit]\nWants={' '.join(f'{name}.socket' for name in _DOES)}\n"}
    for name, script in _DOES.items():
        units[f"systemd.extra-unit.{name}.socket"] = f"[Socket]\nListenStream={PORTS[name]}\nAccept=yes\n"
        units[f"systemd.extra-unit.{name}@.service"] = f"[Service]\nStandardInput=socket\nStandardError=journal\nExecStart=/bin/sh -c '{script}; echo done'\n"
    return units


def keys(folder: Path) -> list[str]:
    """Passwords and a certificate for a gateway's broker, made as firmware_images/README.md says; words that hand them over."""
    folder.mkdir()
    passwords, certificate, key = (folder / name for name in (broker.PASSWORDS, broker.CERTIFICATE, broker.KEY))
    subprocess.run([shutil.which("mosquitto_passwd") or "/usr/bin/mosquitto_passwd", "-c", "-b", str(passwords), OVEN, PASSWORD], check=True, capture_output=True)
    subprocess.run(["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "3650", "-subj", f"/CN={NAME}", "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(key), "-out", str(certificate)], check=True, capture_output=True)
    return [f"novacron.{path.name}={path}" for path in (passwords, certificate, key)]


class Device:
    """An oven: speaks MQTT as any device, does each command once, says what it has done. Connects by itself again, as devices do."""

    def __init__(self, port: int, certificate: Path, user: str = OVEN, password: str = PASSWORD) -> None:
        self.done: dict[str, int] = {}
        self.desired: list[dict[str, Any]] = []
        self.refused: list[str] = []
        self._number, self._news = 0, threading.Condition()
        self._client = mqtt.Client(CallbackAPIVersion.VERSION2, client_id=user, clean_session=False)
        self._client.username_pw_set(user, password)
        self._client.tls_set_context(ssl.create_default_context(cafile=str(certificate)))
        self._client.reconnect_delay_set(1, 4)
        self._client.on_connect, self._client.on_message = self._connected, self._message
        self._client.connect_async("127.0.0.1", port, keepalive=15)
        self._client.loop_start()

    def _connected(self, client: mqtt.Client, _data: Any, _flags: Any, reason: Any, _properties: Any) -> None:
        if reason.is_failure:
            self.refused.append(str(reason))
            return
        client.publish(f"novacron/1/device/{OVEN}/register", json.dumps({"kind": "oven", "name": "Oven, hall 2"}), 1, True)
        client.subscribe([(f"novacron/1/device/{OVEN}/{leaf}", 1) for leaf in ("command", "desired")])

    def _message(self, client: mqtt.Client, _data: Any, message: mqtt.MQTTMessage) -> None:
        told = json.loads(message.payload)
        if message.topic.endswith("/desired"):
            self.desired.append(told)
            client.publish(f"novacron/1/device/{OVEN}/reported", json.dumps(told["desired"]), 1)
            return
        if told["id"] not in self.done:
            self.done[told["id"]] = told["args"]["n"]
        client.publish(f"novacron/1/device/{OVEN}/result", json.dumps({"id": told["id"], "ok": True}), 1)

    @property
    def connected(self) -> bool:
        """It is at the broker."""
        return self._client.is_connected()

    def heat(self, count: int) -> list[int]:
        """Say that often that it is hot; the numbers of these readings. They are sent as soon as there is a broker."""
        numbers = list(range(self._number + 1, self._number + count + 1))
        self._number = numbers[-1]
        for n in numbers:
            self._client.publish(f"novacron/1/device/{OVEN}/telemetry", json.dumps({"temp": 150, "n": n}), 1)
        return numbers

    def said_elsewhere(self) -> None:
        """Say what it has no right to: a reading of another device."""
        self._client.publish("novacron/1/device/oven-2/telemetry", json.dumps({"temp": 150, "n": 1}), 1).wait_for_publish(60)

    def vented(self, numbers: list[int], machine: Machine) -> None:
        """Until it has been told to vent for each of these readings, for each once."""
        try:
            until_sync(lambda: set(numbers) <= set(self.done.values()), BOOT_S, "a command for each hot reading")
        except AssertionError as error:
            raise AssertionError(f"{error}: {sorted(self.done.values())} of {numbers}, connected: {self.connected}, refused: {self.refused}; the console:\n{machine.tail(40)}") from None
        told = sorted(self.done.values())
        assert len(told) == len(set(told)), "no reading is decided twice"

    def end(self) -> None:
        """Without a word, as one that is switched off."""
        self._client.loop_stop()


class Gateway:
    """The image in a machine; what its hub says of it."""

    def __init__(self, hub: HubProcess, folder: Path, line: list[str], ports: dict[str, int]) -> None:
        self.hub, self._folder, self._line, self.ports = hub, folder, line, ports

    def on(self) -> Machine:
        """Power on."""
        return Machine(self._line, told_to(self._folder / "console.log"))

    def door(self, name: str) -> list[str]:
        """Have that done in the gateway; what it says. Asked again until something is there that answers."""
        def asked() -> list[str]:
            try:
                with socket.create_connection(("127.0.0.1", self.ports[name]), 60) as sock:
                    said = b"".join(iter(lambda: sock.recv(4096), b"")).decode().split()
            except OSError:
                return []
            return said if said[-1:] == ["done"] else []

        told: list[str] = until_sync(asked, BOOT_S, f"the gateway's {name}")
        return told[:-1]

    def put(self, path: str, body: Any) -> Any:
        """Tell the hub."""
        token = (self._folder / "hub/token").read_text().strip()
        request = urllib.request.Request(f"http://127.0.0.1:{self.hub.port}{path}", json.dumps(body).encode(), {"Authorization": f"Bearer {token}", "Content-Type": "application/json"}, method="PUT")
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)

    def records(self, stream: str) -> list[dict[str, Any]]:
        """All that the hub has of a stream, from the first."""
        found: list[dict[str, Any]] = []
        while page := self.hub.get(f"/api/v1/edges/{NAME}/records?stream={stream}&limit=500&after={found[-1]['seq'] if found else 0}"):
            found += page
        return found

    def readings(self, device: str = OVEN) -> list[int]:
        """Numbers of the device's readings that the hub has."""
        return [record["body"]["values"]["n"] for record in self.records("telemetry") if record["kind"] == "reading" and record["body"]["device"] == device]

    def decided(self) -> list[int]:
        """Numbers of the readings on which it was decided, as the hub has it."""
        return [record["body"]["actions"][0]["command"]["args"]["n"] for record in self.records("decision") if record["body"]["device"] == OVEN]

    def exact(self, numbers: list[int]) -> None:
        """The hub has each of these readings and a decision on it, once, and nothing that the gateway journalled is missing or other than it was."""
        until_sync(lambda: set(numbers) <= set(self.readings()) and set(numbers) <= set(self.decided()), BOOT_S, "all readings and decisions at the hub")
        assert sorted(self.readings()) == sorted(self.decided()) == numbers
        verdict = until_sync(lambda: (found := self.hub.get(f"/api/v1/edges/{NAME}/verify")) and not any(stream["missing"] for stream in found["streams"].values()) and found, BOOT_S, "the end of the backlog")
        assert verdict["exact"], verdict


@contextmanager
def gateway(built: Built, folder: Path, given: list[str], units: Mapping[str, str] = MappingProxyType({})) -> Iterator[Gateway]:
    """One that is off yet. `given`: words of `boot --credential`; `units`: as `image_device.planted` takes them."""
    with HubProcess(folder) as hub:
        config = folder / "edge.yaml"
        config.write_text(yaml.safe_dump({
            "edge_id": NAME, "uplink": {"url": f"mqtt://{HERE}:{hub.broker_port}", "backoff_cap": "5s"}, "bus": {"url": f"mqtt://127.0.0.1:{broker.PORT}"}, "decisions": {"rules": RULES},
            "api": {"host": "0.0.0.0", "token_file": "/var/lib/novacron/config/api.token"}, "journal": {"retain_receipted_records": 1_000_000},
        }))
        state = folder / "state"
        disk, flash = prepare(ARCH, built.image, state)
        handed, _ = credentials(state, config, given, True, NAME, taken(PROFILE))
        ports = {name: free_port() for name in ("api", "devices", *PORTS)}
        forwards = {ports["api"]: API_PORT, ports["devices"]: broker.DEVICES_PORT} | {ports[name]: port for name, port in PORTS.items()}
        yield Gateway(hub, folder, [*command(ARCH, disk, flash, Wiring(PROFILE.memory_mib, forwards, handed, online=True)), *planted({**doors(), **units})], ports)


def refused(port: int) -> bool:
    """Whether nothing answers in TLS behind a port of a machine that is up. (QEMU takes connections for a guest that does not.)"""
    try:
        with socket.create_connection(("127.0.0.1", port), 30) as sock:
            sock.sendall(bytes([22, 3, 1, 0, 0]))  # the head of an empty record: an end that speaks TLS answers with an alert
            return sock.recv(1) == b""
    except OSError:
        return True
