"""The records of a Kafka record batch, laid out in one go; see `sinks/record_batch.py`."""

def records(
    pieces: list[tuple[bytes | list[bytes], list[int]]], key: bytes, /
) -> tuple[bytes, int, int, int]: ...
