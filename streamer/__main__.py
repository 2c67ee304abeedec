"""`python -m streamer`, the same as the command `streamer`."""

from streamer.cli import script

if __name__ == "__main__":
    script()
