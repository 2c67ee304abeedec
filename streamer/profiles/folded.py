"""Folded stacks: a line for each, as flame-graph tools read them."""

from __future__ import annotations

from collections.abc import Mapping

Folded = Mapping[tuple[str, ...], int]
"""How often each stack was met; its functions from the outermost on."""


def frame_text(frame: str) -> str:
    """A function's name as one frame of a line: without `;`, which separates them, and controls."""
    return "".join("?" if char == ";" or not char.isprintable() else char for char in frame)


def folded_lines(stacks: Folded) -> str:
    """`OUTERMOST;…;INNERMOST COUNT`, a line for each, in the order of their names."""
    return "".join(
        f"{';'.join(map(frame_text, frames))} {count}\n" for frames, count in sorted(stacks.items())
    )
