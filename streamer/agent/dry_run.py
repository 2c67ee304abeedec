"""What a run would do, without doing it: where it would attach, publish, and what keep back."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator

from streamer.agent.check import loaded
from streamer.agent.reports import filters_in_force
from streamer.config.cleartext import cleartext_passwords
from streamer.config.rules import host_problems
from streamer.config.settings import FileSink, Settings, with_budgets
from streamer.errors import ConfigError, KernelError, SinkError
from streamer.events.envelope import host_name
from streamer.kernel.loader import ATTACHED
from streamer.kernel.state import KernelState, KindStatus
from streamer.kernel.targets import in_vain
from streamer.privilege.drop import account_of, can_change_user
from streamer.privilege.named import exposed_secrets
from streamer.sinks.credentials import check_credentials
from streamer.terminal.checked import DEGRADED
from streamer.terminal.lines import printable, size
from streamer.terminal.tables import table


def dry_run(settings: Settings, kinds: frozenset[str]) -> tuple[str, int]:
    """What `streamer run` would do, for people, and an exit code as `streamer check` has it.

    Everything is loaded and attached as a run does it, and detached at once. Nothing is read,
    nothing is published, no broker is asked, no file is made.

    Raises:
        StreamerError: what would keep the run from starting.
    """
    sinks = list(_sinks(settings))  # before anything is loaded
    if can_change_user():
        account_of(settings.user)
    kernel = loaded(settings, kinds)
    try:
        kernel.attach()
        found = kernel.coverage(kinds)
        lines = list(_observed(kernel, found))
    finally:
        kernel.close()
    if all(one.status == "missing" for one in found.values()):
        raise KernelError("none of the events asked for can be observed on this kernel")
    notes = [
        *in_vain(settings.kernel, kinds),
        *exposed_secrets(settings),
        *cleartext_passwords(settings),
        *_unusable(settings),
    ]
    sections = ["\n".join(lines), *sinks, *_settings(settings), *(f"note: {one}" for one in notes)]
    full = all(one.status == "full" for one in found.values())
    return "\n".join([sections[0], "", *map(printable, sections[1:])]), 0 if full else DEGRADED


def _observed(kernel: KernelState, found: dict[str, KindStatus]) -> Iterator[str]:
    ways: dict[str, dict[str, None]] = {kind: {} for kind in sorted(found)}
    for program in kernel.statuses:
        for kind in program.kinds if program.status == ATTACHED else ():
            if kind in ways:
                ways[kind][program.way] = None
    rows = [
        [kind, found[kind].status, printable(", ".join(ways[kind]) or found[kind].reason)]
        for kind in ways
    ]
    yield table(["kind", "observed", "would be attached to"], rows)
    for kind, one in found.items():
        if one.reason:
            yield printable(f"{kind} is {one.status}: {one.reason}")


def _sinks(settings: Settings) -> Iterator[str]:
    for problem in host_problems(settings, host_name(settings.host)):
        raise ConfigError(problem)
    names: list[str] = []
    for one in with_budgets(settings.sinks):
        if one.name in names:
            raise ConfigError(f"sinks: found the same one twice among {one.name}")
        names.append(one.name)
        more = ""
        if isinstance(one, FileSink) and not os.path.exists(one.path):
            if not os.path.isdir(os.path.dirname(one.path) or "."):
                raise SinkError(f"{one.name}: cannot open: {os.strerror(errno.ENOENT)}")
            more = ", a file that would be made"
        yield f"would be published to {one.name} ({size(one.budget)} at most held for it{more})"


def _unusable(settings: Settings) -> Iterator[str]:
    """Certificates and secrets that cannot be used, each in a sentence.

    That is no mistake here: a service manager shows some to the service alone.
    """
    for one in settings.sinks:
        try:
            check_credentials(one)
        except ConfigError as error:
            yield f"{one.name}: {error}: a run that finds the same does not start"


def _settings(settings: Settings) -> Iterator[str]:
    for name, values in filters_in_force(settings.filters).items():
        yield f"filter {name}: {', '.join(values)}"
    for kind, one_in in settings.kernel.sample.items():
        yield f"of {kind} one in {one_in:,}"
    for kind, rates in sorted(settings.shedding.rates_in_force.items()):
        yield f"under pressure of {kind} one in {', '.join(f'{one:,}' for one in rates)}"
    if can_change_user():
        yield f"the process that publishes would become {settings.user}"
    if settings.metrics.listen:
        yield f"metrics would be at http://{settings.metrics.listen}/metrics"
