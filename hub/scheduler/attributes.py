"""What nodes are, apart from how full they are: labels, taints, kinds, GPU models, images, interned to small integers so that one filter is one pass over an array."""

from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt

from .model import REGION, Effect, Node, NodeKind, NodeTerm, Op, Requirement, Shape, Taint, integer
from .reasons import Bits, Bools, Fail, Ints
from .units import Invalid

MAX_LABEL_KEYS = 1024
"""Different label keys of a whole cluster; each is an int32 per node."""

MAX_TAINTS = 1024
"""Different taints of a whole cluster; each is a byte per node."""

UNSCHEDULABLE_TAINT = Taint("node.kubernetes.io/unschedulable", "", Effect.NO_SCHEDULE)
"""A workload that tolerates it goes to cordoned nodes too (kube's rule)."""

_KINDS = tuple(NodeKind)


class Attributes:
    """Columns of all nodes; `version` grows with every change, and what was derived from an older one is stale."""

    def __init__(self) -> None:
        self.size = 0
        self.version = 0
        self.keys: dict[str, int] = {}
        self.vocabulary: list[dict[str, int]] = []
        self.values = np.empty((0, 0), np.int32)
        """[key, node]: id of the value among those of its key, -1 where the label is missing."""
        self.taints: dict[Taint, int] = {}
        self.tainted = np.empty((0, 0), np.bool_)
        """[taint, node]."""
        self.kind = np.empty(0, np.int8)
        self.models: dict[str, int] = {}
        self.model_count = np.empty((0, 0), np.int16)
        """[model, node]: devices of the model."""
        self.images: dict[str, int] = {}
        self.has_image = np.empty((0, 0), np.bool_)

    def copy(self) -> "Attributes":
        """An independent one."""
        other = Attributes.__new__(Attributes)
        for name, value in vars(self).items():
            setattr(other, name, [dict(item) for item in value] if name == "vocabulary" else value.copy() if isinstance(value, dict | np.ndarray) else value)
        return other

    def grow(self, count: int) -> None:
        """Room for `count` more nodes, without attributes yet."""
        self.size += count
        self.version += 1
        self.values = np.pad(self.values, ((0, 0), (0, count)), constant_values=-1)
        self.tainted = np.pad(self.tainted, ((0, 0), (0, count)))
        self.model_count = np.pad(self.model_count, ((0, 0), (0, count)))
        self.has_image = np.pad(self.has_image, ((0, 0), (0, count)))
        self.kind = np.pad(self.kind, (0, count))

    def shrink(self, count: int) -> None:
        """Take the last `count` nodes away."""
        self.size -= count
        self.version += 1
        for name in ("values", "tainted", "model_count", "has_image", "kind"):
            setattr(self, name, np.ascontiguousarray(getattr(self, name)[..., : self.size]))

    def refuse(self, nodes: Iterable[Node]) -> None:
        """Raises `Invalid` where the nodes would not fit the tables; changes nothing."""
        keys = {key for node in nodes for key, _ in node.labels} | self.keys.keys()
        taints = {taint for node in nodes for taint in node.taints} | self.taints.keys()
        if len(keys) > MAX_LABEL_KEYS:
            raise Invalid("node.labels", f"{len(keys)} different keys in the cluster", f"use at most {MAX_LABEL_KEYS}")
        if len(taints) > MAX_TAINTS:
            raise Invalid("node.taints", f"{len(taints)} different taints in the cluster", f"use at most {MAX_TAINTS}")

    def set(self, index: int, node: Node) -> None:
        """Describe node `index`."""
        self.version += 1
        for key, _ in node.labels:
            self._key(key)
        self.values[:, index] = -1
        for key, value in node.labels:
            row = self.keys[key]
            words = self.vocabulary[row]
            self.values[row, index] = words.setdefault(value, len(words))
        self.tainted = _rows(self.tainted, self.taints, node.taints, self.size)
        self.tainted[:, index] = False
        for taint in node.taints:
            self.tainted[self.taints[taint], index] = True
        self.kind[index] = _KINDS.index(node.kind)
        self.model_count = _rows(self.model_count, self.models, (device.model for device in node.gpus), self.size)
        self.model_count[:, index] = 0
        for device in node.gpus:
            self.model_count[self.models[device.model], index] += 1
        self.has_image = _rows(self.has_image, self.images, node.images, self.size)
        self.has_image[:, index] = False
        for image in node.images:
            self.has_image[self.images[image], index] = True

    def _key(self, key: str) -> int:
        if key not in self.keys:
            self.keys[key] = len(self.keys)
            self.vocabulary.append({})
            self.values = np.vstack([self.values, np.full((1, self.size), -1, np.int32)])
        return self.keys[key]

    def domains(self, key: str) -> tuple[npt.NDArray[np.int32], int]:
        """Domain id of each node for a topology key (-1: none) and how many ids there are."""
        row = self.keys.get(key)
        return (np.full(self.size, -1, np.int32), 0) if row is None else (self.values[row], len(self.vocabulary[row]))

    def matches(self, requirement: Requirement) -> Bools:
        """Nodes on which the requirement holds."""
        row = self.keys.get(requirement.key)
        if row is None:
            return np.full(self.size, requirement.op in (Op.NOT_IN, Op.DOES_NOT_EXIST))
        values, words = self.values[row], self.vocabulary[row]
        if requirement.op is Op.EXISTS:
            there: Bools = values >= 0
            return there
        if requirement.op is Op.DOES_NOT_EXIST:
            missing: Bools = values < 0
            return missing
        if requirement.op in (Op.GT, Op.LT):
            wanted = [code for word, code in words.items() if (number := integer(word)) is not None and _compare(requirement, number)]
        else:
            wanted = [words[value] for value in requirement.values if value in words]
        found: Bools = np.isin(values, wanted) if len(wanted) != 1 else values == wanted[0]
        return ~found if requirement.op is Op.NOT_IN else found

    def term(self, term: NodeTerm) -> Bools:
        """Nodes that the conjunction matches; none where it is empty."""
        parts = term.labels + term.names
        return np.logical_and.reduce([self.matches(part) for part in parts]) if parts else np.zeros(self.size, np.bool_)

    def affine(self, shape: Shape) -> Bools:
        """Nodes that selector and required affinity allow."""
        allowed = np.ones(self.size, np.bool_)
        for key, value in shape.node_selector:
            allowed &= self.matches(Requirement(key, Op.IN, (value,)))
        if shape.node_terms is not None:
            allowed &= np.logical_or.reduce([np.zeros(self.size, np.bool_), *(self.term(term) for term in shape.node_terms)])
        return allowed

    def fails(self, shape: Shape, affine: Bools) -> Bits:
        """The filters that depend on nothing but the node's description."""
        bits = np.where(affine, np.uint32(0), np.uint32(Fail.NODE_AFFINITY))
        hard = [code for taint, code in self.taints.items() if taint.effect is not Effect.PREFER_NO_SCHEDULE and not any(item.tolerates(taint) for item in shape.tolerations)]
        if hard:
            bits[self.tainted[hard].any(0)] |= np.uint32(Fail.TAINT)
        if shape.node_kinds:
            bits[~np.isin(self.kind, [_KINDS.index(kind) for kind in shape.node_kinds])] |= np.uint32(Fail.KIND)
        if shape.residency:
            bits[~self.matches(Requirement(REGION, Op.IN, shape.residency))] |= np.uint32(Fail.RESIDENCY)
        if shape.gpu is not None:
            wanted = [self.models[model] for model in shape.gpu.models if model in self.models] if shape.gpu.models else list(self.models.values())
            bits[self.model_count[wanted].sum(0) < shape.gpu.count] |= np.uint32(Fail.GPU_MODEL)
        return bits

    def preferred(self, shape: Shape) -> Ints:
        """Sum of the weights of the preferred terms that each node matches; an empty term says nothing (kube's rule)."""
        total = np.zeros(self.size, np.int64)
        for item in shape.preferred_nodes:
            total += item.weight * self.term(item.term)
        return total

    def disliked(self, shape: Shape) -> Ints:
        """How many PreferNoSchedule taints of each node are not tolerated."""
        soft = [code for taint, code in self.taints.items() if taint.effect is Effect.PREFER_NO_SCHEDULE and not any(item.tolerates(taint) for item in shape.tolerations)]
        count: Ints = self.tainted[soft].sum(0, dtype=np.int64)
        return count


def _compare(requirement: Requirement, number: int) -> bool:
    bound = int(requirement.values[0])
    return number > bound if requirement.op is Op.GT else number < bound


def _rows(table: Any, ids: dict[Any, int], found: Iterable[Any], size: int) -> Any:
    """`table` with a row for each thing found that had none; `ids` learns them."""
    known = len(ids)
    for item in found:
        ids.setdefault(item, len(ids))
    return np.vstack([table, np.zeros((len(ids) - known, size), table.dtype)]) if len(ids) > known else table
