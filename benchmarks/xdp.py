"""What counting a packet costs, beside a program that lets it pass and does nothing else."""

from __future__ import annotations

import shutil

from benchmarks.flows import by_bpftrace, in_own_network, info_of, send
from benchmarks.kernel import Cost, cost_of_runs, statistics
from benchmarks.load import OBJECT
from streamer.config.settings import Kernel, Settings
from streamer.events.envelope import Envelope
from streamer.events.summaries import XdpCounters
from streamer.kernel import state
from streamer.kernel.libbpf import Object, time_program
from streamer.kernel.loader import Loader
from streamer.kernel.state import KernelState
from streamer.kernel.targets import targets_of
from streamer.summaries.period import Summaries
from tests.kernel.packets import FRAMES

_KIND = "xdp.counters"
_NAMES = ("TCP", "QinQ", "IPv6, UDP", "IPv6, hop by hop, routing, options")
_PACKETS = 200_000
_BPFTRACE = """
tracepoint:net:netif_receive_skb {
  $skb = (struct sk_buff *)args->skbaddr;
  $ip = (struct iphdr *)($skb->head + $skb->network_header);
  @packets[str(args->name), $skb->protocol, $ip->protocol] = count();
  @bytes[str(args->name), $skb->protocol, $ip->protocol] = sum(args->len);
}
"""


def packets(rounds: int) -> list[Cost]:
    """In a network of its own, of which the loopback device is observed."""
    return in_own_network(_measure, rounds)


def _measure(rounds: int) -> list[Cost]:
    found = _in_turns(rounds)
    with statistics():
        found.append(Cost("a datagram that comes in, counted, as the kernel measures", _observed()))
        if shutil.which("bpftrace"):
            found.append(Cost("the same by bpftrace, by protocol", by_bpftrace(_BPFTRACE)))
    return found


def _load() -> KernelState:
    settings = Settings(kernel=Kernel(interfaces=("lo",)))
    kernel = state.load(settings, {_KIND}, Loader(targets=targets_of(settings.kernel)))
    kernel.attach()
    return kernel


def _in_turns(rounds: int) -> list[Cost]:
    """In runs of the programs, which take turns, as the kernel measures them; the best of some.

    Around such a run of a program that is not attached, as the bare one, the kernel does more.
    """
    kernel = _load()
    summaries = Summaries(kernel, Envelope(), {_KIND})
    bare = Object(OBJECT)
    try:
        for program in bare.programs.values():
            program.autoload(program.name == "xdp_pass")
        for one in bare.maps.values():
            one.leave_out()
        bare.load()
        fds = {"XDP_PASS alone": bare.programs["xdp_pass"].fd}
        fds |= dict.fromkeys(_NAMES, kernel.program_fds["on_packet"])
        found = dict.fromkeys(fds, float("inf"))
        for _ in range(rounds):
            for name, fd in fds.items():
                frame = FRAMES.get(name, FRAMES["TCP"])[0]
                found[name] = min(found[name], time_program(fd, _PACKETS, frame))
        records = [one for one in summaries.collect() if isinstance(one, XdpCounters)]
    finally:
        bare.close()
        kernel.close()
    if sum(one.packets for one in records) != rounds * len(_NAMES) * _PACKETS:
        raise RuntimeError("not all packets were counted")
    alone = found.pop("XDP_PASS alone")
    costs = [Cost(f"a packet counted by {_KIND}: {name}", ns - alone) for name, ns in found.items()]
    return [Cost("a packet, XDP_PASS alone", alone), *costs]


def _observed() -> float:
    kernel = _load()
    try:
        send()
        return cost_of_runs(info_of(kernel.program_fds["on_packet"]))
    finally:
        kernel.close()
