"""Moves of running workloads with their state, from node to node: one operation each, kept, whose steps follow what edges and migration workers say. Pure.

    checking ──> room ──> (ahead) ──> taking ──> sending ──> starting ──> done
       │          │  └─> (live) ┴─────────────────────────────────┤ the target refuses, or was taken out
       └────── failed ───────┘          └──────────┴──────────────┴──> returning ──> failed | cancelled

    checking    the source looks whether it can leave, and tells what it needs (its *offer*); nothing is touched
    room        the target looks whether it can come, and fetches its image; a migration worker has to be there on both
    live        of a virtual machine that can go while it runs: one waits for it at the target, the migration workers connect the two, and the source copies all of it there, and what it writes meanwhile; nothing is touched.
                When nearly all is there it is `starting`, and the source sends the rest and stands still for good before the target begins. Where it comes to nothing, it goes as one that cannot
    ahead       of a virtual machine whose disk is worth it: the source copies that while it runs, and the migration workers carry the copy over; nothing is touched, and where it comes to nothing all of it
                goes with the state, as without this step
    taking      the source stops it and writes its state: from here on it stands still, under its old epoch
    sending     the migration workers carry the state over; the source holds on to its own
    starting    the target's desired state lists it under the next epoch, with the state's name and hash: from here on only the target can say what becomes of it
    returning   the source goes on from the state

A place is reserved at the target the whole time, as a placement under the next epoch that is not the workload's current one. **The commit is the target's word that it runs**: in the transaction in
which that is taken in, the next epoch becomes the current one, and the source is told to stop and forget. Until then the current epoch is the source's. So who may run it follows from the rows at each
instant: the source up to `taking`, nobody in `sending`, the target in `starting` (of one that goes while it runs the source, until the target does: they agree on that by themselves), and the source again in `returning`, which a target that was told to start it must have refused first (or have been taken
out by somebody who says that it is gone). Silence of the target decides nothing: it may be running it.
"""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from edge_runtime.contract.workloads import AHEAD as OF_DISK
from edge_runtime.contract.workloads import CHECKPOINTED, ISOLATION, MOVABLE, MOVE_AHEAD, MOVE_BACK, MOVE_CHECK, MOVE_COME, MOVE_LIVE, MOVE_OUT, MOVE_ROOM, MOVING, NAMESPACES, RUNNING, SPEED, may_move
from edge_runtime.contract.workloads import LIVE as RUNS_ON

from ..scheduler.model import Kind
from ..store.workloads import PlacementRow, WorkloadRow
from .book import AHEAD, BEGUN, CHECKING, LIVE, MOVE, RETURNING, ROOM, SENDING, STARTING, TAKING, UNTOUCHED, short
from .documents import Conflict

if TYPE_CHECKING:
    from .planner import Planner

Json = dict[str, Any]

DONE, FAILED, CANCELLED = "done", "failed", "cancelled"
"""How a move ends."""

PATIENCE_MS = {CHECKING: 120_000, ROOM: 900_000, LIVE: 4 * 3_600_000, AHEAD: 4 * 3_600_000, TAKING: 600_000, SENDING: 3_600_000}
"""A step that takes longer is given up: a look is done in seconds, an image may have to be fetched, a state of gigabytes be written to a slow disk, and be carried over a slow link; a disk that goes ahead keeps
nobody waiting."""

TIMES = 3
"""So many times as long as its bytes take at its limit a state or a disk may take to be carried, where that is longer."""

COPY_LEAST = 64 << 20
"""Bytes in a second with which a disk is copied that goes ahead, at least. Else it is copied as fast as it may be carried: the guest uses that disk too."""

AT_ONCE = 2
"""Moves that one node takes part in at one time: each keeps a disk and a processor busy at both ends."""

LIVE_MOST = 64
"""Moves under way at one time."""

KEPT = 200
"""Moves that are over and remembered, the newest."""

LIMIT_MBIT = 1_000.0
"""What a move takes of a link at most where nothing else is asked for: others use it too, and without a bound nothing can be predicted."""

LIMIT_MOST_MBIT = 10_000_000.0
"""As a transfer's."""

NEVER_MS = 2**53
"""The parts of a move do not expire: the hub takes back what it does not want any more."""

BEFORE = ".ahead"
"""How the name of the transfer ends that carries a disk ahead, and that of its file."""

ALIVE = ".live"
"""How the name of the transfer ends that connects the two ends of a machine that goes while it runs, and that of the folders of their sockets."""

_PARTS = {CHECKING: ("check",), ROOM: ("room",), LIVE: ("come", "live"), AHEAD: ("ahead",), TAKING: ("out",), RETURNING: ("back",)}
_KIND = {"check": MOVE_CHECK, "room": MOVE_ROOM, "come": MOVE_COME, "live": MOVE_LIVE, "ahead": MOVE_AHEAD, "out": MOVE_OUT, "back": MOVE_BACK}
_OF_TARGET = ("room", "come")


# -- what can be asked -------------------------------------------------------------------------------------------------------


def why_not(planner: "Planner", row: WorkloadRow) -> str:
    """Why a workload cannot be moved with its state from where it is, as far as the hub knows; empty where it may be tried."""
    current, item = planner.current(row.id), planner.tables.items[row.id].item
    if row.state != "placed" or current is None:
        return f"it is {row.state}"
    if row.id in planner.tables.moving or len(planner.tables.epochs[row.id]) > 1:
        return "it is being moved already" if row.id in planner.tables.moving else "the node that had it before has not said that it stopped it"
    if not (kind := moves_as(row, item.shape.kind)):
        return "only containers and batch jobs in namespaces, and virtual machines, can be moved with their state"
    if may_move(row.document):
        return "its site may give it to another node by itself (when_cut_off: move)"
    if not movable(planner, row.node, kind):
        return f"{row.node} cannot give a workload away with its state (see docs/workloads.md, Moves)"
    if not planner.is_up(row.node):
        return f"{row.node} is not heard from"
    if current.said != RUNNING:
        return "it is checkpointed" if current.said == CHECKPOINTED else "its node has not said that it runs"
    return ""


def moves_as(row: WorkloadRow, kind: Kind) -> str:
    """What a node has to be able to move for a workload: `container` or `vm`; empty where its kind cannot be moved with its state."""
    if kind is Kind.VM:
        return "vm"
    return "container" if kind in (Kind.CONTAINER, Kind.BATCH) and (row.document.get("spec") or {}).get(ISOLATION, NAMESPACES) == NAMESPACES else ""


def movable(planner: "Planner", node: str, kind: str = "container") -> bool:
    """Whether a node says that it can give workloads of a kind (`moves_as`) away and take them in with their state."""
    row = planner.tables.nodes.get(node)
    return row is not None and row.origin == "edge" and (row.document.get("labels") or {}).get(MOVABLE + kind) == "true"


def busy(planner: "Planner", node: str) -> int:
    """Moves under way in which a node takes part."""
    return sum(node in (move["source"], move["target"]) for move in live(planner))


def live(planner: "Planner") -> list[Json]:
    """The moves under way."""
    return [planner.tables.moves[name] for name in planner.tables.moving.values()]


def begin(planner: "Planner", workload: str, to: str, now_ms: int, why: str, limit_mbit: float = LIMIT_MBIT, drain: bool = False) -> Json:
    """Reserve a place at `to`, or at the best node that can take it in, and begin. Raises `Conflict`; nothing changes where there is no place.

    Args:
        drain: its node is drained: taken back with that, as long as nothing has been touched.
    """
    row = planner.tables.rows[workload]
    if reason := why_not(planner, row):
        raise Conflict("workload", f"{workload!r}: {reason}", "see what its nodes and its document say")
    if len(planner.tables.moving) >= LIVE_MOST or busy(planner, row.node) >= AT_ONCE:
        raise Conflict("workload", f"{row.node} takes part in {busy(planner, row.node)} moves, {len(planner.tables.moving)} are under way", f"wait for one of them; {AT_ONCE} a node, {LIVE_MOST} in all")
    placement = _reserved(planner, row, to, now_ms)
    number = now_ms
    while f"{MOVING}{number}" in planner.tables.moves:
        number += 1
    name = f"{MOVING}{number}"
    move: Json = {
        "id": name, "workload": workload, "epoch": row.epoch, "new_epoch": placement.epoch, "source": row.node, "target": placement.node, "why": why, "drain": drain, "state": BEGUN, "step": CHECKING, "reason": "", "problem": "",
        "offer": {}, "ready": False, "takes_live": False, "waits": False, "listens": False, "live": False, "live_problem": "", "still_ms": 0.0, "takes_ahead": False, "ahead_bytes": 0, "ahead": False, "ahead_problem": "", "root": "", "bytes": 0, "limit_mbit": limit_mbit, "created_ms": now_ms, "changed_ms": now_ms, "since_ms": {CHECKING: now_ms},
    }
    planner.intrude(replace(placement, seat={**placement.seat, MOVE: {"move": name, "root": ""}}, why=f"reserved for {name}"), now_ms)
    planner.hear(workload, placement.epoch)
    planner.ledger.put(planner.tables.moving, workload, name)
    _put(planner, move)
    return move


def _reserved(planner: "Planner", row: WorkloadRow, to: str, now_ms: int) -> PlacementRow:
    """Where it would go, were it not where it is; changes nothing. Raises `Conflict`."""
    state, source = planner.state, planner.current(row.id)
    assert source is not None
    if to and to not in state.node_index:
        raise Conflict("to", f"{to[:64]!r} is no node", "list /api/v1/nodes")
    fits, kind = np.zeros(state.size, np.bool_), moves_as(row, planner.tables.items[row.id].item.shape.kind)
    for name, index in state.node_index.items():
        fits[index] = name != row.node and (not to or name == to) and movable(planner, name, kind) and busy(planner, name) < AT_ONCE
    if not fits.any():
        raise Conflict("to", f"{to or 'no other node'} can{'not' if to else ''} take it in with its state now", f"see which nodes have the label {MOVABLE}{kind}, and at most {AT_ONCE} moves under way")
    planner.begin()
    try:
        planner.leave(source, now_ms, "tried")
        decision = planner.scheduler.decide(planner.tables.items[row.id].item, now_ms, planner.among(row, now_ms, fits))
        placed = planner.scheduler.commit(decision, now_ms)
        reason = "" if placed is not None else planner.why_not(decision, row, now_ms)
    finally:
        planner.undo()
    if placed is None:
        raise Conflict("to", f"{row.id!r} finds no place on {to or 'another node that could take it in'}: {reason}", "make room, or name another node")
    held = {"gpus": [int(gpu) for gpu in placed.seat.gpus], "numa": [[int(part) for part in share] for share in placed.seat.numa]}
    return PlacementRow(row.id, planner.next_epoch(row), placed.node, held, now_ms)


def cancel(planner: "Planner", name: str, now_ms: int) -> Json | None:
    """End a move; what was taken is brought back. None where it is not known. Raises `Conflict` where only its target can say what becomes of it."""
    move = planner.tables.moves.get(name)
    if move is not None and move["state"] == BEGUN:
        if move["step"] == STARTING:
            raise Conflict("move", f"{name} has come to {move['target']}, which is starting it", "wait for what it says; then move it back")
        give_up(planner, move, "cancelled", now_ms)
    return planner.tables.moves.get(name)


# -- what edges and workers say ----------------------------------------------------------------------------------------------


def answered(planner: "Planner", edge: str, told: Mapping[str, Any], now_ms: int) -> None:
    """An `operation` record of an edge; what is no part of a move that waits for it changes nothing."""
    name, _, part = str(told["id"]).rpartition(".")
    move = planner.tables.moves.get(name)
    if move is None or move["state"] != BEGUN or part not in _PARTS.get(move["step"], ()) or edge != move["target" if part in _OF_TARGET else "source"]:
        return
    if told["state"] in ("pending", "running"):
        return
    detail, well = told["detail"], told["state"] == "succeeded"
    why = f"{edge}: {told['reason'] or told['state']}"
    if part == "back":
        ended = CANCELLED if move["problem"] == "cancelled" else FAILED
        _end(planner, move, ended if well else FAILED, move["problem"] if well else f"{move['problem']}; and it could not go on at {why}; its state is there", now_ms)
    elif part == "check":
        if well:
            _reach(planner, {**move, "offer": detail}, ROOM, now_ms)
        else:
            give_up(planner, move, f"it cannot leave {why}", now_ms)
    elif part == "room":
        if well:
            _put(planner, {**move, "ready": True, "takes_live": detail.get(RUNS_ON) is True, "takes_ahead": detail.get(OF_DISK) is True, "changed_ms": now_ms})
        else:
            planner.refused(planner.tables.rows[move["workload"]], edge, f"it cannot come to {why}", now_ms)
            give_up(planner, move, f"it cannot come to {why}", now_ms)
    elif part in ("come", "live") and not well:
        _stands_still(planner, move, f"it could not {'come to' if part == 'come' else 'leave'} {why}", now_ms)
    elif part == "come":
        _put(planner, {**move, "waits": True, "changed_ms": now_ms})
    elif part == "live":
        _started(planner, {**move, "live": True}, {RUNS_ON: True}, now_ms)
    elif part == "ahead":
        if well and (size := int(detail.get("bytes", 0))) > 0:
            _put(planner, {**move, "ahead_bytes": size, "changed_ms": now_ms})
        else:
            _reach(planner, {**move, "ahead_problem": short(f"its disk could not be copied at {why}")}, TAKING, now_ms)
    elif well:
        _reach(planner, {**move, "root": str(detail.get("root", "")), "bytes": int(detail.get("bytes", 0))}, SENDING, now_ms)
    else:  # it goes on as if nothing had been
        _end(planner, move, FAILED, f"its state could not be taken at {why}", now_ms)


def met(planner: "Planner", name: str, now_ms: int) -> None:
    """Migration workers of both nodes are there."""
    move = planner.tables.moves.get(name)
    if move is not None and move["state"] == BEGUN and move["step"] == ROOM and move["ready"]:
        if move.get("takes_live") and move["offer"].get(RUNS_ON) is True:
            _reach(planner, move, LIVE, now_ms)
        else:
            _goes(planner, move, now_ms)


def _goes(planner: "Planner", move: Json, now_ms: int) -> None:
    """It stands still for its way; its disk need not wait for that."""
    worth = move["offer"].get(OF_DISK, 0)
    _reach(planner, move, AHEAD if move.get("takes_ahead") and isinstance(worth, int) and worth > 0 else TAKING, now_ms)


def _stands_still(planner: "Planner", move: Json, why: str, now_ms: int) -> None:
    """It cannot go while it runs."""
    _goes(planner, {**move, "waits": False, "listens": False, "live_problem": short(why)}, now_ms)


def listened(planner: "Planner", name: str, now_ms: int) -> None:
    """The target's migration worker listens for one that comes while it runs, and one waits there."""
    move = planner.tables.moves.get(name)
    if move is not None and move["state"] == BEGUN and move["step"] == LIVE and move["waits"] and not move["listens"]:
        _put(planner, {**move, "listens": True, "changed_ms": now_ms})


def connected(planner: "Planner", name: str, state: str, reason: str, now_ms: int) -> None:
    """The transfer that connects the ends of one that goes while it runs is over. Afterwards only its target can say what that means."""
    move = planner.tables.moves.get(name)
    if move is not None and move["state"] == BEGUN and move["step"] == LIVE:
        _stands_still(planner, move, f"what connected its nodes ended: {reason or state}", now_ms)


def preceded(planner: "Planner", name: str, state: str, reason: str, now_ms: int) -> None:
    """The transfer of its disk, which goes ahead, is over."""
    move = planner.tables.moves.get(name)
    if move is not None and move["state"] == BEGUN and move["step"] == AHEAD:
        well = state == "done"
        _reach(planner, {**move, "ahead": well, "ahead_problem": "" if well else short(f"its disk was not carried ahead: {reason or state}")}, TAKING, now_ms)


def carries(transfer: str) -> tuple[str, tuple[str, ...]]:
    """The move that a transfer is part of, and the steps in which it has use for it."""
    if transfer.endswith(ALIVE):
        return transfer.removesuffix(ALIVE), (LIVE, STARTING)
    move = transfer.removesuffix(BEFORE)
    return move, (AHEAD,) if move != transfer else (TAKING, SENDING)


def carried(planner: "Planner", name: str, state: str, reason: str, now_ms: int) -> None:
    """The transfer of its state is over."""
    move = planner.tables.moves.get(name)
    if move is None or move["state"] != BEGUN or move["step"] != SENDING:
        return
    if state != "done":
        give_up(planner, move, f"its state was not carried over: {reason or state}", now_ms)
    else:
        _started(planner, move, {"root": move["root"]}, now_ms)


def _started(planner: "Planner", move: Json, told: Json, now_ms: int) -> None:
    """Its target may begin it. `told`: what it goes on from."""
    target = planner.tables.open.get((move["workload"], move["new_epoch"]))
    if target is not None:  # else `advance` gives it up
        planner.ledger.put(planner.tables.open, (target.workload, target.epoch), replace(target, seat={**target.seat, MOVE: {"move": move["id"], **told}}))
        _reach(planner, move, STARTING, now_ms)


def spoken(planner: "Planner", placement: PlacementRow, what: str, why: str, now_ms: int, still_ms: float = 0.0) -> bool:
    """A `workload` record that speaks of a placement which may be reserved for a move; whether all of it is dealt with. After False the rows may be others than before. `still_ms`: for how long it says that it stood still."""
    move = planner.move_of(placement.workload)
    if move is None or placement.epoch != move["new_epoch"] or move["step"] != STARTING:
        return False
    if what == "accepted":
        return False
    if what in ("refused", "stopped"):
        planner.close(replace(placement, said=what), now_ms, why or what)
        give_up(planner, move, f"{placement.node} could not go on with it: {why or what}", now_ms)
        return True
    commit(planner, {**move, "still_ms": still_ms}, now_ms)
    return False


def commit(planner: "Planner", move: Json, now_ms: int) -> None:
    """The target has it: its epoch is the current one, and the source shall stop and forget."""
    placement = planner.tables.open[move["workload"], move["new_epoch"]]
    planner.hand_over(planner.tables.rows[move["workload"]], replace(placement, why=""), now_ms, f"{move['id']}: moved to {move['target']}")
    _end(planner, move, DONE, "", now_ms)


def lost(planner: "Planner", placement: PlacementRow, now_ms: int) -> bool:
    """The source is gone with what it held while the target may be running it already: then the target has it. Whether that is so."""
    move = planner.move_of(placement.workload)
    if move is None or placement.epoch != move["epoch"] or move["step"] != STARTING or (move["workload"], move["new_epoch"]) not in planner.tables.open:
        return False
    commit(planner, move, now_ms)
    return True


# -- rounds ------------------------------------------------------------------------------------------------------------------


def advance(planner: "Planner", now_ms: int) -> None:
    """Give up what stands on nothing any more, or takes too long."""
    for move in live(planner):
        row, target = planner.tables.rows.get(move["workload"]), planner.tables.open.get((move["workload"], move["new_epoch"]))
        if row is None or row.state != "placed" or row.epoch != move["epoch"]:
            if target is not None and move["step"] != STARTING:  # one that was told to start it has to say that it stopped
                planner.close(target, now_ms, f"{move['id']} is over")
            _end(planner, move, FAILED, f"it is no longer on {move['source']} as it was" + (f": {row.reason}" if row is not None and row.reason else ""), now_ms)
        elif move["step"] == RETURNING:
            continue
        elif target is None:
            give_up(planner, move, f"{move['target']} was taken out", now_ms)
        elif move["step"] == LIVE and now_ms - move["since_ms"][LIVE] > (patience := patience_ms(move)):
            _stands_still(planner, move, f"it was {LIVE} for {patience // 60_000} min", now_ms)
        elif move["step"] != STARTING and now_ms - move["since_ms"][move["step"]] > (patience := patience_ms(move)):
            give_up(planner, move, f"it was {move['step']} for {patience // 60_000} min{'; no migration worker of both nodes is there' if move['step'] == ROOM and move['ready'] else ''}", now_ms)


def patience_ms(move: Json) -> int:
    """Of the step that a move is at."""
    size = {LIVE: move["offer"].get("bytes", 0), AHEAD: move.get("ahead_bytes", 0), SENDING: move["bytes"]}.get(move["step"], 0)
    return max(PATIENCE_MS[move["step"]], int(TIMES * size * 8 / (move["limit_mbit"] * 1000)))


def operations(planner: "Planner", node: str) -> list[Json]:
    """The part of a node's `spec.operations` that moves ask for. A source is asked for the part of its step, a target looks for room and has its migration worker until the end; what waits there for one that goes while it
    runs is kept as long as it is asked for."""
    out = []
    for move in live(planner):
        alive = move["step"] in (LIVE, STARTING) and runs_on(move)
        if node == move["source"]:
            part = {CHECKING: "check", ROOM: "check", AHEAD: "ahead", RETURNING: "back"}.get(move["step"], "out")
            if alive:
                part = "live" if move["listens"] else "check"
            limit = int(move["limit_mbit"] * 125_000)
            told: dict[str, Json] = {"live": {SPEED: limit}, "ahead": {SPEED: max(COPY_LEAST, limit)}, "out": {OF_DISK: True} if move.get("ahead") else {}}
            out.append(_asked(move, part, told.get(part, {})))
        if node == move["target"] and move["step"] not in (CHECKING, RETURNING):
            row, shape = planner.tables.rows[move["workload"]], planner.tables.items[move["workload"]].item.shape
            offer = {**move["offer"], "kind": shape.kind.value, "image": shape.image, "requests": dict(shape.requests), "document": row.document}
            out += [_asked(move, part, offer) for part in (("room", "come") if alive else ("room",))]
    return out


def _asked(move: Json, part: str, offer: Json) -> Json:
    return {
        "id": f"{move['id']}.{part}", "kind": _KIND[part], "workload": move["workload"], "epoch": move["new_epoch" if part in _OF_TARGET else "epoch"], "name": move["id"], "stop": part == "out", "offer": offer,
        "expires_ms": NEVER_MS,
    }


def transfer(move: Json, way: str = "") -> Json:
    """The document of the transfer that carries a move's state; `way`: of the one that carries its disk before (`BEFORE`), or connects its nodes while it runs (`ALIVE`)."""
    path = f"{move['id']}{way or '.state'}"
    return {
        "id": path if way else move["id"], "source": {"worker": move["source"], "path": path}, "destination": {"worker": move["target"], "path": path}, "limit_mbit": move["limit_mbit"], "base": "", "replace": True,
        "not_before_ms": 0, **({"stream": True} if way == ALIVE else {}),
    }


def runs_on(move: Json) -> bool:
    """Whether it goes while it runs, or went so."""
    return bool(move["step"] == LIVE or move.get("live"))


def shown_transfer(move: Json) -> str:
    """The name of the transfer that is, or was, the move's at its step."""
    return str(transfer(move, BEFORE if move["step"] == AHEAD else ALIVE if runs_on(move) else "")["id"])


# -- the document ------------------------------------------------------------------------------------------------------------


def _put(planner: "Planner", move: Json) -> None:
    planner.ledger.put(planner.tables.moves, move["id"], move)
    for node in (move["source"], move["target"]):
        planner.soil(node)


def _reach(planner: "Planner", move: Json, step: str, now_ms: int) -> None:
    _put(planner, {**move, "step": step, "changed_ms": now_ms, "since_ms": {**move["since_ms"], step: now_ms}})


def give_up(planner: "Planner", move: Json, problem: str, now_ms: int) -> None:
    """Nothing comes of it: at once where the source has not been touched, else the source goes on with it first."""
    target = planner.tables.open.get((move["workload"], move["new_epoch"]))
    if target is not None:
        planner.close(target, now_ms, problem)
    if move["step"] in UNTOUCHED:
        _end(planner, move, CANCELLED if problem == "cancelled" else FAILED, problem, now_ms)
    elif move["step"] != RETURNING:
        _reach(planner, {**move, "problem": problem}, RETURNING, now_ms)


def _end(planner: "Planner", move: Json, state: str, reason: str, now_ms: int) -> None:
    target = planner.tables.open.get((move["workload"], move["new_epoch"]))
    row = planner.tables.rows.get(move["workload"])
    if state != DONE and target is not None and row is not None and row.epoch == move["epoch"] and row.state == "placed":
        planner.close(target, now_ms, reason)
    planner.ledger.put(planner.tables.moving, move["workload"], None)
    _put(planner, {**move, "state": state, "reason": short(reason), "changed_ms": now_ms, "end_ms": now_ms, "offer": {}})
    over = [name for name, one in planner.tables.moves.items() if one["state"] != BEGUN]
    for name in over[:-KEPT]:
        planner.ledger.put(planner.tables.moves, name, None)
    planner.version += 1


def newest(moves: Iterable[Json], workload: str) -> Json | None:
    """The newest move of a workload."""
    found = None
    for move in moves:
        if move["workload"] == workload:
            found = move
    return found
