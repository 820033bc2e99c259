"""Handlers of the hub's API."""

import asyncio
import hmac
import json
import logging
import secrets
from typing import TYPE_CHECKING, Any

from aiohttp import web

from edge_runtime.contract import jsoncodec
from edge_runtime.contract.errors import ContractError
from edge_runtime.contract.limits import MAX_INTEGER, MAX_MESSAGE_BYTES
from edge_runtime.contract.schema import ID_PATTERN
from edge_runtime.contract.streams import STREAMS

from .. import __version__
from ..book import StreamBook
from ..dating import BootClock, date
from ..hierarchy import build_tree
from ..questions import Unanswered
from ..store.base import EdgeRow, StoredRecord
from ..transfers.book import Contradicts
from .bundles import bundle_file, listing
from .moves import MoveApi
from .openapi import OPERATIONS, document
from .operations import OperationApi
from .pages import serve
from .reading import NotKnown, answer, hours_of, integer_of, limit_of, number_of
from .transfers import TransferApi, is_workers
from .workloads import MAX_WORKLOAD_BODY_BYTES, error_answer

if TYPE_CHECKING:
    from ..server import Hub

log = logging.getLogger(__name__)

MAX_BODY_BYTES = 200_000
"""A desired state must fit one MQTT message with its frame."""

HASH_CHUNK = 2_000
"""Rows hashed in one turn of the reading thread: about 10 ms, so that the page's reads come in between."""


def record_json(stored: StoredRecord, clock: BootClock | None) -> dict[str, Any]:
    """A record as the API shows it: `wall_ms` as the edge wrote it, `dated_ms` by the best that is known of its clock."""
    record = stored.record
    dated_ms, dated_quality = date(record, clock)
    return {
        "edge": stored.edge, "stream": stored.stream, "seq": record.seq, "boot": record.boot, "mono_ms": record.mono_ms, "wall_ms": record.wall_ms,
        "time_quality": record.quality, "dated_ms": dated_ms, "dated_quality": dated_quality, "received_ms": stored.received_ms, "kind": record.kind, "body": json.loads(record.body),
    }


class HubApi(OperationApi, MoveApi, TransferApi):
    """Handlers over one hub."""

    def __init__(self, hub: "Hub") -> None:
        self._hub = hub

    def application(self) -> web.Application:
        """The aiohttp application: API, page, static files."""
        app = web.Application(client_max_size=MAX_BODY_BYTES, middlewares=[self._middleware()])
        for operation in OPERATIONS:
            app.router.add_route(operation.method.upper(), operation.path, getattr(self, operation.handler))
        app.router.add_get("/", self.page)
        app.router.add_get("/{name:[a-z]+\\.(?:js|css|svg|html)}", self.asset)
        return app

    def _middleware(self) -> Any:
        @web.middleware
        async def guard(request: web.Request, handler: Any) -> web.StreamResponse:
            if request.path.startswith("/api/"):
                given = request.headers.get("Authorization", "").removeprefix("Bearer ").strip()
                if not hmac.compare_digest(given.encode("utf-8", "surrogateescape"), self._hub.token.encode()) and not is_workers(request, given, self._hub.token):
                    return answer({"field": "Authorization", "problem": "no valid token", "remedy": "send `Authorization: Bearer TOKEN`"}, 401)
            try:
                response: web.StreamResponse = await handler(request)
            except ContractError as error:
                return answer(error.to_json(), 409 if isinstance(error, Contradicts) else 400)
            except Unanswered as error:
                return answer({"field": error.field, "problem": error.problem, "remedy": error.remedy}, error.status)
            except NotKnown as error:
                return answer(error.body, 404)
            except web.HTTPRequestEntityTooLarge:
                return answer({"field": "body", "problem": f"is over {MAX_BODY_BYTES} bytes ({MAX_WORKLOAD_BODY_BYTES} for workloads)", "remedy": "send less at once"}, 413)
            except web.HTTPException as error:
                if error.status >= 400 and error.content_type != "application/json":
                    return answer({"field": "path", "problem": error.reason, "remedy": "see /openapi.json"}, error.status)
                raise
            except Exception as error:
                said = error_answer(error)
                if said is not None:
                    return said
                log.exception("%s %s failed", request.method, request.path)
                return answer({"field": "hub", "problem": f"could not do it ({type(error).__name__})", "remedy": "see the hub's log and /healthz, then try again"}, 500)
            return response

        return guard

    # -- page ----------------------------------------------------------------------------------------------------------------

    async def page(self, _request: web.Request) -> web.StreamResponse:
        """The admin page."""
        return serve("index.html")

    async def asset(self, request: web.Request) -> web.StreamResponse:
        """A page, or a file of one."""
        return serve(request.match_info["name"])

    # -- health --------------------------------------------------------------------------------------------------------------

    async def healthz(self, _request: web.Request) -> web.Response:
        """See the table."""
        problems = self._hub.problems()
        return answer({"status": "unhealthy" if problems else "ok", "problems": problems}, 503 if problems else 200)

    async def livez(self, _request: web.Request) -> web.Response:
        """See the table."""
        ended = self._hub.parts.problems()
        return answer({"status": "ended" if ended else "ok", "problems": ended}, 503 if ended else 200)

    async def readyz(self, _request: web.Request) -> web.Response:
        """See the table."""
        up = self._hub.link.up
        return answer({"ready": up, "missing": [] if up else [f"the broker: {self._hub.link.last_error or 'connecting'}"]}, 200 if up else 503)

    async def metrics(self, _request: web.Request) -> web.Response:
        """See the table."""
        return web.Response(text=self._hub.render_metrics(), headers={"Content-Type": "text/plain; version=0.0.4; charset=utf-8"})

    async def bundles(self, _request: web.Request) -> web.Response:
        """See the table."""
        return answer(await asyncio.to_thread(listing, self._hub.settings.data_dir, self._hub.token))

    async def bundle(self, request: web.Request) -> web.StreamResponse:
        """See the table."""
        given = request.headers.get("Authorization", "").removeprefix("Bearer ").strip()
        return bundle_file(self._hub.settings.data_dir, self._hub.token, request.match_info["bundle"], given)

    async def openapi(self, _request: web.Request) -> web.Response:
        """See the table."""
        return answer(document())

    # -- reading -------------------------------------------------------------------------------------------------------------

    async def status(self, _request: web.Request) -> web.Response:
        """See the table."""
        hub = self._hub
        rows = hub.fleet.rows.values()
        return answer({
            "hub": hub.settings.name, "version": __version__, "boot": hub.boot, "time_ms": hub.now_ms(), "edges": len(hub.fleet.rows),
            "edges_online": sum(row.state == "online" for row in rows), "quarantined": sum(bool(row.quarantine) for row in rows),
            "broker": {"kind": hub.broker.kind, "host": hub.broker.host, "port": hub.broker.port, "mqtt5": hub.broker.mqtt5, "restarts": hub.broker.restarts, "up": hub.link.up},
            "counters": dict(hub.ingest.counters), "problems": hub.problems(), "storage": hub.storage(),
        })

    async def hierarchy(self, _request: web.Request) -> web.Response:
        """See the table."""
        return answer(build_tree(self._hub.fleet.rows.values(), self._hub.now_ms()))

    async def edges(self, _request: web.Request) -> web.Response:
        """See the table."""
        return answer([self._edge_json(row) for row in self._hub.fleet.rows.values()])

    async def edge(self, request: web.Request) -> web.Response:
        """See the table."""
        return answer(self._edge_json(self._row(request)))

    def _row(self, request: web.Request) -> EdgeRow:
        name = request.match_info["edge"]
        row = self._hub.fleet.rows.get(name)
        if row is None:
            raise NotKnown("edge", f"{name[:64]!r} has never been seen", "list /api/v1/edges")
        return row

    def _edge_json(self, row: EdgeRow) -> dict[str, Any]:
        streams = {}
        for stream in STREAMS:
            book = self._hub.ingest.books.get((row.edge, stream)) or StreamBook()
            streams[stream] = _book_json(book)
        desired = self._hub.desired.get(row.edge)
        return {
            "edge": row.edge, "state": row.state, "reason": row.reason, "since_ms": row.since_ms, "last_seen_ms": row.last_seen_ms, "boot": row.boot,
            "boot_n": row.boot_n, "generation": row.generation, "desired_generation": desired["generation"] if desired else 0, "quarantine": row.quarantine,
            "presence": row.presence, "streams": streams,
        }

    async def records(self, request: web.Request) -> web.Response:
        """See the table."""
        row = self._row(request)
        stream = request.query.get("stream", "decision")
        if stream not in STREAMS:
            raise ContractError("stream", f"{stream[:40]!r} is unknown", f"use {', '.join(STREAMS)}")
        after, limit = integer_of(request, "after", 0), limit_of(request)
        newest = request.query.get("newest", "false").lower() in ("1", "true", "yes")
        found = await self._hub.read(lambda: self._hub.store.read_records(row.edge, stream, after=after, limit=limit, newest_first=newest))
        return answer([self._record_json(item) for item in found])

    async def decision(self, request: web.Request) -> web.Response:
        """See the table."""
        row = self._row(request)
        seq = number_of(request.match_info["seq"], "seq")
        found = await self._hub.read(lambda: self._hub.store.read_records(row.edge, "decision", after=seq - 1, before=seq + 1, limit=1))
        if not found:
            raise NotKnown("seq", f"decision {seq} of {row.edge} is not here", "list /api/v1/decisions")
        return answer(self._record_json(found[0]))

    async def decisions(self, request: web.Request) -> web.Response:
        """See the table."""
        return await self._latest(request, "decision", ())

    async def events(self, request: web.Request) -> web.Response:
        """See the table."""
        kind = request.query.get("kind")
        return await self._latest(request, "event", (kind,) if kind else ())

    async def _latest(self, request: web.Request, stream: str, kinds: tuple[str, ...]) -> web.Response:
        limit, edge = limit_of(request), request.query.get("edge")
        found = await self._hub.read(lambda: self._hub.store.read_latest(streams=(stream,), kinds=kinds, limit=limit, edge=edge))
        return answer([{"id": number, **self._record_json(item)} for number, item in found])

    async def outages(self, request: web.Request) -> web.Response:
        """See the table."""
        hours = hours_of(request, 8760)
        since = int(self._hub.now_ms() - hours * 3_600_000)
        return answer(await self._hub.read(lambda: self._hub.store.read_outages(since)))

    async def errors(self, _request: web.Request) -> web.Response:
        """See the table."""
        return answer(self._hub.ingest.errors[::-1])

    async def verify(self, request: web.Request) -> web.Response:
        """See the table."""
        row = self._row(request)
        out: dict[str, Any] = {"edge": row.edge, "streams": {}}
        for stream in STREAMS:
            book = self._hub.ingest.books.get((row.edge, stream)) or StreamBook()
            base, upto, base_chain, said = book.base, book.contiguous, book.base_chain, _book_json(book)
            await self._hub.ingest.write(lambda: None)  # the book is ahead of the store by the commit that is under way
            count = await self._hub.read(lambda stream=stream, base=base, upto=upto: self._hub.store.read_count(row.edge, stream, base, upto))  # type: ignore[misc]
            entry = {**said, "counted": count, "expected": max(0, upto - base + 1)}
            rows_chain = await self._hash_rows(row.edge, stream, base, upto, base_chain) if base_chain and count == entry["expected"] else None
            entry["rows_chain"] = rows_chain.hex() if rows_chain is not None else None
            entry["exact"] = count == entry["expected"] and said["mismatches"] == 0 and entry["rows_chain"] in (None, said["chain"])
            out["streams"][stream] = entry
        out["exact"] = all(entry["exact"] for entry in out["streams"].values())
        return answer(out)

    async def _hash_rows(self, edge: str, stream: str, first: int, last: int, chain: bytes) -> bytes:
        """The chain over the rows as they are stored now: what the book computed when they came says nothing of what became of them since."""

        def part(after: int, chain: bytes) -> tuple[int, bytes]:
            # An edge may name the largest number that there is: nothing is past it.
            for stored in self._hub.store.read_records(edge, stream, after=after, before=last + 1 if last < MAX_INTEGER else None, limit=HASH_CHUNK):
                chain, after = stored.record.chain(chain), stored.record.seq
            return after, chain

        after = first - 1
        while after < last:
            reached, chain = await self._hub.read(lambda after=after, chain=chain: part(after, chain))  # type: ignore[misc]
            if reached == after:
                break  # rows went meanwhile
            after = reached
        return chain

    def _record_json(self, stored: StoredRecord) -> dict[str, Any]:
        return record_json(stored, self._hub.ingest.clocks.get(stored.edge, stored.record.boot))

    # -- writing -------------------------------------------------------------------------------------------------------------

    async def get_desired(self, request: web.Request) -> web.Response:
        """See the table."""
        name = request.match_info["edge"]
        document_ = self._hub.desired.get(name)
        if document_ is None:
            raise NotKnown("edge", f"{name[:64]!r} has no desired state", "put one")
        return answer(document_)

    async def put_desired(self, request: web.Request) -> web.Response:
        """See the table."""
        change = await _body(request)
        for part in ("workloads", "operations"):
            if part in change:
                raise ContractError(part, "cannot be set here", "submit workloads to /api/v1/workloads: the scheduler places them; what is done with one is asked below it")
        return answer(await self._hub.change_desired(_edge_name(request), change))

    async def command(self, request: web.Request) -> web.Response:
        """See the table."""
        edge = _edge_name(request)
        value = await _body(request)
        seconds = value.get("expires_seconds", 300)
        if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not 0 < seconds <= 2_592_000:
            raise ContractError("expires_seconds", f"{str(seconds)[:20]!r} is not 0 to 2592000", "use seconds")
        command = {
            "id": value.get("id", f"c-{secrets.token_hex(6)}"), "device": value.get("device"), "name": value.get("name"), "args": value.get("args", {}),
            "expires_ms": self._hub.now_ms() + int(seconds * 1000),
        }
        known: list[dict[str, Any]] = []

        def added(spec: dict[str, Any]) -> dict[str, Any]:
            current = spec.get("commands", [])
            known.extend(item for item in current if item["id"] == command["id"])
            return {} if known else {"commands": [*current, command]}

        document_ = await self._hub.change_desired(edge, added)
        return answer({"command": known[0] if known else command, "generation": document_["generation"], "again": bool(known)})

    async def release(self, request: web.Request) -> web.Response:
        """See the table."""
        row = self._row(request)
        await self._hub.release(row.edge)
        return answer(self._edge_json(row))


def _book_json(book: StreamBook) -> dict[str, Any]:
    return {
        "contiguous": book.contiguous, "top": book.top, "chain": book.chain.hex(), "base": book.base, "stored": book.stored, "gone": book.gone,
        "duplicates": book.duplicates, "mismatches": book.mismatches, "edge_next": book.edge_next, "edge_floor": book.edge_floor,
        "edge_dropped": book.edge_dropped, "missing": book.above.gaps(book.contiguous)[:32], "behind": max(0, book.edge_next - 1 - book.contiguous),
    }


def _edge_name(request: web.Request) -> str:
    name = request.match_info["edge"]
    if not ID_PATTERN.match(name):
        raise ContractError("edge", f"{name[:64]!r} is not a name", "use 1 to 64 letters, digits, _ . : -", "name")
    return name


async def _body(request: web.Request) -> dict[str, Any]:
    value = jsoncodec.decode(await request.read(), MAX_MESSAGE_BYTES)
    if not isinstance(value, dict):
        raise ContractError("body", f"is {type(value).__name__}, not an object", "send a JSON object", "type")
    return value
