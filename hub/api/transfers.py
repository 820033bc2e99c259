"""Handlers of transfers and their workers."""

import hmac
from typing import TYPE_CHECKING

from aiohttp import web

from edge_runtime.contract.errors import ContractError
from edge_runtime.contract.schema import ID_PATTERN, check_fields

from ..transfers.document import LEASE, REPORT, read_transfer
from ..transfers.service import worker_token
from .reading import NotKnown, answer, limit_of
from .workloads import object_of

if TYPE_CHECKING:
    from ..server import Hub

WORKER_PATH = "/api/v1/migration-workers/"
"""What follows is the worker's name, then what it asks."""


def is_workers(request: web.Request, given: str, hub_token: str) -> bool:
    """A worker that asks for itself, with its own token."""
    name, _, what = request.path.removeprefix(WORKER_PATH).partition("/") if request.path.startswith(WORKER_PATH) else ("", "", "")
    return what in ("lease", "report") and hmac.compare_digest(given.encode("utf-8", "surrogateescape"), worker_token(hub_token, name).encode())


class TransferApi:
    """Mixed into `HubApi`."""

    _hub: "Hub"

    async def submit_transfer(self, request: web.Request) -> web.Response:
        """See the table."""
        return answer(await self._hub.transfers.submit(read_transfer(await object_of(request))))

    async def transfers(self, request: web.Request) -> web.Response:
        """See the table."""
        service = self._hub.transfers
        newest = list(reversed(service.book.transfers.values()))[: limit_of(request)]
        return answer([service.view(one) for one in newest])

    def _transfer(self, request: web.Request) -> str:
        name = request.match_info["transfer"]
        if name not in self._hub.transfers.book.transfers:
            raise NotKnown("transfer", f"{name[:64]!r} is not known", "list /api/v1/transfers")
        return name

    async def transfer(self, request: web.Request) -> web.Response:
        """See the table."""
        return answer(self._hub.transfers.view(self._hub.transfers.book.transfers[self._transfer(request)]))

    async def cancel_transfer(self, request: web.Request) -> web.Response:
        """See the table."""
        return answer(await self._hub.transfers.cancel(self._transfer(request)))

    async def migration_workers(self, _request: web.Request) -> web.Response:
        """See the table."""
        return answer(self._hub.transfers.workers())

    @staticmethod
    def _worker(request: web.Request) -> str:
        name = request.match_info["worker"]
        if not ID_PATTERN.match(name):
            raise ContractError("worker", f"{name[:80]!r} is not a name", "use 1 to 64 of A-Z a-z 0-9 _ . : -, a letter or digit first", "name")
        return name

    async def migration_worker_token(self, request: web.Request) -> web.Response:
        """See the table."""
        name = self._worker(request)
        return answer({"worker": name, "token": worker_token(self._hub.token, name)})

    async def lease_transfers(self, request: web.Request) -> web.Response:
        """See the table."""
        return answer(await self._hub.transfers.lease(self._worker(request), check_fields(LEASE, await object_of(request), "payload"), lambda: request.transport is None or request.transport.is_closing()))

    async def report_transfer(self, request: web.Request) -> web.Response:
        """See the table."""
        return answer(await self._hub.transfers.report(self._worker(request), check_fields(REPORT, await object_of(request), "payload")))
