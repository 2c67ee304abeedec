"""The plain alternative: what one writes first, and what most tools of this kind do.

libbpf calls a Python function for each record, which unpacks it into a
dict; msgspec encodes it; and each event is sent by itself, with aiokafka's `send()` or aiomqtt's
`publish()`. Same rings, same records, same fields in the output, and for Kafka the same
guarantees and batching (acks=all, idempotent, same codec, batch size and linger).
"""

from __future__ import annotations

import asyncio
import ctypes
import logging
import os
import socket
import struct
import time
from collections.abc import Callable
from typing import Any

import aiomqtt
import msgspec
import uvloop
from aiokafka import AIOKafkaProducer  # type: ignore[import-untyped]

from benchmarks.measure import Result, Stopwatch, Task, answer, say, task_of_argument
from streamer.config.settings import KafkaSink

_POLL = 0.01
_SAMPLE = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)

# As in bpf/events.h; a program of this kind types it a second time.
_HEADER = struct.Struct("<2Q2I2H4B2Q7I4x16s")  # struct event_base, struct event_task
_OPEN = struct.Struct("<2QIi4IHB5x")
_CLOSE = struct.Struct("<3Q2I2H3Bx16s16s")
_FILE_OPEN, _NET_CLOSE = 16, 34
_DIRECTIONS = ("unknown", "outbound", "inbound")

Event = dict[str, Any]


class Records:
    """The records of a ring, one call of Python for each."""

    def __init__(self, fd: int) -> None:
        library = ctypes.CDLL("libbpf.so.1")
        library.ring_buffer__new.restype = ctypes.c_void_p
        library.ring_buffer__new.argtypes = [
            ctypes.c_int,
            _SAMPLE,
            ctypes.c_void_p,
            ctypes.c_void_p,
        ]
        library.ring_buffer__consume.argtypes = [ctypes.c_void_p]
        self._library = library
        self._callback = _SAMPLE(self._on_record)
        self._handle = library.ring_buffer__new(fd, self._callback, None, None)
        self._events: list[Event] = []
        self._host = socket.gethostname()
        clocks = (time.CLOCK_REALTIME, time.CLOCK_BOOTTIME)
        wall, boot = (time.clock_gettime_ns(clock) for clock in clocks)
        self._offset = wall - boot

    def consume(self) -> list[Event]:
        """The events that are there."""
        self._library.ring_buffer__consume(self._handle)
        events, self._events = self._events, []
        return events

    def _on_record(self, context: int, data: int, size: int) -> int:
        self._events.append(self._decode(ctypes.string_at(data, size)))
        return 0

    def _decode(self, record: bytes) -> Event:
        (
            boot_ns, seq, _, weight, kind, cpu, _, ring, cut, flags, start_boot_ns, cgroup_id, pid,
            tid, ppid, uid, gid, pidns, ns_pid, comm,
        ) = _HEADER.unpack_from(record)  # fmt: skip
        event = {
            "event": "",
            "schema": 2,
            "id": f"{self._host}-{cpu}-{seq}",
            "time_ns": boot_ns + self._offset,
            "boot_ns": boot_ns,
            "host": self._host,
            "ring": "bulk" if ring else "critical",
            "seq": seq,
            "cpu": cpu,
            "weight": weight,
            "truncated": ["path"] if cut else [],
            "incomplete": bool(flags & 1),
            "start_boot_ns": start_boot_ns,
            "cgroup_id": cgroup_id,
            "pid": pid,
            "tid": tid,
            "ppid": ppid,
            "uid": uid,
            "gid": gid,
            "pidns": pidns,
            "ns_pid": ns_pid,
            "comm": comm.rstrip(b"\0").decode("utf-8", "replace"),
        }
        if kind == _FILE_OPEN:
            self._add_open(event, record)
        elif kind == _NET_CLOSE:
            self._add_close(event, record)
        return event

    def _add_open(self, event: Event, record: bytes) -> None:
        (
            latency, inode, dev, fd, errno, flags, mode, mntns, length, initial
        ) = _OPEN.unpack_from(record, _HEADER.size)  # fmt: skip
        start = _HEADER.size + _OPEN.size
        event["event"] = "file.open"
        event["latency_ns"] = latency
        event["inode"] = inode
        event["dev"] = dev
        event["fd"] = fd
        event["errno"] = errno
        event["flags"] = flags
        event["mode"] = mode
        event["mntns"] = mntns
        event["path"] = record[start : start + length].decode("utf-8", "replace")
        event["mntns_initial"] = bool(initial)

    def _add_close(self, event: Event, record: bytes) -> None:
        (
            duration, sent, received, errno, netns, local_port, remote_port, version, direction,
            owner_known, local, remote,
        ) = _CLOSE.unpack_from(record, _HEADER.size)  # fmt: skip
        family, size = (socket.AF_INET, 4) if version == 4 else (socket.AF_INET6, 16)
        event["event"] = "net.close"
        event["duration_ns"] = duration
        event["bytes_sent"] = sent
        event["bytes_received"] = received
        event["errno"] = errno
        event["netns"] = netns
        event["local_port"] = local_port
        event["remote_port"] = remote_port
        event["ip_version"] = version
        event["direction"] = _DIRECTIONS[direction]
        event["owner_known"] = bool(owner_known)
        event["local_addr"] = socket.inet_ntop(family, local[:size])
        event["remote_addr"] = socket.inet_ntop(family, remote[:size])


class Progress:
    """Counts events, and measures between those that warm up and the last."""

    def __init__(self, task: Task) -> None:
        self._task = task
        self._watch = Stopwatch()
        self._count = 0
        self.result: Result | None = None

    def add(self, count: int) -> bool:
        """Count; whether all are warm and the measurement begins now."""
        before, self._count = self._count, self._count + count
        warm = self._task.warm
        if before < warm <= self._count:
            self._watch.start()
            say("warm")
        return self._count >= warm + self._task.events

    def finish(self) -> Result:
        """What was measured."""
        return self._watch.result(self._count - self._task.warm)


def read_each(records: Records, task: Task, handle: Callable[[list[Event]], None]) -> Result:
    """Handle the events of each look at the ring until all are there."""
    progress = Progress(task)
    say("ready")
    done = False
    while not done:
        events = records.consume()
        count = len(events)
        handle(events)
        done = progress.add(count)
        if not events:
            time.sleep(_POLL)
    return progress.finish()


def to_null(records: Records, task: Task) -> Result:
    """One line per event, into a buffered file."""
    encoder = msgspec.json.Encoder()
    with open(os.devnull, "wb") as out:

        def write(events: list[Event]) -> None:
            for event in events:
                out.write(encoder.encode(event))
                out.write(b"\n")

        return read_each(records, task, write)


async def to_kafka(records: Records, task: Task) -> Result:
    """`send()` for each event, and at the end `flush()`."""
    logging.getLogger("aiokafka").setLevel(logging.CRITICAL)  # the topic is not there at first
    defaults = KafkaSink(bootstrap=(task.kafka,))
    producer = AIOKafkaProducer(
        bootstrap_servers=task.kafka,
        acks="all",
        enable_idempotence=True,
        compression_type=defaults.compression,
        max_batch_size=defaults.batch_bytes,
        linger_ms=defaults.linger_ms,
    )
    await producer.start()
    encoder, key = msgspec.json.Encoder(), socket.gethostname().encode()
    progress = Progress(task)
    say("ready")
    done = False
    while not done:
        events = records.consume()
        if not events:
            await asyncio.sleep(_POLL)
        for event in events:
            await producer.send(
                task.topic,
                encoder.encode(event),
                key=key,
                timestamp_ms=event["time_ns"] // 1_000_000,
            )
        done = progress.add(len(events))
    await producer.flush()
    result = progress.finish()
    await producer.stop()
    return result


async def to_mqtt(records: Records, task: Task) -> Result:
    """`publish()` at QoS 1 for each event."""
    encoder = msgspec.json.Encoder()
    async with aiomqtt.Client(
        "127.0.0.1", task.mqtt_port, protocol=aiomqtt.ProtocolVersion.V5
    ) as client:
        progress = Progress(task)
        say("ready")
        done = False
        while not done:
            events = records.consume()
            if not events:
                await asyncio.sleep(_POLL)
            for event in events:
                await client.publish(task.topic, encoder.encode(event), qos=1)
            done = progress.add(len(events))
        return progress.finish()


def main() -> None:
    """Measure the task of the command line."""
    task = task_of_argument()
    records = Records(task.shared.rings["bulk"][0])
    match task.path:
        case "decoded":
            answer(read_each(records, task, list.clear))
        case "ndjson":
            answer(to_null(records, task))
        case "kafka":
            answer(uvloop.run(to_kafka(records, task)))
        case "mqtt":
            answer(uvloop.run(to_mqtt(records, task)))


if __name__ == "__main__":
    main()
