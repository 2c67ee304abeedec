"""The layouts of kernel types out of the headers of the running kernel, with bcc as the compiler.

Headers of another kernel compile as well, and the programs then read garbage: those that are not
exactly of this kernel are refused. So are those that anybody but root could have changed.
"""

from __future__ import annotations

import gzip
import json
import os
import platform
import re
import resource
import stat
import subprocess
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from typing import Any, NamedTuple

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
_ARCHITECTURES = {"x86_64": "x86", "aarch64": "arm64"}
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
_INCLUDES = (
    *("linux/bpf.h", "linux/sched.h", "linux/sched/signal.h", "linux/sched/task.h"),
    *("linux/mm_types.h", "linux/fs.h", "linux/fs_struct.h", "linux/fdtable.h", "linux/dcache.h"),
    *("linux/mount.h", "linux/path.h", "linux/binfmts.h", "linux/cred.h", "linux/nsproxy.h"),
    *("linux/pid_namespace.h", "linux/pid.h", "linux/cgroup-defs.h", "linux/kernfs.h"),
    *("linux/ns_common.h", "linux/netdevice.h", "linux/skbuff.h", "linux/socket.h", "linux/net.h"),
    *("linux/tcp.h", "net/sock.h", "net/inet_sock.h", "net/inet_connection_sock.h", "net/tcp.h"),
    *("net/request_sock.h", "net/net_namespace.h", "net/dropreason.h", "net/dropreason-core.h"),
    *("linux/trace_events.h", "linux/tracepoint.h", "asm/ptrace.h", "../fs/mount.h"),
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
    tree = find_tree(given, uname.release)
    check_owners([tree.build, tree.source])
    check_match(tree, uname.release, uname.version)
    wanted = [name.split(" ", 1) for name in types]
    request = {
        "text": text_for(types),
        "flags": flags_for(tree, platform.machine()),
        "source": tree.source,
        "types": wanted,
    }
    answer = compiled(request, tree.source)
    if "error" in answer:
        raise Refused(f"{tree.build}: {answer['error']}")
    check_owners(answer["files"])
    return {**answer, "tree": tree.build}


# ---------------------------------------------------------------- which headers


def find_tree(given: str, release: str) -> Tree:
    """The headers in the directory `given`, or the first there are for this kernel (`auto`).

    Raises:
        Refused: there are none.
    """
    places = [given] if given != "auto" else [place.format(release=release) for place in PLACES]
    for place in places:
        if os.path.isfile(os.path.join(place, "include/generated/autoconf.h")):
            for source in _sources(place):
                if os.path.isfile(os.path.join(source, _KCONFIG)):
                    return Tree(os.path.realpath(place), os.path.realpath(source))
    raise Refused(f"no kernel headers in {' or '.join(places)}")


def _sources(build: str) -> Iterator[str]:
    """Where the headers can be that were not generated: of Debian's, in another package."""
    yield build
    yield os.path.join(os.path.dirname(os.path.abspath(build)), "source")
    with suppress(Refused):
        for found in _INCLUDED.finditer(_read(os.path.join(build, "Makefile"))):
            yield found[1]


def _read(path: str) -> str:
    try:
        if path.endswith(".gz"):
            with gzip.open(path, "rt") as packed:
                return packed.read()
        with open(path, errors="replace") as file:
            return file.read()
    except OSError as error:
        raise Refused(f"cannot read {path}: {error.strerror or error}") from None


def check_owners(paths: Iterable[str]) -> None:
    """Make sure that nobody but root can have changed these files, or put others in their place.

    Raises:
        Refused: names what somebody else can write to.
    """
    looked: set[str] = set()
    for path in paths:
        at = os.path.realpath(path)
        while at not in looked:
            looked.add(at)
            _check_owner(at)
            at = os.path.dirname(at)


def _check_owner(path: str) -> None:
    try:
        status = os.stat(path, follow_symlinks=False)
    except OSError as error:
        raise Refused(f"{path}: {error.strerror}") from None
    if status.st_uid != 0:
        raise Refused(f"{path} belongs to user {status.st_uid}, who could change the headers")
    # Of a directory that is sticky, such as /tmp, only the owner of an entry can replace it.
    sticky = stat.S_ISDIR(status.st_mode) and status.st_mode & stat.S_ISVTX
    if status.st_mode & 0o022 and not sticky:
        raise Refused(f"{path} can be written to by others than root")


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
    if machine not in _ARCHITECTURES:
        raise Refused(f"the programs are not made for {machine}")
    generated = f"arch/{_ARCHITECTURES[machine]}/include/generated"
    places = (generated, "include", f"{generated}/uapi", "include/generated/uapi")
    return [
        # The description of types, and the names of the files that are read.
        *("-g", "-H"),
        *(f"-I{os.path.join(tree.build, place)}" for place in places),
        # As the kernel is compiled; and as bcc's own headers define it, which are left out.
        *("-fms-extensions", "-DCC_USING_FENTRY", "-D__BPF_HELPERS_H", "-D_UAPI__LINUX_BPF_H__"),
        "-w",
    ]


def compiled(request: Mapping[str, Any], source: str) -> dict[str, Any]:
    """What the compiler answers, run for this once, without any capability, for so long at most.

    Raises:
        Refused: there is no bcc, or it has failed.
    """
    environ = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "BCC_KERNEL_SOURCE": source, "LC_ALL": "C"}
    try:
        done = subprocess.run(
            [PYTHON, "-I", COMPILER],
            input=json.dumps(request).encode(),
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd="/",
            env=environ,
            timeout=COMPILE_SECONDS,
            check=False,
            start_new_session=True,
            preexec_fn=_give_up_rights,
        )
    except subprocess.TimeoutExpired:
        raise Refused(f"bcc has not compiled in {COMPILE_SECONDS:.0f} s") from None
    except (OSError, subprocess.SubprocessError) as error:
        raise Refused(f"{PYTHON} cannot be run: {error}") from None
    if done.returncode < 0:
        raise Refused(f"bcc was ended by signal {-done.returncode}")
    if done.returncode or len(done.stdout) > MOST_ANSWER:
        raise Refused(f"bcc has failed: exit code {done.returncode}")
    try:
        answer = json.loads(done.stdout)
    except ValueError:
        answer = None
    if not isinstance(answer, dict):
        raise Refused("bcc has failed: no answer")
    return answer


def _give_up_rights() -> None:
    """A compiler needs none: it reads, and writes to a pipe."""
    capabilities.limit_to(())  # the bounding set alone takes CAP_SETPCAP, which it may lack
    capabilities.forgo_gains()
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
