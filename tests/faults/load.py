"""What is offered: opens and processes of a cgroup, each counted by who makes them."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Self

from tests.kernel.agent import ROOT
from tests.kernel.scope import Scope

SOURCE = Path(__file__).parent / "load.c"
BUILT = ROOT / "build" / "tests" / "load"
ENTER = 'echo 0 >"$0"/cgroup.procs && exec "$@"'
Counts = Counter[str]


def build() -> Path:
    """The compiled `load.c`, as new as its source."""
    if not BUILT.exists() or BUILT.stat().st_mtime_ns < SOURCE.stat().st_mtime_ns:
        BUILT.parent.mkdir(parents=True, exist_ok=True)
        command = ["cc", "-O1", "-static", "-Wall", "-Werror", "-o", str(BUILT), str(SOURCE)]
        subprocess.run(command, check=True)
    return BUILT


class Load:
    """One of them, in the background of a test, from its start to `stop`."""

    def __init__(
        self, program: Path, scope: Scope, *arguments: str, uid: int | None = None, nice: int = 0
    ) -> None:
        """See `load.c` for the arguments; it does it as root unless there is a `uid`. A negative
        `nice` has it go before others: the agent has -4.
        """
        first = ["nice", "-n", str(nice)] if nice else []
        command = [*first, "sh", "-c", ENTER, str(scope.path), str(program), *arguments]
        environ = {} if uid is None else {"LOAD_UID": str(uid)}
        self.kind = arguments[0]
        self.word = arguments[1]
        self.uid = uid
        self._begun = time.monotonic()
        self._process = subprocess.Popen(
            command, env=os.environ | environ, stdout=subprocess.PIPE, text=True
        )
        self.done = 0
        self.seconds = 0.0

    def stop(self, timeout: float = 60) -> int:
        """End it, and wait. How often it did what it does."""
        if self.kind != "bomb" and self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
        return self.wait(timeout)

    def wait(self, timeout: float) -> int:
        """Wait until it ends by itself. How often it did what it does."""
        said, _ = self._process.communicate(timeout=timeout)
        self.seconds = time.monotonic() - self._begun
        assert self._process.returncode == 0, f"the load ended with {self._process.returncode}"
        self.done = int(said)
        return self.done

    @property
    def expected(self) -> Counts:
        """Events per kind that it made: the shell that it begins as becomes it by an exec."""
        own = {"process.exec": 1, "process.exit": 1}
        made: Mapping[str, int] = {
            "opens": {"file.open": self.done},
            "spawns": dict.fromkeys(("process.fork", "process.exec", "process.exit"), self.done),
            "bomb": {"process.fork": self.done, "process.exit": self.done},
        }[self.kind]
        return Counter(own) + Counter(made)

    def kill(self) -> None:
        """Harmless when it has ended."""
        if self._process.poll() is None:
            self._process.kill()
            self._process.communicate()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.kill()
