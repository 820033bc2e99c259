"""Which of a sender's extents a GPU codes, and who does it once that fails: the processors, in the same format, so that nothing is lost and nobody at the other end can tell."""

import time
from collections.abc import Callable, Mapping, Sequence

from . import choice, codecs, extents
from .choice import Model
from .codecs import LIKE, ON_GPU, Coder
from .errors import DeviceFailed
from .extents import Elsewhere, Encoded, Sorted
from .outlet import Ready
from .transforms import Facts
from .transforms.gpu import Slot
from .transforms.nvcomp import Nvcomp

WORTH_FROM = 64 << 10
"""Bytes to be coded of an extent from which it goes to the GPU: a chunk of few keeps one of its multiprocessors waiting as long as one of many."""


def names_for(asked: Sequence[str], coder: Nvcomp | None) -> Sequence[str]:
    """What is chosen from: with a GPU that codes, its coders too where none were asked for by name. Raises DeviceFailed where one is asked for that is not there."""
    wanted = [name for name in asked if name in ON_GPU]
    if coder is None:
        if wanted:
            raise DeviceFailed(f"codecs: {', '.join(wanted)} run on a GPU by nvCOMP, which is not in use; give --transforms gpu, and see what that says")
        return asked
    missing = [name for name in wanted if name not in coder.rates]
    if missing:
        raise DeviceFailed(f"codecs: {'; '.join(f'{name}: {coder.refused.get(name, coder.name)}' for name in missing)}; give others")
    return (*asked, *(name for name in choice.FREE_ON_GPU if name in coder.rates)) if tuple(asked) == choice.FREE else asked


def by_processor(coder: Coder) -> Coder:
    """The processor's coder that takes a GPU's place; any other is itself."""
    return codecs.BY_NAME[LIKE[coder.name]] if coder.name in LIKE else coder


class Offload:
    """Shared by a sender's encoders."""

    def __init__(self, coder: Nvcomp, model: Model) -> None:
        """Tells the model what the coders were measured at."""
        self._coder, self._model = coder, model
        self.failed: str | None = None
        """Why the GPU codes no more."""
        model.with_device(coder.rates)

    @property
    def name(self) -> str:
        """What codes, and how it ended where it did."""
        return f"{self._coder.name}, then cpu: {self.failed}" if self.failed is not None else f"{self._coder.name}: {', '.join(self._coder.rates)}"

    def leave(self, reason: str) -> None:
        """No more of it: from the next choice on the processors code all."""
        if self.failed is None:
            self.failed = reason
        self._model.without_device()

    def _takes(self, coder: Coder, found: Sorted) -> bool:
        """Whether that is for the GPU."""
        return self.failed is None and coder.name in ON_GPU and len(found.plain) >= WORTH_FROM

    def encode(
        self, slot: Slot, held: Sequence[tuple[int, memoryview, memoryview | None]], facts: Sequence[Facts | None], spent: float,
        effort: Callable[[int], tuple[bool, Elsewhere | None]], put: Callable[[Ready], bool],
    ) -> bool:
        """Encode a slot's extents, which are there in that order, by the model's choice, and `put` each; False once that does. `spent`: seconds of this thread that each took so far; `effort`: of an
        extent, whether to be thorough, and what its pages may refer to."""
        waiting: dict[str, dict[int, tuple[Sorted, float]]] = {}
        for n, ((index, data, base), known) in enumerate(zip(held, facts, strict=True)):
            began = time.thread_time() - spent
            thorough, elsewhere = effort(index)
            found = extents.sort(index, data, base=base, facts=known, elsewhere=elsewhere, sealed=True, thorough=thorough)
            if isinstance(found, Encoded):
                encoded = found
            elif not len(found.plain):
                encoded = extents.code(found, codecs.CODERS[0])
            else:
                self._model.scanned(len(data), time.thread_time() - began)
                guess = choice.guess_of(found.plain)
                coder = self._model.choose(len(data), len(found.plain), guess)
                if self._takes(coder, found):
                    waiting.setdefault(coder.name, {})[n] = found, guess
                    continue
                chosen_at = time.thread_time()
                encoded = extents.code(found, by_processor(coder))
                if encoded.plain >= choice.LEARN_FROM:
                    self._model.coded(encoded.coder, encoded.plain, encoded.coded, time.thread_time() - chosen_at, guess)
            if not put(Ready(index, encoded)):
                return False
        return all(put(Ready(found.index, encoded)) for name, which in waiting.items() for (found, _), encoded in zip(which.values(), self._code(slot, name, which), strict=True))

    def _code(self, slot: Slot, name: str, which: Mapping[int, tuple[Sorted, float]]) -> list[Encoded]:
        """Encode these extents of a slot, by their place in it, each with the ratio that a sample of it had; in their order. By the processor where the GPU fails."""
        began = time.thread_time()
        try:
            coded, on_device = self._coder.compress(slot, name, {n: found for n, (found, _) in which.items()})
        except DeviceFailed as error:
            self.leave(str(error))
            coder = codecs.BY_NAME[LIKE[name]]
            return [extents.code(found, coder) for found, _ in which.values()]
        made = [extents.pack(found, ON_GPU[name], section) for (found, _), section in zip(which.values(), coded, strict=True)]
        total = sum(len(found.plain) for found, _ in which.values())
        share = (time.thread_time() - began) / total
        self._model.coded_there(name, total, on_device)
        for (found, guess), section in zip(which.values(), coded, strict=True):
            self._model.coded(name, len(found.plain), len(section), share * len(found.plain), guess)
        return made
