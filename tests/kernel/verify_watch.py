"""`streamer verify` while it reads, with a terminal for its progress."""

from __future__ import annotations

import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from types import TracebackType
from typing import NamedTuple, Self

import msgspec

from streamer.verify.report import VerifyReport
from tests.kernel.agent import ROOT

DRAWN_ANEW = b"\r\x1b[K"
_LINE = re.compile(rb"([\d,]+) records, ([\d,]+\.\d) MB, ([\d,]+)/s")
SECONDS = 60


class Progress(NamedTuple):
    """A line of it: records, megabytes, records a second since the start."""

    records: int
    megabytes: float
    rate: int


class Watch:
    """The command, from its start to its report."""

    def __init__(self, *arguments: str) -> None:
        command = [sys.executable, "-m", "streamer", "verify", "--json", *arguments]
        self._terminal, its = pty.openpty()
        self._process = subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.PIPE, stderr=its, start_new_session=True
        )
        os.close(its)
        self.shown = b""

    @property
    def lines(self) -> list[Progress]:
        """All that was drawn, each anew over the one before, and nothing else.

        Of the last one only a part may have been read; or it is empty: taken away at the end.
        """
        first, *drawn = self.shown.split(DRAWN_ANEW)
        assert first == b"" if drawn else DRAWN_ANEW.startswith(first), self.shown
        if drawn and not _LINE.fullmatch(drawn[-1]):
            drawn.pop()
        found = []
        for one in drawn:
            match = _LINE.fullmatch(one)
            assert match, self.shown
            records, megabytes, rate = (text.replace(b",", b"") for text in match.groups())
            found.append(Progress(int(records), float(megabytes), int(rate)))
        return found

    def until(self, records: int) -> Progress:
        """Wait until so many are shown as read."""
        deadline = time.monotonic() + SECONDS
        while True:
            if (lines := self.lines) and lines[-1].records >= records:
                return lines[-1]
            assert time.monotonic() < deadline, self.shown
            assert self._process.poll() is None, self.shown
            self._look(0.1)

    def end(self, number: signal.Signals = signal.SIGINT) -> tuple[int, VerifyReport]:
        """The exit code after the signal, and the report."""
        self._process.send_signal(number)
        output, _ = self._process.communicate(timeout=SECONDS)
        self._look(0)
        return self._process.returncode, msgspec.json.decode(output, type=VerifyReport)

    def _look(self, seconds: float) -> None:
        while select.select([self._terminal], [], [], seconds)[0]:
            try:
                data = os.read(self._terminal, 65536)
            except OSError:  # nobody has the other end any more
                return
            self.shown += data

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: object, trace: TracebackType | None
    ) -> None:
        if self._process.poll() is None:
            self._process.kill()
            self._process.communicate()
        os.close(self._terminal)
