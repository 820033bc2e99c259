"""Frames between agent, host and workers of a function, and the module that the probe runs. Without the engine: the agent imports it too."""

import struct

EXITED, TRAPPED, TIMED_OUT, REFUSED, CRASHED = 1, 2, 3, 4, 5
"""What became of a call."""

READY, OUT, ERR = 10, 11, 12
"""What a worker says besides: that the next call may come; what a job wrote."""

MAX_INPUT = 65_536
"""Bytes of a call's input: what the local API takes, and what a socket takes at once."""

ASKS = struct.Struct("!II")
"""Agent to host: milliseconds until the deadline, bytes of the input, which follow."""

ANSWERS = struct.Struct("!BBBIIII")
"""Host to agent: what became of it, whether its output was cut, whether it waited for a process to be forked; exit code, microseconds that it ran, bytes of stdout and of stderr, which follow."""

CALL = struct.Struct("!I")
"""Host to worker: bytes of the input, which follow."""

SAYS = struct.Struct("!BBIII")
"""Worker to host: what, whether something was cut, exit code, bytes of the two parts that follow: stdout, and stderr with the trap's words at its end."""

PROBE = bytes.fromhex(
    "0061736d0100000001080260000060017f0002240116776173695f736e617073686f745f70726576696577310970726f635f65786974000103020100050301000107130206"
    "6d656d6f72790200065f737461727400010a08010600410710000b"
)
"""A module that ends itself with code 7: `(import "wasi_snapshot_preview1" "proc_exit" ...) (memory (export "memory") 1) (func (export "_start") (call 0 (i32.const 7)))`."""

PROBE_MEMORY = 1 << 20
"""Bytes that it may have."""
