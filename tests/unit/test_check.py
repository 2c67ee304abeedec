"""What `streamer check` makes of what it found; what the objects use, against llvm's reading."""

from __future__ import annotations

import errno
import json
import os
import re
import subprocess
from collections.abc import Iterable
from pathlib import Path

import msgspec
import pytest

from streamer.agent.check import hooks_of
from streamer.events.schema import of_kind
from streamer.kernel import tiny, trials
from streamer.kernel.capabilities import (
    CAP_BPF,
    CAP_NET_ADMIN,
    CAP_PERFMON,
    CAP_SYS_ADMIN,
    _maps_every_user,
)
from streamer.kernel.helper_names import HELPERS
from streamer.kernel.host_settings import _seccomp
from streamer.kernel.instructions import Calls
from streamer.kernel.libbpf import Object, Refused, map_type_name, program_type_name
from streamer.kernel.loader import OBJECTS
from streamer.kernel.objects import SENSORS
from streamer.kernel.report import Answer, CheckReport, Kind, Setting
from streamer.kernel.state import ProgramStatus
from streamer.kernel.trials import YES, about_helper, about_way, judged, needs_of
from streamer.kernel.uses import ProgramUse, uses_of
from streamer.terminal.checked import WIDTH, check_code, check_text

ROOT = Path(__file__).resolve().parents[2]
ALL = frozenset({CAP_BPF, CAP_PERFMON, CAP_NET_ADMIN, CAP_SYS_ADMIN})
PROGRAMS = sorted(Path(OBJECTS).rglob("*.bpf.o"))

# ---------------------------------------------------------------- what the objects use


@pytest.mark.parametrize("path", PROGRAMS, ids=lambda path: str(path.relative_to(OBJECTS)))
def test_helpers_are_those_that_llvm_finds(path: Path) -> None:
    """All calls of helpers, by another reader of the same object, are some program's."""
    command = ["llvm-objdump", "--disassemble", str(path)]
    told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    # With another source register (85 10) it is a function that is called.
    calls = re.findall(
        r"85 00 00 00(?: [0-9a-f]{2}){4}\tcall (0x[0-9a-f]+|\d+)$", told, re.MULTILINE
    )
    expected = {int(number, 0) for number in calls}
    functions = Calls(path.read_bytes()).helpers()
    assert functions.keys() >= {
        p.name for p in SENSORS[path.name[:-6]].programs if _in(p.name, path)
    }
    assert expected, "llvm found none"
    assert frozenset().union(*functions.values()) == expected


def _in(program: str, path: Path) -> bool:
    opened = Object(path)
    try:
        return program in opened.programs
    finally:
        opened.close()


def test_a_helper_in_a_subprogram_is_its_callers() -> None:
    """Paths are walked in a function of their own, which reads kernel memory."""
    calls = Calls(Path(OBJECTS, "nobtf", "process.bpf.o").read_bytes())
    read_kernel = 113
    assert read_kernel in calls.helpers()["on_exec"]


def test_every_helper_has_a_name() -> None:
    uses = uses_of()
    assert {helper for program in uses.programs for helper in program.helpers} == HELPERS.keys()
    assert HELPERS[1] == "bpf_map_lookup_elem"


def test_every_program_and_every_map_of_every_sensor_is_used() -> None:
    uses = uses_of()
    programs = {program.info.name for program in uses.programs if program.info}
    assert programs == {p.name for sensor in SENSORS.values() for p in sensor.programs}
    types = {map_type_name(one.type, one.flags) for one in uses.maps}
    assert {"ringbuf", "array+mmapable", "lpm_trie+no_prealloc", "hash"} <= types


def test_names_of_types() -> None:
    assert program_type_name(26, 24) == "tracing/trace_fentry"
    assert program_type_name(6, 37) == "xdp"
    assert program_type_name(3, 46) == "sched_cls/tcx_ingress"
    assert program_type_name(250, 0) == "250"
    assert map_type_name(2, 1 << 10 | 1 << 20) == "array+mmapable+0x100000"


# ---------------------------------------------------------------- tiny programs


def test_libbpf_reads_a_tiny_object() -> None:
    sections = ["raw_tp/sys_enter", "xdp", "license_2", "symtab/x"]
    made = [
        tiny.Tiny(f"try_{number}", section, tiny.returning(2))
        for number, section in enumerate(sections)
    ]
    opened = Object.of_bytes(tiny.object_of(made), tiny.NAME)
    try:
        found = {name: one.section for name, one in opened.programs.items()}
        assert found == {one.name: one.section for one in made}
        assert opened.maps == {}
    finally:
        opened.close()


def test_a_tiny_program_changes_nothing() -> None:
    xdp_pass, next_one, allowed = 2, -1, 1
    assert tiny.neutral("xdp") == xdp_pass
    assert tiny.neutral("tcx/ingress") == tiny.neutral("tc") == next_one
    assert tiny.neutral("cgroup_skb/egress") == tiny.neutral("cgroup/sock_release") == allowed
    assert tiny.neutral("raw_tp/sys_enter") == 0


# ---------------------------------------------------------------- what an error means


@pytest.mark.parametrize(
    ("number", "have", "answer", "more"),
    [
        (errno.EPERM, ALL, "no", ""),
        (errno.EPERM, {CAP_SYS_ADMIN}, "no", ""),
        (errno.EPERM, (), "unknown", ": it takes CAP_BPF and CAP_PERFMON"),
        (errno.EPERM, {CAP_BPF}, "unknown", ": it takes CAP_PERFMON"),
        (
            errno.EACCES,
            {CAP_BPF, CAP_PERFMON},
            "unknown",
            ": there may be more to it with CAP_SYS_ADMIN",
        ),
        (errno.EINVAL, (), "no", ""),
        *((number, ALL, "unknown", "") for number in (errno.EBUSY, errno.EMFILE, errno.ENOMEM)),
    ],
)
def test_what_a_refusal_says(number: int, have: Iterable[int], answer: str, more: str) -> None:
    words = os.strerror(number)
    told = judged(OSError(number, words), needs_of("tp_btf/x"), frozenset(have))
    assert (told.answer, told.reason) == (answer, words + more)


def test_a_program_for_which_there_is_no_memory_says_nothing_of_the_jit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """And is no reason for `check` to end without an answer."""

    def refuse(*_: object, **__: object) -> int:
        raise Refused(errno.ENOMEM, "")

    monkeypatch.setattr(trials, "load_instructions", refuse)
    assert trials._try_jit(ALL) == Answer("unknown", os.strerror(errno.ENOMEM))


CODE = len(tiny.returning(0x12345678))


@pytest.mark.parametrize(
    ("lengths", "answer", "said"),
    [
        ((CODE * 2, CODE), "yes", ""),
        ((CODE * 3, CODE * 2), "yes", "constants are hidden"),
        ((0, CODE), "no", "programs are interpreted"),
        ((0, 0), "unknown", "the kernel does not show it"),
    ],
)
def test_what_became_of_a_program_says_what_the_jit_does(
    monkeypatch: pytest.MonkeyPatch, lengths: tuple[int, int], answer: str, said: str
) -> None:
    """By its lengths as machine code and as verified: kernels with an interpreter are rare."""
    monkeypatch.setattr(trials, "load_instructions", lambda *_: os.open("/dev/null", os.O_RDONLY))
    monkeypatch.setattr(trials, "lengths_of", lambda fd: lengths)
    found = trials._try_jit(ALL)
    assert (found.answer, found.reason[: len(said)]) == (answer, said)
    assert bool(found.reason) == bool(said)


def test_what_a_program_takes() -> None:
    assert needs_of("xdp") == needs_of("tcx/egress") == (CAP_BPF, CAP_NET_ADMIN)
    assert needs_of("cgroup/sock_release") == (CAP_BPF, CAP_NET_ADMIN)
    assert needs_of("kprobe/x") == needs_of("perf_event") == (CAP_BPF, CAP_PERFMON)


@pytest.mark.parametrize(
    ("said", "answer"),
    [
        ("R1 type=ctx expected=map_ptr", "yes"),
        ("R2 !read_ok", "yes"),
        ("unknown func bpf_probe_read_kernel#113", "no"),
        ("program of this type cannot use helper bpf_sk_storage_get#107", "no"),
        ("invalid func unknown#9999", "no"),
        ("BPF program is too large", None),
        ("", None),
    ],
)
def test_what_the_verifier_says_of_a_helper(said: str, answer: str | None) -> None:
    log = f"0: (85) call 107\n{said}\nprocessed 1 insns (limit 1000000)\n"
    told = about_helper(Refused(errno.EINVAL, log), ALL)
    assert (told.answer if told else None) == answer
    without = about_helper(Refused(errno.EINVAL, log), frozenset({CAP_BPF}))
    assert (without.answer if without else None) == {"no": "unknown"}.get(str(answer), answer)


NO, NO_PLACE = Answer("no", "Invalid argument"), Answer("no", "No such process")


@pytest.mark.parametrize(
    ("places", "answer"),
    [
        ([(YES, True), (NO, True)], YES),
        ([(NO, True), (YES, True)], YES),
        ([(NO_PLACE, False)], Answer("unknown", NO_PLACE.reason)),
        ([(NO_PLACE, False), (NO, True)], NO),
        ([(NO, True), (NO_PLACE, False)], NO),
        ([(NO_PLACE, False), (YES, True)], YES),
    ],
)
def test_a_type_is_there_if_it_loads_anywhere(
    places: list[tuple[Answer, bool]], answer: Answer
) -> None:
    """That a function or a tracepoint is not there says nothing of programs at others."""
    use = ProgramUse("tp_btf/x", 26, 23, frozenset(), None)
    found = trials._types(trials._AtPlace(use, loads, None, there) for loads, there in places)
    assert found == {program_type_name(26, 23): answer}


def test_a_user_namespace_is_not_the_host() -> None:
    assert _maps_every_user("         0          0 4294967295\n")
    assert not _maps_every_user("         0     100000      65536\n")


def test_the_mode_of_seccomp() -> None:
    assert _seccomp("Name:\tx\nSeccomp:\t2\nSeccomp_filters:\t1\n") == "filter"
    assert _seccomp("Name:\tx\n") == "none"


def test_what_stands_in_for_a_place_is_told_from_it() -> None:
    assert about_way("raw_tp/x", "raw_tp/x") == YES
    assert about_way("xdp", "xdp lo:generic") == Answer("yes", "xdp lo:generic")
    assert about_way("tcx/egress", "tcx/egress lo:tcx").answer == "yes"
    assert about_way("tcx/egress", "tcx/egress lo:clsact").answer == "no"


# ---------------------------------------------------------------- the report

FEXIT = ProgramStatus(
    "on_fexit", "net", "connect", "fexit/c", ("net.connect",), "failed", "no fexit"
)
TRACEPOINT = ProgramStatus("on_tp", "net", "connect", "tp/c", ("net.connect",), "attached")
KPROBE = ProgramStatus("on_kprobe", "net", "connect", "kprobe/c", ("net.connect",), "spare")


def report(**statuses: str) -> CheckReport:
    kinds = {
        name.replace("_", "."): Kind(status, "" if status == "full" else f"why {status}")  # type: ignore[arg-type]
        for name, status in statuses.items()
    }
    return CheckReport(
        version=1,
        agent="0.1.0",
        kernel="Linux 6.1.0 x86_64",
        ok=set(statuses.values()) == {"full"},
        types="BTF of the running kernel: /sys/kernel/btf/vmlinux",
        transport="ring buffers",
        kinds=kinds,
        not_asked={"file.open": "not among the events asked for", "net.drop": "no need"},
        interfaces={},
        notes=[],
        hooks=list(hooks_of([FEXIT, TRACEPOINT, KPROBE])),
        features={"bpf": YES, "kernel_memory": Answer("no", "lockdown")},
        program_types={"xdp": YES, "kprobe": Answer("unknown", "no rights")},
        map_types={"hash": YES, "array": YES},
        helpers={
            "xdp": {"one": YES, "two": YES},
            "kprobe": {"a": Answer("no", "x"), "b": Answer("no", "x")},
        },
        attach_points={"fexit/a": Answer("no", "x"), "fexit/b": YES, "tp/c": YES},
        capabilities={"CAP_BPF": Answer("yes", "to load programs")},
        settings={"lockdown": Setting("", "/x: line one\nline two"), "user": Setting("0")},
    )


def test_rungs_that_a_kernel_lacks_are_not_a_failure() -> None:
    (hook,) = hooks_of([FEXIT, TRACEPOINT, KPROBE])
    assert (hook.hook, hook.used, hook.kinds) == ("connect", "tp/c", ["net.connect"])
    assert [rung.status for rung in hook.rungs] == ["lacking", "used", "spare"]
    (lost,) = hooks_of([FEXIT])
    assert lost.used == ""


@pytest.mark.parametrize(
    ("statuses", "code"),
    [
        ({"process_exec": "full", "net_close": "full"}, 0),
        ({"process_exec": "full", "net_close": "degraded"}, 1),
        ({"process_exec": "full", "net_close": "unavailable"}, 1),
        ({"process_exec": "degraded", "net_close": "degraded"}, 1),
        ({"process_exec": "unavailable", "net_close": "unavailable"}, 3),
        ({"process_exec": "unavailable"}, 3),
    ],
)
def test_how_check_ends(statuses: dict[str, str], code: int) -> None:
    assert check_code(report(**statuses)) == code


def test_an_interface_that_is_not_there_counts() -> None:
    found = report(process_exec="full")
    found.interfaces["eth9"] = Answer("no", "there is no such interface here; there are: lo")
    found.ok = False
    assert check_code(found) == 1
    text = check_text(found)
    assert "of the events asked for: 1 full, no interface eth9\n" in text
    assert "interface eth9    no: there is no such interface here; there are: lo\n" in text


def test_the_report_for_people() -> None:
    text = check_text(report(process_exec="full", net_close="unavailable", net_bind="unavailable"))
    assert text == EXPECTED
    assert max(map(len, text.splitlines())) <= WIDTH


EXPECTED = """\
Linux 6.1.0 x86_64, streamer 0.1.0
of the events asked for: 1 full, 2 unavailable

EVENTS
process.exec      full
net.close         unavailable: why unavailable
net.bind          unavailable: likewise
left out          file.open: not among the events asked for
left out          net.drop: no need

HOOKS (the best rung that this kernel has is used)
connect           rung 2 of 3: tp/c
lacking here      fexit/c: no fexit

KERNEL
types             BTF of the running kernel: /sys/kernel/btf/vmlinux
transport         ring buffers
bpf               yes
kernel memory     no: lockdown
program types     yes: xdp
                  unknown: kprobe: no rights
map types         yes: hash, array
helpers           yes: 2 of 4
                  no: all 2 of kprobe: x
attach points     yes: 2 of 3
                  no: fexit/a: x
lockdown          unknown: /x: line one\\nline two

PROCESS
CAP_BPF           yes  (to load programs)
user              0"""


def test_a_long_reason_is_folded() -> None:
    found = report(process_exec="unavailable")
    found.kinds["process.exec"] = Kind("unavailable", "word " * 60 + "x" * 100)
    lines = check_text(found).splitlines()
    assert [line for line in lines if len(line) > WIDTH] == [" " * 18 + "x" * 100]


def test_the_schema_is_that_of_the_layout() -> None:
    schema = json.loads((ROOT / "schemas" / "check.schema.json").read_text())
    assert schema == json.loads(json.dumps(of_kind("check", CheckReport)))
    data = msgspec.to_builtins(report(process_exec="full"))
    assert data.keys() == schema["properties"].keys() == set(schema["required"])
