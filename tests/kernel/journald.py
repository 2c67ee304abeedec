"""A journald of the test's own, in a mount namespace where /run is another."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from tests.kernel.agent import ROOT
from tests.kernel.pace import seconds

JOURNALD = "/usr/lib/systemd/systemd-journald"
SECONDS = seconds(60)
_CONFIG = "[Journal]\nStorage=volatile\nReadKMsg=no\nAudit=no\n"
_BOOT = """
mount --bind "$1" /run
mount --bind /run/machine-id /etc/machine-id
mount --bind /dev/null /dev/kmsg  # it would write there what it is asked to do
exec "$2"
"""
# What systemd does for a service: see JOURNAL_STREAM in systemd.exec(5). systemd-cat does not.
_NAMED = 'JOURNAL_STREAM=$(stat -Lc %d:%i /proc/self/fd/2) exec "$@"'


class Journald:
    """It runs within the `with`."""

    def __init__(self, directory: Path) -> None:
        """`directory` is made, and holds all that it writes."""
        for name in ("systemd/journald.conf.d", "log/journal"):
            (directory / name).mkdir(parents=True)
        (directory / "machine-id").write_text("0123456789abcdef" * 2 + "\n")
        (directory / "systemd" / "journald.conf.d" / "test.conf").write_text(_CONFIG)
        self._run = directory
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        boot = ("sh", "-ec", _BOOT, "sh", str(self._run), JOURNALD)
        self._process = subprocess.Popen(["unshare", "--mount", "--propagation", "private", *boot])
        deadline = time.monotonic() + SECONDS
        while not (self._run / "systemd" / "journal" / "stdout").is_socket():
            assert self._process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
        return self

    def __exit__(self, *exc: object) -> None:
        assert self._process is not None
        self._process.kill()
        self._process.wait()

    def _inside(self, *command: str) -> subprocess.CompletedProcess[str]:
        assert self._process is not None
        enter = ["nsenter", "--target", str(self._process.pid), "--mount", f"--wd={ROOT}"]
        return subprocess.run([*enter, *command], capture_output=True, text=True, timeout=SECONDS)

    def says(self, *command: str) -> int:
        """Run a command whose output goes to the journal, as that of a service. Its exit code."""
        named = ("sh", "-c", _NAMED, "sh", *command)
        return self._inside("systemd-cat", "--identifier=streamer", *named).returncode

    @property
    def entries(self) -> list[Mapping[str, Any]]:
        """What the services have said, in order."""
        assert self._inside("journalctl", "--sync").returncode == 0
        shown = self._inside("journalctl", "--output=json", "--no-pager", "-t", "streamer")
        assert shown.returncode == 0, shown.stderr
        return [json.loads(line) for line in shown.stdout.splitlines()]

    @property
    def said(self) -> list[tuple[int, str]]:
        """Priority and message of each."""
        return [(int(one["PRIORITY"]), one["MESSAGE"]) for one in self.entries]
