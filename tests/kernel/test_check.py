"""`streamer check`: what it says is so, whoever asks, and nothing is left behind."""

from __future__ import annotations

import ctypes
import errno
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import msgspec
import pytest

from streamer.events.catalogue import SELECTABLE
from streamer.kernel import tiny
from streamer.kernel.cgroups import IN_ROOT
from streamer.kernel.report import Answer, CheckReport
from tests.conftest import Require
from tests.kernel.agent import ROOT, Agent
from tests.kernel.pace import seconds
from tests.kernel.scope import Scope
from tests.kernel.system import IN_GUEST, kernel_is, kernel_knows
from tests.kernel.test_degraded import NO_BTF, no_tracefs, refusing
from tests.kernel.test_privilege import functions_load

pytestmark = pytest.mark.kernel

NOBODY = 65534
KPROBES = os.path.exists("/sys/bus/event_source/devices/kprobe")
SCHEMA = json.loads((ROOT / "schemas" / "check.schema.json").read_text())
EVERYTHING = """
events = ["*"]
[kernel]
interfaces = ["lo"]
syscalls = ["getppid"]
open_latency = true
profile_hz = 19
"""


def check(
    *arguments: str, prefix: tuple[str, ...] = (), python: tuple[str, ...] = ("-m", "streamer")
) -> tuple[int, CheckReport]:
    """Exit code and report. The JSON has the fields of the schema, no more and no fewer."""
    interpreter = os.path.realpath(sys.executable) if python[0] != "-m" else sys.executable
    command = [*prefix, interpreter, *python, "check", "--json", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, timeout=seconds(120))
    said = [line for line in done.stderr.splitlines() if not line.startswith(b"late import of")]
    assert said == []
    raw = json.loads(done.stdout)
    assert raw.keys() == SCHEMA["properties"].keys()
    found = msgspec.convert(raw, CheckReport, strict=True)
    assert msgspec.to_builtins(found) == raw
    return done.returncode, found


def answers(found: Mapping[str, Answer]) -> dict[str, str]:
    return {name: one.answer for name, one in found.items()}


def rights(*names: str) -> tuple[str, ...]:
    """What to put before a command that is to be root's with these capabilities alone."""
    return "setpriv", "--bounding-set", ",".join(["-all", *names]), "--inh-caps=-all"


# ---------------------------------------------------------------- what it says is so


def test_what_it_says_of_this_kernel() -> None:
    """With all capabilities nothing is left open, and each answer is the one that is known."""
    code, found = check("--events", "*")
    features = answers(found.features)
    assert features["bpf"] == features["btf"] == features["jit"] == "yes"
    assert features["kernel_memory"] == features["load"] == features["tracefs"] == "yes"
    typed = "yes" if functions_load() else "no"
    assert features["functions"] == typed
    compiled = any((ROOT / "streamer" / "ring").glob("_records.*.so"))
    assert (features["decoder"], found.features["decoder"].reason[:8]) == (
        ("yes", "compiled") if compiled else ("no", "pure Pyt")
    )
    types = answers(found.program_types)
    assert types.pop("tracing/trace_fentry") == types.pop("tracing/trace_fexit") == typed
    assert set(types.values()) == {"yes"}
    assert {"raw_tracepoint", "tracepoint", "kprobe", "xdp", "tracing/trace_raw_tp"} <= types.keys()
    maps = answers(found.map_types)
    storage = "yes" if kernel_knows("BPF_FUNC_task_storage_get") else "no"
    assert maps.pop("task_storage+no_prealloc") == storage
    assert set(maps.values()) == {"yes"}
    assert {"ringbuf", "perf_event_array", "array+mmapable", "lpm_trie+no_prealloc"} <= maps.keys()
    assert found.transport.startswith("ring buffers")
    points = answers(found.attach_points)
    assert points["kprobe/syscalls"] == points["kretprobe/syscalls"] == _yes(KPROBES)
    assert points["fentry/syscalls"] == typed
    assert (
        points["raw_tp/sched_process_exec"]
        == points["tracepoint/syscalls/sys_exit_openat"]
        == "yes"
    )
    assert points["xdp"] == points["cgroup/sock_release"] == "yes"
    assert found.attach_points["xdp"].reason == "xdp lo:generic"
    assert points.get("tcx/ingress", _yes(kernel_is(6, 6))) == _yes(kernel_is(6, 6))
    assert "unknown" not in points.values()
    assert found.not_asked["net.flow"].startswith("no interface is named: ")
    assert found.not_asked["profile.sample"].startswith("no rate is set: ")
    assert code in (0, 1)


def _yes(there: object) -> str:
    return "yes" if there else "no"


def test_helpers_are_those_of_this_kernel() -> None:
    """By the names in its own BTF: what it does not know is not there for any program."""
    _, found = check()
    for type, helpers in found.helpers.items():
        loads = found.program_types[type].answer == "yes"
        for name, one in helpers.items():
            known = kernel_knows(name.replace("bpf_", "BPF_FUNC_", 1))
            if not loads:
                assert one.answer == "unknown", (type, name)
            elif not known:
                assert one.answer == "no", (type, name)
    assert set(answers(found.helpers["xdp"]).values()) == {"yes"}
    raw = answers(found.helpers["raw_tracepoint"])
    for name in ("bpf_ringbuf_output", "bpf_probe_read_kernel", "bpf_ktime_get_boot_ns"):
        assert raw[name] == "yes"
    # Of helpers that a kernel has, some are not for tracepoints before this version.
    assert raw["bpf_get_current_task_btf"] == _yes(kernel_is(5, 11))


@pytest.mark.every_kernel
def test_it_agrees_with_the_manifest_of_a_run(scope: Scope, tmp_path: Path) -> None:
    """Kind by kind, with everything switched on."""
    config = tmp_path / "everything.toml"
    config.write_text(EVERYTHING)
    code, found = check("--config", str(config))
    agree(found, scope, tmp_path)
    assert found.kinds.keys() == SELECTABLE.keys() - found.not_asked.keys()
    assert {"xdp.counters", "syscall.latency", "file.open"} <= found.kinds.keys()
    assert code == (0 if found.ok else 1)


@pytest.mark.parametrize("held", [("+bpf", "+perfmon"), ("+bpf", "+perfmon", "+net_admin")])
def test_it_agrees_with_a_run_that_has_few_capabilities(
    held: tuple[str, ...], scope: Scope, tmp_path: Path
) -> None:
    (tmp_path / "everything.toml").write_text(EVERYTHING)
    _, found = check("--config", str(tmp_path / "everything.toml"), prefix=rights(*held))
    agree(found, scope, tmp_path, rights(*held))


def test_it_agrees_with_a_run_without_tracefs(scope: Scope, tmp_path: Path) -> None:
    (tmp_path / "everything.toml").write_text(EVERYTHING)
    prefix = no_tracefs(tmp_path / "btf")
    _, found = check("--config", str(tmp_path / "everything.toml"), prefix=prefix)
    (tmp_path / "btf").rmdir()
    agree(found, scope, tmp_path, no_tracefs(tmp_path / "btf"))
    assert found.features["tracefs"].answer == "no"
    assert found.attach_points["tracepoint/syscalls/sys_exit_openat"].answer == "unknown"
    assert found.attach_points["raw_tp/sched_process_exec"].answer == "yes"


def agree(found: CheckReport, scope: Scope, directory: Path, prefix: tuple[str, ...] = ()) -> None:
    """`found` is of what is in EVERYTHING."""
    events = directory / "run"
    events.mkdir()
    selection, _, config = EVERYTHING.lstrip().partition("\n")
    assert selection == 'events = ["*"]'
    with Agent(events, *scope.options, config=config, prefix=prefix, events="*") as agent:
        manifest = agent.stop(check=False).manifest
    words = {"full": "full", "partial": "degraded", "missing": "unavailable"}
    assert {kind: (one.status, one.reason) for kind, one in found.kinds.items()} == {
        kind: (words[one.status], one.reason) for kind, one in manifest.coverage.items()
    }
    said = any(IN_ROOT in one.unseen for one in manifest.coverage.values())
    assert (found.features["cgroup_ids"].answer == "no") == said
    used = {(hook.hook, hook.used) for hook in found.hooks if hook.used}
    assert used == {(p.hook, p.way) for p in manifest.programs if p.status == "attached"}


# ---------------------------------------------------------------- who asks


def test_nobody_is_told_what_is_unknown(public_copy: tuple[str, ...]) -> None:
    """Where BPF is root's alone (kernel.unprivileged_bpf_disabled), and why."""
    who = ("setpriv", "--reuid", str(NOBODY), "--regid", str(NOBODY), "--clear-groups")
    code, found = check(prefix=who, python=public_copy)
    assert code == 3
    assert found.features["btf"].answer == "yes"  # everybody may read it
    assert found.features["bpf"].answer == found.features["jit"].answer == "unknown"
    told = [*found.program_types.values(), *found.map_types.values(), *found.attach_points.values()]
    told += [one for helpers in found.helpers.values() for one in helpers.values()]
    assert len(told) > 100
    assert {one.answer for one in told} == {"unknown"}
    assert all("CAP_BPF" in one.reason for one in told)
    assert set(answers(found.capabilities).values()) == {"no"}
    assert {one.status for one in found.kinds.values()} == {"unavailable"}
    assert all("missing CAP_BPF, CAP_PERFMON" in one.reason for one in found.kinds.values())
    assert found.features["load"].answer == "no"
    assert "missing CAP_BPF, CAP_PERFMON" in found.features["load"].reason
    assert found.settings["user"].value == str(NOBODY)


def test_root_of_a_user_namespace_is_nobody_here() -> None:
    code, found = check(prefix=("unshare", "--user", "--map-root-user"))
    assert code == 3
    assert {one.answer for one in found.program_types.values()} == {"unknown"}
    assert found.capabilities["CAP_BPF"].answer == "no"
    assert "user namespace" in found.capabilities["CAP_BPF"].reason


TRACING = ("raw_tracepoint", "tracepoint", "kprobe", "tracing/trace_raw_tp")


@pytest.mark.parametrize(
    ("held", "tracing", "packets"),
    [
        (("+bpf",), "CAP_PERFMON", "CAP_NET_ADMIN"),
        (("+bpf", "+perfmon"), "", "CAP_NET_ADMIN"),
        (("+bpf", "+net_admin"), "CAP_PERFMON", ""),
        (("+bpf", "+perfmon", "+net_admin"), "", ""),
    ],
)
def test_some_capabilities(held: tuple[str, ...], tracing: str, packets: str) -> None:
    """Which of them is lacking is said of each type of program; maps take CAP_BPF alone."""
    _, found = check(prefix=rights(*held))
    assert found.features["bpf"].answer == found.features["jit"].answer == "yes"
    for type, lacking in [*((one, tracing) for one in TRACING), ("xdp", packets)]:
        one = found.program_types[type]
        assert one.answer == ("unknown" if lacking else "yes"), type
        assert one.reason.endswith(f"it takes {lacking}" if lacking else "")
    assert set(answers(found.map_types).values()) - {"no"} == {"yes"}
    memory = found.features["kernel_memory"]
    assert memory.answer == ("unknown" if tracing else "yes")
    assert found.attach_points["xdp"].answer == "unknown"  # a network of its own takes more
    # A helper that only CAP_PERFMON gets is not taken for one that the kernel lacks.
    for type in ("xdp", "cgroup_sock/cgroup_inet_sock_release"):
        assert "no" not in answers(found.helpers[type]).values()
    assert found.capabilities["CAP_BPF"].answer == "yes"
    assert found.capabilities["CAP_PERFMON"].answer == _yes("+perfmon" in held)


# ---------------------------------------------------------------- kernels that lack something


def test_without_btf_the_rest_is_tried_all_the_same() -> None:
    code, found = check("--events", "*", prefix=NO_BTF)
    assert code == 3
    assert found.features["btf"].answer == "no"
    assert found.program_types["raw_tracepoint"].answer == "yes"
    assert found.attach_points["raw_tp/sched_process_exec"].answer == "yes"
    assert found.map_types["ringbuf"].answer == "yes"
    assert answers(found.map_types) == answers(check()[1].map_types)
    assert found.program_types["tracing/trace_raw_tp"].answer == "unknown"
    assert {one.status for one in found.kinds.values()} == {"unavailable"}


def test_an_interface_that_is_not_there() -> None:
    """Mistyped, and `run` would only warn: here it is said, and in the exit code."""
    code, found = check("--interface", "lo", "--interface", "eth99", "--events", "process.exec")
    assert (code, found.ok) == (1, False)
    assert answers(found.interfaces) == {"lo": "yes", "eth99": "no"}
    assert found.interfaces["eth99"].reason.startswith(
        "there is no such interface here; there are:"
    )
    assert "lo" in found.interfaces["eth99"].reason
    assert found.kinds["process.exec"].status == "full"
    assert found.notes == [
        "interfaces are named, and none of the events asked for is observed at interfaces"
    ]


def test_a_password_that_can_be_read_on_the_way(tmp_path: Path) -> None:
    """Said here, and at the start of `run`, before anything is sent."""
    config = tmp_path / "streamer.toml"
    config.write_text(
        '[[sinks]]\ntype = "mqtt"\nhost = "broker.invalid"\nusername = "u"\npassword_env = "P"\n'
    )
    said = "sinks[0]: without TLS anybody on the way to broker.invalid:1883 can read the password"
    _, found = check("--config", str(config))
    assert [note.startswith(said) for note in found.notes] == [True]
    command = [sys.executable, "-m", "streamer", "run", "--config", str(config), "--duration", "1s"]
    environ = os.environ | {"P": "secret"}
    ran = subprocess.run(
        command, cwd=ROOT, env=environ, capture_output=True, text=True, timeout=seconds(60)
    )
    assert sum(said in line for line in ran.stderr.splitlines()) == 1, ran.stderr


def test_for_people_it_is_eighty_columns_wide() -> None:
    command = [sys.executable, "-m", "streamer", "check", "--events", "*", "--interface", "eth99"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=seconds(120))
    assert (done.returncode, done.stderr) == (1, "")
    lines = done.stdout.splitlines()
    assert [line for line in lines if len(line) > 80 and len(line.split()) > 1] == []
    assert any(line.startswith("xdp.counters      unavailable: ") for line in lines)


@pytest.mark.every_kernel
def test_a_small_limit_of_locked_memory() -> None:
    """It counts before 5.11, where nothing can be told of the kernel then; who may, raises it."""
    small = ("prlimit", "--memlock=0:0", *rights("+bpf", "+perfmon", "+net_admin", "+sys_admin"))
    code, found = check(prefix=small)
    assert found.settings["RLIMIT_MEMLOCK"].value == "0 KiB"
    if kernel_is(5, 11):
        assert found.features["bpf"].answer == "yes"
        return
    assert code == 3
    assert found.features["bpf"].answer == "unknown"
    assert "RLIMIT_MEMLOCK" in found.features["bpf"].reason
    assert set(answers(found.map_types).values()) == {"unknown"}


def test_where_bpf_is_filtered_nothing_is_concluded() -> None:
    """As in a container whose seccomp filter refuses it: that is nothing of the kernel's."""
    code, found = check(prefix=refusing(errno.EPERM))
    assert code == 3
    assert found.features["bpf"].answer == "unknown"
    assert "a seccomp filter" in found.features["bpf"].reason
    assert set(answers(found.program_types).values()) == {"unknown"}
    assert found.settings["seccomp"].value == "filter"
    assert check(prefix=refusing(errno.ENOSYS))[1].features["bpf"].answer == "no"


@pytest.mark.every_kernel
def test_in_lockdown(require_kernel: Require) -> None:
    """In its confidentiality mode no program may read kernel memory: what is said of the kernel
    says so, and so does each kind that cannot do without. The variant `lockdown` runs it.
    """
    lockdown = Path("/sys/kernel/security/lockdown")
    locked = lockdown.exists() and "[confidentiality]" in lockdown.read_text()
    require_kernel(locked, "the kernel is not locked down")
    code, found = check("--events", "*")
    assert found.settings["lockdown"].value == "confidentiality"
    assert found.features["bpf"].answer == "yes"
    assert found.features["kernel_memory"].answer == "no"
    assert found.features["kernel_memory"].reason.startswith("lockdown: ")
    assert found.map_types["ringbuf"].answer == "yes"
    assert found.helpers["raw_tracepoint"]["bpf_ringbuf_output"].answer == "yes"
    assert {kind.status for kind in found.kinds.values()} == {"unavailable"}
    said = "the kernel is locked down (lockdown: confidentiality)"
    assert all(said in kind.reason for kind in found.kinds.values()), found.kinds
    assert code == 3


SYSCTLS = Path("/proc/sys")


@pytest.fixture
def sysctl(require_kernel: Require) -> Iterator[None]:
    """Only where nobody else is on the machine: what is written concerns all of it."""
    require_kernel(IN_GUEST, "settings of the whole machine are changed")
    names = ("net/core/bpf_jit_enable", "net/core/bpf_jit_harden")
    before = {name: (SYSCTLS / name).read_text() for name in names}
    yield
    for name, value in before.items():
        (SYSCTLS / name).write_text(value)


@pytest.mark.every_kernel
@pytest.mark.usefixtures("sysctl")
def test_a_jit_that_hides_constants() -> None:
    (SYSCTLS / "net/core/bpf_jit_harden").write_text("2")
    _, found = check()
    jit = found.features["jit"]
    assert jit.answer == "yes"
    assert "bpf_jit_harden" in jit.reason
    assert found.settings["net.core.bpf_jit_harden"].value == "2"


@pytest.mark.every_kernel
@pytest.mark.usefixtures("sysctl")
def test_without_a_jit() -> None:
    """Debian's kernels have no interpreter: they take no such setting."""
    try:
        (SYSCTLS / "net/core/bpf_jit_enable").write_text("0")
    except OSError:
        assert check()[1].features["jit"].answer == "yes"
    else:
        assert check()[1].features["jit"].answer == "no"


# ---------------------------------------------------------------- nothing is left behind


def programs_left() -> list[int]:
    """Ids of the programs in the kernel that are called as those that are tried are."""
    return [number for number, name in _programs() if name.startswith(tiny.NAME)]


def _programs() -> Iterator[tuple[int, str]]:
    libbpf = ctypes.CDLL("libbpf.so.1", use_errno=True)
    number = ctypes.c_uint32(0)
    while libbpf.bpf_prog_get_next_id(number, ctypes.byref(number)) == 0:
        fd = libbpf.bpf_prog_get_fd_by_id(number)
        if fd < 0:  # it has gone meanwhile
            continue
        info, size = ctypes.create_string_buffer(256), ctypes.c_uint32(256)
        if libbpf.bpf_obj_get_info_by_fd(fd, info, ctypes.byref(size)) == 0:
            yield number.value, info.raw[64:80].rstrip(b"\0").decode()
        os.close(fd)


def await_none_left() -> None:
    """The kernel lets go of a program a little after the last descriptor has been closed."""
    deadline = time.monotonic() + seconds(20)
    while programs_left():
        assert time.monotonic() < deadline, "programs that were tried remain"
        time.sleep(0.05)


def surroundings() -> list[str]:
    """What a check mounts, where this process sees it, and the probes that it could have made."""
    kinds = (" - tracefs ", " - securityfs ", " - sysfs ")
    mounts = Path("/proc/self/mountinfo").read_text().splitlines()
    probes = Path("/sys/kernel/tracing/kprobe_events")
    made = probes.read_text().splitlines() if probes.exists() else []
    return [line for line in mounts if any(kind in line for kind in kinds)] + made


def lasting(mounts: Path) -> list[str]:
    """Without other tests' network namespaces, which go from here too when they are removed."""
    return [line for line in mounts.read_text().splitlines() if " - nsfs " not in line]


UNMOUNT = (
    'for at in /sys/kernel/tracing /sys/kernel/debug/tracing; do while umount "$at" 2>/dev/null'
)
UNMOUNT += '; do :; done; done; cat /proc/self/mountinfo >"$0"; "$@"; code=$?'
UNMOUNT += '; cat /proc/self/mountinfo >"$0.after"; exit $code'


def test_nothing_is_left_behind(tmp_path: Path) -> None:
    """Not even tracefs, where it was not mounted: that is said instead."""
    before = surroundings()
    mounts = tmp_path / "mounts"
    own = ("unshare", "--mount", "sh", "-c", UNMOUNT, str(mounts))
    code, found = check("--events", "*", prefix=own)
    assert code in (0, 1)
    tracefs = found.features["tracefs"]
    assert (tracefs.answer, tracefs.reason) == ("yes", "not mounted now: `streamer run` mounts it")
    assert lasting(mounts) == lasting(Path(f"{mounts}.after"))
    assert "tracefs" not in mounts.read_text()
    assert surroundings() == before
    await_none_left()


def test_one_that_is_killed_leaves_nothing_either() -> None:
    before = surroundings()
    command = [sys.executable, "-m", "streamer", "check", "--json"]
    seen = 0
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + seconds(60)
        while not seen and process.poll() is None and time.monotonic() < deadline:
            seen = len(programs_left())
        process.send_signal(signal.SIGKILL)
    assert seen, "none was ever there"
    await_none_left()
    assert surroundings() == before


def test_a_mistake_is_not_blamed_on_the_kernel(tmp_path: Path) -> None:
    config = tmp_path / "check.toml"
    config.write_text('filters.exes = ["/nowhere"]')
    done = subprocess.run(
        [sys.executable, "-m", "streamer", "check", "-c", str(config)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert f'{config}: filters.exes[0]: found "/nowhere"' in done.stderr
