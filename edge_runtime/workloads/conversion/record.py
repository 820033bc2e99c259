"""What is known of a workload that can be converted, on the disk: `conversion.json`, replaced as a whole (`hot` says what its steps mean)."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ...contract.workloads import AS_CONTAINER
from ..drivers import keeping
from ..drivers.face import Key, Order
from ..drivers.instance import read

NAME = "conversion.json"

STEPS = ("", "warming", "taking", "passing")

POINTS = ("warming", "ready", "taking", "held", "frozen", "dumped", "restored", "passing", "ended", "went", "plugged", "")
"""What a conversion has reached, in order; said to `step`. On the way back `warming`, `ready` and `restored` are not there."""


@dataclass(frozen=True, slots=True)
class Workload:
    """`conversion.json`.

    Attributes:
        order: as it was prepared.
        image, layers: the image that its name meant then, and what that consists of: it stands on these in every form.
        form: one of `contract.workloads.FORMS`.
        step, to: what is under way, and which form comes of it.
        token: of the state that passes.
        problem: why the last conversion did not go as it should.
        passed: how often it has changed its form.
    """

    order: Order
    image: str = ""
    layers: tuple[str, ...] = ()
    form: str = AS_CONTAINER
    step: str = ""
    to: str = ""
    token: str = ""
    problem: str = ""
    passed: int = 0


def found(folder: Path) -> Workload | None:
    """Of a workload's folder; None where there is none."""
    value = read(folder / NAME)
    return _workload(value) if value is not None else None


def keep(folder: Path, now: Workload) -> None:
    """On the disk when this returns; blocks."""
    keeping.write(str(folder / NAME), asdict(now))


def _workload(value: Mapping[str, Any]) -> Workload:
    told = value["order"]
    return Workload(**{**value, "layers": tuple(value["layers"]), "order": Order(**{**told, "key": Key(**told["key"])})})
