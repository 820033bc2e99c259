"""REST of the edge. Reads are plain; what writes is a twin's desired state, the call of a function that runs here, and the order of an update of the image."""

import hmac
import json
import logging
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..config import public_dict
from ..contract import jsoncodec
from ..contract.errors import ContractError
from ..contract.records import Record
from ..contract.schema import ID_PATTERN
from ..contract.streams import STREAMS
from .aiohttp_server import import_web

if TYPE_CHECKING:
    from ..runtime import EdgeRuntime

log = logging.getLogger(__name__)

MAX_LIMIT = 1_000
"""Records of one answer."""

MAX_BODY_BYTES = 65_536

MAX_LOG_BYTES = 262_144
"""Of one stream of a workload's output in one answer."""

CALL_REFUSED = {"id": 404, "calls": 429, "body": 413}
"""HTTP status of a call that was not made, by the field that is wrong."""

Handler = Callable[[Any], Awaitable[Any]]


def record_json(record: Record) -> dict[str, Any]:
    """A record as the API shows it."""
    return {
        "seq": record.seq, "boot": record.boot, "mono_ms": record.mono_ms, "wall_ms": record.wall_ms, "time_quality": record.quality,
        "kind": record.kind, "body": json.loads(record.body),
    }


class LocalApi:
    """Handlers over one runtime."""

    def __init__(self, runtime: "EdgeRuntime") -> None:
        self._runtime = runtime
        self._web = import_web()
        self._token = ""
        token_file = runtime.config.api.token_file
        if token_file:
            self._token = Path(token_file).read_text().strip()
            if not self._token:
                raise ContractError("api.token_file", f"{token_file} is empty", "write a token into it", "config")

    def application(self) -> Any:
        """The aiohttp application."""
        web = self._web

        @web.middleware  # type: ignore[untyped-decorator]
        async def guard(request: Any, handler: Handler) -> Any:
            return await self._guard(request, handler)

        app = web.Application(client_max_size=MAX_BODY_BYTES, middlewares=[guard])
        app.add_routes([
            web.get("/healthz", self.healthz), web.get("/livez", self.livez), web.get("/readyz", self.readyz), web.get("/metrics", self.metrics),
            web.get("/api/v1/status", self.status), web.get("/api/v1/devices", self.devices), web.get("/api/v1/devices/{device}", self.device),
            web.patch("/api/v1/devices/{device}/desired", self.desire), web.get("/api/v1/decisions", self.decisions),
            web.get("/api/v1/decisions/{seq}", self.decision), web.get("/api/v1/journal", self.journal), web.get("/api/v1/journal/chain", self.chain),
            web.get("/api/v1/journal/{stream}", self.records), web.get("/api/v1/config", self.config), web.get("/api/v1/errors", self.errors),
            web.get("/api/v1/updates", self.updates), web.post("/api/v1/updates", self.update),
            web.post("/api/v1/functions/{function}", self.call), web.get("/api/v1/workloads", self.workloads), web.get("/api/v1/workloads/{workload}/logs", self.logs),
            web.get("/api/v1/workloads/{workload}/checkpoints", self.checkpoints), web.get("/api/v1/workloads/{workload}/snapshots", self.snapshots), web.get("/api/v1/snapshots", self.snapshots), web.post("/api/v1/workloads/{workload}/operations", self.operate), web.get("/api/v1/operations/{operation}", self.operation),
        ])
        return app

    async def _guard(self, request: Any, handler: Handler) -> Any:
        if self._token and request.path.startswith("/api/"):
            given = request.headers.get("Authorization", "").removeprefix("Bearer ").strip()
            if not hmac.compare_digest(given.encode(errors="surrogateescape"), self._token.encode()):
                return self._answer({"field": "Authorization", "problem": "no valid token", "remedy": "send `Authorization: Bearer TOKEN` (api.token_file)"}, 401)
        try:
            return await handler(request)
        except ContractError as error:
            return self._answer(error.to_json(), 400)
        except self._web.HTTPException as error:
            return self._answer({"field": "request", "problem": error.reason, "remedy": f"see docs; a body has at most {MAX_BODY_BYTES} bytes"}, error.status)

    def _answer(self, value: Any, status: int = 200) -> Any:
        return self._web.Response(text=json.dumps(value), content_type="application/json", status=status)

    async def healthz(self, _request: Any) -> Any:
        """200 while the agent can do its job by itself, else 503 and why."""
        fatal = self._runtime.fatal()
        return self._answer({"status": "unhealthy" if fatal else "ok", "problems": fatal or self._runtime.health()}, 503 if fatal else 200)

    async def livez(self, _request: Any) -> Any:
        """200 unless a part of the agent has ended, which only a new start brings back. A full disk is none of that: an agent that is started anew for it would not come up, where this one goes on without its journal."""
        ended = self._runtime.parts.problems()
        return self._answer({"status": "ended" if ended else "ok", "problems": ended}, 503 if ended else 200)

    async def readyz(self, _request: Any) -> Any:
        """200 once it senses and decides."""
        missing = self._runtime.ready()
        return self._answer({"ready": not missing, "missing": missing}, 503 if missing else 200)

    async def metrics(self, _request: Any) -> Any:
        """Prometheus text."""
        return self._web.Response(text=self._runtime.metrics.render(), headers={"Content-Type": "text/plain; version=0.0.4; charset=utf-8"})

    async def status(self, _request: Any) -> Any:
        """The edge at a glance."""
        runtime = self._runtime
        plan, uplink = runtime.journal.storage_plan, runtime.uplink
        return self._answer({
            "edge": runtime.config.edge_id, "boot": runtime.journal.boot, "boot_n": runtime.journal.boot_n, "link": "down" if runtime.is_offline() else "up",
            "hub": uplink.hub if uplink else "", "uplink_error": uplink.last_error if uplink else "disabled",
            "generation": runtime.desired.generation if runtime.desired else 0, "decided": runtime.pipeline.decided,
            "decided_offline": runtime.pipeline.decided_offline, "readings": runtime.pipeline.readings_taken, "devices": len(runtime.registry.devices),
            "backlog_records": uplink.lanes.backlog() if uplink else None, "outage_hours": round(plan.outage_hours, 1), "health": runtime.health(),
            "models": {name: {"engine": model.engine, "sha256": model.manifest.sha256} for name, model in runtime.desired_state.models.items()},
            "rules": [rule.id for rule in runtime.engine.rules.rules], "journal": self._marks(),
            "site": runtime.site.to_json() if runtime.site is not None else None,
        })

    def _marks(self) -> dict[str, Any]:
        out = {}
        for stream in STREAMS:
            marks = self._runtime.journal.marks(stream)
            out[stream] = {
                "next": marks.next_seq, "receipted": marks.receipted, "floor": marks.floor, "dropped": marks.dropped, "chain": marks.chain.hex(),
            }
        return out

    async def devices(self, _request: Any) -> Any:
        """Every device with its twin."""
        now = self._runtime.clock.mono_ms()
        return self._answer([device.to_json(now) for device in self._runtime.registry.devices.values()])

    async def device(self, request: Any) -> Any:
        """One device."""
        device = self._runtime.registry.devices.get(request.match_info["device"])
        if device is None:
            return self._answer({"field": "device", "problem": "is not registered", "remedy": "list /api/v1/devices"}, 404)
        return self._answer(device.to_json(self._runtime.clock.mono_ms()))

    async def desire(self, request: Any) -> Any:
        """Merge desired twin state."""
        device = request.match_info["device"]
        if not ID_PATTERN.match(device):
            raise ContractError("device", f"{device[:80]!r} is not a name", "use letters, digits, _ . : - and at most 64 of them", "name")
        patch = jsoncodec.decode(await request.read(), MAX_BODY_BYTES)
        changed = self._runtime.pipeline.desire(device, patch)
        return self._answer({"changed": changed, "twin": self._runtime.registry.devices[device].twin()})

    async def call(self, request: Any) -> Any:
        """Run a function that runs on this node: the body is its stdin, the answer its stdout."""
        function = request.match_info["function"]
        if "Origin" in request.headers:  # a page that a browser of this host shows would need no leave to send this
            return self._answer({"field": "Origin", "problem": "functions are not called by pages", "remedy": "call it from a program"}, 403)
        timeout_ms = _integer(request, "timeout_ms")
        body = await request.read()
        if not self._runtime.config.workloads.enabled:
            return self._answer({"field": "id", "problem": "workloads are not enabled on this edge", "remedy": "set workloads.enabled"}, 404)
        try:
            answer = await self._runtime.workload_node().call(function, body, timeout_ms / 1000 if timeout_ms else None)
        except Exception as error:
            told = getattr(error, "to_json", None)  # a driver's refusal; its module is not imported where there are no workloads
            if told is None:
                raise
            return self._answer(told(), CALL_REFUSED.get(told()["field"], 503))
        if answer is None:
            return self._answer({"field": "id", "problem": "no functions run on this edge", "remedy": "see its workload.driver records for the reason"}, 404)
        headers = {"Novacron-Cold": str(int(answer.cold)), "Novacron-Cut": str(int(answer.cut)), "Novacron-Ran-Us": str(answer.ran_us)}
        if (answer.what, answer.code) == ("exited", 0):
            return self._web.Response(body=answer.stdout, content_type="application/octet-stream", headers=headers)
        problem = {"exited": f"it exited with code {answer.code}", "failed": f"it answered with status {answer.code}"}.get(answer.what, f"it {answer.what}")
        failed = {"field": "function", "problem": problem, "remedy": "see stderr", "code": answer.code, "stdout": answer.stdout.decode("utf-8", "replace"), "stderr": answer.stderr.decode("utf-8", "replace")}
        return self._web.Response(text=json.dumps(failed), content_type="application/json", status=504 if answer.what == "timed out" else 502, headers=headers)

    async def updates(self, _request: Any) -> Any:
        """Updates of this device's image, as operations."""
        return self._answer(self._runtime.updates.to_json() if self._runtime.updates is not None else [])

    async def update(self, request: Any) -> Any:
        """Order an update: a signed bundle by its address, or by its file on the data partition."""
        if "Origin" in request.headers:
            return self._answer({"field": "Origin", "problem": "updates are not ordered by pages", "remedy": "order them from a program"}, 403)
        order = jsoncodec.decode(await request.read(), MAX_BODY_BYTES)
        if self._runtime.updates is None:
            return self._answer({"field": "updates", "problem": "this edge does not run from an image that can be updated", "remedy": "see firmware_images/README.md"}, 404)
        return self._answer(self._runtime.updates.order(order))

    async def workloads(self, _request: Any) -> Any:
        """What runs, or has run, on this node."""
        return self._answer(await self._runtime.workload_node().instances() if self._runtime.config.workloads.enabled else [])

    async def logs(self, request: Any) -> Any:
        """The end of what a workload has written."""
        workload, most = request.match_info["workload"], _integer(request, "bytes")
        told = await self._runtime.workload_node().output(workload, max(1, min(MAX_LOG_BYTES if most is None else most, MAX_LOG_BYTES))) if self._runtime.config.workloads.enabled else None
        if told is None:
            return self._answer({"field": "workload", "problem": f"nothing is known of {workload[:80]!r} here", "remedy": "list /api/v1/workloads; ask the hub where it runs"}, 404)
        return self._answer(told)

    async def checkpoints(self, request: Any) -> Any:
        """The checkpoints of a workload that are on this node."""
        return self._answer(await self._runtime.workload_node().asked.checkpoints(request.match_info["workload"]) if self._runtime.config.workloads.enabled else [])

    async def snapshots(self, request: Any) -> Any:
        """The snapshots that are on this node, of all workloads or of one; also of those that are here no more."""
        return self._answer(await self._runtime.workload_node().asked.snapshots_here(request.match_info.get("workload", "")) if self._runtime.config.workloads.enabled else [])

    async def operate(self, request: Any) -> Any:
        """An operation on a workload that is here (checkpoint, snapshot, conversion); answered before it is done."""
        if "Origin" in request.headers:
            return self._answer({"field": "Origin", "problem": "operations are not asked for by pages", "remedy": "ask from a program"}, 403)
        asked = jsoncodec.decode(await request.read(), MAX_BODY_BYTES)
        if not isinstance(asked, dict):
            raise ContractError("body", f"is {type(asked).__name__}, not an object", "send kind, and name or stop", "type")
        if not self._runtime.config.workloads.enabled:
            raise ContractError("workload", "workloads are not enabled on this edge", "set workloads.enabled")
        return self._answer(self._runtime.workload_node().asked.ask(request.match_info["workload"], asked))

    async def operation(self, request: Any) -> Any:
        """How an operation stands."""
        name = request.match_info["operation"]
        found = self._runtime.workload_node().asked.operation(name) if self._runtime.config.workloads.enabled else None
        if found is None:
            return self._answer({"field": "operation", "problem": f"{name[:80]!r} is not known here", "remedy": "see the journal's operation records"}, 404)
        return self._answer(found)

    async def decisions(self, request: Any) -> Any:
        """The newest decisions."""
        limit, before = _limit(request), _integer(request, "before")
        records = await self._runtime.journal.tail("decision", limit, before)
        return self._answer([record_json(record) for record in records])

    async def decision(self, request: Any) -> Any:
        """One decision with the inputs that led to it."""
        seq = request.match_info["seq"]
        if not seq.isdecimal() or len(seq) > 18:
            raise ContractError("seq", f"{seq[:20]!r} is not a number", "use a decision's seq")
        records, _ = await self._runtime.journal.read("decision", int(seq), 1, 1 << 20, int(seq))
        if not records:
            return self._answer({"field": "seq", "problem": f"decision {seq} is not kept here", "remedy": "ask the hub, or list /api/v1/decisions"}, 404)
        return self._answer(record_json(records[0]))

    async def journal(self, _request: Any) -> Any:
        """Marks, space and what was rebuilt."""
        journal = self._runtime.journal
        plan = journal.storage_plan
        return self._answer({
            "streams": self._marks(), "outage_hours": {name: round(hours, 1) for name, hours in plan.hours.items()}, "free_bytes": plan.free_bytes,
            "used_bytes": plan.used_bytes, "alarm": plan.alarm, "errors": journal.errors, "telemetry_open": journal.telemetry_open,
            "recoveries": [{"database": r.database, "damage": r.damage, "salvaged": r.salvaged, "lost": r.lost} for r in journal.recoveries],
        })

    async def chain(self, request: Any) -> Any:
        """The chain after one record: what `novactl verify` compares."""
        stream, seq = request.query.get("stream", ""), _integer(request, "seq")
        if stream not in STREAMS or seq is None:
            raise ContractError("stream", "is unknown, or seq is missing", f"use stream={'|'.join(STREAMS)}&seq=NUMBER")
        chain = await self._runtime.journal.chain_at(stream, seq)
        return self._answer({"stream": stream, "seq": seq, "chain": chain.hex() if chain is not None else None})

    async def records(self, request: Any) -> Any:
        """Records of one stream, newest first."""
        stream = request.match_info["stream"]
        if stream not in STREAMS:
            raise ContractError("stream", f"{stream[:40]!r} is unknown", f"use {', '.join(STREAMS)}")
        records = await self._runtime.journal.tail(stream, _limit(request), _integer(request, "before"))
        return self._answer([record_json(record) for record in records])

    async def config(self, _request: Any) -> Any:
        """The configuration in force, without secrets."""
        return self._answer(public_dict(self._runtime.config))

    async def errors(self, _request: Any) -> Any:
        """The last refused device messages and rule errors."""
        return self._answer({"devices": list(self._runtime.registry.errors), "rules": self._runtime.engine.errors})


def _integer(request: Any, name: str) -> int | None:
    text = request.query.get(name)
    if text is None:
        return None
    if not text.isdecimal() or len(text) > 18:
        raise ContractError(name, f"{text[:20]!r} is not a number", "use a whole number")
    return int(text)


def _limit(request: Any) -> int:
    limit = _integer(request, "limit")
    return 100 if limit is None else max(1, min(limit, MAX_LIMIT))


async def serve(runtime: "EdgeRuntime") -> tuple[Any, int]:
    """Start serving; returns the runner (`cleanup()` ends it) and the port."""
    api = LocalApi(runtime)
    web = api._web
    runner = web.AppRunner(api.application(), access_log=None, handle_signals=False)
    await runner.setup()
    site = web.TCPSite(runner, runtime.config.api.host, runtime.config.api.port)
    await site.start()
    port: int = site._server.sockets[0].getsockname()[1]
    host = runtime.config.api.host
    log.info("local API on http://%s:%d", f"[{host}]" if ":" in host else host, port)
    return runner, port
