"""Finds out what this kernel offers by really loading and attaching, then detaching."""

from __future__ import annotations

import os
from typing import Literal

from streamer.config.settings import Settings
from streamer.errors import StreamerError
from streamer.kernel import capabilities, cgroups, loader, state
from streamer.kernel.report import CheckReport
from streamer.kernel.state import KindStatus, ProgramStatus
from streamer.privilege.split import with_helper


def report(settings: Settings, kinds: frozenset[str]) -> CheckReport:
    """Load and attach for `kinds`, detach again, and say what became of each. Never raises.

    Through a privileged helper, as `run` does: that it has fewer rights can make a difference.
    """
    programs: list[ProgramStatus] = []
    had_tracefs = loader.has_tracefs()
    reason, no_functions = "", "not tried"
    rings = "not tried"
    try:
        kernel = _loaded(settings, kinds)
    except StreamerError as error:
        reason = str(error)
        found = {kind: KindStatus("missing", reason) for kind in sorted(kinds)}
    else:
        no_functions = kernel.no_functions
        rings = _transport(kernel.transport)
        try:
            kernel.attach()
            programs, found = kernel.statuses, kernel.coverage(kinds)
        finally:
            kernel.close()
    uname = os.uname()
    return CheckReport(
        kernel=f"{uname.sysname} {uname.release} {uname.machine}",
        ok=all(one.status == "full" for one in found.values()),
        capabilities=capabilities.held(),
        features={
            **_features(settings, reason, no_functions, had_tracefs),
            "transport": rings,
        },
        programs=programs,
        kinds=found,
    )


def _loaded(settings: Settings, kinds: frozenset[str]) -> state.KernelState:
    capabilities.require()
    loader = with_helper(settings).loader
    try:
        return state.load(settings, kinds, loader)
    except BaseException:
        loader.close()
        raise


def _features(
    settings: Settings, reason: str, no_functions: str, had_tracefs: bool
) -> dict[str, str]:
    tracefs = loader.ensure_tracefs() if not reason else ""
    if not tracefs and not had_tracefs and loader.has_tracefs():
        tracefs = "yes: it was not mounted before this check, and is now"
    return {
        "btf": settings.btf or _yes(os.path.exists(loader.KERNEL_BTF)),
        "load": reason or "yes",
        "fentry": no_functions or "yes",
        "tracefs": tracefs or "yes",
        "cgroup ids": cgroups.what_is_unseen() or "yes",
        "decoder": _decoder(),
    }


def _transport(used: loader.Transport) -> str:
    said = "ring buffers" if used.name == "ring" else "perf buffers"
    return f"{said}: {used.reason}" if used.reason else said


def _yes(there: bool) -> Literal["yes", "no"]:
    return "yes" if there else "no"


def _decoder() -> str:
    from streamer.ring.records import COMPILED

    return "compiled" if COMPILED else "pure Python: slower, no compiler was there at the install"
