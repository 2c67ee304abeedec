"""What the agent does to be ended late and wait little, done for real by a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from streamer.kernel.capabilities import CAP_SYS_RESOURCE, effective
from tests.conftest import Require

ROOT = Path(__file__).resolve().parents[2]
CAP_SYS_NICE = 23
ENDURES = """
import json, os, resource, sys
from streamer.privilege.endure import endure
score, nice, *given = json.loads(sys.argv[1])
open("/proc/self/oom_score_adj", "w").write(str(score))
os.setpriority(os.PRIO_PROCESS, 0, nice)
said = list(endure(*given))
print(json.dumps({
    "said": said,
    "score": int(open("/proc/self/oom_score_adj").read()),
    "nice": os.getpriority(os.PRIO_PROCESS, 0),
    "core": resource.getrlimit(resource.RLIMIT_CORE),
}))
"""


def after(score: int, nice: int, *given: int | None, bare: bool = False) -> dict[str, Any]:
    """What a process has that began with a score and a priority, and was given these settings."""
    prefix = ["setpriv", "--bounding-set=-all", "--inh-caps=-all"] if bare else []
    argument = json.dumps([score, nice, *given])
    command = [*prefix, sys.executable, "-c", ENDURES, argument]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    assert found.pop("core") == [0, 0]
    return found


def test_what_needs_no_right() -> None:
    """To be ended sooner and to wait longer."""
    assert after(10, 1, 500, 7) == {"said": [], "score": 500, "nice": 7}


def test_without_the_right_it_goes_on_as_it_was_started(require: Require) -> None:
    """Nobody asked for anything, so nothing is said."""
    require(os.geteuid() == 0, "takes root to give rights up")
    assert after(10, 0, None, None, bare=True) == {"said": [], "score": 10, "nice": 0}


def test_what_was_asked_for_in_vain_is_said(require: Require) -> None:
    require(os.geteuid() == 0, "takes root to give rights up")
    found = after(10, 0, -500, -3, bare=True)
    assert (found["score"], found["nice"]) == (10, 0)
    assert found["said"] == [
        "oom_score_adj is 10 and not -500: Permission denied (CAP_SYS_RESOURCE, or "
        "OOMScoreAdjust= of systemd)",
        "nice is 0 and not -3: Permission denied (CAP_SYS_NICE, or Nice= of systemd)",
    ]


def test_a_priority_that_it_was_started_with_stays() -> None:
    assert after(10, 5, None, None)["nice"] == 5


def test_with_the_rights(require: Require) -> None:
    require(CAP_SYS_NICE in effective(), "takes CAP_SYS_NICE")
    assert after(10, 0, None, None)["nice"] == -4
    assert after(10, 0, None, -7)["nice"] == -7
    score = after(10, 0, None, None)["score"]
    assert score == (-900 if CAP_SYS_RESOURCE in effective() else 10)
