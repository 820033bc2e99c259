"""The online decision: one workload, now. Reserve is atomic and idempotent; what a lost, drained or tainted node held moves on."""

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

from .arrays import GONE, SILENT, UP, Seat
from .classes import Klass
from .feasible import choose_devices, numa_share, verdicts
from .fragmentation import Fragmentation
from .model import Effect, Workload
from .rank import Ranker, View, best
from .reasons import WORDS, Bits, Bools, Fail
from .state import State
from .units import GPU_WHOLE, LEAVING, SLOTS, Invalid, human

MAX_RETRIES = 8
"""Decisions that may be overtaken by a change of the cluster before the caller hears of it."""


_BIT_OF = {flag.name or "": int(flag).bit_length() - 1 for flag in Fail}


@dataclass(frozen=True, slots=True)
class Decision:
    """Where a workload should go, as of `position` of the state; `seat` None: nowhere, `bits` say why. Nothing has changed yet."""

    workload: Workload
    seat: Seat | None
    score: int
    bits: Bits = field(repr=False)
    position: int = 0


@dataclass(frozen=True, slots=True)
class Placed:
    """A reservation that stands. `again`: it stood already."""

    workload: str
    node: str
    seat: Seat
    again: bool = False


@dataclass(frozen=True, slots=True)
class Pending:
    """No place now, and why: a sentence, and how many nodes failed which filter."""

    workload: str
    reason: str
    failed: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Moved:
    """What became of a workload that had to leave: `to` None: it waits (`held`: still in its old place) for the reason given."""

    workload: str
    source: str
    to: str | None
    how: str
    reason: str = ""
    held: bool = False
    item: Workload | None = field(default=None, repr=False)


class Scheduler:
    """Decides on a state. Times are ms on the caller's clock. One caller at a time."""

    def __init__(self, state: State, ranker: Ranker | None = None) -> None:
        self.state = state
        self.ranker = ranker or Ranker()
        self.tainted_since: dict[tuple[str, str, str], int] = {}
        """(node, taint key, value) of NoExecute taints to when they were first seen."""

    def on(self, state: State) -> "Scheduler":
        """The same policies on another state, a snapshot for instance."""
        other = Scheduler(state, self.ranker)
        other.tainted_since = dict(self.tainted_since)
        return other

    # deciding

    def decide(self, workload: Workload, now_ms: int, among: Bools | None = None) -> Decision:
        """The best place, changing nothing. `among` restricts the nodes. Raises `Invalid` for what can never be placed because of its form."""
        klass = self.state.klass(workload.shape)
        bits = verdicts(self.state, klass)
        feasible: Bools = bits == 0
        if among is not None:
            feasible &= among
        position = self.position
        while feasible.any():
            total = self.ranker.total(View(self.state, klass, self.state.facts(klass), feasible, now_ms))
            node = best(self.state, total)
            assert node is not None
            seat = self.seat_on(klass, node)
            if seat is not None:
                return Decision(workload, seat, int(total[node]), bits, position)
            feasible[node] = False
        return Decision(workload, None, -1, bits, position)

    @property
    def position(self) -> int:
        """Where the state is: a decision of another position is checked again before it becomes true."""
        return self.state.changes

    def seat_on(self, klass: Klass, node: int) -> Seat | None:
        """Devices and zones for a class on one node; None where they do not come together."""
        shape = klass.shape
        gpus: tuple[int, ...] = ()
        if shape.gpu is not None:
            policy = self.ranker.policies.get("fragmentation")
            if isinstance(policy, Fragmentation) and shape.gpu.milli < GPU_WHOLE:
                chosen: tuple[int, ...] | None = (policy.device(self.state, klass, node),)
            else:
                chosen = choose_devices(self.state, node, shape.gpu)
            if chosen is None:
                return None
            gpus = chosen
        numa = numa_share(self.state, node, shape)
        return None if numa is None else Seat(node, gpus, numa)

    def check(self, workload: Workload) -> None:
        """Raises `Invalid` for a workload that this cluster could never hold, however empty."""
        self.ranker.check(workload.shape.weights)
        self.state.klass(workload.shape)
        up = self.state.status != GONE
        for name, amount in workload.shape.requests:
            row = self.state.resource_rows[name]
            largest = int(self.state.cap[row][up].max(initial=0))
            if amount > largest and name != SLOTS:
                raise Invalid(f"workload.requests.{name}", f"{human(name, amount)} is more than any node has", f"ask for at most {human(name, largest)}, or add a larger node")
        gpu = workload.shape.gpu
        if gpu is not None:
            counts = self.state.attributes.model_count
            wanted = [self.state.attributes.models[model] for model in gpu.models if model in self.state.attributes.models] if gpu.models else list(range(len(counts)))
            most = int(counts[wanted].sum(0)[up].max(initial=0)) if len(wanted) else 0
            if gpu.count > most:
                raise Invalid("workload.gpu.count", f"{gpu.count} of {'|'.join(gpu.models) or 'any model'} is more than any node has", f"ask for at most {most}, or split it into a gang")

    def commit(self, decision: Decision, now_ms: int) -> Placed | None:
        """Make a decision true; None where the cluster has changed so that it no longer holds (decide again)."""
        seat, workload = decision.seat, decision.workload
        if seat is None:
            return None
        state = self.state
        if self.position != decision.position:
            if seat.node >= state.size or verdicts(state, state.klass(workload.shape))[seat.node]:
                return None
            fresh = self.seat_on(state.klass(workload.shape), seat.node)
            if fresh is None:
                return None
            seat = fresh
        state.place(workload, seat, now_ms)
        return Placed(workload.id, state.nodes[seat.node].name, seat)

    def reserve(self, workload: Workload, now_ms: int) -> Placed | Pending:
        """Decide and commit. The same workload again gives the same answer; another one under its id raises `Invalid`."""
        known = self.standing(workload)
        if known is not None:
            return known
        for _ in range(MAX_RETRIES):
            decision = self.decide(workload, now_ms)
            if decision.seat is None:
                return self.pending(decision)
            placed = self.commit(decision, now_ms)
            if placed is not None:
                return placed
        return Pending(workload.id, f"the cluster changed {MAX_RETRIES} times while deciding; ask again")

    def standing(self, workload: Workload) -> Placed | None:
        """The reservation of that id where it stands. Raises `Invalid` where it belongs to another workload."""
        item, seat = self.state.workload(workload.id), self.state.seat(workload.id)
        if item is None or seat is None:
            return None
        if item != workload:
            raise Invalid("workload.id", f"{workload.id} is placed already, and is another workload", "release it first, or use another id")
        return Placed(workload.id, self.state.nodes[seat.node].name, seat, again=True)

    def pending(self, decision: Decision) -> Pending:
        """Why a decision found nothing, in one sentence."""
        failed = tally(decision.bits)
        total = len(decision.bits)
        reasons = "; ".join(f"{count} {'node' if count == 1 else 'nodes'}: {WORDS[Fail[name]]}" for name, count in failed.items())
        return Pending(decision.workload.id, f"0 of {total} nodes will do: {reasons}" if total else "there are no nodes", failed)

    # leaving

    def release(self, workload: str) -> bool:
        """Give everything back; False where nothing was held."""
        return self.state.release(workload)

    def relocate(self, workload: str, now_ms: int, among: Bools | None = None) -> Placed | None:
        """Move to the best other place, or change nothing and give None."""
        item, seat = self.state.workload(workload), self.state.seat(workload)
        if item is None or seat is None:
            return None
        elsewhere = np.ones(self.state.size, np.bool_) if among is None else among.copy()
        elsewhere[seat.node] = False
        mark = self.state.begin()
        self.state.release(workload)
        decision = self.decide(item, now_ms, elsewhere)
        placed = self.commit(decision, now_ms)
        if placed is None:
            self.state.undo(mark)
        else:
            self.state.keep(mark)
        return placed

    def expire(self, now_ms: int, timeout_ms: int) -> list[Moved]:
        """Nodes not heard from for `timeout_ms` take nothing more, and what they held is placed anew; what finds no place is released and given back as waiting."""
        state = self.state
        lost = np.flatnonzero((state.status == UP) & (state.beat_ms + timeout_ms < now_ms)).tolist()
        for node in lost:
            state.set_status(state.nodes[node].name, SILENT)
        return self._abandon(lost, now_ms, "not heard from")

    def vanish(self, node: str, now_ms: int) -> list[Moved]:
        """The node is gone for good."""
        self.state.set_status(node, GONE)
        return self._abandon([self.state.node_index[node]], now_ms, "gone")

    def _abandon(self, nodes: Iterable[int], now_ms: int, why: str) -> list[Moved]:
        moved = []
        for node in nodes:
            source = self.state.nodes[node].name
            for item in _by_importance(self.state.on_node(node)):
                placed = self.relocate(item.id, now_ms)
                if placed is None:
                    self.state.release(item.id)
                moved.append(Moved(item.id, source, None if placed is None else placed.node, "restart", f"{source} is {why}", item=item))
        return moved

    def drain(self, node: str, now_ms: int) -> list[Moved]:
        """Cordon the node and move what is there: live where it can, else by restart within the disruption budgets. What has nowhere to go stays, with the reason."""
        self.state.set_cordon(node, True)
        return [self._leave(item, node, now_ms, "drained") for item in _by_importance(self.state.on_node(self.state.node_index[node]))]

    def _leave(self, item: Workload, source: str, now_ms: int, why: str) -> Moved:
        blocking = None if item.migratable else next((budget for budget in self.state.budgets.values() if budget.covers(item) and budget.allowed <= 0), None)
        if blocking is not None:
            return Moved(item.id, source, None, "stay", f"budget {blocking.name} allows no more disruption", held=True, item=item)
        placed = self.relocate(item.id, now_ms)
        if placed is None:
            return Moved(item.id, source, None, "stay", "no other node will do", held=True, item=item)
        if not item.migratable:
            self.disrupt(item)
        return Moved(item.id, source, placed.node, "migrate" if item.migratable else "restart", f"{source} is {why}", item=item)

    def disrupt(self, item: Workload) -> None:
        """One disruption less is allowed by the budgets that cover the workload."""
        for budget in list(self.state.budgets.values()):
            if budget.covers(item):
                self.state.set_budget(type(budget)(budget.name, budget.namespace, budget.selector, budget.allowed - 1, budget.disrupted))

    def execute_taints(self, now_ms: int) -> list[Moved]:
        """NoExecute: what does not tolerate a taint of its node leaves at once, what tolerates it for a while leaves after that; it is released where no place is left."""
        state, moved = self.state, []
        seen: set[tuple[str, str, str]] = set()
        for taint, code in state.attributes.taints.items():
            if taint.effect is not Effect.NO_EXECUTE:
                continue
            for node in np.flatnonzero(state.attributes.tainted[code]).tolist():
                name = state.nodes[node].name
                seen.add((name, taint.key, taint.value))
                since = self.tainted_since.setdefault((name, taint.key, taint.value), now_ms)
                for item in _by_importance(state.on_node(node)):
                    klass = state.klass(item.shape)
                    if not klass.no_execute:
                        continue
                    limits = [toleration.for_ms for toleration in item.shape.tolerations if toleration.tolerates(taint)]
                    if limits and (None in limits or now_ms < since + max(limit for limit in limits if limit is not None)):
                        continue
                    placed = self.relocate(item.id, now_ms)
                    if placed is None:
                        state.release(item.id)
                    moved.append(Moved(item.id, name, None if placed is None else placed.node, "migrate" if item.migratable and placed else "restart",
                                       f"does not tolerate {taint.key}={taint.value}:NoExecute", item=item))
        self.tainted_since = {key: since for key, since in self.tainted_since.items() if key in seen}
        return moved


def tally(bits: Bits) -> dict[str, int]:
    """How many nodes failed each filter, most first."""
    each = np.unpackbits(bits.astype("<u4").view(np.uint8).reshape(-1, 4), axis=1, bitorder="little").sum(0)
    counts = ((name, int(each[at])) for name, at in _BIT_OF.items())
    return dict(sorted(((name, count) for name, count in counts if count), key=lambda item: -item[1]))


def _by_importance(items: Iterable[Workload]) -> list[Workload]:
    # What holds the old seat of a workload on the move goes when the move ends.
    return sorted((item for item in items if not item.id.endswith(LEAVING)), key=lambda item: (-item.priority, item.id))

