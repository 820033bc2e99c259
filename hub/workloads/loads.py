"""What starts took, as edges measured it: by image and node, and what a start is expected to take where none was measured. Pure."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import numpy as np

from ..scheduler import State
from ..scheduler.functions import Floats, cold_ms_of
from ..scheduler.rank import BEST, View
from ..scheduler.reasons import Ints

MAX_IMAGES = 1_024
"""Images of which times are known; the one that was heard of least lately is forgotten beyond it."""

LATEST = 8
"""Times of one image on one node that count: what was measured before the last changes of either says little."""

Times = Mapping[str, tuple[float, ...]]
"""Node to its latest times, ms."""


class LoadTimes:
    """Measured load times. What is read is never changed in place, so a thread may read while another observes."""

    def __init__(self) -> None:
        self._images: Mapping[str, Times] = MappingProxyType({})
        self._speeds: dict[str, float] = {}
        self._arrays: dict[str, tuple[Mapping[str, Times], int, Floats]] = {}

    def observe(self, image: str, node: str, load_ms: float) -> None:
        """A start of `image` on `node` took so long, ms; what is no time is ignored."""
        if not image or not 0 < load_ms < float("inf"):
            return
        images = dict(self._images)
        times = dict(images.pop(image, {}))
        times[node] = (*times.get(node, ())[1 - LATEST:], float(load_ms))
        images[image] = times
        while len(images) > MAX_IMAGES:
            del images[next(iter(images))]
        self._images, self._speeds, self._arrays = images, speeds(images), {}

    def cold_ms(self, image: str) -> float | None:
        """What a start of an image takes, over the nodes where it was measured; None where it was not."""
        times = self._images.get(image)
        return None if times is None else float(np.mean([cold_ms_of(each) for each in times.values()]))

    def measured_ms(self, image: str, node: str) -> float | None:
        """What its starts took there."""
        times = self._images.get(image, {}).get(node)
        return None if times is None else float(np.mean(times))

    def expected_ms(self, image: str, state: State) -> Floats | None:
        """[node] what a start would take: as measured there, else the image's time over all, times how much slower the node loaded other images. None where nothing is known of the image."""
        known, size = self._images, len(state.nodes)
        mean = self.cold_ms(image)
        if mean is None or image not in known:
            return None
        kept = self._arrays.get(image)
        if kept is not None and kept[0] is known and kept[1] == size and len(kept[2]) == state.size:
            return kept[2]
        found = np.full(state.size, mean)
        for node, speed in self._speeds.items():
            if node in state.node_index:
                found[state.node_index[node]] = mean * speed
        for node, times in known[image].items():
            if node in state.node_index:
                found[state.node_index[node]] = sum(times) / len(times)
        self._arrays[image] = (known, size, found)
        return found

    def score(self, view: View) -> Ints | None:
        """The policy `cold_start`: 100 where a start is expected to take least, and in proportion less elsewhere: twice the time is 50. What is a few percent apart stays so."""
        expected = self.expected_ms(view.klass.shape.image, view.state)
        if expected is None or not view.feasible.any():
            return None
        found: Ints = np.minimum(BEST, BEST * expected[view.feasible].min() / expected).astype(np.int64)
        return found


def speeds(images: Mapping[str, Times]) -> dict[str, float]:
    """Node to how many times longer loads take there than elsewhere: the geometric mean over the images that were measured there and elsewhere."""
    ratios: dict[str, list[float]] = {}
    for times in images.values():
        if len(times) > 1:
            means: dict[str, Any] = {node: np.log(sum(each) / len(each)) for node, each in times.items()}
            middle = sum(means.values()) / len(means)
            for node, mean in means.items():
                ratios.setdefault(node, []).append(mean - middle)
    return {node: float(np.exp(sum(each) / len(each))) for node, each in ratios.items()}
