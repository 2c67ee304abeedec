"""`xdp.counters`: packets by class and interface, out of the table of `bpf/xdp_counter.bpf.c`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from streamer.events.envelope import Envelope
from streamer.events.summaries import XdpCounters
from streamer.kernel.objects import CONTRACT
from streamer.kernel.state import KernelState, size_of
from streamer.summaries.tables import CounterTable, entries_of, names_of

_ENUMS = ("packet_vlan", "packet_network", "packet_transport", "packet_ports", "packet_verdict")
"""What a class is made of, the first with the greatest weight in its index."""

_NAMES = [names_of(enum) for enum in _ENUMS]
_ENDS = [
    next(number for name, number, _ in CONTRACT[f"enum {enum}"] if name.endswith("_END"))
    for enum in _ENUMS
]
_COUNTS = size_of("packet_counts")
_WORDS = entries_of("packet_count")
_CLASSES = _COUNTS // (8 * _WORDS)


def class_of(index: int) -> tuple[str, ...]:
    """VLAN, network, transport, ports and verdict of the class at that index."""
    found = []
    for names, end in zip(reversed(_NAMES), reversed(_ENDS), strict=True):
        index, number = divmod(index, end)
        found.append(names[number])
    return tuple(reversed(found))


class XdpSummary:
    """Makes a record for each class that packets came in of, on each interface."""

    kind = "xdp.counters"

    def __init__(self, kernel: KernelState, envelope: Envelope) -> None:
        """Raises KeyError: the sensor is not loaded. Raises OSError: its table cannot be mapped."""
        self._envelope = envelope
        self._cpus = kernel.cpus
        self._interfaces = kernel.interfaces
        self._names = list(kernel.interfaces)
        size = _COUNTS * kernel.cpus * len(kernel.interfaces)
        self._table = CounterTable(kernel.table("packets", size), size, _WORDS)
        self._totals: dict[tuple[int, int], tuple[int, int]] = {}

    def collect(self, period_ns: int) -> Iterator[XdpCounters]:
        """The records of a period, in nanoseconds, that ends now."""
        packets, size = Counter[tuple[int, int]](), Counter[tuple[int, int]]()
        for index, before, now in self._table.changes():
            counts, klass = divmod(index, _CLASSES)
            key = counts // self._cpus, klass
            packets[key] += now[0] - before[0]
            size[key] += now[1] - before[1]
        for key in sorted(packets):
            yield self._record(key, packets[key], size[key], period_ns)

    def _record(self, key: tuple[int, int], packets: int, size: int, period_ns: int) -> XdpCounters:
        place, klass = key
        all_packets, all_bytes = self._totals.get(key, (0, 0))
        self._totals[key] = all_packets + packets, all_bytes + size
        vlan, network, transport, ports, verdict = class_of(klass)
        name = self._names[place]
        return self._envelope.record(
            XdpCounters,
            period_ns=period_ns,
            interface=name,
            ifindex=self._interfaces[name],
            vlan=vlan,
            network=network,
            transport=transport,
            ports=ports,
            verdict=verdict,
            packets=packets,
            bytes=size,
            packets_total=all_packets + packets,
            bytes_total=all_bytes + size,
        )
