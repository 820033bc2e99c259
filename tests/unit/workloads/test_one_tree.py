"""Which processes a container's state would lack: looked at while the container runs, so that some end between two looks."""

import os
import subprocess

import pytest

from edge_runtime.workloads.drivers.container_checkpoint import one_tree
from edge_runtime.workloads.drivers.face import Refused


def test_what_ended_between_two_looks_is_no_stranger_and_what_lives_is() -> None:
    one = {"pid": 121, "name": "sleep"}
    with subprocess.Popen(["sleep", "1000"]) as child:
        try:
            with pytest.raises(Refused, match=r"process 121 \(sleep\) was put into the container from outside"):
                one_tree(1, {1: {}, child.pid: one})
            one_tree(os.getpid(), {os.getpid(): {}, child.pid: one})
        finally:
            child.kill()
    one_tree(1, {1: {}, child.pid: one})
