"""Moves in a world in memory: the real planner with its store, and agents that do what the real ones do with what they are told, when it arrives, in any order between nodes; what one agent says is numbered, and is heard in any order too. Each copy counts what it has
done since the workload began, so that a second copy, one that goes on from too early and one that begins anew are seen at once."""

import random
from dataclasses import dataclass, field
from typing import Any

from hub.workloads import moving
from hub.workloads.book import AHEAD, LIVE, SENDING
from hub.workloads.documents import Conflict

from .kept import Desk, round_of, said, work

Json = dict[str, Any]
W = "w"
NODES = ("a", "b", "c")
LABELS = {"novacron.moves/container": "true"}


@dataclass
class Agent:
    """One node's agent: what it was told last, what it has, and what it has still to tell."""

    name: str
    entries: list[Json] = field(default_factory=list)
    operations: list[Json] = field(default_factory=list)
    running: dict[int, int] = field(default_factory=dict)
    """Epoch to what its copy has counted to."""
    held: dict[int, tuple[str, int]] = field(default_factory=dict)
    """Epoch to the move that took its state, and what that has counted to."""
    files: dict[str, int] = field(default_factory=dict)
    copies: dict[str, int] = field(default_factory=dict)
    """Moves to what the disk had that went ahead: copied here, or come."""
    waiting: dict[int, str] = field(default_factory=dict)
    """Epoch to the move: one that comes while it runs is waited for."""
    left: dict[int, int] = field(default_factory=dict)
    """Epoch to what has left while it ran, and stands still for good unless it is told otherwise."""
    told: set[tuple[int, str]] = field(default_factory=set)
    done: set[str] = field(default_factory=set)
    out: list[tuple[str, Json]] = field(default_factory=list)
    said: int = 0
    """The number of its newest record."""

    def tell(self, kind: str, body: Json) -> None:
        """Something for the hub."""
        self.said += 1
        self.out.append((kind, {**body, "seq": self.said}))


class World:
    """See the module. `trouble` is what must never be."""

    def __init__(self, chance: random.Random, nodes: int = 2, ahead: bool = True, live: bool = False) -> None:
        self.chance, self.desk, self.ahead, self.live = chance, Desk(), ahead, live
        self.agents = {name: Agent(name) for name in NODES[:nodes]}
        self.transfers: dict[str, str] = {}
        self.trouble: list[str] = []
        self.heard: dict[tuple[str, int], tuple[int, str]] = {}
        """Node and epoch to what was said last of what was heard, with its number."""
        self.count = 0
        """What any copy has counted to."""
        self.began = 0
        self.failing: set[str] = set()
        """What goes wrong wherever it is tried: `check`, `room`, `come`, `connect`, `live`, `cut` (its target lets go of one that comes while it runs when that has left, or has not), `ahead`, `ahead empty`, `carry ahead`, `out`, `carry`, `from`."""
        self.carried: set[str] = set()
        """Moves whose disk was carried ahead."""
        self.ran_on = 0
        """Moves while it ran."""
        self.went = 0
        """States that came and stood on a copy which had gone ahead."""
        for name in self.agents:
            self.desk.node(name, "edge", labels={"n": name, **LABELS})
        self.up()
        for name in list(self.agents)[1:]:
            self.desk.do(lambda planner, now, name=name: planner.cordon(name, "cordon", now))
        self.desk.submit(work(W))
        for name in list(self.agents)[1:]:
            self.desk.do(lambda planner, now, name=name: planner.cordon(name, "", now))
        self.settle(3)

    def up(self) -> None:
        """A round in which all nodes are heard from."""
        round_of(self.desk, **dict.fromkeys(self.agents, True))

    # -- what happens --------------------------------------------------------------------------------------------------------

    def hear(self, agent: Agent) -> None:
        """It gets the newest document."""
        planner = self.desk.planner
        agent.entries, agent.operations = planner.wanted(agent.name), moving.operations(planner, agent.name)

    def speak(self, agent: Agent) -> None:
        """The hub takes in something that it said."""
        if agent.out:
            kind, body = agent.out.pop(self.chance.randrange(len(agent.out)))
            if kind == "workload":
                said(self.desk, agent.name, W, body["epoch"], body["state"], body["reason"], body["seq"])
                self.heard[agent.name, body["epoch"]] = max(self.heard.get((agent.name, body["epoch"]), (0, "")), (body["seq"], body["state"]))
            else:
                self.desk.do(lambda planner, now: moving.answered(planner, agent.name, body, now))

    def act(self, agent: Agent) -> None:
        """It does all that it was told, as far as that goes."""
        wanted = next((one for one in agent.entries if one["wanted"] == "running"), None)
        for epoch in [*agent.running, *agent.held, *agent.left]:
            if wanted is None or epoch != wanted["epoch"]:
                agent.running.pop(epoch, None)
                agent.held.pop(epoch, None)
                agent.left.pop(epoch, None)
        asked = {one["epoch"] for one in agent.operations if one["kind"] == "move-come"}
        agent.waiting = {epoch: move for epoch, move in agent.waiting.items() if epoch in asked or (wanted is not None and wanted["epoch"] == epoch)}
        for one in agent.operations:
            if one["id"] not in agent.done and (one["kind"] in ("move-room", "move-come") or (wanted is not None and one["epoch"] == wanted["epoch"])):
                agent.done.add(one["id"])
                self._operate(agent, one)
        for one in agent.entries:
            if one["wanted"] == "stopped":
                self._tell(agent, one["epoch"], "stopped")
        if wanted is not None and not self._ended(agent, wanted["epoch"]):
            self._run(agent, wanted)

    def _run(self, agent: Agent, wanted: Json) -> None:
        epoch = wanted["epoch"]
        self._tell(agent, epoch, "accepted")
        if epoch in agent.running or epoch in agent.held or epoch in agent.left or wanted["held"]:
            return
        if wanted["from"].get("live") and (epoch, "running") not in agent.told:
            if self._comes(agent, epoch, wanted["from"]["move"]):
                self._tell(agent, epoch, "running")
            else:
                self._tell(agent, epoch, "refused", "planted")
            return
        if agent.waiting.pop(epoch, None):  # for what did not come so
            assert wanted["from"], "what comes while it runs is begun as if it were there"
        if wanted["from"] and (epoch, "running") not in agent.told:
            if "from" in self.failing or wanted["from"]["move"] not in agent.files:
                self._tell(agent, epoch, "refused", "planted")
                return
            self.go_on(agent, epoch, agent.files[wanted["from"]["move"]])
            self.went += wanted["from"]["move"] in agent.copies
        elif (epoch, "running") not in agent.told:
            self.began += 1
            if self.began > 1:
                self.trouble.append(f"it begins anew on {agent.name}")
            agent.running[epoch] = 0
        self._tell(agent, epoch, "running")

    def _comes(self, agent: Agent, epoch: int, move: str) -> bool:
        """The keepers of both nodes settle it between them."""
        source = next((one for one in self.agents.values() if f"{move}.live" in one.done and one.running), None)
        if agent.waiting.pop(epoch, "") != move or source is None or "from" in self.failing:
            return False
        old = next(iter(source.running))
        if "cut" in self.failing:
            if self.chance.random() < 0.5:
                source.left[old] = source.running.pop(old)
            return False
        counted = source.left[old] = source.running.pop(old)
        self.go_on(agent, epoch, counted)
        self.ran_on += 1
        return True

    def _operate(self, agent: Agent, asked: Json) -> None:
        part, epoch, move, state, detail = asked["kind"].removeprefix("move-"), asked["epoch"], asked["name"], "succeeded", {}
        if part in self.failing or (part == "check" and epoch not in agent.running):
            state = "failed"
        elif part in ("check", "room"):
            detail = ({"ahead": {"check": 5, "room": True}[part]} if self.ahead else {}) | ({"live": True} if self.live else {})
        elif part == "come":
            agent.waiting[epoch] = move
        elif part == "live":
            if epoch not in agent.running or not any(move in other.waiting.values() for other in self.agents.values()):
                state = "failed"
        elif part == "ahead":
            agent.copies[move] = self.count
            detail = {"bytes": 0 if "ahead empty" in self.failing else 7}
        elif part == "out":
            if asked["offer"].get("ahead") and move not in self.carried:
                self.trouble.append(f"{agent.name} shall send what goes over a copy that is nowhere")
            if epoch in agent.running:
                agent.held[epoch] = move, agent.running.pop(epoch)
                self._tell(agent, epoch, "checkpointed")
                detail = {"root": "r" * 64, "bytes": 1}
            else:
                state = "failed"
        elif part == "back" and epoch in agent.left:
            self.go_on(agent, epoch, agent.left.pop(epoch))
        elif part == "back" and epoch in agent.held:
            self.go_on(agent, epoch, agent.held.pop(epoch)[1])
            agent.told.discard((epoch, "running"))
            self._tell(agent, epoch, "running")
        agent.tell("operation", {"id": asked["id"], "state": state, "reason": "planted" if state == "failed" else "", "detail": detail})

    def go_on(self, agent: Agent, epoch: int, counted: int) -> None:
        if counted != self.count:
            self.trouble.append(f"{agent.name} goes on at {counted}, and {self.count} was reached")
        agent.running[epoch] = counted

    def _tell(self, agent: Agent, epoch: int, state: str, reason: str = "") -> None:
        if (epoch, state) not in agent.told and not self._ended(agent, epoch):
            agent.told.add((epoch, state))
            agent.tell("workload", {"epoch": epoch, "state": state, "reason": reason})

    @staticmethod
    def _ended(agent: Agent, epoch: int) -> bool:
        return any((epoch, state) in agent.told for state in ("stopped", "refused"))

    def work(self) -> None:
        """Every copy that runs does something."""
        copies = [agent for agent in self.agents.values() for _ in agent.running]
        if len(copies) > 1:
            self.trouble.append(f"it runs on {', '.join(agent.name for agent in copies)}")
        for agent in copies:
            self.count += 1
            agent.running = dict.fromkeys(agent.running, self.count)

    def carry(self) -> None:
        """The migration workers do their part, or fail at it."""
        for move in moving.live(self.desk.planner):
            if move["ready"]:
                self.desk.do(lambda planner, now, move=move: moving.met(planner, move["id"], now))
            move = self.desk.planner.tables.moves[move["id"]]
            if move["step"] == LIVE and "connect" not in self.failing:
                self.desk.do(lambda planner, now, move=move: moving.listened(planner, move["id"], now))
            elif move["step"] == LIVE:
                self.desk.do(lambda planner, now, move=move: moving.connected(planner, move["id"], "failed", "planted", now))
            if move["step"] == AHEAD and move["ahead_bytes"] and move["target"] in self.agents:
                well = "carry ahead" not in self.failing
                if well:
                    self.carried.add(move["id"])
                    self.agents[move["target"]].copies[move["id"]] = self.agents[move["source"]].copies[move["id"]]
                self.desk.do(lambda planner, now, move=move, well=well: moving.preceded(planner, move["id"], "done" if well else "failed", "" if well else "planted", now))
            if move["step"] != SENDING or move["state"] != "running" or move["target"] not in self.agents:
                continue
            there = [mine for mine in self.agents[move["source"]].held.values() if mine[0] == move["id"]]
            well = bool(there) and "carry" not in self.failing
            if well:
                self.agents[move["target"]].files[move["id"]] = there[0][1]
            self.desk.do(lambda planner, now, move=move, well=well: moving.carried(planner, move["id"], "done" if well else "failed", "" if well else "planted", now))

    def begin(self, to: str = "") -> str:
        """A move; its name, empty where it is refused."""
        try:
            found: Json = self.desk.do(lambda planner, now: moving.begin(planner, W, to, now, "asked for"))
        except Conflict:
            return ""
        return str(found["id"])

    def cancel(self) -> None:
        """Whatever is under way."""
        for move in moving.live(self.desk.planner):
            try:
                self.desk.do(lambda planner, now, move=move: moving.cancel(planner, move["id"], now))
            except Conflict:
                pass

    def any_step(self) -> None:
        """Something happens."""
        agent = self.agents[self.chance.choice(list(self.agents))]
        self.chance.choice((
            lambda: self.hear(agent), lambda: self.act(agent), lambda: self.speak(agent), lambda: self.hear(agent), lambda: self.act(agent), lambda: self.speak(agent), self.carry, self.work, self.up,
        ))()
        self.work()

    def settle(self, rounds: int = 14) -> None:
        """All is delivered and done."""
        for _ in range(rounds):
            for agent in self.agents.values():
                self.hear(agent)
                self.act(agent)
                self.work()
                while agent.out:
                    self.speak(agent)
            self.carry()
            self.up()

    def where(self) -> list[str]:
        """Who runs it."""
        return [agent.name for agent in self.agents.values() if agent.running]
