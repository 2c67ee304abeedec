"""The note of a run: what is in it however often it is handed on, and what is read of it."""

from __future__ import annotations

import os
import zlib
from pathlib import Path

import msgspec
import pytest

from streamer.agent.run_file import EARLIER, MOST_UNTOLD_BYTES, SLOT_BYTES, RunFile, bounded
from streamer.events.stream import PreviousRun, SeqRange, UntoldLoss


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


def killed(number: int) -> UntoldLoss:
    return UntoldLoss(f"killed {number}", "", "stop", 0, {}, "this run was killed", [])


def test_that_a_run_was_killed_is_kept_before_what_can_be_added_up() -> None:
    """It is said of that run alone: as part of a sum nobody would know of which."""
    untold: list[UntoldLoss] = []
    for number in range(150):
        untold = bounded([*untold, loss(number), killed(number), loss(number, "two")], 100)
        kept = [one for one in untold if not one.count and one.reason != EARLIER]
        assert kept == [killed(n) for n in range(number + 1)][-len(kept) :]
        assert len(kept) >= min(number + 1, 98)
        assert len(untold) <= 100 + 3
    for sink in ("one", "two"):
        assert sum(one.count for one in untold if one.sink == sink) == 300
    stopped = [UntoldLoss("run", "", "stop", 7, {"file.open": 7}, "left", []), killed(1)]
    assert sorted(one.count for one in bounded(stopped, 0)) == [0, 7]


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


def test_the_newest_note_is_read_over_many_runs(tmp_path: Path) -> None:
    """Each opens the file, reads the note of the one before, and leaves its own, or several."""
    path = str(tmp_path / "run.json")
    expected = None
    for run, notes in enumerate((3, 1, 2, 1)):
        file = RunFile.open(path)
        assert file is not None
        assert file.read() == expected
        for number in range(notes):
            expected = note([loss(10 * run + number)])
            file.write(expected)
            assert file.read() == expected
        file.close()


def test_a_note_that_is_too_long_leaves_the_one_before(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A reason or a name can be long; it would reach into the other note."""
    file = RunFile.open(str(tmp_path / "run.json"))
    assert file is not None
    for number in (1, 2):
        file.write(note([loss(number)]))
    for _ in range(2):
        file.write(note([loss(3, sink="x" * SLOT_BYTES)]))
    assert "it is too long" in caplog.text
    assert file.read() == note([loss(2)])
    file.close()


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
    path.touch(0o600)
    path.write_bytes(data)
    file = RunFile.open(str(path))
    assert file is not None
    assert file.read() is None
    assert "cannot be read" in caplog.text
    file.close()


def test_a_disk_that_is_full_costs_the_newest_alone(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may be written in part, or not at all."""
    path = tmp_path / "run.json"
    file = RunFile.open(str(path))
    assert file is not None
    file.write(note([loss(1)]))
    file.write(note([loss(2)]))
    write = os.write
    with monkeypatch.context() as patched:
        patched.setattr(os, "write", lambda fd, data: write(fd, data[:50]))
        file.write(note([loss(3)]))
    assert "no note can be left" in caplog.text
    assert file.read() == note([loss(2)])
    file.write(note([loss(4)]))
    assert file.read() == note([loss(4)])
    file.close()


@pytest.mark.parametrize("what", ["mode", "link", "directory", "fifo"])
def test_what_others_can_write_is_no_note(
    tmp_path: Path, what: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Who could forge it, or have another file overwritten by it."""
    directory = tmp_path / "shared"
    directory.mkdir()
    path = directory / "run.json"
    path.touch(0o600)
    if what == "mode":
        path.chmod(0o666)
    elif what == "link":
        (directory / "other").hardlink_to(path)
    elif what == "directory":
        directory.chmod(0o777)
    else:
        path.unlink()
        os.mkfifo(path, 0o600)
    assert RunFile.open(str(path)) is None
    assert "no note can be left" in caplog.text


@pytest.mark.parametrize(("old", "new"), [
    (b'"started_ns":1', b'"started_ns":1%b' % (b"0" * 30)),
    (b'"started_ns":1', b'"more":%b%b,"started_ns":1' % (b"[" * 20_000, b"]" * 20_000)),
], ids=["number", "depth"])  # fmt: skip
def test_a_note_that_could_not_be_published_is_none(tmp_path: Path, old: bytes, new: bytes) -> None:
    path = tmp_path / "run.json"
    text = b'{"number":3,"note":%b}' % msgspec.json.encode(note([])).replace(old, new)
    path.touch(0o600)
    path.write_bytes(b"%08x %b\n" % (zlib.crc32(text), text))
    file = RunFile.open(str(path))
    assert file is not None
    assert file.read() is None
    file.close()


def test_ranges_are_left_out_where_they_take_too_much_room() -> None:
    """Of the oldest first: a note has to fit into a message."""
    ranges = [SeqRange("bulk", cpu, 1, 10**9) for cpu in range(64)]
    untold = [UntoldLoss("run", "one", "sink", 1, {}, "refused", ranges) for _ in range(200)]
    short = bounded(untold)
    assert len(msgspec.json.encode(short)) < MOST_UNTOLD_BYTES + 200
    assert [one.count for one in short] == [1] * 200
    assert short[-1].ranges == ranges
    assert short[0].ranges == []


def test_the_kinds_of_ranges_are_left_out_before_the_ranges() -> None:
    """On many CPUs they take most of the room; the numbers explain what is missing without them."""
    kinds = {f"file.{n}": 100_000 for n in range(5)}
    ranges = [SeqRange("bulk", cpu, 1, 10**9, kinds=kinds) for cpu in range(250)]
    bare = [msgspec.structs.replace(one, kinds={}) for one in ranges]
    untold = [UntoldLoss("run", "one", "sink", 1, {}, "refused", ranges) for _ in range(4)]
    assert [one.ranges for one in bounded(untold[:2])] == [bare, ranges]
    assert [one.ranges for one in bounded(untold)] == [[], bare, bare, bare]
