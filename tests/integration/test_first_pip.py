"""The pip that the set-up fetches where Python has none: from an index on loopback, by the hashes of a lock."""

import hashlib
import http.server
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

PROGRAM = Path(__file__).parents[2] / "tools" / "setup" / "first_pip.py"
NAME = "pip-9.9-py3-none-any.whl"
WHEEL = b"a wheel"


class Index(http.server.BaseHTTPRequestHandler):
    pages: dict[str, bytes]

    def do_GET(self) -> None:
        content = self.pages.get(self.path)
        self.send_response(200 if content is not None else 404)
        self.send_header("Content-Length", str(len(content or b"")))
        self.end_headers()
        self.wfile.write(content or b"")

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def index() -> Iterator[tuple[str, dict[str, bytes]]]:
    """Its address, and what it has; a page as PEP 503 has it, with addresses that are relative."""
    pages = {
        "/simple/pip/": f'<!DOCTYPE html><a href="../../files/old.whl#sha256=00">pip-9.8-py3-none-any.whl</a>\n<a data-requires-python="&gt;=3.9" href="../../files/{NAME}?a=1&amp;b=2#sha256=00">{NAME}</a>'.encode(),
        f"/files/{NAME}?a=1&b=2": WHEEL, "/files/old.whl": b"another one",
    }
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (Index,), {"pages": pages}))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}/simple", pages
    server.shutdown()
    thread.join()
    server.server_close()


def fetched(address: str, folder: Path, *hashes: str, lock: str = "") -> subprocess.CompletedProcess[str]:
    path = folder / "a.lock"
    path.write_text(lock or "other==1 \\\n    --hash=sha256:" + "1" * 64 + "\npip==9.9 \\\n" + " \\\n".join(f"    --hash=sha256:{one}" for one in hashes) + "\nwheel==2\n")
    return subprocess.run([sys.executable, "-I", PROGRAM, path, folder], env={"PIP_INDEX_URL": address, "PATH": "/usr/bin:/bin"}, capture_output=True, text=True, timeout=60)


def test_it_is_what_the_lock_names(tmp_path: Path, index: tuple[str, dict[str, bytes]]) -> None:
    done = fetched(index[0], tmp_path, "0" * 64, hashlib.sha256(WHEEL).hexdigest())
    assert (done.returncode, done.stdout.strip()) == (0, str(tmp_path / NAME)), done.stderr
    assert (tmp_path / NAME).read_bytes() == WHEEL


@pytest.mark.parametrize(("fault", "said"), [("content", "none of those that the lock names"), ("page", "has no pip-9.9"), ("index", "404"), ("lock", "names no pip")])
def test_anything_else_is_refused_and_not_kept(tmp_path: Path, index: tuple[str, dict[str, bytes]], fault: str, said: str) -> None:
    address, pages = index
    if fault == "content":
        pages[f"/files/{NAME}?a=1&b=2"] = WHEEL + b"!"
    elif fault == "page":
        pages["/simple/pip/"] = b"<a href=x>\xff"
    elif fault == "index":
        address += "/elsewhere"
    done = fetched(address, tmp_path, hashlib.sha256(WHEEL).hexdigest(), lock="pip==9.9\n" if fault == "lock" else "")
    assert done.returncode == 1 and said in done.stderr and "Traceback" not in done.stderr, done.stderr
    assert not (tmp_path / NAME).exists()


def test_the_lock_of_this_project_names_one() -> None:
    for kind in ("run", "dev"):
        done = subprocess.run([sys.executable, "-I", "-c", f"import sys; sys.path.insert(0, {str(PROGRAM.parent)!r}); import first_pip; print(first_pip.wanted(open('requirements/{kind}.lock').read())[0])"], cwd=PROGRAM.parents[2], capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
