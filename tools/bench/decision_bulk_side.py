"""The agent of `decision_bulk`: as it is, and beside it an image is taken into a store on its disk, and removed, again and again, as when workloads come and go. `UNPACED` in the environment: written as it comes (the planted bug)."""

import asyncio
import os
import sys
from pathlib import Path

from edge_runtime.cli import main
from edge_runtime.runtime import EdgeRuntime
from edge_runtime.system import disk_pace
from edge_runtime.workloads.images import ImageStore, Limits


def take(folder: Path, image: Path, said: Path) -> None:
    """Once; says so in a file, with a line."""
    store = ImageStore(folder, limits=Limits(keep_free=0))
    store.remove(store.add(image, "bulk:1").digest)
    store.prune(0, ())
    store.close()
    with open(said, "a") as handle:
        handle.write("taken\n")


async def take_all_the_time(top: Path) -> None:
    while True:
        await asyncio.to_thread(take, top / "store", Path(os.environ["BULK_IMAGE"]), top / "taken")


class Bulk(EdgeRuntime):
    """An agent that is never done with images."""

    async def start(self) -> None:
        await super().start()
        self.bulk = asyncio.get_running_loop().create_task(take_all_the_time(Path(os.environ["BULK_FOLDER"])), name="bulk")


if __name__ == "__main__":
    if os.environ.get("UNPACED"):
        disk_pace.Pace.wrote = lambda self, descriptor, count: None  # type: ignore[method-assign]
    import edge_runtime.runtime

    edge_runtime.runtime.EdgeRuntime = Bulk  # type: ignore[misc]
    sys.exit(main())
