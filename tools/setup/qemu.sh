#!/usr/bin/env bash
# Lay QEMU 10 or later for x86-64 out under .novacron/qemu, with the libraries and firmware it needs, where no `qemu-system-x86_64` of that age is on PATH. Nothing is installed on this machine. Needs apt and dpkg-deb, no root.
# Debian 12 has 7.2, whose own live migration corrupted emulated guests in our measurements, so that it is no peer to compare with. So it is taken from Debian 13; see beside.sh.
set -euo pipefail
cd "$(dirname "$0")/../.."
. tools/setup/beside.sh
target="$PWD/.novacron/qemu"
fail() { printf 'setup: QEMU 10: %s; the tests and benchmarks that need it will say that they were skipped\n' "$*" >&2; exit 1; }

version_of() { "$1" --version 2>/dev/null | sed -n 's/^QEMU emulator version \([0-9.]*\).*/\1/p'; }
new_enough() { [ -n "$1" ] && [ "$(printf '10.0\n%s\n' "$1" | sort -V | head -n 1)" = 10.0 ]; }

system="$(command -v qemu-system-x86_64 || true)"
[ -z "$system" ] || ! new_enough "$(version_of "$system")" || exit 0
[ ! -x "$target/qemu-system-x86_64" ] || ! new_enough "$(version_of "$target/qemu-system-x86_64")" || exit 0

mkdir -p .novacron
fresh="$PWD/$(mktemp -d .novacron/qemu.XXXXXX)"
trap 'rm -rf "$fresh"' EXIT
printf 'setup: taking QEMU 10 and its libraries from Debian 13 (once; 60 MB)\n' >&2
fetch_beside trixie "$fresh/new" './usr/share/doc/*
./usr/share/man/*
./usr/share/locale/*
./etc/*
*/gconv/*' qemu-system-x86
loader="$(loader_of "$fresh/new")"
[ -n "$loader" ] && [ -x "$fresh/new/usr/bin/qemu-system-x86_64" ] || fail "the packages do not have what was expected"
cat > "$fresh/new/qemu-system-x86_64" <<WRAPPER
#!/bin/sh
# QEMU of Debian 13 with its own C library and firmware; see tools/setup/qemu.sh.
here="\$(dirname "\$(readlink -f "\$0")")"
exec "\$here/$loader" --library-path "\$here/$(dirname "$loader")" "\$here/usr/bin/qemu-system-x86_64" -L "\$here/usr/share/qemu" -L "\$here/usr/share/seabios" "\$@"
WRAPPER
chmod 755 "$fresh/new/qemu-system-x86_64"
new_enough "$(version_of "$fresh/new/qemu-system-x86_64")" || fail "what was taken is older than 10.0, or does not run"
rm -rf "$target"
mv "$fresh/new" "$target"
printf 'setup: QEMU %s is in %s\n' "$(version_of "$target/qemu-system-x86_64")" "$target" >&2
