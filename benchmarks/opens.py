"""A program that opens files: what the observed ones pay.

    python -m benchmarks.opens PATH COUNT

For each line on standard input it opens and closes PATH so many times, and prints the nanoseconds
of one open and close.
"""

from __future__ import annotations

import os
import sys
import time


def one_round(path: str, count: int) -> float:
    """Nanoseconds per open and close."""
    opened, closed, flags = os.open, os.close, os.O_RDONLY
    start = time.perf_counter_ns()
    for _ in range(count):
        closed(opened(path, flags))
    return (time.perf_counter_ns() - start) / count


def main() -> None:
    """Answer each line with a round."""
    path, count = sys.argv[1], int(sys.argv[2])
    for _ in sys.stdin:
        print(one_round(path, count), flush=True)


if __name__ == "__main__":
    main()
