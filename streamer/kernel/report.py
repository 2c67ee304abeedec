"""What `streamer check` reports."""

from __future__ import annotations

import msgspec

from streamer.kernel.state import KindStatus, ProgramStatus


class CheckReport(msgspec.Struct):
    """What was found. `ok` when every kind asked for is observed fully."""

    kernel: str
    ok: bool
    capabilities: dict[str, bool]
    features: dict[str, str]
    programs: list[ProgramStatus]
    kinds: dict[str, KindStatus]
