"""Reads the configuration anew when asked to, and has a running service go by it, or not at all.

All that can fail is done first, beside what is in force: the file is read and checked, filters are
written into the generation that no program uses, programs are loaded and attached whose kinds are
off, new sinks are started. Then `Service.adopt` takes it over in one go.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

from streamer.agent.reload import Plan, Running, Wanted, plan
from streamer.agent.service import Change, Service
from streamer.config.cleartext import cleartext_passwords
from streamer.config.settings import AnySink, Settings, with_budgets
from streamer.errors import ConfigError, HelperGone, KernelError, SinkError, StreamerError
from streamer.kernel.loader import Attached, Loaded
from streamer.operation.notify import Notifier
from streamer.privilege.files import Opener
from streamer.privilege.named import check_distinct, resolved
from streamer.privilege.split import Split
from streamer.sinks.base import Sink

_log = logging.getLogger("streamer")

_LOOK_SECONDS = 0.05

Sensors = dict[str, tuple[Loaded, Attached] | KernelError]


class Reread(NamedTuple):
    """A configuration file that can be read again: `read` opens it by an opener."""

    path: str
    read: Callable[[Opener], tuple[Settings, frozenset[str]]]
    """The settings and kinds that it comes to now, with the command line laid over it.

    Raises ConfigError, HelperGone."""


class Reloader:
    """Has a service reload, once at a time."""

    def __init__(
        self,
        service: Service,
        split: Split,
        reread: Reread,
        make: Callable[[AnySink, Settings], Sink],
        notifier: Notifier | None = None,
    ) -> None:
        """`make` makes a sink of its settings, of those given. Raises ConfigError."""
        self._service = service
        self._split = split
        self._reread = reread
        self._make = make
        self._notifier = notifier
        self._asked = False

    def ask(self) -> None:
        """Read the configuration anew: soon, and again after that if it is being read already."""
        self._asked = True
        if self._service.changing is None and self._service.phase != "stopping":
            task = asyncio.ensure_future(self._reload())
            self._service.changing = task
            task.add_done_callback(self._over)

    def _over(self, task: asyncio.Task[None]) -> None:
        self._service.changing = None
        if not task.cancelled() and (error := task.exception()) is not None:
            _log.error("the configuration stays as it was: a defect", exc_info=error)

    async def _reload(self) -> None:
        while self._asked:
            while self._service.phase == "starting":  # noqa: ASYNC110 - for a moment
                await asyncio.sleep(_LOOK_SECONDS)
            self._asked = False
            with self._announced():
                try:
                    await self._once()
                except StreamerError as error:
                    _log.error("the configuration stays as it was: %s", error)

    @contextlib.contextmanager
    def _announced(self) -> Iterator[None]:
        if self._notifier is not None:
            self._notifier.reloading()
        try:
            yield
        finally:
            if self._notifier is not None and self._service.phase == "streaming":
                self._notifier.ready()

    @contextlib.contextmanager
    def _named(self) -> Iterator[None]:
        """Of a file that is not there: say which configuration asks for it."""
        try:
            yield
        except ConfigError as error:
            raise ConfigError(f"{self._reread.path}: {error}") from None

    async def _once(self) -> None:
        service, kernel = self._service, self._service.kernel
        await service.see_off_all()  # what one left is taken up by the next, one after the other
        settings, kinds = await asyncio.to_thread(self._reread.read, self._split.opener)
        found = self._planned(settings, kinds)
        with self._named():
            filters = found.filters or kernel.files_have_changed(settings.filters)
        if not found.changes and not filters:
            _log.info("%s says what it said before: nothing has changed", self._reread.path)
            return
        changes = found.changes or ("filters: executables",)
        for said in cleartext_passwords(settings):
            _log.warning("%s", said)
        sensors: Sensors = {}
        sinks: list[Sink] = []
        try:
            sinks = self._sinks(settings, found)
            with self._loading():
                if filters:
                    with self._named():
                        await asyncio.to_thread(kernel.prepare_filters, settings.filters)
                for sensor in found.load:
                    sensors[sensor] = await self._load(sensor, kinds)
            await self._start(sinks)
        except asyncio.CancelledError:  # the run ends, and with it what was loaded
            await self._drop(sinks)
            raise
        except BaseException:
            await self._drop(sinks)
            await self._unload(sensors)
            raise
        change = Change(settings, kinds, sinks, changes, filters, sensors, found.unload)
        service.adopt(change)
        _log.info("%s was read anew: %s", self._reread.path, "; ".join(changes))
        with self._loading():
            for sensor in found.unload:
                await asyncio.to_thread(kernel.let_go, sensor)

    @contextlib.contextmanager
    def _loading(self) -> Iterator[None]:
        self._service.loading = True
        try:
            yield
        finally:
            self._service.loading = False

    def _planned(self, settings: Settings, kinds: frozenset[str]) -> Plan:
        """Raises ConfigError: with all that forbids it."""
        service, split = self._service, self._split
        running = Running(
            service.settings,
            service.kinds,
            service.kernel.loaded_for,
            split.targets,
            frozenset(split.files),
            not service.kernel.no_functions,
        )
        found = plan(running, Wanted(settings, kinds, split.directory))
        if not isinstance(found, Plan):
            said = "; ".join(map(str, found))
            raise ConfigError(f"{self._reread.path}: not while the agent runs: {said}")
        try:
            check_distinct(tuple(resolved(one, split.directory) for one in settings.sinks))
        except ConfigError as error:
            raise ConfigError(f"{self._reread.path}: {error}") from None
        return found

    def _sinks(self, settings: Settings, found: Plan) -> list[Sink]:
        """Those that stay, and new ones, not started. Raises ConfigError."""
        old = self._service.fanout.sinks
        chosen = with_budgets(settings.sinks)
        if all(i is not None and not self._service.fanout.is_open(old[i]) for i in found.kept):
            raise ConfigError(f"{self._reread.path}: no sink would be left that is open")
        return [
            self._made(one, settings) if index is None else old[index]
            for one, index in zip(chosen, found.kept, strict=True)
        ]

    def _made(self, chosen: AnySink, settings: Settings) -> Sink:
        try:
            return self._make(chosen, settings)
        except ImportError as error:
            reason = f"its code cannot be read as {settings.user}: {error}"
            raise ConfigError(f"{chosen.name}: {reason}") from None

    async def _load(
        self, sensor: str, kinds: frozenset[str]
    ) -> tuple[Loaded, Attached] | KernelError:
        """A sensor that cannot be loaded is one whose kinds are missing, as at the start."""
        kernel = self._service.kernel
        try:
            loaded = await asyncio.to_thread(kernel.fetch, sensor, kinds)
        except HelperGone:
            raise
        except KernelError as error:
            return error
        return loaded, await asyncio.to_thread(kernel.fetch_attached, sensor)

    async def _start(self, sinks: list[Sink]) -> None:
        """Start those that follow no other one; those that do wait for it. Raises ConfigError."""
        fanout = self._service.fanout
        before = {sink.name for sink in (*fanout.sinks, *fanout.leaving)}
        for sink in sinks:
            if sink not in fanout.sinks and sink.name not in before:
                try:
                    await sink.start()
                except (ConfigError, SinkError) as error:
                    raise ConfigError(f"{sink.name}: {error}") from None

    async def _drop(self, sinks: list[Sink]) -> None:
        for sink in sinks:
            if sink not in self._service.fanout.sinks:
                await sink.stop(0)

    async def _unload(self, sensors: Mapping[str, object]) -> None:
        for sensor, outcome in sensors.items():
            if not isinstance(outcome, KernelError):
                with contextlib.suppress(KernelError, OSError):
                    await asyncio.to_thread(self._service.kernel.let_go, sensor)
