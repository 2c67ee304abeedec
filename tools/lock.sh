#!/usr/bin/env bash
# Pins the Python packages anew, with the hashes of all their files (every platform and Python):
# requirements.txt and requirements-build.txt from pyproject.toml, requirements-dev.txt from its
# .in file. Reads the package index that pip is set up with, and writes no address of it.
#
#   tools/lock.sh [--upgrade]     without it, pins that still fit are kept
set -euo pipefail
cd "$(dirname "$0")/.."
venv=build/lock-venv

# The oldest Python that is supported: newer ones need no package that it does not.
${PYTHON:-/usr/bin/python3} -m venv --clear $venv
$venv/bin/python -m pip install -q --disable-pip-version-check pip-tools

pin() {
    local output=$1
    shift
    $venv/bin/pip-compile -q "$@" --output-file "$output" --generate-hashes --allow-unsafe \
        --strip-extras --no-header --annotation-style line --no-emit-options \
        --no-emit-index-url --no-emit-find-links --no-emit-trusted-host
    echo "pinned $output"
}

pin requirements.txt pyproject.toml "$@"
pin requirements-build.txt --only-build-deps --build-deps-for wheel pyproject.toml "$@"
pin requirements-dev.txt requirements-dev.in "$@"
