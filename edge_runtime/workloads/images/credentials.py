"""Credentials for registries: a file as `docker login` writes it (`{"auths": {"registry.example": {"auth": BASE64 of user:password}}}`), readable by its owner alone."""

import base64
import binascii
import json
import os
import stat
from pathlib import Path

from .errors import ImageError

MAX_BYTES = 1 << 20
"""Of the file: a thousand registries need a tenth."""


def load(path: str) -> dict[str, tuple[str, str]]:
    """User and password by registry. Read anew for each pull, so that a changed file needs no restart. Raises `ImageError`; no part of a secret is ever in it."""
    where = "workloads.registry_credentials"
    if not path:
        return {}
    try:
        with open(path, "rb") as handle:
            told = os.fstat(handle.fileno())
            if told.st_mode & (stat.S_IRWXG | stat.S_IRWXO) or told.st_uid not in (0, os.geteuid()):
                raise ImageError(where, f"{path} can be read by others, or is another user's", f"chown it to the agent's user, and chmod 600 {path}")
            raw = handle.read(MAX_BYTES + 1)
        auths = json.loads(raw if len(raw) <= MAX_BYTES else b"")["auths"]
        found = {}
        for name, entry in auths.items():
            user, colon, password = base64.b64decode(entry["auth"], validate=True).decode().partition(":")
            if not colon:
                raise ValueError
            found[_host(name)] = (user, password)
        return found
    except OSError as error:
        raise ImageError(where, f"{path} cannot be read: {error.strerror}", "look at its path and rights") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, binascii.Error):
        raise ImageError(where, f"{Path(path).name} is not what docker login writes", 'write {"auths": {"HOST": {"auth": BASE64 of user:password}}}; helpers of Docker (credsStore) are not asked') from None


def _host(name: str) -> str:
    """Docker's own registry stands there as an address of old."""
    host = name.removeprefix("https://").removeprefix("http://").partition("/")[0]
    return "docker.io" if host == "index.docker.io" else host
