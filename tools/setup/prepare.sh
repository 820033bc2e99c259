#!/usr/bin/env bash
# Prepare this machine for `make run` (argument: run) or for tests and checks (argument: dev). Idempotent; offline once it has succeeded.
set -euo pipefail
cd "$(dirname "$0")/../.."
kind="${1:-run}"
lock="requirements/$kind.lock"
say() { printf 'setup: %s\n' "$*" >&2; }
fail() { printf 'setup: %s\n' "$*" >&2; exit 1; }

# Debian's own first, where it is whole: it is built with profile-guided and link-time optimisation, which a Python that was built from source usually is not,
# and the agent then takes a fifth less time for a decision. PYTHON names another.
find_python() {
  local candidate
  for candidate in "${PYTHON:-}" /usr/bin/python3 python3 python3.13 python3.12 python3.11; do
    [ -n "$candidate" ] && command -v "$candidate" >/dev/null 2>&1 || continue
    [ "$candidate" != /usr/bin/python3 ] || "$candidate" -c 'import ensurepip' 2>/dev/null || continue
    "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { command -v "$candidate"; return; }
  done
  return 1
}

apt_updated=""
apt_install() {  # packages...: as root on Debian; what fails is not fatal, the tests that need it say so
  [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null 2>&1 || return 1
  local guard=""
  # A package that brings a daemon starts it on a Debian with an init. Ours are started by hand, so its start is denied while we install.
  if [ ! -e /usr/sbin/policy-rc.d ]; then guard=/usr/sbin/policy-rc.d; printf '#!/bin/sh\nexit 101\n' > "$guard" && chmod 755 "$guard"; fi
  local status=0
  if [ -z "$apt_updated" ]; then apt-get -qq update >/dev/null 2>&1 || true; apt_updated=1; fi
  DEBIAN_FRONTEND=noninteractive apt-get -qq -y --no-install-recommends install "$@" >/dev/null 2>&1 || status=1
  [ -n "$guard" ] && rm -f "$guard"
  return $status
}

python="$(find_python)" || { say "installing python3"; apt_install python3 python3-venv && python="$(find_python)"; } || fail "no Python 3.11 or later: apt install python3 python3-venv"

pip=(.venv/bin/python -m pip)
if [ ! -x .venv/bin/python ] || ! .venv/bin/python -c 'import pip' 2>/dev/null; then
  say "making .venv with $("$python" --version)"
  rm -rf .venv
  "$python" -c 'import ensurepip' 2>/dev/null || apt_install python3-venv || true
  if ! "$python" -m venv .venv 2>/dev/null; then
    # Debian has the half of venv that brings pip in a package of its own; who may not install it gets the lock's own pip.
    rm -rf .venv
    "$python" -m venv --without-pip .venv 2>/dev/null || fail "no virtual environment could be made: apt install python3-venv"
    wheel="$("$python" tools/setup/first_pip.py "$lock" .venv)" || fail "no pip could be had: is the network there? (needed once; or, as root, apt install python3-venv)"
    pip=(.venv/bin/python "$wheel/pip")
  fi
fi

want="$(cat "$lock" pyproject.toml | sha256sum | cut -d' ' -f1)"
stamp=".venv/.novacron-$kind"
if [ "$(cat "$stamp" 2>/dev/null || true)" != "$want" ]; then
  say "installing the locked packages of $lock (once; takes a minute)"
  "${pip[@]}" install -q --disable-pip-version-check --require-hashes -r "$lock" || fail "the packages could not be installed: is the network there? (needed once)"
  PYTHONWARNINGS=ignore .venv/bin/python -m pip install -q --disable-pip-version-check --no-deps --no-build-isolation -e . || fail "the project itself could not be installed into .venv"
  printf '%s' "$want" > "$stamp"
  # The dev lock holds everything that run needs.
  [ "$kind" = dev ] && cat requirements/run.lock pyproject.toml | sha256sum | cut -d' ' -f1 | tr -d '\n' > .venv/.novacron-run
fi

# A missing .pyc costs the agent 7.8 MiB of memory, and PYTHONDONTWRITEBYTECODE would leave them missing; -OO has files of its own.
env -u PYTHONDONTWRITEBYTECODE .venv/bin/python -m compileall -q -o 0 -o 2 edge_runtime hub tools 2>/dev/null || true
if [ ! -e .venv/.novacron-compiled ] || [ "$stamp" -nt .venv/.novacron-compiled ]; then
  site="$(.venv/bin/python -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')"
  for package in paho aiohttp yarl multidict frozenlist propcache aiosignal aiohappyeyeballs attr attrs idna yaml psutil; do
    [ -e "$site/$package" ] && env -u PYTHONDONTWRITEBYTECODE .venv/bin/python -m compileall -q -o 0 -o 2 "$site/$package" >/dev/null 2>&1 || true
  done
  stdlib="$(.venv/bin/python -c 'import sysconfig; print(sysconfig.get_paths()["stdlib"])')"
  if [ -w "$stdlib" ]; then env -u PYTHONDONTWRITEBYTECODE .venv/bin/python -m compileall -q -l -o 2 "$stdlib" "$stdlib"/{asyncio,json,email,http,urllib,logging,importlib,collections,concurrent,concurrent/futures,ctypes,sqlite3,encodings,re,html} >/dev/null 2>&1 || true; fi
  touch .venv/.novacron-compiled
fi

if [ "$kind" = dev ]; then
  packages=()
  command -v mosquitto >/dev/null 2>&1 || [ -x /usr/sbin/mosquitto ] || packages+=(mosquitto)
  command -v chromium >/dev/null 2>&1 || packages+=(chromium chromium-driver)
  [ -n "$(find /usr/lib -path "*faketime/libfaketime.so.1" -print -quit 2>/dev/null)" ] || packages+=(libfaketime)
  command -v openssl >/dev/null 2>&1 || packages+=(openssl)
  command -v mkfs.ext4 >/dev/null 2>&1 || [ -x /usr/sbin/mkfs.ext4 ] || packages+=(e2fsprogs)
  command -v runc >/dev/null 2>&1 || [ -x /usr/sbin/runc ] || packages+=(runc)
  command -v crun >/dev/null 2>&1 || packages+=(crun)
  command -v containerd >/dev/null 2>&1 || packages+=(containerd)  # started by the tests themselves, by hand
  command -v newuidmap >/dev/null 2>&1 || packages+=(uidmap)  # for agents that are not root
  command -v docker-registry >/dev/null 2>&1 || packages+=(docker-registry)
  command -v nats-server >/dev/null 2>&1 || packages+=(nats-server)  # started by its test
  [ -x /usr/sbin/rabbitmqctl ] || packages+=(rabbitmq-server)  # the same
  command -v slirp4netns >/dev/null 2>&1 || packages+=(slirp4netns)
  command -v g++ >/dev/null 2>&1 || packages+=(g++)  # runs the GPU's kernels on the processor
  [ -x /bin/busybox ] || packages+=(busybox-static)
  command -v ip >/dev/null 2>&1 || [ -x /usr/sbin/ip ] || packages+=(iproute2)
  for name in rsync zstd; do command -v "$name" >/dev/null 2>&1 || packages+=("$name"); done  # what moves of memory are held against
  [ "$(uname -m)" != x86_64 ] || command -v qemu-system-x86_64 >/dev/null 2>&1 || packages+=(qemu-system-x86 seabios)
  command -v gcc >/dev/null 2>&1 || [ "$(uname -m)" != x86_64 ] || packages+=(gcc)  # the program of guests that are migrated
  # For images (`make image`, `make boot`), and the disks of virtual machines in tests.
  for pair in openssl:openssl qemu-img:qemu-utils mksquashfs:squashfs-tools mcopy:mtools mkfs.vfat:dosfstools depmod:kmod debugfs:e2fsprogs veritysetup:cryptsetup-bin sfdisk:fdisk cpio:cpio; do
    command -v "${pair%%:*}" >/dev/null 2>&1 || [ -x "/usr/sbin/${pair%%:*}" ] || packages+=("${pair##*:}")
  done
  [ -e /usr/share/OVMF/OVMF_CODE_4M.fd ] || packages+=(ovmf)
  # For those of the other architectures, emulated. Debian 13 has QEMU for riscv64 in a package of its own.
  command -v qemu-system-aarch64 >/dev/null 2>&1 || packages+=(qemu-system-arm)
  [ -e /usr/share/AAVMF/AAVMF_CODE.fd ] || packages+=(qemu-efi-aarch64)
  if ! command -v qemu-system-riscv64 >/dev/null 2>&1; then
    if apt-cache show qemu-system-riscv >/dev/null 2>&1; then packages+=(qemu-system-riscv opensbi); else packages+=(qemu-system-misc); fi
  fi
  [ -e /usr/lib/u-boot/qemu-riscv64_smode/uboot.elf ] || packages+=(u-boot-qemu)
  command -v qemu-riscv64-static >/dev/null 2>&1 || packages+=(qemu-user-static)  # runs what is in their containers
  if [ ${#packages[@]} -gt 0 ]; then
    say "installing Debian packages: ${packages[*]}"
    apt_install "${packages[@]}" || for package in "${packages[@]}"; do
      apt_install "$package" || say "could not install $package; the tests that need it will say that they were skipped"
    done
  fi
  tools/setup/criu.sh || true  # it has said why
  [ "$(uname -m)" != x86_64 ] || tools/setup/qemu.sh || true  # the same
  if [ "$(uname -m)" = x86_64 ]; then tools/setup/guest_kernel.sh .novacron/guest-kernel || say "no kernel for guests; the tests of micro-VMs will say that they were skipped"; fi
fi
