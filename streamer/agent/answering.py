"""Who is answered about a run: sockets made before privileges go, and servers on them after."""

from __future__ import annotations

import contextlib
import logging
import socket
from collections.abc import Iterator
from typing import NamedTuple

from streamer.agent.service import Service
from streamer.config.rules import listen_address
from streamer.config.settings import Settings
from streamer.operation.control import Listening

_log = logging.getLogger("streamer")


class Listeners(NamedTuple):
    """The sockets that were opened."""

    metrics: socket.socket | None = None
    control: Listening | None = None

    @classmethod
    def open(cls, settings: Settings) -> Listeners:
        """Those of a configuration, with all that will be needed to answer on them imported.

        Raises:
            ConfigError: the address of the metrics cannot be had.
        """
        return cls(_metrics_listener(settings), _control_listener(settings.control.socket))

    def close(self) -> None:
        """Harmless when they are closed."""
        for one in self:
            if one is not None:
                one.close()

    @contextlib.contextmanager
    def answering(self, service: Service) -> Iterator[None]:
        """Answer about `service` in the block, on the running loop."""
        with contextlib.ExitStack() as stack:
            if self.metrics is not None:
                from streamer.operation import http

                stack.callback(http.serve(self.metrics, service.look).close)
            if self.control is not None:
                answers = {"status": service.look, "top": service.top}
                stack.callback(self.control.serve(answers).close)
            yield


def _metrics_listener(settings: Settings) -> socket.socket | None:
    found = listen_address(settings.metrics.listen)
    if found is None:
        return None
    from streamer.operation import http  # with a library that only this needs

    address = http.Address(*found)
    made = http.listening(address)
    if not address.is_local:
        _log.warning("metrics are at %s, where other hosts can read them", settings.metrics.listen)
    return made


def _control_listener(path: str) -> Listening | None:
    """None, and a line in the log, if it cannot be had: events are worth more than looks."""
    if not path:
        return None
    try:
        return Listening(path)
    except OSError as error:
        _log.info("`streamer status` cannot ask this run: %s: %s", path, error.strerror)
        return None
