"""Fetches the pip that a lock file names, as a wheel that runs where it lies: for a Debian whose Python has no `ensurepip` (package python3-venv) and a user who may not install it.

    python3 first_pip.py LOCK FOLDER    prints the path of the wheel

It believes nothing but the lock's hashes. `PIP_INDEX_URL` names another index, as for pip itself (the HTML form of PEP 503, which each index has).
"""

import hashlib
import html
import os
import re
import sys
import urllib.parse
import urllib.request
from pathlib import Path

INDEX = "https://pypi.org/simple"

WHEEL_MAX_BYTES = 20 << 20
"""pip's has 2 MB."""

PAGE_MAX_BYTES = 20 << 20
"""The index's page of pip has 0.2 MB."""

WAIT_S = 60


def wanted(lock: str) -> tuple[str, set[str]]:
    """pip's version in a lock file, and the SHA-256 of the files that it may be."""
    found = re.search(r"^pip==(\S+)((?:\s*\\\n\s+--hash=sha256:[0-9a-f]{64})+)", lock, re.MULTILINE)
    if not found:
        raise SystemExit("first_pip: the lock names no pip with its hashes: make lock")
    return found[1], set(re.findall(r"sha256:([0-9a-f]{64})", found[2]))


def address(page: str, base: str, name: str) -> str:
    """Where the file of this name lies, by the index's page."""
    for href, text in re.findall(r"<a\s[^>]*?href=[\"']([^\"']+)[\"'][^>]*>([^<]*)</a>", page):
        if html.unescape(text).strip() == name:
            return urllib.parse.urldefrag(urllib.parse.urljoin(base, html.unescape(href))).url
    raise SystemExit(f"first_pip: {base} has no {name}")


def fetch(url: str, most: int) -> bytes:
    with urllib.request.urlopen(urllib.request.Request(url, headers={"Accept": "text/html, */*"}), timeout=WAIT_S) as answer:
        content: bytes = answer.read(most + 1)
    if len(content) > most:
        raise SystemExit(f"first_pip: {url} has more than {most} bytes")
    return content


def main(lock: str, folder: str) -> int:
    version, hashes = wanted(Path(lock).read_text())
    name = f"pip-{version}-py3-none-any.whl"
    base = os.environ.get("PIP_INDEX_URL", INDEX).rstrip("/") + "/pip/"
    try:
        content = fetch(address(fetch(base, PAGE_MAX_BYTES).decode(errors="replace"), base, name), WHEEL_MAX_BYTES)
    except (OSError, ValueError) as error:
        raise SystemExit(f"first_pip: {base}: {error}") from None
    if hashlib.sha256(content).hexdigest() not in hashes:
        raise SystemExit(f"first_pip: {name} from {base} is none of those that the lock names")
    path = Path(folder) / name
    path.write_bytes(content)
    print(path)
    return 0


if __name__ == "__main__":
    if len(sys.argv) != 3:
        raise SystemExit(__doc__)
    sys.exit(main(*sys.argv[1:]))
