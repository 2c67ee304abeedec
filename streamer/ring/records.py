"""The reader of BPF ring and perf buffers: the compiled one, or its twin where that is missing.

`Ring` is the consumer of one ring buffer, `PerfBuffers` of those that the CPUs have in its place,
with the same methods; `Decoder` makes Structs of its records, and one
`Ring.drain(decoder, max_records)` gives a `Drained`. What they promise is documented in
`records_py.py`, which behaves the same, only slower.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

COMPILED: bool
"""Whether the compiled reader is in use."""

if TYPE_CHECKING:
    from streamer.ring._records import Decoder, Drained, Gap, PerfBuffers, Ring
else:
    try:
        from streamer.ring._records import Decoder, Drained, PerfBuffers, Ring

        COMPILED = True
    # Only an absent module: one that is there and does not load is a mistake to be seen.
    except ModuleNotFoundError:
        from streamer.ring.records_py import Decoder, Drained, PerfBuffers, Ring

        COMPILED = False
    from streamer.ring.records_py import Gap

__all__ = ["COMPILED", "Decoder", "Drained", "Gap", "PerfBuffers", "Ring"]
