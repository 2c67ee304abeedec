"""The command: `python -m tools.gen` writes what is stale, with `--check` it only says so."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from streamer.errors import StreamerError
from tools.gen.files import outputs

_DESCRIPTION = "Derives the Python side and the documentation from the compiled BPF objects."


def main(argv: list[str] | None = None) -> int:
    """Write the files, or with `--check` say which are stale; 1 if any is."""
    parser = argparse.ArgumentParser(prog="python -m tools.gen", description=_DESCRIPTION)
    objects = Path("streamer/bpf")
    parser.add_argument("--objects", type=Path, default=objects, help="where the *.bpf.o are")
    parser.add_argument("--root", type=Path, default=Path("."), help="where to write")
    parser.add_argument("--check", action="store_true", help="only say what is stale")
    arguments = parser.parse_args(argv)
    stale = 0
    try:
        for path, text in outputs(arguments.objects, arguments.root):
            stale += _put(path, text, write=not arguments.check)
    except StreamerError as error:
        print(f"gen: {error}", file=sys.stderr)
        return 1
    return 1 if arguments.check and stale else 0


def _put(path: Path, text: str, *, write: bool) -> bool:
    if path.exists() and path.read_text(encoding="utf-8") == text:
        return False
    print(f"gen: {path} {'written' if write else 'is stale: run `make gen`'}")
    if write:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return True


if __name__ == "__main__":
    sys.exit(main())
