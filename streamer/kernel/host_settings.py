"""Settings of the kernel and of this process that bear upon BPF, as they can be read."""

from __future__ import annotations

import ctypes
import os
import re
import resource
from collections.abc import Iterator
from pathlib import Path

from streamer.kernel.obstacles import LOCKDOWN, lockdown
from streamer.kernel.report import Setting

_SYSCTLS = (
    "kernel.unprivileged_bpf_disabled",
    "kernel.perf_event_paranoid",
    "kernel.kptr_restrict",
    "net.core.bpf_jit_enable",
    "net.core.bpf_jit_harden",
)
_SECCOMP = {"0": "none", "1": "strict", "2": "filter"}


def host_settings(*, apart: bool) -> dict[str, Setting]:
    """Each by its name. `apart`: this process has mounts of its own, and may add to them."""
    return dict(_settings(apart))


def _settings(apart: bool) -> Iterator[tuple[str, Setting]]:
    yield "lockdown", _lockdown(apart)
    for name in _SYSCTLS:
        yield name, _read(Path("/proc/sys", *name.split(".")))
    yield "RLIMIT_MEMLOCK", Setting(_memlock())
    yield "seccomp", Setting(_seccomp(Path("/proc/self/status").read_text()))
    yield "user", Setting(str(os.geteuid()))


def _lockdown(apart: bool) -> Setting:
    if apart and not os.path.exists(LOCKDOWN):
        # Where this fails, reading says so.
        place = os.fsencode(os.path.dirname(LOCKDOWN))
        ctypes.CDLL(None).mount(b"securityfs", place, b"securityfs", ctypes.c_ulong(0), None)
    try:
        return Setting(lockdown())
    except OSError as error:
        return Setting("", f"{LOCKDOWN}: {error.strerror}")


def _read(path: Path) -> Setting:
    try:
        return Setting(path.read_text().strip())
    except OSError as error:
        return Setting("", f"{path}: {error.strerror}")


def _memlock() -> str:
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    return "unlimited" if soft == resource.RLIM_INFINITY else f"{soft >> 10} KiB"


def _seccomp(status: str) -> str:
    mode = re.search(r"^Seccomp:\s*(\d)", status, re.MULTILINE)
    return _SECCOMP.get(mode[1], mode[1]) if mode else "none"
