#!/usr/bin/env bash
# Lay Docker 26 and Compose 2 out under .novacron/docker, where there is no `dockerd` with a Compose 2 on PATH. Nothing is installed and no daemon is started on this machine. Needs apt and dpkg-deb, no root.
# Debian 12 has Compose 1, which does not know our compose.yaml's form. So it is taken from Debian 13; see beside.sh. Programs in Go start themselves anew by /proc/self/exe, so they run with this machine's C library, which
# has to be of Debian 12 or later; iptables has its own.
set -euo pipefail
cd "$(dirname "$0")/../.."
. tools/setup/beside.sh
target="$PWD/.novacron/docker"
fail() { printf 'setup: Docker: %s; the test that brings compose.yaml up will say that it was skipped\n' "$*" >&2; exit 1; }

whole() { { docker compose version --short || docker-compose version --short; } 2>/dev/null | grep -Eq '^v?([2-9]|[1-9][0-9]+)\.' && command -v dockerd containerd iptables >/dev/null; }

! (PATH="$PATH:/usr/sbin:/sbin" whole) || exit 0
! (PATH="$target/bin:$PATH" whole) || exit 0

mkdir -p .novacron
fresh="$PWD/$(mktemp -d .novacron/docker.XXXXXX)"
trap 'rm -rf "$fresh"' EXIT
printf 'setup: taking Docker and Compose from Debian 13 (once; 90 MB)\n' >&2
fetch_beside trixie "$fresh/new" './usr/share/*
./etc/*
./var/*
*/gconv/*
*/systemd/*' docker.io docker-cli docker-compose
loader="$(loader_of "$fresh/new")"
bin="$fresh/new/bin"
rm -rf "$bin"
mkdir "$bin"
for name in dockerd docker docker-proxy docker-init docker-compose containerd containerd-shim-runc-v2; do
  found="$(cd "$fresh/new" && find usr -name "$name" -type f | head -n 1)"
  [ -n "$found" ] || found="$(cd "$fresh/new" && find usr -name "$name" | head -n 1)"
  [ -n "$found" ] || fail "the packages do not have $name"
  ln -s "../$found" "$bin/$name"
done
[ -n "$loader" ] && [ -x "$fresh/new/usr/sbin/xtables-nft-multi" ] || fail "the packages do not have what was expected"
for name in iptables ip6tables; do
  cat > "$bin/$name" <<WRAPPER
#!/bin/sh
# iptables of Debian 13 with its own C library; see tools/setup/docker.sh.
here="\$(dirname "\$(dirname "\$(readlink -f "\$0")")")"
XTABLES_LIBDIR="\$here/$(dirname "$loader")/xtables" exec "\$here/$loader" --library-path "\$here/$(dirname "$loader")" --argv0 $name "\$here/usr/sbin/xtables-nft-multi" "\$@"
WRAPPER
  chmod 755 "$bin/$name"
done
(PATH="$bin:$PATH" && whole && dockerd --version && containerd --version && iptables --version) >/dev/null 2>&1 || fail "what was taken does not run here"
rm -rf "$target"
mv "$fresh/new" "$target"
printf 'setup: %s is in %s\n' "$("$target/bin/dockerd" --version)" "$target" >&2
