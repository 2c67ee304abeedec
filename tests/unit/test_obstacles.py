"""What is said to be missing when the kernel refuses a program."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from streamer.kernel import loader, obstacles
from streamer.kernel.capabilities import (
    CAP_DAC_READ_SEARCH,
    CAP_NET_ADMIN,
    CAP_SYS_ADMIN,
    CAP_SYS_PTRACE,
)
from streamer.kernel.obstacles import (
    Rights,
    hides_addresses,
    what_is_unnamed,
    why_denied,
    why_no_tracefs,
)

DENIED = OSError(errno.EPERM, "Operation not permitted")
ALL = Rights({CAP_NET_ADMIN, CAP_SYS_ADMIN}, 2, None, "none")
BARE = Rights(set(), 2, None, "none")


@pytest.mark.parametrize("section", ["xdp", "xdp.frags", "tc", "tcx/ingress", "cgroup_skb/egress"])
def test_programs_of_networks(section: str) -> None:
    assert why_denied(section, DENIED, BARE) == "CAP_NET_ADMIN is missing"
    assert why_denied(section, DENIED, ALL) == ""
    with_it = BARE._replace(capabilities={CAP_NET_ADMIN})
    assert why_denied(section, DENIED, with_it) == ""


@pytest.mark.parametrize("section", ["kprobe/do_it", "tracepoint/syscalls/x", "perf_event"])
def test_perf_events_where_debian_keeps_them_from_all_but_administrators(section: str) -> None:
    paranoid = BARE._replace(paranoid=3)
    refused = OSError(errno.EACCES, "Permission denied")
    asked = "kernel.perf_event_paranoid is 3, which asks for CAP_SYS_ADMIN"
    assert why_denied(section, refused, paranoid) == asked
    assert why_denied(section, refused, BARE) == ""
    assert why_denied(section, refused, ALL._replace(paranoid=3)) == ""
    assert why_denied("raw_tp/x", refused, paranoid) == ""


def test_lockdown_and_locked_memory() -> None:
    assert why_denied("", DENIED, ALL._replace(lockdown="integrity")) == ""
    locked = ALL._replace(lockdown="confidentiality")
    said = "the kernel is locked down (lockdown: confidentiality)"
    assert why_denied("raw_tp/x", DENIED, locked) == said
    little = why_denied("", DENIED, ALL._replace(memlock=65536))
    assert "RLIMIT_MEMLOCK, which is 65,536 bytes: before Linux 5.11" in little


LOCKED_DOWN = (
    "not permitted to load BPF programs: the kernel is locked down (lockdown: confidentiality)"
)


@pytest.mark.parametrize(
    ("mode", "error", "said"),
    [
        ("none integrity [confidentiality]", errno.EINVAL, LOCKED_DOWN),
        ("none integrity [confidentiality]", errno.EPERM, LOCKED_DOWN),
        ("none integrity [confidentiality]", errno.ENOMEM, "Cannot allocate memory"),
        ("none [integrity] confidentiality", errno.EINVAL, "Invalid argument"),
        (None, errno.EINVAL, "Invalid argument"),
    ],
)
def test_the_core_in_lockdown(
    mode: str | None, error: int, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There the kernel says of a program that reads its memory that it calls no function."""
    place = tmp_path / "lockdown"
    if mode is not None:
        place.write_text(mode + "\n")
    monkeypatch.setattr(obstacles, "LOCKDOWN", str(place))
    reason = str(loader._core_error(OSError(error, os.strerror(error))))
    assert reason == (said if said == LOCKED_DOWN else f"the BPF object does not load: {said}")


def test_other_errors_say_all_there_is() -> None:
    error = OSError(errno.EINVAL, "Invalid argument")
    assert why_denied("xdp", error, BARE._replace(memlock=0, lockdown="confidentiality")) == ""


def test_tracefs() -> None:
    assert why_no_tracefs(True, errno.EPERM, ()).startswith("tracefs is root's alone: ")
    for mounted, have in ((False, ()), (True, (CAP_DAC_READ_SEARCH,))):
        said = why_no_tracefs(mounted, errno.EPERM, have)
        assert said == "tracefs is not mounted and cannot be: Operation not permitted"


def test_names_of_what_is_sampled() -> None:
    assert "CAP_SYS_PTRACE is missing" in what_is_unnamed("perf_event", ())
    assert what_is_unnamed("perf_event", (CAP_SYS_PTRACE,)) == ""
    assert what_is_unnamed("xdp", ()) == ""


@pytest.mark.parametrize(("address", "hidden"), [("0000000000000000", True), ("ffff1", False)])
def test_addresses_of_the_kernel(tmp_path: Path, address: str, hidden: bool) -> None:
    listed = tmp_path / "kallsyms"
    listed.write_text(f"0000000000000000 A fixed_percpu_data\n{address} T _text\n")
    fd = os.open(listed, os.O_RDONLY)
    try:
        assert hides_addresses(fd) is hidden
    finally:
        os.close(fd)
