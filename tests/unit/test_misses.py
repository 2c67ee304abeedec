"""Which of the runs that the kernel left out are missed."""

from __future__ import annotations

import pytest

from streamer.kernel import misses
from streamer.kernel.loader import Attached, ProgramState


def sensor(**places: tuple[str, str, int]) -> Attached:
    """Programs: where each is, what became of it, and its descriptor."""
    states = [ProgramState(name, "", way, status) for name, (way, status, _) in places.items()]
    return Attached(states, {name: fd for name, (_, _, fd) in places.items()})


def test_a_program_with_a_twin_misses_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """What interrupts one of them is handled by the other; one that is only loaded is none."""
    counted = {3: 5, 4: 7, 5: 2, 6: 0, 7: 1}
    monkeypatch.setattr(misses, "_recursion_misses", counted.__getitem__)
    net = sensor(first=("tp_btf/x", "attached", 3), second=("tp_btf/x", "attached", 4))
    file = sensor(lone=("fexit/y", "attached", 5), calm=("fexit/z", "attached", 6))
    again = sensor(other=("tp_btf/x", "attached", 7), spare=("tp_btf/x", "spare", 3))
    assert misses.missed_runs([net, file, again]) == {"lone": 2, "other": 1}


def test_what_is_no_program_has_missed_nothing() -> None:
    with open("/proc/self/stat") as file:
        assert misses.missed_runs([sensor(one=("x", "attached", file.fileno()))]) == {}
