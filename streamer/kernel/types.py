"""Where the types of the running kernel come from: the best there is, and why no better.

The kernel's own BTF; a file that the configuration names; the headers of this very kernel; else
none, and only programs that read nothing of the kernel's can be used.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterable
from contextlib import suppress
from typing import TYPE_CHECKING, NamedTuple

from streamer.errors import ContractError, KernelError

if TYPE_CHECKING:
    from streamer.kernel.layouts import Measured
    from streamer.kernel.measured import Task, View

KERNEL_BTF = "/sys/kernel/btf/vmlinux"
NO_BTF = f"no BTF: {KERNEL_BTF} is missing (CONFIG_DEBUG_INFO_BTF)"
WITHOUT_BTF = "nobtf"
"""The directory of objects that are relocated against other types than the kernel's own."""
NOTES = "/sys/kernel/notes"
CACHE = "/run/streamer/kernel-types"
"""Keeps what came of the headers until the next boot, before which the kernel is the same."""
NO_MOUNTS = "where a mount is in others is not known, so paths begin at the root of theirs"
NO_MULTIPATH = "the connections of Multipath TCP sockets are not known"
_RAW_BTF, _ELF = b"\x9f\xeb", b"\x7fELF"
_SAID = {
    "kernel": "BTF of the running kernel: {}",
    "file": "BTF file: {}",
    "headers": "kernel headers: {}",
    "none": "none",
}
_MEASURING = (
    *("struct vfsmount", "struct ns_common", "struct task_struct", "struct nsproxy"),
    *("struct files_struct", "struct fdtable", "struct file", "struct dentry"),
    *("struct socket", "struct sock"),
)
_FLAVOUR = re.compile(r"___.*")


class KernelTypes(NamedTuple):
    """What programs are relocated against.

    `rung` is `kernel`, `file`, `headers` or `none`; `path` the BTF file, none for the kernel's own;
    `source` where it comes from; `reason` why it is not a better one; `lacks` what of a file of
    ours could not be told.
    """

    rung: str = "kernel"
    path: str | None = None
    source: str = KERNEL_BTF
    reason: str = ""
    lacks: str = ""

    @property
    def words(self) -> str:
        """In one line."""
        said = _SAID[self.rung].format(self.source)
        return "; ".join(filter(None, (said, self.reason, self.lacks)))


class Wanted(NamedTuple):
    """What types are needed for: the objects in a directory, and functions of the kernel."""

    directory: str
    functions: Collection[str]
    enums: Collection[str]


def of_file(path: str) -> KernelTypes:
    """Those of a BTF file.

    Raises:
        KernelError: it is none, or cannot be read.
    """
    _check_btf(path)
    return KernelTypes("file", path, path, NO_BTF if not os.path.exists(KERNEL_BTF) else "")


def of_kernel() -> KernelTypes:
    """The kernel's own, if it has any."""
    return KernelTypes() if os.path.exists(KERNEL_BTF) else KernelTypes("none", reason=NO_BTF)


def find(wanted: Wanted, headers: str, cache: str = CACHE) -> KernelTypes:
    """The best there are without such a file.

    `headers` is a directory of them, `auto`, or `off`; `cache` a file that keeps what came of
    them. Starts processes.
    """
    if os.path.exists(KERNEL_BTF):
        return KernelTypes()
    if headers == "off":
        return _none("kernel headers are not looked for (headers = off)")
    # Only now: where there is BTF, none of this takes memory.
    from streamer.kernel.headers import Refused
    from streamer.kernel.measured import Unfit

    try:
        return _of_headers(wanted, headers, cache)
    except (Refused, Unfit, ContractError) as error:
        return _none(f"kernel headers cannot be used: {error}")
    except (OSError, ValueError) as error:
        return _none(f"kernel headers cannot be used: {error!r}")


def _none(why: str) -> KernelTypes:
    from streamer.kernel.libbpf import TypeWriter

    with TypeWriter() as writer:
        writer.integer("int", 4, "signed")
        path = _kept(writer.data())
    return KernelTypes("none", path, "", f"{NO_BTF}; {why}")


def _kept(data: bytes) -> str:
    """A file in memory, which lasts as long as this process."""
    fd = os.memfd_create("types", os.MFD_CLOEXEC)
    with open(fd, "wb", closefd=False) as file:
        file.write(data)
    return f"/proc/{os.getpid()}/fd/{fd}"


# ---------------------------------------------------------------- out of headers


def _of_headers(wanted: Wanted, given: str, cache: str) -> KernelTypes:
    """Raises Refused, Unfit, OSError, ContractError, ValueError."""
    types = types_in(wanted.directory) | set(_MEASURING) | {f"enum {e}" for e in wanted.enums}
    key = key_of(types, wanted.functions, given)
    found = _cached(cache, key)
    if found is None:
        found = _made(wanted, sorted(types), given)
        _cache(cache, key, *found)
    source, lacks, data = found
    return KernelTypes("headers", _kept(data), source, NO_BTF, lacks)


def _made(wanted: Wanted, types: list[str], given: str) -> tuple[str, str, bytes]:
    """Where they are from, what they lack, and the BTF."""
    from streamer.kernel import headers, layouts, measured
    from streamer.kernel.btf import Btf

    functions = layouts.functions_there(wanted.functions)
    answer = headers.layouts(given, types)
    described, found = answer["types"], list(answer["found"].values())
    known = layouts.btf_of(described, found, {}, functions)
    source = f"{answer['tree']}, compiled by bcc"
    core = os.path.join(wanted.directory, WITHOUT_BTF, "core.bpf.o")
    with measured.memory(core, _kept(known)) as (peek, task):
        view = measured.View(peek, Btf(known))
        measured.check_task(view, task)
        more, lacks = _measured(view, task, answer["found"])
    return source, lacks, layouts.btf_of(described, found, more, functions)


def _measured(view: View, task: Task, found: Collection[str]) -> tuple[Measured, str]:
    """Structs that the headers lack, and what could not be told of them."""
    from streamer.kernel.layouts import Field
    from streamer.kernel.measured import Unfit, measure_mounts, measure_multipath

    more: dict[str, tuple[Field, ...]] = {}
    lacks = []
    if "struct kernfs_iattrs" not in found:
        # Whoever a cgroup was given to. Nothing of a kernel that is not asked to give one away has
        # such attributes, so it is not measured: this is what they begin with since Linux 5.1.
        more["kernfs_iattrs"] = (Field("ia_uid", 0, "cred.uid"),)
    if "struct mount" not in found:
        try:
            more |= measure_mounts(view, task)
        except Unfit as error:
            lacks.append(f"{NO_MOUNTS}: {error}")
    if "struct mptcp_sock" not in found:
        try:
            more |= measure_multipath(view, task)
        except (Unfit, OSError) as error:
            lacks.append(f"{NO_MULTIPATH}: {error}")
    return more, "; ".join(lacks)


def types_in(directory: str) -> set[str]:
    """The kernel's types that the objects in a directory are relocated against.

    Raises:
        ContractError: an object that cannot be read.
    """
    from pathlib import Path

    from streamer.kernel.btf import Btf, relocated

    found: set[str] = set()
    for path in Path(directory, WITHOUT_BTF).glob("*.bpf.o"):
        found |= {_FLAVOUR.sub("", name) for name in relocated(path, Btf.of_object(path))}
    return found


# ---------------------------------------------------------------- kept from run to run


def key_of(types: Iterable[str], functions: Iterable[str], given: str) -> bytes:
    """What stands for this build of the kernel, and what is wanted of it."""
    from streamer import __version__

    uname = os.uname()
    with open(NOTES, "rb") as file:  # with the build id
        notes = file.read()
    said = (__version__, uname.release, uname.version, given, *sorted(types), *sorted(functions))
    return (notes.hex() + "\n".join(said)).encode()


def _cached(path: str, key: bytes) -> tuple[str, str, bytes] | None:
    """What was kept for that key, in a file that nobody but root can have written."""
    from streamer.kernel.headers import Refused, check_owners

    try:
        check_owners([path])
        with open(path, "rb") as file:
            data = file.read()
    except (Refused, OSError):
        return None
    kept, source, lacks, btf = (data.split(b"\0", 3) + [b""] * 4)[:4]
    if kept != key or not btf.startswith(_RAW_BTF):
        return None
    return source.decode(), lacks.decode(), btf


def _cache(path: str, key: bytes, source: str, lacks: str, data: bytes) -> None:
    """Keep it, if it can be: next time it takes as long again."""
    partial = f"{path}.{os.getpid()}"
    with suppress(OSError):
        os.makedirs(os.path.dirname(path), 0o755, exist_ok=True)
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        descriptor = os.open(partial, flags, 0o600)
        try:
            with open(descriptor, "wb") as file:
                file.write(b"%b\0%b\0%b\0%b" % (key, source.encode(), lacks.encode(), data))
            os.rename(partial, path)
        except OSError:  # of a full file system it would take more
            os.unlink(partial)
            raise


def _check_btf(path: str) -> None:
    """Refuse what libbpf would refuse with a number that nobody knows."""
    if not os.path.isfile(path):
        raise KernelError(f"btf: no such file: {path}")
    try:
        with open(path, "rb") as file:
            start = file.read(4)
    except OSError as error:
        raise KernelError(f"btf: cannot read {path}: {error.strerror}") from None
    if not start.startswith((_RAW_BTF, _ELF)):
        raise KernelError(f"btf: {path} holds no BTF")
