"""How much of the free GPU is of no use to the pods that are to be expected (FGD: Weng et al., ATC'23), and how much a placement adds to it.

    F(node) = sum over typical pods m of weight_m * ( all free milli of the node, where m cannot run on it (or asks for no GPU);
                                                      else the free milli on devices with less than m asks for )

`fragmentation` and `gradient` are vectorised over nodes; `of_node` is the same for one node, for the kernels. `stranded` is ours: the free GPU that the
node's free CPU will not be enough for, at the mix's CPU per GPU. FGD sees a node as useful to a pod until the CPU is short for that very pod; this term
sees the shortage coming.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from .compiled import kernel
from .gpus import WHOLE, Ints, Kinds, Mix

SIGMOID_MILLI = 1000.0
"""FGD's scale of the gradient, milli-GPU."""

SCORE_MAX = 100.0
"""FGD's scores are whole numbers of 0 to 100. The coarseness matters: equal scores go to the first node of a fixed order, which fills nodes one after another."""


@kernel
def of_node(cpu: int, device: Any, gpus: int, model: int, mix: Any) -> float:
    """F of one node with `cpu` and `device[:gpus]` free, milli-GPU."""
    free = 0
    for d in range(gpus):
        free += device[d]
    total = 0.0
    if free == 0:
        return total
    for m in range(len(mix.weight)):
        lost = free
        if mix.num[m] > 0 and mix.access[m, model] and cpu >= mix.cpu[m]:
            enough, small = 0, 0
            for d in range(gpus):
                if device[d] >= mix.milli[m]:
                    enough += 1
                else:
                    small += device[d]
            if enough >= mix.num[m]:
                lost = small
        total += mix.weight[m] * lost
    return total


@kernel
def stranded(cpu: int, device: Any, gpus: int, ratio: float) -> float:
    """Free milli-GPU beyond what `cpu` milli-CPU serve at `ratio` milli-CPU per milli-GPU."""
    free = 0
    for d in range(gpus):
        free += device[d]
    return max(0.0, free - cpu / ratio) if ratio > 0 else 0.0


def fragmentation(cpu: Ints, device: Ints, model: Ints, mix: Mix) -> NDArray[np.float64]:
    """F `[N]` of nodes with `cpu [N]` and `device [N, D]` free (0 where a node has no such device)."""
    free = device.sum(axis=1)
    enough = device[:, None, :] >= mix.milli[None, :, None]
    small = np.where(enough, 0, device[:, None, :]).sum(axis=2)
    runs = (mix.num[None, :] > 0) & mix.access[:, model].T & (cpu[:, None] >= mix.cpu[None, :]) & ((enough & (device[:, None, :] > 0)).sum(axis=2) >= mix.num[None, :])
    lost: NDArray[np.float64] = np.where(runs, small, free[:, None]) @ mix.weight
    return lost


def after(of: Kinds, kind: int, device: Ints) -> tuple[NDArray[np.bool_], Ints]:
    """Where `kind` finds its GPUs, `[N, D]` true for each device that can be tried first, and the devices `[N, D, D]` left after that choice.

    A shared pod may go to any device with enough left; one with whole GPUs takes the first idle ones, tried as one choice under device 0.
    """
    count, size = device.shape
    left = np.repeat(device[:, None, :], size, axis=1)
    can = np.zeros((count, size), dtype=np.bool_)
    if of.num[kind] == 0:
        can[:, 0] = True
    elif of.milli[kind] < WHOLE:
        can[:] = device >= of.milli[kind]
        each = np.arange(size)
        left[:, each, each] -= of.milli[kind]
    else:
        idle = device == WHOLE
        rank = np.cumsum(idle, axis=1)
        can[:, 0] = rank[:, -1] >= of.num[kind]
        left[:, 0] = np.where(idle & (rank <= of.num[kind]), 0, device)
    return can, left


def gradient(of: Kinds, kind: int, cpu: Ints, device: Ints, model: Ints, mix: Mix) -> tuple[NDArray[np.float64], Ints]:
    """FGD's score `[N]` of placing `kind` on each node (-1 where it finds no GPU or CPU) and the device `[N]` to take for a shared one."""
    can, left = after(of, kind, device)
    can &= (cpu >= of.cpu[kind])[:, None] & of.access[kind, model][:, None]
    before = fragmentation(cpu, device, model, mix)
    scores = np.full(can.shape, -1.0)
    at, choice = np.nonzero(can)
    if len(at):
        then = fragmentation(cpu[at] - of.cpu[kind], left[at, choice], model[at], mix)
        scores[at, choice] = np.floor(SCORE_MAX / (1.0 + np.exp(-(before[at] - then) / SIGMOID_MILLI)))
    best = np.argmax(scores, axis=1)
    return scores[np.arange(len(scores)), best], best.astype(np.int64)
