"""One definition of an event: what is derived from `bpf/events.h`, and what is refused there."""

from __future__ import annotations

import importlib.util
import json
import struct
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import msgspec
import pytest

from streamer import _records, events, gen, records_py
from streamer.errors import ContractError
from streamer.kernel.btf import Btf
from streamer.kernel.contract import compare, contract_of
from streamer.kernel.loader import OBJECT
from tests.bpf_variant import ROOT, Change, Variant
from tests.golden.cases import CLOCK_OFFSET_NS, ID_PREFIX, Case, constants, load

LAST_OF_EXIT = (
    '	__u8 core_dumped AS("bool") DOC("whether a core was dumped");\n	__u8 pad[7] HIDDEN;\n'
)
ANSWER = '	__u64 answer DOC("the answer, in units of \\"one\\"");\n'
# Without the programs, which have no part in what a record looks like, compiling is quick.
NO_PROGRAMS = (
    '#include "process.bpf.c"\n#include "file.bpf.c"\n#include "net.bpf.c"\n',
    '#include "maps.bpf.h"\n',
)

Make = Callable[[Mapping[str, Change]], Variant]


@pytest.fixture
def variant(tmp_path: Path) -> Make:
    return lambda changes: Variant(tmp_path / "variant", changes)


def generate(made: Variant, *options: str) -> subprocess.CompletedProcess[str]:
    """The command that derives everything, for another source tree."""
    command = [sys.executable, "-m", "streamer.gen", "--object", str(made.object)]
    command += ["--root", str(made.root), *options]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)


def generated(made: Variant) -> ModuleType:
    """The `events.py` of another source tree, as a module."""
    name = "streamer_events_of_a_test"
    place = made.root / "streamer" / "events.py"
    spec = importlib.util.spec_from_file_location(name, place)
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
    assert module.ProcessExit.__struct_fields__[-1] == "answer"
    assert module.ProcessExit.__annotations__["answer"].startswith("Annotated[int,")
    number, old = next((n, r) for n, r in events.RECORDS.items() if r.kind == "process.exit")
    layout = module.RECORDS[number]
    assert layout.size == old.size + 8
    assert layout.fields[-1] == ("answer", "u64", old.size, None)
    assert module.KINDS["process.exit"].fields[-1] == ("answer", "integer", doc)
    assert module.CONTRACT["process_exit"][-1] == ("answer", old.size, 8)
    schema = json.loads((with_answer.root / "schemas" / "process.exit.json").read_text())
    assert schema["properties"]["answer"] == {"type": "integer", "description": doc}
    assert "answer" in schema["required"]
    page = (with_answer.root / "docs" / "events.md").read_text()
    assert f"| `answer` | integer | {doc} |" in page


def exit_case() -> Case:
    return next(case for case in load() if case.event["event"] == "process.exit")


def with_more(record: bytes, more: bytes) -> bytes:
    """The record with bytes at its end, and its size set right."""
    made = bytearray(record + more)
    struct.pack_into("<I", made, events.HEADER["size"], len(made))
    return bytes(made)


def decode(reader: ModuleType, module: ModuleType, case: Case, record: bytes) -> Any:
    prefix = f"{ID_PREFIX}-{case.stream}"
    decoder = reader.Decoder(module.HEADER, module.RECORDS, constants(case.stream), prefix)
    decoder.clock_offset_ns = CLOCK_OFFSET_NS
    return decoder.decode(record)


@pytest.mark.parametrize("reader", [_records, records_py], ids=["compiled", "twin"])
def test_a_record_with_the_field_is_decoded(with_answer: Variant, reader: ModuleType) -> None:
    """By a new consumer with the field, and by an old one as before."""
    case = exit_case()
    record = with_more(case.record, (42).to_bytes(8, "little"))
    new = decode(reader, generated(with_answer), case, record)
    assert msgspec.to_builtins(new) == {**case.event, "answer": 42}
    assert msgspec.to_builtins(decode(reader, events, case, record)) == case.event


def test_the_loader_names_what_disagrees(with_answer: Variant) -> None:
    found = contract_of(Btf.of_object(with_answer.object))
    with pytest.raises(ContractError, match=r"process_exit: .*8 members, .*7; run `make gen`"):
        compare(found, events.CONTRACT)
    compare(found, generated(with_answer).CONTRACT)


# ---------------------------------------------------------------- stale or not


def test_what_is_committed_is_up_to_date() -> None:
    """With the compiled object that is there, nothing would be written."""
    assert [path for path, text in gen.outputs(OBJECT, ROOT) if path.read_text() != text] == []


def test_the_compiled_object_is_of_these_sources(variant: Make) -> None:
    made = variant({})
    assert contract_of(Btf.of_object(made.object)) == events.CONTRACT


def test_a_second_run_writes_nothing(with_answer: Variant) -> None:
    again = generate(with_answer)
    assert (again.returncode, again.stdout, again.stderr) == (0, "", "")
    assert generate(with_answer, "--check").returncode == 0


def test_check_names_every_stale_file_and_writes_none(with_answer: Variant) -> None:
    root = with_answer.root
    stale = [root / "streamer/events.py", root / "docs/events.md", root / "schemas/net.close.json"]
    for path in stale[:2]:
        path.write_text(path.read_text() + "\n# changed by hand\n")
    stale[2].unlink()
    checked = generate(with_answer, "--check")
    assert checked.returncode == 1
    assert sorted(checked.stdout.splitlines()) == sorted(
        f"gen: {path} is stale: run `make gen`" for path in stale
    )
    assert "# changed by hand" in stale[0].read_text()
    assert not stale[2].exists()
    assert generate(with_answer).returncode == 0
    assert generate(with_answer, "--check").returncode == 0


def test_generated_schemas_are_of_every_kind() -> None:
    found = {path.stem for path in (ROOT / "schemas").glob("*.json")}
    assert found >= events.KINDS.keys()
    for kind in events.KINDS:
        schema = json.loads((ROOT / "schemas" / f"{kind}.json").read_text())
        properties = schema["properties"]
        assert schema["required"] == list(properties)
        assert properties["event"] == {"enum": [kind]}
        assert all(p["description"] for name, p in properties.items() if name != "event")


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
    "no STREAM": (
        '} STREAM("critical") DOC("The last thread of a process ended.");',
        '} DOC("The last thread of a process ended.");',
        "struct process_exit needs STREAM and DOC",
    ),
    "no header": (
        "struct process_fork {\n	struct event_header header;\n",
        "struct process_fork {\n",
        "process_fork must begin with `struct event_header header`",
    ),
    "kind without a struct": (
        "	KIND_FILE_OPEN = 16,",
        "	KIND_FILE_OPEN = 16, KIND_FILE_SHUT = 17,",
        "the BPF object has no struct file_shut",
    ),
    "header of another width": (
        '	__u32 size HIDDEN DOC("bytes of this record");\n	__u16 kind',
        '	__u64 size HIDDEN DOC("bytes of this record");\n	__u16 kind',
        "event_header.size must be there and have 4 bytes",
    ),
    "padding in the header": (
        "	char comm[COMM_LEN]",
        '	__u8 more DOC("a");\n	char comm[COMM_LEN]',
        "event_header: padding at the end",
    ),
}


@pytest.mark.parametrize(("old", "new", "message"), MISTAKES.values(), ids=MISTAKES.keys())
def test_a_mistake_is_named(variant: Make, old: str, new: str, message: str) -> None:
    """In one line, with the struct and the field; nothing is written."""
    if old == ANSWER:
        old, new = LAST_OF_EXIT, LAST_OF_EXIT + new
    made = variant({"events.h": (old, new), "streamer.bpf.c": NO_PROGRAMS})
    ended = generate(made)
    (line,) = ended.stderr.splitlines()
    assert ended.returncode == 1
    assert line.startswith("gen: ")
    assert message in line
    assert not (made.root / "schemas").exists()


def test_no_object(tmp_path: Path) -> None:
    with pytest.raises(ContractError, match=r"cannot read the BPF object .*: No such file"):
        Btf.of_object(tmp_path / "none.o")


@pytest.mark.parametrize("content", [b"", b"\x7fELF", b"text", b"\x7fELF\x02\x01" + bytes(100)])
def test_a_file_that_is_no_object(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "object").write_bytes(content)
    with pytest.raises(ContractError, match=r"is no BPF object with a section \.BTF"):
        Btf.of_object(tmp_path / "object")
