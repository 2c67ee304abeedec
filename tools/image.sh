#!/usr/bin/env bash
# The container image without any registry, with Debian's podman, and a try of it (root).
#
#   tools/image.sh build     a base image by debootstrap, and on it the image `streamer`
#   tools/image.sh test      the same, then run it: see tests/image/
#   tools/image.sh podman …  podman with the storage that the others use
#   tools/image.sh clean     remove all images and containers of that storage
#
# Needs podman, runc and debootstrap (apt-get install --no-install-recommends). Everything is kept
# below IMAGE_STORE (build/image). Debian's packages come from where this machine has its own from, and
# certificates that this machine trusts are trusted while the image is built; none stay in it.
set -euo pipefail
cd "$(dirname "$0")/.."
export PATH="$PATH:/usr/sbin:/sbin"

store=${IMAGE_STORE:-$PWD/build/image}
base=localhost/streamer-base
image=localhost/streamer
certificates=/etc/ssl/certs/ca-certificates.crt

die() {
    echo "image: $*" >&2
    exit 1
}

# runc, because crun refuses the hybrid hierarchy of cgroups; cgroupfs, because there may be no systemd.
podman_here() {
    CONTAINERS_CONF=$store/containers.conf podman --root "$store/storage" --runroot "$store/run" \
        --runtime runc --cgroup-manager cgroupfs --events-backend none "$@"
}

check_tools() {
    local tool
    for tool in podman runc debootstrap; do
        command -v $tool >/dev/null ||
            die "$tool is not installed; as root: apt-get install --no-install-recommends podman runc debootstrap"
    done
    [ "$(id -u)" -eq 0 ] || die "this takes root"
    mkdir -p "$store"
    # Without CAP_SYS_RESOURCE podman cannot raise the limits that it raises unless told otherwise.
    printf '[containers]\ndefault_ulimits = []\n' >"$store/containers.conf"
}

make_base() {
    local mirror root=$store/root
    podman_here image exists $base && return
    # shellcheck disable=SC2016 # apt's own placeholders
    mirror=$(apt-get indextargets --format '$(REPO_URI) $(CODENAME) $(COMPONENT) $(CREATED_BY)' |
        awk '$2 == "bookworm" && $3 == "main" && $4 == "Packages" { print $1; exit }')
    [ -n "$mirror" ] || die "apt knows no source of bookworm"
    rm -rf "$root"
    debootstrap --variant=minbase bookworm "$root" "$mirror" >"$store/debootstrap.log" 2>&1 ||
        die "debootstrap failed: see $store/debootstrap.log"
    rm -f "$root"/var/cache/apt/archives/*.deb
    tar -C "$root" -c . | podman_here import - $base >/dev/null
    rm -rf "$root"
}

build() {
    local trusted=()
    if [ -e $certificates ]; then
        printf '[global]\ncert = /run/certificates.crt\n' >"$store/pip.conf"
        trusted=(-v "$certificates:/run/certificates.crt:ro" -v "$store/pip.conf:/etc/pip.conf:ro")
    fi
    podman_here build --quiet --network host "${trusted[@]}" \
        --build-arg "BASE=$base" -t $image . >"$store/build.log" 2>&1 ||
        die "the image cannot be built: see $store/build.log"
    # What was only needed to build it.
    podman_here image prune --force >/dev/null
}

case "${1:-}" in
build)
    check_tools
    make_base
    build
    ;;
test)
    check_tools
    make_base
    build
    exec .venv/bin/python -m pytest tests/image/check.py tests/image/check_kubernetes.py "${@:2}"
    ;;
podman)
    check_tools
    podman_here "${@:2}"
    ;;
clean)
    check_tools
    podman_here rm --all --force >/dev/null
    podman_here rmi --all --force >/dev/null
    podman_here system reset --force >/dev/null 2>&1 || true
    rm -rf "$store"
    ;;
*) die "usage: tools/image.sh build|test|podman ARGUMENTS|clean" ;;
esac
