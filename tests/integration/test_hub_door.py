"""What is asked of a hub's door and cannot be: each is refused before anything is started, and says which option and what to do."""

import contextlib
import os
import shutil
import ssl
import sys
from pathlib import Path

import pytest

from edge_runtime.cli import needs_openssl
from edge_runtime.config import EdgeConfig
from edge_runtime.config.schema import BusConfig, UplinkConfig, WorkloadsConfig
from hub.broker import open_broker
from hub.broker.base import BrokerError, Door
from hub.broker.mosquitto import find_mosquitto
from hub.cli import _greeting, _journalled
from hub.tls import load, served

from .certificates import self_signed

needs_openssl_program = pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl is not installed (apt install openssl)")
needs_mosquitto = pytest.mark.skipif(find_mosquitto() is None, reason="mosquitto is not installed (apt install mosquitto)")


@needs_mosquitto
@pytest.mark.parametrize(("text", "words"), [
    (None, "cannot be read"), ("edges:plain\n", "'edges' has no hashed password; mosquitto_passwd -U"), ("nonsense\n", "'nonsense' has no hashed password"),
])
async def test_a_password_file_that_is_none_is_refused(text: str | None, words: str, tmp_path: Path) -> None:
    path = tmp_path / "passwords"
    if text is not None:
        path.write_text(text)
    with pytest.raises(BrokerError, match=words) as caught:
        await open_broker("mosquitto", tmp_path / "broker", "0.0.0.0", 0, Door(str(path)))
    assert caught.value.field == "broker.password_file"


@pytest.mark.parametrize(("setting", "door", "ca_file", "words"), [
    ("embedded", Door(password_file="p"), "", "apt install mosquitto"), ("mqtt://127.0.0.1:1", Door(client_ca_file="c"), "", "is not ours"), ("mqtt://127.0.0.1:1", Door(), "ca.pem", "without TLS"),
    ("mqtts://127.0.0.1:1", Door(), "/nowhere/ca.pem", "holds no authorities"),
    *([("mosquitto", Door(client_ca_file="c"), "", "give tls-cert and tls-key"), ("mosquitto", Door("p", "c", "k", "a"), "", "give one of them")] if find_mosquitto() else []),
])
async def test_what_does_not_go_together_is_refused(setting: str, door: Door, ca_file: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(BrokerError, match=words):
        await open_broker(setting, tmp_path / "broker", "127.0.0.1", 0, door, ca_file)
    assert not (tmp_path / "broker").exists()


@needs_openssl_program
def test_a_certificate_that_is_none_is_refused(tmp_path: Path) -> None:
    for name, passphrase in (("a", ""), ("b", ""), ("locked", "xxxx")):
        self_signed(tmp_path, name, passphrase)
    (tmp_path / "odd.pem").write_text("odd")

    def of(cert: str, key: str) -> tuple[str, str]:
        return f"{tmp_path}/{cert}.pem" if cert else "", f"{tmp_path}/{key}.key" if key else ""

    served(*of("a", "a"))
    for cert, key, words in (
        ("a", "", "tls-key: is not given"), ("", "a", "tls-cert: is not given"), ("none", "a", r"tls-cert: .*none.pem cannot be read \(No such file"), ("a", "none", "tls-key: .*none.key cannot be read"),
        ("a", "b", "are no certificate and its key"), ("odd", "a", "are no certificate and its key"), ("locked", "locked", "without a passphrase"),
    ):
        with pytest.raises(OSError, match=words):
            served(*of(cert, key))


def shown(context: ssl.SSLContext) -> bytes:
    """The certificate that who connects is shown."""
    ways = ssl.MemoryBIO(), ssl.MemoryBIO()
    trusting = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    trusting.check_hostname, trusting.verify_mode = False, ssl.CERT_NONE
    client, server = trusting.wrap_bio(*ways), context.wrap_bio(*reversed(ways), server_side=True)
    for _ in range(4):
        for each in (client, server):
            with contextlib.suppress(ssl.SSLWantReadError):
                each.do_handshake()
    found = client.getpeercert(binary_form=True)
    assert found is not None
    return found


@needs_openssl_program
def test_a_new_certificate_that_does_not_fit_its_key_leaves_the_old_one(tmp_path: Path) -> None:
    """As between two writes of whoever renews it."""
    for name in ("a", "b"):
        self_signed(tmp_path, name)
    context = served(f"{tmp_path}/a.pem", f"{tmp_path}/a.key")
    before = shown(context)
    with pytest.raises(OSError, match="no certificate and its key"):
        load(context, f"{tmp_path}/b.pem", f"{tmp_path}/a.key")
    assert shown(context) == before
    load(context, f"{tmp_path}/b.pem", f"{tmp_path}/b.key")
    assert shown(context) != before


def test_a_token_is_printed_neither_to_the_journal_nor_for_who_gave_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with open(tmp_path / "out", "w") as out, open(tmp_path / "other", "w") as other:
        told = os.fstat(out.fileno())
        monkeypatch.setattr(sys, "stdout", out)
        assert not _journalled() and "t0ken" in _greeting("http://h", "t0ken", False)
        assert _greeting("http://h", "t0ken", True) == "hub: http://h/", "who gave it has it, and a container's log is read by others"
        monkeypatch.setenv("JOURNAL_STREAM", f"{told.st_dev}:{told.st_ino}")
        assert _journalled() and "t0ken" not in _greeting("http://h", "t0ken", False)
        monkeypatch.setattr(sys, "stdout", other)  # of a program that a service has started, which prints to somewhere else
        assert not _journalled()


def test_an_agent_keeps_tls_where_it_may_have_to_speak_it() -> None:
    """Without it an agent has some megabytes less; one that runs containers fetches their images from registries, which speak it."""
    plain = EdgeConfig()
    assert not needs_openssl(plain)
    for config in (
        EdgeConfig(uplink=UplinkConfig(url="mqtts://hub.example")), EdgeConfig(bus=BusConfig(url="mqtts://127.0.0.1")), EdgeConfig(workloads=WorkloadsConfig(enabled=True)),
    ):
        assert needs_openssl(config)
    assert not needs_openssl(EdgeConfig(workloads=WorkloadsConfig(enabled=True, fetch=False)))
