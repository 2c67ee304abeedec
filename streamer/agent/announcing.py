"""Tells the service manager how a run goes, as long as it goes."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator

from streamer.agent.service import Service
from streamer.operation.notify import Notifier
from streamer.terminal.lines import rate

MOST_SECONDS = 20.0
"""How long what is done every second may have stayed undone, for the agent to count as alive."""
_LOOK_SECONDS = 0.1
_STATUS_SECONDS = 5.0


@contextlib.asynccontextmanager
async def announcing(service: Service, notifier: Notifier | None) -> AsyncIterator[None]:
    """Tell `notifier` in the block that the agent is ready, alive and stopping."""
    if notifier is None:
        yield
        return
    task = asyncio.ensure_future(_announce(service, notifier))
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def _announce(service: Service, notifier: Notifier) -> None:
    told = "starting"
    every = (notifier.watchdog_seconds or 4 * _STATUS_SECONDS) / 4
    next_alive = next_status = 0.0
    while True:
        now, phase = time.monotonic(), service.phase
        if phase != told:
            told = phase
            (notifier.ready if phase == "streaming" else notifier.stopping)()
        if notifier.watchdog_seconds and now >= next_alive and is_alive(service, now):
            next_alive = now + every
            notifier.alive()
        if now >= next_status:
            next_status = now + _STATUS_SECONDS
            notifier.status(status_of(service))
        await asyncio.sleep(min(_LOOK_SECONDS, every))


def is_alive(service: Service, now: float) -> bool:
    """Whether a run does what it should, at `now`: this runs on its loop, which so is alive."""
    return service.phase != "streaming" or now - service.ticked < MOST_SECONDS


def status_of(service: Service) -> str:
    """How it is, in a line."""
    look = service.look()
    if look.phase != "streaming":
        return look.phase
    lost = sum(one.count for one in look.losses)
    ready = "; ".join(look.not_ready) or "ready"
    return f"{ready}; {rate(sum(look.rates.values()))} events/s, {lost:,} lost"
