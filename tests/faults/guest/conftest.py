"""Faults of the whole machine, which happen in virtual ones alone: see tests/faults/test_guests.py.

tools/kernels.sh run bookworm -- env STREAMER_TEST_SLOWNESS=10 \\
    .venv/bin/python -m pytest tests/faults/guest
"""

from __future__ import annotations

from tests.kernel.system import IN_GUEST

collect_ignore_glob = [] if IN_GUEST else ["test_*.py"]
