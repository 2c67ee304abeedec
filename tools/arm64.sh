#!/usr/bin/env bash
# streamer for arm64, made on this machine, as a directory that an arm64 machine with Debian 12's
# Python and libbpf runs it from: build/arm64. For tools/kernels.sh, whose guests of that kind do
# not compile themselves.
#
#   tools/arm64.sh
#
# Kernel programs by clang, C modules by Debian's cross compiler against the guest's own headers,
# packages as wheels for arm64 with the hashes that are pinned for all machines.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

suite=trixie-arm64
guest=${STREAMER_CACHE:-$PWD/.cache}/kernels/$suite/root
staged=$PWD/build/arm64
compiler=aarch64-linux-gnu-gcc
modules=(streamer/ring/_records streamer/sinks/kafka/_record_batch)

die() { echo "arm64: $*" >&2; exit 1; }

if ! command -v $compiler >/dev/null || [ ! -d /usr/aarch64-linux-gnu/include ]; then
    [ "$(id -u)" = 0 ] || die "missing; as root: apt-get install gcc-aarch64-linux-gnu libc6-dev-arm64-cross"
    echo "arm64: installing the cross compiler"
    DEBIAN_FRONTEND=noninteractive apt-get -qq install -y --no-install-recommends \
        gcc-aarch64-linux-gnu libc6-dev-arm64-cross >/dev/null || die "cannot install it: apt-get update?"
fi
tools/kernels.sh setup "$suite"

python3 bpf/build.py --machine aarch64 build/bpf-arm64
mkdir -p "$staged"
rm -rf "$staged"/{benchmarks,bpf,schemas,streamer,tests,tools}
# What git has, without what was built here for this machine.
git ls-files -z benchmarks bpf schemas streamer tests tools pyproject.toml | tar --null -cf - --files-from=- | tar -xf - -C "$staged"
cp -r build/bpf-arm64 "$staged/streamer/bpf"

python=$(cd "$guest/usr/include" && echo python3.*)
for module in "${modules[@]}"; do
    $compiler -shared -fPIC -O2 -Wall -Wextra -I"$guest/usr/include/$python" -I"$guest/usr/include" \
        "$module.c" -o "$staged/$module.cpython-${python//[!0-9]/}-aarch64-linux-gnu.so"
done

# What the tests run, which they would compile themselves.
mkdir -p "$staged/build/tests"
$compiler -O1 -static -pthread -Wall -Werror -o "$staged/build/tests/subject" tests/kernel/subject.c

pins=$(sha256sum requirements.txt requirements-dev.txt)
if [ "$(cat "$staged/pins" 2>/dev/null)" != "$pins" ]; then
    rm -rf "$staged/site" "$staged/pins"
    .venv/bin/python -m pip install -q --disable-pip-version-check --target "$staged/site" --no-deps \
        --require-hashes --only-binary :all: --implementation cp --python-version "${python#python}" \
        --platform manylinux_2_17_aarch64 --platform manylinux2014_aarch64 \
        --platform manylinux_2_28_aarch64 -r requirements.txt -r requirements-dev.txt
    echo "$pins" >"$staged/pins"
fi
