"""Many edges in one process, for `many_edges`: each is an agent's own runtime with its own journal and link; only their interpreter is shared, and their bus and local API are off.

Reads words from its input, a line each, and answers each with one line of JSON: `state`, `quiet` (no more readings), `end`.
"""

import argparse
import asyncio
import json
import logging
import random
import resource
import sys
from pathlib import Path
from typing import Any

from edge_runtime.config import EdgeConfig
from edge_runtime.config.schema import ApiConfig, BusConfig, DecisionsConfig, DevicesConfig, HostConfig, JournalConfig, UplinkConfig
from edge_runtime.contract.streams import STREAMS
from edge_runtime.runtime import EdgeRuntime
from edge_runtime.surroundings import Surroundings

RULE: dict[str, Any] = {
    "id": "hot", "on": {"device": "boiler", "metric": "temp"}, "trigger": "each", "if": {"value": "temp", "op": ">", "than": 80},
    "then": [{"alert": {"severity": "info", "text": "{device} at {temp}"}}],
}

HOT = 0.1
"""Share of the readings that are decided on: each reading is a record, and each of these is two more."""

AUTHORITY = "authority"
"""The name of who vouches for all, and of its certificate's file."""

WAL_BYTES = 64 << 10
"""What each of an edge's two write-ahead logs is grown to: a thousand of an agent's own 4 MiB would not fit into memory."""


def name_of(number: int) -> str:
    """Of an edge, and of its certificate's files."""
    return f"edge-{number:05}"


def uplink(name: str, port: int, certificates: str) -> UplinkConfig:
    """Its way to the hub."""
    if not certificates:
        return UplinkConfig(url=f"mqtt://127.0.0.1:{port}", backoff_base_s=0.5, backoff_cap_s=5.0)
    ca, cert, key = (f"{certificates}/{file}" for file in (f"{AUTHORITY}.pem", f"{name}.pem", f"{name}.key"))
    return UplinkConfig(url=f"mqtts://127.0.0.1:{port}", ca_file=ca, cert_file=cert, key_file=key, backoff_base_s=0.5, backoff_cap_s=5.0)


class Edge:
    """One of them."""

    def __init__(self, number: int, folder: Path, port: int, certificates: str) -> None:
        self.name = name_of(number)
        config = EdgeConfig(
            edge_id=self.name, region=f"region-{number % 3}", site=f"site-{number % 40}", node=self.name, data_dir=str(folder / self.name), bus=BusConfig(enabled=False), api=ApiConfig(enabled=False),
            journal=JournalConfig(ballast_bytes=0, min_free_bytes=0, target_hours=0, retain_receipted_records=10_000_000), devices=DevicesConfig(host=HostConfig(enabled=False)), decisions=DecisionsConfig(rules=(RULE,)),
            uplink=uplink(self.name, port, certificates),
        )
        self.runtime = EdgeRuntime(config, surroundings=Surroundings(settle=lambda: None, tidy=lambda: None, wal_bytes=WAL_BYTES, told=""))
        self.readings = 0

    async def read(self, every_s: float, quiet: asyncio.Event) -> None:
        """Readings, each at a moment of its own."""
        draw = random.Random(self.name)
        await asyncio.sleep(draw.uniform(0, every_s))
        while not quiet.is_set():
            self.readings += 1
            self.runtime.pipeline.host_reading("boiler", {"temp": 90.0 if draw.random() < HOT else 20.0, "n": self.readings})
            await asyncio.sleep(every_s)

    def waiting(self) -> int:
        """Records that the hub is not known to have."""
        journal = self.runtime.journal
        return sum(journal.durable(stream) - journal.marks(stream).receipted for stream in STREAMS)

    def linked(self) -> bool:
        """Whether it has its hub."""
        return not self.runtime.is_offline()


async def serve(options: argparse.Namespace) -> None:
    """Until `end`."""
    edges = [Edge(number, options.folder, options.port, options.certificates) for number in range(options.first, options.first + options.count)]
    quiet = asyncio.Event()
    for edge in edges:
        await edge.runtime.start()
    readings = [asyncio.create_task(edge.read(options.every, quiet)) for edge in edges]
    reader = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    while word := (await reader.readline()).decode().strip():
        if word == "quiet":
            quiet.set()
            await asyncio.gather(*readings)
            for edge in edges:
                await edge.runtime.journal.flush()
        elif word == "end":
            for edge in edges:
                await edge.runtime.stop("bench")
        state = {"linked": sum(edge.linked() for edge in edges), "waiting": sum(edge.waiting() for edge in edges), "readings": sum(edge.readings for edge in edges)}
        print(json.dumps(state), flush=True)
        if word == "end":
            return


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--first", type=int, required=True)
    parser.add_argument("--count", type=int, required=True)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--certificates", default="", help="their folder, where TLS is spoken")
    parser.add_argument("--every", type=float, required=True, help="seconds between two readings of an edge")
    options = parser.parse_args()
    logging.basicConfig(level=logging.ERROR)  # each says when its hub is away, as it should
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))  # a dozen files for each edge
    asyncio.run(serve(options))
    return 0


if __name__ == "__main__":
    sys.exit(main())
