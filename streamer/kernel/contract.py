"""What the BPF objects and the Python side must agree on, read from an object's BTF.

Every object carries all of it: what they share is in `bpf/core/core.bpf.h`.
"""

from __future__ import annotations

from pathlib import Path

from streamer.errors import ContractError
from streamer.kernel.btf import Btf, Type

Layout = tuple[tuple[str, int, int], ...]
"""Members of a struct in order: name, offset and size in bytes; of an enum: name, number, 0."""

_ENUMS = (
    "event_schema",
    "event_kind",
    "summary_kind",
    "event_ring",
    "event_flags",
    "filter_mode",
    "filter_verdict",
    "fault",
    "wake",
    "perf_limits",
    "payer_kind",
    "paid",
    "packet_vlan",
    "packet_network",
    "packet_transport",
    "packet_ports",
    "packet_verdict",
    "syscall_flags",
    "syscall_limits",
)
_SHARED = (
    "event_base",
    "event_task",
    "settings",
    "kind_settings",
    "identity",
    "kind_counters",
    "cpu_counters",
    "reader_state",
    "pressure",
    "payer_key",
    "payer",
    "filter_modes",
    "path_prefix",
    "number_key",
    "comm_key",
    "exe_key",
    "flow_walk",
    "packet_count",
    "packet_counts",
    "syscall_place",
    "syscall_settings",
    "syscall_longest",
    "syscall_counts",
    "syscall_cgroup_key",
    "syscall_cgroup_counts",
    "profile_settings",
    "profile_set",
    "profile_counts",
    "profile_key",
    "profile_stack",
)
_KIND_END = "KIND_END"


def kind_names(btf: Btf) -> dict[str, int]:
    """Struct name and number of every kind: `{"process_exec": 1, …}`, by number."""
    values = btf.enum("event_kind")
    kinds = {
        name.removeprefix("KIND_").lower(): number
        for name, number in values.items()
        if name != _KIND_END
    }
    return dict(sorted(kinds.items(), key=lambda item: item[1]))


def summary_names(btf: Btf) -> dict[str, int]:
    """Name and number of every kind of summary: `{"xdp_counters": 48, …}`."""
    return {
        name.removeprefix("SUMMARY_").lower(): number
        for name, number in btf.enum("summary_kind").items()
    }


def kind_end(btf: Btf) -> int:
    """More than the largest number of a kind: what is kept by kind has so many entries."""
    return btf.constant("event_kind", _KIND_END)


def dotted(name: str) -> str:
    """The published kind of a struct: `process.exec` of `process_exec`."""
    return name.replace("_", ".", 1)


def layout_of(btf: Btf, struct: Type) -> Layout:
    """Where each member of a struct is."""
    return tuple((m.name, m.offset, btf.size_of(m.type_id)) for m in struct.members)


def contract_of(btf: Btf) -> dict[str, Layout]:
    """The layouts of every struct that both sides read or write, and the enums' numbers."""
    names = (*_SHARED, *kind_names(btf))
    contract = {name: layout_of(btf, btf.structure(name)[1]) for name in names}
    for name in _ENUMS:
        contract[f"enum {name}"] = tuple((key, n, 0) for key, n in btf.enum(name).items())
    return contract


def compare(found: dict[str, Layout], expected: dict[str, Layout]) -> None:
    """Refuse an object that was built from other sources than `objects.py`.

    Raises:
        ContractError: names the first struct and member that differ.
    """
    trouble = difference(found, expected, "objects.py")
    if trouble is not None:
        raise ContractError(f"the BPF object does not match objects.py: {trouble}; run `make gen`")


def check_object(path: Path) -> None:
    """Refuse an object whose structs are not those of `objects.py`.

    Raises:
        ContractError: names object, struct and member; or the object cannot be read.
    """
    # Imported only here: the generator, which makes it, uses this module too.
    from streamer.kernel.objects import CONTRACT

    try:
        compare(contract_of(Btf.of_object(path)), CONTRACT)
    except ContractError as error:
        raise ContractError(f"{path.name}: {error}") from None


def difference(found: dict[str, Layout], expected: dict[str, Layout], reference: str) -> str | None:
    """The first difference of an object from the `reference`, in words; None if there is none."""
    for name in sorted(found.keys() | expected.keys()):
        if found.get(name) != expected.get(name):
            return f"{name}: {_difference(found.get(name), expected.get(name), reference)}"
    return None


def _difference(found: Layout | None, expected: Layout | None, reference: str) -> str:
    if found is None:
        return "not in the object"
    if expected is None:
        return f"not in {reference}"
    for have, want in zip(found, expected, strict=False):
        if have != want:
            return f"the object has {_words(have)}, {reference} {_words(want)}"
    return f"the object has {len(found)} members, {reference} {len(expected)}"


def _words(member: tuple[str, int, int]) -> str:
    return "{} at {} ({} bytes)".format(*member)
