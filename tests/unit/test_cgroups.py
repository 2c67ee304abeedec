"""Where the ids of cgroups say nothing, that is said."""

from __future__ import annotations

import pytest

from streamer.kernel.cgroups import IN_ROOT, cgroup_root, what_is_unseen

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


OTHER = "22 1 0:20 / /proc rw - proc proc rw\n"
HOSTS_ALL = "35 24 0:30 / /sys/fs/cgroup rw shared:9 - cgroup2 cgroup2 rw\n"
BY_SIDE = "36 24 0:30 / /sys/fs/my\\040cgroups rw - cgroup2 cgroup2 rw\n"
OF_A_POD = "40 24 0:30 / /sys/fs/cgroup ro - cgroup2 cgroup rw\n"
ALL_IN_A_POD = "41 24 0:30 /../../.. /host/cgroup ro - cgroup2 cgroup2 rw\n"
PART = "42 24 0:30 /kubepods /host/part ro - cgroup2 cgroup2 rw\n"
INITIAL, POD = 0xEFFFFFFB, 4026532801


@pytest.mark.parametrize(
    ("mounts", "namespace", "place"),
    [
        (OTHER + HOSTS_ALL, INITIAL, "/sys/fs/cgroup"),
        (OTHER + BY_SIDE, INITIAL, "/sys/fs/my cgroups"),
        (OTHER + PART + HOSTS_ALL, INITIAL, "/sys/fs/cgroup"),
        (OTHER, INITIAL, ""),
        (OTHER + OF_A_POD, POD, ""),
        (OTHER + OF_A_POD + ALL_IN_A_POD, POD, "/host/cgroup"),
    ],
)
def test_where_all_cgroups_are(mounts: str, namespace: int, place: str) -> None:
    """A container that is shown its own part only has none: it would miss all others in silence."""
    assert cgroup_root(mounts, namespace) == place
