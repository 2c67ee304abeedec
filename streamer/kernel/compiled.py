"""Has bcc compile a C text with the kernel's headers, and says how the types in it are laid out.

Run by itself (`/usr/bin/python3 -I`), since bcc belongs to the system's Python and not to ours: it
imports nothing of `streamer`, and Python 3.9 is enough. Reads a request from standard input, and
writes the answer to standard output, both JSON:

    {"text": C, "flags": [...], "source": directory, "types": [["struct", name], ...]}
    {"types": [...], "found": {"struct name": index, ...}, "files": [...]}
    {"error": why}

Nothing is loaded: bcc is asked to print what it makes of the text (DEBUG_LLVM_IR), which with -g
has a description of every type that the text uses, and with -H which files were read. A type is

    ["void"], ["pointer"], ["int", name, bytes, "signed" | "bool" | ""], ["array", of, count],
    ["enum", name, bytes, [[name, value], ...]],
    ["struct" | "union", name, bytes, [[name, type, bit, bits], ...]]

where `of` and `type` are indexes, `bit` is the offset, and `bits` the width of a bit-field, else 0.
Qualifiers and typedefs are left out. A type without a definition is not found.
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import sys
from typing import Any

DEBUG_LLVM_IR = 1
MOST_OUTPUT = 64 << 20
_LINE = re.compile(r"^!(\d+) = (?:distinct )?!(\w*)([({])(.*)[)}]$")
_ATTRIBUTE = re.compile(r'(\w+): (?:"((?:[^"\\]|\\.)*)"|(![\d{}]*|[^,()]+))')
_REFERENCE = re.compile(r"!(\d+)")
_READ_FILE = re.compile(r"^\.+ (.+)$")
_ERROR = re.compile(r"(\S+?:\d+:\d+: )?(fatal )?error: (.*)")
_COMPOSITES = {
    "DW_TAG_structure_type": "struct",
    "DW_TAG_union_type": "union",
    "DW_TAG_enumeration_type": "enum",
}
_THROUGH = (
    *("DW_TAG_typedef", "DW_TAG_const_type", "DW_TAG_volatile_type", "DW_TAG_restrict_type"),
    "DW_TAG_atomic_type",
)
_ENCODINGS = {"DW_ATE_signed": "signed", "DW_ATE_signed_char": "signed", "DW_ATE_boolean": "bool"}

Attributes = dict[str, str]


def said_by_compiler(text: str, flags: list[str]) -> str:
    """What bcc prints about a C text; bcc's own messages are in it, too."""
    from bcc import libbcc  # type: ignore[import-not-found]

    given = (ctypes.c_char_p * len(flags))(*(flag.encode() for flag in flags))
    kept = {stream: os.dup(stream) for stream in (1, 2)}
    with open(os.memfd_create("output"), "r+b") as output:
        for stream in kept:
            os.dup2(output.fileno(), stream)
        libbcc.lib.bpf_module_create_c_from_string(
            text.encode(), DEBUG_LLVM_IR, given, len(flags), False, None
        )
        for stream, descriptor in kept.items():
            os.dup2(descriptor, stream)
        output.seek(0)
        return output.read(MOST_OUTPUT).decode(errors="replace")


def files_read(output: str, source: str) -> list[str]:
    """The files that the compiler has read; those that bcc brings itself are in no file system."""
    names = (_READ_FILE.match(line) for line in output.splitlines())
    paths = {os.path.join(source, name[1]) for name in names if name}
    return sorted(path for path in paths if not path.startswith("/virtual/"))


class Description:
    """The types in LLVM's description, by the numbers that they have there."""

    def __init__(self, output: str) -> None:
        """`output` is what the compiler has printed."""
        self.types: list[Any] = []
        self._nodes: dict[str, tuple[str, Attributes]] = {}
        self._lists: dict[str, list[str]] = {}
        self._indexes: dict[str | None, int] = {}
        self._composites: dict[tuple[str, str], str] = {}
        for line in output.splitlines():
            found = _LINE.match(line)
            if found is None:
                continue
            number, what, bracket, rest = found.groups()
            if bracket == "{":
                self._lists[number] = _REFERENCE.findall(rest)
            elif what.startswith("DI"):
                self._add(number, what, rest)

    def _add(self, number: str, what: str, rest: str) -> None:
        attributes = {
            match[1]: match[3] if match[3] is not None else match[2]
            for match in _ATTRIBUTE.finditer(rest)
        }
        self._nodes[number] = (what, attributes)
        kind = _COMPOSITES.get(attributes.get("tag", ""))
        if kind and "DIFlagFwdDecl" not in attributes.get("flags", ""):
            self._composites.setdefault((kind, attributes.get("name", "")), number)

    def find(self, kind: str, name: str) -> int | None:
        """The index of a struct, union or enum that is defined; None if it is not."""
        number = self._composites.get((kind, name))
        return None if number is None else self._index(number)

    def _elements(self, attributes: Attributes) -> list[Attributes]:
        numbers = self._lists.get(attributes.get("elements", "!").lstrip("!"), ())
        return [self._nodes[number][1] for number in numbers if number in self._nodes]

    def _index(self, number: str | None) -> int:
        """Of the type of that number; None stands for void."""
        while number is not None and self._nodes[number][1].get("tag") in _THROUGH:
            number = _reference(self._nodes[number][1])
        if number in self._indexes:
            return self._indexes[number]
        index = self._indexes[number] = len(self.types)
        self.types.append(None)  # it may be in itself, by way of what it holds
        self.types[index] = ["void"] if number is None else self._made(*self._nodes[number])
        return index

    def _made(self, what: str, attributes: Attributes) -> list[Any]:
        tag = attributes.get("tag", "")
        size = int(attributes.get("size", "0")) // 8
        name = attributes.get("name", "")
        if what == "DIBasicType":
            return ["int", name, size, _ENCODINGS.get(attributes.get("encoding", ""), "")]
        if tag == "DW_TAG_array_type":
            return self._array(attributes)
        if tag == "DW_TAG_enumeration_type":
            values = [(one["name"], int(one["value"])) for one in self._elements(attributes)]
            return ["enum", name, size, values]
        if tag in _COMPOSITES:
            members = [
                self._member(one)
                for one in self._elements(attributes)
                if one.get("tag") == "DW_TAG_member"
            ]
            return [_COMPOSITES[tag], name, size, members]
        return ["pointer"]

    def _member(self, attributes: Attributes) -> list[Any]:
        is_field = "DIFlagBitField" in attributes.get("flags", "")
        return [
            attributes.get("name", ""),
            self._index(_reference(attributes)),
            int(attributes.get("offset", "0")),
            int(attributes["size"]) if is_field else 0,
        ]

    def _array(self, attributes: Attributes) -> list[Any]:
        *outer, last = [max(int(one.get("count", "0")), 0) for one in self._elements(attributes)]
        made = ["array", self._index(_reference(attributes)), last]
        for count in reversed(outer):
            self.types.append(made)
            made = ["array", len(self.types) - 1, count]
        return made


def _reference(attributes: Attributes) -> str | None:
    found = _REFERENCE.match(attributes.get("baseType", ""))
    return found[1] if found else None


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """The answer to a request."""
    try:
        output = said_by_compiler(request["text"], request["flags"])
    except ImportError as error:
        return {"error": f"no bcc: {error}"}
    described = Description(output)
    looked_for = {f"{kind} {name}": described.find(kind, name) for kind, name in request["types"]}
    found = {name: index for name, index in looked_for.items() if index is not None}
    if not found:
        errors = [line for line in output.splitlines() if _ERROR.match(line)]
        return {"error": (errors or ["bcc has described no type"])[0][:300]}
    files = files_read(output, request["source"])
    return {"types": described.types, "found": found, "files": files}


if __name__ == "__main__":
    json.dump(answer(json.load(sys.stdin)), sys.stdout)
