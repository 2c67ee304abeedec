"""The names of the helpers that the compiled objects call."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from streamer.errors import ContractError
from streamer.kernel.instructions import Calls

HEADER = Path("/usr/include/bpf/bpf_helper_defs.h")
"""libbpf's list, which the programs are compiled with."""

_LINE = re.compile(r"\(\*(\w+)\)\(.*\) = \(void \*\) (\d+);")
_HEAD = '''"""GENERATED from bpf/ by `make gen`: do not edit.

The helpers that the compiled objects call.
"""

from __future__ import annotations

HELPERS: dict[int, str] = {
'''


def helpers_module(objects: Iterable[Path]) -> str:
    """The module with the names of all helpers that these objects call, by number.

    Raises:
        ContractError: one that has no name.
    """
    numbers: set[int] = set()
    for path in objects:
        numbers.update(*Calls(path.read_bytes()).helpers().values())
    names = {int(number): name for name, number in _LINE.findall(HEADER.read_text())}
    unknown = numbers - names.keys()
    if unknown:
        raise ContractError(f"helpers without a name in {HEADER}: {sorted(unknown)}")
    lines = (f'    {number}: "{names[number]}",\n' for number in sorted(numbers))
    return f'{_HEAD}{"".join(lines)}}}\n"""Name of each helper, by its number."""\n'
