"""Keeps the agent going on a host whose users take all of its memory and its CPUs.

What is set here is inherited by the helper. Where the agent may set nothing, its service manager
has done it: what was set is never made worse unless the settings say so.
"""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator

OOM_SCORE_ADJ = -900
"""Nearly always others are ended first; but a leak of ours does not take the host down with it."""
NICE = -4
"""As Linux's audit daemon has it: ahead of what others do, and no bar to it."""
_PATH = "/proc/self/oom_score_adj"


def endure(oom_score_adj: int | None, nice: int | None) -> Iterator[str]:
    """Take the settings, or what is best without them. What was asked for and cannot be had.

    Neither does a crash leave the agent's memory in a file.
    """
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with open(_PATH) as file:
        score = int(file.read())
    wanted = min(score, OOM_SCORE_ADJ) if oom_score_adj is None else oom_score_adj
    refused = _set_score(wanted) if wanted != score else ""
    if refused and oom_score_adj is not None:
        yield f"oom_score_adj is {score} and not {wanted}: {refused}"
    now = os.getpriority(os.PRIO_PROCESS, 0)
    priority = (now or NICE) if nice is None else nice
    refused = _set_priority(priority) if priority != now else ""
    if refused and nice is not None:
        yield f"nice is {now} and not {priority}: {refused}"


def _set_score(score: int) -> str:
    try:
        with open(_PATH, "w") as file:
            file.write(str(score))
    except OSError as error:
        return f"{error.strerror} (CAP_SYS_RESOURCE, or OOMScoreAdjust= of systemd)"
    return ""


def _set_priority(priority: int) -> str:
    try:
        os.setpriority(os.PRIO_PROCESS, 0, priority)
    except OSError as error:
        return f"{error.strerror} (CAP_SYS_NICE, or Nice= of systemd)"
    return ""
