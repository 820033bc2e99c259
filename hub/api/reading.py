"""What every handler needs to read a request and to answer."""

import json
from typing import Any

from aiohttp import web

from edge_runtime.contract.errors import ContractError


class NotKnown(Exception):
    """A 404 with its field and remedy."""

    def __init__(self, field: str, problem: str, remedy: str) -> None:
        super().__init__(problem)
        self.body = {"field": field, "problem": problem, "remedy": remedy}


def answer(value: Any, status: int = 200) -> web.Response:
    """JSON."""
    return web.Response(text=json.dumps(value), content_type="application/json", status=status)


def number_of(text: str, field: str) -> int:
    """A whole number from a path or query. Raises `ContractError`."""
    if not (text.isascii() and text.isdigit()) or len(text) > 18:
        raise ContractError(field, f"{text[:20]!r} is not a number", "use a whole number")
    return int(text)


def integer_of(request: web.Request, name: str, default: int) -> int:
    """A whole number from the query. Raises `ContractError`."""
    text = request.query.get(name)
    return default if text is None else number_of(text, name)


def limit_of(request: web.Request) -> int:
    """`limit`, 1 to 1000."""
    return max(1, min(1000, integer_of(request, "limit", 100)))


def hours_of(request: web.Request, most: float) -> float:
    """`hours`, 24 where it is missing. Raises `ContractError`."""
    text = request.query.get("hours", "24")
    try:
        hours = float(text)
    except ValueError:
        hours = -1.0
    if not 0 <= hours <= most:
        raise ContractError("hours", f"{text[:20]!r} is not 0 to {most:g}", "use hours, such as 24")
    return hours
