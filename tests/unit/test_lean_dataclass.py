"""`edge_runtime.contract.lean_dataclass` held against `dataclasses`: the same class body by either, the same behaviour."""

import copy
import dataclasses
import pickle
import subprocess
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest

from edge_runtime.contract import lean_dataclass as lean

STANDARD = SimpleNamespace(dataclass=dataclasses.dataclass, field=dataclasses.field)
BOTH = pytest.mark.parametrize("made_by", [STANDARD, lean], ids=["standard", "lean"])


def point(made_by: Any, frozen: bool) -> Any:
    @made_by.dataclass(frozen=frozen, slots=True)
    class Point:
        """A place."""

        x: int
        y: int = 2
        names: list[str] = made_by.field(default_factory=list, metadata={"doc": "what it is called"})
        secret: str = made_by.field(default="s", repr=False, compare=False)

        def sum(self) -> int:
            return self.x + self.y

    return Point


@dataclasses.dataclass(frozen=True, slots=True)
class StandardKept:
    a: int
    b: tuple[int, ...] = ()


@lean.dataclass(frozen=True, slots=True)
class LeanKept:
    a: int
    b: tuple[int, ...] = ()


def outcome(call: Callable[[], Any]) -> Any:
    """What a call gives, or how it ends."""
    try:
        return call()
    except Exception as error:
        return type(error), str(error)


CALLS: dict[str, Callable[[Any], Any]] = {
    "positions": lambda made: repr(made(1, 3, ["n"])),
    "words": lambda made: repr(made(y=5, x=1)),
    "defaults": lambda made: (made(1).y, made(1).names, made(1).secret, made(1).names is made(1).names),
    "missing": lambda made: made(),
    "unexpected": lambda made: made(1, z=3),
    "twice": lambda made: made(1, x=2),
    "too many": lambda made: made(1, 2, [], "s", 5),
    "equal": lambda made: (made(1) == made(1), made(1) == made(2), made(1) != made(2), made(1) == 1, made(1) == made(1, secret="other")),
    "hash": lambda made: hash(made(1, names=())) == hash(made(1, names=())),  # type: ignore[arg-type]
    "assign": lambda made: setattr(made(1), "x", 7),
    "delete": lambda made: delattr(made(1), "x"),
    "method": lambda made: made(1).sum(),
    "match": lambda made: made.__match_args__,
    "slots": lambda made: (made.__slots__, hasattr(made(1), "__dict__")),
    "fields": lambda made: [(item.name, item.type, item.default is dataclasses.MISSING, dict(item.metadata), item.repr, item.compare) for item in dataclasses.fields(made)],
    "fields of an object": lambda made: [item.name for item in dataclasses.fields(made(1))],
    "replace": lambda made: repr(dataclasses.replace(made(1), y=9)),
    "replace what is not there": lambda made: dataclasses.replace(made(1), nothing=9),
    "asdict": lambda made: dataclasses.asdict(made(1, names=["n"])),
    "is one": lambda made: (dataclasses.is_dataclass(made), dataclasses.is_dataclass(made(1))),
    "copies": lambda made: (copy.copy(made(1)) == made(1), copy.deepcopy(made(1, names=["n"])) == made(1, names=["n"])),
    "names": lambda made: (made.__name__, made.__qualname__, made.__module__, made.__doc__),
}


@pytest.mark.parametrize("frozen", [True, False], ids=["frozen", "open"])
@pytest.mark.parametrize("name", CALLS)
def test_a_class_behaves_as_the_standard_librarys(name: str, frozen: bool) -> None:
    call = CALLS[name]
    wanted = outcome(lambda: call(point(STANDARD, frozen)))
    assert outcome(lambda: call(point(lean, frozen))) == wanted
    used = point(lean, frozen)
    for _ in range(lean.SLOW_OBJECTS + 1):  # also once its methods are the standard library's own
        used(1)
    assert outcome(lambda: call(used)) == wanted


def test_objects_can_be_pickled_and_are_the_same_after() -> None:
    for kept in (StandardKept(1, (2,)), LeanKept(1, (2,))):
        assert pickle.loads(pickle.dumps(kept)) == kept


def test_what_is_no_field_cannot_be_assigned() -> None:
    """The standard library of Python 3.11 ends this one with a TypeError about its own `super`."""
    with pytest.raises(dataclasses.FrozenInstanceError, match="cannot assign to field 'other'"):
        LeanKept(1).other = 7  # type: ignore[attr-defined]


@BOTH
def test_methods_of_the_class_itself_stay(made_by: Any) -> None:
    @made_by.dataclass(frozen=True, slots=True)
    class Own:
        a: int

        def __init__(self, text: str) -> None:
            object.__setattr__(self, "a", int(text))

        def __repr__(self) -> str:
            return "own"

        def __eq__(self, other: object) -> bool:
            return True

        def __hash__(self) -> int:
            return 7

    made = Own("3")
    assert (made.a, repr(made), made == 5, hash(made)) == (3, "own", True, 7)


@BOTH
def test_an_own_equality_does_not_take_the_hash_away(made_by: Any) -> None:
    @made_by.dataclass(frozen=True, slots=True)
    class Equal:  # noqa: PLW1641
        a: int

        def __eq__(self, other: object) -> bool:
            return isinstance(other, Equal)

    assert hash(Equal(1)) == hash(Equal(1)) and Equal(1) == Equal(2)


@BOTH
def test_definitions_that_cannot_be(made_by: Any) -> None:
    with pytest.raises(TypeError):
        @made_by.dataclass(slots=True)
        class Behind:
            a: int = 1
            b: int

    with pytest.raises((TypeError, ValueError)):
        @made_by.dataclass(slots=True)
        class Shared:
            a: list[int] = []


def test_what_is_not_supported_is_refused() -> None:
    with pytest.raises(TypeError, match="without slots"):
        lean.dataclass(slots=False)
    with pytest.raises(TypeError, match="kw_only"):
        lean.field(kw_only=True)
    with pytest.raises(TypeError, match="base class"):
        lean.dataclass(slots=True)(type("Below", (LeanKept,), {"__annotations__": {"c": int}}))


@pytest.mark.parametrize("hint", [ClassVar[int], "ClassVar[int]", ClassVar, dataclasses.InitVar[int], dataclasses.InitVar, "InitVar[int]"])
def test_what_is_no_field_is_refused(hint: object) -> None:
    with pytest.raises(TypeError, match="ClassVar"):
        lean.dataclass(slots=True)(type("Odd", (), {"__annotations__": {"a": int, "b": hint}}))


@pytest.mark.parametrize("hint", [int, "int", dict[str, int], int | None, Callable[[], int], pytest.Item])
def test_any_other_hint_is_one(hint: object) -> None:
    made: Any = lean.dataclass(slots=True)(type("Even", (), {"__annotations__": {"a": hint}}))
    assert made.__match_args__ == ("a",)


def test_methods_are_made_when_they_are_called_and_not_before() -> None:
    made = point(lean, True)
    for _ in range(lean.SLOW_OBJECTS):
        assert made(1).sum() == 3
    assert lean.is_lean(made) and lean.metadata_of(made)["names"] == {"doc": "what it is called"} and lean.metadata_of(made)["x"] == {}
    assert isinstance(vars(made)["__repr__"], lean._Later) and vars(made)["__init__"].slow
    assert made(1).sum() == 3
    assert not hasattr(vars(made)["__init__"], "slow") and isinstance(vars(made)["__repr__"], lean._Later)
    assert "x=1" in repr(made(1)) and not isinstance(vars(made)["__repr__"], lean._Later)


def test_many_objects_do_without_the_standard_library() -> None:
    code = (
        "import sys; from edge_runtime.contract import lean_dataclass as lean\n"
        "@lean.dataclass(slots=True, frozen=True)\nclass Many:\n    a: int\n    b: list = lean.field(default_factory=list)\n    c: int = 3\n"
        "made = [Many(1, c=4) for _ in range(20)]\n"
        "print([(one.a, one.b, one.c) for one in made] == [(1, [], 4)] * 20, made[8].b is not made[9].b, 'dataclasses' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "True True False"


def test_a_start_makes_no_methods_for_the_configuration() -> None:
    code = (
        "import sys; from edge_runtime.config import load_config, schema; load_config(None, {}); from edge_runtime.contract import lean_dataclass as lean\n"
        "print([name for name, kind in vars(schema).items() if lean.is_lean(kind) and not getattr(vars(kind)['__init__'], 'slow', False)], 'dataclasses' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[] False"
