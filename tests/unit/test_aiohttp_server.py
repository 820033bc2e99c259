"""The local API loads aiohttp's server half alone; whoever is a client in the same process finds the other half all the same."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

START = """
import sys
from edge_runtime.local_api.aiohttp_server import import_web
web = import_web()
assert "aiohttp.client" not in sys.modules and "aiohttp.web_app" in sys.modules
"""


def said(code: str) -> str:
    """What a fresh interpreter prints."""
    done = subprocess.run([sys.executable, "-c", START + code], capture_output=True, text=True, cwd=ROOT, timeout=60)
    return done.stdout + done.stderr


@pytest.mark.parametrize("code", [
    "import aiohttp; print(aiohttp.ClientSession.__module__, aiohttp.web is web)",
    "from aiohttp import ClientSession; import aiohttp.web; print(ClientSession.__module__, aiohttp.web is web)",
    "import aiohttp; aiohttp.ClientError; print(aiohttp.ClientSession.__module__, aiohttp.web is web)",
])
def test_a_client_finds_the_other_half(code: str) -> None:
    assert said(code) == "aiohttp.client True\n"


def test_what_only_looks_loads_nothing() -> None:
    code = """
import aiohttp
from aiohttp import hdrs
print(hasattr(aiohttp, "__wrapped__"), "aiohttp.client" in sys.modules)
try:
    aiohttp.nonsense
except AttributeError as error:
    print(error)
"""
    assert said(code).splitlines()[0] == "False False" and "nonsense" in said(code).splitlines()[1]


def test_it_is_loaded_once_by_whoever_comes_first_of_many() -> None:
    code = """
import threading, aiohttp
found, times, go = [], [], threading.Barrier(8)
loader = aiohttp.__spec__.loader
whole = loader.exec_module
loader.exec_module = lambda package: (times.append(1), whole(package))
def ask():
    go.wait()
    found.append(aiohttp.ClientSession)
those = [threading.Thread(target=ask) for _ in range(8)]
for one in those: one.start()
for one in those: one.join()
print(len(times), len(found), len(set(found)), found[0] is sys.modules["aiohttp.client"].ClientSession)
"""
    assert said(code) == "1 8 1 True\n"


def test_images_can_be_fetched_beside_the_interface() -> None:
    assert said("from edge_runtime.workloads.images.pull import session; print(session.__name__)") == "session\n"
