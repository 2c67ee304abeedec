"""Signals that ask a run for something, held back until it can answer.

Their default is to end the process. SIGHUP from logrotate, or from a terminal that is closed,
while programs are being loaded is answered as soon as that is done.
"""

from __future__ import annotations

import signal

_ASKING = (signal.SIGHUP, signal.SIGUSR1)


def hold() -> None:
    """Keep them pending, in this thread and all that it starts."""
    signal.pthread_sigmask(signal.SIG_BLOCK, _ASKING)


def release() -> None:
    """Let this thread have them, first of all those that are pending. It has to handle them."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _ASKING)
