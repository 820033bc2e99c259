"""Quantities as exact integers in the smallest unit that anybody asks for; no float ever holds a capacity.

| resource | unit |
|---|---|
| `cpu` | milli-CPU |
| `memory`, `disk` | bytes |
| `network` | kbit/s |
| `slots` | workloads that a node may hold |
| any other | pieces |
"""

from collections.abc import Mapping
from decimal import Decimal, InvalidOperation
from typing import Any

CPU, MEMORY, DISK, NETWORK, SLOTS = "cpu", "memory", "disk", "network", "slots"

BASE_RESOURCES = (CPU, MEMORY, DISK, NETWORK, SLOTS)
"""Always rows 0 to 4 of the capacity arrays, in this order."""

MAX_QUANTITY = 1 << 50
"""Largest quantity of one resource (1 PiB in bytes): a float64 holds it exactly, and 8,192 of them add up within int64."""

GPU_WHOLE = 1000
"""Milli-GPU in one device."""

MAX_GPUS_PER_NODE = 16
"""Devices of one node: the largest machines on sale have 16; the device arrays are this wide at most."""

MAX_NAME = 253
"""Characters of an id, a name or a label key."""

LEAVING = "\0leaving"
"""Ends the id of the entry that holds the old seat of a workload on the move; no name from outside may have a zero byte."""

_SUFFIXES = {
    "": 1, "k": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "P": 10**15, "Ki": 1 << 10, "Mi": 1 << 20, "Gi": 1 << 30, "Ti": 1 << 40, "Pi": 1 << 50,
}


class Invalid(ValueError):
    """Bad input: which field, what is wrong with it, and what would be right."""

    def __init__(self, field: str, problem: str, remedy: str) -> None:
        super().__init__(f"{field}: {problem}; {remedy}")
        self.field, self.problem, self.remedy = field, problem, remedy


def _number(text: str) -> Decimal | None:
    try:
        number = Decimal(text)
    except InvalidOperation:
        return None
    return number if number.is_finite() else None


def quantity(resource: str, value: Any, field: str) -> int:
    """`value` in the unit of `resource`.

    A number counts CPUs for `cpu` and units otherwise; a string may end in `m` (thousandths) or in a decimal or binary suffix. Rounds up, as a request that is
    rounded down would overcommit. Raises `Invalid`.
    """
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise Invalid(field, f"{value!r} is not a quantity", "give a number, or a string such as '500m' or '4Gi'")
    text = str(value).strip()
    scale = Decimal(1000 if resource == CPU else 1)
    body = text.rstrip("kMGTPim")
    suffix = text[len(body):]
    if suffix == "m":
        scale /= 1000
    elif suffix in _SUFFIXES:
        scale *= _SUFFIXES[suffix]
    else:
        raise Invalid(field, f"{text!r} has the unknown suffix {suffix!r}", f"use one of m, {', '.join(s for s in _SUFFIXES if s)}")
    number = _number(body)
    if number is None:
        raise Invalid(field, f"{text[:40]!r} is not a number", "give a number, or a string such as '500m' or '4Gi'")
    if number < 0:
        raise Invalid(field, f"{text!r} is negative", "give 0 or more")
    if number.adjusted() > 18 or number * scale > MAX_QUANTITY:
        raise Invalid(field, f"{text[:40]!r} is more than this scheduler counts", f"give at most {MAX_QUANTITY} in the unit of {resource}")
    scaled = number * scale
    whole = int(scaled)
    return whole if scaled == whole else whole + 1


def quantities(value: Any, field: str) -> dict[str, int]:
    """A mapping of resource to quantity, checked. A resource is one of the base ones or extended, `domain/name`. Raises `Invalid`."""
    if not isinstance(value, Mapping):
        raise Invalid(field, "is not a mapping", "give {resource: quantity}")
    result = {}
    for name, amount in value.items():
        if not isinstance(name, str) or not name or len(name) > MAX_NAME:
            raise Invalid(field, f"{name!r} is not a resource name", f"give a string of 1 to {MAX_NAME} characters")
        if name not in BASE_RESOURCES and "/" not in name:
            raise Invalid(f"{field}.{name}", "is an unknown resource", f"use one of {', '.join(BASE_RESOURCES)}, `gpu` of the workload, or an extended one as domain/name")
        result[name] = quantity(name, amount, f"{field}.{name}")
    return result


def whole(value: Any, field: str, least: int = 0, most: int = MAX_QUANTITY) -> int:
    """A plain integer within bounds. Raises `Invalid`."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise Invalid(field, f"{value!r} is not a whole number", f"give an integer from {least} to {most}")
    if not least <= value <= most:
        raise Invalid(field, f"{value} is out of range", f"give an integer from {least} to {most}")
    return value


def human(resource: str, amount: int) -> str:
    """For messages: `1500m CPU`, `14 GB`."""
    if resource == CPU:
        return f"{amount}m CPU"
    if resource in (MEMORY, DISK):
        for size, name in ((10**12, "TB"), (10**9, "GB"), (10**6, "MB"), (10**3, "kB")):
            if amount >= size:
                return f"{round(amount / size, 1):g} {name}" + (" of disk" if resource == DISK else "")
        return f"{amount} B"
    if resource == NETWORK:
        return f"{amount} kbit/s"
    return f"{amount} {resource}"
