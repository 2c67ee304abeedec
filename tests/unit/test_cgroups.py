"""Where the ids of cgroups say nothing, that is said."""

from __future__ import annotations

import pytest

from streamer.kernel.cgroups import IN_ROOT, what_is_unseen

V1 = "12:memory:/user.slice\n11:cpu,cpuacct:/\n1:name=systemd:/user.slice\n"

HOSTS = {
    "version 2": ("0::/user.slice/user-0.slice/session-1.scope\n", ""),
    "version 2, in its root": ("0::/\n", ""),
    "version 2, and systemd's own": ("1:name=systemd:/\n0::/\n", ""),
    "version 1 alone": (V1, IN_ROOT),
    "version 1, and 2 unused": (V1 + "0::/\n", IN_ROOT),
    "both": (V1 + "0::/user.slice/a:b\n", ""),
}


@pytest.mark.parametrize(("text", "unseen"), HOSTS.values(), ids=HOSTS)
def test_whether_cgroup_ids_say_anything(text: str, unseen: str) -> None:
    assert what_is_unseen(text) == unseen
