"""From a workload of kind `vm` to what its machine is: all checks of the document. Pure.

    boot          `bios`, `uefi` or `kernel`; without it `kernel` where the image has boot/vmlinuz, else `bios`
    arguments     of the kernel, for `kernel`; without it what boot/cmdline of the image says
    cpus          processors; without it as many as `requests.cpu` asks for, rounded up
    hostname      told to cloud-init; without it made of the workload's id
    cloud_init    {"user_data": text, "network_config": text}, as cloud-init's data source NoCloud takes them
    network       as a container's (`network`), or {"tap": "br0"}: a port of a bridge of the node, which its configuration must name
    template      the guest says when it may be copied (see `vm_templates`): what starts later is a copy of it
    when_moved    `reconnect`: of one that has a network, it may be moved with its state though its connections do not go with it
    boot_s        seconds within which the guest must have written to its serial console, else it does not boot; 0: it need not
"""

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .face import Order, Refused
from .network import Network, Port, network
from .vm_machine import BIOS, BOOTS, KERNEL, UEFI, Shape

KEYS = ("arguments", "boot", "boot_s", "cloud_init", "cpus", "hostname", "network", "template", "when_moved")

RECONNECT = "reconnect"
"""Of `when_moved`: what runs in it connects anew."""

DEFAULT_MEMORY, MIN_MEMORY = 256 << 20, 64 << 20
"""Bytes of a guest's memory where `requests.memory` does not say, and the least with which a Linux of a distribution starts."""

MAX_CPUS = 16
"""Processors of one guest."""

BOOT_S, MAX_BOOT_S = 60.0, 120.0
"""Within which a guest must be seen to boot: under emulation it takes 2 to 15 s. The runner gives a start 150 s in all."""

MAX_TEXT = 16_384
"""Characters of a text for cloud-init: a workload's document has no more."""

MAX_ARGUMENTS = 2000
"""Characters of a kernel's arguments: x86 takes 2,047."""

INNER = 20_000
"""First of the ports by which what comes in for the guest passes between the two network programs: none of them needs a right."""

_HOST = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?\Z")


@dataclass(frozen=True, slots=True)
class Offer:
    """What an image and a host have.

    Attributes:
        kernel: the image has a kernel.
        arguments: those of its kernel.
        bytes: of its disk, as a guest sees it.
        uefi: there is firmware of the kind here.
        accelerator, cpus, memory: of the host; bytes.
        publish: addresses on which ports may be published; None where no machine gets a network, and `no_network` says why.
        bridges: of the node, to which machines may be connected.
    """

    kernel: bool
    arguments: str
    bytes: int
    uefi: bool
    accelerator: str
    cpus: int
    memory: int
    publish: Sequence[str] | None
    no_network: str = ""
    bridges: Sequence[str] = ()


@dataclass(frozen=True, slots=True)
class Vm:
    """One machine: its shape, bytes of its disk, what its kernel and cloud-init are told, its network, whether it is copied from a template, within which seconds it must be seen to boot."""

    shape: Shape
    disk_bytes: int
    arguments: str
    hostname: str
    cloud_init: Mapping[str, str]
    network: Network | None
    template: bool
    boot_s: float
    bridge: str = ""
    """The bridge of which its network card is a port; empty: it is none."""

    @property
    def forwards(self) -> list[tuple[str, int, int]]:
        """Protocol, port beside QEMU, port in the guest."""
        return [(port.protocol, INNER + at, port.port) for at, port in enumerate(self.network.ports)] if self.network is not None else []

    @property
    def outside(self) -> Network:
        """What leads from the node to the ports beside QEMU."""
        ports = self.network.ports if self.network is not None else ()
        return Network(tuple(Port(port.address, port.host_port, INNER + at, port.protocol) for at, port in enumerate(ports)))


def machine(order: Order, offer: Offer) -> Vm:
    """All of it. Raises `Refused`."""
    spec = order.spec
    if odd := sorted(map(str, set(spec) - set(KEYS))):
        raise Refused(f"spec.{odd[0][:40]}", "is not known to the driver of virtual machines", f"leave it out; known are {', '.join(KEYS)}")
    boot = spec.get("boot", KERNEL if offer.kernel else BIOS)
    if boot not in BOOTS:
        raise Refused("spec.boot", f"{str(boot)[:40]!r} is unknown", f"use one of {', '.join(BOOTS)}")
    if boot == KERNEL and not offer.kernel:
        raise Refused("spec.boot", "is kernel, and the image has no boot/vmlinuz", "put a kernel into the image, or boot from its disk (bios)")
    if boot == UEFI and not offer.uefi:
        raise Refused("spec.boot", "is uefi, for which this node has no firmware", "as root: apt install ovmf; or boot by bios")
    arguments = _text(spec.get("arguments", offer.arguments), "spec.arguments", MAX_ARGUMENTS)
    if arguments and boot != KERNEL and "arguments" in spec:
        raise Refused("spec.arguments", f"are for a kernel that is given to the machine, and it boots by {boot}", "leave them out, or boot by kernel")
    memory = order.requests.get("memory", 0) or DEFAULT_MEMORY
    if memory < MIN_MEMORY:
        raise Refused("requests.memory", f"{memory} bytes are too few for a kernel of its own", f"ask for {MIN_MEMORY} or more")
    if memory > offer.memory:
        raise Refused("requests.memory", f"{memory} bytes are more than this node has", "ask for less, or place it on a larger node")
    most = min(MAX_CPUS, offer.cpus)
    cpus = spec.get("cpus", max(1, -(-order.requests.get("cpu", 0) // 1000)))
    if not isinstance(cpus, int) or isinstance(cpus, bool) or not 1 <= cpus <= most:
        raise Refused("spec.cpus", f"{str(cpus)[:40]} processors cannot be had: a machine here has 1 to {most}", "ask for fewer, or place it on a larger node")
    asked = order.requests.get("disk", 0)
    if asked and asked < offer.bytes:
        raise Refused("requests.disk", f"{asked} bytes are too few: the image's disk has {offer.bytes}", f"ask for {offer.bytes} or more")
    bridge = _bridge(spec, offer)
    wanted = None if bridge else _network(spec, offer)
    if spec.get("when_moved", RECONNECT) != RECONNECT:
        raise Refused("spec.when_moved", f"{str(spec['when_moved'])[:40]!r} is unknown", f"say {RECONNECT}, or leave it out")
    template = spec.get("template", False)
    if not isinstance(template, bool):
        raise Refused("spec.template", f"{str(template)[:40]!r} is neither true nor false", "say true where the guest tells when it may be copied")
    if template and bridge:
        raise Refused("spec.template", "cannot be had of a machine on a bridge: all copies would have one hardware address", "leave out one of the two")
    return Vm(
        Shape(-(-memory // (1 << 20)), cpus, boot, wanted is not None or bool(bridge), offer.accelerator), -(-max(asked, offer.bytes) // 512) * 512, arguments, _hostname(spec, order.key.id), _cloud_init(spec), wanted, template, _boot_s(spec),
        bridge,
    )


def _bridge(spec: Mapping[str, Any], offer: Offer) -> str:
    """The bridge that `spec.network` names; empty where it names none."""
    told = spec.get("network")
    if not isinstance(told, Mapping) or "tap" not in told:
        return ""
    if odd := sorted(map(str, set(told) - {"tap"})):
        raise Refused(f"spec.network.{odd[0][:40]}", "is not for a port of a bridge, behind which a machine has an address of its own", "leave it out")
    if told["tap"] not in offer.bridges:
        raise Refused("spec.network.tap", f"{str(told['tap'])[:40]!r} is no bridge of this node to which machines may be connected", "have the node's operator make it and name it in workloads.bridges, or place it on a node that has it")
    return str(told["tap"])


def hardware_address(workload: str) -> str:
    """Of a machine on a bridge: made of the workload's id, so that it keeps it wherever it moves; of the range for own use, by 46 bits of a hash, so that no two of a site are the same."""
    told = bytearray(hashlib.blake2b(workload.encode(), digest_size=6).digest())
    told[0] = told[0] & 0xFC | 0x02
    return ":".join(f"{byte:02x}" for byte in told)


def _network(spec: Mapping[str, Any], offer: Offer) -> Network | None:
    if "network" in spec and offer.publish is None:
        raise Refused("spec.network", f"cannot be had on this node: {offer.no_network}", "leave it out, or place it on a node that has it")
    return network(spec.get("network"), offer.publish or ())


def _hostname(spec: Mapping[str, Any], workload: str) -> str:
    hostname = _text(spec.get("hostname", ""), "spec.hostname", 63) or re.sub(r"[^a-z0-9]+", "-", workload.lower()).strip("-")[:63].rstrip("-") or "vm"
    if not _HOST.match(hostname):
        raise Refused("spec.hostname", f"{hostname[:80]!r} is no host name", "use up to 63 small letters, digits and -")
    return hostname


def _cloud_init(spec: Mapping[str, Any]) -> dict[str, str]:
    told, known = spec.get("cloud_init", {}), ("network_config", "user_data")
    if not isinstance(told, Mapping) or (odd := sorted(map(str, set(told) - set(known)))):
        raise Refused("spec.cloud_init" if not isinstance(told, Mapping) else f"spec.cloud_init.{odd[0][:40]}", "is not known", f"give an object with some of {', '.join(known)}")
    return {name: _text(value, f"spec.cloud_init.{name}", MAX_TEXT) for name, value in told.items()}


def _boot_s(spec: Mapping[str, Any]) -> float:
    seconds = spec.get("boot_s", BOOT_S)
    if not isinstance(seconds, int | float) or isinstance(seconds, bool) or not 0 <= seconds <= MAX_BOOT_S:
        raise Refused("spec.boot_s", f"{str(seconds)[:40]} is no number of seconds from 0 to {MAX_BOOT_S:g}", "give more memory or processors to what takes longer, or 0 where it writes nothing to its serial console")
    return float(seconds)


def _text(value: Any, field: str, most: int) -> str:
    if not isinstance(value, str) or "\0" in value or len(value) > most:
        raise Refused(field, f"is no text of up to {most} characters without zero bytes", "write it as text")
    return value
