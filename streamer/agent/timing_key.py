"""The secret that decides where coarse times round, kept from run to run beside the note.

A process that outlives the agent is the same one to the next run only if the key is the same.
"""

from __future__ import annotations

import fcntl
import logging
import os
from pathlib import Path

from streamer.agent.run_file import what_is_wrong
from streamer.config.settings import Settings
from streamer.events.timing import Timing, key_of_boot

NAME = "timing.key"
SECRET_BYTES = 32

_log = logging.getLogger("streamer")


def timing_of(settings: Settings) -> Timing | None:
    """How coarse times are to be; None: as they are. Opens a file by name."""
    resolution_ns = 1000 * settings.timing.resolution_us
    if resolution_ns == 0:
        return None
    secret = b""
    if settings.state_file:
        secret = kept_secret(os.path.join(os.path.dirname(settings.state_file), NAME))
    boot_id = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    key = key_of_boot(secret or os.urandom(SECRET_BYTES), boot_id)
    return Timing(resolution_ns, key, settings.timing.jitter)


def kept_secret(path: str) -> bytes:
    """The secret in the file at `path`, made with its directory if need be.

    Empty, and a line in the log, if it cannot be kept: then it is another one in the next run.
    """
    flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
    fd = -1
    try:
        os.makedirs(os.path.dirname(path), 0o755, exist_ok=True)
        fd = os.open(path, flags, 0o600)
        reason = what_is_wrong(os.fstat(fd), os.stat(os.path.dirname(path)))
        if not reason:
            return _read_or_make(fd)
    except OSError as error:
        reason = str(error.strerror)
    finally:
        if fd >= 0:
            os.close(fd)
    _log.warning(
        "processes have other start times in the next run: %s cannot be kept: %s", path, reason
    )
    return b""


def _read_or_make(fd: int) -> bytes:
    fcntl.flock(fd, fcntl.LOCK_EX)  # of two agents that make it, the second takes the first's
    secret = os.read(fd, SECRET_BYTES)
    if len(secret) == SECRET_BYTES:
        return secret
    secret = os.urandom(SECRET_BYTES)
    if os.pwrite(fd, secret, 0) < SECRET_BYTES:
        raise OSError(0, "it was written in part")
    os.fsync(fd)
    return secret
