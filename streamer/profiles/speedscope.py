"""speedscope's file format: https://www.speedscope.app/file-format-schema.json."""

from __future__ import annotations

import msgspec

from streamer.profiles.folded import Folded, frame_text

SCHEMA = "https://www.speedscope.app/file-format-schema.json"


def speedscope_json(stacks: Folded, name: str, exporter: str) -> str:
    """One sampled profile of that name; weights are numbers of samples."""
    frames: dict[str, int] = {}
    samples = [
        [frames.setdefault(frame_text(frame), len(frames)) for frame in stack]
        for stack in sorted(stacks)
    ]
    weights = [stacks[stack] for stack in sorted(stacks)]
    document = {
        "$schema": SCHEMA,
        "name": name,
        "exporter": exporter,
        "activeProfileIndex": 0,
        "shared": {"frames": [{"name": frame} for frame in frames]},
        "profiles": [
            {
                "type": "sampled",
                "name": name,
                "unit": "none",
                "startValue": 0,
                "endValue": sum(weights),
                "samples": samples,
                "weights": weights,
            }
        ],
    }
    return msgspec.json.encode(document).decode() + "\n"
