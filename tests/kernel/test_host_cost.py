"""The benchmark of what a host pays, with few operations: it finds a cost where there is one."""

from __future__ import annotations

import os

import pytest

from benchmarks.host import OPERATIONS, Bench, build_load
from benchmarks.observers import Streamer
from tests.conftest import Require
from tests.kernel.scope import cgroup_mount

pytestmark = pytest.mark.kernel


def test_a_turn_of_the_streamer(require: Require) -> None:
    """That all was recorded, no more and no less, is checked by the turn itself."""
    require(cgroup_mount() is not None, "no cgroup v2 hierarchy is mounted")
    build_load()
    with Bench(max(os.sched_getaffinity(0)), 0.02, (Streamer,)) as bench:
        pair = bench.pair(Streamer)
        directory = bench.directory
    assert pair is not None
    for operation in OPERATIONS:
        alone, observed = (turn.samples[operation.name] for turn in pair)
        assert min(alone.caller, observed.caller, observed.observer) > 0
        assert alone.observer == 0
    assert all(turn.unrelated_ns > 0 for turn in pair)
    assert not directory.exists()
