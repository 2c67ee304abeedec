"""streamer: an agent that streams Linux kernel events."""

__version__ = "0.1.0"
