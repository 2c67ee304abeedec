#!/usr/bin/env bash
# Sets this checkout up. What is there already is left alone, so that a second run is quick.
#
#   tools/setup.sh run     Debian packages, virtual environment, kernel programs, C modules
#   tools/setup.sh dev     the same, and the tools that check the code
#   tools/setup.sh test    the same, and what the tests run: Kafka, Mosquitto, Prometheus, their clients,
#                          bpftrace, bcc
#   tools/setup.sh bench   the same, and what the benchmarks compare with: auditd
#
# PYTHON names another interpreter than Debian's own. Prints a line for each thing that it does;
# the output of the commands is in build/setup.log, and its end is shown when one fails.
set -euo pipefail
cd "$(dirname "$0")/.."
export PATH="$PATH:/usr/sbin:/sbin" # where Debian keeps mosquitto, ip and ldconfig

mode=${1:-run}
case $mode in
run | dev | test | bench) ;;
*)
    echo "usage: tools/setup.sh run|dev|test|bench" >&2
    exit 2
    ;;
esac
python=${PYTHON:-/usr/bin/python3}
venv=.venv
log=build/setup.log

# Whether the mode is `test` or goes beyond it.
tests() { [ "$mode" = test ] || [ "$mode" = bench ]; }
say() { echo "setup: $*"; }
fail() {
    echo "setup: $*" >&2
    exit 1
}

# step MESSAGE COMMAND...: say it, do it quietly, show the end of the log when it fails.
step() {
    local message=$1
    shift
    say "$message"
    echo "--- $message" >>$log
    # Without the lock (9), which a daemon started by a package would keep.
    if ! "$@" </dev/null >>$log 2>&1 9>&-; then
        tail -n 25 $log >&2
        fail "failed: $message (all of it: $log)"
    fi
}

# ---------------------------------------------------------------- Debian packages

missing=()

# need PACKAGE TEST...: the package is missing when the test fails.
need() {
    local package=$1
    shift
    "$@" >/dev/null 2>&1 || missing+=("$package")
}

# Not grep -q, which does not read on: ldconfig would then fail now and then.
has_libbpf() { ldconfig -p | grep 'libbpf\.so\.1 '; }
has_venv() { "$python" -c 'import ensurepip, venv'; }
has_python_headers() {
    "$python" -c 'import pathlib, sysconfig
pathlib.Path(sysconfig.get_path("include"), "Python.h").stat()'
}
has_bcc() { /usr/bin/python3 -I -c 'from bcc import libbcc'; }
has_compose() { docker compose version || docker-compose version; }

needed_to_run() {
    need clang command -v clang
    need llvm command -v llvm-strip
    need gcc command -v gcc
    need libc6-dev test -e /usr/include/stdlib.h
    need linux-libc-dev test -e /usr/include/linux/bpf.h
    need libbpf-dev test -e /usr/include/bpf/bpf_helpers.h
    need libbpf1 has_libbpf
    need python3-venv has_venv
    need python3-dev has_python_headers
}

needed_to_test() {
    need default-jre-headless command -v java
    need maven command -v mvn
    need kcat command -v kcat
    need mosquitto command -v mosquitto
    need mosquitto-clients command -v mosquitto_sub
    need prometheus command -v prometheus
    need iproute2 command -v ip
    need iputils-ping command -v ping
    need openssl command -v openssl
    need bpftrace command -v bpftrace
    need bind9-dnsutils command -v dig
    need dnsmasq-base command -v dnsmasq
    need iptables command -v iptables
    need librsvg2-bin command -v rsvg-convert
    need libdevel-nytprof-perl test -e /usr/share/perl5/Devel/NYTProf/flamegraph.pl
    need systemd command -v systemd-analyze # one that is not running is enough
    need python3-bpfcc has_bcc # for kernels without BTF
    if [ "$(uname -m)" = x86_64 ]; then # CI compiles the kernel programs for arm64 too
        need linux-libc-dev-arm64-cross test -e /usr/aarch64-linux-gnu/include/asm/types.h
    fi
    need docker-compose has_compose # checks compose.yaml; no engine is needed for that
}

needed_to_bench() {
    need auditd command -v auditd
}

policy=/usr/sbin/policy-rc.d
kept=$policy.before-streamer-setup

# The tests start brokers and a Prometheus of their own, and the benchmarks an auditd: Debian's services
# of these are not to come up with their packages, nor at the next boot. Other services go on asking the
# policy that was there.
services=(mosquitto prometheus auditd)

hold_services() {
    release_services
    if [ -e $policy ]; then mv $policy $kept; fi
    cat >$policy <<END
#!/bin/sh
# Written by streamer's tools/setup.sh, which removes it again.
for service in ${services[*]}; do
    case " \$* " in *" \$service "* | *" \$service.service "*) exit 101 ;; esac
done
if [ -x $kept ]; then exec $kept "\$@"; fi
exit 0
END
    chmod 755 $policy
}

release_services() {
    if grep -qs "streamer's tools/setup.sh" $policy; then rm $policy; fi
    if [ -e $kept ]; then mv $kept $policy; fi
}

disable_service() {
    if command -v systemctl; then
        systemctl disable "$1"
    else
        update-rc.d "$1" disable
    fi
}

apt_get() { DEBIAN_FRONTEND=noninteractive apt-get -y -q -o DPkg::Lock::Timeout=300 "$@"; }
# An outdated or unreachable source need not matter: the installation says so if it does.
update() { apt_get update || true; }

install_packages() {
    if [ -n "${PYTHON:-}" ] && [[ " ${missing[*]} " == *" python3-"* ]]; then
        fail "PYTHON=$python lacks the modules venv and ensurepip, or its header files"
    fi
    if ! command -v apt-get >/dev/null; then
        fail "missing, and this is no Debian: what its packages ${missing[*]} contain"
    fi
    if [ "$(id -u)" -ne 0 ]; then
        fail "packages are missing; as root: apt-get install -y --no-install-recommends ${missing[*]}"
    fi
    step "reading Debian's package lists" update
    local service held=()
    for service in "${services[@]}"; do
        if [[ " ${missing[*]} " == *" $service "* ]]; then held+=("$service"); fi
    done
    if [ ${#held[@]} -gt 0 ]; then
        trap release_services EXIT
        hold_services
    fi
    step "installing Debian packages: ${missing[*]}" apt_get install --no-install-recommends "${missing[@]}"
    if [ ${#held[@]} -gt 0 ]; then release_services; fi
    for service in "${held[@]}"; do
        step "leaving the $service service disabled" disable_service "$service"
    done
}

# ---------------------------------------------------------------- Python

# fresh NAME FILE...: whether the step NAME was done with the files as they are now. Sets `stamp`
# and `digest` for `done_with`, which notes that it has been.
fresh() {
    stamp=$venv/stamps/$1
    shift
    digest=$(sha256sum "$@")
    [ -e "$stamp" ] && [ "$(<"$stamp")" = "$digest" ]
}
done_with() { echo "$digest" >"$stamp"; }

make_venv() {
    local wanted # the scripts in it name its own path, too
    wanted=$("$python" -c 'import sys
if sys.version_info < (3, 11):
    sys.exit(f"setup: Python 3.11 or newer is needed, and {sys.executable} is {sys.version}")
print(sys.executable, sys.version)') || exit 1
    wanted+=" in $PWD"
    if [ -e $venv/stamps/venv ] && [ "$(<$venv/stamps/venv)" = "$wanted" ]; then return; fi
    step "making the virtual environment in $venv" "$python" -m venv --clear $venv
    mkdir -p $venv/stamps
    echo "$wanted" >$venv/stamps/venv
}

pip_install() {
    $venv/bin/python -m pip install --no-input --disable-pip-version-check "$@"
}

# requirements NAME FILE...
requirements() {
    local name=$1 file arguments=()
    shift
    if fresh "$name" "$@"; then return; fi
    for file in "$@"; do arguments+=(-r "$file"); done
    step "installing Python packages from $*" pip_install --require-hashes "${arguments[@]}"
    done_with
}

# ---------------------------------------------------------------- streamer itself

build_bpf() {
    local arguments=()
    if tests; then arguments=(--all); fi
    $venv/bin/python bpf/build.py "${arguments[@]}" | sed 's/^/setup: /'
}

install_streamer() {
    local sources=(pyproject.toml setup.py streamer/__init__.py streamer/ring/_records.c
        streamer/sinks/kafka/_record_batch.c)
    if fresh streamer "${sources[@]}" && compgen -G 'streamer/ring/_records.*.so' >/dev/null &&
        compgen -G 'streamer/sinks/kafka/_record_batch.*.so' >/dev/null; then return; fi
    step "compiling the C modules and installing streamer" pip_install --no-deps --no-build-isolation -e .
    # The build goes on without its C modules; here a compiler is known to be there.
    step "trying the C modules" $venv/bin/python -c 'import streamer.ring._records, streamer.sinks.kafka._record_batch'
    done_with
}

if ! mkdir -p build 2>/dev/null || ! [ -w build ]; then
    fail "build/ is not writable: this checkout is $(stat -c %U .)'s"
fi
exec 9>build/setup.lock
if ! flock -n 9; then
    say "waiting for another set-up of this checkout"
    flock 9
fi
: >$log

needed_to_run
if tests; then needed_to_test; fi
if [ "$mode" = bench ]; then needed_to_bench; fi
if [ ${#missing[@]} -gt 0 ]; then install_packages; fi
make_venv
requirements runtime requirements.txt requirements-build.txt
if [ "$mode" != run ]; then requirements dev requirements-dev.txt; fi
build_bpf
install_streamer
if tests; then tools/brokers.sh setup 9>&-; fi
