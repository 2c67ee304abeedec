#!/usr/bin/env bash
# Stock Debian kernels in virtual machines, without KVM, with the files of this machine.
#
#   tools/kernels.sh setup [SUITE...]             fetch and unpack the kernels, and their headers
#   tools/kernels.sh run SUITE|VERSION -- COMMAND  run COMMAND as root on that kernel; implies setup
#   tools/kernels.sh list                         the suites, and the kernels that are there
#
# SUITE is bullseye (5.10), bookworm (6.1), trixie (6.12) or sid; VERSION is the beginning of a
# kernel release that `list` shows, such as 5.10. With -arm64 behind it (trixie-arm64) it is that
# kernel for arm64, on an emulated machine of that kind: see "arm64" below.
#
# The guest has two CPUs, no network but loopback, cgroup v2 and no cgroup v1, and mounts neither
# tracefs nor bpffs. Its root is in memory; on it are the directories of this machine, read-only
# and as they are when they are first looked at; /tmp, /run and a copy of this checkout can be
# written to, and vanish. What COMMAND writes to its output is seen here at once. Files come back
# from the directory that $OUT names there and $KERNEL_OUT, if set, names here; it has to exist.
# The exit status is that of COMMAND; 124 when it took longer than $KERNEL_SECONDS (3600).
# Who is suspended loses the file systems that are mounted: the device `back`, which nobody has
# mounted till then, is that directory once more (tests/faults/guest/suspended.py).
#
# Starting takes 15 s, and the command ten to thirty times what it takes here.
#
# The kernels come from the Debian mirror that apt uses here. The cache is $STREAMER_CACHE, or
# .cache in the checkout.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cache=${STREAMER_CACHE:-$root/.cache}
kernels=$cache/kernels
suites=(bullseye bookworm trixie sid)
known=("${suites[@]}" trixie-arm64)
export PATH="$PATH:/usr/sbin:/sbin" # where Debian keeps depmod

say() { echo "kernels: $*" >&2; }
die() { echo "kernels: $*" >&2; exit 1; }

arch_of() { # arch_of SUITE
    case $1 in *-arm64) echo arm64 ;; *) echo amd64 ;; esac
}

need_tools() { # need_tools SUITE...
    [ "$(dpkg --print-architecture)" = amd64 ] || die "the machine is to be amd64"
    local suite pair missing=() pairs=(busybox=busybox-static depmod=kmod)
    for suite in "$@"; do
        case $(arch_of "$suite") in
        amd64) pairs+=(qemu-system-x86_64=qemu-system-x86) ;;
        arm64) pairs+=(qemu-system-aarch64=qemu-system-arm) ;;
        esac
    done
    for pair in "${pairs[@]}"; do
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
    local state=$kernels/apt/$1 program=$2 arch
    arch=$(arch_of "$1")
    shift 2
    "$program" -q -o APT::Architecture="$arch" -o APT::Architectures="$arch" \
        -o Dir::Etc::SourceList="$state/sources.list" -o Dir::Etc::SourceParts=/dev/null \
        -o Dir::State::Lists="$state/lists" -o Dir::State::Status="$state/status" \
        -o Dir::Cache="$state/cache" -o APT::Sandbox::User=root "$@"
}

read_suite() { # read_suite SUITE [ANOTHER]: with the packages of the other, for the same machine
    local suite=$1 state=$kernels/apt/$1 mirror
    mirror=$(apt-get indextargets --format '$(REPO_URI)' 'Created-By: Packages' | head -n 1)
    [ -n "$mirror" ] || die "apt knows no mirror here: apt-get update"
    mkdir -p "$state/lists/partial" "$state/cache/archives/partial"
    : >"$state/status"
    echo "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] $mirror ${2:-${suite%-arm64}} main" \
        >"$state/sources.list"
    private_apt "$suite" apt-get update -o Acquire::IndexTargets::deb::DEP-11::DefaultEnabled=false \
        -o Acquire::Languages=none >&2
}

with_dependencies() { # with_dependencies SUITE PACKAGE...
    private_apt "$1" apt-cache depends --recurse --no-recommends --no-suggests --no-conflicts \
        --no-breaks --no-replaces --no-enhances "${@:2}" | grep -E '^[a-z]' | sort -u
}

# The packages that hold the kernel which linux-image-amd64 stands for: one, or two (from 7.x on).
kernel_packages() { # kernel_packages SUITE
    local arch
    arch=$(arch_of "$1")
    with_dependencies "$1" "linux-image-$arch" |
        grep -E "^linux-(image|modules|binary)-[0-9].*-$arch\$"
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
    # One layout for all: boot/ and lib/modules/.
    [ -e "$work/lib" ] || ln -s usr/lib "$work/lib"
    version=$(cd "$work/lib/modules" && echo *)
    mkdir -p "$work/boot"
    [ -e "$work/boot/vmlinuz-$version" ] ||
        ln "$work/lib/modules/$version/vmlinuz" "$work/boot/vmlinuz-$version"
    [ "$(arch_of "$suite")" = amd64 ] || unpack_arm64 "$suite" "$work"
    # It warns that sid's packages have no list of what is built in, which is not needed here.
    depmod -b "$work" "$version" 2>/dev/null || die "depmod failed for $version"
    rm -rf "$work/download" "$kernels/apt/$suite"
    mv "$work" "$kernels/$suite"
}

# The headers of that very kernel, in usr/src/ next to it: what bcc compiles where there is no BTF.
unpack_headers() { # unpack_headers SUITE
    local suite=$1 release place=$kernels/$1 work=$kernels/$1.headers.part
    release=$(release_of "$suite")
    [ -d "$place/usr/src/linux-headers-$release" ] && return
    say "fetching the headers of $release"
    rm -rf "$work"
    mkdir -p "$work"
    read_suite "$suite"
    (cd "$work" && private_apt "$suite" apt-get download "linux-headers-$release" \
        "linux-headers-${release%-amd64}-common" >&2) ||
        die "no headers of $release in $suite any more: rm -r $place, and the newer kernel is fetched"
    for package in "$work"/*.deb; do dpkg -x "$package" "$work"; done
    mkdir -p "$place/usr"
    mv "$work/usr/src" "$place/usr/src"
    rm -rf "$work" "$kernels/apt/$suite"
}

setup() { # setup SUITE...
    local suite
    need_tools "$@"
    mkdir -p "$kernels"
    exec 9>"$kernels/lock"
    flock 9
    for suite in "$@"; do
        [[ " ${known[*]} " == *" $suite "* ]] || die "unknown suite $suite; known: ${known[*]}"
        if [ ! -d "$kernels/$suite" ]; then
            say "fetching the kernel of $suite"
            unpack "$suite"
        fi
        # bcc is this machine's: it compiles for no other one.
        if [[ " ${suites[*]} " == *" $suite "* ]]; then unpack_headers "$suite"; fi
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
    for suite in "${known[@]}"; do
        echo "$suite $(release_of "$suite" || echo "not fetched")"
    done
}

suite_of() { # suite_of SUITE|VERSION
    local suite
    for suite in "${known[@]}"; do
        if [ "$1" = "$suite" ]; then echo "$suite" && return; fi
        case $(release_of "$suite" || true) in "$1" | "$1".* | "$1"-* | "$1"+*) echo "$suite" && return ;; esac
    done
    die "no kernel $1 here; known suites: ${known[*]}"
}

# What the guest needs before it sees the files of this machine.
first_modules=(virtio_pci 9pnet_virtio 9p)

# A file system for the kernel to start from: busybox, the modules that it needs to see the files
# of this machine, and an init that makes the root file system of them.
make_initramfs() { # make_initramfs SUITE RELEASE FILE
    local place=$kernels/$1 release=$2 work=$3.d module number=10
    mkdir -p "$work"/{bin,modules,proc,sys,dev,root}
    cp "$(programs_of "$1" busybox)" "$work/bin/busybox"
    while read -r module; do
        # Numbered, since they are loaded in the order of their names.
        case $module in
        *.xz) busybox xzcat "$module" ;;
        *) cat "$module" ;;
        esac >"$work/modules/$((number++))-$(basename "${module%.xz}")"
    done < <(
        for module in "${first_modules[@]}"; do
            # One that is built in has none, and may not be known.
            modprobe -d "$place" -S "$release" --show-depends "$module" 2>/dev/null || true
        done | awk '$1 == "insmod" && !seen[$2]++ { print $2 }'
    )
    cp "$root/tools/kernels-init.sh" "$work/init"
    (cd "$work" && find . | busybox cpio -o -H newc 2>/dev/null) >"$3"
    rm -r "$work"
}

programs_of() { # programs_of SUITE PROGRAM: where one is that runs there
    case $(arch_of "$1") in
    amd64) command -v "$2" ;;
    arm64) echo "$kernels/$1/root/bin/$2" ;;
    esac
}

# Copies of what many small files are read from, since each look at a file of this machine costs
# the guest a millisecond. Its memory holds them, so what no command needs there is left out.
copy() { # copy SUITE DIRECTORY: makes `copies`, a list, and `copies.tar` there
    local python=$root/.venv/bin/python suite=$1
    shift
    if [ "$(arch_of "$suite")" = arm64 ]; then
        echo "$staged" >"$1/copies"
        tar -cf "$1/copies.tar" -C / "${staged#/}"
        return
    fi
    echo "$root" >"$1/copies"
    if [ -x "$python" ]; then
        "$python" -c 'import sysconfig; print(sysconfig.get_path("stdlib"))' >>"$1/copies"
    fi
    # 1: a file changed while it was read, such as a log.
    tar -cf "$1/copies.tar" -C / --exclude-vcs --exclude="${kernels#/}" \
        --exclude-from=<(sed "s,^,${root#/}/," "$root/tools/kernels-exclude.txt") \
        --warning=no-file-changed --files-from=<(sed 's,^/,,' "$1/copies") || [ $? -eq 1 ]
}

# ---------------------------------------------------------------- arm64

# Nothing of this machine runs there. Its root is Debian 12's files for arm64, unpacked and not
# installed; instead of the checkout it has what `tools/arm64.sh` makes of it.
staged=$root/build/arm64

unpack_arm64() { # unpack_arm64 SUITE WORK
    local packages package
    rm -rf "$kernels/apt/$1"
    read_suite "$1" bookworm
    mapfile -t packages < <(
        with_dependencies "$1" base-passwd bash coreutils iproute2 libbpf1 mount procps python3 util-linux |
            grep -v -E 'debconf|debian-installer|perl|awk|^(dpkg|install-info|lib(newt|slang|textwrap))'
    )
    packages+=(busybox-static libpython3.11-dev)
    mkdir -p "$2/root" "$2/download-root"
    (cd "$2/download-root" && private_apt "$1" apt-get download "${packages[@]}" >&2)
    for package in "$2"/download-root/*.deb; do dpkg -x "$package" "$2/root"; done
    mkdir -p "$2"/root/{proc,sys,dev,run,tmp}
    ln -s bash "$2/root/bin/sh"
    cp "$2/root/usr/share/base-passwd/passwd.master" "$2/root/etc/passwd"
    cp "$2/root/usr/share/base-passwd/group.master" "$2/root/etc/group"
    install -m 600 /dev/null "$2/root/etc/shadow"
    rm -r "$2/download-root"
}

# ---------------------------------------------------------------- the machine

# The processor is the plain one: newer features are emulated slower than what programs do in
# their absence. Nobody in there is to be protected from anybody, so no mitigations either.
emulate() { # emulate SUITE RELEASE INITRAMFS OUT: in the background: it becomes the machine
    local machine
    case $(arch_of "$1") in
    amd64) machine=(qemu-system-x86_64 -machine q35 -cpu qemu64) console=ttyS0 ;;
    arm64) machine=(qemu-system-aarch64 -machine virt -cpu cortex-a72) console=ttyAMA0 ;;
    esac
    exec timeout --foreground -k 10 "${KERNEL_SECONDS:-3600}" "${machine[@]}" \
        -accel tcg,thread=multi -smp 2 -m 2G -nodefaults -no-user-config \
        -display none -no-reboot -net none \
        -kernel "$kernels/$1/boot/vmlinuz-$2" -initrd "$3" \
        -append "console=$console panic=-1 mitigations=off tsc=reliable loglevel=5" \
        -serial "file:$kernels/$1.log" \
        -virtfs local,path=/,mount_tag=host,security_model=none,readonly=on,multidevs=remap \
        -virtfs "local,path=$4,mount_tag=out,security_model=none" \
        -virtfs "local,path=$4,mount_tag=back,security_model=none" </dev/null
}

# The command's output comes by way of files: the generic kernels have virtio-console as a module
# only, and the serial console is the kernel's.
run() { # run SUITE|VERSION -- COMMAND...
    local suite release machine status=0
    suite=$(suite_of "$1")
    shift 2
    setup "$suite"
    release=$(release_of "$suite")
    work=$(mktemp -d "$kernels/run.XXXXXX")
    started=()
    trap 'kill "${started[@]}" 2>/dev/null; rm -rf "$work"' EXIT
    trap 'exit 143' INT TERM
    local out=${KERNEL_OUT:-$work/out}
    mkdir -p "$out/.guest"
    make_initramfs "$suite" "$release" "$work/initramfs"
    local base= directory=$PWD
    [ "$(arch_of "$suite")" = amd64 ] || base=$kernels/$suite/root directory=$staged
    copy "$suite" "$out/.guest"
    printf 'DIRECTORY=%q\nMODULES=%q\nBASE=%q\n' "$directory" "/.host$kernels/$suite" "$base" \
        >"$out/.guest/settings"
    printf '%q ' "$@" >"$out/.guest/command"
    : >"$out/.guest/stdout"
    : >"$out/.guest/stderr"
    say "starting $release"
    emulate "$suite" "$release" "$work/initramfs" "$out" >&2 &
    machine=$!
    started+=("$machine")
    tail -q -f -s 0.5 "$out/.guest/stdout" &
    started+=($!)
    tail -q -f -s 0.5 "$out/.guest/stderr" >&2 &
    started+=($!)
    wait "$machine" || status=$?
    sleep 1 # the two have shown the rest
    if [ -s "$out/.guest/status" ]; then
        status=$(<"$out/.guest/status")
    else
        [ "$status" -ne 0 ] || status=1
        tail -n 20 "$kernels/$suite.log" >&2
        say "$release did not finish; its console: $kernels/$suite.log"
    fi
    rm -r "$out/.guest"
    return "$status"
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
