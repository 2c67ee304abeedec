"""`streamer profile`: a run for `profile.sample` alone, and what it found as one file."""

from __future__ import annotations

import errno
import os
import stat
import sys
from collections import Counter
from collections.abc import Callable, Mapping

import msgspec

from streamer import __version__
from streamer.agent.run import run_service
from streamer.config.settings import Limits, Settings
from streamer.errors import ConfigError, SinkError
from streamer.events.batch import Batch
from streamer.events.summaries import ProfileSample
from streamer.kernel import capabilities
from streamer.profiles.flamegraph import flamegraph_svg
from streamer.profiles.folded import Folded, folded_lines
from streamer.profiles.speedscope import speedscope_json
from streamer.sinks.base import Sink
from streamer.terminal.console import say

KIND = "profile.sample"
PERIOD_SECONDS = 1.0
"""Processes are looked into so often: what has ended by then has no names."""

_BUDGET_BYTES = 1 << 25


class Collector(Sink):
    """Adds up samples by stack. The outermost function of each is the name of its task."""

    def __init__(self) -> None:
        """Nothing was collected yet."""
        super().__init__("profile:", _BUDGET_BYTES)
        self.stacks: Counter[tuple[str, ...]] = Counter()
        self.lost = 0
        self.incomplete = 0

    async def start(self) -> None:
        """Nothing to open."""
        self._set_status("up")

    def submit(self, batch: Batch) -> None:
        """Add up a batch, at once."""
        self._take(batch.kinds, 0)
        samples = [event for event in batch.events if isinstance(event, ProfileSample)]
        for one in samples:
            name = (one.comm or "?",) if one.cpu_mode != "other" else ()
            self.stacks[*name, *one.frames] += one.count
            self.incomplete += one.count if one.incomplete else 0
        self.stacks = +self.stacks
        if samples:
            self.lost += samples[0].lost  # of the period: each of its records says it
        self._delivered(batch.kinds, 0, 0)

    async def stop(self, grace: float) -> None:
        """Nothing is held."""
        self._set_status("closed")


def run_profile(settings: Settings, limits: Limits, output: str | None) -> int:
    """Sample as `settings` say, and write what was found to `output`, or else print it. Exit code.

    The file is opened before privileges are given up.

    Raises:
        StreamerError: what kept it from starting, or ended it.
    """
    make = format_of(output)
    capabilities.require()  # before there is a file
    fd = open_output(output) if output is not None else None
    quiet = msgspec.structs.replace(
        settings, summary_seconds=PERIOD_SECONDS, state_file="", log_level="warning"
    )
    found = Collector()
    code = run_service(quiet, frozenset({KIND}), limits, found)
    text = make(found.stacks, _title(found, settings.kernel.profile_hz))
    if fd is None:
        sys.stdout.write(text)
    else:
        _write(fd, text, str(output))
    say(f"streamer: {_account(found, output)}")
    return code


def _title(found: Collector, rate: int) -> str:
    return f"{os.uname().nodename}: {found.stacks.total():,} samples at {rate} Hz"


def _account(found: Collector, output: str | None) -> str:
    where = f" in {output}" if output is not None else ""
    lost = f", {found.lost:,} lost" if found.lost else ""
    part = f", {found.incomplete:,} with a part of their stack" if found.incomplete else ""
    return f"{found.stacks.total():,} samples of {len(found.stacks):,} stacks{where}{lost}{part}"


def _speedscope(stacks: Folded, title: str) -> str:
    return speedscope_json(stacks, title, f"streamer {__version__}")


_FORMATS: Mapping[str, Callable[[Folded, str], str]] = {
    ".svg": flamegraph_svg,
    ".json": _speedscope,
    ".folded": lambda stacks, title: folded_lines(stacks),
}


def format_of(output: str | None) -> Callable[[Folded, str], str]:
    """What makes the text of a file of that name. Raises ConfigError: nothing does."""
    ending = ".folded" if output is None else os.path.splitext(output)[1]
    if ending not in _FORMATS:
        raise ConfigError(
            f"--output: found {output!r}, allowed: a name that ends with {', '.join(_FORMATS)}"
        )
    return _FORMATS[ending]


def open_output(path: str) -> int:
    """A descriptor of the file, made if need be, and not changed yet.

    No symbolic link is followed, and nothing but a file that is the user's own is written to: the
    directory may be anybody's, and this may be root.

    Raises:
        SinkError: it cannot be had.
    """
    flags = os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
    try:
        fd = os.open(path, flags, 0o644)
    except OSError as error:
        link = error.errno == errno.ELOOP
        raise SinkError(f"{path}: {'a symbolic link' if link else error.strerror}") from None
    status = os.fstat(fd)
    own = status.st_uid == os.geteuid() and status.st_nlink == 1
    if not stat.S_ISREG(status.st_mode) or not own:
        os.close(fd)
        raise SinkError(f"{path}: it is there, and no file of one's own")
    return fd


def _write(fd: int, text: str, path: str) -> None:
    try:
        os.ftruncate(fd, 0)
        with os.fdopen(fd, "w", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        raise SinkError(f"{path}: {error.strerror}") from None
