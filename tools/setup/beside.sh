# Sourced by criu.sh, qemu.sh and docker.sh: take packages of another Debian, with all the libraries they need, and lay them out beside the project. Nothing is installed on this machine; no root is needed.
# By apt with folders of its own: what is taken has the hashes of an index that Debian's archive key has signed. Names and hashes of what was taken are kept in FOLDER/packages.

# fetch_beside SUITE FOLDER EXCLUDE PACKAGE...: into FOLDER, which is new. EXCLUDE: patterns of tar, a line each, that are left out. Calls `fail TEXT`, which does not return.
fetch_beside() {
  local suite="$1" folder="$2" exclude="$3" keyring=/usr/share/keyrings/debian-archive-keyring.gpg tool architecture work package pattern patterns=()
  shift 3
  for tool in apt-get dpkg dpkg-deb tar; do command -v "$tool" >/dev/null 2>&1 || fail "$tool is missing"; done
  [ -r "$keyring" ] || fail "$keyring is missing (apt install debian-archive-keyring)"
  architecture="$(dpkg --print-architecture)"
  work="$folder.apt"
  mkdir -p "$folder" "$work"/{state/lists/partial,cache/archives/partial,etc/parts,etc/trusted,etc/preferences}
  : > "$work/status"
  printf 'deb [signed-by=%s] %s %s main\n' "$keyring" "${NOVACRON_DEBIAN:-http://deb.debian.org/debian}" "$suite" > "$work/etc/sources.list"
  # Check-Valid-Until: an index of unstable is valid for a week; a mirror that is behind, or a clock that is ahead, is no reason against it.
  cat > "$work/apt.conf" <<CONF
Dir "$work";
Dir::State "state";
Dir::State::status "$work/status";
Dir::Cache "cache";
Dir::Etc "etc";
Dir::Etc::Main "none";
Dir::Etc::Parts "parts";
Dir::Etc::SourceList "$work/etc/sources.list";
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
  export APT_CONFIG="$work/apt.conf" LC_ALL=C
  apt-get -qq update >"$work/said" 2>&1 || fail "the index of Debian $suite could not be had: $(grep -m 1 '^[EW]:' "$work/said" || echo 'is the network there?')"
  apt-get -qq -y --download-only install "$@" >"$work/said" 2>&1 || fail "the packages could not be had: $(grep -m 1 '^E:' "$work/said" || true)"
  while read -r pattern; do [ -z "$pattern" ] || patterns+=("--exclude=$pattern"); done <<< "$exclude"
  for package in "$work"/cache/archives/*.deb; do
    printf '%s %s\n' "$(sha256sum "$package" | cut -d' ' -f1)" "$(basename "$package")" >> "$folder/packages"
    dpkg-deb --fsys-tarfile "$package" | tar -x -C "$folder" --no-same-owner "${patterns[@]}" || fail "$(basename "$package") could not be unpacked"
  done
  rm -rf "$work"
}

# loader_of FOLDER: the dynamic loader in it, relative.
loader_of() { (cd "$1" && find usr/lib -name 'ld-linux-*.so.*' -path '*-linux-gnu*' | head -n 1); }
