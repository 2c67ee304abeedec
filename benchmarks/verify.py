"""How fast `streamer verify` takes records in: `python -m benchmarks.verify [FILE] [--count N]`.

Of a FILE that the agent wrote, or of events as `net.connect` that are made here, in chunks as they
are read from a file. CPU time of one process, the best of three.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import msgspec

from streamer.verify.files import CHUNK_BYTES
from streamer.verify.ledger import Ledger
from streamer.verify.records import Chunk

BOOT_NS, TIME_NS = 10**15, 18 * 10**17


def made(count: int) -> bytes:
    """So many events of two CPUs, in order."""
    rest = {
        "schema": 3,
        "host": "node-1.example",
        "boot_id": "8d0c7a3e-8f5c-4b07-9a52-7b8ad9f3a3f0",
    }
    rest |= {"weight": 1, "truncated": [], "incomplete": False, "invalid_utf8": False}
    rest |= {"pid": 12345, "tid": 12345, "ppid": 1, "uid": 1000, "gid": 1000, "comm": "curl"}
    rest |= {"remote_addr": "93.184.216.34", "local_addr": "10.0.0.1", "remote_port": 443}
    rest |= {"owner_known": True, "direction": "outbound", "netns": 4026531840, "pidns": 4026531836}
    lines = []
    for number in range(count):
        cpu, seq = number % 2, number // 2 + 1
        head: dict[str, object] = {
            "event": "net.connect",
            "id": f"0123456789abcdef-bulk-{cpu}-{seq}",
        }
        head |= {"time_ns": TIME_NS + number, "boot_ns": BOOT_NS + number}
        event = head | rest | {"ring": "bulk", "seq": seq, "cpu": cpu}
        lines.append(msgspec.json.encode(event))
    return b"\n".join(lines) + b"\n"


def chunks(data: bytes) -> list[Chunk]:
    """The data in pieces as they are read from a file, of whole lines."""
    found, at = [], 0
    while at < len(data):
        end = data.rfind(b"\n", at, at + CHUNK_BYTES) + 1 or len(data)
        found.append(Chunk("file", data[at:end]))
        at = end
    return found


def main() -> None:
    """Measure, and print one line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", nargs="?", type=Path)
    parser.add_argument("--count", type=int, default=500_000)
    arguments = parser.parse_args()
    data = arguments.file.read_bytes() if arguments.file else made(arguments.count)
    pieces = chunks(data)
    best = float("inf")
    for _ in range(3):
        ledger = Ledger()
        begun = time.process_time()
        for piece in pieces:
            ledger.feed(piece)
        best = min(best, time.process_time() - begun)
    each = best / ledger.records
    size = len(data) / ledger.records
    print(f"{ledger.records:,} records of {size:.0f} bytes: {each * 1e9:.0f} ns, {1 / each:,.0f}/s")


if __name__ == "__main__":
    main()
