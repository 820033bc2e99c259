#!/usr/bin/env bash
# Lay CRIU 4.2 or later out under .novacron/criu, with the libraries it needs, where no `criu` of that age is on PATH. Nothing is installed on this machine. Needs apt and dpkg-deb, no root.
# Debian 12 has 3.17, which does not run on kernels from 6.13 on. So it is taken from Debian unstable; see beside.sh.
set -euo pipefail
cd "$(dirname "$0")/../.."
. tools/setup/beside.sh
target="$PWD/.novacron/criu"
fail() { printf 'setup: CRIU: %s; tests of checkpoints will say that they were skipped\n' "$*" >&2; exit 1; }

version_of() { "$1" --version 2>/dev/null | sed -n 's/^Version: //p'; }
new_enough() { [ -n "$1" ] && [ "$(printf '4.2\n%s\n' "$1" | sort -V | head -n 1)" = 4.2 ]; }

system="$(PATH="$PATH:/usr/local/sbin:/usr/sbin:/sbin" command -v criu || true)"
[ -z "$system" ] || ! new_enough "$(version_of "$system")" || exit 0
[ ! -x "$target/criu" ] || ! new_enough "$(version_of "$target/criu")" || exit 0

mkdir -p .novacron
fresh="$PWD/$(mktemp -d .novacron/criu.XXXXXX)"
trap 'rm -rf "$fresh"' EXIT
printf 'setup: taking CRIU and its libraries from Debian unstable (once; 20 MB)\n' >&2
fetch_beside unstable "$fresh/new" './usr/share/*
./etc/*
*/gconv/*' criu
loader="$(loader_of "$fresh/new")"
[ -n "$loader" ] && [ -x "$fresh/new/usr/sbin/criu" ] || fail "the packages do not have what was expected"
cat > "$fresh/new/criu" <<WRAPPER
#!/bin/sh
# CRIU of Debian unstable with its own C library; see tools/setup/criu.sh.
here="\$(dirname "\$(readlink -f "\$0")")"
exec "\$here/$loader" --library-path "\$here/$(dirname "$loader")" "\$here/usr/sbin/criu" "\$@"
WRAPPER
chmod 755 "$fresh/new/criu"
new_enough "$(version_of "$fresh/new/criu")" || fail "what was taken is older than 4.2"
rm -rf "$target"
mv "$fresh/new" "$target"
printf 'setup: CRIU %s is in %s\n' "$(version_of "$target/criu")" "$target" >&2
