"""HTTP for novactl: standard library only, errors in one line."""

import http.client
import json
import os
import ssl
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TIMEOUT_S = 30.0


class CommandError(RuntimeError):
    """What went wrong and the remedy, in one line; `status` is the HTTP status of an answer that said so, 0 for none."""

    def __init__(self, text: str, status: int = 0) -> None:
        super().__init__(" ".join(text.split()))
        self.status = status


@dataclass(frozen=True, slots=True)
class Api:
    """One HTTP API."""

    url: str
    token: str = ""

    def call(self, method: str, path: str, body: Any = None) -> Any:
        """The decoded answer; raises `CommandError`."""
        try:
            if not self.url.startswith(("http://", "https://")):
                raise ValueError("no http")
            request = urllib.request.Request(self.url.rstrip("/") + path, method=method)
        except ValueError as error:
            raise CommandError(f"{self.url!r} is not an address ({error}); use http://host:port") from None
        request.add_header("Accept", "application/json")
        if self.token:
            request.add_header("Authorization", f"Bearer {self.token}")
        data = None
        if body is not None:
            data = json.dumps(body).encode()
            request.add_header("Content-Type", "application/json")
        try:
            with urllib.request.urlopen(request, data, TIMEOUT_S, context=trusted() if self.url.startswith("https://") else None) as answer:
                return json.loads(answer.read())
        except urllib.error.HTTPError as error:
            try:
                text = error.read().decode(errors="replace")
            except (OSError, http.client.HTTPException):
                text = ""
            try:
                said = json.loads(text)
                if "problems" in said or "missing" in said:
                    return said
                raise CommandError(f"{said['field']}: {said['problem']}; {said['remedy']}", error.code) from None
            except (ValueError, KeyError, TypeError):
                raise CommandError(f"{self.url}{path} answers {error.code}: {text[:200]}", error.code) from None
        except (urllib.error.URLError, http.client.HTTPException, OSError, ValueError) as error:
            if isinstance(getattr(error, "reason", error), ssl.SSLCertVerificationError):
                raise CommandError(f"{self.url} is not trusted ({error.reason.verify_message}); give --ca-file with the authorities of its certificate") from None  # type: ignore[union-attr]
            raise CommandError(f"{self.url} cannot be reached ({getattr(error, 'reason', error)}); start it, or give --hub or --edge-api") from None

    def get(self, path: str) -> Any:
        """GET."""
        return self.call("GET", path)


def trusted() -> ssl.SSLContext:
    """By whose word addresses are trusted: NOVACRON_CA_FILE, else the system's authorities."""
    path = os.environ.get("NOVACRON_CA_FILE", "")
    try:
        return ssl.create_default_context(cafile=path or None)
    except OSError as error:
        raise CommandError(f"--ca-file: {path} holds no certificate authorities ({error.strerror or error}); give a PEM file") from None


def hub_api(url: str | None, token: str | None) -> Api:
    """The hub's API: options, then NOVACRON_HUB_URL and NOVACRON_TOKEN, then the default's token file."""
    found = token or os.environ.get("NOVACRON_TOKEN", "")
    if not found:
        for path in (Path(os.environ.get("NOVACRON_HOME", ".novacron")) / "hub" / "token", Path.home() / ".local/share/novacron/hub/token"):
            if path.exists():
                found = path.read_text().strip()
                break
    return Api(url or os.environ.get("NOVACRON_HUB_URL", "http://127.0.0.1:8460"), found)


def edge_api(url: str | None) -> Api:
    """The local API of an edge."""
    return Api(url or os.environ.get("NOVACRON_EDGE_URL", "http://127.0.0.1:8470"), os.environ.get("NOVACRON_EDGE_TOKEN", ""))
