"""The agent as a process, over a kernel in memory: `python FILE EVENTS ARGUMENTS…`.

Command line, process, signals, log and sinks are the real ones. EVENTS of two kinds have happened
as soon as it has attached. No privileges are needed, and none given up.
"""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from streamer import cli
from streamer.agent import run
from streamer.config.settings import Settings
from streamer.kernel import capabilities, state
from streamer.kernel.loader import Targets
from streamer.privilege.files import DIRECT
from streamer.privilege.named import named_files
from tests.memory_kernel import MemoryKernel


class Client:
    """A helper that is always there."""

    def watch(self, loop: asyncio.AbstractEventLoop, gone: Callable[[], None]) -> None:
        pass

    def unwatch(self, loop: asyncio.AbstractEventLoop) -> None:
        pass

    def farewell(self) -> None:
        pass


class OneProcess:
    """In place of `Split`: no helper, and nothing is given up."""

    def __init__(
        self,
        settings: Settings,
        kinds: Collection[str],
        config: str | None = None,
        further: int = 0,
    ) -> None:
        self.client, self.loader, self.opener = Client(), None, DIRECT
        self.files = frozenset(named_files(settings, config))
        self.targets: dict[str, Targets] = {}
        self.directory = os.getcwd()
        self.ends = [*range(further)]

    def drop(self, *, answers: bool = False) -> None:
        pass

    def close(self) -> None:
        pass


class Busy(MemoryKernel):
    """Much has happened as soon as it is attached."""

    events = 0

    def attach(self) -> None:
        super().attach()
        for kind in ("process.exec", "file.open"):
            self.programs.emit(kind, self.events)


def load(settings: Settings, kinds: Collection[str], *_: Any) -> MemoryKernel:
    if settings.btf is not None:  # a FIFO: loading lasts for as long as a test wants
        Path(settings.btf).read_bytes()
    return Busy(settings, frozenset(kinds))


if __name__ == "__main__":
    Busy.events = int(sys.argv[1])
    capabilities.require = lambda: None
    state.load = load  # type: ignore[assignment]
    run.Split = OneProcess  # type: ignore[assignment,attr-defined]
    sys.exit(cli.main(sys.argv[2:]))
