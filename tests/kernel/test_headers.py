"""Without BTF, with the headers of this very kernel: they say of every type what its BTF does."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from streamer.kernel import measured, types
from streamer.kernel.btf import Btf, Type
from streamer.kernel.loader import OBJECTS, Loader
from tests.conftest import SET_UP, Require
from tests.kernel.agent import Agent
from tests.kernel.pace import seconds
from tests.kernel.relocated import instructions
from tests.kernel.scope import Scope
from tests.kernel.system import BTF, open_missing
from tests.kernel.systemd import DEPLOY, SYSTEMD, UNIT, Systemd
from tests.kernel.test_degraded import NO_BTF, streamer

pytestmark = pytest.mark.kernel

HEADERS = Path("/usr/src", f"linux-headers-{os.uname().release}")
_STRUCT, _UNION, _ENUM, _ENUM64 = 4, 5, 6, 19


@pytest.fixture
def roots() -> Iterator[Path]:
    """A directory that nobody but root can have put anything into, unlike those below /tmp."""
    with tempfile.TemporaryDirectory(prefix="streamer-test-", dir="/run") as made:
        yield Path(made)


@pytest.fixture
def made_file(require_kernel: Require) -> Path:
    """The BTF out of the headers, completed by what was measured."""
    require_kernel(HEADERS.exists() and not Path(types.KERNEL_BTF).exists(), "it has BTF")
    loader = Loader()
    loader.prepare("auto")
    assert loader.types.rung == "headers", loader.types.words
    assert loader.types.lacks == ""
    assert loader.types.path
    return Path(loader.types.path)


@pytest.fixture
def made(made_file: Path) -> Btf:
    """The types in it."""
    return Btf(made_file.read_bytes())


def members(btf: Btf, struct: Type, offset: int = 0) -> Iterator[tuple[str, int, int, int]]:
    """Name, offset, kind and size of every member, those of members without a name too."""
    for one in struct.members:
        found = btf.resolve(one.type_id)
        if not one.name and found.kind in (_STRUCT, _UNION):
            yield from members(btf, found, offset + one.offset)
        else:
            size = btf.size_of(one.type_id) if found.kind not in (0, 13) else 0
            yield one.name, offset + one.offset, found.kind, size


NOT_WHOLE = ("mount", "mnt_namespace", "mptcp_sock", "kernfs_iattrs")


def by_name(btf: Btf) -> dict[tuple[int, str], Type]:
    found: dict[tuple[int, str], Type] = {}
    for one in btf.types:
        if one.name and one.kind in (_STRUCT, _UNION, _ENUM, _ENUM64):
            found.setdefault((_ENUM if one.kind == _ENUM64 else one.kind, one.name), one)
    return found


@pytest.mark.every_kernel
def test_every_type_is_what_the_kernel_says(made: Btf) -> None:
    """Every member of every struct that the programs read, and no member that there is not."""
    real = Btf(BTF.read_bytes())
    ours, theirs = by_name(made), by_name(real)
    assert len(ours) > 200
    for key, one in ours.items():
        other = theirs[key]
        if key[0] == _ENUM:
            assert one.values == other.values, key
        elif key[1] in NOT_WHOLE:
            # Measured, or known, as far as needed.
            known = {(name, at) for name, at, *_ in members(real, other)}
            found = {(name, at) for name, at, *_ in members(made, one)}
            assert (found and found <= known) or key[1] == "mount", key
            assert {row for row in found if row[0].startswith("mnt_") or row[0] == "mnt"} <= known
        else:
            assert one.size == other.size, key
            assert sorted(members(made, one)) == sorted(members(real, other)), key
    wanted = types.types_in(OBJECTS)
    lacking = {name for name in wanted if (_kind(name), name.split()[1]) not in ours}
    assert all((_kind(name), name.split()[1]) not in theirs for name in lacking), lacking


@pytest.mark.every_kernel
def test_every_relocation_is_the_same(made_file: Path) -> None:
    """Every instruction of every program is what it is with the kernel's own types."""
    compared = 0
    for path in sorted(Path(OBJECTS, types.WITHOUT_BTF).glob("*.bpf.o")):
        found, right = instructions(path, made_file), instructions(path, BTF)
        assert found == right, path.name
        compared += sum(map(len, found.values()))
    assert compared > 10_000


def test_words_that_are_no_addresses() -> None:
    """Such as those of padding, and of flags, which are looked behind as any other."""
    with measured.memory(f"{OBJECTS}/{types.WITHOUT_BTF}/core.bpf.o", str(BTF)) as (peek, task):
        assert len(peek(task.address)) > 0
        for address in (-8, 1, (1 << 64) - 1, 1 << 64, (1 << 64) + 32):
            with pytest.raises(measured.Unfit):
                peek(address)


def _kind(name: str) -> int:
    return {"struct": _STRUCT, "union": _UNION}.get(name.split()[0], _ENUM)


@pytest.mark.every_kernel
def test_events_have_their_paths(scope: Scope, tmp_path: Path, made: Btf) -> None:
    """The manifest says where the layouts come from, and the events are there, exactly."""
    with Agent(tmp_path, *scope.options, events="file.open") as agent:
        scope.act(open_missing, "/no/", 10)
        recording = agent.stop()
    assert [event.path for event in recording.events] == [f"/no/{i}" for i in range(10)]
    assert recording.manifest.kernel_types.startswith(f"kernel headers: {HEADERS}")


@pytest.mark.every_kernel
def test_under_the_unit(
    scope: Scope, cgroups: Path, tmp_path: Path, require: Require, require_kernel: Require
) -> None:
    """As a service, the compiler works within all that keeps it in, but for one line: the list of
    the kernel's functions has to be there, as docs/deployment.md says.
    """
    require(os.path.exists(SYSTEMD), f"systemd is not installed: {SET_UP}")
    require_kernel(HEADERS.exists() and not Path(types.KERNEL_BTF).exists(), "it has BTF")
    shipped = (DEPLOY / "streamer.toml").read_text()
    config = f'events = ["process.exec"]\n{shipped}\n[filters]\ncgroups = [{scope.id}]\n'
    with Scope(cgroups) as own, Systemd(tmp_path / "system", own, config) as systemd:
        systemd.add("Restart=no")
        systemd.ctl("start", UNIT, check=False)
        deadline = time.monotonic() + seconds(60)
        while systemd.shown("ActiveState") != "failed":
            assert time.monotonic() < deadline, systemd.said
            time.sleep(0.1)
        hidden = "/proc/kallsyms: Permission denied (ProtectKernelTunables= of systemd hides it)"
        assert hidden in systemd.said
        systemd.add("ProtectKernelTunables=no")
        systemd.ctl("start", UNIT)
        systemd.wait_for("stream.manifest", 1)
        (manifest,) = systemd.of("stream.manifest")
        assert manifest.kernel_types.startswith(f"kernel headers: {HEADERS}, compiled by bcc")
        scope.act(run_some, 7)
        systemd.wait_for("process.exec", 7)
        systemd.ctl("stop", UNIT)
        assert [event.argv for event in systemd.of("process.exec")] == [["true", "7"]] * 7


def run_some(count: int) -> None:
    for _ in range(count):
        os.waitpid(os.posix_spawn("/bin/true", ["true", str(count)], {}), 0)


ALONE = """
mount -t sysfs sysfs /sys
mount -t tmpfs none /sys/kernel/btf
ip link set lo up
exec "$@"
"""
IN_A_NETWORK_OF_ITS_OWN = ("unshare", "--net", "--mount", "sh", "-ec", ALONE, "sh")
DATAGRAMS = """
import socket
with socket.socket(type=socket.SOCK_DGRAM) as there, socket.socket(type=socket.SOCK_DGRAM) as here:
    there.bind(("127.0.0.1", 0))
    for _ in range(23):
        here.sendto(b"1", there.getsockname())
"""


def test_what_needs_no_types_goes_on(tmp_path: Path) -> None:
    """Without BTF and headers packets are still counted; the manifest says why nothing else is."""
    config = '[kernel]\nheaders = "off"\ninterfaces = ["lo"]\n'
    wanted = "xdp.counters,process.exec"
    prefix = IN_A_NETWORK_OF_ITS_OWN
    with Agent(tmp_path, events=wanted, config=config, prefix=prefix) as agent:
        inside = ["nsenter", f"--net=/proc/{agent.pid}/ns/net", sys.executable, "-c", DATAGRAMS]
        subprocess.run(inside, check=True)
        recording = agent.stop()
    udp = [one.packets for one in recording.of("xdp.counters") if one.transport == "udp"]
    assert sum(udp) == 23
    coverage = recording.manifest.coverage
    assert coverage["xdp.counters"].status == "full"
    assert coverage["process.exec"].status == "missing"
    assert "headers = off" in coverage["process.exec"].reason
    assert recording.manifest.kernel_types.startswith("none; no BTF")


def make_headers(place: Path) -> Path:
    """Those of a kernel that is none. Returns the directory of what was generated."""
    generated = place / "include" / "generated"
    generated.mkdir(parents=True)
    (place / "include" / "linux").mkdir()
    (place / "include" / "linux" / "kconfig.h").touch()
    (generated / "autoconf.h").touch()
    (generated / "utsrelease.h").write_text('#define UTS_RELEASE "5.4.0-none"\n')
    return generated


def test_headers_of_another_kernel(tmp_path: Path, roots: Path) -> None:
    """Nothing is observed with them, and the reason is said."""
    generated = make_headers(roots)
    (tmp_path / "streamer.toml").write_text(f'[kernel]\nheaders = "{roots}"\n')
    options = ("--config", f"{tmp_path}/streamer.toml", "--sink", f"file:{tmp_path}/events")
    ended = streamer(NO_BTF, "run", *options)
    assert (ended.returncode, ended.stdout) == (3, "")
    (line,) = ended.stderr.splitlines()
    assert f"{roots}: headers of 5.4.0-none, and the kernel is {os.uname().release}" in line
    shutil.rmtree(generated)
    line = streamer(NO_BTF, "run", *options).stderr
    assert f"no kernel headers in {roots}" in line


def test_headers_where_others_can_write(tmp_path: Path, roots: Path) -> None:
    """Nothing is made of them, and the reason is said: below a directory that is sticky, and with
    a FIFO among them, which would have the agent wait.
    """
    makefile = make_headers(roots).parents[1] / "Makefile"
    (roots / "include" / "linux" / "kconfig.h").unlink()
    os.mkfifo(makefile)
    (tmp_path / "streamer.toml").write_text(f'[kernel]\nheaders = "{roots}"\n')
    options = ("--config", f"{tmp_path}/streamer.toml", "--sink", f"file:{tmp_path}/events")
    (line,) = streamer(NO_BTF, "run", *options).stderr.splitlines()
    assert f"{makefile} is neither a file nor a directory" in line
    roots.chmod(0o1777)
    (line,) = streamer(NO_BTF, "run", *options).stderr.splitlines()
    assert f"{roots} can be written to by others than root" in line
