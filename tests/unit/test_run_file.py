"""The note of a run: what is in it however often it is handed on, and what is read of it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from streamer.agent.run_file import EARLIER, RunFile, bounded
from streamer.events.stream import PreviousRun, UntoldLoss


def loss(number: int, sink: str = "one") -> UntoldLoss:
    return UntoldLoss(str(number), sink, "sink", 2, {"file.open": 2}, "refused", [])


def note(untold: list[UntoldLoss]) -> PreviousRun:
    return PreviousRun("run", "boot", "1.0", 1, "undelivered", untold)


def test_few_losses_are_handed_on_as_they_are() -> None:
    untold = [loss(number) for number in range(5)]
    assert bounded(untold, 5) == untold


def test_of_many_the_oldest_are_added_up() -> None:
    """However often: nothing of them goes."""
    untold: list[UntoldLoss] = []
    for number in range(100):
        untold = bounded([*untold, loss(number), loss(number, "two")], 10)
    assert len(untold) == 12
    for sink in ("one", "two"):
        assert sum(one.count for one in untold if one.sink == sink) == 200
        assert sum(one.kinds["file.open"] for one in untold if one.sink == sink) == 200
    assert [one.reason for one in untold].count(EARLIER) == 2
    assert untold[-2:] == [loss(99), loss(99, "two")]


def test_a_note_is_read_as_it_was_written(tmp_path: Path) -> None:
    """A shorter one leaves nothing of a longer one, and only root can read it."""
    path = tmp_path / "new" / "run.json"
    file = RunFile.open(str(path))
    assert file is not None
    assert file.read() is None
    for untold in ([loss(number) for number in range(200)], [loss(1)]):
        file.write(note(untold))
        assert file.read() == note(untold)
    file.close()
    assert path.stat().st_mode & 0o777 == 0o600
    again = RunFile.open(str(path))
    assert again is not None
    assert again.read() == note([loss(1)])
    again.close()


def test_only_one_has_the_file(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = str(tmp_path / "run.json")
    first = RunFile.open(path)
    assert first is not None
    assert RunFile.open(path) is None
    assert "another agent" in caplog.text
    first.close()
    third = RunFile.open(path)
    assert third is not None
    third.close()


def test_a_link_is_not_followed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "target").write_text("precious")
    (tmp_path / "run.json").symlink_to(tmp_path / "target")
    assert RunFile.open(str(tmp_path / "run.json")) is None
    assert (tmp_path / "target").read_text() == "precious"
    assert "no note can be left" in caplog.text


@pytest.mark.parametrize("data", [b"{}", b"\xff\xfe", b"[1", b'{"run_id":' + b"1" * 2_000_000])
def test_what_makes_no_sense_is_no_note(
    tmp_path: Path, data: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "run.json"
    path.write_bytes(data)
    file = RunFile.open(str(path))
    assert file is not None
    assert file.read() is None
    assert "cannot be read" in caplog.text
    file.close()


def test_a_disk_that_is_full_costs_the_note_alone(caplog: pytest.LogCaptureFixture) -> None:
    fd = os.open("/dev/full", os.O_RDWR)
    file = RunFile(fd)
    file.write(note([]))
    file.close()
    assert "no note can be left" in caplog.text
