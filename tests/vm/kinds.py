"""What each kernel gives of each kind of event: the table in docs/kernels.md.

    python -m tests.vm.kinds     what `streamer check --json` says of everything, on this kernel

`tests.vm.suite` has it of every kernel that it boots.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

import msgspec

ROOT = Path(__file__).resolve().parent.parent.parent
PAGE = ROOT / "docs" / "kernels.md"
EVERYTHING = """\
events = ["*"]
[kernel]
interfaces = ["lo"]
open_latency = true
unspecified_drops = true
syscalls = ["*"]
syscall_slow_ms = 1
profile_hz = 99
"""


class Kind(msgspec.Struct, frozen=True):
    """How much of a kind a kernel gives, and why not all of it."""

    status: str
    reason: str


class Kinds(msgspec.Struct, frozen=True):
    """What is read of the output of `streamer check --json`."""

    kernel: str
    kinds: dict[str, Kind]


def here() -> bytes:
    """What `streamer check --json` says of everything, on this kernel. Raises RuntimeError when it
    says nothing.
    """
    with tempfile.NamedTemporaryFile("w", suffix=".toml") as config:
        config.write(EVERYTHING)
        config.flush()
        command = [sys.executable, "-m", "streamer", "check", "--json", "--config", config.name]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, check=False)
    if not done.stdout:
        raise RuntimeError(f"streamer check: {done.stderr.decode(errors='replace')}")
    return done.stdout


def read(output: bytes) -> Kinds:
    """Raises msgspec.ValidationError for what `streamer check` does not write."""
    return msgspec.json.decode(output, type=Kinds)


def table(by_kernel: Mapping[str, Kinds]) -> list[str]:
    """A line per kind, a column per kernel, and below it why a cell is not `full`."""
    notes: dict[str, int] = {}
    names = sorted({name for found in by_kernel.values() for name in found.kinds})
    lines = ["| kind | " + " | ".join(by_kernel) + " |", "| --- |" + " --- |" * len(by_kernel)]
    for name in names:
        cells = [_cell(found.kinds.get(name), notes) for found in by_kernel.values()]
        lines.append(f"| `{name}` | " + " | ".join(cells) + " |")
    return [*lines, "", *(f"{number}. {reason}" for reason, number in notes.items())]


def _cell(kind: Kind | None, notes: dict[str, int]) -> str:
    if kind is None:
        return "unknown"
    if not kind.reason:
        return kind.status
    return f"{kind.status} ({notes.setdefault(kind.reason, len(notes) + 1)})"


def page(by_kernel: Mapping[str, Kinds]) -> str:
    """All of docs/kernels.md."""
    return _HEAD + "\n".join(table(by_kernel)) + "\n"


_HEAD = """\
# What each kernel gives

Written by `make test-kernels WRITE=--write`, which has `streamer check` say it on each of these
kernels with everything switched on, and runs the tests of the kernel there. Numbers in brackets
say below why a kind is not all there. `streamer check --events '*'` says the same of any kernel.

"""


if __name__ == "__main__":
    sys.stdout.buffer.write(here())
