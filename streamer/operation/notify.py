"""What a service manager is told: that the agent is ready, alive, or about to end (sd_notify(3)).

The protocol is a datagram of lines `NAME=VALUE` to the socket that `NOTIFY_SOCKET` names.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import MutableMapping
from contextlib import suppress

_LONGEST = 200


class Notifier:
    """A connection to the service manager. Telling never waits and never fails.

    `watchdog_seconds` is how long the manager waits for `alive` at most; None: it does not.
    """

    def __init__(self, address: str, watchdog_seconds: float | None = None) -> None:
        """To be made before privileges are given up: the way there may be closed afterwards.

        Raises:
            OSError: nobody listens at `address`, which is a path, or begins with `@`.
        """
        self.watchdog_seconds = watchdog_seconds
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        try:
            self._socket.setblocking(False)
            self._socket.connect(f"\0{address[1:]}" if address.startswith("@") else address)
        except BaseException:
            self._socket.close()
            raise

    @classmethod
    def of(cls, environment: MutableMapping[str, str]) -> Notifier | None:
        """The one that the environment names, if any. It is then no longer named there."""
        address = environment.pop("NOTIFY_SOCKET", "")
        usec, pid = environment.pop("WATCHDOG_USEC", ""), environment.pop("WATCHDOG_PID", "")
        if not address.startswith(("/", "@")):
            return None
        mine = pid in ("", str(os.getpid()))
        seconds = int(usec) / 1e6 if mine and usec.isdecimal() and int(usec) else None
        try:
            return cls(address, seconds)
        except OSError:
            return None

    def ready(self) -> None:
        """All is attached."""
        self._tell("READY=1")

    def reloading(self) -> None:
        """The configuration is read anew, until `ready` is told again."""
        self._tell(f"RELOADING=1\nMONOTONIC_USEC={time.monotonic_ns() // 1000}")

    def stopping(self) -> None:
        """It ends in order."""
        self._tell("STOPPING=1")

    def alive(self) -> None:
        """For the watchdog."""
        self._tell("WATCHDOG=1")

    def status(self, text: str) -> None:
        """A line for people, which `systemctl status` shows."""
        self._tell(f"STATUS={' '.join(text.split())[:_LONGEST]}")

    def close(self) -> None:
        """Harmless when it is closed."""
        self._socket.close()

    def _tell(self, line: str) -> None:
        with suppress(OSError):  # a manager that hangs, or is gone, must not hold up the agent
            self._socket.send(line.encode("utf-8", "replace"))
