"""The agent as it is shipped but for two sizes, so that a short recording meets what otherwise comes once in hours: checkpoints of the WAL,
reservations of sequence numbers. Started as `python -m tools.powercut.small_agent run --config ...`."""

import functools
import sys

SMALL_WAL_BYTES = 96 * 1024
"""A WAL of 24 pages: a checkpoint about every dozen commits."""

SMALL_RESERVE = 40
"""Sequence numbers reserved at once: a new reservation after some forty records."""


def shrink() -> None:
    """Give the composition root surroundings with these sizes."""
    from edge_runtime import runtime
    from edge_runtime.surroundings import Surroundings

    runtime.Surroundings = functools.partial(Surroundings, wal_bytes=SMALL_WAL_BYTES, reserve_block=SMALL_RESERVE)  # type: ignore[attr-defined, assignment]


def main() -> int:
    """Be the agent."""
    from edge_runtime.cli import main as agent

    shrink()
    return agent(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
