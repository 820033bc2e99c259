"""The unified scheduler: VMs, containers, functions and batch in one pool. Pure: no I/O, no clock, numpy only. See README.md."""

from .arrays import Seat
from .model import Budget, Kind, Node, NodeKind, Shape, Workload
from .parse import budget, node, refuse_cycles, shape, workload
from .place import Decision, Moved, Pending, Placed, Scheduler
from .rank import POLICIES, WEIGHTS, Policy, Ranker, View, policies_from
from .reasons import WORDS, Fail
from .state import State
from .units import Invalid

__all__ = [
    "POLICIES", "WEIGHTS", "WORDS", "Budget", "Decision", "Fail", "Invalid", "Kind", "Moved", "Node", "NodeKind", "Pending", "Placed", "Policy", "Ranker", "Scheduler", "Seat",
    "Shape", "State", "View", "Workload", "budget", "node", "policies_from", "refuse_cycles", "shape", "workload",
]
