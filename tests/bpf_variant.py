"""Kernel programs that differ from ours: a copy of bpf/, changed and compiled."""

from __future__ import annotations

import hashlib
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Collection, Mapping
from contextlib import suppress
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BUILT = ROOT / "build" / "variants"
Change = tuple[str, str]
"""A piece of text, and what to put in place of its first occurrence."""


class Variant:
    """A source tree of its own, in which the project's own build has been run.

    What was compiled is kept in build/variants, so that the same is not compiled twice.
    """

    def __init__(
        self,
        directory: Path,
        changes: Mapping[str, Change | list[Change]],
        only: Collection[str] = (),
        more: Mapping[str, str] | None = None,
    ) -> None:
        """`changes`: file in bpf/ and what to change there. Compiles, if given, `only` those, and
        the sources in `more`, by their names.
        """
        self.root = directory
        shutil.copytree(ROOT / "bpf", directory / "bpf")
        (directory / "streamer").mkdir()
        for name, change in changes.items():
            source = directory / "bpf" / name
            text = source.read_text()
            for old, new in change if isinstance(change, list) else [change]:
                assert old in text
                text = text.replace(old, new, 1)
            source.write_text(text)
        for source in (directory / "bpf").glob("*.bpf.c"):
            if only and source.name.removesuffix(".bpf.c") not in only:
                source.unlink()
        for name, text in (more or {}).items():
            (directory / "bpf" / name).write_text(text)
        built = BUILT / self._digest()
        if not built.exists():
            if all(name.endswith(".bpf.c") for name in changes):
                changed = (*changes, *(more or {}))
                self._take_ours({name.removesuffix(".c") + ".o" for name in changed})
            subprocess.run([sys.executable, "bpf/build.py"], cwd=directory, check=True)
            self._keep(built)
        shutil.copytree(built, self.objects, dirs_exist_ok=True)

    def _digest(self) -> str:
        """Of all that is compiled, and of how."""
        digest = hashlib.sha256()
        for path in sorted((self.root / "bpf").rglob("*")):
            if path.is_file() and "__pycache__" not in path.parts:
                content = path.read_bytes()
                digest.update(f"{path.relative_to(self.root)} {len(content)}\n".encode() + content)
        return digest.hexdigest()[:16]

    def _keep(self, place: Path) -> None:
        """For another run, such as one on an emulated machine, where compiling takes a minute."""
        place.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=place.parent) as name:
            shutil.copytree(self.objects, Path(name) / "objects")
            with suppress(OSError):
                (Path(name) / "objects").rename(place)
        assert place.is_dir()  # somebody else may have been quicker

    def _take_ours(self, changed: Collection[str]) -> None:
        """Spare the compiler what the changes do not touch."""
        sources = {path.name for path in (self.root / "bpf").glob("*.bpf.c")}
        for built in (ROOT / "streamer" / "bpf").rglob("*.bpf.o"):
            if built.name in changed or built.name.removesuffix(".o") + ".c" not in sources:
                continue
            place = self.root / built.relative_to(ROOT)
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(built, place)

    @property
    def objects(self) -> Path:
        """The directory of the compiled objects."""
        return self.root / "streamer" / "bpf"

    def with_streamer(self) -> tuple[str, ...]:
        """Copy the streamer to these objects. What to put before its command to use that copy."""
        made = {path.name for path in self.objects.rglob("*.o")}
        ignored = shutil.ignore_patterns(*made, "__pycache__")
        shutil.copytree(
            ROOT / "streamer", self.root / "streamer", ignore=ignored, dirs_exist_ok=True
        )
        return ("env", f"--chdir={self.root}")


EVERY_RECORD = "/* Every record:"
"""How what follows the last struct of a record in `events.h` begins."""


def example_of_a_kind(number: int | None = None) -> dict[str, Change | list[Change]]:
    """The changes that CONTRIBUTING.md makes for a new kind, of another number if one is given."""
    definition, hook, _ = _pieces_of_c((ROOT / "CONTRIBUTING.md").read_text())
    constant, struct, line = re.split(r"\n\n(?=struct)", definition)
    if number is not None:
        constant = re.sub(r"= \d+", f"= {number}", constant)
    return {
        "events.h": [
            ("	KIND_END = 64,", f"	{constant}\n	KIND_END = {max(64, (number or 0) + 1)},"),
            (EVERY_RECORD, f"{struct}\n\n{EVERY_RECORD}"),
            ("	struct net_close net_close;", f"	struct net_close net_close;\n	{line}"),
        ],
        "process.bpf.c": ("struct exit_key {", hook + "\n\nstruct exit_key {"),
    }


def _pieces_of_c(page: str) -> list[str]:
    """Without their indentation."""
    lines = page.splitlines()
    text = "\n".join(line[7:] if line.startswith(" " * 7) or not line else "@" for line in lines)
    return [piece.strip() for piece in re.split("@+", text) if piece.strip()]
