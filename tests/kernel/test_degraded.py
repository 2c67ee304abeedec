"""Kernels that lack something: what is lost is said with its reason, and the rest runs."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from streamer.config.settings import Kernel, Settings
from streamer.errors import ContractError, KernelError
from streamer.events.kinds import KINDS
from streamer.kernel import state
from streamer.kernel.loader import OBJECTS, Loader
from streamer.kernel.state import KindStatus
from streamer.kernel.targets import without_target
from tests.bpf_variant import Change, Variant
from tests.kernel.agent import ROOT, Agent
from tests.kernel.live import Live
from tests.kernel.pace import seconds
from tests.kernel.scope import Scope
from tests.kernel.system import BTF, kernel_knows, open_missing, preempts_tracepoints

pytestmark = pytest.mark.kernel

ALL_KINDS = frozenset(KINDS) - without_target(Kernel()).keys()
"""Those that need nothing named that they are observed at."""
VARYING = frozenset({"net.drop", "net.udp"})
"""What kernels let be observed more or less of: see docs/tracepoint_net.md."""
HIDDEN = "mount -t tmpfs none /sys/kernel/btf; "
# Nor headers, if this kernel's are installed.
HIDDEN += "for place in /lib/modules /usr/src /run/streamer; do"
HIDDEN += ' if [ -d $place ]; then mount -t tmpfs none $place; fi; done; exec "$@"'
NO_BTF = ("unshare", "--mount", "sh", "-ec", HIDDEN, "sh")
# Without a directory to mount it on, tracefs cannot be mounted either.
NO_TRACEFS_SCRIPT = """
mount --bind /sys/kernel/btf "$0"
mount -t tmpfs none /sys/kernel
mkdir /sys/kernel/btf
mount --bind "$0" /sys/kernel/btf
exec "$@"
"""


def no_tracefs(directory: Path) -> tuple[str, ...]:
    """What to put before a command that is to find no tracefs. The directory is made."""
    directory.mkdir()
    return "unshare", "--mount", "sh", "-ec", NO_TRACEFS_SCRIPT, str(directory)


def streamer(prefix: tuple[str, ...], *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [*prefix, sys.executable, "-m", "streamer", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=seconds(60))


# ---------------------------------------------------------------- no BTF


def test_without_btf(tmp_path: Path) -> None:
    """Nothing can be observed: one line says why, and what to do."""
    ended = streamer(NO_BTF, "run", "--sink", f"file:{tmp_path}/events")
    assert (ended.returncode, ended.stdout) == (3, "")
    (line,) = ended.stderr.splitlines()
    assert line.startswith("streamer: no BTF: /sys/kernel/btf/vmlinux is missing")
    assert "btf = PATH" in line


def test_check_without_btf() -> None:
    ended = streamer(NO_BTF, "check", "--json", "--events", "*")
    assert ended.returncode == 3
    found = json.loads(ended.stdout)
    assert found["features"]["btf"]["answer"] == "no"
    assert found["types"].startswith("none; no BTF")
    assert found["kinds"].keys() == ALL_KINDS
    for kind in found["kinds"].values():
        assert kind["status"] == "unavailable"
        assert kind["reason"].startswith("no BTF")


def test_a_btf_file_instead_of_the_kernels(scope: Scope, tmp_path: Path) -> None:
    """The same BTF, as a file that the configuration names."""
    shutil.copyfile(BTF, tmp_path / "vmlinux")
    config = f'btf = "{tmp_path}/vmlinux"\n'
    config += "[kernel]\nopen_latency = true\n"
    with Agent(tmp_path, *scope.options, config=config, prefix=NO_BTF) as agent:
        scope.act(open_missing, "/no/", 10)
        recording = agent.stop()
    assert [event.path for event in recording.events] == [f"/no/{i}" for i in range(10)]
    assert {event.latency_ns for event in recording.of("file.open")} == {0}
    coverage = recording.manifest.coverage
    lacking = {name for name, kind in coverage.items() if kind.status != "full"} - VARYING
    # Only the kernel's own lets what was missed of a socket be found out when that is destroyed,
    # the start of a call be kept with its task, and a new process be found without a program that
    # others can keep from running.
    assert "latencies of openat() are not observed" in coverage["file.open"].reason
    lacking -= {"file.open"}
    expected = {"net.connect", "net.close"} if kernel_knows("bpf_preempt_disable") else set()
    for kind in expected:
        assert "changes that both programs" in coverage[kind].reason
    if preempts_tracepoints():
        expected |= {"process.exec", "process.fork"}
    assert lacking == expected


def test_registers_where_nobody_looks_for_them(
    scope: Scope, tmp_path: Path, variant: Callable[[Mapping[str, Change]], Variant]
) -> None:
    """Such as with stacks of another size than is looked for: no argument is guessed at."""
    made = variant({"core.bpf.c": ("return number == bpf", "return number == -bpf")})
    shutil.copyfile(BTF, tmp_path / "vmlinux")
    settings = Settings(btf=str(tmp_path / "vmlinux"))
    with pytest.raises(KernelError, match="registers of system calls was not found"):
        Live(scope, {"file.open"}, settings, str(made.objects))


# ---------------------------------------------------------------- no BPF


def refusing(error: int) -> tuple[str, ...]:
    """What to put before a command whose bpf() is to fail."""
    return sys.executable, "-m", "tests.kernel.without_bpf", str(error)


@pytest.mark.parametrize(
    ("error", "words"), [(errno.ENOSYS, "CONFIG_BPF_SYSCALL"), (errno.EPERM, "lockdown")]
)
def test_without_bpf(tmp_path: Path, error: int, words: str) -> None:
    """One line says so, and `check` says it of every kind."""
    ended = streamer(refusing(error), "run", "--sink", f"file:{tmp_path}/events")
    assert (ended.returncode, ended.stdout) == (3, "")
    (line,) = ended.stderr.splitlines()
    reason = line.removeprefix("streamer: ")
    assert words in reason
    checked = streamer(refusing(error), "check", "--json")
    assert checked.returncode == 3
    states = json.loads(checked.stdout)["kinds"].values()
    assert {(state["status"], state["reason"]) for state in states} == {("unavailable", reason)}


# ---------------------------------------------------------------- no tracefs


def connect_and_run(target: tuple[str, int]) -> None:
    socket.create_connection(target).close()
    os.waitpid(os.posix_spawn("/bin/true", ["true"], {}), 0)
    open_missing("/no/", 10)


@pytest.fixture(scope="module")
def at_functions() -> bool:
    """Whether programs at functions load, so that nothing needs a tracepoint of system calls."""
    loader = Loader()
    loader.load_core({"critical": 4096, "bulk": 4096}, None)
    loader.close()
    return not loader.no_functions


PROCESSES = ("process.exec", "process.fork", "process.exit")
WITHOUT_TRACEFS = {"file.open": "missing", "net.accept": "missing"}
WITHOUT_TRACEFS |= {"net.close": "partial", "net.connect": "partial"}
WITHOUT_TRACEFS |= {"net.bind": "missing", "net.listen": "missing", "net.retransmit": "partial"}


@pytest.mark.every_kernel
def test_without_tracefs(scope: Scope, tmp_path: Path, at_functions: bool) -> None:
    """What needs no system-call tracepoint goes on; the manifest and the log name the rest."""
    prefix = no_tracefs(tmp_path / "btf")
    with (
        socket.create_server(("127.0.0.1", 0)) as listener,
        Agent(tmp_path, *scope.options, prefix=prefix) as agent,
    ):
        scope.act(connect_and_run, listener.getsockname())
        recording = agent.stop()
    kinds = recording.manifest.coverage
    lost = {} if at_functions else WITHOUT_TRACEFS
    less = dict.fromkeys(PROCESSES, "partial") if preempts_tracepoints() else {}
    expected = dict.fromkeys(ALL_KINDS - VARYING, "full") | lost | less
    found = {name: kind.status for name, kind in kinds.items() if name not in VARYING}
    assert found == expected
    for name in lost:
        assert "tracefs is not mounted and cannot be" in kinds[name].reason
        assert f"streamer: {name} is " in agent.stderr
    assert all("is preempted in the program" in kinds[name].reason for name in less)
    happened = {type(event).__name__ for event in recording.events}
    assert {"NetConnect", "ProcessExec", "ProcessExit", "ProcessFork"} <= happened
    assert ("FileOpen" in happened) == ("file.open" not in lost)
    assert "NetAccept" not in happened  # nobody accepts


def test_check_without_tracefs(tmp_path: Path, at_functions: bool) -> None:
    ended = streamer(no_tracefs(tmp_path / "btf"), "check", "--json", "--events", "*")
    found = json.loads(ended.stdout)
    there = found["features"]["tracefs"]
    assert there["answer"] == "no"
    assert there["reason"].startswith("tracefs is not mounted and cannot be")
    opens = "full" if at_functions else "unavailable"
    assert found["kinds"]["file.open"]["status"] == opens
    execs = "degraded" if preempts_tracepoints() else "full"
    assert found["kinds"]["process.exec"]["status"] == execs


# ---------------------------------------------------------------- other programs


def whole(kinds: Mapping[str, KindStatus]) -> bool:
    """Whether they are observed in full, as far as any kernel lets them be."""
    return {one.status for kind, one in kinds.items() if kind not in VARYING} == {"full"}


def coverage_of(directory: Path) -> tuple[dict[str, KindStatus], dict[str, str]]:
    """Coverage of every kind, and why programs failed, with the objects in `directory`."""
    loaded = state.load(Settings(), ALL_KINDS, directory=str(directory))
    try:
        loaded.attach()
        attached = {s.hook for s in loaded.statuses if s.status == "attached"}
        failed = {s.name: s.reason for s in loaded.statuses if s.status == "failed"}
        lost = {s.name for s in loaded.statuses if s.hook not in attached}
        return loaded.coverage(ALL_KINDS), {name: failed[name] for name in lost}
    finally:
        loaded.close()


OPENAT9 = """
SEC("fexit/" SYSTEM_CALL(openat9)) HOOK("openat2") EMITS("file.open") DOC("opens by openat2()")
int BPF_PROG(on_openat2, struct pt_regs___user *registers, long result)
{
	return opened(ctx, result, registers, CALL_OPENAT2);
}

SEC("tracepoint/syscalls/sys_exit_openat9") HOOK("openat2") EMITS("file.open")
DOC("opens by openat2()")
int on_openat2_exit(struct trace_event_raw_sys_exit *ctx)
{
	return opened(ctx, ctx->ret, user_registers(), CALL_OPENAT2);
}
"""


def test_a_missing_tracepoint(variant: Callable[..., Variant]) -> None:
    """Of openat2 alone: other opens are still observed."""
    made = variant({"file.bpf.c": ("ON_OPEN(openat2, CALL_OPENAT2, )", OPENAT9)})
    kinds, failed = coverage_of(made.objects)
    assert failed.keys() == {"on_openat2", "on_openat2_exit"}
    why = "this kernel has no tracepoint/syscalls/sys_exit_openat9"
    assert failed["on_openat2_exit"] == why
    reason = f"{why}, so opens by openat2() are not observed"
    assert kinds.pop("file.open") == KindStatus("partial", reason)
    assert whole(kinds)


def forks_failed(failed: Mapping[str, str]) -> str:
    """Why forks are not observed, if nothing else failed: each way to them, as there are here."""
    better = {"on_fork_unpreempted", "on_fork_preemptible"} if preempts_tracepoints() else set()
    assert failed.keys() == {"on_fork"} | better
    return failed["on_fork"]


def test_a_missing_tracepoint_of_a_kind(variant: Callable[..., Variant]) -> None:
    """The only place of a kind: the kind is missing, others are not."""
    changes = [
        (f'{way}/sched_process_fork"', f'{way}/sched_process_fork9"')
        for way in ("tracepoint/sched", "raw_tp", "raw_tp")
    ]
    kinds, failed = coverage_of(variant({"process.bpf.c": changes}).objects)
    reason = forks_failed(failed)
    assert reason == "this kernel has no raw_tp/sched_process_fork9"
    assert kinds.pop("process.fork").status == "missing"
    assert whole(kinds)


FORK = """	struct namespaced_pid inner;
	int child_pid;
"""
BAD = "	bpf_probe_read_kernel(&base, sizeof(base) + 4096, child);\n"


def test_a_program_that_the_verifier_refuses(variant: Callable[..., Variant]) -> None:
    """What the verifier says reaches the user, with the program's name; the rest is attached."""
    made = variant({"process.bpf.c": (FORK, FORK + BAD)})
    kinds, failed = coverage_of(made.objects)
    reason = forks_failed(failed)
    assert re.fullmatch(r"on_fork does not load: [\w ]+: .*stack.*", reason)
    assert kinds.pop("process.fork").status == "missing"
    assert whole(kinds)


def test_a_program_that_the_object_has_not(variant: Callable[..., Variant]) -> None:
    changes = [
        ("int on_fork_unpreempted(", "int on_knife("),
        ("BPF_PROG(on_fork_preemptible, ", "BPF_PROG(on_ladle, "),
        ("BPF_PROG(on_fork, ", "BPF_PROG(on_spoon, "),
    ]
    kinds, failed = coverage_of(variant({"process.bpf.c": changes}).objects)
    assert forks_failed(failed) == "the object has no such program"
    assert kinds.pop("process.fork").status == "missing"
    assert whole(kinds)


@pytest.fixture(scope="module")
def other_contract(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Objects of core and net, in whose contract a struct has one field more than in ours."""
    field = "	__u32 child_pid PID DOC("
    changes: dict[str, Change] = {"events.h": (field, '	__u32 child_age DOC("age");\n' + field)}
    return Variant(tmp_path_factory.mktemp("other") / "variant", changes, ("core", "net")).objects


def test_an_object_of_another_contract(other_contract: Path) -> None:
    """It is refused before anything is loaded, and the message names object, struct and field."""
    message = r"core\.bpf\.o: .*process_fork: .*child_age at 112 \(4 bytes\)"
    with pytest.raises(ContractError, match=message):
        state.load(Settings(), ALL_KINDS, directory=str(other_contract))


def test_a_sensor_of_another_contract(other_contract: Path, tmp_path: Path) -> None:
    """One left over from another version: it takes its own kinds with it, and is named."""
    mixed = tmp_path / "mixed"
    shutil.copytree(OBJECTS, mixed)
    shutil.copy(other_contract / "net.bpf.o", mixed)
    kinds, failed = coverage_of(mixed)
    (reason,) = set(failed.values())
    assert re.search(r"net\.bpf\.o: .*process_fork: .*child_age", reason)
    lost = {kind for kind, one in kinds.items() if one == KindStatus("missing", reason)}
    assert lost == {"net.accept", "net.close", "net.connect"}
    for kind in ("net.retransmit", "net.dns"):
        ownerless = kinds.pop(kind)
        assert ownerless.status == "partial"
        assert reason in ownerless.reason
    assert whole({kind: one for kind, one in kinds.items() if kind not in lost})
    with pytest.raises(KernelError, match=r"net\.bpf\.o: "):
        state.load(Settings(), lost, directory=str(mixed))


def test_a_sensor_that_is_missing(tmp_path: Path) -> None:
    """Likewise."""
    shutil.copytree(OBJECTS, tmp_path / "some")
    (tmp_path / "some" / "file.bpf.o").unlink()
    kinds, _failed = coverage_of(tmp_path / "some")
    assert "some/file.bpf.o" in kinds["file.open"].reason
    assert kinds.pop("file.open").status == "missing"
    assert whole(kinds)


def test_no_object_at_all(tmp_path: Path) -> None:
    with pytest.raises(ContractError, match=f"{tmp_path}/core.bpf.o"):
        state.load(Settings(), ALL_KINDS, directory=str(tmp_path))


def test_a_btf_file_that_is_not_there() -> None:
    with pytest.raises(KernelError, match="btf: no such file: /no/btf"):
        state.load(Settings(btf="/no/btf"), ALL_KINDS)


def test_a_btf_file_that_is_none(tmp_path: Path) -> None:
    """One line, and not what libbpf makes of it."""
    (tmp_path / "btf").write_bytes(b"nonsense")
    with pytest.raises(KernelError, match=f"btf: {tmp_path}/btf holds no BTF"):
        state.load(Settings(btf=str(tmp_path / "btf")), ALL_KINDS)
