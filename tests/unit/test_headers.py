"""Kernel headers: only those of this very build, that nobody else can write to, are compiled."""

from __future__ import annotations

import gzip
import json
import os
import platform
import signal
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from streamer.kernel import headers
from streamer.kernel.compiled import Description, files_read
from streamer.kernel.headers import Refused, Tree
from streamer.kernel.layouts import functions_there

RELEASE, VERSION = "6.1.0-50-amd64", "#1 SMP PREEMPT_DYNAMIC Debian 6.1.176-1 (2026-07-02)"
ARCH = {"x86_64": "x86", "aarch64": "arm64"}[platform.machine()]
CONFIG = """\
CONFIG_SMP=y
CONFIG_NET_SCHED=m
CONFIG_HZ=250
CONFIG_OFFSET=0x0
# CONFIG_DEBUG_LOCK_ALLOC is not set
CONFIG_LOCALVERSION=""
# CONFIG_MODULE_SIG_ALL is not set
"""
AUTOCONF = """\
#define CONFIG_SMP 1
#define CONFIG_NET_SCHED_MODULE 1
#define CONFIG_HZ 250
#define CONFIG_OFFSET 0
#define CONFIG_MODULE_SIG_ALL 1
"""


@pytest.fixture
def roots() -> Iterator[Path]:
    """A directory that nobody but root can have put anything into, unlike those below /tmp."""
    if os.getuid() != 0:
        pytest.skip("of headers nothing is read that is not root's, which takes root to try")
    with tempfile.TemporaryDirectory(prefix="streamer-test-", dir="/run") as made:
        yield Path(made)


@pytest.fixture
def tree(roots: Path, monkeypatch: pytest.MonkeyPatch) -> Tree:
    """Headers as Debian has them, in two directories, and what says how the kernel was made."""
    build, source = roots / "build", roots / "common"
    generated = build / "include" / "generated"
    generated.mkdir(parents=True)
    (source / "include" / "linux").mkdir(parents=True)
    (source / "include" / "linux" / "kconfig.h").touch()
    (build / "Makefile").write_text(f"include {source}/Makefile\n")
    (generated / "utsrelease.h").write_text(f'#define UTS_RELEASE "{RELEASE}"\n')
    (generated / "utsversion.h").write_text(f'#define UTS_VERSION "{VERSION}"\n')
    (generated / "autoconf.h").write_text(AUTOCONF)
    with gzip.open(roots / "config.gz", "wt") as file:
        file.write(CONFIG)
    monkeypatch.setattr(headers, "CONFIGS", (str(roots / "config.gz"),))
    return Tree(str(build), str(source))


def test_they_are_found(tree: Tree, roots: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where they are named, and where they use to be; what was generated and what was not."""
    assert headers.find_tree(tree.build, RELEASE) == tree
    monkeypatch.setattr(headers, "PLACES", ("/no/{release}", str(roots / "{release}")))
    (roots / RELEASE).symlink_to(tree.build)
    assert headers.find_tree("auto", RELEASE) == tree
    (roots / RELEASE / "Makefile").unlink()
    with pytest.raises(Refused, match=f"no kernel headers in /no/{RELEASE} or {roots}"):
        headers.find_tree("auto", RELEASE)
    (roots / "source").symlink_to(tree.source)
    assert headers.find_tree("auto", RELEASE) == tree


def test_those_of_this_kernel(tree: Tree) -> None:
    """The options that packaging changes do not matter, nor how a number is written."""
    headers.check_match(tree, RELEASE, VERSION)


def older(tree: Tree) -> str:
    path = Path(tree.build, "include", "generated", "utsversion.h")
    path.write_text(path.read_text().replace("6.1.176-1", "6.1.175-1"))
    return r'headers of 6\.1\.0-50-amd64 "#1 .*6\.1\.175-1.*", and the kernel is "#1 .*176-1'


def nameless(tree: Tree) -> str:
    Path(tree.build, "include", "generated", "utsversion.h").unlink()
    return "of a build that they do not name"


def renamed(tree: Tree) -> str:
    path = Path(tree.build, "include", "generated", "utsrelease.h")
    path.write_text('#define UTS_RELEASE "6.1.0-49-amd64"\n')
    return r"headers of 6\.1\.0-49-amd64, and the kernel is 6\.1\.0-50-amd64"


def configured(old: str, new: str) -> Callable[[Tree], str]:
    def change(tree: Tree) -> str:
        path = Path(tree.build, "include", "generated", "autoconf.h")
        path.write_text(path.read_text().replace(old, new))
        return f"headers of another configuration than .*: {old.split()[1].replace('_MODULE', '')}"

    return change


@pytest.mark.parametrize(
    "spoil",
    [
        older,
        nameless,
        renamed,
        configured("#define CONFIG_SMP 1", ""),
        configured("#define CONFIG_NET_SCHED_MODULE 1", "#define CONFIG_NET_SCHED 1"),
        configured("#define CONFIG_HZ 250", "#define CONFIG_HZ 1000"),
    ],
)
def test_those_of_another_kernel(tree: Tree, spoil: Callable[[Tree], str]) -> None:
    """The reason says what differs."""
    words = spoil(tree)
    with pytest.raises(Refused, match=words):
        headers.check_match(tree, RELEASE, VERSION)


def test_an_option_that_the_kernel_has_not(tree: Tree) -> None:
    path = Path(tree.build, "include", "generated", "autoconf.h")
    path.write_text(path.read_text() + "#define CONFIG_DEBUG_LOCK_ALLOC 1\n")
    with pytest.raises(Refused, match="CONFIG_DEBUG_LOCK_ALLOC"):
        headers.check_match(tree, RELEASE, VERSION)


def test_who_could_have_changed_them(roots: Path) -> None:
    """The file, or any directory on the way to it, also by way of a link."""
    (roots / "one" / "two").mkdir(parents=True)
    header = roots / "one" / "two" / "sched.h"
    header.touch()
    link = roots / "link"
    link.symlink_to(roots / "one" / "two")
    for path in (header, link / "sched.h"):
        headers.check_owners([str(path)])
    for spoilt in (header, header.parent, header.parent.parent):
        mode = spoilt.stat().st_mode
        spoilt.chmod(0o777)
        for path in (header, link / "sched.h"):
            with pytest.raises(Refused, match=f"{spoilt} can be written to by others"):
                headers.check_owners([str(path)])
        spoilt.chmod(mode)
        os.chown(spoilt, 65534, 65534)
        with pytest.raises(Refused, match=f"{spoilt} belongs to user 65534"):
            headers.check_owners([str(header)])
        os.chown(spoilt, 0, 0)


def test_a_sticky_directory_is_no_better(roots: Path) -> None:
    """There anybody can make what is not there, such as a header that another looks for."""
    (roots / "tmp" / "headers").mkdir(parents=True)
    (roots / "tmp").chmod(0o1777)
    with pytest.raises(Refused, match=f"{roots}/tmp can be written to by others than root"):
        headers.check_owners([str(roots / "tmp" / "headers")])


def test_where_links_lead_over(roots: Path) -> None:
    """The link in the middle is another's, who could lead it elsewhere after the look."""
    for name in ("headers", "theirs"):
        (roots / name).mkdir()
    (roots / "theirs" / "link").symlink_to("../headers")
    (roots / "link").symlink_to("theirs/link")
    headers.check_owners([str(roots / "link")])
    os.chown(roots / "theirs" / "link", 65534, 65534, follow_symlinks=False)
    with pytest.raises(Refused, match=f"{roots}/theirs/link belongs to user 65534"):
        headers.check_owners([str(roots / "link")])
    (roots / "theirs" / "link").unlink()
    (roots / "theirs" / "link").symlink_to("../link")
    os.chown(roots / "theirs" / "link", 0, 0, follow_symlinks=False)
    with pytest.raises(Refused, match="too many links"):
        headers.check_owners([str(roots / "link")])


def test_what_is_another_users_is_not_read(tree: Tree, roots: Path) -> None:
    """Where headers are is looked at before the Makefile in it says where the others are."""
    (roots / "evil").mkdir()
    Path(tree.build, "Makefile").write_text(f"include {roots}/evil/Makefile\n")
    os.chown(tree.build, 65534, 65534)
    with pytest.raises(Refused, match=f"{tree.build} belongs to user 65534"):
        headers.find_tree(tree.build, RELEASE)
    os.chown(tree.build, 0, 0)
    os.chown(Path(tree.build, "Makefile"), 65534, 65534)
    with pytest.raises(Refused, match=f"{tree.build}/Makefile belongs to user 65534"):
        headers.find_tree(tree.build, RELEASE)


@pytest.mark.parametrize("name", ["Makefile", "include/generated/utsrelease.h"])
@pytest.mark.parametrize("kind", ["fifo", "device"])
def test_what_is_no_file_is_not_waited_for(tree: Tree, name: str, kind: str) -> None:
    """A FIFO that nobody writes to, and a device that gives bytes for ever."""
    path = Path(tree.build, name)
    path.unlink()
    if kind == "fifo":
        os.mkfifo(path)
    else:
        os.mknod(path, stat.S_IFCHR | 0o644, os.makedev(1, 5))
    before = signal.signal(signal.SIGALRM, lambda *_: pytest.fail("it is waited for"))
    signal.alarm(10)
    try:
        with pytest.raises(Refused, match=f"{path} is (not a regular|neither a) file"):
            headers.check_match(headers.find_tree(tree.build, RELEASE), RELEASE, VERSION)
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def test_no_more_of_a_file_is_read_than_there_can_be(tree: Tree, roots: Path) -> None:
    """Also of one that is packed, and of one that is packed no more."""
    with Path(tree.build, "Makefile").open("ab") as file:
        file.truncate(headers.MOST_READ + 1)
    with pytest.raises(Refused, match="Makefile has more than 16777216 bytes"):
        headers.find_tree(tree.build, RELEASE)
    with gzip.open(roots / "config.gz", "wb") as packed:
        packed.write(bytes(headers.MOST_READ + 1))
    with pytest.raises(Refused, match=r"config\.gz has more than 16777216 bytes"):
        headers.check_match(tree, RELEASE, VERSION)
    with (roots / "config.gz").open("r+b") as file:
        file.truncate(1000)
    with pytest.raises(Refused, match=r"cannot read .*config\.gz"):
        headers.check_match(tree, RELEASE, VERSION)


def spoilt_file(roots: Path, place: Path) -> str:
    place.touch()
    place.chmod(0o666)
    return f"{place} can be written to by others"


def spoilt_directory(roots: Path, place: Path) -> str:
    (place / "deeper").mkdir(parents=True)
    (place / "deeper").chmod(0o1777)
    return f"{place}/deeper can be written to by others"


def fifo(roots: Path, place: Path) -> str:
    os.mkfifo(place)
    return f"{place} is neither a file nor a directory"


def link_to_another_users(roots: Path, place: Path) -> str:
    (roots / "theirs").mkdir()
    os.chown(roots / "theirs", 65534, 65534)
    place.symlink_to(roots / "theirs" / "not_there_yet.h")
    return f"{roots}/theirs belongs to user 65534"


def link_to_a_directory(roots: Path, place: Path) -> str:
    (roots / "other").mkdir()
    place.symlink_to(roots / "other")
    return spoilt_file(roots, roots / "other" / "a.h")


@pytest.mark.parametrize(
    "spoil", [spoilt_file, spoilt_directory, fifo, link_to_another_users, link_to_a_directory]
)
@pytest.mark.parametrize("directory", ["include/linux", f"arch/{ARCH}/include/asm"])
def test_no_compiler_reads_what_others_can_write(
    tree: Tree,
    roots: Path,
    directory: str,
    spoil: Callable[[Path, Path], str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It is not even started: whatever it could read is looked at before."""
    monkeypatch.setattr(headers, "COMPILER", compiler(roots, f'open("{roots}/started", "w")'))
    place = Path(tree.source, directory, "place")
    place.parent.mkdir(parents=True, exist_ok=True)
    words = spoil(roots, place)
    with pytest.raises(Refused, match=words):
        headers.check_tree(tree, platform.machine())
    with pytest.raises(Refused, match=words):
        headers.layouts(tree.build, ["struct sock"])
    assert not (roots / "started").exists()


def test_links_that_lead_nowhere_are_no_matter(tree: Tree) -> None:
    """Debian's packages have some."""
    Path(tree.source, "include", "none").symlink_to("no/such/file.h")
    headers.check_tree(tree, platform.machine())


def test_functions_of_the_kernel(tmp_path: Path) -> None:
    """By its list of symbols, without which nothing is made of headers."""
    listed = tmp_path / "kallsyms"
    listed.write_text("0 T vfs_read\n0 d jiffies\n0 t schedule\t[core]\n0 W other\n")
    wanted = ["vfs_read", "jiffies", "schedule", "none"]
    assert functions_there(wanted, str(listed)) == {"vfs_read", "schedule"}
    with pytest.raises(Refused, match=f"{tmp_path}/none: No such file or directory"):
        functions_there(wanted, f"{tmp_path}/none")


# ---------------------------------------------------------------- the compiler


def compiler(directory: Path, body: str) -> str:
    path = directory / "compiler.py"
    path.write_text(f"import json, os, sys, time\nrequest = json.load(sys.stdin)\n{body}\n")
    return str(path)


def test_it_has_no_rights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor anything of our environment; what it is told comes back."""
    body = 'status = open("/proc/self/status").read()\n'
    body += 'print(json.dumps({"status": status, "env": sorted(os.environ), "got": request}))'
    monkeypatch.setattr(headers, "COMPILER", compiler(tmp_path, body))
    monkeypatch.setenv("LD_PRELOAD", "/no/such.so")
    answer = headers.compiled({"text": "int x;"}, "/usr/src/x")
    assert answer["got"] == {"text": "int x;"}
    assert set(answer["env"]) <= {"PATH", "BCC_KERNEL_SOURCE", "LC_ALL", "LC_CTYPE"}
    rows = dict(line.split(":\t", 1) for line in answer["status"].splitlines() if ":\t" in line)
    assert rows["NoNewPrivs"] == "1"
    if os.getuid() == 0:
        assert int(rows["CapEff"], 16) == int(rows["CapPrm"], 16) == int(rows["CapBnd"], 16) == 0


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("time.sleep(60)", "bcc has not compiled in"),
        ("os.abort()", "bcc was ended by signal 6"),
        ("sys.exit(3)", "exit code 3"),
        ("", "no answer"),
        ("print('[')", "no answer"),
        ("print('[]')", "no answer"),
        ("print('{}', flush=True); os.close(1); time.sleep(60)", "bcc has not compiled in"),
        ("os.fork() or time.sleep(60)", "bcc has not compiled in"),
    ],
)
def test_it_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: str, words: str) -> None:
    """A crash, a hang or nonsense is a reason like any other."""
    monkeypatch.setattr(headers, "COMPILER", compiler(tmp_path, body))
    hangs = words == "bcc has not compiled in"
    monkeypatch.setattr(headers, "COMPILE_SECONDS", 1.0 if hangs else 60.0)
    with pytest.raises(Refused, match=words):
        headers.compiled({}, "/")


@pytest.mark.parametrize("where", ["1", "os.memfd_create('')"])
def test_it_writes_for_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    """It is ended once it has written more than there can be, and only that much is held."""
    note = tmp_path / "pid"
    body = f"open({str(note)!r}, 'w').write(str(os.getpid()))\nto = {where}\n"
    body += "while True: os.write(to, bytes(1 << 16))"
    monkeypatch.setattr(headers, "COMPILER", compiler(tmp_path, body))
    monkeypatch.setattr(headers, "COMPILE_SECONDS", 60.0)
    monkeypatch.setattr(headers, "MOST_ANSWER", 4 << 20)
    begun = time.monotonic()
    words = "bcc has answered with more than 4194304 bytes" if where == "1" else "exit code 1"
    with pytest.raises(Refused, match=words):
        headers.compiled({}, "/")
    assert time.monotonic() - begun < 30
    with pytest.raises(ProcessLookupError):
        os.kill(int(note.read_text()), 0)


def test_there_is_no_bcc(monkeypatch: pytest.MonkeyPatch) -> None:
    """The program itself says so, in an interpreter that has none."""
    request = json.dumps({"text": "", "flags": [], "source": "/", "types": []}).encode()
    ended = subprocess.run(
        [sys.executable, "-I", headers.COMPILER], input=request, capture_output=True, check=True
    )
    assert json.loads(ended.stdout) == {"error": "no bcc: No module named 'bcc'"}


PRINTED = """\
. ./include/linux/kconfig.h
.. /virtual/include/bcc/bpf.h
; ModuleID = '/virtual/main.c'
!1 = distinct !DICompositeType(tag: DW_TAG_structure_type, name: "sock", size: 192, elements: !2)
!2 = !{!3, !5, !8, !12}
!3 = !DIDerivedType(tag: DW_TAG_member, name: "state", scope: !1, baseType: !4, size: 3, offset: 4, flags: DIFlagBitField, extraData: i64 0)
!4 = !DIBasicType(name: "unsigned char", size: 8, encoding: DW_ATE_unsigned_char)
!5 = !DIDerivedType(tag: DW_TAG_member, scope: !1, baseType: !6, size: 64, offset: 64)
!6 = distinct !DICompositeType(tag: DW_TAG_union_type, scope: !1, size: 64, elements: !7)
!7 = !{!9}
!8 = !DIDerivedType(tag: DW_TAG_member, name: "ports", scope: !1, baseType: !10, size: 32, offset: 128)
!9 = !DIDerivedType(tag: DW_TAG_member, name: "next", scope: !6, baseType: !13, size: 64)
!10 = !DICompositeType(tag: DW_TAG_array_type, baseType: !14, size: 32, elements: !11)
!11 = !{!15, !15}
!12 = !DIDerivedType(tag: DW_TAG_member, name: "kind", scope: !1, baseType: !16, size: 32, offset: 160)
!13 = !DIDerivedType(tag: DW_TAG_pointer_type, baseType: !1, size: 64)
!14 = !DIDerivedType(tag: DW_TAG_typedef, name: "u8", baseType: !4)
!15 = !DISubrange(count: 2)
!16 = !DICompositeType(tag: DW_TAG_enumeration_type, name: "kind", baseType: !17, size: 32, elements: !18)
!17 = !DIBasicType(name: "int", size: 32, encoding: DW_ATE_signed)
!18 = !{!19, !20}
!19 = !DIEnumerator(name: "GOOD", value: 1)
!20 = !DIEnumerator(name: "BAD", value: -1)
!21 = !DICompositeType(tag: DW_TAG_structure_type, name: "mount", flags: DIFlagFwdDecl)
"""  # noqa: E501


def test_what_it_prints_is_understood() -> None:
    """Bit-fields, arrays of arrays, what has no name, and what is declared only."""
    described = Description(PRINTED)
    assert described.find("struct", "mount") is None
    assert described.find("struct", "kind") is None
    found = described.find("struct", "sock")
    assert found is not None
    types = described.types

    def whole(index: int) -> Any:
        match types[index]:
            case [("struct" | "union") as kind, name, size, members]:
                return [kind, name, size, [[n, whole(t), at, bits] for n, t, at, bits in members]]
            case ["array", of, count]:
                return ["array", whole(of), count]
            case other:
                return other

    u8 = ["int", "unsigned char", 1, ""]
    assert whole(found) == [
        "struct",
        "sock",
        24,
        [
            ["state", u8, 4, 3],
            ["", ["union", "", 8, [["next", ["pointer"], 0, 0]]], 64, 0],
            ["ports", ["array", ["array", u8, 2], 2], 128, 0],
            ["kind", ["enum", "kind", 4, [("GOOD", 1), ("BAD", -1)]], 160, 0],
        ],
    ]
    assert files_read(PRINTED, "/usr/src/x") == ["/usr/src/x/./include/linux/kconfig.h"]
