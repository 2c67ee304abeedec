"""The log in a real journal: severities, messages of one line and of several."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import SET_UP, Require
from tests.kernel.journald import JOURNALD, Journald
from tests.kernel.scope import Scope

pytestmark = pytest.mark.kernel

# The messages are made here; the handler, its console and the journal are the real ones.
LOGS = """
import logging
from streamer.terminal.console import Console
from streamer.terminal.log import logging_to
console = Console()
console.start()
with logging_to(console, "debug"):
    log = logging.getLogger("streamer.test")
    log.debug("a detail")
    log.info("a broker said %r", "<3>no")
    log.warning("<0>first\\nsecond \\x1b[31m \\u00e9")
    try:
        raise ValueError("<1>of a defect")
    except ValueError:
        log.exception("a thread ended by a defect")
    log.critical("the end")
console.close(5)
"""


@pytest.fixture
def journald(tmp_path: Path, require: Require) -> Iterator[Journald]:
    require(os.path.exists(JOURNALD), f"systemd is not installed: {SET_UP}")
    with Journald(tmp_path / "run") as running:
        yield running


def test_a_run_in_the_journal(journald: Journald, scope: Scope, tmp_path: Path) -> None:
    """Each line of the real agent, without time or level in words: the journal has both."""
    config = tmp_path / "streamer.toml"
    config.write_text(
        f'state_file = "{tmp_path}/run.json"\ncontrol = {{ socket = "{tmp_path}/s" }}\n'
    )
    run = (sys.executable, "-m", "streamer", "run", "--config", str(config), *scope.options)
    options = ("--events", "process.exec", "--sink", f"file:{tmp_path}/out", "--duration", "1s")
    assert journald.says(*run, *options) == 0
    begun, account = journald.said
    assert begun == (6, f"streaming process.exec to file:{tmp_path}/out; Ctrl-C ends it")
    assert account[0] == 6
    assert re.match(r"streamer: [\d,]+ events in [\d.]+ s; ", account[1])
    assert {one["_TRANSPORT"] for one in journald.entries} == {"stdout"}


def test_what_ends_a_run_in_the_journal(journald: Journald, tmp_path: Path) -> None:
    missing = str(tmp_path / "none.toml")
    assert journald.says(sys.executable, "-m", "streamer", "run", "--config", missing) == 2
    ((priority, message),) = journald.said
    assert priority == 3
    assert message.startswith(f"streamer: {missing}: ")


def test_severities_and_messages_of_several_lines(journald: Journald) -> None:
    """A line end or a priority in what is quoted makes no message, and a traceback keeps its own
    severity in each of its lines.
    """
    assert journald.says(sys.executable, "-c", LOGS) == 0
    assert journald.said == [
        (7, "a detail"),
        (6, "a broker said '<3>no'"),
        (4, r"<0>first\nsecond \x1b[31m é"),
        (3, "a thread ended by a defect"),
        (3, "    Traceback (most recent call last):"),
        (3, '      File "<string>", line 13, in <module>'),
        (3, "    ValueError: <1>of a defect"),
        (2, "the end"),
    ]
