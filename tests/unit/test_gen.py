"""One definition of an event: what is derived from `bpf/`, and what is refused there."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from streamer.errors import ContractError
from streamer.events import kinds as events
from streamer.events.catalogue import SELECTABLE
from streamer.events.summaries import SUMMARIES
from streamer.kernel import objects
from streamer.kernel.btf import Btf
from streamer.kernel.contract import compare, contract_of
from streamer.ring import _records, records_py
from tests.bpf_variant import EVERY_RECORD, ROOT, Change, Variant, example_of_a_kind
from tests.golden.cases import CLOCK_OFFSET_NS, ID_PREFIX, Case, constants, load, published
from tools.gen.files import outputs
from tools.gen.sensors import read_sensor

LAST_OF_EXIT = (
    '	__u8 core_dumped AS("bool") DOC("whether a core was dumped");\n	__u8 pad[7] HIDDEN;\n'
)
ANSWER = '	__u64 answer DOC("the answer, in units of \\"one\\"");\n'
OBJECTS = ROOT / "streamer" / "bpf"
CORE = ("core",)
"""Without the sensors, which have no part in what a record looks like, compiling is quick."""

Make = Callable[[Mapping[str, Change | list[Change]]], Variant]


@pytest.fixture
def variant(tmp_path: Path) -> Make:
    return lambda changes: Variant(tmp_path / "variant", changes, CORE)


def generate(made: Variant, *options: str) -> subprocess.CompletedProcess[str]:
    """The command that derives everything, for another source tree."""
    command = [sys.executable, "-m", "tools.gen", "--objects", str(made.objects)]
    command += ["--root", str(made.root), *options]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)


def refusal(made: Variant) -> str:
    """What the command says when it refuses the tree: one line, and nothing is written."""
    ended = generate(made)
    (line,) = ended.stderr.splitlines()
    assert ended.returncode == 1
    assert line.startswith("gen: ")
    assert not (made.root / "schemas").exists()
    return line


def generated(made: Variant, place: str = "streamer/events/kinds.py") -> ModuleType:
    """A module that was generated for another source tree."""
    name = "streamer_of_a_test_" + Path(place).stem
    spec = importlib.util.spec_from_file_location(name, made.root / place)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # where annotations are looked up
    spec.loader.exec_module(module)
    return module


# ---------------------------------------------------------------- one line, one command


@pytest.fixture
def with_answer(variant: Make) -> Variant:
    """A field more in `struct process_exit`: one line of C, and one command."""
    made = variant({"events.h": (LAST_OF_EXIT, LAST_OF_EXIT + ANSWER)})
    assert generate(made).returncode == 0
    return made


def test_a_field_more_is_one_line_and_one_command(with_answer: Variant) -> None:
    """It is in the Struct, the layout table, the schema and the documentation."""
    module = generated(with_answer)
    doc = 'the answer, in units of "one"'
    assert module.ProcessExit.__struct_fields__[-3:] == ("answer", "time", "replayed")
    assert module.ProcessExit.__annotations__["answer"].startswith("Annotated[int,")
    number, old = next((n, r) for n, r in events.RECORDS.items() if r.kind == "process.exit")
    layout = module.RECORDS[number]
    assert (layout.size, layout.max_size) == (old.size + 8, old.max_size + 8)
    assert layout.fields[-3] == ("answer", "u64", old.size, None)
    assert module.KINDS["process.exit"].fields[-3] == ("answer", "integer", doc)
    contract = generated(with_answer, "streamer/kernel/objects.py").CONTRACT
    assert contract["process_exit"][-1] == ("answer", old.size, 8)
    schema = json.loads((with_answer.root / "schemas" / "process.exit.json").read_text())
    bounds = {"type": "integer", "minimum": 0}  # of a u64 the end is more than schemas can say
    assert schema["properties"]["answer"] == bounds | {"description": doc}
    assert "answer" in schema["required"]
    page = (with_answer.root / "docs" / "events.md").read_text()
    assert f"| `answer` | integer | {doc} |" in page


BOUNDED = """	__u64 share RANGE("1..") OPTIONAL DOC("a");
	__s32 level RANGE("-20..19") DOC("b");
	__u16 port DOC("c");
	__u8 version AMONG("4,6") DOC("d");
	__u8 way AS("names:unknown,out,in") OPTIONAL DOC("e");
"""


def test_what_is_bounded_is_so_in_the_schema(variant: Make) -> None:
    """By its C type, or closer, and the bounds hold when a record is read back."""
    made = variant({"events.h": (LAST_OF_EXIT, LAST_OF_EXIT + BOUNDED)})
    assert generate(made).returncode == 0
    schema = json.loads((made.root / "schemas" / "process.exit.json").read_text())
    found = {name: schema["properties"][name] for name in ("share", "level", "port", "version")}
    assert found == {
        "share": {"type": "integer", "minimum": 1, "description": "a"},
        "level": {"type": "integer", "minimum": -20, "maximum": 19, "description": "b"},
        "port": {"type": "integer", "minimum": 0, "maximum": 65535, "description": "c"},
        "version": {"enum": [4, 6], "description": "d"},
    }
    assert sorted(schema["properties"]["way"]["enum"]) == ["in", "out", "unknown"]
    assert set(schema["properties"]) - set(schema["required"]) == {
        *("share", "way", "time", "replayed")
    }
    assert schema["additionalProperties"] is False
    page = (made.root / "docs" / "events.md").read_text()
    assert "| `level` | integer from -20 to 19 | b |\n| `port` | integer | c |\n" in page
    assert '| `version` | 4 or 6 | d |\n| `way` | "unknown" or "out" or "in" | e |\n' in page


def exit_case() -> Case:
    return next(case for case in load() if case.event["event"] == "process.exit")


def with_more(record: bytes, more: bytes) -> bytes:
    """The record with bytes at its end, and its size set right."""
    made = bytearray(record + more)
    struct.pack_into("<I", made, events.HEADER["size"], len(made))
    return bytes(made)


def decode(reader: ModuleType, module: ModuleType, case: Case, record: bytes) -> Any:
    prefix = f"{ID_PREFIX}-{case.ring}"
    decoder = reader.Decoder(module.HEADER, module.RECORDS, constants(case.ring), prefix)
    decoder.clock_offset_ns = CLOCK_OFFSET_NS
    return decoder.decode(record)


@pytest.mark.parametrize("reader", [_records, records_py], ids=["compiled", "twin"])
def test_a_record_with_the_field_is_decoded(with_answer: Variant, reader: ModuleType) -> None:
    """By a new consumer with the field, and by an old one as before."""
    case = exit_case()
    record = with_more(case.record, (42).to_bytes(8, "little"))
    new = decode(reader, generated(with_answer), case, record)
    assert published(new) == {**case.event, "answer": 42}
    assert published(decode(reader, events, case, record)) == case.event


def test_the_loader_names_what_disagrees(with_answer: Variant) -> None:
    found = contract_of(Btf.of_object(with_answer.objects / "core.bpf.o"))
    with pytest.raises(ContractError, match=r"process_exit: .*9 members, .*8; run `make gen`"):
        compare(found, objects.CONTRACT)
    compare(found, generated(with_answer, "streamer/kernel/objects.py").CONTRACT)


def test_the_example_of_a_kind_is_true(tmp_path: Path) -> None:
    """One struct, one hook, one command, as CONTRIBUTING.md says."""
    made = Variant(tmp_path / "variant", example_of_a_kind(), ("core", "process"))
    assert generate(made).returncode == 0
    info = generated(made).KINDS["process.chdir"]
    assert (info.ring, info.doc) == ("bulk", "A call of fchdir returned.")
    process = generated(made, "streamer/kernel/objects.py").SENSORS["process"]
    assert [p.name for p in process.programs if "process.chdir" in p.kinds] == ["on_fchdir_exit"]


# ---------------------------------------------------------------- stale or not


def test_what_is_committed_is_up_to_date() -> None:
    """With the compiled objects that are there, nothing would be written."""
    assert [path for path, text in outputs(OBJECTS, ROOT) if path.read_text() != text] == []


def test_the_compiled_objects_are_of_these_sources(variant: Make) -> None:
    made = variant({})
    assert contract_of(Btf.of_object(made.objects / "core.bpf.o")) == objects.CONTRACT


def test_a_second_run_writes_nothing(with_answer: Variant) -> None:
    again = generate(with_answer)
    assert (again.returncode, again.stdout, again.stderr) == (0, "", "")
    assert generate(with_answer, "--check").returncode == 0


def test_check_names_every_stale_file_and_writes_none(with_answer: Variant) -> None:
    root = with_answer.root
    stale = [root / "streamer/events/kinds.py", root / "streamer/kernel/objects.py"]
    stale += [root / "docs/events.md", root / "schemas/net.close.json"]
    for path in stale[:3]:
        path.write_text(path.read_text() + "\n# changed by hand\n")
    stale[3].unlink()
    checked = generate(with_answer, "--check")
    assert checked.returncode == 1
    assert sorted(checked.stdout.splitlines()) == sorted(
        f"gen: {path} is stale: run `make gen`" for path in stale
    )
    assert "# changed by hand" in stale[0].read_text()
    assert not stale[3].exists()
    assert generate(with_answer).returncode == 0
    assert generate(with_answer, "--check").returncode == 0


def test_generated_schemas_are_of_every_kind() -> None:
    found = {path.stem for path in (ROOT / "schemas").glob("*.json")}
    assert found >= events.KINDS.keys()
    for kind in events.KINDS:
        schema = json.loads((ROOT / "schemas" / f"{kind}.json").read_text())
        properties = schema["properties"]
        assert schema["required"] == [
            name for name in properties if name not in ("time", "replayed")
        ]
        assert properties["event"] == {"enum": [kind]}
        assert all(p["description"] for name, p in properties.items() if name != "event")


# ---------------------------------------------------------------- kinds with and without a task

PACKET = """struct xdp_drop {
	struct event_base base;
	__u32 interface DOC("index of the interface");
	__u16 name_len AS("str:name") DOC("its name");
	__u8 pad[2] HIDDEN;
	__u8 data[256] HIDDEN;
} RING("bulk") DOC("A packet was dropped.") UNSEEN("packets of others|what a driver drops");

"""


@pytest.fixture
def with_packet(variant: Make) -> ModuleType:
    """The events with a kind more, that has no task."""
    changes = [
        ("	KIND_END = 64,", "	KIND_XDP_DROP = 63,\n	KIND_END = 64,"),
        (EVERY_RECORD, PACKET + EVERY_RECORD),
        (
            "	struct net_close net_close;",
            "	struct net_close net_close;\n	struct xdp_drop xdp_drop;",
        ),
    ]
    made = variant({"events.h": changes})
    assert generate(made).returncode == 0
    page = (made.root / "docs" / "events.md").read_text()
    assert "A packet was dropped. Ring: bulk. It has no task.\n" in page
    assert "\nNever observed: packets of others; what a driver drops.\n" in page
    return generated(made)


def test_a_kind_without_a_task_has_no_fields_of_one(with_packet: ModuleType) -> None:
    module, layout = with_packet, with_packet.RECORDS[63]
    assert module.XdpDrop.__mro__[1] is module.Event
    assert module.XdpDrop.__struct_fields__ == (
        *module.Event.__struct_fields__[:-2],
        "interface",
        "name",
        "time",
        "replayed",
    )
    assert (layout.size, layout.max_size) == (40, 40 + 256)
    info = module.KINDS["xdp.drop"]
    assert (info.ring, info.unseen) == ("bulk", ("packets of others", "what a driver drops"))
    assert [field.name for field in info.fields] == list(module.XdpDrop.__struct_fields__)


@pytest.mark.parametrize("reader", [_records, records_py], ids=["compiled", "twin"])
def test_a_record_without_a_task_is_decoded(with_packet: ModuleType, reader: ModuleType) -> None:
    decoder = reader.Decoder(with_packet.HEADER, with_packet.RECORDS, constants("bulk"), "p")
    base = struct.pack("<QQIIHHBBBB", 7, 3, 44, 10, 63, 1, 0, 1, 1, 1)
    event = decoder.decode(base + struct.pack("<IHH", 5, 4, 0) + b"eth\xc3")
    assert (event.boot_ns, event.seq, event.weight, event.cpu, event.ring) == (7, 3, 10, 1, "bulk")
    assert (event.interface, event.name) == (5, "eth")
    assert (event.truncated, event.incomplete, event.invalid_utf8) == (("name",), True, False)


def test_what_every_event_begins_with() -> None:
    """The order is published, and consumers may rely on it. What need not be there is last."""
    assert events.Event.__struct_fields__ == (
        "schema", "id", "time_ns", "boot_ns", "host", "boot_id", "ring", "seq", "cpu", "weight",
        "truncated", "incomplete", "invalid_utf8", "time", "replayed",
    )  # fmt: skip
    task = [name for name, _, _ in objects.CONTRACT["event_task"] if name != "pad"]
    own = events.TaskEvent.__struct_fields__[len(events.Event.__struct_fields__) - 2 :]
    assert list(own) == [*task, "time", "replayed"]
    for layout in events.RECORDS.values():
        members = objects.CONTRACT[layout.kind.replace(".", "_")]
        has_task = any(name == "task" for name, _, _ in members)
        assert issubclass(layout.struct, events.TaskEvent if has_task else events.Event)
        _, offset, size = members[-1]
        assert layout.max_size == offset + size
        assert layout.size == (offset if members[-1][0] == "data" else layout.max_size)


def test_the_strings_that_can_be_cut_are_those_of_the_record() -> None:
    for layout in events.RECORDS.values():
        (cut,) = [field for field in layout.fields if field.op == "cut"]
        strings = tuple(f.name for f in layout.fields if f.op in ("str", "argv", "parsed"))
        lines = tuple(field.name for field in layout.fields if field.op == "line")
        assert (cut.name, cut.argument) == ("truncated", (*strings, *lines))


# ---------------------------------------------------------------- objects.py


def compiled(directory: Path = OBJECTS) -> dict[str, Btf]:
    paths = directory.glob("*.bpf.o")
    return {path.name.removesuffix(".bpf.o"): Btf.of_object(path) for path in paths}


def test_the_sensors_are_the_compiled_objects() -> None:
    assert next(iter(objects.SENSORS)) == "core"
    assert objects.SENSORS.keys() == compiled().keys()
    emitted = [k for s in objects.SENSORS.values() for p in s.programs for k in p.kinds]
    assert set(emitted) == SELECTABLE.keys()


def test_the_numbers_of_the_kinds() -> None:
    numbers = {layout.kind: number for number, layout in events.RECORDS.items()}
    summaries = {kind: objects.KIND_NUMBERS[kind] for kind in SUMMARIES}
    assert numbers | summaries == objects.KIND_NUMBERS
    assert numbers.keys().isdisjoint(summaries)
    assert max(objects.KIND_NUMBERS.values()) < objects.KIND_END


@pytest.mark.parametrize("name", list(objects.SENSORS))
def test_programs_are_in_the_order_of_the_source(name: str) -> None:
    """Which is the order of preference, where several are of one hook."""
    sensor = objects.SENSORS[name]
    source = (ROOT / "bpf" / f"{name}.bpf.c").read_text()
    # Some are made by macros, from a part of their name.
    words = [program.name for program in sensor.programs]
    found = [match.start() for word in words if (match := re.search(rf"\b{word}\b", source))]
    assert found == sorted(found)
    hooks = [program.hook for program in sensor.programs]
    assert sorted(hooks, key=hooks.index) == hooks  # the ways to one thing are beside each other
    order = Btf.of_object(OBJECTS / f"{name}.bpf.o").functions()
    assert [word for _, word in order if word in words] == words


WITHOUT = {
    "file": {
        f"on_{call}_{at}"
        for call in ("open", "creat", "openat", "openat2")
        for at in ("start", "enter")
    },
    "process": {"on_prepare_exec", "on_exec_unpreempted", "on_fork_unpreempted"},
}
"""Programs that the kernel's own BTF is needed for: their hooks have another, or none."""


@pytest.mark.parametrize("name", list(objects.SENSORS))
def test_the_objects_for_kernels_without_btf_say_the_same(name: str) -> None:
    btf = compiled(OBJECTS / "nobtf")[name]
    assert contract_of(btf) == objects.CONTRACT
    sensor, found = objects.SENSORS[name], read_sensor(name, btf, objects.SENSORS["core"])
    there = {one.name for one in found.programs}
    lacking = tuple(one for one in sensor.programs if one.name not in there)
    assert {one.name for one in lacking} == WITHOUT.get(name, set())
    with_btf = tuple(one for one in sensor.programs if one not in lacking)
    assert found == sensor._replace(programs=with_btf)


def test_the_privileged_process_imports_little() -> None:
    code = "import sys, streamer.kernel.objects; print(*sys.modules)"
    ended = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    loaded = set(ended.stdout.split())
    assert "streamer.kernel.tags" in loaded
    assert not loaded & {"msgspec", "streamer.events.kinds", "streamer.events.layout", "asyncio"}


SOURCE = """// SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0
#include "core/filter.bpf.h"

char LICENSE[] SEC("license") = "GPL";

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, __u32);
} table SEC(".maps") TABLE;

SEC("raw_tp/one") ONE
int zebra(void *ctx)
{
	return bpf_get_smp_processor_id();
}

SEC("raw_tp/two") TWO
int ant(void *ctx)
{
	return bpf_get_smp_processor_id() + 1;
}

SEC("raw_tp/three")
int silent(void *ctx)
{
	return bpf_get_smp_processor_id() + 2;
}
"""


def sensor_of(directory: Path, **tags: str) -> Variant:
    """A tree with the core and one sensor, whose programs and map have those tags."""
    text = SOURCE
    for place in ("TABLE", "ONE", "TWO"):
        text = text.replace(f" {place}", f" {tags.get(place, '')}", 1)
    return Variant(directory, {}, CORE, {"zoo.bpf.c": text})


def test_what_programs_and_maps_say_of_themselves(tmp_path: Path) -> None:
    made = sensor_of(
        tmp_path / "zoo",
        ONE='EMITS("net.close,file.open") HOOK("door") NEEDS("no function:f,option:o,x86_64") '
        'KEEPS("file.open")',
        TWO='EMITS("net.close") DOC("what \\"ants\\" do") NEEDS("interface") LACKS("time")',
        TABLE='SIZED("table:guests") NEEDS("option:o") COMMON NAMED("tribe")',
    )
    assert generate(made).returncode == 0
    zoo = generated(made, "streamer/kernel/objects.py").SENSORS["zoo"]
    assert [one[:6] for one in zoo.programs] == [
        (
            "zebra",
            "door",
            ("net.close", "file.open"),
            "",
            ("no function:f", "option:o", "x86_64"),
            True,
        ),
        ("ant", "ant", ("net.close",), 'what "ants" do', ("interface",), True),
    ]
    assert [one[6:] for one in zoo.programs] == [(("file.open",), "", False), ((), "time", False)]
    assert [one for one in zoo.maps if not one.shared] == [
        ("table", "table:guests", False, ("option:o",), True, "tribe")
    ]
    shared = {one for one in zoo.maps if one.shared}
    assert shared == {one for one in objects.SENSORS["core"].maps if one.shared}


TAG_MISTAKES = {
    "no such kind to keep for": (
        {"ONE": 'EMITS("net.close") KEEPS("net.nap")'},
        'zoo.bpf.c: zebra: "net.nap" is no kind',
    ),
    "no such kind": (
        {"ONE": 'EMITS("net.close,net.nap")'},
        'zoo.bpf.c: zebra: "net.nap" is no kind',
    ),
    "hook without kinds": (
        {"TWO": 'HOOK("door")'},
        "ant: one of EMITS and COMPLETES is to be there",
    ),
    "needs without kinds": (
        {"TWO": 'NEEDS("rate")'},
        "ant: one of EMITS and COMPLETES is to be there",
    ),
    "no such need": (
        {"ONE": 'EMITS("net.close") NEEDS("x86_64,funktion:f")'},
        'zebra: NEEDS("funktion:f"), which tags.h does not know',
    ),
    "need of nothing": (
        {"ONE": 'EMITS("net.close") NEEDS("no option:")'},
        'zebra: NEEDS("no option:"), which tags.h does not know',
    ),
    "need of a map": ({"TABLE": 'NEEDS("luck")'}, 'table: NEEDS("luck"), which tags.h'),
    "no such size": ({"TABLE": 'SIZED("cpu")'}, 'table: SIZED("cpu"), which tags.h'),
    "shared by no one": ({"TABLE": "SHARED"}, "table: SHARED, and the object core has no such"),
}


@pytest.mark.parametrize(("tags", "message"), TAG_MISTAKES.values(), ids=TAG_MISTAKES.keys())
def test_a_mistake_in_a_tag_is_named(tmp_path: Path, tags: dict[str, str], message: str) -> None:
    made = sensor_of(tmp_path / "zoo", **tags)
    assert message in generate(made).stderr


def test_an_object_without_the_contract_is_named(tmp_path: Path) -> None:
    made = Variant(tmp_path / "odd", {}, CORE, {"odd.bpf.c": "int odd = 1;\n"})
    assert refusal(made) == f"gen: {made.objects}/odd.bpf.o: the BPF object has no enum event_kind"


def test_an_object_of_other_sources_is_named(with_answer: Variant) -> None:
    """Such as one that was left by an older version."""
    left = with_answer.objects / "older.bpf.o"
    shutil.copy(OBJECTS / "core.bpf.o", left)
    ended = generate(with_answer)
    assert ended.returncode == 1
    expected = f"gen: {left} is of other sources than core.bpf.o: process_exit: the object has 8"
    assert ended.stderr.startswith(expected)


def test_without_the_core(tmp_path: Path) -> None:
    with pytest.raises(ContractError, match=r"cannot read the BPF object .*/core\.bpf\.o: No such"):
        list(outputs(tmp_path, tmp_path))


# ---------------------------------------------------------------- mistakes in events.h

MISTAKES = {
    "no DOC": (ANSWER, "	__u64 answer;\n", "struct process_exit: answer needs DOC (or HIDDEN)"),
    "padding": (ANSWER, '	__u32 answer DOC("short");\n', "process_exit: padding at the end"),
    "padding within": (
        ANSWER,
        '	__u8 little DOC("a");\n	__u64 answer DOC("b");\n',
        "process_exit: padding before answer",
    ),
    "no such AS": (
        ANSWER,
        '	__u64 answer AS("roman") DOC("a");\n',
        'process_exit: answer: cannot publish as "roman:"',
    ),
    "ns of 32 bits": (
        ANSWER,
        '	__u32 answer AS("ns") DOC("a");\n	__u32 pad2 HIDDEN;\n',
        'process_exit: answer: cannot publish as "ns:"',
    ),
    "address of 8 bytes": (
        ANSWER,
        '	__u8 answer[8] AS("ip:core_dumped") DOC("a");\n',
        'process_exit: answer: cannot publish as "ip:core_dumped"',
    ),
    "address of no version": (
        ANSWER,
        '	__u8 answer[16] AS("ip:version") DOC("a");\n',
        'process_exit: answer: cannot publish as "ip:version"',
    ),
    "string without a length": (
        ANSWER,
        '	__u64 answer AS("str:answer") DOC("a");\n',
        'process_exit: answer: cannot publish as "str:answer"',
    ),
    "array": (
        ANSWER,
        '	__u32 answer[2] DOC("a");\n',
        'process_exit: answer: cannot publish as ":"',
    ),
    "pointer": (
        ANSWER,
        '	void *answer DOC("a");\n',
        'process_exit: answer: cannot publish as ":"',
    ),
    "twice": (
        ANSWER,
        '	__u64 answer AS("boottime") DOC("a");\n	__u64 comm DOC("b");\n',
        "process_exit: comm is published twice",
    ),
    "keyword": (
        ANSWER,
        '	__u64 from DOC("a");\n',
        "process_exit: 'from' cannot be the name of a field",
    ),
    "no RING": (
        '} RING("critical") DOC("The last thread of a process ended.");',
        '} DOC("The last thread of a process ended.");',
        "struct process_exit needs RING and DOC",
    ),
    "no such ring": (
        '} RING("critical") DOC("The last thread of a process ended.");',
        '} RING("golden") DOC("The last thread of a process ended.");',
        'struct process_exit: RING("golden"), which is none of enum event_ring',
    ),
    "no base": (
        "struct process_fork {\n	struct event_base base;\n",
        "struct process_fork {\n",
        "process_fork must begin with `struct event_base base`",
    ),
    "task elsewhere": (
        "struct process_fork {\n	struct event_base base;\n	struct event_task task;\n",
        "struct process_fork {\n	struct event_base base;\n	__u64 first HIDDEN;\n"
        '	struct event_task task DOC("who");\n',
        'struct process_fork: task: cannot publish as ":"',
    ),
    "strings without data": (
        ANSWER,
        '	__u16 answer AS("str:word") DOC("a");\n	__u8 pad2[6] HIDDEN;\n',
        "struct process_exit: strings, and no `data` at its end",
    ),
    "range of a string": (
        ANSWER,
        '	__u16 answer AS("str:word") RANGE("1..2") DOC("a");\n	__u8 pad2[6] HIDDEN;\n'
        "	__u8 data[64] HIDDEN;\n",
        "process_exit: answer: RANGE or AMONG that makes no sense",
    ),
    "no range": (
        ANSWER,
        '	__u64 answer RANGE("1-2") DOC("a");\n',
        "process_exit: answer: RANGE or AMONG that makes no sense",
    ),
    "range and list": (
        ANSWER,
        '	__u64 answer RANGE("1..2") AMONG("1,2") DOC("a");\n',
        "process_exit: answer: RANGE or AMONG that makes no sense",
    ),
    "range below": (
        ANSWER,
        '	__u64 answer RANGE("-1..") DOC("a");\n',
        "process_exit: answer: -1 is less than the field can hold",
    ),
    "list above": (
        ANSWER,
        '	__u8 answer AMONG("4,256") DOC("a");\n	__u8 pad2[7] HIDDEN;\n',
        "process_exit: answer: 256 is more than the field can hold",
    ),
    "nine strings": (
        ANSWER,
        "".join(f'	__u16 s{i} AS("str:text{i}") DOC("a");\n' for i in range(9))
        + "	__u8 pad2[6] HIDDEN;\n	__u8 data[64] HIDDEN;\n",
        "struct process_exit: 9 strings, more than 8",
    ),
    "kind without a struct": (
        "	KIND_FILE_OPEN = 16,",
        "	KIND_FILE_OPEN = 16, KIND_FILE_SHUT = 17,",
        "the BPF object has no struct file_shut",
    ),
    "header of another width": (
        "	__u32 size HIDDEN",
        "	__u64 size HIDDEN",
        "event_base.size must be there and have 4 bytes",
    ),
    "base without what is published": (
        "	__u32 weight RANGE",
        "	__u32 weight HIDDEN RANGE",
        "event_base.weight must be there and be published",
    ),
    "base without flags": (
        "	__u8 flags HIDDEN",
        "	__u8 marks HIDDEN",
        "event_base.flags must be there",
    ),
    "padding in the task block": (
        "	char comm[COMM_LEN]",
        '	__u8 more DOC("a");\n	char comm[COMM_LEN]',
        "event_task: padding at the end",
    ),
}


@pytest.mark.parametrize(("old", "new", "message"), MISTAKES.values(), ids=MISTAKES.keys())
def test_a_mistake_is_named(variant: Make, old: str, new: str, message: str) -> None:
    """In one line, with the struct and the field; nothing is written."""
    if old == ANSWER:
        old, new = LAST_OF_EXIT, LAST_OF_EXIT + new
    assert message in refusal(variant({"events.h": (old, new)}))


def test_no_object(tmp_path: Path) -> None:
    with pytest.raises(ContractError, match=r"cannot read the BPF object .*: No such file"):
        Btf.of_object(tmp_path / "none.o")


@pytest.mark.parametrize("content", [b"", b"\x7fELF", b"text", b"\x7fELF\x02\x01" + bytes(100)])
def test_a_file_that_is_no_object(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "object").write_bytes(content)
    with pytest.raises(ContractError, match=r"is no BPF object with a section \.BTF"):
        Btf.of_object(tmp_path / "object")
