"""The fixed list of what the worker may ask of the helper, and the check of every parameter.

Whoever has taken over the worker can send anything: what does not fit the list exactly is
refused before anything is done.
"""

from __future__ import annotations

import binascii
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from streamer.privilege.files import MOST_KEPT

MOST_PID = 1 << 22  # PID_MAX_LIMIT
MOST_RING = 1 << 30
"""Bytes of a ring."""
MOST_CPU = (1 << 16) - 1
TRANSPORTS = ("auto", "perf")
MOST_OPTION = 1 << 22
"""Entries of a table."""
MOST_NAMED = 64
"""Of rings, or of a sensor's options."""
MOST_RUNS = 1 << 16
"""Of a program, one after the other."""
MOST_BYTES = 1 << 16
"""Of a key or a value."""
MOST_FILES = 1 << 16
MOST_ADDRESSES = 1 << 11
"""Of code that is looked up at a time: they fit into a message, and so does the answer."""
MOST_ADDRESS = (1 << 64) - 1

PROC_FILES = ("stat", "status", "comm", "cmdline", "cgroup", "loginuid", "sessionid")
PROC_LINKS = (
    *("exe", "cwd", "root"),
    *("ns/cgroup", "ns/ipc", "ns/mnt", "ns/net", "ns/pid", "ns/time", "ns/user", "ns/uts"),
)
"""What may be looked up below /proc/PID: never what holds secrets or memory, such as environ."""

_SENSOR = re.compile(r"[a-z][a-z0-9_]{0,31}")
_MAP = re.compile(r"[A-Za-z0-9_.]{1,64}")


class Refused(Exception):
    """A request that is not on the list, or whose parameters are not what they have to be."""


class Request(NamedTuple):
    """A request that is in order. `number` comes back with the reply."""

    number: int
    name: str
    parameters: dict[str, Any]


def parse(message: Mapping[str, Any]) -> Request:
    """The request in a message: `{"id": …, "request": …, …}` with its parameters.

    Raises:
        Refused: says what is wrong with it.
    """
    name, number = message.get("request"), message.get("id")
    checks = REQUESTS.get(name) if isinstance(name, str) else None
    if not isinstance(name, str) or checks is None:
        raise Refused("no such request")
    if type(number) is not int or not 0 <= number < 1 << 63:
        raise Refused(f"{name}: id")
    if message.keys() - {"request", "id"} != checks.keys():
        raise Refused(f"{name}: parameters have to be {', '.join(checks) or 'none'}")
    parameters = {}
    for key, check in checks.items():
        try:
            parameters[key] = check(message[key])
        except ValueError:
            raise Refused(f"{name}: {key}") from None
    return Request(number, name, parameters)


def _integer(least: int, most: int) -> Callable[[Any], int]:
    def check(value: Any) -> int:
        if type(value) is not int or not least <= value <= most:  # a bool is no integer here
            raise ValueError
        return value

    return check


def _string(pattern: re.Pattern[str]) -> Callable[[Any], str]:
    def check(value: Any) -> str:
        if type(value) is not str or not pattern.fullmatch(value):
            raise ValueError
        return value

    return check


def _one_of(words: tuple[str, ...]) -> Callable[[Any], str]:
    def check(value: Any) -> str:
        if type(value) is not str or value not in words:
            raise ValueError
        return value

    return check


def _optional(check: Callable[[Any], Any]) -> Callable[[Any], Any]:
    return lambda value: None if value is None else check(value)


def _numbers(most: int) -> Callable[[Any], dict[str, int]]:
    name, number = _string(_MAP), _integer(0, most)

    def check(value: Any) -> dict[str, int]:
        if type(value) is not dict or len(value) > MOST_NAMED:
            raise ValueError
        return {name(key): number(one) for key, one in value.items()}

    return check


def _bytes(value: Any) -> bytes:
    if type(value) is not str or len(value) > 2 * MOST_BYTES:
        raise ValueError
    return binascii.a2b_base64(value.encode("ascii"), strict_mode=True)


def _boolean(value: Any) -> bool:
    if type(value) is not bool:
        raise ValueError
    return value


def _addresses(value: Any) -> list[int]:
    if type(value) is not list or len(value) > MOST_ADDRESSES:
        raise ValueError
    return list(map(_ADDRESS, value))


_ADDRESS = _integer(0, MOST_ADDRESS)
_START = _integer(0, (1 << 63) - 1)
_PID = _integer(1, MOST_PID)
_INDEX = _integer(0, MOST_FILES)
_KEEP = _integer(1, MOST_KEPT)
REQUESTS: Mapping[str, Mapping[str, Callable[[Any], Any]]] = {
    "load_core": {
        "rings": _numbers(MOST_RING),
        "btf": _optional(_INDEX),
        "transport": _one_of(TRANSPORTS),
    },
    "open_buffers": {"cpu": _integer(0, MOST_CPU)},
    "load": {"sensor": _string(_SENSOR), "options": _numbers(MOST_OPTION)},
    "attach": {"sensor": _string(_SENSOR)},
    "run": {"sensor": _string(_SENSOR)},
    "unload": {"sensor": _string(_SENSOR)},
    "detach": {"sensor": _string(_SENSOR)},
    "run_program": {
        "sensor": _string(_SENSOR),
        "program": _string(_MAP),
        "repeat": _integer(1, MOST_RUNS),
    },
    "update": {"map": _string(_MAP), "key": _bytes, "value": _bytes},
    "delete": {"map": _string(_MAP), "key": _bytes},
    "read": {"map": _string(_MAP)},
    "take": {"map": _string(_MAP)},
    "locate": {
        "pid": _PID,
        "start": _START,
        "image": _ADDRESS,
        "addresses": _addresses,
    },
    "open_module": {
        "pid": _PID,
        "start": _START,
        "image": _ADDRESS,
        "first": _ADDRESS,
        "last": _ADDRESS,
    },
    "open": {"index": _INDEX},
    "current": {"index": _INDEX},
    "rotate": {"index": _INDEX, "keep": _KEEP},
    "pack": {"index": _INDEX, "keep": _KEEP},
    "packed": {"index": _INDEX, "whole": _boolean},
    "proc": {"pid": _PID, "name": _one_of(PROC_FILES + PROC_LINKS)},
    "end": {},
}
"""Every request, and what makes a value of each of its parameters."""
