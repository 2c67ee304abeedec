"""What the BPF object and the Python side must agree on, read from the object's BTF."""

from __future__ import annotations

from streamer.errors import ContractError
from streamer.kernel.btf import Btf, Type

Layout = tuple[tuple[str, int, int], ...]
"""Members of a struct in order: name, offset and size in bytes."""

_ENUMS = (
    "event_schema",
    "event_stream",
    "event_flags",
    "filter_mode",
    "filter_verdict",
    "wake",
)
_SHARED = (
    "event_header",
    "settings",
    "kind_counters",
    "cpu_counters",
    "reader_state",
    "path_prefix",
)


def kind_names(btf: Btf) -> dict[str, int]:
    """Struct name and number of every kind: `{"process_exec": 1, …}`, by number."""
    values = btf.enum("event_kind")
    kinds = {
        name.removeprefix("KIND_").lower(): number
        for name, number in values.items()
        if name != "KIND_END"
    }
    return dict(sorted(kinds.items(), key=lambda item: item[1]))


def dotted(name: str) -> str:
    """The published kind of a struct: `process.exec` of `process_exec`."""
    return name.replace("_", ".", 1)


def layout_of(btf: Btf, struct: Type) -> Layout:
    """Where each member of a struct is."""
    return tuple((m.name, m.offset, btf.size_of(m.type_id)) for m in struct.members)


def contract_of(btf: Btf) -> dict[str, Layout]:
    """The layouts of every struct that both sides read or write, and the kinds' numbers."""
    names = (*_SHARED, *kind_names(btf))
    contract = {name: layout_of(btf, btf.structure(name)[1]) for name in names}
    contract["enum event_kind"] = tuple((name, n, 0) for name, n in kind_names(btf).items())
    for name in _ENUMS:
        contract[f"enum {name}"] = tuple((key, n, 0) for key, n in btf.enum(name).items())
    return contract


def compare(found: dict[str, Layout], expected: dict[str, Layout]) -> None:
    """Refuse an object that was built from another `events.h`.

    Raises:
        ContractError: names the first struct and member that differ.
    """
    for name in sorted(found.keys() | expected.keys()):
        if found.get(name) != expected.get(name):
            raise ContractError(
                f"the BPF object does not match events.py: {name}: "
                f"{_difference(found.get(name), expected.get(name))}; run `make gen`"
            )


def _difference(found: Layout | None, expected: Layout | None) -> str:
    if found is None:
        return "not in the object"
    if expected is None:
        return "not in events.py"
    for have, want in zip(found, expected, strict=False):
        if have != want:
            return f"the object has {_words(have)}, events.py {_words(want)}"
    return f"the object has {len(found)} members, events.py {len(expected)}"


def _words(member: tuple[str, int, int]) -> str:
    return "{} at {} ({} bytes)".format(*member)
