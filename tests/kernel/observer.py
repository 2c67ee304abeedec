"""Another tenant, who has the published stream and nothing else, and is after a victim's secret.

`python -m tests.kernel.observer SCHEDULE < events.ndjson`: for every bit of the secret the victim
makes a system call that takes longer if it is 1, at times that everybody knows, several times
over. Prints what each of two attacks takes for the secret, as JSON: by the durations that are
published, and by the times alone.

SCHEDULE is JSON: `begin_ns` since boot, `tick_ns` between two calls, `bits`, `rounds`, `short_ns`
and `long_ns` that the calls take, and `resolution_ns` of the times, which the manifest tells.
"""

from __future__ import annotations

import json
import math
import random
import sys
from collections.abc import Iterable, Iterator
from typing import Any

Observed = tuple[int, int, int]
"""Number of the call, and the duration and the time that were published."""


def observed(lines: Iterable[str]) -> Iterator[Observed]:
    """The victim's calls in their order."""
    for number, event in enumerate(
        event for event in map(json.loads, lines) if event["event"] == "syscall.slow"
    ):
        yield number, event["duration_ns"], event["boot_ns"]


def split(values: list[int], plan: dict[str, Any], luck: random.Random) -> list[bool]:
    """Which are of the longer kind. Luck where all are the same."""
    if len(set(values)) < 2:
        return [luck.random() < 0.5 for _ in values]
    bound = (plan["short_ns"] + plan["long_ns"]) / 2
    return [value >= bound for value in values]


def by_durations(found: list[Observed], plan: dict[str, Any], luck: random.Random) -> list[bool]:
    """The shortest of each bit's rounds: others only made it longer."""
    shortest = [math.inf] * plan["bits"]
    for number, duration, _ in found:
        bit = number % plan["bits"]
        shortest[bit] = min(shortest[bit], duration)
    return split([int(one) for one in shortest], plan, luck)


def by_times(found: list[Observed], plan: dict[str, Any], luck: random.Random) -> list[bool]:
    """When each call ended, seen from when it began."""
    if plan["resolution_ns"] == 0:
        ends = [
            (number, 0, at - plan["begin_ns"] - number * plan["tick_ns"]) for number, _, at in found
        ]
        return by_durations([(n, end, 0) for n, _, end in ends], plan, luck)
    weights = [0.0] * plan["bits"]
    for number, _, at in found:
        weights[number % plan["bits"]] += log_ratio(number, at, plan)
    return [weight > 0 or (weight == 0 and luck.random() < 0.5) for weight in weights]


def log_ratio(number: int, at: int, plan: dict[str, Any]) -> float:
    """How much likelier a 1 makes this time: it rounds up the likelier the later it was."""
    begun = plan["begin_ns"] + number * plan["tick_ns"]
    resolution = plan["resolution_ns"]
    long, short = (chance(begun + plan[name], at, resolution) for name in ("long_ns", "short_ns"))
    return math.log(long / short)


def chance(end: int, at: int, resolution: int) -> float:
    """That a call which ended then is published with this time."""
    bucket, rest = divmod(end, resolution)
    up = rest / resolution
    known = {bucket * resolution: 1 - up, (bucket + 1) * resolution: up}
    return max(known.get(at, 0.0), 1e-3)  # it may have ended later than it should


def main() -> None:
    plan = json.loads(sys.argv[1])
    found = list(observed(sys.stdin))
    luck = random.Random(1)
    guesses = {attack.__name__: attack(found, plan, luck) for attack in (by_durations, by_times)}
    print(json.dumps(guesses))


if __name__ == "__main__":
    main()
