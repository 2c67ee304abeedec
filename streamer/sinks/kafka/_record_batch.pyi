"""The records of a Kafka record batch, laid out in one go; see `record_batch.py`."""

from array import array

def records(
    pieces: list[tuple[bytes | list[bytes], array[int]]], key: bytes, /
) -> tuple[bytes, int, int, int]: ...
