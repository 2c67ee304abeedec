"""What the sensor of the network costs: `python -m benchmarks.net`, as root.

The same load over the loopback device of a network namespace of its own, unobserved, with the
streamer's programs attached, and with bpftrace counting at the same places, in turn and in one run;
the best of some rounds each.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import IO, NamedTuple

from benchmarks.kernel import Cost
from benchmarks.runs import compile_c, show
from streamer.config.settings import Kernel, Settings
from streamer.kernel import state

ROOT = Path(__file__).resolve().parent.parent
PROGRAM = ROOT / "build" / "bench_net_load"
_COUNT = 50_000


class Row(NamedTuple):
    """What is done, what is observed of it, and the same as a program of bpftrace."""

    name: str
    load: str
    kind: str
    bpftrace: str


_COUNT_LENGTHS = (
    "tracepoint:sock:sock_send_length { @s = count(); @b = sum(args->ret); } "
    "tracepoint:sock:sock_recv_length { @r = count(); @c = sum(args->ret); }"
)
_COUNT_PACKETS = (
    "tracepoint:net:net_dev_queue { @s = count(); @b = sum(args->len); } "
    "tracepoint:net:netif_receive_skb { @r = count(); @c = sum(args->len); }"
)
ROWS = (
    Row(
        "a datagram sent and received", "udp", "net.udp",
        _COUNT_LENGTHS,
    ),
    Row(
        "the same over TCP, which is not asked for", "tcp", "net.udp",
        _COUNT_LENGTHS,
    ),
    Row(
        "a UDP socket: sent once, closed", "close", "net.udp",
        _COUNT_LENGTHS,
    ),
    Row(
        "a datagram that is dropped", "drop", "net.drop",
        "tracepoint:skb:kfree_skb { @[args->reason] = count(); }",
    ),
    Row(
        "a socket, bind() and close()", "bind", "net.bind",
        'tracepoint:syscalls:sys_exit_bind { printf("%d %s %d\\n", pid, comm, args->ret); }',
    ),
    Row(
        "a datagram that is no DNS, sent and received", "udp", "net.dns",
        _COUNT_PACKETS,
    ),
    Row(
        "a DNS exchange, with its server", "dns", "net.dns",
        _COUNT_PACKETS,
    ),
)  # fmt: skip


@contextmanager
def _loading() -> Iterator[subprocess.Popen[str]]:
    """The load, in a network of its own."""
    inside = f"ip link set lo up && exec {PROGRAM}"
    with subprocess.Popen(
        ["unshare", "-n", "sh", "-c", inside],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            yield process
        finally:
            _pipe(process.stdin).close()


def _pipe(pipe: IO[str] | None) -> IO[str]:
    assert pipe is not None
    return pipe


@contextmanager
def _streamer(kind: str) -> Iterator[None]:
    # All are reported, however many a second.
    loaded = state.load(Settings(kernel=Kernel(dns_per_second=1 << 20)), {kind})
    try:
        loaded.attach()
        yield
    finally:
        loaded.close()


@contextmanager
def _bpftrace(program: str) -> Iterator[None]:
    command = ["timeout", "60", "bpftrace", "-e", f'BEGIN {{ printf("begun\\n"); }} {program}']
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as process:
        try:
            while _pipe(process.stdout).readline() != "begun\n":
                if process.poll() is not None:
                    raise RuntimeError("bpftrace ended")
            yield
        finally:
            process.terminate()
            process.communicate()


def measure(row: Row, rounds: int) -> Mapping[str, float]:
    """Nanoseconds for one, alone and observed by each."""
    compile_c("net_load.c", PROGRAM, "-static")
    best: dict[str, float] = {}
    with _loading() as load:
        for _ in range(rounds):
            for who, observing in (
                ("alone", nullcontext()),
                ("streamer", _streamer(row.kind)),
                ("bpftrace", _bpftrace(row.bpftrace)),
            ):
                with observing:
                    print(row.load, _COUNT, file=_pipe(load.stdin), flush=True)
                    took = float(_pipe(load.stdout).readline())
                best[who] = min(took, best.get(who, took))
    return best


def costs(rounds: int) -> list[Cost]:
    """Of each row what it takes alone, and how much more with each observer."""
    found = []
    for row in ROWS:
        show(row.name)
        best = measure(row, rounds)
        alone = best["alone"]
        found += [
            Cost(row.name, alone),
            Cost(f"more with {row.kind}", best["streamer"] - alone),
            Cost("more with bpftrace, counting the same", best["bpftrace"] - alone),
        ]
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    print("| ns | alone | streamer adds | bpftrace adds |\n| --- | ---: | ---: | ---: |")
    for row in ROWS:
        best = measure(row, rounds)
        added = [f"{best[who] - best['alone']:,.0f}" for who in ("streamer", "bpftrace")]
        print(f"| {row.name} | {best['alone']:,.0f} | {' | '.join(added)} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
