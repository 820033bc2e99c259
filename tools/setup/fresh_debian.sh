#!/usr/bin/env bash
# Runs a command in a clean clone, on a Debian that was made a moment ago: what README promises of a fresh machine, seen on each release.
#
#   tools/setup/fresh_debian.sh 12|13 [--user] [--offline COMMAND] [COMMAND]
#
# COMMAND is `make test` where none is given; of a pipe each part has to succeed. --user: as a user who is not root, with no right to become it. --offline: after it, once more without any network, this one.
# Asks for root, mmdebstrap and a network. What is committed is cloned; what lies about in this tree is not. The kernel and its control groups are this machine's.
# The Debian lives under TMPDIR (5 GB for `make test`, whose own files are in memory), and goes with this command: the first process in it is one that collects orphans, and all others end with it.
set -euo pipefail
cd "$(dirname "$0")/../.."
fail() { printf 'fresh_debian: %s\n' "$*" >&2; exit 2; }

case "${1:-}" in
  12) suite=bookworm ;;
  13) suite=trixie ;;
  *) fail "say which release: 12 or 13" ;;
esac
shift
user="" offline=""
while :; do
  case "${1:-}" in
    --user) user=1; shift ;;
    --offline) offline="${2:?--offline lacks its command}"; shift 2 ;;
    *) break ;;
  esac
done
[ $# -le 1 ] || fail "one command, in quotes"
command="${1:-make test}"
[ "$(id -u)" = 0 ] || fail "asks for root"
for tool in mmdebstrap unshare git; do command -v "$tool" >/dev/null 2>&1 || fail "$tool is missing: apt install mmdebstrap util-linux git"; done

top="$(mktemp -d "${TMPDIR:-/var/tmp}/novacron-debian.XXXXXX")"
# Nothing of it is mounted here: mounts go with their namespace.
trap 'rm -rf --one-file-system "$top"' EXIT
root="$top/root"
printf 'fresh_debian: making Debian %s\n' "$suite" >&2
# What a person's fresh machine has: the important packages, Python, make and git.
mmdebstrap --quiet --variant=important --include=python3,make,git,ca-certificates "$suite" "$root" "${NOVACRON_DEBIAN:-http://deb.debian.org/debian}" >&2
# No links to this one's objects: what is given to the user below would be taken from it.
git clone -q --no-hardlinks . "$root/srv/novacron"
for file in resolv.conf hosts; do cp -L "/etc/$file" "$root/etc/$file"; done
# Where this machine trusts an authority of its own for its way to the packages, so must that one.
[ ! -r /etc/ssl/certs/ca-certificates.crt ] || cp -L /etc/ssl/certs/ca-certificates.crt "$root/etc/ssl/certs/ca-certificates.crt"
as="" home=/root
if [ -n "$user" ]; then
  chroot "$root" useradd --create-home --shell /bin/bash person
  chroot "$root" chown -R person: /srv/novacron
  as="setpriv --reuid person --regid person --init-groups --no-new-privs" home=/home/person
fi

export root command offline as home
status=0
unshare --mount --pid --fork --kill-child --uts --ipc bash -euo pipefail -c '
  mount --make-rprivate /
  mount --bind "$root" "$root"
  mount -t proc proc "$root/proc"
  for tree in sys dev; do mount --rbind "/$tree" "$root/$tree"; done
  mount -t tmpfs -o mode=1777 shm "$root/dev/shm"
  mount -t tmpfs -o mode=755 run "$root/run"
  mount -t tmpfs -o mode=1777 tmp "$root/tmp"
  mkdir -p "$root/mnt/old"
  cd "$root"
  pivot_root . mnt/old
  cd /srv/novacron
  umount -l /mnt/old
  rmdir /mnt/old
  hostname fresh-debian
  clean="$as env -i PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=$home LANG=C.UTF-8 TERM=dumb"
  $clean bash -o pipefail -c "$command"
  [ -z "$offline" ] || unshare --net sh -c "ip link set lo up && exec $clean bash -o pipefail -c \"\$0\"" "$offline"
  : the shell stays until here, as the process that collects orphans
' || status=$?
printf 'fresh_debian: Debian %s: %s ended with %d\n' "$suite" "$command" "$status" >&2
exit "$status"
