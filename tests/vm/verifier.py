"""What the verifier says of every program, on this machine's kernel and on Debian's.

    python -m tests.vm.verifier [--kernel SUITE[/VARIANT]]... [--write]   a table; or its page, too
    python -m tests.vm.verifier --here                          this kernel alone, a line each

Every program is loaded alone, with all settings on, so that nothing of it is left out. A variant is
one of `tests/vm/suite.py`: without BTF the objects for such kernels are loaded, by headers.

Exit 1 if a program that belongs to a kernel does not load there or has no figure on any, if the
verifier says anything but figures, or libbpf anything at all, if a chain of calls may take more
than STACK bytes, or, without --write, if a figure has grown by more than a tenth from what the page
says: then it is to be written anew, where those who review the change see it.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import msgspec

from streamer.config.settings import Kernel
from streamer.events.catalogue import SELECTABLE
from streamer.kernel.libbpf import FIGURES
from streamer.kernel.loader import CORE, Loader, Targets, _is_copied, _Sensor
from streamer.kernel.objects import SENSORS
from streamer.kernel.state import options_of, wanting
from streamer.kernel.system_calls import functions_of_calls
from streamer.kernel.tags import ProgramInfo
from tests.vm.stack import LIMIT, deepest, loaded
from tests.vm.suite import (
    ARM64_PYTHON,
    MOST_STARTS,
    NOT_FINISHED,
    ROOT,
    RUNNER,
    STOCK,
    VARIANTS,
    releases,
)

PAGE = ROOT / "docs" / "verifier.md"
FUNCTIONS = functions_of_calls(("getppid",), os.uname().machine)
TARGETS = Targets(interfaces=("lo",), cgroup="/sys/fs/cgroup", rate=1, functions=FUNCTIONS)
EVERYTHING = Kernel(
    interfaces=("lo",),
    open_latency=True,
    unspecified_drops=True,
    syscalls=("*",),
    syscall_slow_ms=1,
    syscall_cgroups=1024,
)
OPTIONS = options_of(EVERYTHING) | wanting(SELECTABLE)
RINGS = {"critical": 1 << 16, "bulk": 1 << 16}
_PROCESSED = re.compile(
    r"processed (\d+) insns \(limit \d+\) max_states_per_insn \d+ total_states (\d+) "
)
_STACK = re.compile(r"stack depth ([\d+]+)")
STACK = LIMIT * 7 // 8
"""The most bytes that a chain of calls of a program may take."""
LOG_BYTES = 1 << 24
GROWTH, FEW = 1.1, 10
"""What a kernel's other version may make of a figure, or add; more is the programs' doing."""
UNUSED = frozenset({"on_sock_state_alone"})
"""Loaded where others are used: theirs are kernels from 5.11 to 6.0, and none of those is here."""
WITHOUT_FIGURE = "no figure on any kernel"
ROW = b'{"sensor"'
"""How the line of a row begins."""


class Row(msgspec.Struct, frozen=True):
    """A program on one kernel. `outcome` is `loads`, `not here` (it needs what this kernel or
    machine has not), or why it does not load. `stack`: bytes of the deepest chain of its functions.
    """

    sensor: str
    program: str
    section: str
    outcome: str
    insns: int = 0
    states: int = 0
    stack: int = 0
    warnings: tuple[str, ...] = ()


def rows() -> Iterator[Row]:
    """Every program of every sensor, on this kernel."""
    for by_ring, by_perf in zip(_rows("auto"), _rows("perf"), strict=True):
        if by_ring.outcome == "loads" != by_perf.outcome:
            yield msgspec.structs.replace(by_ring, outcome=f"with perf buffers: {by_perf.outcome}")
        else:
            yield msgspec.structs.replace(
                by_ring,
                insns=max(by_ring.insns, by_perf.insns),
                states=max(by_ring.states, by_perf.states),
                stack=max(by_ring.stack, by_perf.stack),
                warnings=(*by_ring.warnings, *by_perf.warnings),
            )


def _rows(transport: str) -> Iterator[Row]:
    loader = Loader()
    loader.load_core(RINGS, None, transport)
    told = OPTIONS | loader._own_options()
    try:
        for name, sensor in SENSORS.items():
            if name != CORE:
                made = _Sensor(sensor, told, TARGETS)
                for info in sensor.programs:
                    yield row(loader, made, info)
    finally:
        loader.close()


def row(loader: Loader, made: _Sensor, info: ProgramInfo) -> Row:
    """One of them."""
    with told_by_libbpf() as of_opening:
        opened = loader._open(made.info.name)
    try:
        program = opened.programs.get(info.name)
        place = made.info.name, info.name, program.section if program else ""
        if info.name not in UNUSED and not loader._is_given(made, info.needs):
            return Row(*place, "not here")
        if program is None:
            return Row(*place, loader._why_absent())
        obstacle = loader._obstacle(program.section)
        if obstacle:
            return Row(*place, obstacle)
        loader._prepare_maps(made, opened)
        for one in opened.programs.values():
            one.autoload(one.name == info.name)
        if _is_copied(made.info, program):
            program.set_function(loader._typed_functions(made)[0])
        program.keep_log(room=LOG_BYTES)
        try:
            with told_by_libbpf() as of_loading:
                opened.load()
        except OSError as error:
            lines = program.log.splitlines()
            return Row(*place, f"{error.strerror}: {' / '.join(lines[-3:])}")
        insns, states, depths = figures(program.log)
        stack = deepest(loaded(program.fd), depths)
        told = (*warnings(program.log), *of_opening, *of_loading)
        return Row(*place, "loads", insns, states, stack, told)
    finally:
        opened.close()


@contextmanager
def told_by_libbpf() -> Iterator[list[str]]:
    """What libbpf warns of meanwhile, once it is over.

    It calls `print(level, format, arguments)`, and vdprintf(3) is called like that with a
    descriptor: warnings are of level 0, so they go to what is 0 meanwhile. Others are let go.
    """
    libbpf, libc = ctypes.CDLL("libbpf.so.1"), ctypes.CDLL(None)
    libbpf.libbpf_set_print.restype = ctypes.c_void_p
    libbpf.libbpf_set_print.argtypes = (ctypes.c_void_p,)
    kept = {number: os.dup(number) for number in (0, 1, 2)}
    found: list[str] = []
    with open(os.memfd_create("warnings"), "r+b") as file, open(os.devnull, "wb") as nothing:
        sys.stdout.flush()
        os.dup2(file.fileno(), 0)
        for number in (1, 2):
            os.dup2(nothing.fileno(), number)
        before = libbpf.libbpf_set_print(ctypes.cast(libc.vdprintf, ctypes.c_void_p))
        try:
            yield found
        finally:
            libbpf.libbpf_set_print(before)
            for number, descriptor in kept.items():
                os.dup2(descriptor, number)
                os.close(descriptor)
            file.seek(0)
            found += file.read().decode(errors="replace").splitlines()


def figures(log: str) -> tuple[int, int, list[int]]:
    """Instructions processed, states, and bytes of stack by function, out of the verifier's log."""
    processed, stack = _PROCESSED.search(log), _STACK.search(log)
    if processed is None or stack is None:
        raise ValueError(f"no figures in {log!r}")
    return int(processed[1]), int(processed[2]), [int(one) for one in stack[1].split("+")]


def warnings(log: str) -> tuple[str, ...]:
    """What it says beside figures."""
    return tuple(line for line in log.splitlines() if line.strip() and not line.startswith(FIGURES))


# ---------------------------------------------------------------- on every kernel


def on(suite: str, variant: str) -> list[Row]:
    """The rows of one of Debian's kernels, in a virtual machine."""
    prefix, python = VARIANTS[variant].prefix, sys.executable
    if suite.endswith("-arm64"):
        prefix, python = (*ARM64_PYTHON, *prefix), "python3"
    inside = [*prefix, python, "-m", "tests.vm.verifier", "--here"]
    command = [RUNNER, "run", suite, "--", *inside]
    done = run(command)
    for _ in range(1, MOST_STARTS):
        if not died_at_boot(done):
            break
        print(f"verifier: {suite} died at boot, starting again", file=sys.stderr, flush=True)
        done = run(command)
    if done.returncode:
        raise RuntimeError(f"{suite}: {said(done)[-2000:]}")
    return read(done.stdout)


def died_at_boot(done: subprocess.CompletedProcess[bytes]) -> bool:
    """Whether a guest's kernel ended before its first row: an emulated one panics now and then
    while it changes its own code.
    """
    return done.returncode != 0 and NOT_FINISHED in said(done) and ROW not in done.stdout


def said(done: subprocess.CompletedProcess[bytes]) -> str:
    """All that a command printed."""
    return (done.stdout + done.stderr).decode(errors="replace")


def run(command: Sequence[str]) -> subprocess.CompletedProcess[bytes]:
    """Run a command in a guest."""
    return subprocess.run(
        command,
        cwd=ROOT,
        env=os.environ | {"KERNEL_SECONDS": "3600"},
        capture_output=True,
        stdin=subprocess.DEVNULL,
    )


def read(output: bytes) -> list[Row]:
    """The rows that `--here` printed; a guest's console may have put other lines between them."""
    lines = (line for line in output.splitlines() if line.startswith(ROW))
    return [msgspec.json.decode(line, type=Row) for line in lines]


def cell(found: Row | None, there: Sequence[Row]) -> str:
    """What a table says of a program on a kernel, of which `there` are all rows."""
    if found is None or found.outcome == "not here":
        return "-"
    if found.outcome != "loads":
        return spare(found, there) or f"**{found.outcome.partition(':')[0]}**"
    return f"{found.insns:,} / {found.states:,} / {found.stack}"


def table(by_kernel: dict[str, list[Row]]) -> list[str]:
    """A line for each program, a column for each kernel."""
    names = dict.fromkeys((r.sensor, r.program) for rs in by_kernel.values() for r in rs)
    found = {(kernel, r.program): r for kernel, rs in by_kernel.items() for r in rs}
    lines = [
        "| sensor | program | " + " | ".join(by_kernel) + " |",
        "| --- | --- |" + " ---: |" * len(by_kernel),
    ]
    for sensor, program in names:
        cells = (cell(found.get((kernel, program)), rows) for kernel, rows in by_kernel.items())
        lines.append(f"| {sensor} | `{program}` | " + " | ".join(cells) + " |")
    return lines


_HEAD = f"""\
# What the verifier says

Written by `make verify ARGS=--write`. Every program, loaded alone and with all settings on:
instructions that the verifier processed (of a million) / states / bytes of stack of the deepest
chain of its functions, as the kernel counts them. More than {LIMIT} are refused, and more than
{STACK} fail the target. So do warnings, of the verifier's or libbpf's: there were none. And so does
a figure that has grown by more than a tenth, as long as it is not here.

A dash: the program is for other kernels, or another machine. *another*: this kernel has not what
the program is made with, and another one at the same hook loads. *without*: nor is there another
one, and events go without what it adds to them, as `streamer check` says there. Without BTF the
objects are those for kernels that have none, relocated by their headers.

"""


def figures_in(page: str) -> dict[tuple[str, str], tuple[int, int, int]]:
    """The figures of a page, by kernel and program."""
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in page.splitlines()
        if line.startswith("|")
    ]
    found = {}
    for _, program, *cells in rows[2:]:
        for kernel, text in zip(rows[0][2:], cells, strict=True):
            numbers = text.replace(",", "").split(" / ")
            if len(numbers) == 3:
                insns, states, stack = map(int, numbers)
                found[kernel, program.strip("`")] = insns, states, stack
    return found


def growth(by_kernel: Mapping[str, list[Row]], page: str) -> list[str]:
    """What has grown from what the page says, is not there, or does not load any more."""
    known = figures_in(page)
    loads = {
        (kernel, one.program) for kernel in by_kernel for one in by_kernel[kernel] if one.insns
    }
    found = [
        f"{kernel}: {program} does not load any more"
        for kernel, program in known
        if kernel in by_kernel and (kernel, program) not in loads
    ]
    for kernel, there in by_kernel.items():
        for one in there:
            if one.outcome != "loads":
                continue
            had = known.get((kernel, one.program))
            has = one.insns, one.states, one.stack
            if had is None:
                found.append(f"{kernel}: {one.program} is new: {has}")
            elif any(new > max(old * GROWTH, old + FEW) for new, old in zip(has, had, strict=True)):
                found.append(f"{kernel}: {one.program} has grown from {had} to {has}")
    return found


def problems(by_kernel: dict[str, list[Row]]) -> list[str]:
    """What must not be: a program without a spare that does not load, or a warning."""
    found = []
    for kernel, there in by_kernel.items():
        if not there:
            found.append(f"{kernel}: nothing came back")
        for one in there:
            if one.outcome not in ("loads", "not here") and not spare(one, there):
                found.append(f"{kernel}: {one.program} does not load: {one.outcome}")
            if one.stack > STACK:
                found.append(f"{kernel}: {one.program} may take {one.stack} bytes of stack")
            found += [f"{kernel}: {one.program}: {warning}" for warning in one.warnings]
    return found


def without_figure(by_kernel: Mapping[str, list[Row]]) -> list[str]:
    """Programs that loaded nowhere."""
    loaded = {one.program for there in by_kernel.values() for one in there if one.insns}
    programs = (
        one.name for name, sensor in SENSORS.items() if name != CORE for one in sensor.programs
    )
    return [f"{name}: {WITHOUT_FIGURE}" for name in programs if name not in loaded]


def spare(failed: Row, there: Iterable[Row]) -> str:
    """What is in place of a program that does not load: `another` at its hook, or events go
    `without` what it only adds to them. Empty: there is nothing.
    """
    programs = {info.name: info for info in SENSORS[failed.sensor].programs}
    own = programs[failed.program]
    loaded = (programs.get(one.program) for one in there if one.outcome == "loads")
    if any(info and info.hook == own.hook for info in loaded):
        return "another"
    return "" if own.reports else "without"


def main(arguments: Sequence[str]) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.vm.verifier")
    parser.add_argument("--here", action="store_true", help="this kernel alone, as lines of JSON")
    parser.add_argument("--kernel", action="append", help="one of Debian's suites; default: all")
    parser.add_argument(
        "--write", action="store_true", help=f"rewrite {PAGE.relative_to(ROOT)}, if all is well"
    )
    given = parser.parse_args(arguments)
    if given.here:
        for one in rows():
            print(msgspec.json.encode(one).decode(), flush=True)
        return 0
    there = releases()
    wanted = [one.partition("/") for one in given.kernel or list(there)]
    print(f"verifier: {os.uname().release}", file=sys.stderr, flush=True)
    by_kernel = {column(os.uname().release, "here", ""): list(rows())}
    wrong = []
    for suite, _, variant in wanted:
        print(f"verifier: {there[suite]} {variant}", file=sys.stderr, flush=True)
        try:
            by_kernel[column(there[suite], suite, variant)] = on(suite, variant)
        except RuntimeError as error:  # the others have taken a quarter of an hour
            wrong.append(str(error))
    lines = table(by_kernel)
    print("\n".join(lines))
    wrong += problems(by_kernel)
    if {suite for suite, _, variant in wanted if not variant} >= STOCK | {"trixie-arm64"}:
        wrong += without_figure(by_kernel)
    if given.write and not wrong:
        PAGE.write_text(_HEAD + "\n".join(lines) + "\n")
    else:
        wrong += growth(by_kernel, PAGE.read_text())
    for problem in wrong:
        print(f"verifier: {problem}", file=sys.stderr)
    return 1 if wrong else 0


def column(release: str, suite: str, variant: str) -> str:
    """What a kernel's column is called."""
    version = ".".join(release.split(".")[:2])
    if suite == "here":
        return f"{version} (not Debian's)"
    machine = "arm64" if suite.endswith("-arm64") else ""
    return " ".join(filter(None, (version, machine, VARIANTS[variant].title)))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
