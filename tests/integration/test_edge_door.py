"""How an edge is let in at its brokers: passwords in files, certificates of the site's own, and what is replaced or missing while it runs."""

import os
import subprocess
from dataclasses import replace
from pathlib import Path

import aiomqtt
import pytest

from edge_runtime import bus_place, cli
from edge_runtime.config import ConfigError, EdgeConfig, load_config
from edge_runtime.config.schema import BusConfig
from edge_runtime.mqtt_session import Endpoint, SessionClosed

from .certificates import Authority
from .edges import MOSQUITTO, Edges, LocalBroker
from .waiting import until

pytestmark = pytest.mark.skipif(not MOSQUITTO, reason="mosquitto is not installed")


class Door:
    """A local broker that asks for a password, or for a certificate of an authority."""

    def __init__(self, folder: Path, authority: Authority | None = None) -> None:
        self.folder = folder
        self.passwords, self.secret = folder / "passwords", folder / "secret"
        lines = f"allow_anonymous false\npassword_file {self.passwords}\n"
        self.change(" The First ")
        if authority is not None:
            cert, key = authority.gives("broker")
            lines = f"allow_anonymous true\nrequire_certificate true\ncafile {authority.ca}\ncertfile {cert}\nkeyfile {key}\n"
        self.broker = LocalBroker(folder / "broker", lines)
        path = folder / "broker" / "mosquitto.conf"
        path.write_text(path.read_text().replace("allow_anonymous true\nset_tcp", "set_tcp"))

    def change(self, password: str) -> None:
        """Another password, at the broker's next start and in the edge's file."""
        subprocess.run(["mosquitto_passwd", "-c", "-b", str(self.passwords), "gw-1", password], check=True, capture_output=True)
        self.secret.write_text(f"{password}\n")

    def again(self) -> None:
        """The broker starts anew."""
        self.broker.kill()
        self.broker.start()


async def test_a_password_in_a_file_that_is_changed_holds_at_the_next_connection(tmp_path: Path, edges: Edges, caplog: pytest.LogCaptureFixture) -> None:
    door = Door(tmp_path)
    caplog.set_level("INFO")
    door.broker.start()
    try:
        edge = await edges.start(bus=BusConfig(url=f"mqtt://127.0.0.1:{door.broker.port}", username="gw-1", password_file=str(door.secret)))
        await edge.bus_up()
        door.change("Second ")
        door.again()
        await edge.bus_up(2)
        door.secret.unlink()  # as while it is replaced: nothing ends over it
        door.again()
        await until(lambda: "password_file" in (edge.runtime.bus.last_error if edge.runtime.bus else ""), what="the reason names the file")
        door.secret.write_text("Second ")
        await edge.bus_up(3)
        assert f"the local broker is away: password_file {door.secret}: {os.strerror(2)}" in caplog.text or "the local broker is away: the connection was lost" in caplog.text, "why it was away is in the log"
        assert "the local broker is there again" in caplog.text
    finally:
        door.broker.stop()


async def test_a_local_broker_that_speaks_tls_is_trusted_by_the_sites_authority_alone(tmp_path: Path, edges: Edges) -> None:
    ours, strangers = Authority(tmp_path / "ours", "ours"), Authority(tmp_path / "strangers", "strangers")
    door = Door(tmp_path, ours)
    cert, key = ours.gives("gw-1")
    bus = BusConfig(url=f"mqtts://127.0.0.1:{door.broker.port}", ca_file=str(ours.ca), cert_file=cert, key_file=key)
    door.broker.start()
    try:
        for wrong in (replace(bus, ca_file=str(strangers.ca)), replace(bus, cert_file="", key_file="")):
            edge = await edges.start(bus=wrong, data_dir=tmp_path / wrong.ca_file.replace("/", "_"))
            await until(lambda edge=edge: edge.runtime.bus is not None and edge.runtime.bus.last_error != "", what="it is not let in")  # type: ignore[misc]
            assert edge.runtime.metrics.value("bus_connects_total") == 0
            await edge.stop()
        await bus_place.take(EdgeConfig(edge_id="gw-1", bus=bus))
        edge = await edges.start(bus=bus)
        await edge.bus_up()
        whole = Path(cert).read_bytes()
        for spoilt in (whole[: len(whole) // 2], b""):  # a renewal that is not through
            Path(cert).write_bytes(spoilt)
            door.again()
            await until(lambda edge=edge: edge.runtime.bus is not None and cert in edge.runtime.bus.last_error, what="the reason names the certificate")  # type: ignore[misc]
        Path(cert).unlink()
        await until(lambda: edge.runtime.bus is not None and f"cert_file {cert}" in edge.runtime.bus.last_error, what="the reason names the file")
        Path(cert).write_bytes(whole)
        await edge.bus_up(2)
        tls = {"ca_certs": str(ours.ca), "certfile": cert, "keyfile": key}
        async with aiomqtt.Client("127.0.0.1", door.broker.port, tls_params=aiomqtt.TLSParameters(**tls), protocol=aiomqtt.ProtocolVersion.V311) as device:
            await device.publish("novacron/1/device/boiler-1/telemetry", b'{"temp": 90}', qos=1)
            await until(lambda: edge.runtime.pipeline.decided == 1, what="a decision on what came by TLS")
    finally:
        door.broker.stop()


@pytest.mark.parametrize(("content", "why"), [(b"", "is empty"), (b"\xff\xfe", "is not text"), (b"x" * 70_000, "is too long")])
def test_a_file_that_holds_no_password_is_named(tmp_path: Path, content: bytes, why: str) -> None:
    path = tmp_path / "password"
    path.write_bytes(content)
    with pytest.raises(SessionClosed, match=f"password_file {path}: .*{why}"):
        Endpoint("127.0.0.1", 1, username="u", password_file=str(path)).secret()


def test_check_warns_of_files_that_are_not_there_and_two_passwords_are_one_too_many(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "edge.yaml"
    path.write_text(f"edge_id: g\nuplink: {{url: 'mqtts://hub:8883', ca_file: {tmp_path}/none.pem}}\n")
    assert cli.main(["check", "--config", str(path)]) == 0
    assert f"uplink.ca_file {tmp_path}/none.pem: {os.strerror(2)}" in capsys.readouterr().err
    path.write_text("edge_id: g\nbus: {url: 'mqtt://127.0.0.1', password: a, password_file: /b}\n")
    with pytest.raises(ConfigError, match=r"bus\.password_file.*set one of them"):
        load_config(path)
