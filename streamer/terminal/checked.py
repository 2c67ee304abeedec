"""What `streamer check` prints for people, and its exit code."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Iterator, Mapping

from streamer.kernel.report import Answer, CheckReport, Hook, Setting
from streamer.terminal.lines import printable

DEGRADED = 1
"""Exit code of `check` when a part of what was asked for cannot be observed."""

NOTHING = 3
"""Exit code of `check` when nothing of what was asked for can be observed."""

WIDTH = 80
_COLUMN = 18
_ORDER = ("yes", "no", "unknown")


def check_code(report: CheckReport) -> int:
    """0 when all that was asked for is there in full, 3 when nothing can be observed, else 1."""
    if report.ok:
        return 0
    statuses = {one.status for one in report.kinds.values()}
    return NOTHING if statuses <= {"unavailable"} else DEGRADED


def check_text(report: CheckReport, width: int = WIDTH) -> str:
    """The report for people, what matters most first; no line is longer than `width`, unless by a
    word that is.
    """
    sections = [
        [f"{report.kernel}, streamer {report.agent}", _verdict(report)],
        _section("EVENTS", _events(report), width),
        _section("HOOKS (the best rung that this kernel has is used)", _hooks(report.hooks), width),
        _section("KERNEL", _kernel(report), width),
        _section("PROCESS", _process(report), width),
    ]
    return "\n\n".join("\n".join(lines) for lines in sections if lines)


def _verdict(report: CheckReport) -> str:
    statuses = [one.status for one in report.kinds.values()]
    if report.ok:
        return "all that was asked for is observed in full"
    counts = [
        f"{statuses.count(status)} {status}"
        for status in ("full", "degraded", "unavailable")
        if status in statuses
    ]
    missing = [name for name, one in report.interfaces.items() if one.answer != "yes"]
    if missing:
        counts.append(f"no interface {', '.join(map(printable, missing))}")
    return f"of the events asked for: {', '.join(counts)}"


def _section(title: str, rows: Iterable[tuple[str, str]], width: int) -> list[str]:
    """Rows of a name and what is said of it, under a title."""
    lines = [line for name, text in rows for line in _row(name, text, width)]
    return [title, *lines] if lines else []


def _row(name: str, text: str, width: int) -> list[str]:
    # The column grows for a longer name, and what follows does not stand below it.
    head = f"{printable(name):<{_COLUMN}}"
    head += "" if head.endswith(" ") else "  "
    return textwrap.wrap(
        head + printable(text),
        width,
        subsequent_indent=" " * _COLUMN,
        break_long_words=False,
        break_on_hyphens=False,
        drop_whitespace=True,
    ) or [head.rstrip()]


def _events(report: CheckReport) -> Iterator[tuple[str, str]]:
    told = ""
    for kind, one in report.kinds.items():
        reason = "likewise" if one.reason and one.reason == told else one.reason
        told = one.reason
        yield kind, f"{one.status}: {reason}" if reason else one.status
    for interface, there in report.interfaces.items():
        yield f"interface {interface}", _said(there)
    for note in report.notes:
        yield "note", note
    reasons: dict[str, list[str]] = {}
    for kind, reason in report.not_asked.items():
        reasons.setdefault(reason, []).append(kind)
    for reason, kinds in reasons.items():
        yield "left out", f"{', '.join(kinds)}: {reason}"


def _hooks(hooks: Iterable[Hook]) -> Iterator[tuple[str, str]]:
    lacking: dict[str, dict[str, None]] = {}
    for hook in hooks:
        ways = [rung.way for rung in hook.rungs]
        if hook.used:
            place = f"rung {ways.index(hook.used) + 1} of {len(ways)}: " if len(ways) > 1 else ""
            yield hook.hook, f"{place}{hook.used}"
        else:
            reasons = dict.fromkeys(rung.reason for rung in hook.rungs)
            yield hook.hook, f"not observed: {'; '.join(reasons)}"
        for rung in hook.rungs if hook.used else ():
            if rung.status == "lacking":
                lacking.setdefault(rung.reason, {})[rung.way] = None
    for reason, others in lacking.items():
        yield "lacking here", f"{', '.join(others)}: {reason}"


def _kernel(report: CheckReport) -> Iterator[tuple[str, str]]:
    yield "types", report.types
    yield "transport", report.transport
    for name, answer in report.features.items():
        yield name.replace("_", " "), _said(answer)
    yield from _listed("program types", report.program_types)
    yield from _listed("map types", report.map_types)
    calls = {
        f"{type}:{helper}": answer
        for type, helpers in report.helpers.items()
        for helper, answer in helpers.items()
    }
    yield from _listed("helpers", calls, ":")
    yield from _listed("attach points", report.attach_points, "/")
    for name, setting in report.settings.items():
        if name not in _OF_PROCESS:
            yield from _setting(name, setting)


_OF_PROCESS = ("RLIMIT_MEMLOCK", "seccomp", "user")


def _process(report: CheckReport) -> Iterator[tuple[str, str]]:
    for name, answer in report.capabilities.items():
        yield name, f"{answer.answer}  ({answer.reason})"
    for name in _OF_PROCESS:
        if name in report.settings:
            yield from _setting(name, report.settings[name])


def _setting(name: str, setting: Setting) -> Iterator[tuple[str, str]]:
    yield name, setting.value or f"unknown: {setting.reason}"


def _said(answer: Answer) -> str:
    return f"{answer.answer}: {answer.reason}" if answer.reason else answer.answer


def _listed(
    title: str, answers: Mapping[str, Answer], folds: str = ""
) -> Iterator[tuple[str, str]]:
    """What is there in one row, and in one for each reason what is not.

    With `folds`, of those that are there only how many, and of others that have the same name up
    to that as well, where they are all that do.
    """
    groups: dict[tuple[str, str], list[str]] = {}
    for name, one in answers.items():
        reason = one.reason if one.answer != "yes" else ""
        groups.setdefault((one.answer, reason), []).append(name)
    for (answer, reason), names in sorted(groups.items(), key=lambda it: _ORDER.index(it[0][0])):
        if answer == "yes" and folds:
            yield title, f"yes: {len(names)} of {len(answers)}"
        else:
            listed = _folded(names, answers, folds) if folds else names
            yield title, f"{answer}: {', '.join(listed)}" + (f": {reason}" if reason else "")
        title = ""


def _folded(names: Iterable[str], of: Iterable[str], at: str) -> Iterator[str]:
    """Those that are all with the same beginning as `all N of BEGINNING`."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(name.partition(at)[0], []).append(name)
    for beginning, some in groups.items():
        count = sum(name.partition(at)[0] == beginning for name in of)
        if len(some) == count > 1:
            yield f"all {count} of {beginning}"
        else:
            yield from some
