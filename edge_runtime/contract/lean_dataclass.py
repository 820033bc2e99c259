"""`dataclass`, whose methods are made when something first asks for them.

The standard library writes the source of up to eight methods of each data class and compiles it, when its module is imported: a fifth of the agent's start, most of it for
methods that a device never calls. Here a class gets its slots when it is defined and nothing else; the standard library makes the methods, in another class of the same fields
from which they are taken, once one of them is called, so they are its own, word for word. Only `__init__` is not: it has a slow form, which serves the first few objects, as a class of
settings, of which there is one, never needs another; then it is compiled here.

To a type checker they are the standard library's. What works with those works with these: `fields`, `replace`, `asdict`, `is_dataclass`, `copy`, `pickle`; `is_lean` and `metadata_of` answer without making
anything, and so does `__match_args__`, the fields' names.
What no class of ours needs is refused: fields of a base class, of `ClassVar` and `InitVar`, `init`, `kw_only`; a class without slots.
"""

import sys
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

SLOW_OBJECTS = 6
"""Objects of a class that are made the slow way. Compiling a class's methods takes as long as making some thirty."""


def is_lean(kind: object) -> bool:
    """Whether this is a class that was made here."""
    return isinstance(kind, type) and "__making__" in vars(kind)


def metadata_of(cls: type) -> dict[str, Mapping[str, Any]]:
    """What each field of a class that was made here was given as `metadata`, by the field's name."""
    making = vars(cls)["__making__"]
    return {name: making.words.get(name, {}).get("metadata", {}) for name in making.names}


if TYPE_CHECKING:
    from dataclasses import dataclass as dataclass
    from dataclasses import field as field
else:

    _NONE = object()
    """Stands for an argument that was not given."""

    _PLAIN = (type, type(list[int]), type(int | None))
    """Kinds of annotations whose text need not be looked at."""

    def _is_no_field(hint: object) -> bool:
        """Whether an annotation is one of `ClassVar` or `InitVar`."""
        return (type(hint) not in _PLAIN and ("ClassVar" in str(hint) or "InitVar" in str(hint))) or getattr(hint, "__name__", "") == "InitVar"

    class _Given:
        """What `field` was given."""

        __slots__ = ("words",)

        def __init__(self, words: dict[str, Any]) -> None:
            self.words = words

    def field(**words: Any) -> Any:
        """As `dataclasses.field`: `default`, `default_factory`, `metadata`, `repr`, `compare`, `hash`."""
        if refused := words.keys() & {"init", "kw_only"}:
            raise TypeError(f"field: {', '.join(sorted(refused))} is not supported here; use dataclasses")
        return _Given(words)

    def dataclass(*, slots: bool, frozen: bool = False) -> Callable[[type], type]:
        """As `dataclasses.dataclass(slots=True, frozen=...)`. Raises TypeError for what is not supported."""
        if not slots:
            raise TypeError("a class without slots is not supported here; use dataclasses")
        return lambda cls: _Making(cls, frozen).made

    class _Later:
        """Stands where a class has an attribute that is made on first use."""

        __slots__ = ("making", "name")

        def __init__(self, making: "_Making", name: str) -> None:
            self.making, self.name = making, name

        def __get__(self, instance: object, owner: type) -> Any:
            self.making.finish()
            return getattr(self.making.made if instance is None else instance, self.name)

    class _Making:
        """One class: what its methods will be made of."""

        __slots__ = ("defaults", "factories", "frozen", "given", "left", "made", "names", "taken", "words")

        def __init__(self, cls: type, frozen: bool) -> None:
            space = dict(vars(cls))
            hints = cls.__annotations__
            if any("__dataclass_fields__" in vars(base) for base in cls.__mro__[1:]) or any(_is_no_field(hint) for hint in hints.values()) or "__post_init__" in space:
                raise TypeError(f"{cls.__qualname__}: fields of a base class, ClassVar, InitVar and __post_init__ are not supported here; use dataclasses")
            self.frozen, self.left, self.names = frozen, SLOW_OBJECTS, tuple(hints)
            self.given = {name: space.pop(name) for name in hints if name in space}
            self.words = words = {name: value.words if isinstance(value, _Given) else {"default": value} for name, value in self.given.items()}
            self.defaults = {name: of["default"] for name, of in words.items() if "default" in of}
            self.factories = {name: of["default_factory"] for name, of in words.items() if "default_factory" in of}
            bare = False
            for name in self.names:
                bare = bare or name in self.defaults or name in self.factories
                if bare and name not in self.defaults and name not in self.factories:
                    raise TypeError(f"{cls.__qualname__}: field {name} without a default follows one with a default")
                if type(self.defaults.get(name)).__hash__ is None:
                    raise TypeError(f"{cls.__qualname__}: field {name} has a default that can change; give a default_factory")
            hashed = space.get("__hash__")
            if hashed is None:  # as `dataclasses` has it: who cannot change and is compared by its fields is hashed by them
                space.pop("__hash__", None)
            laters = ["__repr__", "__eq__", "__dataclass_fields__", "__dataclass_params__", *(("__hash__",) if frozen and hashed is None else ()), *(("__replace__",) if sys.version_info >= (3, 13) else ())]
            self.taken = [name for name in laters if name not in space]
            space.update((name, _Later(self, name)) for name in self.taken)
            if not frozen and hashed is None:
                space["__hash__"] = None
            space.setdefault("__match_args__", self.names)
            if "__init__" not in space:
                space["__init__"] = _slow_init(self)
            if frozen:
                space.update(_frozen(self))
            for name in ("__dict__", "__weakref__"):
                space.pop(name, None)
            space["__slots__"], space["__making__"] = self.names, self
            self.made: type = type(cls)(cls.__name__, cls.__bases__, space)
            self.made.__qualname__ = cls.__qualname__

        def finish(self) -> None:
            """The standard library's methods."""
            import dataclasses

            made = self.made
            own = {"__module__": made.__module__, "__qualname__": made.__qualname__, "__doc__": made.__doc__ or made.__name__, "__annotations__": made.__annotations__}
            given = {name: dataclasses.field(**value.words) if isinstance(value, _Given) else value for name, value in self.given.items()}
            like = dataclasses.dataclass(frozen=self.frozen)(type(made.__name__, (), {**given, **own}))
            for name in self.taken:
                if isinstance(vars(made)[name], _Later):
                    setattr(made, name, vars(like)[name])
            if getattr(vars(made)["__init__"], "slow", False):
                made.__init__ = like.__init__  # type: ignore[misc]

    def _slow_init(making: _Making) -> Callable[..., None]:
        names, defaults, factories, put = making.names, making.defaults, making.factories, object.__setattr__

        def __init__(self: Any, *args: Any, **words: Any) -> None:  # noqa: N807
            making.left -= 1
            values = {**defaults, **dict(zip(names, args, strict=False)), **words}
            for name, factory in factories.items():
                if name not in values:
                    values[name] = factory()
            if making.left == -1:
                made_init = _quick_init(making)
                if vars(making.made)["__init__"].__dict__.get("slow"):
                    making.made.__init__ = made_init  # type: ignore[misc]
                made_init(self, *args, **words)
                return
            if len(values) != len(names) or len(args) > len(names) or any(name in words for name in names[:len(args)]) or not all(name in values for name in names):
                making.finish()  # it says what is wrong with these arguments
                making.made.__init__(self, *args, **words)
                return
            for name in names:
                put(self, name, values[name])

        __init__.slow = True
        return __init__

    def _quick_init(making: _Making) -> Callable[..., None]:
        """What the standard library would compile, without loading it: some twenty modules come with it, and the classes of which a start makes many would ask for nothing else of it."""
        space: dict[str, Any] = {"__put": object.__setattr__, "__none": _NONE}
        words, lines = [], []
        for number, name in enumerate(making.names):
            value = name
            if name in making.factories:
                space[f"__{number}"] = making.factories[name]
                words.append(f"{name}=__none")
                value = f"__{number}() if {name} is __none else {name}"
            elif name in making.defaults:
                space[f"__{number}"] = making.defaults[name]
                words.append(f"{name}=__{number}")
            else:
                words.append(name)
            lines.append(f" __put(__self, {name!r}, {value})" if making.frozen else f" __self.{name} = {value}")
        exec("\n".join([f"def __init__({', '.join(['__self', *words])}):", *lines]), space)
        made: Callable[..., None] = space["__init__"]
        made.__qualname__ = f"{making.made.__qualname__}.__init__"
        return made

    def _frozen(making: _Making) -> dict[str, Callable[..., Any]]:
        """What keeps an object as it is, and lets it be copied."""

        def __setattr__(self: Any, name: str, value: object) -> None:  # noqa: N807
            if type(self) is making.made or name in making.names:
                _refuse("assign to", name)
            super(making.made, self).__setattr__(name, value)

        def __delattr__(self: Any, name: str) -> None:  # noqa: N807
            if type(self) is making.made or name in making.names:
                _refuse("delete", name)
            super(making.made, self).__delattr__(name)

        def __getstate__(self: Any) -> list[Any]:  # noqa: N807
            return [getattr(self, name) for name in making.names]

        def __setstate__(self: Any, state: list[Any]) -> None:  # noqa: N807
            for name, value in zip(making.names, state, strict=True):
                object.__setattr__(self, name, value)

        return {"__setattr__": __setattr__, "__delattr__": __delattr__, "__getstate__": __getstate__, "__setstate__": __setstate__}

    def _refuse(what: str, name: str) -> None:
        from dataclasses import FrozenInstanceError

        raise FrozenInstanceError(f"cannot {what} field {name!r}")
