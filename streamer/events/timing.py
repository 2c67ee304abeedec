"""Times and durations as coarse as is configured: what an observer is not to learn from them.

Times are multiples of a resolution. From where on they round up rather than down is drawn with a
secret key, anew for each multiple: who may choose when something happens cannot learn its exact
time by that. The same is always published in the same way: seeing it often tells no more.

The compiled decoder does the same: see `coarse_moment` and what follows it in `ring/_records.c`.
"""

from __future__ import annotations

import hashlib
from typing import NamedTuple

KEY_BYTES = 16
_U64 = (1 << 64) - 1
_MOMENT, _START, _DURATION = range(3)


class Timing(NamedTuple):
    """How coarse: `resolution_ns` is at least 2, `key` of `KEY_BYTES` is secret.

    Without `jitter` everything is rounded down.
    """

    resolution_ns: int
    key: bytes
    jitter: bool = True

    def moment(self, ns: int) -> int:
        """When something happened. Never goes backwards where `ns` does not."""
        bucket, rest = divmod(ns, self.resolution_ns)
        return (bucket + self._up(rest, _MOMENT, bucket)) * self.resolution_ns & _U64

    def start(self, ns: int) -> int:
        """When a process started: no later than the moment of all that it does; 0 stays 0.

        It is part of who a process is, so two of them stay two: below the resolution there is a
        hash in place of what was there.
        """
        if ns == 0:
            return 0
        before = max(self.moment(ns), self.resolution_ns) - self.resolution_ns
        return before + 1 + siphash(self.key, _START, ns) % (self.resolution_ns - 1)

    def duration(self, ns: int, cgroup: int = 0, uid: int = 0) -> int:
        """A duration of something that this user did in this cgroup; 0, for unknown, stays 0.

        All that is shorter than the resolution reads as one. Others round where others of the
        same user and cgroup do: nobody else finds out where by durations of his own.
        """
        bucket, rest = divmod(ns, self.resolution_ns)
        if bucket == 0:
            return self.resolution_ns if ns else 0
        up = self._up(rest, _DURATION, bucket, cgroup, uid)
        return (bucket + up) * self.resolution_ns & _U64

    def total(self, ns: int, count: int, cgroup: int = 0) -> int:
        """The sum of `count` durations: as if each had been the mean."""
        return count * self.duration(-(-ns // count), cgroup) if count else 0

    @property
    def least_bit(self) -> int:
        """The highest bit of the resolution: of shorter durations not even that is told."""
        return self.resolution_ns.bit_length() - 1

    def _up(self, rest: int, *what: int) -> bool:
        return self.jitter and rest > siphash(self.key, *what) % self.resolution_ns


def key_of_boot(secret: bytes, boot_id: str) -> bytes:
    """The key for one boot: times since boot begin anew with each."""
    return hashlib.blake2b(boot_id.encode(), digest_size=KEY_BYTES, key=secret).digest()


def siphash(key: bytes, *words: int) -> int:
    """SipHash-2-4 (Aumasson and Bernstein, 2012) of 64-bit words, little-endian, as a u64."""
    k0, k1 = int.from_bytes(key[:8], "little"), int.from_bytes(key[8:16], "little")
    state = (
        k0 ^ 0x736F6D6570736575,
        k1 ^ 0x646F72616E646F6D,
        k0 ^ 0x6C7967656E657261,
        k1 ^ 0x7465646279746573,
    )
    for word in (*words, len(words) << 59 & _U64):  # the length in bytes, in the highest byte
        v0, v1, v2, v3 = state
        v0, v1, v2, v3 = _round(*_round(v0, v1, v2, v3 ^ word))
        state = v0 ^ word, v1, v2, v3
    v0, v1, v2, v3 = state
    state = v0, v1, v2 ^ 0xFF, v3
    for _ in range(4):
        state = _round(*state)
    v0, v1, v2, v3 = state
    return v0 ^ v1 ^ v2 ^ v3


def _round(v0: int, v1: int, v2: int, v3: int) -> tuple[int, int, int, int]:
    v0 = (v0 + v1) & _U64
    v1 = _rotated(v1, 13) ^ v0
    v0 = _rotated(v0, 32)
    v2 = (v2 + v3) & _U64
    v3 = _rotated(v3, 16) ^ v2
    v0 = (v0 + v3) & _U64
    v3 = _rotated(v3, 21) ^ v0
    v2 = (v2 + v1) & _U64
    v1 = _rotated(v1, 17) ^ v2
    return v0, v1, _rotated(v2, 32), v3


def _rotated(word: int, bits: int) -> int:
    return (word << bits | word >> (64 - bits)) & _U64
