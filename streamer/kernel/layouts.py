"""Writes BTF: a file of type information that libbpf relocates programs against.

What goes in comes from the kernel's headers (`headers.py`), what they lack from the running kernel
(`measured.py`, `/proc/kallsyms`). A type that is in none of them is left out, so that programs that
can do without it see that it is not there, and those that cannot do not load.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from streamer.kernel.headers import Refused
from streamer.kernel.libbpf import TypeWriter

KALLSYMS = "/proc/kallsyms"


class Field(NamedTuple):
    """A member of a struct that was measured: `type` is the struct that it is, `struct.member` for
    what that one is, or empty for a pointer.
    """

    name: str
    offset: int
    type: str = ""


Measured = Mapping[str, tuple[Field, ...]]
"""Structs by name, with those of their members that are known."""


def btf_of(
    types: list[list[Any]], found: Iterable[int], measured: Measured, functions: Iterable[str]
) -> bytes:
    """BTF with the types that `compiled.py` describes, structs that were measured, and functions.

    `found` are the indexes of those that are wanted; what they contain comes with them.

    Raises:
        OSError: libbpf refuses a type.
        ValueError: the description makes no sense.
    """
    with TypeWriter() as writer:
        made = _Made(writer, types)
        for index in found:
            made.id_of(index)
        for name, fields in measured.items():
            made.add_measured(name, fields)
        made.add_functions(functions)
        return writer.data()


def functions_there(wanted: Iterable[str], path: str = KALLSYMS) -> set[str]:
    """Those of `wanted` that are functions of the kernel, by its list of symbols.

    Raises:
        Refused: it cannot be read. Everybody may, where nothing hides it.
    """
    names = set(wanted)
    try:
        with open(path) as file:
            rows = (line.split(None, 3) for line in file)
            return {row[2] for row in rows if row[1] in "tTwW" and row[2] in names}
    except PermissionError as error:
        hidden = "ProtectKernelTunables= of systemd hides it"
        raise Refused(f"{path}: {error.strerror} ({hidden})") from None
    except OSError as error:
        raise Refused(f"{path}: {error.strerror}") from None


class _Made:
    """The types that were written, by their indexes. What contains another comes after it."""

    def __init__(self, writer: TypeWriter, types: list[list[Any]]) -> None:
        self._writer = writer
        self._types = types
        self._ids: dict[int, int] = {}
        self._named: dict[str, int] = {}
        self._pointer = writer.pointer()
        self._count = writer.integer("unsigned int", 4, "")  # that arrays are indexed with

    def id_of(self, index: int) -> int:
        """The id of a type. Raises ValueError, OSError."""
        if index not in self._ids:
            self._ids[index] = self._add(self._types[index])
        return self._ids[index]

    def _add(self, described: list[Any]) -> int:
        match described:
            case ["void"]:
                return 0
            case ["pointer"]:
                return self._pointer
            case ["int", str(name), int(size), str(encoding)]:
                return self._writer.integer(name, size, encoding)
            case ["array", int(of), int(count)]:
                return self._writer.array(self.id_of(of), self._count, count)
            case ["enum", str(name), int(size), list(values)]:
                return self._writer.enum(name, size, values)
            case [("struct" | "union") as kind, str(name), int(size), list(members)]:
                fields = [(field, self.id_of(of), bit, bits) for field, of, bit, bits in members]
                made = self._writer.composite(kind, name, size, fields)
                self._named |= {f"{name}.{field}": of for field, of, *_ in fields} | {name: made}
                return made
        raise ValueError(f"no type: {described!r:.100}")

    def add_measured(self, name: str, fields: tuple[Field, ...]) -> None:
        """A struct of which some members are known, and not the size."""
        if name in self._named:
            return
        rows = [
            (one.name, self._named[one.type] if one.type else self._pointer, one.offset * 8, 0)
            for one in fields
        ]
        size = max(one.offset for one in fields) + 512  # of more than is read of it
        self._named[name] = self._writer.composite("struct", name, size, rows)

    def add_functions(self, names: Iterable[str]) -> None:
        """Functions, of which only the name counts."""
        prototype = self._writer.prototype()
        for name in sorted(names):
            self._writer.function(name, prototype)
