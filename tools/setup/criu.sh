#!/usr/bin/env bash
# Lay CRIU 4.2 or later out under .novacron/criu, with the libraries it needs, where no `criu` of that age is on PATH. Nothing is installed on this machine. Needs apt and dpkg-deb, no root.
# Debian 12 has 3.17, which does not run on kernels from 6.13 on. So it is taken from Debian unstable, by apt with folders of its own: what is taken has the hashes of an index that Debian's
# archive key has signed. The names and hashes of what was taken are kept in .novacron/criu/packages.
set -euo pipefail
cd "$(dirname "$0")/../.."
target="$PWD/.novacron/criu"
fail() { printf 'setup: CRIU: %s; tests of checkpoints will say that they were skipped\n' "$*" >&2; exit 1; }

version_of() { "$1" --version 2>/dev/null | sed -n 's/^Version: //p'; }
new_enough() { [ -n "$1" ] && [ "$(printf '4.2\n%s\n' "$1" | sort -V | head -n 1)" = 4.2 ]; }

system="$(PATH="$PATH:/usr/local/sbin:/usr/sbin:/sbin" command -v criu || true)"
[ -z "$system" ] || ! new_enough "$(version_of "$system")" || exit 0
[ ! -x "$target/criu" ] || ! new_enough "$(version_of "$target/criu")" || exit 0

keyring=/usr/share/keyrings/debian-archive-keyring.gpg
for tool in apt-get dpkg dpkg-deb tar; do command -v "$tool" >/dev/null 2>&1 || fail "$tool is missing"; done
[ -r "$keyring" ] || fail "$keyring is missing (apt install debian-archive-keyring)"
architecture="$(dpkg --print-architecture)"

mkdir -p .novacron
work="$(mktemp -d .novacron/criu.XXXXXX)"
work="$PWD/$work"
trap 'rm -rf "$work"' EXIT
mkdir -p "$work"/apt/{state/lists/partial,cache/archives/partial,etc/parts,etc/trusted,etc/preferences} "$work/new"
: > "$work/apt/status"
printf 'deb [signed-by=%s] %s unstable main\n' "$keyring" "${NOVACRON_DEBIAN:-http://deb.debian.org/debian}" > "$work/apt/etc/sources.list"
# Check-Valid-Until: an index of unstable is valid for a week; a mirror that is behind, or a clock that is ahead, is no reason against it.
cat > "$work/apt/apt.conf" <<CONF
Dir "$work/apt";
Dir::State "state";
Dir::State::status "$work/apt/status";
Dir::Cache "cache";
Dir::Etc "etc";
Dir::Etc::Main "none";
Dir::Etc::Parts "parts";
Dir::Etc::SourceList "$work/apt/etc/sources.list";
Dir::Etc::SourceParts "none";
Dir::Etc::Trusted "none";
Dir::Etc::TrustedParts "trusted";
Dir::Etc::Preferences "none";
Dir::Etc::PreferencesParts "preferences";
APT::Architecture "$architecture";
APT::Architectures "$architecture";
APT::Install-Recommends "false";
APT::Sandbox::User "";
APT::Get::AllowUnauthenticated "false";
Acquire::AllowInsecureRepositories "false";
Acquire::Check-Valid-Until "false";
Acquire::Languages "none";
Acquire::Retries "2";
CONF
export APT_CONFIG="$work/apt/apt.conf" LC_ALL=C
printf 'setup: taking CRIU and its libraries from Debian unstable (once; 20 MB)\n' >&2
apt-get -qq update >"$work/said" 2>&1 || fail "the index of Debian unstable could not be had: $(grep -m 1 '^[EW]:' "$work/said" || echo 'is the network there?')"
apt-get -qq -y --download-only install criu >"$work/said" 2>&1 || fail "the packages could not be had: $(grep -m 1 '^E:' "$work/said" || true)"

for package in "$work"/apt/cache/archives/*.deb; do
  printf '%s %s\n' "$(sha256sum "$package" | cut -d' ' -f1)" "$(basename "$package")" >> "$work/new/packages"
  dpkg-deb --fsys-tarfile "$package" | tar -x -C "$work/new" --no-same-owner --exclude='./usr/share/*' --exclude='./etc/*' --exclude='*/gconv/*' || fail "$(basename "$package") could not be unpacked"
done
loader="$(cd "$work/new" && find usr/lib -name 'ld-linux-*.so.*' -path '*-linux-gnu*' | head -n 1)"
[ -n "$loader" ] && [ -x "$work/new/usr/sbin/criu" ] || fail "the packages do not have what was expected"
cat > "$work/new/criu" <<WRAPPER
#!/bin/sh
# CRIU of Debian unstable with its own C library; see tools/setup/criu.sh.
here="\$(dirname "\$(readlink -f "\$0")")"
exec "\$here/$loader" --library-path "\$here/$(dirname "$loader")" "\$here/usr/sbin/criu" "\$@"
WRAPPER
chmod 755 "$work/new/criu"
new_enough "$(version_of "$work/new/criu")" || fail "what was taken is older than 4.2"
rm -rf "$target"
mv "$work/new" "$target"
printf 'setup: CRIU %s is in %s\n' "$(version_of "$target/criu")" "$target" >&2
