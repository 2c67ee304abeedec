"""The table of what the verifier says: read from its log, and what must not be in it."""

from __future__ import annotations

import msgspec
import pytest

from streamer.kernel.objects import SENSORS
from tests.vm.verifier import Row, cell, figures, problems, read, table, warnings

LOG = """\
verification time 3928 usec
stack depth 8+32+0+0
processed 2506 insns (limit 1000000) max_states_per_insn 10 total_states 185 peak 1
"""
LOADED = Row("file", "on_open_exit", "tracepoint/syscalls/sys_exit_open", "loads", 2506, 185, 40)


def test_the_figures_of_a_log() -> None:
    assert figures(LOG) == (2506, 185, 40)
    assert warnings(LOG) == ()
    assert warnings("something odd\n" + LOG) == ("something odd",)
    with pytest.raises(ValueError, match="no figures"):
        figures("nothing")


def test_a_row_for_each_program_and_a_column_for_each_kernel() -> None:
    other = msgspec.structs.replace(LOADED, outcome="not here")
    failed = msgspec.structs.replace(LOADED, outcome="Invalid argument")
    assert [cell(one, ()) for one in (LOADED, other, failed, None)] == [
        "2,506 / 185 / 40",
        "-",
        "**Invalid argument**",
        "-",
    ]
    lines = table({"5.10": [LOADED], "6.1": []})
    assert lines[0] == "| sensor | program | 5.10 | 6.1 |"
    assert lines[2:] == ["| file | `on_open_exit` | 2,506 / 185 / 40 | - |"]


def test_only_lines_of_its_own_are_read() -> None:
    line = msgspec.json.encode(LOADED)
    assert read(b"[    0.1] boot\n" + line + b"\r\n\n{}\n") == [LOADED]


def test_what_must_not_be() -> None:
    """A program may fail where another way to its hook loads."""
    assert problems({"6.1": [LOADED]}) == []
    hook = next(p.hook for p in SENSORS["file"].programs if p.name == LOADED.program)
    other = next(
        p.name for p in SENSORS["file"].programs if p.hook == hook and p.name != LOADED.program
    )
    failed = msgspec.structs.replace(LOADED, program=other, outcome="Operation not permitted")
    assert problems({"6.1": [LOADED, failed]}) == []
    assert cell(failed, [LOADED, failed]) == "another"
    assert problems({"6.1": [failed]}) == [f"6.1: {other} does not load: Operation not permitted"]
    adds = msgspec.structs.replace(failed, program="on_open_start")
    assert problems({"6.1": [adds]}) == []
    assert cell(adds, [adds]) == "without"
    odd = msgspec.structs.replace(LOADED, warnings=("odd",))
    assert problems({"6.1": [odd], "5.10": []}) == [
        "6.1: on_open_exit: odd",
        "5.10: nothing came back",
    ]
