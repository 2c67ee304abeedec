"""The reader of BPF ring buffers: the compiled one, or its twin where that was not compiled.

`Ring` is the consumer of one ring buffer, `Decoder` makes Structs of its records, and one
`Ring.drain(decoder, max_records)` gives a `Drained`. What they promise is documented in
`records_py.py`, which behaves the same, only slower.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

COMPILED: bool
"""Whether the compiled reader is in use."""

if TYPE_CHECKING:
    from streamer.ring._records import Decoder, Drained, Gap, Ring
else:
    try:
        from streamer.ring._records import Decoder, Drained, Ring

        COMPILED = True
    # Only an absent module: one that is there and does not load is a mistake to be seen.
    except ModuleNotFoundError:
        from streamer.ring.records_py import Decoder, Drained, Ring

        COMPILED = False
    from streamer.ring.records_py import Gap

__all__ = ["COMPILED", "Decoder", "Drained", "Gap", "Ring"]
