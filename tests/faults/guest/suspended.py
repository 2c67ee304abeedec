"""A virtual machine is suspended while the agent runs, and what it recorded comes back.

    tools/kernels.sh run bookworm -- .venv/bin/python -m tests.faults.guest.suspended

An emulated machine does not wake up by itself. The kernel can test how it suspends
(/sys/power/pm_test): all but the last step is done, tasks frozen, devices off, one CPU left and
time stopped, and after five seconds all comes back. CLOCK_BOOTTIME goes on by as much as the
hardware's clock has, CLOCK_MONOTONIC does not.

The virtual devices forget what they were asked when they are off, so that no file system of the
host can be used from then on. All that is needed later is in memory by then; the results go by the
device `back`, which nothing had mounted before.
"""

from __future__ import annotations

import signal
import subprocess
import tempfile
import time
import traceback
from contextlib import ExitStack
from pathlib import Path

import msgspec

from tests.faults.experiment import END_SECONDS, MINE, RATE, SPAWNS, Memory, configured
from tests.faults.load import Load, build
from tests.kernel.scope import Scope, cgroup_mount
from tests.kernel.system import IN_GUEST

BUSYBOX = "/run/busybox"
DRIVER = Path("/sys/bus/virtio/drivers/9pnet_virtio")
BACK = Path("/run/back")
RESULT, EVENTS, TRACEBACK = "suspended.json", "events.ndjson", "traceback"
TIMES = 2


class Result(msgspec.Struct, frozen=True):
    """What the guest did."""

    offered: dict[str, int]
    """Events per kind."""
    spawned: int
    """Of the processes that have a number, how many there were."""
    slept: list[float]
    """Seconds that CLOCK_BOOTTIME got ahead of CLOCK_MONOTONIC, each time."""
    peak_mb: float


def ahead() -> float:
    """Seconds that were spent suspended since boot."""
    return time.clock_gettime(time.CLOCK_BOOTTIME) - time.clock_gettime(time.CLOCK_MONOTONIC)


def suspend() -> float:
    """Suspend, and come back: what CLOCK_BOOTTIME has gained by it, in seconds."""
    before = ahead()
    Path("/sys/power/mem_sleep").write_text("deep")
    Path("/sys/power/pm_test").write_text("core")
    Path("/sys/power/state").write_text("mem")
    return ahead() - before


def into_memory(pid: int | str) -> None:
    """Have all in memory that a process executes."""
    for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
        _, _, name = line.partition("/")
        if Path(f"/{name}").is_file():
            Path(f"/{name}").read_bytes()


def ran(directory: Path) -> tuple[Result, bytes]:
    """What was done, and what the agent wrote.

    A process that has executed files of the host cannot close them when it ends: that the agent has
    come to its end is seen by its account, and nobody waits for more.
    """
    mount = cgroup_mount()
    assert mount is not None
    scope = ExitStack().enter_context(Scope(mount))  # which the machine's end cleans up
    output = directory / EVENTS
    agent = configured(scope, directory, f'type = "file"\npath = "{output}"', spool=None).start()
    memory = Memory((agent.pid, agent.helper_pid))
    opens = Load(build(), scope, "opens", "/no/", str(RATE))
    spawns = Load(build(), scope, "spawns", MINE, "0", str(SPAWNS))
    time.sleep(3)
    for pid in ("self", agent.pid, agent.helper_pid):
        into_memory(pid)
    slept = []
    for _ in range(TIMES):
        slept.append(suspend())
        time.sleep(3)
    opens.stop(END_SECONDS)
    spawned = spawns.stop(END_SECONDS)
    agent.drain()
    peak = memory.end()
    agent.send(signal.SIGTERM)
    deadline = time.monotonic() + END_SECONDS
    while " delivered, 0 dropped; " not in agent.stderr:
        assert time.monotonic() < deadline, agent.stderr
        time.sleep(0.1)
    offered = opens.expected + spawns.expected
    return Result(dict(offered), spawned, slept, peak), output.read_bytes()


def mount_back() -> None:
    """Have the device that was never used begin anew, and mount it."""
    (device,) = (
        one
        for one in DRIVER.glob("virtio*")
        if (one / "mount_tag").read_text().rstrip("\0\n") == "back"
    )
    (DRIVER / "unbind").write_text(device.name)
    (DRIVER / "bind").write_text(device.name)
    BACK.mkdir()
    options = "trans=virtio,version=9p2000.L,msize=512000"
    subprocess.run([BUSYBOX, "mount", "-t", "9p", "-o", options, "back", str(BACK)], check=True)


def main() -> None:
    """The machine ends with it."""
    assert IN_GUEST, "for virtual machines alone"
    status = 0
    try:
        result, events = ran(Path(tempfile.mkdtemp()))
    except Exception:
        status = 1
        found = {TRACEBACK: traceback.format_exc().encode()}
    else:
        found = {RESULT: msgspec.json.encode(result), EVENTS: events}
    mount_back()
    for name, data in found.items():
        (BACK / name).write_bytes(data)
    (BACK / ".guest" / "status").write_text(f"{status}\n")
    subprocess.run([BUSYBOX, "umount", str(BACK)], check=True)
    Path("/proc/sysrq-trigger").write_text("b")  # it is not started again


if __name__ == "__main__":
    main()
