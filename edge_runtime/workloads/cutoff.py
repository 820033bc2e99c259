"""Who runs which workload of a site: the leader's part of the table, and what each member tells for it. Pure.

A workload whose document says `when_cut_off: move` runs only where the site's table has it, also while the hub is there: then the table says what the hub's desired state does. While no hub is there,
the leader gives those of a member that is gone to others, by `placement`. The entry that counts is the newest: the highest epoch, of the same epoch that of whoever has it.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from ..contract import jsoncodec
from ..contract.errors import ContractError
from ..contract.limits import MAX_MESSAGE_BYTES, MAX_SHARED_WORKLOADS, MAX_SITE_WORKLOADS
from ..contract.site_messages import WORKLOAD, Duty
from ..contract.workloads import RUNNING, may_move
from .placement import Seat, Site, quantity, seat_on

DROP_MS = 10_000
"""A workload that nobody lists leaves the table after so long: where the hub gives it from one member to another, the two hear of it one after the other."""

SHARED_BYTES = MAX_MESSAGE_BYTES - 98_304
"""Bytes of all entries that one member shares; what else it tells takes less than the rest."""

OTHER_KEYS = ("id", "kind", "requests", "labels", "namespace", "anti_affinity")
"""What matters of a workload that stays to where another one fits."""

OTHERS_BYTES = 32_768
"""Bytes of them; beyond it only what they ask for is told."""

UNREADABLE = (ContractError, KeyError, TypeError, ValueError, AttributeError, ArithmeticError, LookupError)
"""What a document that no hub has checked may lead to."""

Json = Mapping[str, Any]


class Standing(Protocol):
    """See `site.actions.Standing`."""

    @property
    def live(self) -> frozenset[str]:
        """Who is there."""

    @property
    def gone(self) -> frozenset[str]:
        """Who runs nothing any more."""

    @property
    def cut_off(self) -> bool:
        """Nobody who is there has a hub."""

    @property
    def binding(self) -> frozenset[str]:
        """Those that are gone of which the last word still counts."""


def name_of(entry: Json) -> str:
    """Workload and epoch: what an instance is called, and what `ended` speaks of."""
    return f"{entry['id']}/{entry['epoch']}"


def share(entries: Iterable[Json], held: Iterable[Json]) -> tuple[list[Json], list[Json]]:
    """What a member shares of its entries that may move, and what it must refuse: over `MAX_SHARED_WORKLOADS`, or over `SHARED_BYTES`. What the site gave to it comes first."""
    shared: list[Json] = []
    refused: list[Json] = []
    left = SHARED_BYTES
    for entry in [*held, *sorted((entry for entry in entries if entry["wanted"] == RUNNING and may_move(entry["document"])), key=lambda entry: (entry["id"], entry["epoch"]))]:
        if any(one["id"] == entry["id"] and one["epoch"] >= entry["epoch"] for one in shared):
            continue
        size = len(jsoncodec.encode(dict(entry)))
        if len(shared) >= MAX_SHARED_WORKLOADS or size > left:
            refused.append(entry)
            continue
        left -= size
        shared.append(entry)
    return shared, refused


def others(entries: Iterable[Json]) -> list[Json]:
    """What else runs on a member, as far as it matters to where something fits."""
    told = [{key: entry["document"][key] for key in OTHER_KEYS if key in entry["document"]} | {"id": entry["id"]} for entry in entries if entry["wanted"] == RUNNING]
    if len(jsoncodec.encode(told)) <= OTHERS_BYTES:
        return list(told)
    return [{"id": one["id"], "requests": {name: one.get("requests", {})[name] for name in ("cpu", "memory", "disk") if name in one.get("requests", {})}} for one in told]


@dataclass(slots=True)
class Shift:
    """The leader's view of who runs what; `loads` are the members' `LOAD` messages, our own too, by member."""

    loads: dict[str, Json] = field(default_factory=dict)
    unplaced: dict[str, str] = field(default_factory=dict)
    """Workloads that shall move and cannot: why not, in words."""
    _listed_ms: dict[str, int] = field(default_factory=dict)

    def place(self, before: Mapping[str, Duty], standing: Standing, number: int, anew: bool, now: int) -> dict[str, Duty]:
        """The duties of all workloads; see `site.actions.Place`."""
        entries = self._entries(before, standing)
        duties: dict[str, Duty] = {}
        for key, duty in before.items():
            over = any(load["ended"].get(f"{key.removeprefix(WORKLOAD)}/{duty.epoch}", "refused") != "refused" for load in self.loads.values())
            if key not in entries and not over and 0 <= now - self._listed_ms.setdefault(key, now) < DROP_MS and duty.edge not in standing.gone:
                duties[key] = Duty(duty.edge, number if anew else duty.fence, duty.origin, duty.epoch)
        self._listed_ms = {key: now if key in entries else self._listed_ms[key] for key in {*entries, *duties}}
        homeless: list[tuple[str, str, Json]] = []
        for key in sorted(entries, key=lambda key: (key not in before, key))[: MAX_SITE_WORKLOADS - len(duties)]:
            origin, entry = entries[key]
            old = before.get(key)
            known = old is not None and old.epoch == entry["epoch"]
            edge = old.edge if known and old is not None and self._ended(old.edge, entry) != "refused" else origin
            if standing.cut_off and edge in standing.gone:
                homeless.append((key, origin, entry))
            fence = old.fence if old is not None and known and old.edge == edge and not anew else number
            duties[key] = Duty(edge, fence, origin, entry["epoch"])
        self.unplaced = {}
        if homeless:
            self._move(homeless, duties, entries, standing, number)
        return dict(sorted(duties.items()))

    def entry(self, key: str, duty: Duty) -> tuple[Json, str, int] | None:
        """What a member that is given a workload runs: the entry, who has it from the hub, and of which desired state. None where nobody has told it (yet)."""
        for edge in (duty.origin, duty.edge, *sorted(self.loads)):
            for entry in self.loads.get(edge, {}).get("entries", ()):
                if WORKLOAD + entry["id"] == key and entry["epoch"] == duty.epoch:
                    return entry, entry["for"] or edge, entry["generation"]
        return None

    def _entries(self, before: Mapping[str, Duty], standing: Standing) -> dict[str, tuple[str, Json]]:
        """Key to (who has it from the hub, or from the site; the entry) of all that shall run."""
        best: dict[str, tuple[tuple[int, bool, str], str, Json]] = {}
        for edge, load in self.loads.items():
            if edge not in standing.live and edge in standing.gone and edge not in standing.binding:
                continue
            for entry in load["entries"]:
                if not self._stands(entry):
                    continue
                key = WORKLOAD + entry["id"]
                old = before.get(key)
                rank = (entry["epoch"], old is not None and old.edge == edge, edge)
                if key not in best or rank > best[key][0]:
                    best[key] = (rank, entry["for"] or edge, entry)
        return {key: (origin, entry) for key, (_, origin, entry) in best.items()}

    def _stands(self, entry: Json) -> bool:
        """It has not ended, and whoever had it from the hub has not been told since that it shall not run."""
        if any(load["ended"].get(name_of(entry), "refused") != "refused" for load in self.loads.values()):
            return False
        source = self.loads.get(entry["for"]) if entry["for"] else None
        return source is None or source["generation"] <= entry["generation"] or any(name_of(one) == name_of(entry) for one in source["entries"])

    def _ended(self, edge: str, entry: Json) -> str:
        return str(self.loads.get(edge, {}).get("ended", {}).get(name_of(entry), ""))

    def _move(self, homeless: Sequence[tuple[str, str, Json]], duties: dict[str, Duty], entries: Mapping[str, tuple[str, Json]], standing: Standing, number: int) -> None:
        """Give them to others, by `placement`; those of the highest priority first. What fits nowhere stays where it was."""
        site = self._site(standing)
        moving = {key for key, _, _ in homeless}
        for key, duty in duties.items():
            if key not in moving and key in entries and duty.edge in site.nodes:
                _book(site, duty.edge, entries[key][1]["document"])
        for key, origin, entry in sorted(homeless, key=lambda one: (-_priority(one[2]["document"]), one[0])):
            document = {**entry["document"], "id": entry["id"]}
            if entry["gpus"]:
                self.unplaced[key] = "it has GPU devices, which no driver of an edge can give it"
                continue
            for edge, node in site.nodes.items():
                node.up = self._ended(edge, entry) != "refused"
            try:
                seat = site.place(document)
                why = "" if seat else _words(site.verdicts(document))
            except UNREADABLE as error:
                seat, why = None, f"it cannot be read ({error})"
            if seat is None:
                self.unplaced[key] = why
            else:
                duties[key] = Duty(seat.node, number, origin, entry["epoch"])

    def _site(self, standing: Standing) -> Site:
        site = Site()
        for edge in sorted(standing.live):
            load = self.loads.get(edge)
            if load is None or not load["capacity"]:
                continue
            try:
                site.add({**load["capacity"], "name": edge})
            except UNREADABLE:
                continue
            for document in load["others"]:
                _book(site, edge, {**document, "id": f"{edge}\0{document['id']}"})
        return site


def _book(site: Site, edge: str, document: Json) -> None:
    """What runs there is a fact, also where it is more than the node has, or cannot be read."""
    try:
        for name, amount in document.get("requests", {}).items():
            quantity(name, amount)
        site.hold(document, seat_on(site.nodes[edge], document) or Seat(edge))
    except UNREADABLE:
        site.nodes[edge].free["slots"] = site.nodes[edge].free.get("slots", 0) - 1


def _priority(document: Json) -> int:
    value = document.get("priority", 0)
    return value if isinstance(value, int) else 0


def _words(verdicts: Mapping[str, Sequence[str]]) -> str:
    return "; ".join(f"{edge}: {', '.join(failed).lower() or 'taken'}" for edge, failed in verdicts.items()) or "no member has told what it has for workloads"


