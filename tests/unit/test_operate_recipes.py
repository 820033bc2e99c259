"""What docs/operate.md has people type, typed: certificates of one's own, as strictly looked at as Python 3.13 does, whatever Python this is."""

import re
import shutil
import ssl
import subprocess
from pathlib import Path

import pytest

PAGE = Path(__file__).resolve().parents[2] / "docs" / "operate.md"

pytestmark = pytest.mark.skipif(shutil.which("openssl") is None, reason="no openssl (as root: apt install openssl)")


def typed(folder: Path, text: str) -> None:
    subprocess.run(["sh", "-e", "-c", text], cwd=folder, check=True, capture_output=True)


def greeted(folder: Path) -> None:
    """A client that trusts the authority alone meets a server with the hub's certificate. Raises ssl.SSLError."""
    shown = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    shown.load_cert_chain(folder / "hub.pem", folder / "hub.key")
    trusting = ssl.create_default_context(cafile=str(folder / "hub-ca.pem"))
    trusting.verify_flags |= ssl.VERIFY_X509_STRICT
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    client, server = trusting.wrap_bio(to_client, to_server, server_hostname="hub.example"), shown.wrap_bio(to_server, to_client, server_side=True)
    for _ in range(10):
        for side in (client, server):
            try:
                side.do_handshake()
            except ssl.SSLWantReadError:
                pass
    client.do_handshake()


def recipe() -> str:
    found = re.search(r"```\n(openssl req -x509.*?)```", PAGE.read_text(), re.DOTALL)
    assert found is not None
    return found[1]


def test_certificates_of_ones_own_are_taken_by_the_strictest(tmp_path: Path) -> None:
    typed(tmp_path, recipe())
    greeted(tmp_path)


def test_an_authority_that_does_not_say_what_its_key_is_for_is_not_taken(tmp_path: Path) -> None:
    """The control."""
    left_out = " -addext keyUsage=critical,keyCertSign,cRLSign"
    assert left_out in recipe()
    typed(tmp_path, recipe().replace(left_out, ""))
    with pytest.raises(ssl.SSLCertVerificationError, match="key usage"):
        greeted(tmp_path)
