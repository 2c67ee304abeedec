"""Compiles the kernel programs: every `bpf/NAME.bpf.c` becomes an object of its own.

`core.bpf.c` and the sensors become `streamer/bpf/NAME.bpf.o`, which are part of the wheel, and for
kernels without BTF of their own `streamer/bpf/nobtf/NAME.bpf.o` (see READ in kernel.bpf.h). With
`--all` the programs of benchmarks and tests (`bench*`, `test*`) are compiled too, into
`build/bpf/`. An object newer than everything in this directory is left alone.

    python3 bpf/build.py [--all]
    python3 bpf/build.py --machine aarch64 DIRECTORY    for another machine, into another place

`CLANG` and `LLVM_STRIP` in the environment name other tools than `clang` and `llvm-strip`.
"""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ROOT / "bpf"
PACKAGED = ROOT / "streamer" / "bpf"
WITHOUT_BTF = "nobtf"
UNPACKAGED = ROOT / "build" / "bpf"

# What libbpf's headers call the architectures that they know, and what Debian does.
ARCHITECTURES = {"x86_64": "x86", "aarch64": "arm64"}
DEBIAN = {"x86_64": "amd64", "aarch64": "arm64"}


class BuildError(Exception):
    """A kernel program that cannot be compiled; the message says what to do."""


def compiler_flags(machine: str, root: Path = ROOT) -> list[str]:
    """Flags for clang on `machine` (as `uname -m` says it).

    Raises:
        BuildError: an architecture that the programs are not made for.
    """
    if machine not in ARCHITECTURES:
        known = " and ".join(ARCHITECTURES)
        raise BuildError(f"the kernel programs are made for {known}, and this is {machine}")
    flags = ["-O2", "-g", "-target", "bpf", "-mcpu=v3", "-Wall", "-Wextra", "-Werror"]
    # A program's parameters are the hook's arguments, wanted or not; BPF_PROG adds the context.
    flags += ["-Wno-unused-parameter", f"-D__TARGET_ARCH_{ARCHITECTURES[machine]}"]
    # The BTF holds names of source files: keep the directory of the build out of them.
    flags += [f"-ffile-prefix-map={root}=.", "-Ibpf"]
    return flags


def kernel_headers(machine: str) -> Path:
    """Where <asm/types.h> of `machine` is: where Debian keeps it, the bpf target does not look.

    Raises:
        BuildError: it is not installed.
    """
    places = [f"/usr/include/{machine}-linux-gnu", f"/usr/{machine}-linux-gnu/include"]
    wanted = f"linux-libc-dev-{DEBIAN[machine]}-cross"
    if machine == platform.machine():
        places.append("/usr/include")  # on other distributions
        wanted = "linux-libc-dev"
    for place in places:
        if Path(place, "asm/types.h").exists():
            return Path(place)
    raise BuildError(
        f"the kernel's headers for {machine} are not installed (Debian: apt-get install {wanted})"
    )


def outputs(
    sources: Iterable[Path], everything: bool, packaged: Path = PACKAGED
) -> dict[Path, Path]:
    """Every object that is to be made, and its source."""
    found = {}
    for source in sources:
        for_tests = source.name.startswith(("bench", "test"))
        if everything and for_tests:
            found[UNPACKAGED / f"{source.stem}.o"] = source
        elif not for_tests:
            found[packaged / f"{source.stem}.o"] = source
            found[packaged / WITHOUT_BTF / f"{source.stem}.o"] = source
    return found


def is_stale(built: Path, inputs: Iterable[Path]) -> bool:
    """Whether the object is absent or older than any of its inputs."""
    if not built.exists():
        return True
    age = built.stat().st_mtime_ns
    return any(path.stat().st_mtime_ns > age for path in inputs)


def build(
    everything: bool = False,
    environ: Mapping[str, str] = os.environ,
    machine: str = "",
    packaged: Path = PACKAGED,
) -> list[Path]:
    """Compile what is stale, for this machine unless another is named; the objects compiled.

    Raises:
        BuildError: a tool that is missing, or an error of the compiler, which it has printed.
    """
    inputs = [path for path in SOURCES.rglob("*") if path.suffix in {".c", ".h", ".py"}]
    wanted = outputs(sorted(SOURCES.glob("*.bpf.c")), everything, packaged)
    if SOURCES / "core.bpf.c" not in wanted.values():
        raise BuildError(f"{SOURCES}/core.bpf.c is missing: this is no complete source tree")
    stale = {built: source for built, source in wanted.items() if is_stale(built, inputs)}
    for built, source in stale.items():
        _compile(source, built, environ, machine or platform.machine())
    return list(stale)


def _compile(source: Path, built: Path, environ: Mapping[str, str], machine: str) -> None:
    clang = _tool("clang", environ.get("CLANG", "clang"))
    strip = _tool("llvm", environ.get("LLVM_STRIP", "llvm-strip"))
    built.parent.mkdir(parents=True, exist_ok=True)
    # Named apart until it is complete, so that an interrupted build leaves nothing half done.
    partial = built.with_suffix(".o.partial")
    flags = [*compiler_flags(machine), f"-I{kernel_headers(machine)}"]
    flags.append(f"-DPLAIN_LOADS={int(built.parent.name != WITHOUT_BTF)}")
    _run([clang, *flags, "-c", str(source.relative_to(ROOT)), "-o", str(partial)])
    _run([strip, "-g", str(partial)])  # drops DWARF, keeps BTF
    partial.replace(built)


def _tool(package: str, name: str) -> str:
    found = shutil.which(name)
    if found is None:
        raise BuildError(
            f"{name} is not installed, and the kernel programs have to be compiled with it"
            f" (Debian: apt-get install {package} libbpf-dev)"
        )
    return found


def _run(command: list[str]) -> None:
    if subprocess.run(command, cwd=ROOT, check=False).returncode != 0:
        raise BuildError(f"failed: {shlex.join(command)}")


def main(arguments: list[str]) -> int:
    """The command line: 0, or 1 after a line that says what is wrong."""
    match arguments:
        case [] | ["--all"]:
            machine, packaged = "", PACKAGED
        case ["--machine", machine, directory]:
            packaged = Path(directory).resolve()
        case _:
            print("usage: build.py [--all] | --machine MACHINE DIRECTORY", file=sys.stderr)
            return 2
    try:
        for built in build("--all" in arguments, machine=machine, packaged=packaged):
            print(f"compiled {os.path.relpath(built, ROOT)}")
    except BuildError as error:
        print(f"build.py: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
