"""How the hub shows operations: by what an edge said last, whatever arrived last."""

import itertools

from edge_runtime.contract import jsoncodec
from edge_runtime.contract.operations import Operation
from edge_runtime.contract.records import Record
from hub.store.base import StoredRecord
from hub.workloads import operations


def said(seq: int, name: str, state: str) -> StoredRecord:
    body = Operation(name, "checkpoint", state, 1, "", "", {"workload": "counter", "name": "first"}).to_json()
    return StoredRecord("gw-1", "event", Record(seq, "boot", 0, 0, "synced", "operation", jsoncodec.encode(body)), 1000 + seq)


def test_the_beginning_of_an_operation_that_arrives_after_its_end_does_not_open_it_again() -> None:
    """After a cut what is live goes first: the novactl that waited for the end would have waited for good."""
    for arrived in itertools.permutations([said(7, "o-1", "running"), said(8, "o-1", "failed"), said(9, "o-2", "running")]):
        shown = operations.shown([], arrived, "counter")
        assert [(one["id"], one["state"]) for one in shown] == [("o-2", "running"), ("o-1", "failed")]
