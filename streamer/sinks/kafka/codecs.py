"""How record batches are compressed: codecs and levels are chosen here, by what was measured.

docs/kafka.md has the table. All of them release the interpreter's lock while they compress. What
others have compressed, in any form that they use, is read for `streamer verify`.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import NamedTuple

import cramjam
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
_SNAPPY_MAGIC = b"\x82SNAPPY\x00"
_SNAPPY_HEAD = _SNAPPY_MAGIC + struct.pack(">ii", 1, 1)
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


UNPACKED_MOST = 256 << 20
"""Bytes of the records of a batch that is read: four times what the sink puts into its largest."""


def _too_long() -> ValueError:
    return ValueError(f"its records are longer than {UNPACKED_MOST} bytes")


def _plain(data: bytes) -> bytes:
    return data


def _gunzip(data: bytes) -> bytes:
    unpacking = igzip_lib.IgzipDecompressor(igzip_lib.DECOMP_GZIP)
    unpacked: bytes = unpacking.decompress(data, UNPACKED_MOST)
    if not unpacking.eof:
        raise ValueError("its gzip is cut off") if unpacking.needs_input else _too_long()
    return unpacked


@lru_cache(maxsize=1)
def _room(size: int) -> mmap.mmap:
    """Memory to unpack into, of which as much is used as ever was: new pages cost as much again."""
    return mmap.mmap(-1, size)


def _into_room(unpack: Callable[[bytes, mmap.mmap], int], data: bytes) -> bytes:
    """What a codec that takes no limit unpacks: it fails where there is no more room."""
    room = _room(UNPACKED_MOST)
    try:
        return room[: unpack(data, room)]
    except cramjam.DecompressionError as error:
        why = f"its records do not unpack to {UNPACKED_MOST} bytes at most: {error}"
        raise ValueError(why) from None


def _unsnappy(data: bytes) -> bytes:
    """In the framing of Java's library, or as it is."""
    if not data.startswith(_SNAPPY_MAGIC):
        return _unsnappy_blocks([data])
    view, at, blocks = memoryview(data), len(_SNAPPY_HEAD), []
    while at < len(view):
        (size,) = struct.unpack_from(">i", view, at)
        at += 4
        if not 0 <= size <= len(view) - at:
            raise ValueError("a block of its snappy is cut off")
        blocks.append(view[at : at + size])
        at += size
    return _unsnappy_blocks(blocks)


def _unsnappy_blocks(blocks: Sequence[bytes | memoryview]) -> bytes:
    """Each says how long it will be, and is refused when it is not."""
    if sum(map(cramjam.snappy.decompress_raw_len, blocks)) > UNPACKED_MOST:
        raise _too_long()
    return b"".join(bytes(cramjam.snappy.decompress_raw(block)) for block in blocks)


_DECODERS: dict[int, Callable[[bytes], bytes]] = {
    0: _plain,
    1: _gunzip,
    2: _unsnappy,
    3: partial(_into_room, cramjam.lz4.decompress_into),
    4: partial(_into_room, cramjam.zstd.decompress_into),
}


def decompress(codec: int, data: bytes) -> bytes:
    """The records of a batch, by the number of its codec; by one thread at a time.

    Raises:
        ValueError: there is no such codec, or they are longer than `UNPACKED_MOST`. gzip and
            snappy have errors of their own for what is none.
    """
    if codec not in _DECODERS:
        raise ValueError(f"there is no codec {codec}")
    return _DECODERS[codec](data)
