"""Which system calls each of the two processes may make.

Both lists are closed: a new library or a new feature may need one more, and then finds EPERM.
"""

from __future__ import annotations

import errno

from streamer.privilege.seccomp import ALWAYS, Condition, Failure, Rule, compile_filter

_CLONE_THREAD = 0x10000
# VM, FS, FILES, SIGHAND, THREAD, SYSVSEM, SETTLS, PARENT_SETTID, CHILD_CLEARTID, DETACHED.
_CLONE_OF_A_THREAD = 0x7D0F00
_O_CREAT, _O_TMPFILE = 0o100, 0o20000000
_AF_UNIX, _AF_INET, _AF_INET6, _AF_NETLINK = 1, 2, 10, 16
_STREAM, _DATAGRAM, _TYPE_MASK = 1, 2, 0xF
_IPPROTO_ANY, _IPPROTO_TCP, _IPPROTO_UDP, _NETLINK_ROUTE = 0, 6, 17, 0
_SOL_SOCKET = 1
_ATTACH_FILTERS = (26, 50, 51, 52)  # SO_ATTACH_FILTER, _BPF, _REUSEPORT_CBPF, _REUSEPORT_EBPF
_NAME_OF_THREAD = (15, 16)  # PR_SET_NAME, PR_GET_NAME
# Duplicate, descriptor and status flags, locks, size of a pipe. Not those that send signals.
_FCNTL = (0, 1, 2, 3, 4, 5, 6, 7, 36, 37, 38, 1030, 1031, 1032)
# TCGETS, TIOCGWINSZ, FIONREAD, FIONBIO, FIONCLEX, FIOCLEX, SIOCGIFNAME, SIOCGIFINDEX, TCGETS2.
# Not TIOCSTI, with which one types into the shell that the process was started from.
_IOCTL = (0x5401, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451, 0x8910, 0x8933, 0x802C542A)
_PERF_EVENT_IOCTL, _IOCTL_TYPE = 0x2400, 0xFF00

_BTF_GET_NEXT_ID = 23

# The C library then starts threads with clone, whose flags a filter can see.
_NO_CLONE3 = {"clone3": Failure(errno.ENOSYS)}
# To list the types of modules takes CAP_SYS_ADMIN. libbpf does it when it finds something nowhere
# else, and takes being refused for a failure of all that it loads: like this there are none.
_NO_MODULE_TYPES = {"bpf": Failure(errno.ENOENT, (Condition(0, (_BTF_GET_NEXT_ID,)),))}

_HOT = """
read write readv writev recvmsg sendmsg recvfrom sendto epoll_wait epoll_pwait futex
clock_gettime gettimeofday
"""

_COMMON = """
pread64 close fstat newfstatat stat lstat statx lseek poll ppoll select pselect6 mmap mprotect
munmap mremap madvise brk rt_sigaction rt_sigprocmask rt_sigreturn rt_sigtimedwait sigaltstack
access faccessat faccessat2 readlink readlinkat dup dup2 dup3 pipe2 getcwd getdents64 getpid gettid
getppid getuid geteuid getgid getegid getresuid getresgid getgroups getpgrp getpgid getsid uname
sysinfo getrandom clock_getres clock_nanosleep nanosleep time times getrusage getrlimit
set_robust_list rseq set_tid_address exit exit_group wait4 waitid sched_yield sched_getaffinity
restart_syscall membarrier arch_prctl statfs fstatfs capget getcpu
"""

_WORKER = """
epoll_create1 epoll_ctl epoll_pwait2 eventfd2 connect bind getsockname getpeername getsockopt
sendmmsg recvmmsg shutdown memfd_create ftruncate fsync fdatasync pwrite64
"""

_HELPER = "bpf perf_event_open open openat rename renameat renameat2 unlink unlinkat fchmod"
_HELPER_HOT = "recvmsg sendmsg read write"
_THREADS: Rule = (
    (
        Condition(0, (_CLONE_THREAD,), _CLONE_THREAD),
        Condition(0, (0,), 0xFFFFFFFF & ~_CLONE_OF_A_THREAD),
    ),
)


def worker_filter(pid: int, machine: str, *, answers: bool = False) -> bytes:
    """The filter of the process that reads rings and talks to brokers, whose pid is `pid`.

    It may open files that are there, be a client of networks, and start threads. If it `answers`
    at sockets that listened before, it may take their connections. It cannot listen itself, make
    files, start processes, or touch another one.
    """
    allowed = _listed(_HOT) | _listed(_COMMON) | _listed(_WORKER) | _own(pid)
    if answers:
        allowed["accept4"] = ALWAYS
    new_file = _O_CREAT | _O_TMPFILE
    allowed |= {
        "open": ((Condition(1, (0,), new_file),),),
        "openat": ((Condition(2, (0,), new_file),),),
        "clone": _THREADS,
        "ioctl": ((Condition(1, _IOCTL),),),
        "socket": (
            (Condition(0, (_AF_UNIX,)),),
            (
                Condition(0, (_AF_INET, _AF_INET6)),
                Condition(1, (_STREAM, _DATAGRAM), _TYPE_MASK),
                Condition(2, (_IPPROTO_ANY, _IPPROTO_TCP, _IPPROTO_UDP)),
            ),
            (Condition(0, (_AF_NETLINK,)), Condition(2, (_NETLINK_ROUTE,))),
        ),
        "socketpair": ((Condition(0, (_AF_UNIX,)),),),
        "setsockopt": (
            (Condition(1, (_SOL_SOCKET,), but=True),),
            (Condition(2, _ATTACH_FILTERS, but=True),),
        ),
    }
    return compile_filter(machine, allowed, _NO_CLONE3)


def helper_filter(pid: int, machine: str, *, threads: bool) -> bytes:
    """The filter of the privileged helper, whose pid is `pid`.

    It may open files and use BPF, and start threads if `threads` says so. It cannot open a socket,
    start a process, or touch another one.
    """
    allowed = _listed(_HELPER_HOT) | _listed(_COMMON) | _listed(_HELPER) | _own(pid)
    allowed["ioctl"] = (
        (Condition(1, _IOCTL),),
        (Condition(1, (_PERF_EVENT_IOCTL,), _IOCTL_TYPE),),
    )
    if threads:
        allowed |= {"clone": _THREADS, "futex": ALWAYS}
    return compile_filter(machine, allowed, _NO_CLONE3 | _NO_MODULE_TYPES)


def _listed(names: str) -> dict[str, Rule]:
    return dict.fromkeys(names.split(), ALWAYS)


def _own(pid: int) -> dict[str, Rule]:
    """What a process may do with itself alone."""
    return {
        "fcntl": ((Condition(1, _FCNTL),),),
        "prctl": ((Condition(0, _NAME_OF_THREAD),),),
        "prlimit64": ((Condition(0, (0, pid)),),),
        "kill": ((Condition(0, (pid,)),),),
        "tgkill": ((Condition(0, (pid,)),),),
    }
