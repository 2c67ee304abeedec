"""A thin ctypes layer over libbpf 1.x: the control path only, no event passes here.

Every function that fails raises `OSError` with the kernel's errno. Handles are plain integers
(addresses), owned by the object they came from.
"""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from ctypes import (
    POINTER,
    Structure,
    byref,
    c_bool,
    c_char_p,
    c_int,
    c_int64,
    c_long,
    c_size_t,
    c_void_p,
)
from ctypes import c_uint32 as u32
from ctypes import c_uint64 as u64
from functools import cache
from pathlib import Path
from typing import Self

from streamer.errors import KernelError

_BTF_KIND_ENUM, _BTF_KIND_FUNC, _BTF_KIND_VAR = 6, 12, 14
_MAPS_BY_CPU = (5, 6, 10, 21)  # BPF_MAP_TYPE_PERCPU_HASH and so on
_BPF_XDP = 37  # enum bpf_attach_type
PERF_EVENT_ARRAY = 4  # BPF_MAP_TYPE_PERF_EVENT_ARRAY
_RINGBUF = 27  # BPF_MAP_TYPE_RINGBUF
_BPF_TCX = {"tcx/ingress": 46, "tcx/egress": 47}
_BPF_F_BEFORE = 1 << 3
_SCHED_CLS = 3  # enum bpf_prog_type
_FRAME = bytes(64)  # what one that is not about packets is run with: the kernel wants one
XDP_MODES = {"native": 1 << 2, "generic": 1 << 1}
"""The ways of an interface to run a program: in its driver, else behind it. XDP_FLAGS_…"""
_NEWER_ATTACH_TYPES = {46: "tcx_ingress", 47: "tcx_egress"}  # than libbpf
_TYPED_ATTACH_TYPES = (23, 24, 25, 26, 27, 28)  # BPF_TRACE_RAW_TP and so on: by the kernel's BTF
_MAP_FLAGS = {1 << 0: "no_prealloc", 1 << 7: "rdonly_prog", 1 << 9: "clone", 1 << 10: "mmapable"}
_INSTRUCTION_BYTES = 8
_SHORT_LOG_BYTES = 4096
_LOG_INSTRUCTIONS = 1  # BPF_LOG_LEVEL1
_LOG_FIGURES = 4  # BPF_LOG_STATS: figures and errors
FIGURES = ("verification time", "stack depth", "processed ", "insns processed")
"""How lines of a verifier's log begin that are no errors."""


class _OpenOptions(Structure):
    """The leading members of `struct bpf_object_open_opts`."""

    _fields_ = [
        ("size", c_size_t),
        ("object_name", c_char_p),
        ("relaxed_maps", c_bool),
        ("pin_root_path", c_char_p),
        ("reserved", c_long),
        ("kconfig", c_char_p),
        ("btf_custom_path", c_char_p),
    ]


class _TestRunOptions(Structure):
    """`struct bpf_test_run_opts` of libbpf 1.x."""

    _fields_ = [
        ("size", c_size_t),
        ("data_in", c_void_p),
        ("data_out", c_void_p),
        ("data_size_in", u32),
        ("data_size_out", u32),
        ("ctx_in", c_void_p),
        ("ctx_out", c_void_p),
        ("ctx_size_in", u32),
        ("ctx_size_out", u32),
        ("retval", u32),
        ("repeat", c_int),
        ("duration", u32),
        ("flags", u32),
        ("cpu", u32),
        ("batch_size", u32),
    ]


class _LinkOptions(Structure):
    """The leading members of `struct bpf_link_create_opts`."""

    _fields_ = [("size", c_size_t), ("flags", u32)]


class _LoadOptions(Structure):
    """The members of `struct bpf_prog_load_opts` of libbpf 1.x."""

    _fields_ = [
        ("size", c_size_t),
        ("attempts", c_int),
        ("expected_attach_type", c_int),
        ("prog_btf_fd", u32),
        ("prog_flags", u32),
        ("prog_ifindex", u32),
        ("kern_version", u32),
        ("attach_btf_id", u32),
        ("attach_prog_fd", u32),
        ("attach_btf_obj_fd", u32),
        ("fd_array", c_void_p),
        ("func_info", c_void_p),
        ("func_info_cnt", u32),
        ("func_info_rec_size", u32),
        ("line_info", c_void_p),
        ("line_info_cnt", u32),
        ("line_info_rec_size", u32),
        ("log_level", u32),
        ("log_size", u32),
        ("log_buf", c_char_p),
    ]


class _ProgramInfo(Structure):
    """The leading members of `struct bpf_prog_info`."""

    _fields_ = [
        ("type", u32),
        ("id", u32),
        ("tag", ctypes.c_uint8 * 8),
        ("jited_prog_len", u32),
        ("xlated_prog_len", u32),
    ]


class _BtfType(Structure):
    """`struct btf_type`: of an enum, its values follow."""

    _fields_ = [("name_off", u32), ("info", u32), ("size", u32)]


class _BtfEnum(Structure):
    """`struct btf_enum`."""

    _fields_ = [("name_off", u32), ("val", c_int)]


_SIGNATURES: dict[str, tuple[object, list[object]]] = {
    "libbpf_set_print": (c_void_p, [c_void_p]),
    "bpf_object__open_file": (c_void_p, [c_char_p, POINTER(_OpenOptions)]),
    "bpf_object__open_mem": (c_void_p, [c_char_p, c_size_t, POINTER(_OpenOptions)]),
    "bpf_object__load": (c_int, [c_void_p]),
    "bpf_object__close": (None, [c_void_p]),
    "bpf_object__next_program": (c_void_p, [c_void_p, c_void_p]),
    "bpf_object__next_map": (c_void_p, [c_void_p, c_void_p]),
    "bpf_program__name": (c_char_p, [c_void_p]),
    "bpf_program__section_name": (c_char_p, [c_void_p]),
    "bpf_program__type": (c_int, [c_void_p]),
    "bpf_program__expected_attach_type": (c_int, [c_void_p]),
    "bpf_program__set_autoload": (c_int, [c_void_p, c_bool]),
    "bpf_program__set_log_level": (c_int, [c_void_p, u32]),
    "bpf_program__set_log_buf": (c_int, [c_void_p, c_char_p, c_size_t]),
    "bpf_program__set_type": (c_int, [c_void_p, c_int]),
    "bpf_program__fd": (c_int, [c_void_p]),
    "bpf_program__attach": (c_void_p, [c_void_p]),
    "bpf_link__destroy": (c_int, [c_void_p]),
    "bpf_map_create": (c_int, [c_int, c_char_p, u32, u32, u32, c_void_p]),
    "bpf_map__name": (c_char_p, [c_void_p]),
    "bpf_map__fd": (c_int, [c_void_p]),
    "bpf_map__set_max_entries": (c_int, [c_void_p, u32]),
    "bpf_map__set_type": (c_int, [c_void_p, c_int]),
    "bpf_map__set_key_size": (c_int, [c_void_p, u32]),
    "bpf_map__set_value_size": (c_int, [c_void_p, u32]),
    "bpf_map__set_autocreate": (c_int, [c_void_p, c_bool]),
    "bpf_map__reuse_fd": (c_int, [c_void_p, c_int]),
    "bpf_map__key_size": (u32, [c_void_p]),
    "bpf_map__value_size": (u32, [c_void_p]),
    "bpf_map__type": (c_int, [c_void_p]),
    "bpf_map__map_flags": (u32, [c_void_p]),
    "bpf_map__max_entries": (u32, [c_void_p]),
    "bpf_map__is_internal": (c_bool, [c_void_p]),
    "libbpf_num_possible_cpus": (c_int, []),
    "bpf_map__initial_value": (c_void_p, [c_void_p, POINTER(c_size_t)]),
    "bpf_map_update_elem": (c_int, [c_int, c_void_p, c_void_p, u64]),
    "bpf_map_delete_elem": (c_int, [c_int, c_void_p]),
    "bpf_map_lookup_elem": (c_int, [c_int, c_void_p, c_void_p]),
    "bpf_map_get_next_key": (c_int, [c_int, c_void_p, c_void_p]),
    "bpf_link_create": (c_int, [c_int, c_int, c_int, POINTER(_LinkOptions)]),
    "bpf_program__attach_cgroup": (c_void_p, [c_void_p, c_int]),
    "bpf_program__attach_kprobe": (c_void_p, [c_void_p, c_bool, c_char_p]),
    "bpf_program__attach_tracepoint": (c_void_p, [c_void_p, c_char_p, c_char_p]),
    "bpf_program__set_attach_target": (c_int, [c_void_p, c_int, c_char_p]),
    "bpf_program__attach_perf_event": (c_void_p, [c_void_p, c_int]),
    "btf__load_vmlinux_btf": (c_void_p, []),
    "btf__parse": (c_void_p, [c_char_p, c_void_p]),
    "btf__find_by_name_kind": (c_int, [c_void_p, c_char_p, u32]),
    "btf__free": (None, [c_void_p]),
    "btf__type_by_id": (POINTER(_BtfType), [c_void_p, u32]),
    "btf__name_by_offset": (c_char_p, [c_void_p, u32]),
    "libbpf_bpf_prog_type_str": (c_char_p, [c_int]),
    "libbpf_bpf_attach_type_str": (c_char_p, [c_int]),
    "libbpf_bpf_map_type_str": (c_char_p, [c_int]),
    "libbpf_find_vmlinux_btf_id": (c_int, [c_char_p, c_int]),
    "bpf_prog_load": (
        c_int,
        [c_int, c_char_p, c_char_p, c_char_p, c_size_t, POINTER(_LoadOptions)],
    ),
    "bpf_obj_get_info_by_fd": (c_int, [c_int, c_void_p, POINTER(u32)]),
    "btf__new_empty": (c_void_p, []),
    "btf__raw_data": (c_void_p, [c_void_p, POINTER(u32)]),
    "btf__add_int": (c_int, [c_void_p, c_char_p, c_size_t, c_int]),
    "btf__add_ptr": (c_int, [c_void_p, c_int]),
    "btf__add_array": (c_int, [c_void_p, c_int, c_int, u32]),
    "btf__add_struct": (c_int, [c_void_p, c_char_p, u32]),
    "btf__add_union": (c_int, [c_void_p, c_char_p, u32]),
    "btf__add_field": (c_int, [c_void_p, c_char_p, c_int, u32, u32]),
    "btf__add_enum": (c_int, [c_void_p, c_char_p, u32]),
    "btf__add_enum_value": (c_int, [c_void_p, c_char_p, c_int64]),
    "btf__add_func": (c_int, [c_void_p, c_char_p, c_int, c_int]),
    "btf__add_func_proto": (c_int, [c_void_p, c_int]),
    "bpf_prog_test_run_opts": (c_int, [c_int, POINTER(_TestRunOptions)]),
}


@cache
def _library() -> ctypes.CDLL:
    try:
        library = ctypes.CDLL("libbpf.so.1", use_errno=True)
    except OSError:
        raise KernelError("libbpf.so.1 is missing: install libbpf1") from None
    for name, (result, arguments) in _SIGNATURES.items():
        function = getattr(library, name)
        function.restype = result
        function.argtypes = arguments
    # Its messages go to stderr one by one; what matters of them is in errno and verifier log.
    library.libbpf_set_print(None)
    return library


def _check(result: int) -> int:
    if result < 0:
        raise OSError(-result, os.strerror(-result))
    return result


def _check_pointer(result: int | None) -> int:
    if not result:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result


@contextmanager
def _types_of(btf: str | None) -> Iterator[int]:
    """The kernel's BTF, or that in the file given. Raises OSError."""
    library = _library()
    types = _check_pointer(
        library.btf__parse(btf.encode(), None) if btf else library.btf__load_vmlinux_btf()
    )
    try:
        yield types
    finally:
        library.btf__free(types)


def functions_of(names: Iterable[str], btf: str | None = None) -> set[str]:
    """Those of `names` that are functions in the kernel's BTF, or in the BTF file given."""
    return _known(names, _BTF_KIND_FUNC, btf)


def variables_of(names: Iterable[str]) -> set[str]:
    """Those of `names` that are variables in the kernel's BTF: it has those of each CPU's own."""
    return _known(names, _BTF_KIND_VAR, None)


def _known(names: Iterable[str], kind: int, btf: str | None) -> set[str]:
    library = _library()
    with _types_of(btf) as types:
        return {
            name for name in names if library.btf__find_by_name_kind(types, name.encode(), kind) > 0
        }


def names_of_enum(enum: str, btf: str | None = None) -> dict[int, str]:
    """Names of the numbers of an enum in the kernel's BTF, or in the BTF file given.

    Empty where there is no such enum.
    """
    library = _library()
    with _types_of(btf) as types:
        number = library.btf__find_by_name_kind(types, enum.encode(), _BTF_KIND_ENUM)
        if number < 0:
            return {}
        found = library.btf__type_by_id(types, number).contents
        values = (_BtfEnum * (found.info & 0xFFFF)).from_address(
            ctypes.addressof(found) + ctypes.sizeof(_BtfType)
        )
        return {
            value.val: library.btf__name_by_offset(types, value.name_off).decode()
            for value in values
        }


class TypeWriter:
    """BTF in the making. Every method adds a type and returns its id; all raise OSError."""

    def __init__(self) -> None:
        """Empty, but for void, whose id is 0."""
        self._handle: int | None = _check_pointer(_library().btf__new_empty())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        handle, self._handle = self._handle, None
        _library().btf__free(handle)

    def data(self) -> bytes:
        """The content of a BTF file."""
        size = u32()
        at = _check_pointer(_library().btf__raw_data(self._handle, byref(size)))
        return ctypes.string_at(at, size.value)

    def integer(self, name: str, size: int, encoding: str) -> int:
        """`size` in bytes; `encoding` is `signed`, `bool` or empty."""
        bits = {"signed": 1, "bool": 4}.get(encoding, 0)
        return _check(_library().btf__add_int(self._handle, _name(name), size, bits))

    def pointer(self) -> int:
        """To something."""
        return _check(_library().btf__add_ptr(self._handle, 0))

    def array(self, of: int, index: int, count: int) -> int:
        """`count` of the type `of`, counted with the type `index`."""
        return _check(_library().btf__add_array(self._handle, index, of, count))

    def composite(
        self, kind: str, name: str, size: int, members: Iterable[tuple[str, int, int, int]]
    ) -> int:
        """A `struct` or `union` of `size` bytes. Members: name, type, offset in bits, and the
        width of a bit-field in bits, else 0.
        """
        add = getattr(_library(), f"btf__add_{kind}")
        made = _check(add(self._handle, _name(name), size))
        for member, of, bit, bits in members:
            _check(_library().btf__add_field(self._handle, _name(member), of, bit, bits))
        return made

    def enum(self, name: str, size: int, values: Iterable[tuple[str, int]]) -> int:
        """`size` in bytes, and the names with their values."""
        made = _check(_library().btf__add_enum(self._handle, _name(name), size))
        for label, value in values:
            _check(_library().btf__add_enum_value(self._handle, _name(label), value))
        return made

    def prototype(self) -> int:
        """Of a function without parameters."""
        return _check(_library().btf__add_func_proto(self._handle, 0))

    def function(self, name: str, prototype: int) -> int:
        """A global function."""
        return _check(_library().btf__add_func(self._handle, _name(name), 1, prototype))


def _name(name: str) -> bytes | None:
    return name.encode() or None


def _sized(name: str, what: str, data: bytes, size: int) -> bytes:
    """The kernel reads as many bytes as the map says, whatever it is given."""
    if len(data) != size:
        raise OSError(errno.EINVAL, f"{name} has a {what} of {size} bytes, not {len(data)}")
    return data


def program_type_name(type: int, attach: int) -> str:
    """The name of a type of program, with that of what it attaches to where the type has several.

    Of numbers of `enum bpf_prog_type` and `enum bpf_attach_type`.
    """
    library = _library()
    name = _name_of(library.libbpf_bpf_prog_type_str(type), type)
    if not attach:
        return name
    at = _NEWER_ATTACH_TYPES.get(attach) or _name_of(
        library.libbpf_bpf_attach_type_str(attach), attach
    )
    return name if at == name else f"{name}/{at}"


def map_type_name(type: int, flags: int) -> str:
    """The name of a type of map, with those of the flags that it is made with."""
    name = _name_of(_library().libbpf_bpf_map_type_str(type), type)
    known = [word for bit, word in _MAP_FLAGS.items() if flags & bit]
    others = flags & ~sum(_MAP_FLAGS)
    return "+".join([name, *known, *([hex(others)] if others else [])])


def _name_of(name: bytes | None, number: int) -> str:
    return name.decode() if name else str(number)


def btf_id_at(section: str, attach: int) -> int:
    """The number in the kernel's BTF of what a program of that section and type attaches to.

    0 where its type needs none. Raises OSError: it is not there.
    """
    if attach not in _TYPED_ATTACH_TYPES:
        return 0
    name = section.partition("/")[2]
    return _check(_library().libbpf_find_vmlinux_btf_id(name.encode(), attach))


class Refused(OSError):
    """A program that did not load; `log` is what the verifier said."""

    def __init__(self, number: int, log: str) -> None:
        """Of the kernel's error number."""
        super().__init__(number, os.strerror(number))
        self.log = log


def load_instructions(
    type: int, code: bytes, name: str, *, attach: int = 0, btf_id: int = 0
) -> int:
    """A descriptor of a program that consists of these instructions.

    Raises:
        Refused: the kernel did not load it.
    """
    log = ctypes.create_string_buffer(_SHORT_LOG_BYTES)
    options = _LoadOptions(size=ctypes.sizeof(_LoadOptions), expected_attach_type=attach)
    options.attach_btf_id = btf_id
    options.log_level, options.log_size = 1, len(log)
    options.log_buf = ctypes.cast(log, c_char_p)
    count = len(code) // _INSTRUCTION_BYTES
    fd: int = _library().bpf_prog_load(type, name.encode(), b"GPL", code, count, byref(options))
    if fd < 0:
        raise Refused(-fd, log.value.decode(errors="replace"))
    return fd


def lengths_of(fd: int) -> tuple[int, int]:
    """Bytes of a program as machine code and as the verifier left it.

    Both are 0 to those who may not know, the first as well where it is interpreted. Raises OSError.
    """
    info = _ProgramInfo()
    size = u32(ctypes.sizeof(info))
    _check(_library().bpf_obj_get_info_by_fd(fd, byref(info), byref(size)))
    return int(info.jited_prog_len), int(info.xlated_prog_len)


class Program:
    """A program of an object."""

    def __init__(self, handle: int) -> None:
        """Wrap libbpf's handle."""
        library = _library()
        self._handle = handle
        self._log: ctypes.Array[ctypes.c_char] | None = None
        self.name: str = library.bpf_program__name(handle).decode()
        self.section: str = library.bpf_program__section_name(handle).decode()
        if self.section in _BPF_TCX:  # libbpf knows of them since 1.3
            _check(library.bpf_program__set_type(handle, _SCHED_CLS))

    @property
    def type(self) -> int:
        """Its number in `enum bpf_prog_type`."""
        return int(_library().bpf_program__type(self._handle))

    @property
    def attach_type(self) -> int:
        """Its number in `enum bpf_attach_type`; 0 also where its type has none."""
        return int(_library().bpf_program__expected_attach_type(self._handle))

    def autoload(self, wanted: bool) -> None:
        """Load this program with the object, or leave it out."""
        _check(_library().bpf_program__set_autoload(self._handle, wanted))

    def keep_log(self, *, instructions: bool = False, room: int = 1 << 14) -> None:
        """Keep what the verifier says when it is loaded: its figures, and why it is refused.

        With `instructions`, each that it looks at: libbpf finds by them what could not be
        relocated. They may take megabytes, and a program of which the kernel says more than there
        is room for, in bytes, is refused for that alone (ENOSPC). Before 7.x that may be what it
        says meanwhile, and takes back.
        """
        level = _LOG_INSTRUCTIONS if instructions else _LOG_FIGURES
        _check(_library().bpf_program__set_log_level(self._handle, level))
        self._log = ctypes.create_string_buffer(room)
        _check(_library().bpf_program__set_log_buf(self._handle, self._log, room))

    @property
    def log(self) -> str:
        """What the verifier said, if it was kept."""
        return self._log.value.decode(errors="replace") if self._log else ""

    @property
    def fd(self) -> int:
        """The loaded program's file descriptor, owned by the object."""
        return _check(_library().bpf_program__fd(self._handle))

    def attach(self) -> Link:
        """Attach to the hook that the section names."""
        return Link(_check_pointer(_library().bpf_program__attach(self._handle)))

    def attach_to_interface(self, index: int, mode: int) -> DescriptorLink:
        """Attach an XDP program to a network interface, by its index, in one of `XDP_MODES`."""
        options = _LinkOptions(size=ctypes.sizeof(_LinkOptions), flags=mode)
        fd = _check(_library().bpf_link_create(self.fd, index, _BPF_XDP, byref(options)))
        return DescriptorLink(fd)

    def attach_to_traffic(self, index: int) -> DescriptorLink:
        """Attach a program at a section of tcx to an interface, before all that are there.

        Kernels before 6.6 refuse.
        """
        options = _LinkOptions(size=ctypes.sizeof(_LinkOptions), flags=_BPF_F_BEFORE)
        where = _BPF_TCX[self.section]
        return DescriptorLink(
            _check(_library().bpf_link_create(self.fd, index, where, byref(options)))
        )

    def attach_to_cgroup(self, fd: int) -> Link:
        """Attach to a cgroup, by a descriptor of its directory."""
        return Link(_check_pointer(_library().bpf_program__attach_cgroup(self._handle, fd)))

    def attach_to_perf_event(self, fd: int) -> Link:
        """Attach to a perf event, whose descriptor the link owns from then on."""
        return Link(_check_pointer(_library().bpf_program__attach_perf_event(self._handle, fd)))

    def attach_to_function(self, name: str, *, returns: bool) -> Link:
        """Attach a program of kprobes to a function of the kernel: where it begins, or returns."""
        library = _library()
        made = library.bpf_program__attach_kprobe(self._handle, returns, name.encode())
        return Link(_check_pointer(made))

    def attach_to_tracepoint(self, category: str, name: str) -> Link:
        """Attach to a classic tracepoint."""
        library = _library()
        made = library.bpf_program__attach_tracepoint(
            self._handle, category.encode(), name.encode()
        )
        return Link(_check_pointer(made))

    def set_function(self, name: str) -> None:
        """Let it be loaded for another function than its section names (fentry, fexit)."""
        _check(_library().bpf_program__set_attach_target(self._handle, 0, name.encode()))

    def run(self, repeat: int = 0) -> int:
        """Run the program in this task (`BPF_PROG_TEST_RUN`); what it returned at last."""
        return run_program(self.fd, repeat, _FRAME if self.section == "tc" else b"")


def run_program(fd: int, repeat: int = 0, packet: bytes = b"") -> int:
    """Run the program behind `fd` (`BPF_PROG_TEST_RUN`); its return value.

    Of a program at packets, with a `packet` that comes in at the loopback interface.
    """
    return int(_test_run(fd, repeat, packet).retval)


def time_program(fd: int, repeat: int, packet: bytes = b"") -> int:
    """The same so often; nanoseconds for each time, as the kernel measures, which rounds down."""
    return int(_test_run(fd, repeat, packet).duration)


def _test_run(fd: int, repeat: int, packet: bytes) -> _TestRunOptions:
    options = _TestRunOptions(size=ctypes.sizeof(_TestRunOptions), repeat=repeat)
    data = ctypes.create_string_buffer(packet, len(packet))
    if packet:
        options.data_in, options.data_size_in = ctypes.cast(data, c_void_p), len(packet)
    _check(_library().bpf_prog_test_run_opts(fd, byref(options)))
    return options


class Link:
    """An attached program. It stays attached until `destroy`, or the process ends."""

    def __init__(self, handle: int) -> None:
        """Wrap libbpf's handle."""
        self._handle: int | None = handle

    def destroy(self) -> None:
        """Detach. Harmless when done already."""
        handle, self._handle = self._handle, None
        if handle:
            _library().bpf_link__destroy(handle)


class DescriptorLink:
    """The same, known by a descriptor."""

    def __init__(self, fd: int) -> None:
        """Wrap the descriptor, which is owned from now on."""
        self._fd: int | None = fd

    def destroy(self) -> None:
        """Detach. Harmless when done already."""
        fd, self._fd = self._fd, None
        if fd is not None:
            os.close(fd)


def make_ring(name: str, size: int) -> int:
    """Make a ring buffer of `size` bytes: a descriptor, the caller's. Raises OSError."""
    text = name.replace(".", "_").encode()
    return _check(_library().bpf_map_create(_RINGBUF, text, 0, 0, size, None))


class Map:
    """A map of an object."""

    def __init__(self, handle: int) -> None:
        """Wrap libbpf's handle."""
        self._handle = handle
        self.name: str = _library().bpf_map__name(handle).decode()
        self.internal: bool = _library().bpf_map__is_internal(handle)
        """Whether it is a section of global data."""

    @property
    def type(self) -> int:
        """Its number in `enum bpf_map_type`."""
        return int(_library().bpf_map__type(self._handle))

    @property
    def flags(self) -> int:
        """What it is made with: BPF_F_…, ORed."""
        return int(_library().bpf_map__map_flags(self._handle))

    @property
    def max_entries(self) -> int:
        """How many entries it is to have, as far as the object says."""
        return int(_library().bpf_map__max_entries(self._handle))

    @property
    def fd(self) -> int:
        """The created map's file descriptor, owned by the object."""
        return _check(_library().bpf_map__fd(self._handle))

    def resize(self, entries: int) -> None:
        """Set the number of entries (of a ring: bytes), before the object is loaded."""
        _check(_library().bpf_map__set_max_entries(self._handle, entries))

    def become_perf_events(self, entries: int) -> None:
        """Be an array of perf events, before the object is loaded, whatever it is declared as."""
        library = _library()
        _check(library.bpf_map__set_type(self._handle, PERF_EVENT_ARRAY))
        _check(library.bpf_map__set_key_size(self._handle, 4))
        _check(library.bpf_map__set_value_size(self._handle, 4))
        self.resize(entries)

    def leave_out(self) -> None:
        """Do not create it with the object. No program that is loaded may reach it."""
        _check(_library().bpf_map__set_autocreate(self._handle, False))

    def reuse(self, fd: int) -> None:
        """Use the map behind `fd` instead of creating one. The descriptor is duplicated."""
        _check(_library().bpf_map__reuse_fd(self._handle, fd))

    def write_initial(self, data: bytes) -> None:
        """Set the beginning of a global data section, before the object is loaded."""
        size = c_size_t()
        at = _check_pointer(_library().bpf_map__initial_value(self._handle, byref(size)))
        if len(data) > size.value:
            raise ValueError(f"{self.name} has {size.value} bytes, not {len(data)}")
        ctypes.memmove(at, data, len(data))

    def update(self, key: bytes, value: bytes) -> None:
        """Set one element of a loaded map."""
        _check(_library().bpf_map_update_elem(self.fd, self._key(key), self._value(value), 0))

    def delete(self, key: bytes) -> None:
        """Remove one element; OSError ENOENT if it is not there."""
        _check(_library().bpf_map_delete_elem(self.fd, self._key(key)))

    def entries(self) -> Iterator[tuple[bytes, bytes]]:
        """Key and value of every element, of a key once. Not all, where too many go meanwhile."""
        library, fd = _library(), self.fd
        value = ctypes.create_string_buffer(self._value_size())
        for key in self._keys():
            if library.bpf_map_lookup_elem(fd, key, value) == 0:
                yield key, value.raw

    def take(self) -> Iterator[tuple[bytes, bytes]]:
        """Key and value of every element, which is removed. Raises OSError: one could not be."""
        library, fd = _library(), self.fd
        value = ctypes.create_string_buffer(self._value_size())
        for key in list(self._keys()):
            _check(library.bpf_map_lookup_elem(fd, key, value))
            _check(library.bpf_map_delete_elem(fd, key))
            yield key, value.raw

    def _keys(self) -> Iterator[bytes]:
        """Each key once. A walk begins anew at a key that is not there any more, and so might last
        for as long as others see to that: it ends after twice as many steps as there is room for.
        """
        library, fd = _library(), self.fd
        key = ctypes.create_string_buffer(library.bpf_map__key_size(self._handle))
        before: bytes | None = None
        found: set[bytes] = set()
        for _ in range(2 * self.max_entries + 1):
            if library.bpf_map_get_next_key(fd, before, key) != 0:
                return
            before = key.raw
            if before not in found:
                found.add(before)
                yield before

    def _key(self, key: bytes) -> bytes:
        return _sized(self.name, "key", key, _library().bpf_map__key_size(self._handle))

    @property
    def value_size(self) -> int:
        """Bytes of a value."""
        return self._value_size()

    def _value(self, value: bytes) -> bytes:
        return _sized(self.name, "value", value, self._value_size())

    def _value_size(self) -> int:
        """Bytes of a value as the kernel copies it: of a map by CPU, those of all CPUs."""
        library = _library()
        size: int = library.bpf_map__value_size(self._handle)
        if library.bpf_map__type(self._handle) not in _MAPS_BY_CPU:
            return size
        return -(-size // 8) * 8 * _check(library.libbpf_num_possible_cpus())


class Object:
    """A BPF object: opened, then adjusted, then loaded, then closed."""

    def __init__(self, path: str | Path, btf: str | None = None) -> None:
        """Open the object at `path`; `btf` is a BTF file to use in place of the kernel's."""
        options = _OpenOptions(size=ctypes.sizeof(_OpenOptions))
        options.btf_custom_path = btf.encode() if btf else None
        self._adopt(_library().bpf_object__open_file(str(path).encode(), byref(options)))

    @classmethod
    def of_bytes(cls, data: bytes, name: str) -> Object:
        """Open an object that is in memory."""
        options = _OpenOptions(size=ctypes.sizeof(_OpenOptions), object_name=name.encode())
        made = cls.__new__(cls)
        made._adopt(_library().bpf_object__open_mem(data, len(data), byref(options)))
        return made

    def _adopt(self, opened: int | None) -> None:
        self._handle: int | None = _check_pointer(opened)
        self.programs = {p.name: p for p in map(Program, self._walk("program"))}
        self.maps = {m.name: m for m in map(Map, self._walk("map"))}

    def _walk(self, what: str) -> Iterator[int]:
        step = getattr(_library(), f"bpf_object__next_{what}")
        handle = step(self._handle, None)
        while handle:
            yield handle
            handle = step(self._handle, handle)

    def load(self) -> None:
        """Create the maps and load the programs into the kernel."""
        _check(_library().bpf_object__load(self._handle))

    def close(self) -> None:
        """Release everything; harmless when done already. Destroy links first."""
        handle, self._handle = self._handle, None
        if handle:
            _library().bpf_object__close(handle)
