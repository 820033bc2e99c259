"""Numba where it is installed, plain Python where it is not: the kernels are one source, so both give the same results.

The kernels use only loops over numpy arrays, int64 and float64, and their own random numbers (`lehmer`), which is what makes that true.
Set `NOVACRON_NUMBA=off` to run without; the compiled code is kept in numba's cache beside the modules or in the user's cache folder.
"""

import os
from collections.abc import Callable
from typing import Any, TypeVar

Function = TypeVar("Function", bound=Callable[..., Any])

COMPILED: bool
"""Whether numba compiles the kernels in this process."""


def _plain(function: Function) -> Function:
    return function


if os.environ.get("NOVACRON_NUMBA", "on") == "off":
    kernel: Callable[[Any], Any] = _plain
    COMPILED = False
else:
    try:
        from numba import njit
    except ImportError:
        kernel, COMPILED = _plain, False
    else:
        COMPILED = True

        def kernel(function: Any) -> Any:
            """Compile at first use; without a folder for the cache, once per process."""
            try:
                return njit(cache=True, nogil=True)(function)
            except RuntimeError:
                return njit(nogil=True)(function)


MODULUS = 2_147_483_647
"""2**31 - 1, a prime: the modulus of the Lehmer generator of Park and Miller (CACM 1988)."""

MULTIPLIER = 48_271
"""Their later choice of multiplier; state * MULTIPLIER stays below 2**47, exact in int64 in numba and in numpy alike."""


@kernel
def lehmer(state: Any) -> int:
    """Step the generator whose state is `state[0]` (1 .. MODULUS-1); the new state is the number drawn."""
    state[0] = state[0] * MULTIPLIER % MODULUS
    return state[0]  # type: ignore[no-any-return]
