"""A systemd of the test's own, which runs the unit of `deploy/systemd` as it would be installed.

It is the first process of namespaces, as in a container: it has processes, mounts and cgroups of
its own, and every right, and below it is this machine's system without its services. What it
changes is in a directory of the test's.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import msgspec

from streamer.kernel.capabilities import CAP_SYS_RESOURCE, effective
from tests.kernel.agent import DECODERS, ROOT, kind_of
from tests.kernel.pace import seconds
from tests.kernel.scope import Scope

DEPLOY = ROOT / "deploy" / "systemd"
UNIT = "streamer.service"
SYSTEMD = "/usr/lib/systemd/systemd"
_WANTED = ("sysinit.target", "basic.target", "sockets.target", "local-fs.target")
_NEEDED = ("systemd-sysusers.service",)
_SCRIPT = """\
#!{python} -IS
import sys
sys.path[:0] = ["/opt/streamer/lib"]
from streamer.cli import script
sys.exit(script())
"""
_TARGET = "[Unit]\nRequires=basic.target\n"
# What the service says goes to the journal, and here into a file.
_SAYS = "[Service]\nStandardError=append:/var/log/streamer.stderr\n"
_BOOT = """
read -r go
mount --make-rprivate /
for place in etc var opt run; do mount --bind "$1/$place" "/$place"; done
mount -t proc proc /proc
umount -l -R /sys/fs/cgroup
mount -t cgroup2 cgroup2 /sys/fs/cgroup
[ -e /sys/kernel/tracing/events ] || mount -t tracefs tracefs /sys/kernel/tracing
exec env -i container=test PATH=/usr/sbin:/usr/bin:/sbin:/bin "$2" --system \
    --unit=test.target --log-target=console --show-status=no
"""


class Systemd:
    """It runs from `__enter__` on; the service does not until `ctl("start", UNIT)`."""

    def __init__(self, directory: Path, scope: Scope, config: str) -> None:
        """`config` is the service's, `scope` a cgroup without processes, for all of its own."""
        self._tree = directory
        self._scope = scope
        self._console = directory / "console"
        for name in ("etc", "var/lib", "var/log", "var/tmp", "opt/streamer/bin", "run"):
            (directory / name).mkdir(parents=True)
        self._install(config)
        self._process: subprocess.Popen[bytes] | None = None
        self._pid = 0

    def _install(self, config: str) -> None:
        """As docs/deployment.md says."""
        etc, units = self._tree / "etc", self._tree / "run" / "systemd" / "system"
        shutil.copytree("/etc", etc, symlinks=True, dirs_exist_ok=True)
        shutil.rmtree(etc / "systemd" / "system", ignore_errors=True)
        (etc / "fstab").write_text("")
        (etc / "machine-id").write_text("0123456789abcdef" * 2 + "\n")
        (etc / "sysusers.d").mkdir(exist_ok=True)
        shutil.copy(DEPLOY / "streamer.sysusers.conf", etc / "sysusers.d" / "streamer.conf")
        self.configure(config)
        (units / f"{UNIT}.d").mkdir(parents=True)
        shutil.copy(DEPLOY / UNIT, units)
        (units / f"{UNIT}.d" / "says.conf").write_text(_SAYS)
        (units / "test.target").write_text(_TARGET)
        for target in _WANTED:
            for found in Path("/usr/lib/systemd/system", f"{target}.wants").glob("*"):
                if found.name not in _NEEDED and not (units / found.name).is_symlink():
                    (units / found.name).symlink_to("/dev/null")
        self._install_package()

    def _install_package(self) -> None:
        place = self._tree / "opt" / "streamer"
        (packages,) = (path for path in sys.path if path.endswith("site-packages"))
        tools = shutil.ignore_patterns("*mypy*", "*pytest*", "hypothesis*", "pip*", "setuptools*")
        shutil.copytree(packages, place / "lib", ignore=tools)
        shutil.copytree(ROOT / "streamer", place / "lib" / "streamer")
        script = place / "bin" / "streamer"
        script.write_text(_SCRIPT.format(python=os.path.realpath(sys.executable)))
        script.chmod(0o755)

    def configure(self, config: str) -> None:
        """Write the service's configuration."""
        place = self._tree / "etc" / "streamer"
        place.mkdir(exist_ok=True)
        (place / "streamer.toml").write_text(config)

    def add(self, lines: str) -> None:
        """Lines for the service, as `systemctl edit` adds them."""
        place = self._tree / "run" / "systemd" / "system" / f"{UNIT}.d" / "more.conf"
        place.write_text(f"[Service]\n{lines}\n")
        self.ctl("daemon-reload")

    def path(self, name: str) -> Path:
        """Where a file of the service's is, such as /var/log/streamer."""
        return self._tree / name.removeprefix("/")

    def __enter__(self) -> Self:
        enter = f'echo $$ >{self._scope.path}/cgroup.procs; exec "$@"'
        spaces = ("--mount", "--pid", "--uts", "--ipc", "--cgroup", "--fork", "--kill-child")
        boot = ("sh", "-ec", _BOOT, "sh", str(self._tree), SYSTEMD)
        with self._console.open("wb") as console:
            self._process = subprocess.Popen(
                ["sh", "-ec", enter, "sh", "unshare", *spaces, *boot],
                cwd="/",
                stdin=subprocess.PIPE,
                stdout=console,
                stderr=console,
            )
        try:
            self._pid = self._await(self._child, 30)
            # A cgroup with a process of its own cannot have controllers for those below it.
            (self._scope.path.parent / "cgroup.procs").write_text(str(self._process.pid))
            assert self._process.stdin is not None
            self._process.stdin.write(b"go\n")
            self._process.stdin.flush()
            self._await(self._is_up, 60)
        except BaseException:
            self.__exit__()
            raise
        return self

    def _child(self) -> int:
        assert self._process is not None
        pid = self._process.pid
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        return int(children[0]) if children else 0

    def _is_up(self) -> bool:
        return self.ctl("is-system-running", check=False).strip() in ("running", "degraded")

    def __exit__(self, *exc: object) -> None:
        assert self._process is not None
        self._process.kill()
        self._process.communicate()
        deadline = time.monotonic() + seconds(10)
        for place in sorted(self._scope.path.glob("**/"), reverse=True):
            while place != self._scope.path:
                try:
                    place.rmdir()
                    break
                except OSError:
                    assert time.monotonic() < deadline, f"processes are left in {place}"
                    time.sleep(0.05)

    def ctl(self, *arguments: str, check: bool = True) -> str:
        """What systemctl says."""
        command = ["nsenter", "--target", str(self._pid), "--all", "systemctl", *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds(60))
        assert not check or done.returncode == 0, f"{done.stderr}\n{self.said}\n{self.console}"
        return done.stdout

    @property
    def said(self) -> str:
        """What the service has written on standard error."""
        path = self.path("/var/log/streamer.stderr")
        return path.read_text() if path.exists() else ""

    @property
    def console(self) -> str:
        """What systemd has to say."""
        return self._console.read_text(errors="replace")

    def shown(self, name: str) -> str:
        """A property of the service."""
        return self.ctl("show", UNIT, "--property", name, "--value").strip()

    @property
    def main_pid(self) -> int:
        """The service's main process, as it is known here."""
        procs = self._scope.path / "system.slice" / UNIT / "cgroup.procs"
        pids = [int(line) for line in procs.read_text().split()]
        inside = int(self.shown("MainPID"))
        return next(pid for pid in pids if _inner(pid) == inside)

    def events(self) -> list[Any]:
        """What is in the file of its sink."""
        path = self.path("/var/log/streamer/events.ndjson")
        data = path.read_bytes() if path.exists() else b""
        whole, _, _ = data.rpartition(b"\n")
        return [
            DECODERS[msgspec.json.decode(line)["event"]].decode(line) for line in whole.splitlines()
        ]

    def of(self, kind: str) -> list[Any]:
        """The events of a kind."""
        return [event for event in self.events() if kind_of(event) == kind]

    def wait_for(self, kind: str, count: int) -> None:
        """Wait until so many events of a kind are in the file."""
        self._await(lambda: len(self.of(kind)) >= count, 60)

    def _await(self, found: Callable[[], Any], limit: float) -> Any:
        assert self._process is not None
        deadline = time.monotonic() + seconds(limit)
        while not (value := found()):
            assert self._process.poll() is None, self.console
            assert time.monotonic() < deadline, f"{self.said}\n{self.console}"
            time.sleep(0.1)
        return value


def _inner(pid: int) -> int:
    """The pid that a process has in its own namespace."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("NSpid:")).split()[-1])


def can_protect() -> bool:
    """Whether a process here can be put behind others when memory runs out."""
    return CAP_SYS_RESOURCE in effective()
