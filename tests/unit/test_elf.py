"""Functions of ELF files: real ones, and such as somebody made up to do harm."""

from __future__ import annotations

import os
import random
import re
import shutil
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from streamer.summaries import elf
from streamer.summaries.elf import Functions, NotElfError

PROGRAM = """
__attribute__((noinline)) int first(int n) { return n * 3 + 1; }
__attribute__((noinline)) static int second(int n) { return first(n) ^ 7; }
int main(int argc, char **argv) { return second(argc); }
"""


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("elf")
    (directory / "program.c").write_text(PROGRAM)
    built = directory / "program"
    command = ["cc", "-O1", "-Wl,--build-id", "-o", str(built), str(directory / "program.c")]
    subprocess.run(command, check=True)
    return built


def functions_of(path: Path) -> Functions:
    fd = os.open(path, os.O_RDONLY)
    try:
        return Functions(fd)
    finally:
        os.close(fd)


def output(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def functions_by_nm(path: Path, *options: str) -> Iterator[tuple[int, int, str]]:
    """Address, size and name of every function that nm finds."""
    for line in output("nm", "-S", *options, str(path)).splitlines():
        found = re.fullmatch(r"([0-9a-f]+) ([0-9a-f]+) [TtWi] (\S+)", line)
        if found:
            yield int(found[1], 16), int(found[2], 16), found[3].partition("@")[0]


def offset_of(path: Path, address: int) -> int:
    """By the segments that readelf shows."""
    for line in output("readelf", "-lW", str(path)).splitlines():
        words = line.split()
        if words[:1] == ["LOAD"]:
            offset, start, size = (int(words[i], 16) for i in (1, 2, 4))
            if start <= address < start + size:
                return address - start + offset
    raise AssertionError(f"{address:#x} is in no segment")


def test_functions_as_nm_shows_them(program: Path) -> None:
    found = functions_of(program)
    names = {name for *_, name in functions_by_nm(program)}
    assert {"main", "first", "second"} <= names
    for address, size, name in functions_by_nm(program):
        first = offset_of(program, address)
        for offset in (first, first + size - 1):
            assert found.name_at(offset) == name
    assert found.name_at(0) is None
    assert found.name_at(1 << 40) is None


def test_the_build_id(program: Path) -> None:
    shown = output("readelf", "-n", str(program))
    (wanted,) = re.findall(r"Build ID: ([0-9a-f]+)", shown)
    assert functions_of(program).build_id == wanted


def test_a_library_without_names_of_its_own() -> None:
    """Only what it exports is known: the names that nm -D shows, one of each address."""
    (path,) = {
        line.split()[-1]
        for line in Path("/proc/self/maps").read_text().splitlines()
        if re.search(r"/libc[.-]\S*so", line)
    }
    found = functions_of(Path(path))
    by_address: dict[int, set[str]] = {}
    for address, _, name in functions_by_nm(Path(path), "-D"):
        by_address.setdefault(address, set()).add(name)
    assert len(by_address) > 1000
    for address in list(by_address)[::50]:
        assert found.name_at(offset_of(Path(path), address)) in by_address[address]


def test_a_stripped_file(program: Path) -> None:
    stripped = program.with_name("stripped")
    subprocess.run(["strip", "-o", str(stripped), str(program)], check=True)
    found = functions_of(stripped)
    assert found.build_id == functions_of(program).build_id
    address = next(address for address, _, name in functions_by_nm(program) if name == "first")
    assert found.name_at(offset_of(program, address)) is None


@pytest.mark.parametrize(
    "data", [b"", b"\x7fEL", b"#!/bin/sh\n" * 20, b"\x7fELF\x02\x02" + b"\0" * 99]
)
def test_no_elf_file(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(data)
    with pytest.raises(NotElfError):
        functions_of(tmp_path / "file")


def survives(data: bytes, path: Path) -> Functions | None:
    """Read it, and ask it everywhere. None: it says that it cannot be read."""
    path.write_bytes(data)
    try:
        found = functions_of(path)
    except NotElfError:
        return None
    for offset in range(0, len(data), 64):
        name = found.name_at(offset)
        assert name is None or len(name) <= elf.MOST_NAME
    assert len(found.build_id) <= 2 * elf.MOST_BUILD_ID
    return found


def test_a_file_that_ends_anywhere(program: Path, tmp_path: Path) -> None:
    data = program.read_bytes()
    for end in [*range(0, 200), *range(200, len(data), 97)]:
        survives(data[:end], tmp_path / "cut")


def test_files_with_bytes_changed_at_random(program: Path, tmp_path: Path) -> None:
    """Above all in the headers, where sizes, places and links are."""
    data, chosen = program.read_bytes(), random.Random(20261129)
    headers = (0, 1024), (len(data) - 2048, len(data))
    for _ in range(1500):
        changed = bytearray(data)
        for _ in range(chosen.randint(1, 12)):
            first, last = chosen.choice((*headers, (0, len(data))))
            changed[chosen.randrange(first, last)] = chosen.choice(
                (0, 1, 0x7F, 0xFF, chosen.randrange(256))
            )
        survives(bytes(changed), tmp_path / "changed")


def made_up(table: bytes, names: bytes, **more: int) -> bytes:
    """A file of one segment with a symbol table; `more` are its sizes as it says them."""
    segment = struct.pack("<IIQQQQQQ", 1, 5, 0, 0, 0, 1 << 62, 1 << 62, 4096)
    at = 64 + len(segment)
    sections = b"".join(
        struct.pack("<IIQQQQIIQQ", 0, kind, 0, 0, offset, size, link, 0, 8, entry)
        for kind, offset, size, link, entry in (
            (0, 0, 0, 0, 0),
            (2, at + 192, more.get("symbols", len(table)), more.get("link", 2), 24),
            (3, at + 192 + len(table), more.get("strings", len(names)), 0, 0),
        )
    )
    header = struct.pack(
        "<16sHHIQQQIHHHHHH",
        *(b"\x7fELF\x02\x01\x01", 3, 62, 1, 0, 64, at, 0, 64, 56),
        *(more.get("segments", 1), 64, more.get("sections", 3), 0),
    )
    return header + segment + sections + table + names


def symbol(name: int, address: int, size: int) -> bytes:
    return struct.pack("<IBBHQQ", name, 0x12, 0, 1, address, size)


def test_what_was_made_up_is_read(tmp_path: Path) -> None:
    data = made_up(symbol(1, 0x500, 16), b"\0name\0")
    found = survives(data, tmp_path / "file")
    assert found is not None
    assert (found.name_at(0x50F), found.name_at(0x510), found.name_at(0x4FF)) == (
        "name",
        None,
        None,
    )


@pytest.mark.parametrize(
    "more",
    [
        {"symbols": 1 << 62},
        {"strings": (1 << 64) - 1},
        {"link": 0xFFFFFFFF},
        {"link": 1},  # its own names
        {"sections": 0xFFFF},
        {"segments": 0xFFFF},
    ],
)
def test_sizes_that_no_file_has(more: dict[str, int], tmp_path: Path) -> None:
    survives(made_up(symbol(1, 0x500, 16), b"\0name\0", **more), tmp_path / "file")


def test_names_without_an_end(tmp_path: Path) -> None:
    found = survives(made_up(symbol(0, 0x500, 16), b"\xff" * 100_000), tmp_path / "file")
    assert found is not None
    assert found.name_at(0x500) == "\ufffd" * elf.MOST_NAME


def test_the_memory_that_a_huge_table_takes(tmp_path: Path) -> None:
    """No more is read than the limit, of a file that has any number of functions at one place."""
    count = elf.MOST_SYMBOLS_BYTES // 24 + 100_000
    (tmp_path / "file").write_bytes(made_up(symbol(1, 0x500, 1 << 60) * count, b"\0name\0"))
    found = functions_of(tmp_path / "file")
    assert found.name_at(0x500) == "name"
    assert found.size < 2 * elf.MOST_SYMBOLS_BYTES


def test_a_file_that_shrinks_while_it_is_read(program: Path, tmp_path: Path) -> None:
    """There is an end to it, and no signal, as there would be for a mapped one."""
    path = Path(shutil.copy(program, tmp_path / "shrinking"))
    script = (
        "import os, sys\n"
        "from streamer.summaries.elf import Functions, NotElfError\n"
        "fd = os.open(sys.argv[1], os.O_RDWR)\n"
        "pread = os.pread\n"
        "def cut(*arguments):\n"
        "    os.ftruncate(fd, 200)\n"
        "    return pread(*arguments)\n"
        "os.pread = cut\n"
        "print(Functions(fd).name_at(0x1000))\n"
    )
    root = str(Path(elf.__file__).parents[2])
    done = subprocess.run(
        [sys.executable, "-c", script, str(path)],
        capture_output=True, text=True, cwd=root, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (0, "None\n", "")


def test_thousands_of_tables_cost_no_more_than_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sparse, so that it costs who makes it nothing."""
    count, size = 4000, 16 << 20
    header = struct.pack(
        "<16sHHIQQQIHHHHHH", b"\x7fELF\2\1\1", 3, 62, 1, *(0, 0, 64, 0, 64), *(56, 0, 64, count, 0)
    )
    table = struct.pack("<IIQQQQIIQQ", 0, 2, 0, 0, 1 << 20, size, 0, 0, 8, 24)
    with (tmp_path / "many").open("wb") as file:
        file.write(header + table * count)
        file.truncate((1 << 20) + size)
    sizes = []

    def counted(fd: int, offset: int, size: int) -> bytes:
        sizes.append(size)
        return read(fd, offset, size)

    read = elf._read
    monkeypatch.setattr(elf, "_read", counted)
    functions_of(tmp_path / "many")
    assert sum(sizes) < 4 * size
