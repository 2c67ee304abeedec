"""The walk through the flows of `bpf/tc_classifier.bpf.c`, which the agent has made."""

from __future__ import annotations

import mmap
import struct
from collections.abc import Callable
from contextlib import suppress

from streamer.kernel.objects import CONTRACT

SENSOR, PROGRAM, MAP = "tc_classifier", "walk_flows", "flow_walks"
KIND = "net.flow"
STRUCT = "flow_walk"
LINGER_SECONDS = 1.0
"""A flow that has ended is reported so much later: a connection's last packets belong to it."""

_PER_RUN = 16
"""Flows that one run of the program looks at, at most."""
_MOST_RUNS = 4096
"""At a time: nothing else can be asked of the helper meanwhile."""
_AT = {name: offset for name, offset, _ in CONTRACT[STRUCT]}
_LATENCIES = next(n for name, _, n in CONTRACT["net_flow"] if name == "response_latencies") // 4
_WORD, _FLAG = struct.Struct("<Q"), struct.Struct("<I")


class FlowWalk:
    """Rounds through the table of flows, each in as many steps as there is room in the ring."""

    def __init__(
        self,
        memory: mmap.mmap,
        run: Callable[[int], int],
        flows: int,
        idle_seconds: float,
        active_seconds: float,
        resolution_us: int,
    ) -> None:
        """`memory` is the mapped `struct flow_walk`; `run` runs the program so often.

        Response times below `resolution_us` are not told apart.
        """
        self._memory = memory
        self._run = run
        self._runs = min(flows // _PER_RUN + 2, _MOST_RUNS)
        times = {"idle": idle_seconds, "active": active_seconds, "linger": LINGER_SECONDS}
        for name, seconds in times.items():
            self._set(f"{name}_ns", round(seconds * 1e9))

        least = min(resolution_us.bit_length(), _LATENCIES - 1)
        _FLAG.pack_into(self._memory, _AT["least"], least)

    def _get(self, name: str) -> int:
        return int(_WORD.unpack_from(self._memory, _AT[name])[0])

    def _set(self, name: str, value: int) -> None:
        _WORD.pack_into(self._memory, _AT[name], value)

    @property
    def live(self) -> int:
        """Flows that are in the table."""
        return self._get("live")

    def step(self) -> bool:
        """Go on with the round, or begin one. Whether it is over: else the ring is to be read.

        Raises:
            OSError, StreamerError: the program cannot be run.
        """
        if self._get("rounds") >= self._get("target"):
            self._set("target", self._get("rounds") + 1)
        with suppress(InterruptedError):  # somebody has stopped the helper for a while
            self._run(self._runs)
        return self._get("rounds") >= self._get("target")

    def flush(self) -> bool:
        """Report every flow, in steps. Whether none is left; raises as `step` does."""
        _FLAG.pack_into(self._memory, _AT["stop"], 1)
        return self.step() and self.live == 0
