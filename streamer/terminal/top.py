"""`streamer top`: a running agent, live, on a terminal. Drawn by Textual."""

from __future__ import annotations

import asyncio
from collections import defaultdict, deque
from collections.abc import Callable, Iterable
from typing import ClassVar

from rich.text import Text
from textual.app import App, ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Horizontal, Vertical
from textual.renderables.sparkline import Sparkline as Line
from textual.widgets import DataTable, Footer, Label, Sparkline, Static

from streamer.errors import NoAnswer
from streamer.operation.look import Activity, Look, TopLook
from streamer.terminal.containers import Containers
from streamer.terminal.lines import duration, printable, rate, size
from streamer.terminal.status import shedding_text

HISTORY = 60
"""Seconds that a sparkline shows."""
MOST_ROWS = 50
_EVERY_SECONDS = 1.0
_LINE_WIDTH = 20
_CURVES = {
    "read": "events a second",
    "lost": "lost a second",
    "ring": "fullest ring",
    "lag": "largest sink lag",
}


class Series:
    """What some things were a second, for as long as a line shows."""

    def __init__(self) -> None:
        self._values: dict[str, deque[float]] = defaultdict(
            lambda: deque([0.0] * HISTORY, maxlen=HISTORY)
        )

    def add(self, values: dict[str, float]) -> None:
        """One value of each; those that are not among them have none. The idle are forgotten."""
        for name in {*self._values, *values}:
            self._values[name].append(values.get(name, 0.0))
        for name in [name for name, line in self._values.items() if not any(line)]:
            del self._values[name]

    def of(self, name: str) -> list[float]:
        """The values, the newest last."""
        return list(self._values.get(name, ()))


class Top(App[None]):
    """The screen."""

    TITLE = "streamer top"
    CSS = """
    #head { height: auto; padding: 0 1; }
    #curves { height: 4; }
    #curves Vertical { padding: 0 1; }
    #curves Sparkline { height: 2; }
    DataTable { height: 1fr; }
    #sinks { height: auto; max-height: 8; padding: 0 1; }
    """
    BINDINGS: ClassVar[list[BindingType]] = [
        ("q", "quit", "Quit"),
        ("p", "pause", "Pause"),
        Binding("ctrl+c", "quit", show=False),
    ]

    def __init__(
        self,
        ask: Callable[[], TopLook],
        containers: Containers,
        every_seconds: float = _EVERY_SECONDS,
    ) -> None:
        """`ask` asks the agent, and may wait; it raises NoAnswer."""
        super().__init__()
        self._ask = ask
        self._containers = containers
        self._every = every_seconds
        self._kinds, self._processes, self._cgroups = Series(), Series(), Series()
        self._curves = {name: deque([0.0] * HISTORY, maxlen=HISTORY) for name in _CURVES}
        self._number = self._lost = -1
        self._paused = False
        self.looks = 0
        """Windows that were shown."""

    def compose(self) -> ComposeResult:
        """See `App`."""
        yield Static(id="head")
        with Horizontal(id="curves"):
            for name, text in _CURVES.items():
                with Vertical():
                    yield Label(text, id=f"label-{name}")
                    yield Sparkline(list(self._curves[name]), id=f"curve-{name}")
        for name, first in (("kinds", "kind"), ("processes", "process"), ("cgroups", "container")):
            made: DataTable[object] = DataTable(id=name, cursor_type="none", zebra_stripes=True)
            made.add_column(first, width=48)
            made.add_column("a second", width=10)
            made.add_column("the last minute", width=_LINE_WIDTH)
            made.add_column("lost", width=10)
            yield made
        yield Static(id="sinks")
        yield Footer()

    def on_mount(self) -> None:
        """See `App`."""
        self.run_worker(self._follow(), exclusive=True)

    def action_pause(self) -> None:
        """Leave on the screen what is there, or go on."""
        self._paused = not self._paused

    async def _follow(self) -> None:
        while True:
            try:
                found = await asyncio.to_thread(self._ask)
            except NoAnswer as error:
                self.query_one("#head", Static).update(Text(printable(str(error)), style="red"))
            else:
                self._take(found)
            await asyncio.sleep(self._every)

    def _take(self, found: TopLook) -> None:
        activity = found.activity
        if self._paused or activity.number == self._number or not activity.number:
            return
        self._number = activity.number
        self._show_head(found.look)
        self._show_curves(found.look, activity)
        seconds = activity.seconds or 1.0
        # Where not all were looked at, those stand for the rest.
        share = activity.read / activity.looked_at if activity.looked_at else 1.0
        lost = {k: one.lost for k, one in found.look.counts.items()}
        self._show("kinds", self._kinds, {k: n / seconds for k, n in activity.kinds.items()}, lost)
        processes = {
            f"{one.pid:>7} {one.comm}": one.events * share / seconds for one in activity.processes
        }
        self._show("processes", self._processes, processes)
        named: dict[str, float] = defaultdict(float)
        for cgroup, count in activity.cgroups.items():
            named[self._containers.name(int(cgroup))] += count * share / seconds
        self._show("cgroups", self._cgroups, named)
        self.query_one("#sinks", Static).update(Text("\n".join(_sinks(found.look))))
        self.looks += 1

    def _show_head(self, look: Look) -> None:
        up = duration(round(look.uptime_seconds * 1e9))
        text = f"{look.host}: {look.phase}, up {up}, pid {look.pid}"
        style = "red" if look.not_ready else "green"
        said = "; ".join(look.not_ready) or "ready"
        head = Text.assemble(printable(text), "  ", (printable(said), style))
        if look.shedding.level:
            head.append(f"\n{printable(shedding_text(look.shedding))}", "yellow")
        self.query_one("#head", Static).update(head)

    def _show_curves(self, look: Look, activity: Activity) -> None:
        lost = sum(one.count for one in look.losses)
        since = max(lost - self._lost, 0) if self._lost >= 0 else 0
        self._lost = lost
        fills = [one.used_bytes / one.size_bytes for one in look.rings.values() if one.size_bytes]
        fill, lag = max(fills, default=0.0), max(s.lag_seconds for s in look.sinks.values())
        seconds = activity.seconds or 1.0
        said = {
            "read": (activity.read / seconds, rate(activity.read / seconds)),
            "lost": (since / seconds, f"{rate(since / seconds)}, {lost:,} in all"),
            "ring": (fill, f"{fill:.0%}"),
            "lag": (lag, duration(round(lag * 1e9))),
        }
        for name, (value, text) in said.items():
            self._curves[name].append(value)
            self.query_one(f"#curve-{name}", Sparkline).data = list(self._curves[name])
            self.query_one(f"#label-{name}", Label).update(f"{_CURVES[name]}: {text}")

    def _show(
        self,
        where: str,
        series: Series,
        rates: dict[str, float],
        lost: dict[str, int] | None = None,
    ) -> None:
        series.add(rates)
        shown: DataTable[object] = self.query_one(f"#{where}", DataTable)
        shown.clear()
        for name in _busiest(rates)[:MOST_ROWS]:
            line = Line(series.of(name), width=_LINE_WIDTH)
            count = f"{lost[name]:,}" if lost and lost.get(name) else ""
            shown.add_row(Text(printable(name)), rate(rates[name]), line, Text(count, style="red"))


def _busiest(rates: dict[str, float]) -> list[str]:
    return sorted(rates, key=lambda name: (-rates[name], name))


def _sinks(look: Look) -> Iterable[str]:
    for name, one in look.sinks.items():
        held = one.held_bytes / one.budget_bytes
        disk = f"{one.spooled:,} on disk, " if one.spooled else ""
        yield printable(
            f"{name} is {one.status}: {sum(one.delivered.values()):,} delivered, "
            f"{sum(one.dropped.values()):,} dropped, {held:.0%} of {size(one.budget_bytes)} held, "
            f"{disk}lag {duration(round(one.lag_seconds * 1e9))}"
        )
