"""A proxy that delays: what it reads from either side it passes on half a round trip later.

`python -m benchmarks.delay LISTEN_PORT HOST:PORT MILLISECONDS`. A process of its own, so that its
cost is not the measured process's. It says `ready` on standard output, and runs until it is ended.
"""

from __future__ import annotations

import asyncio
import sys
from collections import deque

import uvloop

CHUNK = 1 << 18
MOST_HELD = 64 << 20
"""Bytes on the way in one direction: more than any window, so that only the delay counts."""


async def carry(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, seconds: float) -> None:
    """Pass on all that is read, each part `seconds` after it came."""
    loop = asyncio.get_running_loop()
    held: deque[tuple[float, bytes]] = deque()
    came, went = asyncio.Event(), asyncio.Event()

    async def pass_on() -> None:
        while True:
            while not held:
                came.clear()
                await came.wait()
            due, data = held.popleft()
            went.set()
            if (wait := due - loop.time()) > 0:
                await asyncio.sleep(wait)
            if not data:
                break
            writer.write(data)
            await writer.drain()
        writer.close()

    passing = asyncio.create_task(pass_on())
    data = b"."
    try:
        while data:
            data = await reader.read(CHUNK)
            held.append((loop.time() + seconds, data))
            came.set()
            while sum(len(part) for _, part in held) > MOST_HELD:
                went.clear()
                await went.wait()
        await passing
    except OSError:
        passing.cancel()
        writer.close()


async def serve(port: int, target: tuple[str, int], round_trip: float) -> None:
    """Listen on a loopback port, until this process is ended."""

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there_reader, there_writer = await asyncio.open_connection(*target, limit=CHUNK)
        half = round_trip / 2
        await asyncio.gather(carry(reader, there_writer, half), carry(there_reader, writer, half))

    server = await asyncio.start_server(accept, "127.0.0.1", port, limit=CHUNK)
    print("ready", flush=True)
    async with server:
        await server.serve_forever()


def main() -> None:
    """Serve what the command line says."""
    port, address, milliseconds = sys.argv[1:]
    host, _, target = address.rpartition(":")
    uvloop.run(serve(int(port), (host, int(target)), float(milliseconds) / 1000))


if __name__ == "__main__":
    main()
