"""Reads BTF, the type information that the compiler puts into a BPF object.

Format: https://docs.kernel.org/bpf/btf.html. Only what the contract needs is kept: sizes,
members, enums and declaration tags.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from streamer.errors import ContractError

_INT, _PTR, _ARRAY, _STRUCT, _UNION, _ENUM = 1, 2, 3, 4, 5, 6
_TYPEDEF, _VOLATILE, _CONST, _RESTRICT, _FUNC = 8, 9, 10, 11, 12
_FUNC_PROTO, _VAR, _DATASEC, _DECL_TAG, _TYPE_TAG, _ENUM64 = 13, 14, 15, 17, 18, 19
_MODIFIERS = (_TYPEDEF, _VOLATILE, _CONST, _RESTRICT, _TYPE_TAG)
_SIGNED = 1
_LOCAL_TYPE_ID = 6  # enum bpf_core_relo_kind: of the object itself
_WORDS = {_STRUCT: "struct", _UNION: "union", _ENUM: "enum", _ENUM64: "enum"}


@dataclass(frozen=True, slots=True)
class Member:
    """A member of a struct. `offset` in bytes from its beginning; `index` is its place."""

    name: str
    offset: int
    type_id: int
    index: int


@dataclass(frozen=True, slots=True)
class Type:
    """One BTF type. `size` is a size or the id of the type referred to, as BTF has it."""

    name: str
    kind: int
    size: int
    members: tuple[Member, ...] = ()
    values: tuple[tuple[str, int], ...] = ()
    element: int = 0
    count: int = 0
    signed: bool = False

    @property
    def is_struct(self) -> bool:
        """Whether it is a struct, which has a definition."""
        return self.kind == _STRUCT


def section(path: Path, name: str) -> bytes:
    """The bytes of a section of a 64-bit little-endian ELF file.

    Raises:
        ContractError: no such file, not such an ELF file, or no such section.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ContractError(f"cannot read the BPF object {path}: {error.strerror}") from None
    try:
        return _find_section(data, name)
    except (struct.error, ValueError, IndexError) as error:
        raise ContractError(f"{path} is no BPF object with a section {name}: {error}") from None


def _find_section(data: bytes, name: str) -> bytes:
    if data[:6] != b"\x7fELF\x02\x01":
        raise ValueError("not a 64-bit little-endian ELF file")
    (table,) = struct.unpack_from("<Q", data, 40)
    size, count, names = struct.unpack_from("<HHH", data, 58)
    headers = [struct.unpack_from("<IIQQQQ", data, table + i * size) for i in range(count)]
    names_at = headers[names][4]
    for header in headers:
        start = names_at + header[0]
        if data[start : data.index(b"\0", start)] == name.encode():
            return data[header[4] : header[4] + header[5]]
    raise ValueError("section not found")


def relocated(path: Path, btf: Btf) -> set[str]:
    """The kernel's types that the programs of an object are relocated against: `struct file`.

    Format: struct btf_ext_header and struct bpf_core_relo (linux/btf.h, linux/bpf.h).

    Raises:
        ContractError: the object has no section for it, or one of another format.
    """
    data = section(path, ".BTF.ext")
    try:
        return set(_relocated(data, btf))
    except (struct.error, KeyError, IndexError) as error:
        raise ContractError(f"{path}: .BTF.ext cannot be read: {error!r}") from None


def _relocated(data: bytes, btf: Btf) -> Iterator[str]:
    (header,) = struct.unpack_from("<I", data, 4)
    start, length = struct.unpack_from("<II", data, 24)
    if not length:
        return
    rows = data[header + start : header + start + length]
    (size,) = struct.unpack_from("<I", rows)
    at = 4
    while at < len(rows):
        _, count = struct.unpack_from("<II", rows, at)
        for place in range(at + 8, at + 8 + count * size, size):
            _, type_id, _, kind = struct.unpack_from("<IIII", rows, place)
            if kind != _LOCAL_TYPE_ID:
                found = btf.types[type_id]
                yield f"{_WORDS[found.kind]} {found.name}"
        at += 8 + count * size


class Btf:
    """The types of one object, by id and by name."""

    def __init__(self, raw: bytes) -> None:
        """Parse the content of a `.BTF` section."""
        self.types: list[Type] = [Type("void", 0, 0)]
        self.tags: dict[tuple[int, int], list[str]] = {}
        _, _, _, header, type_off, type_len, str_off, _ = struct.unpack_from("<HBBIIIII", raw)
        self._strings = raw[header + str_off :]
        self._parse(raw[header + type_off : header + type_off + type_len])

    @classmethod
    def of_object(cls, path: Path) -> Btf:
        """The BTF of a compiled BPF object.

        Raises:
            ContractError: the file is unreadable or has no BTF.
        """
        return cls(section(path, ".BTF"))

    def find(self, name: str, *kinds: int) -> tuple[int, Type] | None:
        """Id and type of that name, of one of those kinds."""
        for type_id, found in enumerate(self.types):
            if found.name == name and found.kind in kinds:
                return type_id, found
        return None

    def structure(self, name: str) -> tuple[int, Type]:
        """Id and type of `struct name`.

        Raises:
            ContractError: there is none.
        """
        found = self.find(name, _STRUCT)
        if found is None:
            raise ContractError(f"the BPF object has no struct {name}")
        return found

    def enum(self, name: str) -> dict[str, int]:
        """Names and values of `enum name`.

        Raises:
            ContractError: there is none.
        """
        found = self.find(name, _ENUM, _ENUM64)
        if found is None:
            raise ContractError(f"the BPF object has no enum {name}")
        return dict(found[1].values)

    def constant(self, enum: str, name: str) -> int:
        """The value of one name of an enum.

        Raises:
            ContractError: no such enum, or no such name in it.
        """
        values = self.enum(enum)
        if name not in values:
            raise ContractError(f"enum {enum} of the BPF object has no {name}")
        return values[name]

    def functions(self) -> list[tuple[int, str]]:
        """Ids and names of the functions, in the order in which the source defines them."""
        return [(i, found.name) for i, found in enumerate(self.types) if found.kind == _FUNC]

    def variables(self) -> list[tuple[int, str]]:
        """Ids and names of the global variables, maps among them."""
        return [(i, found.name) for i, found in enumerate(self.types) if found.kind == _VAR]

    def tag(self, type_id: int, prefix: str, index: int = -1) -> str | None:
        """The declaration tag `prefix:…` of a type, or of its member `index`; None without."""
        for tag in self.tags.get((type_id, index), ()):
            if tag.startswith(prefix + ":"):
                return tag[len(prefix) + 1 :]
        return None

    def resolve(self, type_id: int) -> Type:
        """The type behind typedefs and qualifiers."""
        found = self.types[type_id]
        while found.kind in _MODIFIERS:
            found = self.types[found.size]
        return found

    def size_of(self, type_id: int) -> int:
        """The size of a type in bytes."""
        found = self.resolve(type_id)
        if found.kind == _ARRAY:
            return self.size_of(found.element) * found.count
        return 8 if found.kind == _PTR else found.size

    def is_integer(self, type_id: int) -> bool:
        """Whether the type is an integer or an enum."""
        return self.resolve(type_id).kind in (_INT, _ENUM, _ENUM64)

    def is_signed(self, type_id: int) -> bool:
        """Whether the type is a signed integer."""
        return self.resolve(type_id).signed

    def _name(self, offset: int) -> str:
        return self._strings[offset : self._strings.index(b"\0", offset)].decode()

    def _parse(self, data: bytes) -> None:
        at = 0
        while at < len(data):
            name, info, size = struct.unpack_from("<III", data, at)
            at = self._parse_one(data, at + 12, self._name(name), info, size)

    def _parse_one(self, data: bytes, at: int, name: str, info: int, size: int) -> int:
        kind, length, flag = info >> 24 & 0x1F, info & 0xFFFF, info >> 31
        made = Type(name, kind, size)
        if kind == _INT:
            (encoding,) = struct.unpack_from("<I", data, at)
            made = replace(made, signed=bool(encoding >> 24 & _SIGNED))
            at += 4
        elif kind == _ARRAY:
            element, _, count = struct.unpack_from("<III", data, at)
            made = replace(made, element=element, count=count)
            at += 12
        elif kind in (_STRUCT, _UNION):
            made = replace(made, members=self._members(data, at, length, flag))
            at += 12 * length
        elif kind == _ENUM:
            made = replace(made, values=self._values(data, at, length, "<Ii"))
            at += 8 * length
        elif kind == _ENUM64:
            made = replace(made, values=self._values(data, at, length, "<IQ"))
            at += 12 * length
        elif kind == _DECL_TAG:
            (index,) = struct.unpack_from("<i", data, at)
            self.tags.setdefault((size, index), []).append(name)
            at += 4
        else:
            at += {_FUNC_PROTO: 8 * length, _VAR: 4, _DATASEC: 12 * length}.get(kind, 0)
        self.types.append(made)
        return at

    def _members(self, data: bytes, at: int, count: int, bitfields: int) -> tuple[Member, ...]:
        # With the flag set, the upper byte of an offset is the width of a bitfield.
        mask = 0xFFFFFF if bitfields else 0xFFFFFFFF
        rows = (struct.unpack_from("<III", data, at + 12 * i) for i in range(count))
        return tuple(
            Member(self._name(name), (offset & mask) // 8, type_id, i)
            for i, (name, type_id, offset) in enumerate(rows)
        )

    def _values(self, data: bytes, at: int, count: int, form: str) -> tuple[tuple[str, int], ...]:
        size = struct.calcsize(form)
        rows = (struct.unpack_from(form, data, at + size * i) for i in range(count))
        return tuple((self._name(name), value) for name, value in rows)
