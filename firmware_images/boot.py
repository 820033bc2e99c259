"""`python -m firmware_images boot`: the image in QEMU, its console shown, its interface on a port of loopback."""

import argparse
import secrets
import socket
import urllib.parse
from collections.abc import Callable, Collection, Mapping
from datetime import datetime
from pathlib import Path

from . import broker, configuration, recipes, room, tools
from .build import Built, finished, output, sources
from .errors import FirmwareError
from .layout import BROKER_FILES, ESP_NAME, PROVISIONED
from .machine import HERE, Machine, Wiring, command, free_port, kvm_boots, prepare, require
from .recipes import Architecture, Profile

LOOPBACK = "127.0.0.1"

API_PORT = 8470
"""The agent's default (`api.port`)."""

MEMORY_LEAST_MIB, MEMORY_MOST_MIB = 128, 1 << 20

PLAIN = """edge_id: {name}
uplink: {uplink}
{bus}api: {{host: 0.0.0.0, token_file: /var/lib/novacron/config/api.token}}
decisions:
  rules:
    - {{id: awake, "on": {{device: host, metric: uptime_seconds}}, if: {{value: uptime_seconds, op: ">", than: 0}}, trigger: each,
       then: [{{alert: {{severity: info, text: "up for {{uptime_seconds}} s"}}}}]}}
"""
"""What a device gets that is booted without a configuration: it decides at each look at itself, and asks for a token."""

OWN_BUS = f"bus: {{url: 'mqtt://{LOOPBACK}:{broker.PORT}'}}\n"
"""Its bus where its image has a broker."""

ALONE = "{enabled: false}"
"""Its uplink where it is given no hub: it works alone."""

GIVEN = "edge.yaml"
"""File of a machine's folder: the configuration that it is given."""


def plain(name: str, hub: str = "", bus: bool = False) -> str:
    """The configuration of a device that is given none; `hub` is the address of a hub's broker, one on this machine's loopback as the guest sees it; `bus`: its image has a broker, which it listens to. Raises FirmwareError."""
    own = OWN_BUS if bus else ""
    if not hub:
        return PLAIN.format(name=name, uplink=ALONE, bus=own)
    parts = urllib.parse.urlsplit(hub)
    try:
        usable = parts.scheme in ("mqtt", "mqtts") and parts.hostname and not set(hub) & set(" \"{}") and (parts.port or True)
    except ValueError:
        usable = False
    if not usable:
        raise FirmwareError("hub", f"{hub!r} is no address of a broker", "give mqtt://HOST:PORT, as the hub's start prints it")
    host = parts.hostname or ""
    if host.startswith(configuration.LOOPBACK) or host == "::1":
        before, at, _ = parts.netloc.rpartition("@")
        hub = parts._replace(netloc=f"{before}{at}{HERE}{f':{parts.port}' if parts.port else ''}").geturl()
    return PLAIN.format(name=name, uplink=f'{{url: "{hub}"}}', bus=own)


def settle(state: Path, text: str) -> Path:
    """The file of a machine's configuration, with this text from now on. Raises FirmwareError where a machine that has been started would not take it."""
    if "," in str(state):
        raise FirmwareError("state", f"{state} has a comma, which QEMU takes for the end of a name", "give another one with --state")
    kept = state / GIVEN
    if (state / "disk.img").exists() and kept.exists() and (was := configuration.name_in(kept.read_text())) != (wanted := configuration.name_in(text)):
        raise FirmwareError("config", f"edge_id is {wanted}, and the machine in {state} is {was}, its journal with it", f"give another folder with --state, or remove {state}")
    room.ready(state, "state", "--state")
    kept.touch(0o600)  # it may have a password
    kept.write_text(text)
    return kept


def taken(chosen: Profile) -> tuple[str, ...]:
    """Names of the files that a device with an image of this profile takes over."""
    return (*PROVISIONED, *BROKER_FILES) if "broker" in chosen.extra else PROVISIONED


def credentials(state: Path, config: Path | None, more: list[str], report: bool, name: str, names: Collection[str] = PROVISIONED) -> tuple[dict[str, Path], str]:
    """Files to hand to the machine, by credential, and the token of its interface. `names`: what it takes. Raises FirmwareError."""
    found: dict[str, Path] = {}
    for word in more:
        key, equals, path = word.partition("=")
        if not equals or not key.startswith("novacron.") or not Path(path).is_file():
            raise FirmwareError("credential", f"{word!r} cannot be used", "give NAME=FILE, NAME beginning with novacron., FILE an existing file")
        if key.removeprefix("novacron.") not in names:
            raise FirmwareError("credential", f"a device takes no {key}", f"give novacron. and one of {', '.join(names)}")
        found[key] = Path(path).resolve()
    token_file = state / "api.token"
    if not token_file.exists():
        token_file.touch(0o600)
        token_file.write_text(secrets.token_hex(16))
    found.setdefault("novacron.api.token", token_file.resolve())
    if config is None:
        config = state / GIVEN
        config.write_text(plain(name))
    found["novacron.edge.yaml"] = config.resolve()
    if report:
        (state / "report").write_text("1")
        found["novacron.report"] = (state / "report").resolve()
    return found, found["novacron.api.token"].read_text().strip()


def hand_over(arch: Architecture, built: Built, disk: Path, found: Mapping[str, Path]) -> Mapping[str, Path]:
    """Put files into the folder `novacron` of the boot partition of a machine's own disk, where its QEMU has no other way to it; what is left for `Wiring.credentials`. Raises FirmwareError."""
    if arch.fw_cfg:
        return found
    tools.require(["mcopy"])
    for name, path in found.items():
        tools.run(["mcopy", "-o", "-i", f"{disk}@@{built.manifest['partitions'][ESP_NAME]['start']}", str(path), f"::/novacron/{name.removeprefix('novacron.')}"], field="credential", remedy="see mcopy's words", env={"MTOOLS_SKIP_CHECK": "1"})
    return {}


def usable_port(port: int, option: str = "port") -> int:
    """The port of loopback that was asked for by that option, a free one for 0. Raises FirmwareError where it is none or taken."""
    if port == 0:
        return free_port()
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as QEMU does: connections that have ended do not hold it
        try:
            sock.bind((LOOPBACK, port))
        except OverflowError:
            raise FirmwareError(option, f"{port}", f"give 1 to 65535, or leave --{option} out") from None
        except OSError as error:
            raise FirmwareError(option, f"{port} of {LOOPBACK} cannot be had ({error.strerror})", f"give another one, or leave --{option} out") from None
    return port


def check_clock(text: str) -> None:
    """Raises FirmwareError where QEMU would not take it as a machine's clock."""
    for form in ("%Y-%m-%d", "%Y-%m-%dT%H:%M:%S"):
        try:
            datetime.strptime(text, form)
        except ValueError:
            continue
        return
    raise FirmwareError("clock", f"{text[:40]!r} is no date", "give one such as 1970-01-02 or 1970-01-02T03:04:05")


def boot(options: argparse.Namespace, arch: Architecture, chosen: Profile, say: Callable[[str], None]) -> None:
    """Boot and show the console until the machine ends or Ctrl-C takes its power away. Raises FirmwareError."""
    memory = options.memory or recipes.memory_mib(arch, chosen)
    if not MEMORY_LEAST_MIB <= memory <= MEMORY_MOST_MIB:
        raise FirmwareError("memory", f"{memory} MiB", f"give {MEMORY_LEAST_MIB} to {MEMORY_MOST_MIB}")
    port = usable_port(options.port)
    bus = "broker" in chosen.extra
    if not bus and options.devices_port:
        raise FirmwareError("devices-port", f"an image of {chosen.name} has no broker", "leave --devices-port out, or take --profile gateway")
    devices = usable_port(options.devices_port, "devices-port") if bus else 0
    if options.clock:
        check_clock(options.clock)
    name = f"{chosen.name}-{arch.name}"
    state = options.state or output(options.home, arch, chosen) / "machine"
    if options.config is not None:
        if options.hub:
            raise FirmwareError("hub", "--hub and --config are both given", "write the hub's broker into the configuration (uplink.url), or leave --config out")
        config = configuration.check(options.config, bus)
        if not (state / "disk.img").exists():  # one that has been started has kept its files too
            configuration.check_files(config, {"api.token", *(word.partition("=")[0].removeprefix("novacron.") for word in options.credential)})
    again = options.config is None and not options.hub and (state / "disk.img").exists() and (state / GIVEN).exists()  # it goes on with what it has
    text = (state / GIVEN).read_text() if again else plain(name, options.hub, bus) if options.config is None else options.config.read_text()
    built = finished(options.home, arch, chosen)
    require(arch)
    given = settle(state, text)
    configuration.check(given, bus)
    if not (state / "disk.img").exists() and built.manifest.get("sources") != sources(options.home):
        say(f"this image is of other code than what is here: python -m firmware_images build --arch {arch.name} --profile {chosen.name} makes it anew")
    disk, flash = prepare(arch, built.image, state, options.disk)
    handed, token = credentials(state, given, options.credential, options.report, name, taken(chosen))
    say(f"the device's interface: curl -H 'Authorization: Bearer {token}' http://{LOOPBACK}:{port}/api/v1/decisions   (Ctrl-C takes the power away)")
    if bus:
        say(f"devices reach its broker at mqtts://{LOOPBACK}:{devices}, once it has been given passwords and a certificate (firmware_images/README.md, Devices of a gateway)")
    accelerator = options.accel
    if accelerator == "auto":
        why = kvm_boots(arch, built.image.with_name("linux"), built.image.with_name("initrd"))
        accelerator = "tcg" if why else "kvm"
        say(f"emulated: {why}" if why else "with KVM")
    wiring = Wiring(memory, {port: API_PORT} | ({devices: broker.DEVICES_PORT} if bus else {}), hand_over(arch, built, disk, handed), online=options.online or bool(options.hub), clock=options.clock, accelerator=accelerator)
    with Machine(command(arch, disk, flash, wiring), say) as machine:
        if status := machine.wait():
            raise FirmwareError("machine", f"QEMU ended with status {status}", "its reason is in the lines above")
