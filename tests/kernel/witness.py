"""bpftrace, which counts on the same hooks."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from streamer.kernel.loader import ensure_tracefs
from tests.kernel.pace import seconds


@contextmanager
def bpftrace(program: str, output: Path) -> Iterator[Callable[[], str]]:
    """Run a program, attached from the beginning of the block on.

    What it is given ends the program, and returns all that it wrote to `output`: its maps last.
    """
    assert ensure_tracefs() == ""
    with output.open("wb") as file:
        process = subprocess.Popen(
            ["bpftrace", "-e", program],
            stdout=file,
            stderr=subprocess.STDOUT,
            env=os.environ | {"__BPFTRACE_NOTIFY_PROBES_ATTACHED": "1"},
        )

    def end() -> str:
        process.send_signal(signal.SIGINT)
        process.wait(seconds(60))
        return output.read_text()

    try:
        deadline = time.monotonic() + seconds(60)
        while b"PROBES_ATTACHED" not in output.read_bytes():
            assert process.poll() is None, output.read_text()
            assert time.monotonic() < deadline, output.read_text()
            time.sleep(0.05)
        yield end
    finally:
        process.kill()
        process.wait()
