"""Linux audit, taken for a benchmark and put back as it was.

Once audit has been enabled, the kernel prepares every new task for it until the next boot, and a
task so prepared takes the slow way into each system call, even when audit is disabled again. A
rule that exempts tasks when they are forked (`task,never`) avoids that: here all users are exempt
but the one of the load, and this one too unless auditd is what is measured.
"""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

_EXEMPT = "-a task,never"
_LISTED = "-a never,task"  # the same rule as auditctl lists it
_BACKLOG = 8192  # as in Debian's /etc/audit/rules.d/audit.rules
_CALLS = ("execve", "execveat", "openat", "openat2", "connect", "accept", "accept4")


class UnavailableError(Exception):
    """Something to compare with cannot run here; the message is the reason."""


def auditctl(*arguments: str) -> str:
    """What the command prints.

    Raises:
        UnavailableError: it is not there, or the kernel refuses.
    """
    try:
        done = subprocess.run(["auditctl", *arguments], capture_output=True, text=True)
    except FileNotFoundError:
        raise UnavailableError("auditd is not installed") from None
    if done.returncode != 0:
        reason = (done.stderr or done.stdout).strip().splitlines()
        raise UnavailableError(reason[0] if reason else "auditctl failed")
    return done.stdout


def parsed(status: str) -> dict[str, int]:
    """The numbers that `auditctl -s` tells."""
    words = (line.split() for line in status.splitlines())
    return {pair[0]: int(pair[1]) for pair in words if len(pair) == 2 and pair[1].isdecimal()}


def used_by_host(status: dict[str, int], rules: list[str]) -> str:
    """Why audit cannot be taken: it is the host's own. Empty if it can."""
    if status.get("pid"):
        return "the host's own auditd is running"
    if status.get("enabled") == 2:
        return "the host's audit rules are locked"
    if set(rules) - {_LISTED, "No rules"}:
        return "the host has audit rules of its own (auditctl -l)"
    return ""


class Audit:
    """The kernel's audit, in which the user `uid` is exempt unless it is observed."""

    def __init__(self, uid: int) -> None:
        self._others = f"{_EXEMPT} -F uid!={uid}"
        self._user = f"{_EXEMPT} -F uid={uid}"
        self._rule = ["-a", "always,exit", "-F", "arch=b64", "-F", f"uid={uid}"]
        for call in _CALLS:
            self._rule += ["-S", call]
        self._enabled = 0

    @contextmanager
    def taken(self) -> Iterator[None]:
        """While it is ours.

        Raises:
            UnavailableError: there is none, or the host uses it.
        """
        status = parsed(auditctl("-s"))
        rules = auditctl("-l").splitlines()
        if reason := used_by_host(status, rules):
            raise UnavailableError(reason)
        self._enabled = status["enabled"]
        for exempt in (self._others, self._user):
            auditctl(*exempt.split())
        if _LISTED in rules:
            auditctl(*deleted(_EXEMPT.split()))
        auditctl("-b", str(_BACKLOG))
        try:
            yield
        finally:
            auditctl("-b", str(status["backlog_limit"]))
            # Where audit was off, whatever starts after this is spared what it would cost.
            if not self._enabled or _LISTED in rules:
                auditctl(*_EXEMPT.split())
            for exempt in (self._others, self._user):
                auditctl(*deleted(exempt.split()))

    @contextmanager
    def observing(self) -> Iterator[None]:
        """While the user's calls are recorded, for an auditd that runs already."""
        auditctl(*deleted(self._user.split()))
        auditctl(*self._rule)
        try:
            yield
        finally:
            # Before auditd ends: the kernel would print what nobody takes.
            auditctl(*deleted(self._rule))
            auditctl(*self._user.split())
            auditctl("-e", str(self._enabled))


def deleted(rule: list[str]) -> list[str]:
    """The arguments that take a rule away, from those that add it."""
    return ["-d", *rule[1:]]
