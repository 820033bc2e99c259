"""What stands against a hot conversion, looked at while the workload runs and before anything is touched. Pure, but for what it is given."""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from ..drivers.face import Refused

HWCAPS = {
    "avx512f": "AVX512F", "avx512vl": "AVX512VL", "avx512bw": "AVX512BW", "avx512dq": "AVX512DQ", "avx512cd": "AVX512CD", "xsavec": "XSAVEC", "avx2": "AVX2", "avx": "AVX", "erms": "ERMS", "fsrm": "FSRM", "bmi1": "BMI1",
    "bmi2": "BMI2", "rtm": "RTM", "movbe": "MOVBE", "fma": "FMA", "popcnt": "POPCNT", "lzcnt": "LZCNT", "abm": "LZCNT",
}
"""Features of a processor by which the C library chooses code when a program starts, as the kernel and as glibc call them (sysdeps/x86/cpu-features.c)."""

TUNABLES, OPENSSL, BIND = "GLIBC_TUNABLES", "OPENSSL_ia32cap", "LD_BIND_NOW"
"""Variables that keep a program from what only one of its processors has."""

OPENSSL_MASK = ":~0x700f0230000"
"""libcrypto's word for the features of CPUID 7: without AVX-512 in all its kinds, and without SHA and VAES code that needs them."""


def masks(host: Iterable[str], guest: Iterable[str], given: Mapping[str, str]) -> dict[str, str]:
    """Variables that a program has to be started with, so that it uses nothing that the guest's processor lacks. `given`: what its order says, which is kept."""
    lacking = sorted({HWCAPS[flag] for flag in set(host) - set(guest) if flag in HWCAPS})
    found = {BIND: "1", OPENSSL: OPENSSL_MASK}
    if lacking:
        own = given.get(TUNABLES, "")
        if "glibc.cpu.hwcaps" in own:
            raise Refused(f"spec.env.{TUNABLES}", "sets glibc.cpu.hwcaps, which a workload that is converted needs for itself", "leave it out")
        found[TUNABLES] = ":".join(filter(None, (own, "glibc.cpu.hwcaps=" + ",".join(f"-{name}" for name in lacking))))
    return {**{name: given.get(name, value) for name, value in found.items()}, **({TUNABLES: found[TUNABLES]} if lacking else {})}


def processor(host: Iterable[str], guest: Iterable[str], environments: Mapping[int, Mapping[str, str]]) -> list[str]:
    """Raises `Refused` where a process was started without a mask for what the guest's processor lacks; returns the lacking features for which there is none."""
    lacking = sorted(set(host) - set(guest))
    for pid, environment in environments.items():
        found = re.search(r"glibc\.cpu\.hwcaps=([^:]*)", environment.get(TUNABLES, ""))
        off = {one[1:] for one in found[1].split(",") if one.startswith("-")} if found else set()
        bare = [flag for flag in lacking if flag in HWCAPS and HWCAPS[flag] not in off]
        if bare:
            raise Refused(
                "resource.processor", f"process {pid} may use what the guest's processor lacks, and was not started so that it does not: {', '.join(bare)}",
                f"start the workload anew as one that is to be converted (it then has {TUNABLES}), or leave the variable as it is",
            )
        if lacking and OPENSSL not in environment:
            raise Refused("resource.processor", f"process {pid} was started without {OPENSSL}: a library of its may use what the guest's processor lacks", "start the workload anew as one that is to be converted")
    return [flag for flag in lacking if flag not in HWCAPS]


def mounts(spec: Mapping[str, Any]) -> None:
    """Raises `Refused` for what a guest does not share with the node."""
    for mount in spec.get("mounts") or ():
        if "tmpfs" not in mount:
            raise Refused("spec.mounts", f"{str(mount.get('target'))[:80]!r} is a folder of the node, which a guest does not share", "put the data into the image, or leave it a container")


def elsewhere(groups: str, want: str, unified: bool) -> str:
    """The control group that a process is in and should not be; empty where it is in that of its workload. A guest has one for all of them.

    Args:
        groups: what /proc/PID/cgroup says.
        unified: it is version 2 that holds them; else what that says is no concern.
    """
    for line in groups.splitlines():
        controllers, path = line.split(":", 2)[1:]
        if path != want and (not controllers if unified else {"memory", "pids", "freezer", "cpu"} & set(controllers.split(","))):
            return path
    return ""


def devices(mountinfo: str) -> list[list[str]]:
    """Where devices of the host are mounted in a container, and which. Raises `Refused` for mounts that CRIU could not make in a guest."""
    found = []
    for entry in mountinfo.splitlines():
        left, _, right = entry.partition(" - ")
        words, kind = left.split(), right.split(" ", 1)[0]
        if kind == "devtmpfs":
            found.append([words[4], f"/dev{words[3]}"])
        elif kind not in ("overlay", "proc", "tmpfs", "devpts", "sysfs", "mqueue"):
            raise Refused("resource.mount", f"{words[4][:80]} is a mount of kind {kind[:40]}, which a guest does not have", "leave it out")
    return found
