"""The admin pages: what all of them share (`web/frame.html`: head, header, login) around what each of them shows."""

from functools import cache
from pathlib import Path
from string import Template

from aiohttp import web

from .reading import NotKnown

WEB = Path(__file__).resolve().parent.parent / "web"

HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; base-uri 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer", "Cache-Control": "no-cache",
}

NAV = (("./", "Edges"), ("workloads.html", "Workloads"), ("transfers.html", "Transfers"))
"""Address and name of each page; relative, as all that the pages ask for: a proxy may have the hub below a path."""

PAGES = {
    "index.html": {"title": "NovaCron hub", "name": "Edges", "script": "page.js"},
    "workloads.html": {"title": "NovaCron workloads", "name": "Workloads", "script": "workloads.js"},
    "transfers.html": {"title": "NovaCron transfers", "name": "Transfers", "script": "transfers.js"},
}
"""What each page puts into the frame beside its own sections."""


@cache
def _page(name: str) -> str:
    about = PAGES[name]
    nav = " ".join(f'<a href="{address}">{title}</a>' for address, title in NAV if title != about["name"])
    return Template((WEB / "frame.html").read_text()).substitute(about, nav=nav, main=(WEB / name).read_text())


def serve(name: str) -> web.StreamResponse:
    """A page, or a script or style of one. Raises `NotKnown`."""
    if name in PAGES:
        return web.Response(text=_page(name), content_type="text/html", headers=HEADERS)
    path = WEB / name
    if name.endswith(".html") or not path.is_file():
        raise NotKnown("path", "no such file", "open /")
    return web.FileResponse(path, headers=HEADERS)
