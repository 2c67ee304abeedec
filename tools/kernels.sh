#!/usr/bin/env bash
# Stock Debian kernels in virtual machines, without KVM, on this machine's own root file system.
#
#   tools/kernels.sh setup [SUITE...]             fetch and unpack the kernels (quick when there)
#   tools/kernels.sh run SUITE|VERSION -- COMMAND  run COMMAND as root on that kernel; implies setup
#   tools/kernels.sh list                         the suites, and the kernels that are there
#
# SUITE is bullseye (5.10), bookworm (6.1), trixie (6.12) or sid; VERSION is the beginning of a
# kernel release that `list` shows, such as 5.10. The guest starts in the current directory, sees
# the root file system read-only or, /tmp among it, copy-on-write, and has no network but loopback:
# what COMMAND finds it reports on its output, which comes at its end. The exit status is that of
# COMMAND. Takes half a minute and the command's own time, which is ten times what it is here.
#
# The kernels come from the Debian mirror that apt uses here, and virtme-ng from the package index
# that pip uses here. The cache is $STREAMER_CACHE, or .cache in the checkout.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cache=${STREAMER_CACHE:-$root/.cache}
kernels=$cache/kernels
venv=$kernels/venv
suites=(bullseye bookworm trixie sid)
export PATH="$PATH:/usr/sbin:/sbin" # where Debian keeps depmod

say() { echo "kernels: $*" >&2; }
die() { echo "kernels: $*" >&2; exit 1; }

need_tools() {
    [ "$(dpkg --print-architecture)" = amd64 ] || die "the machine is to be amd64"
    local pair missing=()
    for pair in qemu-system-x86_64=qemu-system-x86 busybox=busybox-static depmod=kmod; do
        command -v "${pair%=*}" >/dev/null || missing+=("${pair#*=}")
    done
    [ ${#missing[@]} -eq 0 ] && return
    [ "$(id -u)" = 0 ] ||
        die "missing; as root: apt-get install --no-install-recommends ${missing[*]}"
    say "installing ${missing[*]}"
    DEBIAN_FRONTEND=noninteractive apt-get -qq install -y --no-install-recommends \
        "${missing[@]}" >/dev/null || die "cannot install ${missing[*]}: apt-get update?"
}

# ---------------------------------------------------------------- fetching

# apt with a state of its own, which knows one suite of the mirror and no installed package.
private_apt() { # private_apt SUITE PROGRAM ARGUMENT...
    local state=$kernels/apt/$1 program=$2
    shift 2
    "$program" -q -o Dir::Etc::SourceList="$state/sources.list" -o Dir::Etc::SourceParts=/dev/null \
        -o Dir::State::Lists="$state/lists" -o Dir::State::Status="$state/status" \
        -o Dir::Cache="$state/cache" -o APT::Sandbox::User=root "$@"
}

read_suite() { # read_suite SUITE
    local suite=$1 state=$kernels/apt/$1 mirror
    mirror=$(apt-get indextargets --format '$(REPO_URI)' 'Created-By: Packages' | head -n 1)
    [ -n "$mirror" ] || die "apt knows no mirror here: apt-get update"
    mkdir -p "$state/lists/partial" "$state/cache/archives/partial"
    : >"$state/status"
    echo "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] $mirror $suite main" \
        >"$state/sources.list"
    private_apt "$suite" apt-get update -o Acquire::IndexTargets::deb::DEP-11::DefaultEnabled=false \
        -o Acquire::Languages=none >&2
}

# The packages that hold the kernel which linux-image-amd64 stands for: one, or two (from 7.x on).
kernel_packages() { # kernel_packages SUITE
    private_apt "$1" apt-cache depends --recurse --no-recommends --no-suggests --no-conflicts \
        --no-breaks --no-replaces --no-enhances linux-image-amd64 |
        grep -E '^linux-(image|modules|binary)-[0-9].*-amd64$' | sort -u
}

unpack() { # unpack SUITE
    local suite=$1 work=$kernels/$1.part packages version
    rm -rf "$work"
    mkdir -p "$work/download"
    read_suite "$suite"
    mapfile -t packages < <(kernel_packages "$suite")
    [ ${#packages[@]} -gt 0 ] || die "$suite has no linux-image-amd64"
    (cd "$work/download" && private_apt "$suite" apt-get download "${packages[@]}" >&2)
    for package in "$work"/download/*.deb; do dpkg -x "$package" "$work"; done
    # One layout for all, in which virtme-ng finds the modules: boot/ and lib/modules/.
    [ -e "$work/lib" ] || ln -s usr/lib "$work/lib"
    version=$(cd "$work/lib/modules" && echo *)
    mkdir -p "$work/boot"
    [ -e "$work/boot/vmlinuz-$version" ] ||
        ln "$work/lib/modules/$version/vmlinuz" "$work/boot/vmlinuz-$version"
    # It warns that sid's packages have no list of what is built in, which is not needed here.
    depmod -b "$work" "$version" 2>/dev/null || die "depmod failed for $version"
    rm -rf "$work/download" "$kernels/apt/$suite"
    mv "$work" "$kernels/$suite"
}

make_venv() {
    local pins=$root/tools/kernels-requirements.txt stamp=$venv/requirements.txt
    cmp -s "$pins" "$stamp" && return
    say "installing virtme-ng"
    /usr/bin/python3 -m venv --clear "$venv"
    "$venv/bin/python" -m pip install -q --no-input --disable-pip-version-check \
        --require-hashes -r "$pins" >&2
    cp "$pins" "$stamp"
}

setup() { # setup SUITE...
    local suite
    need_tools
    mkdir -p "$kernels"
    exec 9>"$kernels/lock"
    flock 9
    make_venv
    for suite in "$@"; do
        [[ " ${suites[*]} " == *" $suite "* ]] || die "unknown suite $suite; known: ${suites[*]}"
        [ -d "$kernels/$suite" ] && continue
        say "fetching the kernel of $suite"
        unpack "$suite"
    done
    exec 9>&-
}

# ---------------------------------------------------------------- running

release_of() { # release_of SUITE
    local image
    image=$(echo "$kernels/$1"/boot/vmlinuz-*)
    [ -e "$image" ] && echo "${image##*/vmlinuz-}"
}

list() {
    local suite
    for suite in "${suites[@]}"; do
        echo "$suite $(release_of "$suite" || echo "not fetched")"
    done
}

suite_of() { # suite_of SUITE|VERSION
    local suite
    for suite in "${suites[@]}"; do
        if [ "$1" = "$suite" ]; then echo "$suite" && return; fi
        case $(release_of "$suite" || true) in "$1" | "$1".* | "$1"-* | "$1"+*) echo "$suite" && return ;; esac
    done
    die "no kernel $1 here; known suites: ${suites[*]}"
}

# What the command wrote comes by way of files in a directory that the guest may write to: the
# generic kernels have virtio-console as a module only, and the serial console is the kernel's.
run() { # run SUITE|VERSION -- COMMAND...
    local suite release line
    suite=$(suite_of "$1")
    shift 2
    setup "$suite"
    release=$(release_of "$suite")
    out=$(mktemp -d "$kernels/out.XXXXXX")
    trap 'rm -rf "$out"' EXIT
    printf -v line '%q ' "$@"
    say "starting $release"
    # There may be a /dev/kvm that hangs. The PATH is virtme-ng's own, to find its parts.
    PATH="$venv/bin:$PATH" vng --disable-kvm --run "$kernels/$suite/boot/vmlinuz-$release" \
        --cpus 2 --memory 2G --verbose --cwd "$PWD" --rwdir "$out" \
        --exec "( $line ) >$out/stdout 2>$out/stderr </dev/null; echo \$? >$out/status" \
        </dev/null >"$kernels/$suite.log" 2>&1 || true # only `status` says
    if ! [ -s "$out/status" ]; then
        tail -n 20 "$kernels/$suite.log" >&2
        die "$release did not finish; its console: $kernels/$suite.log"
    fi
    cat "$out/stdout"
    cat "$out/stderr" >&2
    return "$(<"$out/status")"
}

command=${1:-}
[ $# -gt 0 ] && shift
case $command in
setup) if [ $# -gt 0 ]; then setup "$@"; else setup "${suites[@]}"; fi ;;
run)
    [ $# -gt 2 ] && [ "$2" = -- ] || die "usage: tools/kernels.sh run SUITE|VERSION -- COMMAND..."
    run "$@"
    ;;
list) list ;;
*) die "usage: tools/kernels.sh setup [SUITE...] | run SUITE|VERSION -- COMMAND... | list" ;;
esac
