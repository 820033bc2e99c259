"""Bytes like those of a guest's memory, of every class of page, for the migration tests."""

import random

from hypothesis import strategies as st

PAGE = 4096


def page(kind: str, rng: random.Random) -> bytes:
    """One page."""
    if kind == "zero":
        return bytes(PAGE)
    if kind == "const":
        return rng.randbytes(8) * (PAGE // 8)
    if kind == "random":
        return rng.randbytes(PAGE)
    if kind == "almost zero":
        out = bytearray(PAGE)
        out[rng.randrange(PAGE)] = 1 + rng.randrange(255)
        return bytes(out)
    words = [b"device", b"edge", b"value", b"\0\0\0\0", rng.randbytes(3)]
    return b" ".join(rng.choice(words) for _ in range(PAGE))[:PAGE]


KINDS = ("zero", "const", "random", "almost zero", "text")


def memory(pages: int, seed: int, kinds: tuple[str, ...] = KINDS, repeats: float = 0.2) -> bytes:
    """So many pages; some repeat an earlier one."""
    rng = random.Random(seed)
    out: list[bytes] = []
    for _ in range(pages):
        out.append(rng.choice(out) if out and rng.random() < repeats else page(rng.choice(kinds), rng))
    return b"".join(out)


def changed(data: bytes, seed: int, share: float = 0.3) -> bytes:
    """The same later: some pages a little other, some wholly, some moved."""
    rng = random.Random(seed)
    out = bytearray(data)
    for start in range(0, len(out), PAGE):
        if rng.random() < share:
            how = rng.randrange(3)
            end = min(start + PAGE, len(out))
            if how == 0:
                out[rng.randrange(start, end)] ^= 1 + rng.randrange(255)
            elif how == 1:
                out[start:end] = page(rng.choice(KINDS), rng)[: end - start]
            else:
                other = rng.randrange(0, max(1, len(data) // PAGE)) * PAGE
                out[start:end] = (data[other : other + PAGE] + bytes(PAGE))[: end - start]
    return bytes(out)


@st.composite
def contents(draw: st.DrawFn, pages_max: int = 12) -> bytes:
    """Memory of a few pages, the last perhaps not whole."""
    data = memory(draw(st.integers(1, pages_max)), draw(st.integers(0, 2**32)), tuple(draw(st.lists(st.sampled_from(KINDS), min_size=1, max_size=5))))
    return data[: len(data) - draw(st.sampled_from((0, 0, 1, 777, 4095)))]
