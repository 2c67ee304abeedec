"""Makes `streamer/events/calls.py`, the names and numbers of system calls, out of kernel headers.

    python -m tools.calls INCLUDE

INCLUDE is the directory of the uapi headers of a newer kernel for both machines, as Debian's
linux-libc-dev has it: `INCLUDE/MACHINE-linux-gnu/asm/unistd_64.h`.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from pathlib import Path

MACHINES = ("x86_64", "aarch64")
TARGET = Path(__file__).resolve().parent.parent / "streamer" / "events" / "calls.py"

_DEFINITION = re.compile(r"^#define __NR_(\w+) (\d+)$", re.MULTILINE)
_HEAD = '''\
"""Names and numbers of the system calls: x86_64, aarch64; None where the machine has none.

From the kernel's headers by `python -m tools.calls`. Nothing is edited here by hand.
"""

from __future__ import annotations

ALL = "*"
"""In place of a name: every call."""

NEVER_RETURN = frozenset({"exit", "exit_group"})
"""There is no time that they take."""

NUMBERS: dict[str, tuple[int | None, int | None]] = {
'''


def numbers_in(header: str) -> dict[str, int]:
    """The calls that the text of a `unistd_64.h` defines."""
    found = {name: int(number) for name, number in _DEFINITION.findall(header)}
    found.pop("syscalls", None)  # how many there are
    return found


def module(calls: Mapping[str, Mapping[str, int]]) -> str:
    """The text of the module, of the calls of each machine."""
    names = sorted({name for found in calls.values() for name in found})
    rows = [
        f'    "{name}": ({", ".join(str(calls[machine].get(name)) for machine in MACHINES)}),\n'
        for name in names
    ]
    return _HEAD + "".join(rows) + "}\n"


def main() -> None:
    """Write the module anew."""
    include = Path(sys.argv[1])
    calls = {
        machine: numbers_in((include / f"{machine}-linux-gnu/asm/unistd_64.h").read_text())
        for machine in MACHINES
    }
    TARGET.write_text(module(calls))


if __name__ == "__main__":
    main()
