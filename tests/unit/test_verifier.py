"""The table of what the verifier says: read from its log, and what must not be in it."""

from __future__ import annotations

import ctypes
from pathlib import Path

import msgspec
import pytest

from streamer.kernel.objects import SENSORS
from tests.vm import verifier
from tests.vm.stack import Instruction, Loaded, deepest
from tests.vm.verifier import (
    PAGE,
    STACK,
    Row,
    cell,
    column,
    figures,
    figures_in,
    growth,
    problems,
    read,
    table,
    told_by_libbpf,
    warnings,
    without_figure,
)

LOG = """\
verification time 3928 usec
stack depth 8+32+0+0
processed 2506 insns (limit 1000000) max_states_per_insn 10 total_states 185 peak 1
"""
LOADED = Row("file", "on_open_exit", "tracepoint/syscalls/sys_exit_open", "loads", 2506, 185, 40)


def test_the_figures_of_a_log() -> None:
    assert figures(LOG) == (2506, 185, [8, 32, 0, 0])
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


def test_a_program_has_one_line_wherever_it_attaches() -> None:
    """On another machine, or in the objects without BTF, its section is another."""
    there = msgspec.structs.replace(LOADED, section="")
    assert len(table({"6.1": [LOADED], "6.1 without BTF": [there]})) == 3


def test_columns() -> None:
    assert column("6.18.5", "here", "") == "6.18 (not Debian's)"
    assert column("6.12.1-arm64", "trixie-arm64", "") == "6.12 arm64"
    assert column("5.10.0-32-amd64", "bullseye", "headers") == "5.10 without BTF, with headers"


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


# ---------------------------------------------------------------- growth


def test_what_has_grown_is_told_until_it_is_on_the_page() -> None:
    """A tenth may come with another version of the kernel."""
    page = "\n".join(table({"5.10": [LOADED], "6.1": [LOADED]}))
    assert figures_in(page) == {(one, LOADED.program): (2506, 185, 40) for one in ("5.10", "6.1")}
    assert growth({"5.10": [LOADED]}, page) == []
    near = msgspec.structs.replace(LOADED, insns=2756, states=203, stack=44)
    assert growth({"5.10": [near]}, page) == []
    for grown in ({"insns": 2757}, {"states": 204}, {"stack": 64}):
        (told,) = growth({"5.10": [msgspec.structs.replace(LOADED, **grown)]}, page)
        assert told.startswith("5.10: on_open_exit has grown from (2506, 185, 40) to ")
    (told,) = growth({"6.12": [LOADED]}, page)
    assert told == "6.12: on_open_exit is new: (2506, 185, 40)"
    failed = msgspec.structs.replace(LOADED, outcome="Invalid argument")
    assert growth({"6.12": [failed]}, page) == []
    failed = msgspec.structs.replace(failed, insns=0, states=0, stack=0)
    assert growth({"5.10": [failed]}, page) == ["5.10: on_open_exit does not load any more"]
    small = msgspec.structs.replace(LOADED, insns=6, states=0, stack=32)
    page = "\n".join(table({"5.10": [small]}))
    assert growth({"5.10": [msgspec.structs.replace(small, insns=16, states=2)]}, page) == []


def test_too_much_stack_and_no_figure_are_problems() -> None:
    deep = msgspec.structs.replace(LOADED, stack=STACK + 32)
    assert problems({"6.1": [msgspec.structs.replace(LOADED, stack=STACK)]}) == []
    assert problems({"6.1": [deep]}) == ["6.1: on_open_exit may take 480 bytes of stack"]
    told = without_figure({"6.1": [LOADED]})
    assert "on_open_exit: no figure on any kernel" not in told
    assert "on_open: no figure on any kernel" in told


def test_every_program_has_a_figure_on_the_page() -> None:
    """A new one is to be looked at on every kernel, and what it takes to be seen in review."""
    there = {program for _, program in figures_in(PAGE.read_text())}
    programs = {
        one.name for name, sensor in SENSORS.items() if name != "core" for one in sensor.programs
    }
    assert there == programs


# ---------------------------------------------------------------- stack and warnings


def calling(distance: int) -> Instruction:
    return Instruction(0x85, 1, distance, 7)


RETURN = Instruction(0x95, 0, 0, 0)
HELPER = Instruction(0x85, 0, 0, 6)


def test_the_deepest_chain() -> None:
    """Not of all functions, if some are called in turn; each takes a multiple of 32."""
    #                   0: calls 3 and 5               3: calls 7        5                7
    code = [calling(2), calling(3), RETURN, calling(3), RETURN, HELPER, RETURN, RETURN]
    program = Loaded(code, [0, 3, 5, 7])
    assert deepest(program, [8, 40, 200, 0]) == 32 + 224
    assert deepest(program, [8, 40, 0, 96]) == 32 + 64 + 96
    assert deepest(Loaded([HELPER, RETURN], [0]), [0]) == 32
    with pytest.raises(ValueError, match="4 functions, and 2 depths"):
        deepest(program, [8, 40])


def test_a_function_that_none_calls_counts_for_nothing() -> None:
    """The verifier looks at it by itself, and says what it takes."""
    assert deepest(Loaded([HELPER, RETURN, HELPER, RETURN], [0, 2]), [8, 400]) == 32


def test_a_function_whose_address_is_taken_is_called() -> None:
    """By a helper, such as bpf_for_each_map_elem()."""
    taken = [Instruction(0x18, 4, 0, 2), Instruction(0, 0, 0, 0), RETURN, RETURN]
    assert deepest(Loaded(taken, [0, 3]), [16, 64]) == 96


def test_what_libbpf_warns_of_is_heard(capfd: pytest.CaptureFixture[str]) -> None:
    """And nothing else of it; afterwards it says what it said before."""
    library = ctypes.CDLL("libbpf.so.1")
    with told_by_libbpf() as told:
        assert not library.bpf_object__open(b"/no/such/object")
    assert len(told) == 1
    assert "/no/such/object" in told[0]
    with told_by_libbpf() as told:
        pass
    assert told == []
    assert capfd.readouterr() == ("", "")


# ---------------------------------------------------------------- guests

DIED = "echo 'not syncing: int3'; echo 'streamer: sid did not finish; its console' >&2; exit 1"
ROWS = f"echo '{msgspec.json.encode(LOADED).decode()}'"


def runner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *starts: str) -> Path:
    """In the place of a guest's, a script that does one thing at each start; it counts them."""
    counted = tmp_path / "starts"
    script = tmp_path / "runner"
    cases = "".join(f"{number}) {what};;\n" for number, what in enumerate(starts, 1))
    count = f"echo >> {counted}; n=$(wc -l < {counted})"
    script.write_text(f"#!/bin/sh\n{count}\ncase $n in {cases} esac\n")
    script.chmod(0o755)
    monkeypatch.setattr(verifier, "RUNNER", str(script))
    return counted


def test_a_guest_that_dies_at_boot_is_started_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner(tmp_path, monkeypatch, DIED, DIED, ROWS)
    assert verifier.on("sid", "") == [LOADED]


@pytest.mark.parametrize(
    ("starts", "tried"),
    [
        pytest.param([DIED] * 4, 3, id="at every boot"),
        pytest.param([f"{ROWS}; {DIED}", ROWS], 1, id="at a program"),
        pytest.param([f'printf \'{{"sensor":"f\'; {DIED}', ROWS], 1, id="within a row"),
        pytest.param(["echo Traceback >&2; exit 1", ROWS], 1, id="it lives and fails"),
    ],
)
def test_a_guest_that_fails_otherwise_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, starts: list[str], tried: int
) -> None:
    counted = runner(tmp_path, monkeypatch, *starts)
    with pytest.raises(RuntimeError, match=r"^sid: "):
        verifier.on("sid", "")
    assert len(counted.read_text().splitlines()) == tried
