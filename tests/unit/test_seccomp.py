"""The system-call filters, run by an interpreter of classic BPF, and their numbers."""

from __future__ import annotations

import errno
import fcntl
import os
import re
import struct
import subprocess
import sys
import termios
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamer.errors import PrivilegeError
from streamer.privilege.policies import helper_filter, worker_filter
from streamer.privilege.seccomp import ALWAYS, Condition, Failure, Rule, compile_filter
from streamer.privilege.syscalls import MACHINES, NEWEST, names, number_of
from tests.conftest import Require

ROOT = Path(__file__).resolve().parent.parent.parent
ARCHITECTURES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
I386 = 0x40000003
ALLOW, FAIL = 0x7FFF0000, 0x00050000
EPERM, ENOSYS = FAIL | errno.EPERM, FAIL | errno.ENOSYS
PID, OTHER = 4711, 1
FILTERS: dict[str, Callable[[int, str], bytes]] = {
    "worker": worker_filter,
    "helper": partial(helper_filter, threads=False),
    "looking helper": partial(helper_filter, threads=True),
}


def run(code: bytes, architecture: int, number: int, arguments: tuple[int, ...] = ()) -> int:
    """What a filter returns for a system call."""
    words = (*arguments, *(0 for _ in range(6 - len(arguments))))
    data = struct.pack("<IIQ6Q", number & 0xFFFFFFFF, architecture, 0, *words)
    instructions: list[tuple[int, int, int, int]] = list(struct.iter_unpack("<HBBI", code))
    accumulator, at = 0, 0
    while True:
        operation, if_true, if_false, operand = instructions[at]
        at += 1
        match operation:
            case 0x20:  # BPF_LD | BPF_W | BPF_ABS
                (accumulator,) = struct.unpack_from("<I", data, operand)
            case 0x54:  # BPF_ALU | BPF_AND | BPF_K
                accumulator &= operand
            case 0x15:  # BPF_JMP | BPF_JEQ | BPF_K
                at += if_true if accumulator == operand else if_false
            case 0x25:  # BPF_JMP | BPF_JGT | BPF_K
                at += if_true if accumulator > operand else if_false
            case 0x06:  # BPF_RET | BPF_K
                return operand
            case _:
                raise AssertionError(f"unknown instruction {operation:#x}")


def decide(who: str, machine: str, name: str, *arguments: int) -> int:
    number = number_of(name, machine)
    assert number is not None
    return run(FILTERS[who](PID, machine), ARCHITECTURES[machine], number, arguments)


# ---------------------------------------------------------------- the compiler

LOW = st.integers(0, 8) | st.integers(0, 0xFFFFFFFF)
CONDITIONS = st.builds(
    Condition,
    st.integers(0, 5),
    st.lists(LOW, min_size=1, max_size=4).map(tuple),
    st.sampled_from([0xFFFFFFFF, 0xF, 0x8]),
    st.booleans(),
)
RULES = st.lists(st.lists(CONDITIONS, max_size=3).map(tuple), max_size=3).map(tuple)


def holds(rule: Rule, arguments: tuple[int, ...]) -> bool:
    return any(
        all(
            ((arguments[one.argument] & one.mask) in one.values) != one.but
            for one in alternative
        )
        for alternative in rule
    )  # fmt: skip


@given(
    rules=st.dictionaries(st.sampled_from(names()), RULES, max_size=8),
    name=st.sampled_from(names()),
    arguments=st.tuples(*[LOW] * 6),
    high=st.integers(0, 0xFFFFFFFF),
    machine=st.sampled_from(MACHINES),
)
def test_a_call_is_allowed_when_its_rule_holds(
    rules: dict[str, Rule], name: str, arguments: tuple[int, ...], high: int, machine: str
) -> None:
    """Whatever the upper halves of the arguments are: the kernel does not look at them."""
    code = compile_filter(machine, rules, {})
    number = number_of(name, machine)
    if number is None:
        return
    whole = tuple(argument | high << 32 for argument in arguments)
    expected = ALLOW if name in rules and holds(rules[name], arguments) else EPERM
    assert run(code, ARCHITECTURES[machine], number, whole) == expected


@pytest.mark.parametrize("machine", MACHINES)
def test_other_interfaces_of_the_kernel_are_refused(machine: str) -> None:
    """Where numbers mean something else: 32-bit programs, and x86-64's x32."""
    code = compile_filter(machine, dict.fromkeys(names(), ALWAYS), {})
    own = ARCHITECTURES[machine]
    read = number_of("read", machine)
    assert read is not None
    assert run(code, own, read) == ALLOW
    assert run(code, I386, read) == EPERM
    assert run(code, own, 0x40000000 | read) == EPERM
    assert run(code, own, -1) == EPERM


@pytest.mark.parametrize("machine", MACHINES)
def test_what_is_too_new_is_not_there(machine: str) -> None:
    """So that a newer C library does without; what is known and not allowed is refused."""
    code = compile_filter(machine, {}, {"clone3": Failure(errno.ENOSYS)})
    own = ARCHITECTURES[machine]
    assert run(code, own, NEWEST + 1) == ENOSYS
    assert run(code, own, NEWEST) == EPERM
    assert run(code, own, 435) == ENOSYS


@pytest.mark.parametrize("machine", MACHINES)
def test_a_call_that_fails_in_a_way_of_its_own(machine: str) -> None:
    """Where its conditions hold; elsewhere its rule counts."""
    failure = Failure(errno.ENOENT, (Condition(0, (23,)),))
    code = compile_filter(machine, {"bpf": ALWAYS}, {"bpf": failure})
    number = number_of("bpf", machine)
    assert number is not None
    assert run(code, ARCHITECTURES[machine], number, (23,)) == FAIL | errno.ENOENT
    assert run(code, ARCHITECTURES[machine], number, (5,)) == ALLOW


@pytest.mark.parametrize("machine", MACHINES)
def test_types_of_modules_are_not_there_for_the_helper(machine: str) -> None:
    """It may not list them, and libbpf would take that for a failure."""
    assert decide("helper", machine, "bpf", 23) == FAIL | errno.ENOENT
    assert decide("worker", machine, "bpf", 23) == EPERM


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("who", FILTERS)
def test_a_call_whose_flags_no_filter_sees_is_not_there(who: str, machine: str) -> None:
    """A C library then starts threads by clone."""
    assert decide(who, machine, "clone3") == ENOSYS


def test_an_architecture_without_numbers() -> None:
    with pytest.raises(PrivilegeError, match="s390x"):
        compile_filter("s390x", {}, {})


# ---------------------------------------------------------------- the two policies

SOCKET_TYPE_FLAGS = 0o2000000 | 0o4000  # SOCK_CLOEXEC, SOCK_NONBLOCK
THREAD = 0x3D0F00
FORK = 0x1200011
O_CREAT, O_WRONLY, O_TMPFILE = 0o100, 0o1, 0o20200000

ALLOWED = [
    ("worker", "openat", (0, 0, 0o2000000)),
    ("worker", "openat", (0, 0, O_WRONLY)),
    ("worker", "clone", (THREAD,)),
    ("worker", "kill", (PID, 15)),
    ("worker", "tgkill", (PID, PID + 1, 6)),
    ("worker", "socket", (1, 1 | SOCKET_TYPE_FLAGS, 0)),
    ("worker", "socket", (2, 1 | SOCKET_TYPE_FLAGS, 0)),
    ("worker", "socket", (10, 2, 17)),
    ("worker", "socket", (16, 3, 0)),
    ("worker", "setsockopt", (3, 1, 9)),
    ("worker", "setsockopt", (3, 6, 26)),
    ("worker", "ioctl", (3, 0x5413)),
    ("worker", "ioctl", (3, 0x802C542A)),  # TCGETS2, by which newer C libraries know a terminal
    ("worker", "fcntl", (3, 1030)),
    ("worker", "prlimit64", (0, 7)),
    ("worker", "prlimit64", (PID, 7)),
    ("helper", "openat", (0, 0, O_CREAT | O_WRONLY)),
    ("helper", "bpf", (5,)),
    ("helper", "perf_event_open", ()),
    ("looking helper", "clone", (THREAD,)),
    ("looking helper", "futex", ()),
    ("helper", "ioctl", (3, 0x40042408)),
    ("helper", "sendmsg", (3,)),
    ("helper", "renameat", ()),
    ("helper", "unlinkat", ()),
]
REFUSED = [
    ("worker", "openat", (0, 0, O_CREAT | O_WRONLY)),
    ("worker", "openat", (0, 0, O_TMPFILE | O_WRONLY)),
    ("worker", "clone", (FORK,)),
    ("worker", "clone", (THREAD | 0x10000000,)),  # CLONE_NEWUSER
    ("worker", "clone", (THREAD & ~0x10000,)),
    ("worker", "kill", (OTHER, 0)),
    ("worker", "kill", (0, 15)),
    ("worker", "kill", (0xFFFFFFFF, 15)),
    ("worker", "tgkill", (OTHER, OTHER, 9)),
    ("worker", "socket", (17, 3, 0)),  # AF_PACKET
    ("worker", "socket", (2, 3, 1)),  # SOCK_RAW
    ("worker", "socket", (2, 2, 1)),  # ping
    ("worker", "socket", (16, 3, 15)),  # NETLINK_KOBJECT_UEVENT
    ("worker", "socket", (38, 5, 0)),  # AF_ALG
    ("worker", "setsockopt", (3, 1, 26)),  # SO_ATTACH_FILTER
    ("worker", "setsockopt", (3, 1, 50)),  # SO_ATTACH_BPF
    ("worker", "ioctl", (0, 0x5412)),  # TIOCSTI
    ("worker", "ioctl", (0, 0x541C)),  # TIOCLINUX
    ("worker", "ioctl", (3, 0x40042408)),
    ("worker", "fcntl", (3, 8)),  # F_SETOWN
    ("worker", "prctl", (4, 1)),  # PR_SET_DUMPABLE
    ("worker", "prlimit64", (OTHER, 7)),
    ("worker", "bpf", (5,)),
    ("worker", "perf_event_open", ()),
    ("worker", "renameat", ()),
    ("worker", "unlinkat", ()),
    ("worker", "fchmod", ()),
    ("worker", "seccomp", ()),
    ("helper", "socket", (1, 1, 0)),
    ("helper", "socketpair", (1, 1, 0)),
    ("helper", "connect", ()),
    ("helper", "sendto", ()),
    ("helper", "clone", (THREAD,)),
    ("looking helper", "clone", (FORK,)),
    ("looking helper", "socket", (1, 1, 0)),
    ("looking helper", "kill", (OTHER, 9)),
    ("helper", "clone", (FORK,)),
    ("helper", "kill", (OTHER, 9)),
    ("helper", "ioctl", (0, 0x5412)),
    ("helper", "prctl", (4, 1)),
    ("helper", "memfd_create", ()),
]
"""Neither has execve, ptrace, mount and so on: those have no numbers here to be allowed by."""


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize(("who", "name", "arguments"), ALLOWED)
def test_what_each_may_do(who: str, name: str, arguments: tuple[int, ...], machine: str) -> None:
    assert decide(who, machine, name, *arguments) == ALLOW


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize(("who", "name", "arguments"), REFUSED)
def test_what_each_may_not_do(
    who: str, name: str, arguments: tuple[int, ...], machine: str
) -> None:
    assert decide(who, machine, name, *arguments) == EPERM


# ---------------------------------------------------------------- every value of an argument

IOCTLS = {
    *(termios.TCGETS, termios.TIOCGWINSZ, termios.FIONREAD),
    *(termios.FIONBIO, termios.FIONCLEX, termios.FIOCLEX),
    *(0x8910, 0x8933),  # SIOCGIFNAME, SIOCGIFINDEX
}
FCNTLS = {
    *(fcntl.F_DUPFD, fcntl.F_DUPFD_CLOEXEC, fcntl.F_GETFD, fcntl.F_SETFD),
    *(fcntl.F_GETFL, fcntl.F_SETFL, fcntl.F_GETLK, fcntl.F_SETLK, fcntl.F_SETLKW),
    *(fcntl.F_OFD_GETLK, fcntl.F_OFD_SETLK, fcntl.F_OFD_SETLKW),
    *(1031, 1032),  # F_SETPIPE_SZ, F_GETPIPE_SZ
}
SOL_SOCKET_FILTERS = {26, 50, 51, 52}  # SO_ATTACH_FILTER, _BPF, _REUSEPORT_CBPF, _REUSEPORT_EBPF
INET = {(kind, protocol) for kind in (1, 2) for protocol in (0, 6, 17)}


def decided(who: str, name: str, calls: Iterable[tuple[int, ...]]) -> set[tuple[int, ...]]:
    """Those of the calls that are allowed."""
    code = FILTERS[who](PID, "x86_64")
    number = number_of(name, "x86_64")
    assert number is not None
    return {call for call in calls if run(code, ARCHITECTURES["x86_64"], number, call) == ALLOW}


@pytest.mark.parametrize("who", FILTERS)
def test_every_command_of_a_descriptor(who: str) -> None:
    """By the names of Python's own modules: not TIOCSTI, nor whatever sends signals."""
    commands = [(3, command) for command in (*range(0x600), *range(0x5400, 0x5480))]
    assert decided(who, "fcntl", commands) == {(3, command) for command in FCNTLS}
    commands += [(3, command) for command in (*range(0x8900, 0x8980), *range(0x2400, 0x2410))]
    perf_events = {(3, 0x2400 + n) for n in range(16)} if "helper" in who else set()
    allowed = {(3, command) for command in IOCTLS}
    assert decided(who, "ioctl", commands) == allowed | perf_events
    assert decided(who, "prctl", [(option,) for option in range(80)]) == {(15,), (16,)}


def test_every_socket_of_the_worker() -> None:
    """A client of networks over IP or by a local socket, and questions to the routing tables."""
    kinds = [(kind, protocol) for kind in range(7) for protocol in range(20)]
    allowed = {
        family: {(kind, protocol) for _, kind, protocol in found}
        for family in range(46)
        if (found := decided("worker", "socket", [(family, *one) for one in kinds]))
    }
    assert allowed == {1: set(kinds), 2: INET, 10: INET, 16: {(kind, 0) for kind in range(7)}}
    assert decided("worker", "socketpair", [(family,) for family in range(46)]) == {(1,)}
    options = [(3, level, option) for level in (0, 1, 6, 41) for option in range(80)]
    refused = {(3, 1, option) for option in SOL_SOCKET_FILTERS}
    assert decided("worker", "setsockopt", options) == set(options) - refused


def test_every_flag_of_a_new_thread() -> None:
    """None that makes a process, a namespace, or something that is traced."""
    bits = [1 << bit for bit in range(32)]
    assert decided("worker", "clone", [(THREAD ^ bit,) for bit in bits]) == {
        (THREAD ^ bit,) for bit in bits if bit & 0x7D0F00 and bit != 0x10000
    }
    flags = [(0, 0, bit) for bit in bits]
    assert set(flags) - decided("worker", "openat", flags) == {(0, 0, 0o100), (0, 0, 0o20000000)}
    assert decided("worker", "openat", flags) == {
        (0, 0, flag) for _, flag in decided("worker", "open", [(0, bit) for bit in bits])
    }


NEVER = """
execve execveat fork vfork ptrace process_vm_readv process_vm_writev process_madvise kcmp
pidfd_open pidfd_getfd pidfd_send_signal tkill rt_sigqueueinfo rt_tgsigqueueinfo
mount umount2 pivot_root chroot setns unshare open_tree move_mount fsopen fsmount fspick
mount_setattr io_uring_setup io_uring_enter io_uring_register open_by_handle_at name_to_handle_at
keyctl add_key request_key init_module finit_module delete_module kexec_load kexec_file_load
reboot userfaultfd fanotify_init setuid setreuid setresuid setgid setregid setresgid setgroups
setfsuid setfsgid capset personality acct swapon swapoff quotactl syslog iopl ioperm
settimeofday clock_settime adjtimex clock_adjtime chown fchown lchown fchownat chmod fchmodat
link linkat symlink symlinkat mknod mknodat mkdir mkdirat rmdir truncate
listen accept accept4 setpriority sched_setscheduler sched_setaffinity timer_create openat2
"""
HEADERS = {
    "x86_64": Path("/usr/include/x86_64-linux-gnu/asm/unistd_64.h"),
    "aarch64": Path("/usr/include/asm-generic/unistd.h"),
}


def header_numbers(machine: str, require: Require) -> dict[str, int]:
    """Every system call of an architecture, from the kernel's headers."""
    require(HEADERS[machine].exists(), f"no kernel headers for {machine} on this machine")
    text = HEADERS[machine].read_text()
    found = re.findall(r"^#define\s+__NR(?:3264)?_(\w+)\s+(\d+)\s*$", text, re.M)
    numbers = {name: int(number) for name, number in found}
    if "fstatat" in numbers:  # the name of the one number that 32 and 64 bits share
        numbers["newfstatat"] = numbers["fstatat"]
    return numbers


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("who", FILTERS)
def test_what_neither_may_do(who: str, machine: str, require: Require) -> None:
    """By the numbers of the kernel's own headers, not ours."""
    code = FILTERS[who](PID, machine)
    numbers = header_numbers(machine, require)
    tested = [numbers[name] for name in NEVER.split() if name in numbers]
    assert len(tested) > 70
    for number in tested:
        assert run(code, ARCHITECTURES[machine], number) == EPERM


@pytest.mark.parametrize("machine", MACHINES)
def test_who_answers_may_take_connections_and_not_listen(machine: str, require: Require) -> None:
    numbers = header_numbers(machine, require)
    code = worker_filter(PID, machine, answers=True)
    decided = {
        name: run(code, ARCHITECTURES[machine], numbers[name])
        for name in NEVER.split()
        if name in numbers
    }
    assert {name for name, result in decided.items() if result == ALLOW} == {"accept4"}


@pytest.mark.parametrize("machine", MACHINES)
def test_numbers_are_those_of_the_headers(machine: str, require: Require) -> None:
    numbers = header_numbers(machine, require)
    assert {name: number_of(name, machine) for name in names()} == {
        name: numbers.get(name) for name in names()
    }
    assert max(numbers.values()) >= NEWEST


# ---------------------------------------------------------------- installed

INSTALLED = """
import ctypes, errno, os, socket, sys, threading
from streamer.privilege import seccomp
from streamer.kernel import capabilities
from streamer.privilege.policies import worker_filter
ready, go = threading.Event(), threading.Event()
results = []
def attempt():
    try:
        os.execv("/bin/true", ["true"])
    except OSError as error:
        results.append(error.errno)
def early():
    ready.set(); go.wait(); attempt()
thread = threading.Thread(target=early); thread.start(); ready.wait()
capabilities.forgo_gains()
seccomp.install(worker_filter(os.getpid(), os.uname().machine))
go.set(); thread.join()
late = threading.Thread(target=attempt); late.start(); late.join()
attempt()
print(results, os.uname().sysname, socket.socketpair()[0].family.name)
"""


def test_every_thread_is_under_an_installed_filter() -> None:
    """One that runs already, one started later, and the one that installs it."""
    done = subprocess.run(
        [sys.executable, "-c", INSTALLED], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"{[errno.EPERM] * 3} {os.uname().sysname} AF_UNIX\n"


DIVERGED = """
import ctypes, os, threading
from streamer.errors import PrivilegeError
from streamer.kernel import capabilities
from streamer.privilege import seccomp
from streamer.privilege.policies import worker_filter
code = worker_filter(os.getpid(), os.uname().machine)
capabilities.forgo_gains()
ready, go = threading.Event(), threading.Event()
def alone():
    libc = ctypes.CDLL(None)
    program = seccomp._FilterProgram(len(code) // 8, code)
    assert libc.prctl(22, 2, ctypes.byref(program)) == 0  # PR_SET_SECCOMP, this thread's
    ready.set(); go.wait()
thread = threading.Thread(target=alone); thread.start(); ready.wait()
try:
    seccomp.install(code)
except PrivilegeError as error:
    print(str(error).replace(str(thread.native_id), "N"))
go.set(); thread.join()
"""


def test_a_thread_that_is_not_reached_is_an_error() -> None:
    """One with a filter of its own would stay outside: then nobody may go on."""
    done = subprocess.run(
        [sys.executable, "-c", DIVERGED], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "cannot put thread N under a system-call filter\n"
