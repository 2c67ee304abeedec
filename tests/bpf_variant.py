"""Kernel programs that differ from ours: a copy of bpf/, changed and compiled."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
Change = tuple[str, str]
"""A piece of text, and what to put in place of its first occurrence."""


class Variant:
    """A source tree of its own, in which the project's own build has been run."""

    def __init__(self, directory: Path, changes: Mapping[str, Change]) -> None:
        """`changes`: file in bpf/ and what to change there. Compiles."""
        self.root = directory
        shutil.copytree(ROOT / "bpf", directory / "bpf")
        (directory / "streamer").mkdir()
        for name, (old, new) in changes.items():
            source = directory / "bpf" / name
            text = source.read_text()
            assert old in text
            source.write_text(text.replace(old, new, 1))
        subprocess.run([sys.executable, "bpf/build.py"], cwd=directory, check=True)

    @property
    def object(self) -> Path:
        return self.root / "streamer" / "bpf" / "streamer.bpf.o"
