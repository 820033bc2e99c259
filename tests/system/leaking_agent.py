"""The agent with a planted leak: each connection of the uplink keeps 64 KiB for ever. Started as `python -m tests.system.leaking_agent run --config ...`."""

import sys
from typing import Any

LEAK_BYTES = 65_536


def main() -> int:
    """Plant it, then be the agent."""
    from edge_runtime.cli import main as agent
    from edge_runtime.uplink.link import Uplink

    kept: list[bytes] = []
    real = Uplink._serve

    async def planted(self: Uplink, session: Any) -> None:
        kept.append(bytes([len(kept) % 255 + 1]) * LEAK_BYTES)
        await real(self, session)

    Uplink._serve = planted  # type: ignore[method-assign]
    return agent(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
