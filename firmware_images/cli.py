"""`python -m firmware_images build|boot|bundle|containers`."""

import argparse
import errno
import re
import sys
from pathlib import Path

from . import recipes
from .errors import FirmwareError

HOME = Path(".novacron/images")
"""Where caches and images are kept."""

FULL = frozenset((errno.ENOSPC, errno.EDQUOT))
DISK_REFUSES = FULL | {errno.EACCES, errno.EPERM, errno.EROFS, errno.EIO}
"""What a disk says that is fine when the work begins and not any more later: no fault of this program's, so it is told in a line as other input is."""


def say(text: str) -> None:
    """Progress, for people."""
    print(text, file=sys.stderr, flush=True)


def main(arguments: list[str] | None = None) -> int:
    """The command; returns the exit status: 2 for input that cannot be used."""
    parser = argparse.ArgumentParser(prog="firmware_images", description="bootable images of the edge")
    commands = parser.add_subparsers(dest="command", required=True)
    build = commands.add_parser("build", help="make an image")
    boot = commands.add_parser("boot", help="boot an image in QEMU")
    bundle = commands.add_parser("bundle", help="make an update of a built image")
    oci = commands.add_parser("containers", help="make images of containers of edge and hub, as OCI layouts")
    for command in (build, boot, bundle, oci):
        command.add_argument("--arch", default="amd64", help=f"{', '.join(recipes.ARCHITECTURES)} (amd64)")
        command.add_argument("--home", type=Path, default=HOME, help=f"folder of caches and images ({HOME})")
    build.add_argument("--sequence", type=int, default=0, help="grows with each release: devices take no update that is not newer than what they run (0)")
    build.add_argument("--variant", default="", metavar="NAME", help="put the image into HOME/ARCH-PROFILE-NAME")
    bundle.add_argument("--variant", default="", metavar="NAME", help="of the image in HOME/ARCH-PROFILE-NAME")
    bundle.add_argument("--base", type=Path, metavar="FOLDER", help="make a delta: folder of the image that the devices run")
    bundle.add_argument("--key", type=Path, help="Ed25519 private key, PEM (HOME/keys/update.key, which this home's images trust)")
    bundle.add_argument("--tries", type=int, default=3, help="starts that the new image gets to prove itself (3)")
    bundle.add_argument("--gate", type=int, default=300, metavar="SECONDS", help="time after a start within which its agent must have proven itself (300)")
    bundle.add_argument("--output", type=Path, required=True, help="the bundle's file")
    for command in (build, oci):
        command.add_argument("--refresh", action="store_true", help="ask Debian anew which packages there are")
    for command in (build, boot, bundle):
        command.add_argument("--profile", default="device", help=f"{', '.join(recipes.PROFILES)} (device)")
    oci.add_argument("--service", default="all", help="edge, hub (both)")
    oci.add_argument("--mode", default="production", help="production, development (production)")
    boot.add_argument("--config", type=Path, help="configuration that the machine is given (the one that it has; at its first boot a small one that shows the device by itself)")
    boot.add_argument("--hub", default="", metavar="URL", help="broker of a hub, such as mqtt://127.0.0.1:1883 (make run prints its own): the small configuration with this hub; the device reaches the network")
    boot.add_argument("--credential", action="append", default=[], metavar="NAME=FILE", help="one more credential, such as novacron.ca.pem=ca.pem")
    boot.add_argument("--state", type=Path, help="folder of the machine's own disk; where there is one, the machine goes on from it (HOME/ARCH-PROFILE/machine)")
    boot.add_argument("--disk", type=int, default=0, metavar="MIB", help="make the machine's own disk as large, as if the image had been written to one: the data partition gets the rest")
    boot.add_argument("--memory", type=int, help="MiB (what the profile is made for)")
    boot.add_argument("--port", type=int, default=0, help="port on loopback that leads to the device's interface (a free one)")
    boot.add_argument("--devices-port", type=int, default=0, metavar="PORT", help="port on loopback that leads to the broker of a gateway, for its devices (a free one)")
    boot.add_argument("--online", action="store_true", help="let the device reach the network")
    boot.add_argument("--clock", default="", metavar="DATE", help="start with a wrong clock, such as 1970-01-02")
    boot.add_argument("--accel", default="auto", choices=("auto", "tcg", "kvm"), help="auto: kvm where this image's kernel really boots with it, else emulated (auto)")
    boot.add_argument("--report", action="store_true", help="the device tells on its console how the start went")
    options = parser.parse_args(arguments)
    try:
        arch = recipes.architecture(options.arch)
        if options.command == "containers":
            from . import containers

            for service in containers.SERVICES.values() if options.service == "all" else (containers.service(options.service),):
                containers.build(options.home, arch, service, options.mode, say, options.refresh)
            return 0
        chosen = recipes.profile(options.profile)
        if options.command == "build":
            from .build import build as make

            if not 0 <= options.sequence <= 9_999_999_999:
                raise FirmwareError("sequence", f"{options.sequence}", "give 0 to 9999999999")
            if options.variant and not re.fullmatch(r"[a-z0-9.]{1,32}", options.variant):
                raise FirmwareError("variant", f"{options.variant[:40]!r} is no name", "use a-z 0-9 and .")
            make(options.home, arch, chosen, say, options.refresh, options.sequence, options.variant)
        elif options.command == "bundle":
            from .build import output
            from .bundles import bundle as pack

            made = pack(output(options.home, arch, chosen, options.variant), options.base, options.key or options.home / "keys" / "update.key", options.output, tries=options.tries, gate_s=options.gate)
            say(f"{made.path}: {made.size / 1e6:.2f} MB, {made.saved / 1e6:.1f} MB come from what runs")
        else:
            from .boot import boot as start

            start(options, arch, chosen, say)
    except FirmwareError as error:
        print(error, file=sys.stderr)
        return 2
    except OSError as error:
        if error.errno not in DISK_REFUSES:
            raise
        print(FirmwareError("space" if error.errno in FULL else "files", f"{error.filename or 'a file'} cannot be written or read ({error.strerror})", "make room, or give another folder (--home, --state, --output)"), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0
