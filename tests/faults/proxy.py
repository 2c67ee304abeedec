"""A network that is slow, cut or silent: between the agent and a broker, on loopback.

One proxy stands before one broker. It works in a thread of its own; every method may be called
from the test's. Packets are really lost where it is silent: a socket filter drops what comes, so
that the kernel confirms nothing, and the agent's sends it again, each time after twice as long.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import socket
import struct
import threading
from collections.abc import Callable, Coroutine
from typing import Any, Self

CHUNK = 1 << 16
WAITING = 64
"""Chunks under way in one direction, before the sender has to wait."""


SO_ATTACH_FILTER, SO_DETACH_FILTER = 26, 27
_RETURN_0 = ctypes.create_string_buffer(struct.pack("HBBI", 0x06, 0, 0, 0), 8)
_DROP_ALL = struct.pack("HxxxxxxP", 1, ctypes.addressof(_RETURN_0))


def deafen(sock: Any) -> None:
    """Have the kernel drop every packet that comes for a socket, as if it were lost before it."""
    sock.setsockopt(socket.SOL_SOCKET, SO_ATTACH_FILTER, _DROP_ALL)


def hear(sock: Any) -> None:
    """Let packets in again; harmless where there was nothing to end."""
    with contextlib.suppress(OSError):
        sock.setsockopt(socket.SOL_SOCKET, SO_DETACH_FILTER, 0)


class _Pair:
    """A connection of the agent's and the one to the broker that it is passed on to."""

    def __init__(self, proxy: Proxy, client: Streams, broker: Streams) -> None:
        self._proxy = proxy
        self.client, self.broker = client, broker
        self.forgotten = False
        self._cut = asyncio.Event()

    async def run(self) -> None:
        """Until the connection is over for both ends, or cut."""
        with contextlib.suppress(OSError):
            await asyncio.gather(
                self._pass(self.client[0], self.broker[1]),
                self._pass(self.broker[0], self.client[1]),
            )
        # The end would be a packet as well.
        if self.forgotten or not self._proxy.flowing.is_set():
            await self._cut.wait()

    async def _pass(self, source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
        """One direction: read, and write what is due."""
        under_way: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(WAITING)
        writing = asyncio.ensure_future(self._write(under_way, target))
        loop = asyncio.get_running_loop()
        try:
            while True:
                data = await source.read(CHUNK)
                await under_way.put((loop.time() + self._proxy.delay, data))
                if not data:
                    break
            await writing
        finally:
            writing.cancel()

    async def _write(
        self, under_way: asyncio.Queue[tuple[float, bytes]], target: asyncio.StreamWriter
    ) -> None:
        loop = asyncio.get_running_loop()
        while True:
            due, data = await under_way.get()
            await asyncio.sleep(max(0.0, due - loop.time()))
            if self._proxy.bytes_per_second:
                await asyncio.sleep(len(data) / self._proxy.bytes_per_second)
            await self._proxy.flowing.wait()
            if self.forgotten:
                await asyncio.Event().wait()  # until the connection is cut
            if not data:
                with contextlib.suppress(OSError):
                    target.write_eof()
                return
            target.write(data)
            await target.drain()

    @property
    def socket(self) -> Any:
        """That of the agent's connection."""
        return self.client[1].get_extra_info("socket")

    def half_close(self) -> None:
        """Tell the client that nothing more comes, and still take what it sends."""
        with contextlib.suppress(OSError):
            self.client[1].write_eof()

    def cut(self) -> None:
        """Both ends see a reset."""
        self._cut.set()
        hear(self.socket)  # else the end would be lost, too
        for _, writer in (self.client, self.broker):
            writer.transport.abort()


Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]


class Proxy:
    """Passes connections to `port` of `host` on to `target`, a port of 127.0.0.1, until it ends."""

    def __init__(self, port: int, target: int, host: str = "127.0.0.1") -> None:
        self.port, self.target, self.host = port, target, host
        self.delay = 0.0
        """Seconds that each byte takes, in each direction."""
        self.bytes_per_second = 0
        """Of each connection, in each direction; 0 is as fast as it goes."""
        self.flowing = asyncio.Event()
        self._loop = asyncio.new_event_loop()
        self._pairs: set[_Pair] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)

    @property
    def address(self) -> str:
        return f"{self.host}:{self.port}"

    def heal(self) -> None:
        """Be a network without faults again, also to connections that are there."""
        self.delay, self.bytes_per_second = 0.0, 0
        self._do(self._heal())

    async def _heal(self) -> None:
        self.flowing.set()
        if self._server is None:
            self._server = await asyncio.start_server(self._accept, self.host, self.port)
        for sock in (*self._server.sockets, *(p.socket for p in self._pairs if not p.forgotten)):
            hear(sock)

    def silence(self) -> None:
        """Packets are lost, in both directions: no connection ends, and none can be made."""
        self._call(self._silence)

    def _silence(self) -> None:
        self.flowing.clear()
        listening = self._server.sockets if self._server is not None else ()
        for sock in (*listening, *(pair.socket for pair in self._pairs)):
            deafen(sock)

    def forget(self) -> None:
        """Packets of the connections that are there are lost for good, as where a firewall has
        forgotten them. New connections work.
        """
        self._call(self._forget)

    def _forget(self) -> None:
        for pair in self._pairs:
            pair.forgotten = True
            deafen(pair.socket)

    def cut(self) -> None:
        """Reset all connections, and refuse new ones."""
        self._do(self._refuse())

    async def _refuse(self) -> None:
        if self._server is not None:
            self._server.close()
            self._server = None
        for pair in tuple(self._pairs):
            pair.cut()

    def half_close(self) -> None:
        """Tell the agent at all connections that the broker writes no more. New ones work."""
        self._call(self._half_close)

    def _half_close(self) -> None:
        for pair in self._pairs:
            pair.half_close()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        pair: _Pair | None = None
        try:
            await self.flowing.wait()
            broker = await asyncio.open_connection("127.0.0.1", self.target)
            pair = _Pair(self, (reader, writer), broker)
            self._pairs.add(pair)
            await pair.run()
        except (OSError, asyncio.CancelledError):
            pass
        finally:
            self._tasks.discard(task)
            if pair is not None:
                self._pairs.discard(pair)
                pair.cut()
            writer.transport.abort()

    def _do(self, work: Coroutine[Any, Any, None]) -> None:
        asyncio.run_coroutine_threadsafe(work, self._loop).result(10)

    def _call(self, function: Callable[[], object]) -> None:
        async def call() -> None:
            function()

        self._do(call())

    async def _end(self) -> None:
        await self._refuse()
        tasks = tuple(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def __enter__(self) -> Self:
        self._thread.start()
        self.heal()
        return self

    def __exit__(self, *exc: object) -> None:
        self._do(self._end())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()
