"""The helper as a process of its own: what it does, what it refuses, and that it survives."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import ctypes
import gzip
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from streamer.config.settings import Settings
from streamer.errors import ContractError, HelperGone, KernelError, PrivilegeError, StreamerError
from streamer.kernel import processes
from streamer.kernel.loader import NO_TARGETS, ProgramState, Targets, Transport
from streamer.privilege import split
from streamer.privilege.channel import MESSAGE_BYTES, Channel
from streamer.privilege.client import (
    ANSWER_SECONDS,
    HelperClient,
    RemoteLoader,
    RemoteOpener,
    _error,
    look_up,
)
from streamer.privilege.files import NamedFile, read_all
from streamer.privilege.helper import told
from streamer.privilege.proc import MOST_BYTES
from streamer.privilege.requests import PROC_FILES, PROC_LINKS, REQUESTS, Refused, parse
from streamer.privilege.split import start_helper

PROGRAM = str(Path(__file__).parent / "memory_helper.py")
SECRET = b"correct horse\n"
GOOD = {"request": "update", "id": 77, "map": "small", "key": "", "value": ""}


class Setting:
    """A helper that was told of two files, in a directory of the test."""

    def __init__(self, directory: Path, targets: Mapping[str, Targets] = NO_TARGETS) -> None:
        self.secret, self.events = directory / "secret", directory / "events"
        self.secret.write_bytes(SECRET)
        self.secret.chmod(0o600)
        self.files = (
            NamedFile(str(self.secret), "read"),
            NamedFile(str(self.events), "append", 0o640),
        )
        self.client = start_helper(PROGRAM)
        self.client.set_up(self.files, targets)
        self.loader = RemoteLoader(self.client, self.files)
        self.opener = RemoteOpener(self.client, self.files)


@pytest.fixture
def helper(tmp_path: Path) -> Iterator[Setting]:
    made = Setting(tmp_path)
    yield made
    made.client.close()


# ---------------------------------------------------------------- what it does


def test_loading(helper: Setting) -> None:
    """Every method of a loader arrives there, and its results here."""
    loader = helper.loader
    maps = loader.load_core({"critical": 4096, "bulk": 8192}, str(helper.secret))
    assert list(maps) == ["critical", "bulk"]
    assert {key: value.rstrip() for key, value in loader.read("told")} == {
        b"ring": b"{'critical': 4096, 'bulk': 8192}",
        b"btf_": repr(str(helper.secret)).encode(),
        b"tran": b"'auto'",
    }
    assert loader.transport == Transport("perf", {"bulk": 4096}, "there are no rings")
    buffers = loader.open_buffers(0)
    assert list(buffers) == ["critical", "bulk"]
    assert loader.open_buffers(1) == {}
    for fd in buffers.values():
        assert not os.get_inheritable(fd)
        os.close(fd)
    loaded = loader.load("good", {"connections": 65536})
    assert loaded.programs == [ProgramState("on_good", "raw_tp/good", "raw_tp", "loaded", "")]
    once, attached = loader.attach("good"), loader.attach("good")
    assert [program.status for program in attached.programs] == ["attached"]
    assert attached.descriptors.keys() == {"on_good"}
    held = (*loaded.maps.values(), *attached.descriptors.values())
    for fd in (*maps.values(), *held):
        assert not os.get_inheritable(fd)
    loader.unload("good")
    assert not [fd for fd in (*held, *once.descriptors.values()) if is_open(fd)]
    loader.load("good", {})
    held = tuple(loader.attach("good").descriptors.values())
    loader.close()
    assert not [fd for fd in (*maps.values(), *held) if is_open(fd)]


def is_open(fd: int) -> bool:
    return Path(f"/proc/self/fd/{fd}").exists()


def test_maps(helper: Setting) -> None:
    loader = helper.loader
    loader.update("small", b"\x00key", bytes(range(256)))
    assert loader.read("small") == [(b"\x00key", bytes(range(256)))]
    loader.delete("small", b"\x00key")
    assert loader.read("small") == loader.read("empty") == []


def test_a_map_that_is_taken(helper: Setting) -> None:
    """All that was in it comes, in parts, and it is empty afterwards."""
    entries = helper.loader.read("large")
    assert helper.loader.take("large") == entries
    assert helper.loader.take("large") == helper.loader.read("large") == []
    with pytest.raises(KernelError, match="no map nowhere"):
        helper.loader.take("nowhere")


def where_it_is(pid: int) -> tuple[int, int, int]:
    """Its pid, when it started, and where its arguments are."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return pid, int(fields[19]) * 10_000_000, int(fields[45])


def test_code_of_processes_is_for_profiles(helper: Setting) -> None:
    """Where nothing is sampled, nobody needs to know of it."""
    with pytest.raises(KernelError, match="nothing is sampled"):
        helper.loader.locate(*where_it_is(os.getpid()), [1])
    with pytest.raises(KernelError, match="nothing is sampled"):
        helper.loader.open_module(*where_it_is(os.getpid()), 1, 2)


@pytest.fixture
def profiling(tmp_path: Path) -> Iterator[Setting]:
    made = Setting(tmp_path, {"good": Targets(rate=99)})
    yield made
    made.client.close()


def test_where_code_of_a_process_is(profiling: Setting) -> None:
    code = ctypes.cast(ctypes.CDLL(None).getpid, ctypes.c_void_p).value or 0
    here = where_it_is(os.getpid())
    found = profiling.loader.locate(*here, [code, 1])
    assert found == processes.locate(*here, [code, 1])
    assert [module for module, _ in found.places] == [0, -1]
    with pytest.raises(ProcessLookupError):
        profiling.loader.locate(here[0], here[1] + 10**9, here[2], [code])


@pytest.mark.usefixtures("opens_mappings")
def test_a_file_that_a_process_has_mapped(profiling: Setting) -> None:
    code = ctypes.cast(ctypes.CDLL(None).getpid, ctypes.c_void_p).value or 0
    here = where_it_is(os.getpid())
    (module,) = profiling.loader.locate(*here, [code]).modules
    fd = profiling.loader.open_module(*here, module.first, module.last)
    assert os.read(fd, 4) == b"\x7fELF"
    assert not os.get_inheritable(fd)
    os.close(fd)
    with pytest.raises(FileNotFoundError):
        profiling.loader.open_module(*here, module.first + 1, module.last)
    with pytest.raises(ProcessLookupError):
        profiling.loader.open_module(here[0], here[1] + 10**9, here[2], module.first, module.last)


def test_a_profile_takes_one_capability_more(profiling: Setting) -> None:
    text = Path(f"/proc/{profiling.client.pid}/status").read_text()
    status = dict(line.split(":\t", 1) for line in text.splitlines())
    here = dict(line.split(":\t", 1) for line in Path("/proc/self/status").read_text().splitlines())
    bit = 1 << 40
    assert int(status["CapPrm"], 16) & bit == int(here["CapPrm"], 16) & bit


def test_a_map_of_many_entries(helper: Setting) -> None:
    """It comes in parts, none of which is a message that is too large."""
    entries = helper.loader.read("large")
    assert entries == [
        (i.to_bytes(4, "little"), bytes([i % 251] * 24)) for i in range(1 << 16)
    ]  # fmt: skip


def test_errors_keep_their_kind(helper: Setting) -> None:
    with pytest.raises(FileNotFoundError):
        helper.loader.delete("small", b"nothing")
    helper.loader.load_core({}, None)
    with pytest.raises(KernelError, match="the verifier said no"):
        helper.loader.load("bad", {})
    with pytest.raises(KernelError, match="no map nowhere"):
        helper.loader.read("nowhere")
    with pytest.raises(KernelError, match="ZeroDivisionError"):
        helper.loader.load("broken", {})
    helper.loader.update("small", b"", b"")


def test_a_file_to_read(helper: Setting) -> None:
    assert read_all(helper.opener.open(str(helper.secret))) == SECRET
    helper.secret.write_bytes(b"renewed")
    assert read_all(helper.opener.open(str(helper.secret))) == b"renewed"


def test_a_file_to_append_to(helper: Setting) -> None:
    """Made with exactly its mode; opened anew when the name has come to mean another file."""
    file = helper.opener.append(str(helper.events), 0o640)
    before = os.umask(0o077)
    try:
        first = file.open()
    finally:
        os.umask(before)
    assert not first.torn
    assert helper.events.stat().st_mode & 0o7777 == 0o640
    os.write(first.fd, b"one")
    again = file.open()
    assert again.torn
    assert file.current()
    os.write(again.fd, b"\n")
    rotated = file.rotate(2)
    os.write(rotated.fd, b"two\n")
    assert not rotated.torn
    assert helper.events.read_bytes() == b"two\n"
    older = Path(f"{helper.events}.1")
    assert older.read_bytes() == b"one\n"
    packing = file.pack(2)
    assert packing is not None
    os.write(packing.target, gzip.compress(os.read(packing.source, 100)))
    file.packed(True)
    assert gzip.decompress(Path(f"{older}.gz").read_bytes()) == b"one\n"
    assert not older.exists()
    assert file.pack(2) is None
    helper.events.unlink()
    assert not file.current()
    for fd in (first.fd, again.fd, rotated.fd, *packing):
        os.close(fd)


def test_it_keeps_no_descriptor_of_what_it_opened(helper: Setting) -> None:
    """One for each rotation would be none left after a while."""
    file = helper.opener.append(str(helper.events), 0o640)
    kept = Path(f"/proc/{helper.client.pid}/fd")
    before = len(list(kept.iterdir()))
    for _ in range(3):
        given = [file.open().fd, file.rotate(5).fd, helper.opener.open(str(helper.secret))]
        file.packed(False)
        os.write(given[1], b"one\n")
        given += file.pack(5) or ()
        for fd in given:
            assert os.get_blocking(fd)  # only for its opening it was not
            os.close(fd)
        look_up(helper.client, os.getpid(), "stat")
        assert file.current()  # what it sent is closed by then
    assert len(list(kept.iterdir())) == before


def test_a_fifo_does_not_hold_it_up(helper: Setting) -> None:
    """It has one thread: whoever can put a FIFO somewhere could stop everything."""
    helper.secret.unlink()
    os.mkfifo(helper.secret)
    assert read_all(helper.opener.open(str(helper.secret))) == b""
    file = helper.opener.append(str(helper.events), 0o640)
    os.close(file.open().fd)
    os.mkfifo(f"{helper.events}.1")
    assert file.pack(2) is None
    helper.events.unlink()
    os.mkfifo(helper.events)
    with pytest.raises(OSError, match="No such device or address"):  # nobody reads
        file.open()


async def test_an_answer_to_a_thread_is_no_end_of_the_helper(helper: Setting) -> None:
    """The loop watches the socket on which answers come that threads have asked for."""
    loop, ends = asyncio.get_running_loop(), []
    file = helper.opener.append(str(helper.events), 0o640)
    os.close(file.open().fd)
    helper.client.watch(loop, lambda: ends.append(True))
    answers = await asyncio.to_thread(lambda: [file.current() for _ in range(2000)])
    assert answers == [True] * 2000
    assert not ends
    os.kill(helper.client.pid, signal.SIGKILL)
    async with asyncio.timeout(10):
        while not ends:  # noqa: ASYNC110 - the watch is what is looked at
            await asyncio.sleep(0.01)
    await asyncio.sleep(0.05)
    assert ends == [True]


async def test_the_loop_does_not_wait_for_a_thread_that_asks(helper: Setting) -> None:
    """Its disk may hang; that the helper has ended is noticed all the same, once it is back."""
    ends: list[bool] = []
    helper.client.watch(asyncio.get_running_loop(), lambda: ends.append(True))
    with helper.client._lock:  # as a thread holds it until it has its answer
        os.kill(helper.client.pid, signal.SIGKILL)
        await asyncio.sleep(0.05)
        assert not ends
    async with asyncio.timeout(10):
        while not ends:  # noqa: ASYNC110 - the watch is what is looked at
            await asyncio.sleep(0.01)


def test_a_name_that_is_no_text(tmp_path: Path) -> None:
    """Bytes beyond UTF-8, as names of files may have them."""
    path = os.fsdecode(os.fsencode(tmp_path) + b"/\xfc \xc3\xbc")
    files = (NamedFile(path, "append", 0o600), NamedFile(path, "read"))
    client = start_helper(PROGRAM)
    client.set_up(files)
    opener = RemoteOpener(client, files)
    with open(opener.append(path, 0o600).open().fd, "wb") as file:
        file.write(b"data")
    assert read_all(opener.open(path)) == b"data"
    client.close()
    assert [os.fsencode(name) for name in os.listdir(tmp_path)] == [b"\xfc \xc3\xbc"]


def test_proc(helper: Setting) -> None:
    """Of any process; what is too long is cut, and says so."""
    for name in PROC_FILES:
        assert not look_up(helper.client, os.getpid(), name).cut
    for name in PROC_LINKS:
        path = f"/proc/{os.getpid()}/{name}"
        assert look_up(helper.client, os.getpid(), name) == (os.fsencode(os.readlink(path)), False)
    words = ["sleep", *["60"] * MOST_BYTES]
    with subprocess.Popen(words, executable="/bin/sleep") as process:
        try:
            while not Path(f"/proc/{process.pid}/cmdline").read_bytes():
                time.sleep(0.001)  # in the middle of its exec
            found = look_up(helper.client, process.pid, "cmdline")
        finally:
            process.kill()
    assert found == ("\0".join(words).encode()[:MOST_BYTES], True)


def test_no_addresses_of_a_process(helper: Setting, tmp_path: Path) -> None:
    """Who has taken over the worker does not learn where the memory of root's processes is."""
    program = tmp_path / "a) R 1 (b"
    program.symlink_to("/bin/sleep")
    with subprocess.Popen([program, "60"]) as process:
        try:
            found = look_up(helper.client, process.pid, "stat").data.decode()
            whole = Path(f"/proc/{process.pid}/stat").read_text()
        finally:
            process.kill()
    assert found.startswith(f"{process.pid} (a) R 1 (b) ")
    fields, own = found.rpartition(")")[2].split(), whole.rpartition(")")[2].split()
    assert len(fields) == 22
    assert fields[19] == own[19]  # its start


def test_a_process_that_is_gone(helper: Setting) -> None:
    pid = os.posix_spawn("/bin/true", ["true"], {})
    os.waitpid(pid, 0)
    with pytest.raises(FileNotFoundError):
        look_up(helper.client, pid, "stat")


def give_away(to: socket.socket) -> None:
    """In the worker: start a helper, and give the socket to it to somebody else."""
    client = start_helper(PROGRAM)
    client.set_up(())
    socket.send_fds(to, [b"x"], [client._channel.fileno()])


def test_a_helper_ends_with_its_worker() -> None:
    """Also when the worker, taken over, has given the socket to a process that lives on."""
    own, other = socket.socketpair()
    pid = os.fork()
    if pid == 0:
        try:
            give_away(other)
        finally:
            os._exit(0)
    os.waitpid(pid, 0)
    _, (fd,), _, _ = socket.recv_fds(own, 1, 1)
    with own, other, socket.socket(fileno=fd) as stolen:
        stolen.settimeout(20)
        assert stolen.recv(1) == b""  # no longer there
        with pytest.raises(BrokenPipeError):
            stolen.send(json.dumps(GOOD).encode())


def test_what_it_keeps(helper: Setting) -> None:
    """Root keeps five capabilities at most; nobody regains any, or does what a filter refuses."""
    text = Path(f"/proc/{helper.client.pid}/status").read_text()
    status = dict(line.split(":\t", 1) for line in text.splitlines())
    dac, perf = 1 << 1 | 1 << 2, 1 << 38 | 1 << 39
    paranoid = int(Path("/proc/sys/kernel/perf_event_paranoid").read_text()) > 2
    assert int(status["CapPrm"], 16) & ~(dac | perf | 1 << 19 | paranoid << 21) == 0
    assert [int(status[name], 16) for name in ("CapInh", "CapAmb")] == [0, 0]
    if os.geteuid() == 0:
        assert int(status["CapBnd"], 16) == 0
    assert (status["NoNewPrivs"], status["Seccomp"], status["Threads"]) == ("1", "2", "1")
    assert status["Name"] == "streamer-helper"
    # No file system is kept from being unmounted by where it was started.
    assert os.readlink(f"/proc/{helper.client.pid}/cwd") == "/"


# ---------------------------------------------------------------- what it refuses


def parsed(request: str, **parameters: Any) -> dict[str, Any] | str:
    """What a request comes to, or the word for what is wrong with it."""
    try:
        return parse({"request": request, "id": 0, **parameters}).parameters
    except Refused as error:
        return str(error)


def options(count: int, size: int) -> dict[str, Any]:
    return {"sensor": "s" * 32, "options": {f"t{i}": size for i in range(count)}}


def element(size: int) -> dict[str, Any]:
    return {"map": "m" * 64, "key": base64.b64encode(bytes(size)).decode()}


LIMITS: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("open", {"index": 0}, {"index": -1}),
    ("open", {"index": 1 << 16}, {"index": (1 << 16) + 1}),
    ("rotate", {"index": 0, "keep": 1}, {"index": 0, "keep": 0}),
    ("pack", {"index": 0, "keep": 100}, {"index": 0, "keep": 101}),
    ("proc", {"pid": 1, "name": "stat"}, {"pid": 0, "name": "stat"}),
    ("proc", {"pid": 1 << 22, "name": "exe"}, {"pid": (1 << 22) + 1, "name": "exe"}),
    ("load", options(64, 1 << 22), options(65, 1)),
    ("load", options(1, 0), options(1, (1 << 22) + 1)),
    ("load", {"sensor": "s", "options": {}}, {"sensor": "s" * 33, "options": {}}),
    (
        "load_core",
        {"rings": {"r": 1 << 30}, "btf": None, "transport": "auto"},
        {"rings": {"r": -1}, "btf": None, "transport": "auto"},
    ),
    (
        "load_core",
        {"rings": {}, "btf": 0, "transport": "perf"},
        {"rings": {"r": (1 << 30) + 1}, "btf": 0, "transport": "perf"},
    ),
    ("open_buffers", {"cpu": 65535}, {"cpu": 65536}),
    ("delete", element(1 << 16), element(2 << 16)),
    ("read", {"map": "m" * 64}, {"map": "m" * 65}),
    ("read", {"map": ".rodata_x"}, {"map": "a b"}),
]


@pytest.mark.parametrize(("name", "last", "beyond"), LIMITS)
def test_the_last_value_that_is_in_order(
    name: str, last: dict[str, Any], beyond: dict[str, Any]
) -> None:
    found = parsed(name, **last)
    assert isinstance(found, dict), found
    assert isinstance(parsed(name, **beyond), str)


def test_only_exact_base64_is_taken() -> None:
    assert parsed("delete", map="m", key="AA==") == {"map": "m", "key": b"\0"}
    for wrong in ("A*A==", "AA==\n", "AA==AA==", "AA"):
        assert parsed("delete", map="m", key=wrong) == "delete: key"


@pytest.mark.parametrize("kind", [PrivilegeError, KernelError, ContractError])
def test_an_error_of_the_kernel_is_the_same_here(kind: type[StreamerError]) -> None:
    """Its exit code depends on it."""
    error = _error(told(kind("why")))
    assert (type(error), str(error)) == (kind, "why")


class Raw:
    """A helper that is written to without any care."""

    def __init__(self, directory: Path) -> None:
        self.near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.further, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        for end in (self.near, self.further):
            end.settimeout(30)
        given = far.fileno(), other.fileno()
        self.process = subprocess.Popen(
            [sys.executable, "-I", "-S", PROGRAM, *map(str, given)], pass_fds=given
        )
        far.close()
        other.close()
        (directory / "secret").write_bytes(SECRET)
        files = [[str(directory / "secret"), "read", 0], [str(directory / "events"), "append", 416]]
        start = {"files": files, "targets": {}, "headers": "off", "workers": 1}
        assert self.ask(start)["result"] is None

    def ask(self, message: object) -> dict[str, Any]:
        return self.send(json.dumps(message).encode())

    def send(self, data: bytes) -> dict[str, Any]:
        self.near.send(data)
        return self.receive()

    def receive(self) -> dict[str, Any]:
        reply, ancillary, _, _ = self.near.recvmsg(MESSAGE_BYTES, socket.CMSG_SPACE(40))
        assert not ancillary
        answer = json.loads(reply)
        assert isinstance(answer, dict)
        return answer

    def check_alive(self) -> None:
        """It answers a request that is in order."""
        assert self.ask(GOOD) == {"id": 77, "result": None, "more": False}

    def ask_as_further(self, message: object) -> tuple[dict[str, Any], list[int]]:
        """As a further worker does: the answer, and descriptors."""
        self.further.send(json.dumps(message).encode())
        reply, found, _, _ = socket.recv_fds(self.further, MESSAGE_BYTES, 10)
        return json.loads(reply), found

    def close(self) -> None:
        self.further.close()
        self.near.close()
        assert self.process.wait(30) == 0


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Raw]:
    made = Raw(tmp_path_factory.mktemp("raw"))
    yield made
    made.close()


def test_a_further_worker_reads_files_and_nothing_else(raw: Raw) -> None:
    """What is named to be read is opened for it; neither the kernel nor other files are its own."""
    answer, (fd,) = raw.ask_as_further({"request": "open", "id": 5, "index": 0})
    assert answer == {"id": 5, "result": {"torn": False}, "more": False}
    with open(fd, "rb") as file:
        assert file.read() == SECRET
    for request in (
        {"request": "open", "id": 6, "index": 1},
        {"request": "current", "id": 6, "index": 1},
        {"request": "read", "id": 6, "map": "m"},
        {"request": "proc", "id": 6, "pid": os.getpid(), "name": "comm"},
        {"request": "end", "id": 6},
        GOOD,
        ["no object"],
    ):
        answer, found = raw.ask_as_further(request)
        assert (answer["error"]["kind"], found) == ("Refused", []), request
    raw.check_alive()


def test_a_further_worker_that_reads_no_answer_keeps_nobody_waiting(tmp_path: Path) -> None:
    raw = Raw(tmp_path)
    raw.further.settimeout(0.2)
    with contextlib.suppress(TimeoutError):
        for _ in range(5000):  # many more than there is room for answers
            raw.further.send(b'{"request":"open","id":5,"index":1}')
    begun = time.monotonic()
    for _ in range(30):
        raw.check_alive()
    raw.close()
    assert time.monotonic() - begun < 20  # waiting a second for each answer would take longer


def refused(raw: Raw, message: object) -> str:
    answer = raw.ask(message)
    assert answer["error"]["kind"] == "Refused", answer
    raw.check_alive()
    text: str = answer["error"]["text"]
    return text


WRONG: list[tuple[str, dict[str, Any]]] = [
    ("open", {"index": 2}),
    ("open", {"index": -1}),
    ("open", {"index": True}),
    ("open", {"index": 0.0}),
    ("open", {"index": "0"}),
    ("open", {"index": None}),
    ("open", {"index": [0]}),
    ("open", {"path": "/etc/shadow"}),
    ("open", {"index": 0, "path": "/etc/shadow"}),
    ("rotate", {"index": 0, "keep": 3}),
    ("rotate", {"index": 1, "keep": 0}),
    ("rotate", {"index": 1, "keep": 101}),
    ("rotate", {"index": 1, "keep": True}),
    ("current", {"index": 0}),
    ("current", {"index": 2}),
    ("pack", {"index": 0, "keep": 3}),
    ("pack", {"index": 1, "keep": 0}),
    ("packed", {"index": 0, "whole": True}),
    ("packed", {"index": 1, "whole": 1}),
    ("proc", {"pid": 1, "name": "environ"}),
    ("proc", {"pid": 1, "name": "mem"}),
    ("proc", {"pid": 1, "name": "fd/0"}),
    ("proc", {"pid": 1, "name": "maps"}),
    ("proc", {"pid": 1, "name": "auxv"}),
    ("proc", {"pid": 1, "name": "root/etc/shadow"}),
    ("proc", {"pid": 1, "name": "task/1/environ"}),
    ("proc", {"pid": 1, "name": "../../etc/shadow"}),
    ("proc", {"pid": 1, "name": ["stat"]}),
    ("proc", {"pid": 0, "name": "stat"}),
    ("proc", {"pid": "self", "name": "stat"}),
    ("proc", {"pid": 1 << 23, "name": "stat"}),
    ("take", {"map": "../x"}),
    ("locate", {"pid": 1, "start": 1, "image": 1, "addresses": []}),  # nothing is sampled
    ("locate", {"pid": 0, "start": 1, "image": 1, "addresses": []}),
    ("locate", {"pid": 1, "start": -1, "image": 1, "addresses": []}),
    ("locate", {"pid": 1, "start": 1, "image": 1 << 64, "addresses": []}),
    ("locate", {"pid": 1, "start": 1, "image": 1, "addresses": [1.5]}),
    ("locate", {"pid": 1, "start": 1, "image": 1, "addresses": [1] * 2049}),
    ("locate", {"pid": 1, "start": 1, "image": 1, "addresses": "1"}),
    ("open_module", {"pid": 1, "start": 1, "image": 1, "first": 1, "last": 2}),  # likewise
    ("open_module", {"pid": 1, "start": 1, "image": 1, "first": "../exe", "last": 2}),
    ("open_module", {"pid": 1, "first": 1, "last": 2}),
    ("load", {"sensor": "good", "options": {}}),  # no core yet
    ("load", {"sensor": "../../tmp/evil", "options": {}}),
    ("load", {"sensor": "", "options": {}}),
    ("load", {"sensor": "good\n", "options": {}}),
    ("load", {"sensor": "good", "options": {"t": -1}}),
    ("load", {"sensor": "good", "options": {"t": (1 << 22) + 1}}),
    ("load", {"sensor": "good", "options": {str(i): 1 for i in range(65)}}),
    ("attach", {"sensor": "good"}),  # not loaded
    ("run", {"sensor": "good"}),
    ("unload", {"sensor": "good"}),
    ("load_core", {"rings": {}, "btf": "/tmp/evil", "transport": "auto"}),
    ("load_core", {"rings": {}, "btf": 1, "transport": "auto"}),  # a file to append to
    ("load_core", {"rings": {}, "btf": 9, "transport": "auto"}),
    ("load_core", {"rings": [1], "btf": None, "transport": "auto"}),
    ("load_core", {"rings": {"a/b": 1}, "btf": None, "transport": "auto"}),
    ("load_core", {"rings": {}, "btf": None, "transport": "ring"}),
    ("open_buffers", {"cpu": -1}),
    ("open_buffers", {"cpu": "0"}),
    ("update", {"map": "small", "key": "AA", "value": ""}),  # no Base64
    ("update", {"map": "small", "key": "ä", "value": ""}),
    ("update", {"map": "small", "key": 7, "value": ""}),
    ("update", {"map": "small", "key": "AA=="}),
    ("end", {"extra": 1}),
    ("exec", {"argv": ["/bin/sh"]}),
    ("set_up", {"files": []}),
    ("__class__", {}),
]


@pytest.mark.parametrize(("request_name", "parameters"), WRONG)
def test_a_request_that_is_not_in_order(
    raw: Raw, request_name: str, parameters: dict[str, Any]
) -> None:
    assert refused(raw, {"request": request_name, "id": 5, **parameters})


@pytest.mark.parametrize("number", [None, "1", -1, 1 << 63, 1.0, True, [1]])
def test_a_number_that_is_none(raw: Raw, number: object) -> None:
    assert refused(raw, GOOD | {"id": number}) == "update: id"


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\0",
        b"{",
        b"[]",
        b"null",
        b'"end"',
        b"[" * 60000,
        b'{"id":' + b"9" * 60000 + b"}",
        b'{"request":"end","id":NaN}',
        b"\xff" * 100,
        b'{"request":"\\ud800","id":1}',
        b" " * (MESSAGE_BYTES + 1),
    ],
    ids=lambda data: f"{data[:12]!r}-{len(data)}",
)
def test_a_packet_that_is_no_request(raw: Raw, data: bytes) -> None:
    answer = raw.send(data)
    assert answer["error"]["kind"] == "Refused"
    raw.check_alive()


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(1 << 64), 1 << 64)
    | st.floats()
    | st.text(max_size=20)
    | st.sampled_from(["small", "stat", "exe", "good", "AAAA", "critical"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=6,
)
KEYS = sorted({key for parameters in REQUESTS.values() for key in parameters})
NAMES = sorted(REQUESTS.keys() - {"end", "load_core"})
REQUESTED = st.builds(
    lambda name, number, parameters: {"request": name, "id": number, **parameters},
    st.sampled_from(NAMES) | VALUES,
    st.integers(0, 9) | VALUES,
    st.dictionaries(st.sampled_from(KEYS), VALUES, max_size=4),
)
FUZZ = settings(
    max_examples=300,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@FUZZ
@given(message=REQUESTED | VALUES, junk=st.binary(max_size=200), raw_first=st.booleans())
def test_it_survives_whatever_it_is_sent(
    raw: Raw, message: object, junk: bytes, raw_first: bool
) -> None:
    """Nothing but what is on the list is done, and the next request is answered."""
    for data in (junk, json.dumps(message).encode())[:: 1 if raw_first else -1]:
        raw.near.send(data)
        more = True
        while more:
            reply, ancillary, _, _ = raw.near.recvmsg(MESSAGE_BYTES, 64)
            answer = json.loads(reply)
            more = answer.get("more", False)
            assert not ancillary or "torn" in answer["result"]
            for _, _, fds in ancillary:
                os.close(int.from_bytes(fds[:4], sys.byteorder))
    raw.check_alive()


def test_the_beginning_of_a_packet_is_not_taken(raw: Raw) -> None:
    """Although it would be a request that is in order."""
    answer = raw.send(json.dumps(GOOD).encode().ljust(MESSAGE_BYTES + 1))
    assert answer["error"]["text"] == f"a message of more than {MESSAGE_BYTES} bytes"
    raw.check_alive()


def test_descriptors_are_not_taken(raw: Raw) -> None:
    """The kernel drops what a message brings, and the message is refused."""
    fds = Path(f"/proc/{raw.process.pid}/fd")
    before = len(list(fds.iterdir()))
    socket.send_fds(raw.near, [json.dumps(GOOD).encode()], [0, 1, 2])
    assert raw.receive()["error"]["text"] == "more descriptors than allowed"
    assert len(list(fds.iterdir())) == before
    raw.check_alive()


def test_loading_twice(helper: Setting) -> None:
    helper.loader.load_core({}, None)
    with pytest.raises(KernelError, match="loaded already"):
        helper.loader.load_core({}, None)
    helper.loader.load("good", {})
    with pytest.raises(KernelError, match="loaded already"):
        helper.loader.load("good", {})


def test_files_that_were_not_named(helper: Setting) -> None:
    """They are not even asked for."""
    with pytest.raises(PermissionError):
        helper.opener.open("/etc/passwd")
    with pytest.raises(PermissionError):
        helper.opener.append(str(helper.secret), 0o640)


# ---------------------------------------------------------------- life and death


def test_signals_that_are_meant_for_the_worker(helper: Setting) -> None:
    for number in (
        *(signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT),
        *(signal.SIGUSR1, signal.SIGUSR2, signal.SIGALRM, signal.SIGPIPE),
    ):
        os.kill(helper.client.pid, number)
    helper.loader.update("small", b"", b"")


def test_it_is_told_when_the_helper_is_killed(helper: Setting) -> None:
    async def killed() -> str:
        gone = asyncio.Event()
        helper.client.watch(asyncio.get_running_loop(), gone.set)
        os.kill(helper.client.pid, signal.SIGKILL)
        await asyncio.wait_for(gone.wait(), 10)
        return helper.client.obituary()

    assert asyncio.run(killed()) == "the privileged helper was ended by SIGKILL"
    with pytest.raises(HelperGone):
        helper.loader.update("small", b"", b"")


def test_a_request_while_the_helper_dies(helper: Setting) -> None:
    os.kill(helper.client.pid, signal.SIGKILL)
    with pytest.raises(HelperGone, match="has ended"):
        helper.loader.update("small", b"", b"")
    with pytest.raises(HelperGone, match="has ended"):
        helper.loader.update("small", b"", b"")


def test_a_helper_that_does_not_answer(helper: Setting) -> None:
    """The wait is limited, and nothing is asked of it again: an answer might come late."""
    os.kill(helper.client.pid, signal.SIGSTOP)
    try:
        with pytest.raises(HelperGone, match="does not answer"):
            helper.client.ask("unload", seconds=0.2, sensor="good")
        started = time.monotonic()
        with pytest.raises(HelperGone, match="does not answer"):
            helper.client.ask("unload", sensor="good")
        assert time.monotonic() - started < ANSWER_SECONDS / 2
    finally:
        os.kill(helper.client.pid, signal.SIGCONT)


def orphan(directory: Path, last: dict[str, Any] | None) -> tuple[int, str]:
    """Exit code and stderr of a helper whose worker sends `last` and then goes."""
    near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with subprocess.Popen(
        [sys.executable, "-I", "-S", PROGRAM, str(far.fileno())],
        pass_fds=(far.fileno(),),
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        far.close()
        near.settimeout(30)
        near.send(json.dumps({"files": [], "targets": {}, "headers": "off", "workers": 0}).encode())
        near.recv(MESSAGE_BYTES)
        if last is not None:
            near.send(json.dumps(last).encode())
        near.close()
        assert process.stderr is not None
        return process.wait(30), process.stderr.read()


def test_a_worker_that_ends_in_order(tmp_path: Path) -> None:
    assert orphan(tmp_path, {"request": "end", "id": 1}) == (0, "")


@pytest.mark.parametrize("waits", [True, False])
def test_an_end_that_is_meant(waits: bool, capfd: pytest.CaptureFixture[str]) -> None:
    """The helper has nothing to complain about, whether it was waited for or not."""
    client = start_helper(PROGRAM)
    client.set_up(())
    if waits:
        client.close()
    else:
        client.farewell()
        client._channel.close()
    assert client._process.wait(30) == 0
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("last", [None, GOOD, {"request": "nonsense"}])
def test_a_worker_that_is_killed(tmp_path: Path, last: dict[str, Any] | None) -> None:
    """Also when what it asked last is not answered any more."""
    line = "streamer: the worker ended without a word; its programs are detached\n"
    assert orphan(tmp_path, last) == (0, line)


def test_what_keeps_it_from_starting() -> None:
    client = start_helper(PROGRAM)
    try:
        with pytest.raises(KernelError, match="TypeError"):
            client.set_up([("one", "two", 3, 4)])  # type: ignore[list-item]
    finally:
        client.close()


def test_a_helper_that_cannot_run(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    client = start_helper(str(tmp_path / "none.py"))
    try:
        with pytest.raises(HelperGone):
            client.set_up([])
        assert client.obituary() == "the privileged helper ended with exit code 2"
    finally:
        client.close()
    assert "none.py" in capfd.readouterr().err


def test_a_helper_that_did_not_start_is_not_gone_on_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        split, "start_helper", lambda further: start_helper(str(tmp_path / "none.py"))
    )
    with pytest.raises(HelperGone):
        split.with_helper(Settings(), frozenset())
    assert "none.py" in capfd.readouterr().err


def test_what_it_is_given_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not the secrets of sinks, nor what changes what an interpreter does."""
    for name in ("KAFKA_PASSWORD", "PYTHONPATH", "PYTHONSTARTUP", "LD_PRELOAD", "LANG"):
        monkeypatch.setenv(name, "")
    client = start_helper(PROGRAM)
    try:
        client.set_up(())
        environment = Path(f"/proc/{client.pid}/environ").read_bytes()
    finally:
        client.close()
    names = {entry.partition(b"=")[0].decode() for entry in environment.split(b"\0")} - {""}
    assert "LANG" in names
    assert names <= {"PATH", "LANG", "LC_ALL", "LC_CTYPE", "LD_LIBRARY_PATH"}


def test_an_interpreter_that_cannot_be_executed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Below a directory of another user's, say."""
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    with pytest.raises(PrivilegeError, match=r"cannot be started: .*/python: No such file"):
        start_helper(PROGRAM)


def test_answers_to_something_else() -> None:
    """A client trusts no answer that it did not ask for."""
    near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with subprocess.Popen(["/bin/true"]) as process:
        client = HelperClient(Channel(near, 8), process)
        far.send(json.dumps({"id": 9, "result": {}, "more": False}).encode())
        with pytest.raises(HelperGone, match="something else"):
            client.ask("unload", sensor="good")
        client.close()
    far.close()
