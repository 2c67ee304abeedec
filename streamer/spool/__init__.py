"""The disk spool: what a broker does not take waits on disk, and is not lost with the process.

In come batches, for the sink that a `SpooledSink` is in front of. Out of it they go to that sink,
in order, and with `replayed` if they come from the disk.
"""
