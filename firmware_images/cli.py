"""`python -m firmware_images build|boot`."""

import argparse
import sys
from pathlib import Path

from . import recipes
from .errors import FirmwareError

HOME = Path(".novacron/images")
"""Where caches and images are kept."""


def say(text: str) -> None:
    """Progress, for people."""
    print(text, file=sys.stderr, flush=True)


def main(arguments: list[str] | None = None) -> int:
    """The command; returns the exit status: 2 for input that cannot be used."""
    parser = argparse.ArgumentParser(prog="firmware_images", description="bootable images of the edge")
    commands = parser.add_subparsers(dest="command", required=True)
    build = commands.add_parser("build", help="make an image")
    boot = commands.add_parser("boot", help="boot an image in QEMU")
    for command in (build, boot):
        command.add_argument("--arch", default="amd64", help=f"{', '.join(recipes.ARCHITECTURES)} (amd64)")
        command.add_argument("--profile", default="device", help=f"{', '.join(recipes.PROFILES)} (device)")
        command.add_argument("--home", type=Path, default=HOME, help=f"folder of caches and images ({HOME})")
    build.add_argument("--refresh", action="store_true", help="ask Debian anew which packages there are")
    options = parser.parse_args(arguments)
    try:
        arch, chosen = recipes.architecture(options.arch), recipes.profile(options.profile)
        from .build import build as make

        make(options.home, arch, chosen, say, options.refresh)
    except FirmwareError as error:
        print(error, file=sys.stderr)
        return 2
    return 0
