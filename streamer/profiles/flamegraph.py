"""A flame graph as SVG: what a function was met in is below it, and its width is how often."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from typing import NamedTuple
from xml.sax.saxutils import escape, quoteattr

from streamer.profiles.folded import Folded, frame_text

WIDTH = 1200
ROW = 17
LEAST = 0.1
"""Pixels of the narrowest function that is drawn; what it was met in has its width all the same."""

_CHARACTER = 6.7
_HEAD, _FOOT = 40, 12
_ALL = "all"
_STYLE = (
    "text{font:11px monospace;fill:#000}rect{stroke:#fff;stroke-width:.4}"
    "g:hover rect{stroke:#000}.title{font-size:15px}"
)


class Box(NamedTuple):
    """A function in the graph: `left` and `width` in samples, `depth` from the bottom on."""

    name: str
    depth: int
    left: int
    width: int


def boxes(stacks: Folded) -> Iterator[Box]:
    """Every function of the graph; equal neighbours at the same place are one."""
    yield Box(_ALL, 0, 0, sum(stacks.values()))
    open_boxes: list[tuple[str, int]] = []  # name and left edge
    left = 0
    for stack in sorted(stacks):
        common = 0
        while common < min(len(stack), len(open_boxes)) and open_boxes[common][0] == stack[common]:
            common += 1
        yield from _closed(open_boxes, common, left)
        open_boxes += [(frame, left) for frame in stack[common:]]
        left += stacks[stack]
    yield from _closed(open_boxes, 0, left)


def _closed(open_boxes: list[tuple[str, int]], kept: int, right: int) -> Iterator[Box]:
    while len(open_boxes) > kept:
        name, left = open_boxes.pop()
        yield Box(name, len(open_boxes) + 1, left, right - left)


def flamegraph_svg(stacks: Folded, title: str) -> str:
    """The graph, which needs nothing but a browser; a function's share shows at the pointer."""
    found = list(boxes(stacks))
    total = found[0].width or 1
    height = _HEAD + ROW * (1 + max(box.depth for box in found)) + _FOOT
    drawn = [box for box in found if box.width * WIDTH / total >= LEAST]
    body = "".join(_drawn(box, total, height) for box in drawn)
    return (
        '<?xml version="1.0" encoding="UTF-8"?>\n'
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" '
        f'viewBox="0 0 {WIDTH} {height}"><style>{_STYLE}</style>\n'
        f'<rect width="100%" height="100%" fill="#f8f8f8"/>'
        f'<text class="title" x="{WIDTH // 2}" y="24" text-anchor="middle">'
        f"{escape(frame_text(title))}</text>\n{body}</svg>\n"
    )


def _drawn(box: Box, total: int, height: int) -> str:
    scale = WIDTH / total
    x, width = box.left * scale, box.width * scale
    y = height - _FOOT - ROW * (box.depth + 1)
    name = frame_text(box.name)
    told = f"{name}: {box.width:,} samples, {100 * box.width / total:.2f} %"
    room = int((width - 6) / _CHARACTER)
    label = name if len(name) <= room else f"{name[: room - 1]}…" if room > 2 else ""
    text = f'<text x="{x + 3:.1f}" y="{y + 12}">{escape(label)}</text>' if label else ""
    rect = f'<rect x="{x:.2f}" y="{y}" width="{width:.2f}" height="{ROW - 1}"'
    return f"<g><title>{escape(told)}</title>{rect} fill={quoteattr(_color(name))}/>{text}</g>\n"


def _color(name: str) -> str:
    """The same for the same function: orange the kernel's, green what is not known, else warm."""
    shade = zlib.crc32(name.encode()) % 60
    if name.startswith("[kernel]"):
        return f"rgb(240,{140 + shade},{40 + shade})"
    if name.startswith("["):
        return f"rgb({90 + shade},200,{90 + shade})"
    return f"rgb({205 + shade % 50},{80 + shade},{50 + shade // 2})"
