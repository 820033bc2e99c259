"""The writer that `journal.py` kills: appends decisions, says on standard output which are durable, asks nobody.

    python -m tools.bench.journal_writer FOLDER
"""

import asyncio
import sys
from pathlib import Path

from edge_runtime.clock import SystemClock
from edge_runtime.contract.records import Record
from edge_runtime.journal import Journal, JournalSettings

WAITING_MAX = 300
"""Records that wait for their commit: enough to keep groups large."""


async def main(folder: Path) -> None:
    """Write until killed."""
    journal = Journal(JournalSettings(folder, ballast_bytes=0, min_free_bytes=0), SystemClock())
    journal.start()
    journal.grow()
    number = 0

    def durable(record: Record) -> None:
        sys.stdout.write(f"{record.seq} {record.boot} {record.body}\n")

    while True:
        for _ in range(1 + number % 40):
            journal.append("decision", "decision", {"n": number, "device": f"device-{number % 7}", "inputs": {"temp": number / 7}}, durable)
            number += 1
        await asyncio.sleep(0)
        sys.stdout.flush()
        while journal.lanes["journal"].waiting > WAITING_MAX:
            await asyncio.sleep(0.0005)


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1])))
