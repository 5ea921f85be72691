#!/usr/bin/env bash
# Prints the path of promtool: the one on PATH, else Debian's, unpacked into a cache folder.
# The `prometheus` server is in the same folder. Needs no root and writes nothing outside the cache
# folder; apt verifies the package by the archive's signature.
set -euo pipefail

if command -v promtool; then exit 0; fi

home="${ADAPLEX_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/adaplex}/tools"
tree="$home/prometheus"
tool="$tree/usr/bin/promtool"

fail() {
  echo "get_promtool: $1" >&2
  echo "get_promtool: install Prometheus so that promtool is on PATH, or run this where apt-get" \
    "reaches a Debian mirror" >&2
  exit 1
}

found() {
  [[ -x $tool ]] && echo "$tool"
}

if found; then exit 0; fi
for need in apt-get dpkg-deb flock; do
  command -v "$need" >/dev/null || fail "no promtool on PATH, and no $need to install it"
done

mkdir -p "$home"
exec 9>"$home/.prometheus.lock"
flock 9
if found; then exit 0; fi # another process installed it while this one waited for the lock

work="$(mktemp -d "$home/.prometheus.XXXXXX")"
trap 'rm -rf "$work"' EXIT
mkdir -p "$work/lists/partial" "$work/cache/archives/partial"
# The system's apt hooks would clean and refresh the system's own caches.
cat >"$work/apt.conf" <<'CONF'
#clear APT::Update::Pre-Invoke;
#clear APT::Update::Post-Invoke;
#clear APT::Update::Post-Invoke-Success;
APT::Sandbox::User "root";
CONF
apt=(apt-get -qq -c "$work/apt.conf" -o "Dir::Cache=$work/cache")
own_lists=(-o "Dir::State::Lists=$work/lists")

cd "$work"
if ! "${apt[@]}" download prometheus 2>/dev/null; then # package lists are missing or outdated
  "${apt[@]}" "${own_lists[@]}" update >&2 || true # an unreachable source among others is harmless
  "${apt[@]}" "${own_lists[@]}" download prometheus >&2 || fail "apt-get could not download it"
fi
dpkg-deb -x prometheus_*.deb tree
tree/usr/bin/promtool --version >/dev/null 2>&1 || fail "Debian's promtool does not run here"
rm -rf "$tree"
mv tree "$tree"
found
