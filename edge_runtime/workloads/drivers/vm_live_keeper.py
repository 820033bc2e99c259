"""What a virtual machine's keeper does in a move while the machine runs: at its source (`vm_leaving`), and at its target (`vm_arriving`): what both have in common. Parts of `vm_keeper`; they import nothing that would load the agent.

Between the two keepers lie three connections, which others carry from node to node (at each end a folder with a UNIX socket of each name):

    disk      QEMU's mirror of the disk, to the NBD server of the QEMU that waits
    memory    QEMU's own migration
    word      lines between the keepers: `may` from the target, `over MICROSECONDS` from the source (for which it has stood still there)

    source                                    target
    copies the disk, goes on copying          waits: its disk is written to, it has not begun
    sends memory, round after round
    nearly all is there: tells its agent      is told by its agent that it may: says `may`
    writes `left.json`; stands still
    the last of disk, memory, devices         has all of it
    says `over`; is nobody's any more         begins, once it may, has all, and heard `over`

So the target never begins before the source stands still for good, and the source says so only when QEMU has ended its part well: one that failed goes on by itself, and no `over` was said. From `may` on
only the hub knows whose the machine is: `left.json` says so to whoever looks, also where this keeper is gone. The source goes on again only where it is told to (`stay`), which the hub does when the
target has said that it never began.
"""

import os

DISK, MEMORY, WORD = CHANNELS = ("disk", "memory", "word")
"""Connections between the keepers, and the names of their sockets."""

MAY, OVER = b"may\n", b"over "
"""What the keepers say; the second one's number and its end follow."""

LEFT = "left.json"
"""In a machine's folder: another node may begin it, or has (`instance.LEFT`)."""

MIRROR = "live"
"""What the copy of the disk, and its job, are called in QEMU."""

LOOK_LIVE_S = 0.1
"""Between two looks at how much is left to send: QEMU says nothing of that by itself."""

NEAR_S = 1.0
"""So many seconds before all is there the hub is asked whether the target may begin: its word takes less. Of a machine with less memory than that it is asked at once."""

USUAL = 500_000_000
"""Bytes in a second that are believed to be carried where no limit says less."""

HOLD = 16_384
"""Bytes in a second with which what is left is sent until the target may begin: one that does nothing would be through at once, and stand still while the hub is asked. Pages of zeros go by the hundred in that: 7 MB of memory a second."""

DOWNTIME_MS = 50
"""QEMU stops the machine when what is left takes less than this."""

GRANT_S = 10.0
"""A machine that stands still, or nearly could, waits so long for its target's `may`; then it goes on here. A guest that does nothing is there at once."""

FORCE_S = 20.0
"""A machine that writes faster than the link carries is stopped so long after `may`, with whatever is left: as where it is stopped at first."""

LONGEST_MS = 2_000_000
"""QEMU's longest downtime limit: it stops at once then."""

SAY_S = 20.0
"""A word that is not taken within this, or a job that does not end, hangs."""

DRAIN_S = 60.0
"""For what the guest wrote last to reach the target, beside what its bytes take at the limit: one that stands still must not wait for a link that has died for longer."""

TIMES = 3
"""So many times as long as its bytes take at its limit the rest may take."""

MAX_WORD = 64
"""Bytes of a keeper's word, at most."""

FASTEST = 1 << 40
"""Bytes in a second where no limit was asked for."""

JOB_ENDS = ("BLOCK_JOB_COMPLETED", "BLOCK_JOB_CANCELLED")


def reach(folder: str, name: str, act: object) -> None:
    """Bind or connect (`act`) by the path of a socket, however long that is: sun_path has 108 bytes."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        act(f"/proc/self/fd/{descriptor}/{name}")  # type: ignore[operator]
    finally:
        os.close(descriptor)
