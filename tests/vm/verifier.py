"""What the verifier says of every program, on this machine's kernel and on Debian's.

    python -m tests.vm.verifier [--kernel SUITE]... [--write]     a table; with --write, its page
    python -m tests.vm.verifier --here                            this kernel alone, a line each

Every program is loaded alone, with all settings on, so that nothing of it is left out. Exit 1 if
one that belongs to a kernel does not load there, or if the verifier says anything but figures.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence

import msgspec

from streamer.config.settings import Kernel
from streamer.events.catalogue import SELECTABLE
from streamer.kernel.loader import CORE, PERF_BUFFERS, Loader, Targets, _is_copied, _Sensor
from streamer.kernel.objects import SENSORS
from streamer.kernel.state import options_of, wanting
from streamer.kernel.system_calls import functions_of_calls
from streamer.kernel.tags import ProgramInfo
from tests.vm.suite import ROOT, RUNNER, releases

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
_FIGURES = ("verification time", "stack depth", "processed ", "insns processed")


class Row(msgspec.Struct, frozen=True):
    """A program on one kernel. `outcome` is `loads`, `not here` (it needs what this kernel or
    machine has not), or why it does not load. `stack`: bytes, of all its functions together.
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
    told = OPTIONS | {PERF_BUFFERS: int(loader.transport.name == "perf")}
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
    opened = loader._open(made.info.name)
    try:
        program = opened.programs[info.name]
        place = made.info.name, info.name, program.section
        if not loader._is_given(made, info.needs):
            return Row(*place, "not here")
        obstacle = loader._obstacle(program.section)
        if obstacle:
            return Row(*place, obstacle)
        loader._prepare_maps(made, opened)
        for one in opened.programs.values():
            one.autoload(one.name == info.name)
        if _is_copied(made.info, program):
            program.set_function(loader._typed_functions(made)[0])
        program.keep_log(figures=True)
        try:
            opened.load()
        except OSError as error:
            lines = program.log.splitlines()
            return Row(*place, f"{error.strerror}: {' / '.join(lines[-3:])}")
        return Row(*place, "loads", *figures(program.log), warnings(program.log))
    finally:
        opened.close()


def figures(log: str) -> tuple[int, int, int]:
    """Instructions processed, states, and bytes of stack, out of the verifier's log."""
    processed, stack = _PROCESSED.search(log), _STACK.search(log)
    if processed is None or stack is None:
        raise ValueError(f"no figures in {log!r}")
    depth = sum(map(int, stack[1].split("+")))
    return int(processed[1]), int(processed[2]), depth


def warnings(log: str) -> tuple[str, ...]:
    """What it says beside figures."""
    return tuple(
        line for line in log.splitlines() if line.strip() and not line.startswith(_FIGURES)
    )


# ---------------------------------------------------------------- on every kernel


def on(suite: str) -> list[Row]:
    """The rows of one of Debian's kernels, in a virtual machine."""
    command = [RUNNER, "run", suite, "--", sys.executable, "-m", "tests.vm.verifier", "--here"]
    environ = os.environ | {"KERNEL_SECONDS": "1800"}
    done = subprocess.run(
        command, cwd=ROOT, env=environ, capture_output=True, stdin=subprocess.DEVNULL
    )
    if done.returncode:
        raise RuntimeError(
            f"{suite}: {(done.stdout + done.stderr)[-2000:].decode(errors='replace')}"
        )
    return read(done.stdout)


def read(output: bytes) -> list[Row]:
    """The rows that `--here` printed; a guest's console may have put other lines between them."""
    lines = (line for line in output.splitlines() if line.startswith(b'{"sensor"'))
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
    names = dict.fromkeys((r.sensor, r.program, r.section) for rs in by_kernel.values() for r in rs)
    found = {(kernel, r.program): r for kernel, rs in by_kernel.items() for r in rs}
    lines = [
        "| sensor | program | " + " | ".join(by_kernel) + " |",
        "| --- | --- |" + " ---: |" * len(by_kernel),
    ]
    for sensor, program, _ in names:
        cells = (cell(found.get((kernel, program)), rows) for kernel, rows in by_kernel.items())
        lines.append(f"| {sensor} | `{program}` | " + " | ".join(cells) + " |")
    return lines


_HEAD = """\
# What the verifier says

Written by `make verify ARGS=--write`. Every program, loaded alone and with all settings on:
instructions that the verifier processed (of a million) / states / bytes of stack of all its
functions together, of which never all are in use (512 at once are refused). A dash: the program is
for other kernels, or another machine. *another*: this kernel has not what the program is made with,
and another one at the same hook loads. *without*: nor is there another one, and events go without
what it adds to them, as `streamer check` says there.

"""


def problems(by_kernel: dict[str, list[Row]]) -> list[str]:
    """What must not be: a program without a spare that does not load, or a warning."""
    found = []
    for kernel, there in by_kernel.items():
        if not there:
            found.append(f"{kernel}: nothing came back")
        for one in there:
            if one.outcome not in ("loads", "not here") and not spare(one, there):
                found.append(f"{kernel}: {one.program} does not load: {one.outcome}")
            found += [f"{kernel}: {one.program}: {warning}" for warning in one.warnings]
    return found


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
    parser.add_argument("--write", action="store_true", help=f"rewrite {PAGE.relative_to(ROOT)}")
    given = parser.parse_args(arguments)
    if given.here:
        for one in rows():
            print(msgspec.json.encode(one).decode(), flush=True)
        return 0
    there = releases()
    by_kernel = {}
    for suite in given.kernel or [suite for suite in there if not suite.endswith("-arm64")]:
        print(f"verifier: {there[suite]}", file=sys.stderr, flush=True)
        by_kernel[".".join(there[suite].split(".")[:2])] = on(suite)
    lines = table(by_kernel)
    print("\n".join(lines))
    if given.write:
        PAGE.write_text(_HEAD + "\n".join(lines) + "\n")
    for problem in problems(by_kernel):
        print(f"verifier: {problem}", file=sys.stderr)
    return 1 if problems(by_kernel) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
