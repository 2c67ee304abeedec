"""The instructions of an object's programs as libbpf has relocated them against a BTF file."""

from __future__ import annotations

import ctypes
from contextlib import suppress
from pathlib import Path

from streamer.kernel import libbpf

INSTRUCTION = 8
_LOAD_WORD, _JUMP_TO = 0x18, 0x85


def instructions(path: Path, btf: Path) -> dict[str, bytes]:
    """Those of every program, without what a map or function happens to be called.

    They need not load: a BTF file may be another kernel's.
    """
    library = libbpf._library()
    library.bpf_program__insns.restype = ctypes.c_void_p
    library.bpf_program__insn_cnt.restype = ctypes.c_size_t
    opened = libbpf.Object(path, str(btf))
    try:
        for name, one in opened.maps.items():
            if name in ("critical", "bulk"):
                one.resize(4096)
        for program in opened.programs.values():
            program.autoload(True)
        with suppress(OSError):
            opened.load()
        found = {}
        for name, program in opened.programs.items():
            handle = ctypes.c_void_p(program._handle)
            count = library.bpf_program__insn_cnt(handle)
            data = ctypes.string_at(library.bpf_program__insns(handle), count * INSTRUCTION)
            found[name] = b"".join(_plain(data, at) for at in range(0, len(data), INSTRUCTION))
        return found
    finally:
        opened.close()


def _plain(data: bytes, at: int) -> bytes:
    """An instruction; of one that refers to something only what it does, for it has numbers of the
    moment.
    """
    one = data[at : at + INSTRUCTION]
    before = data[at - INSTRUCTION : at]
    refers = one[0] == _LOAD_WORD and one[1] >> 4
    second = at and before[0] == _LOAD_WORD and before[1] >> 4
    return one[:4] if refers or second else one
