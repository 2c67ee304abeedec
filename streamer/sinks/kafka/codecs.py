"""How record batches are compressed: codecs and levels are chosen here, by what was measured.

docs/kafka.md has the table. All of them release the interpreter's lock while they compress. What
others have compressed, in any form that they use, is read for `streamer verify`.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import NamedTuple

import cramjam
from aiokafka.codec import lz4_decode, snappy_decode, zstd_decode  # type: ignore[import-untyped]
from isal import igzip_lib

GZIP_LEVEL = 1
ZSTD_LEVEL = 1

# The LZ4 frame format: magic, flags (version 1, independent blocks), blocks of up to 4 MiB, and
# the second byte of the xxHash-32 of both. A block whose highest size bit is set is as it was.
_LZ4_HEAD = b"\x04\x22\x4d\x18\x60\x70\x73"
_LZ4_END = bytes(4)
_LZ4_BLOCK = 4 << 20
_LZ4_STORED = 1 << 31

# What Java's snappy library writes: magic, version, compatible version, then sized blocks.
_SNAPPY_HEAD = b"\x82SNAPPY\x00" + struct.pack(">ii", 1, 1)
_SNAPPY_BLOCK = 64 << 10


class Codec(NamedTuple):
    """`number` is that of the codec in the attributes of a record batch."""

    number: int
    compress: Callable[[bytes], bytes]


def _gzip(data: bytes) -> bytes:
    return igzip_lib.compress(data, GZIP_LEVEL, igzip_lib.COMP_GZIP)


def _zstd(data: bytes) -> bytes:
    return bytes(cramjam.zstd.compress(data, level=ZSTD_LEVEL))


def _lz4(data: bytes) -> bytes:
    parts: list[bytes | memoryview] = [_LZ4_HEAD]
    view = memoryview(data)
    for start in range(0, len(view), _LZ4_BLOCK):
        plain = view[start : start + _LZ4_BLOCK]
        block = bytes(cramjam.lz4.compress_block(plain, store_size=False))
        if len(block) < len(plain):
            parts += [struct.pack("<I", len(block)), block]
        else:
            parts += [struct.pack("<I", len(plain) | _LZ4_STORED), plain]
    return b"".join([*parts, _LZ4_END])


def _snappy(data: bytes) -> bytes:
    parts = [_SNAPPY_HEAD]
    view = memoryview(data)
    for start in range(0, len(view), _SNAPPY_BLOCK):
        block = bytes(cramjam.snappy.compress_raw(view[start : start + _SNAPPY_BLOCK]))
        parts += [struct.pack(">i", len(block)), block]
    return b"".join(parts)


CODECS: dict[str, Codec] = {
    "none": Codec(0, bytes),
    "gzip": Codec(1, _gzip),
    "snappy": Codec(2, _snappy),
    "lz4": Codec(3, _lz4),
    "zstd": Codec(4, _zstd),
}
"""By the name in the settings."""


def _plain(data: bytes) -> bytes:
    return data


def _gunzip(data: bytes) -> bytes:
    return igzip_lib.decompress(data, igzip_lib.DECOMP_GZIP)


_DECODERS: dict[int, Callable[[bytes], bytes]] = dict(
    enumerate((_plain, _gunzip, snappy_decode, lz4_decode, zstd_decode))
)


def decompress(codec: int, data: bytes) -> bytes:
    """The records of a batch, by the number of its codec.

    Raises:
        ValueError: there is no such codec. Each codec has errors of its own for what is none.
    """
    if codec not in _DECODERS:
        raise ValueError(f"there is no codec {codec}")
    return _DECODERS[codec](data)
