#!/usr/bin/env bash
# Fetch Debian's kernel for guests into FOLDER (boot/ and lib/modules/): needs neither root nor room in /boot, and installs nothing. Done once; needs the network then.
set -euo pipefail
folder="${1:?usage: guest_kernel.sh FOLDER}"
fail() { printf 'guest kernel: %s\n' "$*" >&2; exit 1; }
if compgen -G "$folder/boot/vmlinuz-*" >/dev/null && compgen -G "$folder/lib/modules/*/kernel" >/dev/null; then exit 0; fi
command -v apt-get >/dev/null && command -v dpkg-deb >/dev/null || fail "this is no Debian: unpack its linux-image-cloud-amd64 into $folder by other means"
package="$(apt-cache depends linux-image-cloud-amd64 2>/dev/null | awk '/Depends: linux-image/ { print $2; exit }')"
[ -n "$package" ] || fail "linux-image-cloud-amd64 is not known here: as root, apt-get update"
mkdir -p "$folder"
fresh="$(mktemp -d "$folder/.new.XXXXXX")"
trap 'rm -rf "$fresh"' EXIT
(cd "$fresh" && apt-get -qq -o APT::Sandbox::User=root download "$package" 2>&1) || fail "$package could not be fetched: is the network there?"
dpkg-deb --fsys-tarfile "$fresh"/*.deb | tar -x -C "$fresh" --wildcards './boot/vmlinuz-*' '*/modules/*' || fail "$package could not be unpacked"
if [ -d "$fresh/usr/lib" ]; then mv "$fresh/usr/lib" "$fresh/lib"; fi  # where Debian 13 has them
compgen -G "$fresh/lib/modules/*/kernel" >/dev/null || fail "$package has no modules where they are looked for"
rm -rf "$folder/boot" "$folder/lib"
mv "$fresh/boot" "$fresh/lib" "$folder/"
