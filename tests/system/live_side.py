"""One end of a guest's move as a process that kills itself at a step: python live_side.py send QMP HOST:PORT STEP | receive FOLDER HOST:PORT STEP QEMU..."""

import dataclasses
import json
import os
import signal
import sys
from pathlib import Path

from gpu_migration import keys, qemu_source, qemu_target


def die_at(step: str) -> None:
    if step == sys.argv[4]:
        os.kill(os.getpid(), signal.SIGKILL)


def main() -> None:
    host, _, port = sys.argv[3].rpartition(":")
    key, address = keys.load_key(None), (host, int(port))
    if sys.argv[1] == "send":
        result = qemu_source.Source(Path(sys.argv[2]), key, address, qemu_source.Options(progress=die_at)).move()
        print(json.dumps(dataclasses.asdict(result)))
    else:
        target = qemu_target.Target(Path(sys.argv[2]), key, address, sys.argv[5:], progress=die_at)
        print(f"{target.address[0]}:{target.address[1]}", flush=True)
        print(json.dumps(dataclasses.asdict(target.serve())))


if __name__ == "__main__":
    main()
