"""What `novacron-edge check` says of certificate files, before an agent depends on them."""

import subprocess
from pathlib import Path

import pytest

from edge_runtime.certificates import problem
from edge_runtime.cli import main


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """own.pem with own.key, other.key, locked.key, which is own.key under a passphrase, and none.pem."""
    folder = tmp_path_factory.mktemp("certificates")
    for name in ("own", "other"):
        subprocess.run(["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-subj", "/CN=edge", "-keyout", folder / f"{name}.key", "-out", folder / f"{name}.pem"], check=True, capture_output=True)
    subprocess.run(["openssl", "pkey", "-in", folder / "own.key", "-aes256", "-passout", "pass:x", "-out", folder / "locked.key"], check=True, capture_output=True)
    (folder / "none.pem").write_text("none\n")
    (folder / "both.pem").write_text((folder / "own.key").read_text() + (folder / "own.pem").read_text())
    return folder


@pytest.mark.parametrize(("ca", "cert", "key", "said"), [
    ("own.pem", "own.pem", "own.key", ""), ("", "", "", ""), ("own.pem", "", "", ""), ("", "both.pem", "", ""), ("absent", "absent", "absent", ""),
    ("own.pem", "own.pem", "other.key", "other.key: is not the key of cert_file"), ("own.pem", "own.pem", "locked.key", "the key without a passphrase"), ("", "own.pem", "", "are no certificate and its key"),
    ("none.pem", "own.pem", "own.key", "none.pem: is no certificate"), ("", "none.pem", "own.key", "are no certificate and its key"), ("", "own.key", "own.pem", "are no certificate and its key"), ("", "", "own.key", "there is no cert_file; give both"),
])
def test_what_is_wrong_with_certificate_files(files: Path, ca: str, cert: str, key: str, said: str) -> None:
    found = problem(*(str(files / name) if name else "" for name in (ca, cert, key)))
    assert (said in found and found) if said else found == "", found


def test_the_command_tells_it_and_what_it_cannot_read_where_it_is_to_be_strict(files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "edge.yaml"

    def check(*more: str, key: str = "own.key", token: str = "absent") -> tuple[int, str]:
        path.write_text(f"edge_id: a\nuplink: {{url: 'mqtts://hub:8883', cert_file: {files}/own.pem, key_file: {files}/{key}}}\napi: {{token_file: {files}/{token}}}\n")
        return main(["check", *more, "--config", str(path)]), capsys.readouterr().err

    assert check()[0] == 0
    status, said = check(key="other.key")
    assert status == 2 and said.startswith("uplink.key_file ")
    status, said = check(key="absent")
    assert status == 0 and "warning: uplink.key_file" in said
    assert check("--strict", token="own.key")[0] == 0
    status, said = check("--strict", key="absent")
    assert status == 2 and "uplink.key_file" in said and "api.token_file" in said
