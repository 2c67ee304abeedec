"""How far a kind is observed, given what became of the programs."""

from __future__ import annotations

from collections.abc import Callable

from streamer.kernel.objects import SENSORS
from streamer.kernel.state import KindStatus, ProgramStatus, coverage
from streamer.kernel.tags import ProgramInfo

RINGS = {"critical": 1 << 20, "bulk": 1 << 20}


def opens(attached: Callable[[ProgramInfo], bool]) -> KindStatus:
    """The coverage of `file.open` if only those programs are attached."""
    statuses = [
        ProgramStatus(
            name=one.name,
            sensor="file",
            hook=one.hook,
            way="",
            kinds=one.kinds,
            status="attached" if attached(one) else "failed",
            reason="" if attached(one) else f"no {one.name}",
        )
        for one in SENSORS["file"].programs
    ]
    return coverage(statuses, {"file.open"}, RINGS)["file.open"]


def test_one_way_to_each_hook_is_enough() -> None:
    for end in ("exit", "enter"):
        last = {one.hook for one in SENSORS["file"].programs if one.name.endswith(end)}
        assert last
    status = opens(lambda one: one.name.endswith(("exit", "enter")))
    assert status == KindStatus("full")


def test_what_only_completes_a_kind() -> None:
    """Without it the kind is observed in part; with it alone, not at all."""
    status = opens(lambda one: one.reports)
    assert status.status == "partial"
    assert "no on_openat_enter, so latencies of openat() are not observed" in status.reason
    assert opens(lambda one: not one.reports).status == "missing"


def test_one_hook_of_several() -> None:
    status = opens(lambda one: one.hook != "openat2")
    assert status == KindStatus(
        "partial", "no on_openat2_exit, so opens by openat2() are not observed"
    )
