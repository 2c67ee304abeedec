"""The layouts of kernel types out of the headers of the running kernel, with bcc as the compiler.

Headers of another kernel compile as well, and the programs then read garbage: those that are not
exactly of this kernel are refused. So are those that anybody but root could have changed, before
anything of them is read.
"""

from __future__ import annotations

import gzip
import json
import os
import platform
import re
import resource
import select
import signal
import stat
import subprocess
import time
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from typing import Any, BinaryIO, NamedTuple

from streamer.kernel import capabilities

COMPILER = os.path.join(os.path.dirname(__file__), "compiled.py")
PYTHON = "/usr/bin/python3"
"""The system's, which bcc is a package of."""
PLACES = (
    *("/lib/modules/{release}/build", "/usr/src/linux-headers-{release}"),
    "/usr/src/kernels/{release}",
)
"""Where the headers of the running kernel are looked for."""
CONFIGS = ("/proc/config.gz", "/boot/config-{release}", "/lib/modules/{release}/config")
COMPILE_SECONDS = 600.0
"""Two on a machine; an emulated one takes a hundred times as long."""
_MEMORY = 4 << 30
MOST_ANSWER = 64 << 20
MOST_READ = 16 << 20
"""Bytes of a file that is read here; the largest there are have 0.3 million."""
_MOST_LINKS = 40
_ARCHITECTURES = {"x86_64": "x86", "aarch64": "arm64"}
_AUTOCONF = "include/generated/autoconf.h"
_KCONFIG = "include/linux/kconfig.h"
_INCLUDED = re.compile(r"^include (/\S+)/Makefile$", re.MULTILINE)
_DEFINED = re.compile(r"^#define\s+(\w+)\s+(.*?)\s*$", re.MULTILINE)
_SET = re.compile(r"^(?:(CONFIG_\w+)=(.*)|# (CONFIG_\w+) is not set)$", re.MULTILINE)
# Of no consequence to a type: where the keys were, and how a number is written.
_OF_NO_MATTER = re.compile(r"CONFIG_(MODULE_SIG|SYSTEM_|BUILD_SALT|LOCALVERSION)")
_SWITCH = re.compile(r"[ymn]")

# Private structs are in a whole source tree only. What bcc brings itself stays out: it has the user
# interface of another version, and no need of it.
_TEXT = """
#undef _UAPI__LINUX_BPF_H__
#define BCC_SEC(name) __attribute__((section(name), used))
{includes}
#if __has_include(<trace/events/syscalls.h>)
#undef TRACE_EVENT_FN
#undef TRACE_EVENT_SYSCALL
#undef TP_PROTO
#undef TP_ARGS
#undef TP_STRUCT__entry
#undef __field
#undef __array
#define TP_STRUCT__entry(members...) members
#define __field(type, name) type name;
#define __array(type, name, count) type name[count];
#define TRACE_EVENT_FN(name, proto, args, members, ...) \\
	struct trace_event_raw_##name {{ struct trace_entry ent; members char __data[0]; }};
#define TRACE_EVENT_SYSCALL TRACE_EVENT_FN
#define TRACE_HEADER_MULTI_READ
#include <trace/events/syscalls.h>
#endif
struct streamer_wanted {{
{members}}};
int streamer_holder(void *ctx)
{{
	struct streamer_wanted wanted = {{}};

	return wanted.type_0 != 0;
}}
"""
_PRIVATE = "fs/mount.h"
_INCLUDES = (
    *("linux/bpf.h", "linux/sched.h", "linux/sched/signal.h", "linux/sched/task.h"),
    *("linux/mm_types.h", "linux/fs.h", "linux/fs_struct.h", "linux/fdtable.h", "linux/dcache.h"),
    *("linux/mount.h", "linux/path.h", "linux/binfmts.h", "linux/cred.h", "linux/nsproxy.h"),
    *("linux/pid_namespace.h", "linux/pid.h", "linux/cgroup-defs.h", "linux/kernfs.h"),
    "linux/user_namespace.h",
    *("linux/ns_common.h", "linux/netdevice.h", "linux/skbuff.h", "linux/socket.h", "linux/net.h"),
    *("linux/tcp.h", "net/sock.h", "net/inet_sock.h", "net/inet_connection_sock.h", "net/tcp.h"),
    *("net/request_sock.h", "net/net_namespace.h", "net/dropreason.h", "net/dropreason-core.h"),
    *("linux/trace_events.h", "linux/tracepoint.h", "asm/ptrace.h", f"../{_PRIVATE}"),
)


class Refused(Exception):
    """Why there are no layouts to be had from headers; the message is for people."""


class Tree(NamedTuple):
    """A directory of headers: `build` has what was generated, and `source` the rest."""

    build: str
    source: str


def layouts(given: str, types: Iterable[str]) -> dict[str, Any]:
    """What `compiled.py` answers for `types`, such as `struct task_struct`.

    `given` is a directory of headers, or `auto`: where those of the running kernel use to be. The
    answer has the directory, too, as `tree`.

    Raises:
        Refused: no headers, of another kernel, that others can write to, or no bcc.
    """
    uname = os.uname()
    machine = platform.machine()
    tree = find_tree(given, uname.release)
    check_tree(tree, machine)
    check_match(tree, uname.release, uname.version)
    wanted = [name.split(" ", 1) for name in types]
    request = {
        "text": text_for(types),
        "flags": flags_for(tree, machine),
        "source": tree.source,
        "types": wanted,
    }
    answer = compiled(request, tree.source)
    if "error" in answer:
        raise Refused(f"{tree.build}: {answer['error']}")
    check_owners(answer["files"])  # should it have found its way to others than those
    return {**answer, "tree": tree.build}


# ---------------------------------------------------------------- which headers


def find_tree(given: str, release: str) -> Tree:
    """The headers in the directory `given`, or the first there are for this kernel (`auto`).

    Raises:
        Refused: there are none, or others than root can write to where they are.
    """
    places = [given] if given != "auto" else [place.format(release=release) for place in PLACES]
    for place in places:
        if os.path.isfile(os.path.join(place, _AUTOCONF)):
            check_owners([place])
            for source in _sources(place):
                if os.path.isfile(os.path.join(source, _KCONFIG)):
                    check_owners([source])
                    return Tree(os.path.realpath(place), os.path.realpath(source))
    raise Refused(f"no kernel headers in {' or '.join(places)}")


def _sources(build: str) -> Iterator[str]:
    """Where the headers can be that were not generated: of Debian's, in another package."""
    yield build
    yield os.path.join(os.path.dirname(os.path.abspath(build)), "source")
    makefile = os.path.join(build, "Makefile")
    if os.path.lexists(makefile):
        check_owners([makefile])
        for found in _INCLUDED.finditer(_read(makefile)):
            yield found[1]


def _read(path: str) -> str:
    """The text of a regular file: to open another could take for ever, or do things."""
    handle = fd = -1
    try:
        handle = os.open(path, os.O_PATH | os.O_CLOEXEC)
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            raise Refused(f"{path} is not a regular file")
        fd = os.open(f"/proc/self/fd/{handle}", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with open(fd, "rb", closefd=False) as file:
            packed = path.endswith(".gz")
            data = (gzip.GzipFile(fileobj=file) if packed else file).read(MOST_READ + 1)
    except (OSError, EOFError, zlib.error) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise Refused(f"cannot read {path}: {reason}") from None
    finally:
        for opened in (handle, fd):
            if opened >= 0:
                os.close(opened)
    if len(data) > MOST_READ:
        raise Refused(f"{path} has more than {MOST_READ} bytes")
    return data.decode(errors="replace")


# ---------------------------------------------------------------- who could have changed them


def check_owners(paths: Iterable[str]) -> None:
    """Make sure that nobody but root can have changed these files, or put others in their place.

    What is not there is nobody's. A directory that anybody can write to is none of root's alone,
    although it may be sticky, as /tmp is.

    Raises:
        Refused: names what somebody else can write to, or what is no file at all.
    """
    led: dict[str, str] = {}
    for path in paths:
        _check_way(path, led)


def _check_way(path: str, led: dict[str, str]) -> None:
    """Look at everything on the way, also where links lead over.

    `led` has what was looked at, with where it leads to if it is a link.
    """
    at, left, links = "/", ["/", *path.split("/")][::-1], 0
    while left:
        part = left.pop()
        place = os.path.dirname(at) if part == ".." else os.path.normpath(os.path.join(at, part))
        if place not in led:
            try:
                led[place] = _leads_to(place)
            except FileNotFoundError:
                return
            except OSError as error:
                raise Refused(f"{place}: {error.strerror}") from None
        if not led[place]:
            at = place
            continue
        links += 1
        if links > _MOST_LINKS:
            raise Refused(f"{path}: too many links")
        at = "/" if led[place].startswith("/") else at
        left += led[place].split("/")[::-1]


def _leads_to(place: str) -> str:
    """Where it leads to if it is a link, else nothing. Raises Refused, OSError."""
    status = os.lstat(place)
    _check_status(place, status)
    return os.readlink(place) if stat.S_ISLNK(status.st_mode) else ""


def _check_status(path: str, status: os.stat_result) -> None:
    if status.st_uid != 0:
        raise Refused(f"{path} belongs to user {status.st_uid}, who could change the headers")
    if stat.S_ISLNK(status.st_mode):
        return  # has every permission, and cannot be changed
    if status.st_mode & 0o022:
        raise Refused(f"{path} can be written to by others than root")
    if not stat.S_ISREG(status.st_mode) and not stat.S_ISDIR(status.st_mode):
        raise Refused(f"{path} is neither a file nor a directory")


def check_tree(tree: Tree, machine: str) -> None:
    """Make sure of everything that a compiler for `machine` could read of these headers.

    Raises:
        Refused: as `check_owners`.
    """
    links: list[str] = []
    for top in dict.fromkeys(tree):
        check_owners([top, os.path.join(top, _PRIVATE)])
        for place in ("include", f"arch/{_architecture(machine)}/include"):
            links += _check_below(os.path.join(top, place))
    check_owners(links)
    for directory in {os.path.realpath(link) for link in links if os.path.isdir(link)}:
        check_owners(_check_below(directory))


def _check_below(directory: str) -> list[str]:
    """Look at everything in a directory, if there is one. Returns the links, not followed."""
    links: list[str] = []
    pending = [directory] if os.path.isdir(directory) else []
    check_owners(pending)
    while pending:
        at = pending.pop()
        try:
            with os.scandir(at) as entries:
                for entry in entries:
                    _check_status(entry.path, entry.stat(follow_symlinks=False))
                    if entry.is_symlink():
                        links.append(entry.path)
                    elif entry.is_dir(follow_symlinks=False):
                        pending.append(entry.path)
        except OSError as error:
            raise Refused(f"{at}: {error.strerror}") from None
    return links


# ---------------------------------------------------------------- of which kernel they are


def check_match(tree: Tree, release: str, version: str) -> None:
    """Make sure that the headers are those of this very build of the running kernel.

    `release` and `version` are what `uname -r` and `uname -v` say.

    Raises:
        Refused: says what differs.
    """
    generated = os.path.join(tree.build, "include", "generated")
    named = definitions(_read(os.path.join(generated, "utsrelease.h")))
    theirs = named.get("UTS_RELEASE", "").strip('"')
    if theirs != release:
        raise Refused(f"{tree.build}: headers of {theirs}, and the kernel is {release}")
    for name in ("utsversion.h", "compile.h"):
        with suppress(Refused):
            named |= definitions(_read(os.path.join(generated, name)))
    theirs = named.get("UTS_VERSION", "").strip('"')
    if theirs != version:
        said = f'"{theirs}"' if theirs else "of a build that they do not name"
        raise Refused(f'{tree.build}: headers of {release} {said}, and the kernel is "{version}"')
    for place in CONFIGS:
        path = place.format(release=release)
        if os.path.exists(path):
            check_owners([path])
            own = definitions(_read(os.path.join(generated, "autoconf.h")))
            differ = differing_options(options(_read(path)), own)
            if differ:
                some = ", ".join(differ[:3])
                raise Refused(f"{tree.build}: headers of another configuration than {path}: {some}")
            return


def definitions(text: str) -> dict[str, str]:
    """What a header defines to be what."""
    return {found[1]: found[2] for found in _DEFINED.finditer(text)}


def options(text: str) -> dict[str, str]:
    """The options of a kernel's configuration: `y`, `m`, `n`, a number or a string in quotes."""
    return {found[1] or found[3]: found[2] if found[1] else "n" for found in _SET.finditer(text)}


def differing_options(config: Mapping[str, str], defined: Mapping[str, str]) -> list[str]:
    """The options of the kernel that the headers were not made with, by name.

    `defined` is what `autoconf.h` defines. Strings are not compared: no type depends on them.
    """
    found = []
    for name, value in config.items():
        if _OF_NO_MATTER.match(name):
            continue
        if _SWITCH.fullmatch(value):
            theirs = "m" if defined.get(f"{name}_MODULE") else "y" if name in defined else "n"
            if theirs != value:
                found.append(name)
        elif not value.startswith('"') and _number(defined.get(name, "")) != _number(value):
            found.append(name)
    return sorted(found)


def _number(text: str) -> int | None:
    try:
        return int(text, 0)
    except ValueError:
        return None


# ---------------------------------------------------------------- compiling


def text_for(types: Iterable[str]) -> str:
    """The C text that uses each of `types`. One that is defined nowhere may be named as well."""
    includes = "\n".join(
        f"#if __has_include(<{name}>)\n#include <{name}>\n#endif" for name in _INCLUDES
    )
    members = "".join(f"\t{name} *type_{i};\n" for i, name in enumerate(types))
    return _TEXT.format(includes=includes, members=members)


def flags_for(tree: Tree, machine: str) -> list[str]:
    """Flags for bcc's compiler, in addition to its own.

    Raises:
        Refused: a machine that the programs are not made for.
    """
    generated = f"arch/{_architecture(machine)}/include/generated"
    places = (generated, "include", f"{generated}/uapi", "include/generated/uapi")
    return [
        # The description of types, and the names of the files that are read.
        *("-g", "-H"),
        *(f"-I{os.path.join(tree.build, place)}" for place in places),
        # As the kernel is compiled; and as bcc's own headers define it, which are left out.
        *("-fms-extensions", "-DCC_USING_FENTRY", "-D__BPF_HELPERS_H", "-D_UAPI__LINUX_BPF_H__"),
        "-w",
    ]


def _architecture(machine: str) -> str:
    if machine not in _ARCHITECTURES:
        raise Refused(f"the programs are not made for {machine}")
    return _ARCHITECTURES[machine]


def compiled(request: Mapping[str, Any], source: str) -> dict[str, Any]:
    """What the compiler answers, run for this once, without any capability, for so long at most.

    Raises:
        Refused: there is no bcc, or it has failed.
    """
    with open(os.memfd_create("request"), "w+b") as asked:
        asked.write(json.dumps(request).encode())
        asked.seek(0)
        process = _started(asked, source)
    with process:
        try:
            said = _said(process)
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)  # not waited for yet, so it is still this one's
            raise
    if process.returncode < 0:
        raise Refused(f"bcc was ended by signal {-process.returncode}")
    if process.returncode:
        raise Refused(f"bcc has failed: exit code {process.returncode}")
    try:
        answer = json.loads(said)
    except ValueError:
        answer = None
    if not isinstance(answer, dict):
        raise Refused("bcc has failed: no answer")
    return answer


def _started(asked: BinaryIO, source: str) -> subprocess.Popen[bytes]:
    """The compiler, in a session of its own. Raises Refused."""
    environ = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "BCC_KERNEL_SOURCE": source, "LC_ALL": "C"}
    try:
        return subprocess.Popen(
            [PYTHON, "-I", COMPILER],
            stdin=asked,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd="/",
            env=environ,
            start_new_session=True,
            preexec_fn=_give_up_rights,
        )
    except (OSError, subprocess.SubprocessError) as error:
        raise Refused(f"{PYTHON} cannot be run: {error}") from None


def _said(process: subprocess.Popen[bytes]) -> bytes:
    """All that it writes until it has ended. Raises Refused: too much, or not in time."""
    assert process.stdout is not None
    deadline = time.monotonic() + COMPILE_SECONDS
    late = Refused(f"bcc has not compiled in {COMPILE_SECONDS:.0f} s")
    said = bytearray()
    ready = select.poll()
    ready.register(process.stdout, select.POLLIN)
    while ready.poll(max(deadline - time.monotonic(), 0) * 1000):
        data = os.read(process.stdout.fileno(), 1 << 16)
        said += data
        if len(said) > MOST_ANSWER:
            raise Refused(f"bcc has answered with more than {MOST_ANSWER} bytes")
        if not data:
            break
    else:
        raise late
    try:
        process.wait(max(deadline - time.monotonic(), 0))
    except subprocess.TimeoutExpired:
        raise late from None
    return bytes(said)


def _give_up_rights() -> None:
    """A compiler needs none: it reads, and writes to a pipe."""
    capabilities.limit_to(())  # the bounding set alone takes CAP_SETPCAP, which it may lack
    capabilities.forgo_gains()
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
    resource.setrlimit(resource.RLIMIT_FSIZE, (MOST_ANSWER, MOST_ANSWER))  # in memory, too
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
