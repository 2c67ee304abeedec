"""What the configuration names, and which kinds are observed there."""

from __future__ import annotations

import pytest

from streamer.config.settings import Kernel
from streamer.kernel.targets import in_vain

INTERFACES = "interfaces are named, and none of the events asked for is observed at interfaces"
CALLS = "system calls are named, and none of the events asked for is about system calls"


@pytest.mark.parametrize(
    ("kernel", "kinds", "said"),
    [
        (Kernel(), {"process.exec"}, []),
        (Kernel(interfaces=("lo",)), {"process.exec", "xdp.counters"}, []),
        (Kernel(interfaces=("lo",)), {"process.exec"}, [INTERFACES]),
        (Kernel(syscalls=("read",)), {"syscall.slow"}, []),
        (Kernel(syscalls=("read",)), {"xdp.counters"}, [CALLS]),
        (Kernel(interfaces=("lo",), syscalls=("read",)), {"file.open"}, [INTERFACES, CALLS]),
    ],
)
def test_what_is_named_in_vain_is_said(kernel: Kernel, kinds: set[str], said: list[str]) -> None:
    assert list(in_vain(kernel, kinds)) == said
