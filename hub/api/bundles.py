"""Update bundles that a hub serves: files of the folder `bundles` in its data folder, by name, with ranges.

A device has no token of the hub's API, and shall have none. Each bundle has a token of its own, made from the hub's, that opens this one file and goes along with the order; what it protects is only the traffic: the bundle's
signature is what a device believes.
"""

import hashlib
import hmac
from pathlib import Path
from typing import Any

from aiohttp import web

from edge_runtime.contract.schema import ID_PATTERN

from .reading import NotKnown, answer

FOLDER = "bundles"

BUNDLES_MAX = 1000
"""Told of in one answer."""


def bundle_token(hub_token: str, name: str) -> str:
    """What opens one bundle."""
    return hmac.new(hub_token.encode(), f"bundle {name}".encode(), hashlib.sha256).hexdigest()


def listing(data_dir: Path, hub_token: str) -> list[dict[str, Any]]:
    """Every bundle: name, bytes, path and token."""
    try:
        names = sorted(path for path in (data_dir / FOLDER).iterdir() if ID_PATTERN.match(path.name) and path.is_file())
    except OSError:
        return []
    return [{"name": path.name, "bytes": path.stat().st_size, "path": f"/bundles/{path.name}", "token": bundle_token(hub_token, path.name)} for path in names[:BUNDLES_MAX]]


def bundle_file(data_dir: Path, hub_token: str, name: str, given: str) -> web.StreamResponse:
    """The file, as far as the request's ranges say. Raises NotKnown where it is not there."""
    told = given.encode("utf-8", "surrogateescape")
    if not any(hmac.compare_digest(told, wanted.encode()) for wanted in (bundle_token(hub_token, name), hub_token)):
        return answer({"field": "Authorization", "problem": "no valid token", "remedy": "send `Authorization: Bearer TOKEN` with the bundle's own token, see /api/v1/bundles"}, 401)
    path = data_dir / FOLDER / name
    if not ID_PATTERN.match(name) or not path.is_file():
        raise NotKnown("bundle", "there is none of this name", "put it into the folder bundles of the hub's data folder")
    return web.FileResponse(path, headers={"Content-Type": "application/octet-stream", "Cache-Control": "no-store"})
