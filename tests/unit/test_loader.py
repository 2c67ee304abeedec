"""The loader over objects that are scripted: which way to a hook is taken, and what is let go of.

In place of libbpf, so without privileges. That the real one behaves so is shown in `tests/kernel`.
"""

from __future__ import annotations

import errno
import io
import os
import platform
import socket
import struct
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from streamer.errors import KernelError
from streamer.kernel import loader as module
from streamer.kernel import types
from streamer.kernel.loader import TIMED, Loader, Targets
from streamer.kernel.objects import KIND_END
from streamer.kernel.tags import MapInfo, ProgramInfo, SensorInfo

FUNCTION = "fexit/do_thing"
SECTIONS = {
    "fast": FUNCTION,
    "plain": "raw_tp/thing",
    "slow": "raw_tp/thing_slowly",
    "other": "raw_tp/other",
    "optional": "raw_tp/optional",
    "timed": TIMED,
}
CATALOGUE = {
    "core": SensorInfo(
        "core", (), (MapInfo("counters", "cpus", True), MapInfo("kinds", "cpus,kinds", True))
    ),
    "thing": SensorInfo(
        "thing",
        (
            ProgramInfo("fast", "thing", ("test.thing",)),
            ProgramInfo("plain", "thing", ("test.thing",)),
            ProgramInfo("slow", "thing", ("test.thing",)),
            ProgramInfo("other", "other", ("test.other",)),
            ProgramInfo("optional", "optional", ("test.optional",), "", ("option:more",)),
            ProgramInfo("timed", "timed", ("test.thing",), "late ones", ("option:timed",)),
        ),
        (MapInfo("table", "table:entries"), MapInfo("counters", "cpus", True)),
    ),
    "missing": SensorInfo("missing", (ProgramInfo("absent", "absent", ("test.absent",)),)),
}


def refusal(code: int) -> OSError:
    return OSError(code, os.strerror(code))


UNRESOLVED = "invalid func unknown#"


IDENTITY = struct.pack("<20I", 7, 8, 9, 2, 11, 12, *[0] * 14)
"""Of an agent whose first process has two children beside the one that loads."""


CORE_PROGRAMS = ("learn_pids", "learn_registers", "try_function")


class Kernel:
    """What loads and attaches, and what there is of it. Everything is noted in `done`."""

    def __init__(self) -> None:
        self.does_not_load: set[str] = set()
        self.loads_at_once = len(SECTIONS)
        self.does_not_attach: set[str] = set()
        self.says: dict[bool, str] = {}  # of a program: with each instruction, or without
        self.logs: list[bool] = []
        self.logs_are_long = False
        self.has_no_room_for_log: set[str] = set()
        self.functions_load = False
        self.core_error: OSError | None = None
        self.open: list[FakeObject] = []
        self.attached: list[str] = []
        self.detached: list[str] = []
        self.ran: list[tuple[str, tuple[str, ...]]] = []  # and what was attached by then
        self.fds = iter(range(1000, 2000))
        self.identity = IDENTITY
        self.registers_at = 16216


class FakeMap:
    def __init__(self, kernel: Kernel, name: str) -> None:
        self.name, self.fd = name, next(kernel.fds)
        self.internal = False
        self.value_size = 8
        self.entries_wanted = 0
        self.content: dict[bytes, bytes] = {}

    def leave_out(self) -> None:
        pass

    def resize(self, entries: int) -> None:
        self.entries_wanted = entries

    def become_perf_events(self, entries: int) -> None:
        self.entries_wanted = entries

    def reuse(self, fd: int) -> None:
        self.fd = fd

    def update(self, key: bytes, value: bytes) -> None:
        self.content[key] = value

    def delete(self, key: bytes) -> None:
        del self.content[key]

    def entries(self) -> Iterator[tuple[bytes, bytes]]:
        yield from self.content.items()


class FakeLink:
    def __init__(self, kernel: Kernel, name: str) -> None:
        self._kernel, self._name = kernel, name
        kernel.attached.append(name)

    def destroy(self) -> None:
        self._kernel.attached.remove(self._name)
        self._kernel.detached.append(self._name)


class FakeProgram:
    def __init__(self, kernel: Kernel, name: str, section: str) -> None:
        self._kernel = kernel
        self.name, self.section, self.fd = name, section, next(kernel.fds)
        self.wanted = True
        self.closed = False
        self.log = ""
        self.keeps_log = False

    def autoload(self, wanted: bool) -> None:
        self.wanted = wanted

    def keep_log(self, *, instructions: bool = False, room: int = 0) -> None:
        self._kernel.logs.append(instructions)
        self.keeps_log = True
        said = self._kernel.says.get(instructions, "R1 invalid")
        self.log = f"{said}\nprocessed 3 insns"

    def run(self, repeat: int = 0) -> int:
        if self.name == "learn_registers":
            return self._kernel.registers_at
        self._kernel.ran.append((self.name, tuple(self._kernel.attached)))
        return repeat

    def attach(self) -> FakeLink:
        assert not self.closed
        if self.name in self._kernel.does_not_attach:
            raise refusal(errno.ENOENT)
        return FakeLink(self._kernel, self.name)


class FakeObject:
    def __init__(self, kernel: Kernel, path: str) -> None:
        self._kernel = kernel
        self.sensor = os.path.basename(path).removesuffix(".bpf.o")
        names = {"core": CORE_PROGRAMS, "thing": tuple(SECTIONS)}.get(self.sensor, ())
        self.programs = {n: FakeProgram(kernel, n, SECTIONS.get(n, "syscall")) for n in names}
        maps = {
            "core": ("counters", "kinds", "critical", "bulk", "identities"),
            "thing": ("counters", "table"),
        }
        self.maps = {name: FakeMap(kernel, name) for name in maps.get(self.sensor, ())}
        if self.sensor == "core":
            self.maps["identities"].content[bytes(4)] = kernel.identity
        kernel.open.append(self)

    def load(self) -> None:
        wanted = {name for name, program in self.programs.items() if program.wanted}
        if self.sensor == "core":
            if self._kernel.core_error is not None:
                raise self._kernel.core_error
            if "try_function" in wanted and not self._kernel.functions_load:
                raise refusal(errno.EPERM)
        if wanted & self._kernel.does_not_load:
            too_long = self._kernel.logs_are_long and self._kernel.logs[-1:] == [True]
            raise refusal(errno.ENOSPC if too_long else errno.EINVAL)
        if any(self.programs[name].keeps_log for name in wanted & self._kernel.has_no_room_for_log):
            raise refusal(errno.ENOSPC)
        if self.sensor != "core" and len(wanted) > self._kernel.loads_at_once:
            raise refusal(errno.ENOMEM)

    def close(self) -> None:
        self._kernel.open.remove(self)
        for program in self.programs.values():
            program.closed = True


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Kernel:
    made = Kernel()
    monkeypatch.setattr(module, "Object", lambda path, btf: FakeObject(made, path))
    monkeypatch.setattr(module, "functions_of", lambda wanted, btf: set())
    monkeypatch.setattr(module, "variables_of", lambda wanted: set())
    monkeypatch.setattr(types, "find", lambda wanted, headers: types.KernelTypes())
    return made


def loaded(kernel: Kernel, **options: Any) -> Loader:
    made = Loader(sensors=CATALOGUE, directory="/objects", **options)
    made.load_core({"critical": 4096, "bulk": 8192}, None)
    return made


def statuses(programs: list[Any]) -> dict[str, str]:
    return {program.name: program.status for program in programs}


@pytest.mark.parametrize(("rung", "refused"), [("headers", True), ("none", False)])
def test_registers_that_are_not_found(
    kernel: Kernel, rung: str, refused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is guessed at. Where nothing of the kernel is known, nobody reads any."""
    kernel.registers_at = 0
    known = types.KernelTypes(rung, "/memory")
    monkeypatch.setattr(types, "find", lambda wanted, headers: known)
    if refused:
        with pytest.raises(KernelError, match="registers of system calls was not found"):
            loaded(kernel)
        assert kernel.open == []
    else:
        loaded(kernel).close()


def test_the_best_way_that_loads_is_attached_and_the_rest_is_spare(kernel: Kernel) -> None:
    kernel.functions_load = True
    made = loaded(kernel)
    assert statuses(made.load("thing", {}).programs) == {"fast": "loaded", "other": "loaded"}
    assert kernel.attached == []
    attached = made.attach("thing")
    assert statuses(attached.programs) == {
        "fast": "attached",
        "plain": "spare",
        "slow": "spare",
        "other": "attached",
    }
    assert kernel.attached == ["fast", "other"]
    assert attached.descriptors.keys() == {"fast", "other"}


def test_programs_at_functions_are_not_tried_where_none_loads(kernel: Kernel) -> None:
    made = loaded(kernel)
    found = {p.name: p for p in made.load("thing", {}).programs}
    assert (found["fast"].status, found["plain"].status) == ("failed", "loaded")
    assert found["fast"].reason == made.no_functions
    assert "Operation not permitted" in made.no_functions


def test_a_way_that_does_not_load_makes_way_for_the_next(kernel: Kernel) -> None:
    """And says what the verifier said; the other hooks are not affected."""
    kernel.functions_load = True
    kernel.does_not_load = {"fast", "plain"}
    made = loaded(kernel)
    found = {p.name: p for p in made.load("thing", {}).programs}
    assert statuses(list(found.values())) == {
        "fast": "failed",
        "plain": "failed",
        "slow": "loaded",
        "other": "loaded",
    }
    assert found["fast"].reason == "fast does not load: Invalid argument: R1 invalid"
    assert [one.sensor for one in kernel.open] == ["core", "thing"]
    (_, together) = kernel.open
    given = made.attach("thing").descriptors
    assert given == {name: together.programs[name].fd for name in ("slow", "other")}
    assert sorted(kernel.attached) == ["other", "slow"]


@pytest.mark.parametrize(
    ("said", "too_long", "words", "logs"),
    [
        ("invalid func unknown#158", False, "Invalid argument: invalid func unknown#158", [False]),
        (f"{UNRESOLVED}195896080", False, "Invalid argument: no such field", [False, True]),
        (f"{UNRESOLVED}2001000003", False, "Invalid argument: no such field", [False, True]),
        (f"{UNRESOLVED}195896080", True, f"Invalid argument: {UNRESOLVED}195896080", [False, True]),
    ],
)
def test_libbpf_explains_what_it_could_not_resolve(
    kernel: Kernel, said: str, too_long: bool, words: str, logs: list[bool]
) -> None:
    """With each instruction before it, unless the kernel has no room for all of them."""
    kernel.does_not_load = {"other"}
    kernel.says = {False: said, True: "no such field"}
    kernel.logs_are_long = too_long
    found = {p.name: p for p in loaded(kernel).load("thing", {}).programs}
    assert found["other"].reason == f"other does not load: {words}"
    assert kernel.logs == [False, *logs]  # of the other hook first


def test_a_program_is_not_refused_for_what_is_said_of_it(kernel: Kernel) -> None:
    kernel.loads_at_once = 1
    kernel.has_no_room_for_log = {"plain"}
    found = {p.name: p for p in loaded(kernel).load("thing", {}).programs}
    assert (found["plain"].status, found["other"].status) == ("loaded", "loaded")
    assert [one.sensor for one in kernel.open] == ["core", "thing", "thing"]


def test_programs_that_load_one_by_one_alone(kernel: Kernel) -> None:
    kernel.loads_at_once = 1
    made = loaded(kernel)
    assert statuses(made.load("thing", {}).programs)["plain"] == "loaded"
    assert [one.sensor for one in kernel.open] == ["core", "thing", "thing"]
    made.attach("thing")
    assert sorted(kernel.attached) == ["other", "plain"]
    made.close()
    assert kernel.open == []


def test_a_way_that_does_not_attach_makes_way_for_the_next(kernel: Kernel) -> None:
    kernel.functions_load = True
    kernel.does_not_attach = {"fast"}
    made = loaded(kernel)
    made.load("thing", {})
    attached = made.attach("thing")
    found = {p.name: p for p in attached.programs}
    assert (found["fast"].status, found["plain"].status) == ("failed", "attached")
    assert found["slow"].status == "spare"
    assert found["fast"].reason == f"this kernel has no {FUNCTION}"
    assert attached.descriptors.keys() == {"plain", "other"}


def test_a_hook_of_which_no_way_is_left_does_not_hold_up_the_others(kernel: Kernel) -> None:
    kernel.does_not_load = {"slow"}
    kernel.does_not_attach = {"plain"}
    made = loaded(kernel)
    made.load("thing", {})
    attached = made.attach("thing")
    assert statuses(attached.programs) == {
        "fast": "failed",
        "plain": "failed",
        "slow": "failed",
        "other": "attached",
    }
    assert kernel.attached == ["other"]


def test_attaching_twice_attaches_once(kernel: Kernel) -> None:
    made = loaded(kernel)
    made.load("thing", {})
    made.attach("thing")
    made.attach("thing")
    assert kernel.attached == ["plain", "other"]


def test_what_is_run_every_second_is_run_before_others_attach(kernel: Kernel) -> None:
    """And is attached nowhere. The core's own program was run when that was loaded."""
    made = loaded(kernel)
    core = len(kernel.ran)
    made.load("thing", {"timed": 1})
    attached = made.attach("thing")
    assert kernel.ran[core:] == [("timed", ())]
    assert statuses(attached.programs)["timed"] == "attached"
    assert kernel.attached == ["plain", "other"]
    made.run("thing")
    assert kernel.ran[core:] == [("timed", ()), ("timed", ("plain", "other"))]
    made.unload("thing")
    with pytest.raises(KernelError, match="thing is not loaded"):
        made.run("thing")


def test_what_an_option_turns_on(kernel: Kernel) -> None:
    made = loaded(kernel)
    assert "optional" not in statuses(made.load("thing", {"more": 0}).programs)
    made.unload("thing")
    assert statuses(made.load("thing", {"more": 1}).programs)["optional"] == "loaded"


def test_tables_have_the_sizes_that_are_asked_for(kernel: Kernel) -> None:
    made = loaded(kernel)
    core = next(one for one in kernel.open if one.sensor == "core")
    assert core.maps["bulk"].entries_wanted == 8192
    assert core.maps["critical"].entries_wanted == 4096
    assert core.maps["counters"].entries_wanted == made.cpus
    assert core.maps["kinds"].entries_wanted == made.cpus * KIND_END
    maps = made.load("thing", {"entries": 77}).maps
    assert maps.keys() == {"table"}  # its own alone
    thing = next(one for one in kernel.open if one.sensor == "thing")
    assert thing.maps["table"].entries_wanted == 77
    assert thing.maps["counters"].fd == core.maps["counters"].fd  # shared, and not one of its own


def test_unloading_detaches_last_first_and_closes(kernel: Kernel) -> None:
    made = loaded(kernel)
    made.load("thing", {})
    made.attach("thing")
    made.unload("thing")
    assert (kernel.attached, kernel.detached) == ([], ["other", "plain"])
    assert [one.sensor for one in kernel.open] == ["core"]
    with pytest.raises(KernelError, match="thing is not loaded"):
        made.unload("thing")
    with pytest.raises(KernelError, match="thing is not loaded"):
        made.attach("thing")
    made.load("thing", {})


def test_what_is_detached_can_still_be_run(kernel: Kernel) -> None:
    """By its name, if it is there for that, and not another one."""
    programs = (
        ProgramInfo("plain", "thing", ("test.thing",)),
        ProgramInfo("other", "walk", ("test.thing",), run=True),
    )
    catalogue = {"core": CATALOGUE["core"], "thing": SensorInfo("thing", programs)}
    made = Loader(sensors=catalogue, directory="/objects")
    made.load_core({"critical": 4096, "bulk": 4096}, None)
    made.load("thing", {})
    states = made.attach("thing").programs
    assert [(one.name, one.way) for one in states if one.status == "attached"] == [
        ("plain", SECTIONS["plain"]),
        ("other", "run by the agent"),
    ]
    assert kernel.attached == ["plain"]
    assert made.run_program("thing", "other", 7) == 7
    made.detach("thing")
    assert kernel.attached == []
    assert made.run_program("thing", "other", 8) == 8
    for name in ("plain", "nothing"):
        with pytest.raises(KernelError, match=f"thing has no program {name} to be run"):
            made.run_program("thing", name, 1)
    made.unload("thing")
    with pytest.raises(KernelError, match="thing is not loaded"):
        made.run_program("thing", "other", 1)


def test_the_end_leaves_nothing_open(kernel: Kernel) -> None:
    kernel.does_not_load = {"plain"}
    made = loaded(kernel)
    made.load("thing", {})
    made.attach("thing")
    made.close()
    assert (kernel.open, kernel.attached) == ([], [])
    made.close()


def test_what_cannot_be_loaded(kernel: Kernel) -> None:
    made = Loader(sensors=CATALOGUE, directory="/objects")
    with pytest.raises(KernelError, match="thing cannot be loaded now"):
        made.load("thing", {})
    made.load_core({"critical": 4096, "bulk": 8192}, None)
    made.load("thing", {})
    with pytest.raises(KernelError, match="thing cannot be loaded now"):
        made.load("thing", {})
    for name in ("core", "nothing"):
        with pytest.raises(KernelError, match=f"there is no sensor {name}"):
            made.load(name, {})
    (absent,) = made.load("missing", {}).programs
    assert (absent.status, absent.reason) == ("failed", "the object has no such program")


def test_maps_by_name(kernel: Kernel) -> None:
    made = loaded(kernel)
    made.load("thing", {})
    for name in ("table", "counters"):
        made.update(name, b"key", b"value")
        assert list(made.read(name)) == [(b"key", b"value")]
        made.delete(name, b"key")
        assert list(made.read(name)) == []
    with pytest.raises(KernelError, match="there is no map nothing"):
        made.read("nothing")
    made.unload("thing")
    with pytest.raises(KernelError, match="there is no map table"):
        made.update("table", b"key", b"value")


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (errno.ENOSYS, "no BPF in this kernel"),
        (errno.EPERM, "not permitted to load BPF programs"),
        (errno.E2BIG, "the BPF object does not load: Argument list too long"),
    ],
)
def test_a_core_that_does_not_load_says_why_and_is_closed(
    kernel: Kernel, code: int, words: str
) -> None:
    kernel.core_error = refusal(code)
    with pytest.raises(KernelError, match=words):
        loaded(kernel)
    assert kernel.open == []


@pytest.mark.parametrize(
    ("parent_is_agent", "workers", "found"),
    [
        (True, 0, (7, 8, 9, 0, 0, 0)),  # other children of its are none of the agent's
        (False, 0, (8, 8, 9, 0, 0, 0)),  # its parent is a shell
        (True, 2, (7, 8, 9, 2, 11, 12)),
    ],
)
def test_only_processes_of_the_agent_are_hidden(
    kernel: Kernel, parent_is_agent: bool, workers: int, found: tuple[int, ...]
) -> None:
    made = loaded(kernel, parent_is_agent=parent_is_agent, workers=workers)
    value = dict(made.read("identities"))[bytes(4)]
    assert struct.unpack(f"<{len(value) // 4}I", value)[:6] == found
    made.close()


def test_all_workers_have_to_be_found(kernel: Kernel) -> None:
    """Else the agent would observe itself."""
    with pytest.raises(KernelError, match="3 workers of the agent, and found 2"):
        loaded(kernel, parent_is_agent=True, workers=3)
    assert kernel.open == []


def test_further_workers_of_a_kernel_without_types(
    kernel: Kernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The program cannot follow pointers there: /proc has their numbers."""
    kernel.identity = struct.pack("<20I", 0, os.getpid(), 19, *[0] * 17)
    monkeypatch.setattr(module, "younger_siblings", lambda: [30, 31])
    made = loaded(kernel, workers=2, parent_is_agent=True)
    value = dict(made.read("identities"))[bytes(4)]
    own = os.getppid(), os.getpid(), 19, 2, 30, 31
    assert struct.unpack("<20I", value) == (*own, *[0] * 14)
    made.close()


def test_younger_siblings() -> None:
    """Not those that were there before."""
    program = """
import os, signal
from streamer.kernel.loader import younger_siblings
def start(work):
    pid = os.fork()
    if pid == 0:
        work()
        os._exit(0)
    return pid
near, far = os.pipe()
def look():
    os.read(near, 1)
    print(younger_siblings(), flush=True)
older, looking = start(signal.pause), start(look)
younger = [start(signal.pause), start(signal.pause)]
os.write(far, b"g")
os.waitpid(looking, 0)
print(younger)
for pid in (older, *younger):
    os.kill(pid, signal.SIGKILL)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, check=True, text=True
    )
    found, started = done.stdout.splitlines()
    assert found == started


@pytest.mark.parametrize(
    ("need", "met"),
    [
        ("function:there", True),
        ("function:gone", False),
        ("no function:there", False),
        ("no function:gone", True),
        ("variable:by_cpu", True),
        ("variable:gone", False),
        ("option:more", True),
        ("option:off", False),
        ("option:unknown", False),
        (platform.machine(), True),
        ("vax", False),
        ("interface", True),
        ("cgroup", False),
        ("rate", False),
    ],
)
def test_what_a_program_needs(
    kernel: Kernel, monkeypatch: pytest.MonkeyPatch, need: str, met: bool
) -> None:
    """Functions and variables of the kernel, options, the machine, and what to attach to."""
    monkeypatch.setattr(module, "functions_of", lambda wanted, btf: {"there"})
    monkeypatch.setattr(module, "variables_of", lambda wanted: {"by_cpu"})
    made = loaded(kernel)
    options = {"more": 1, "off": 0}
    sensor = module._Sensor(CATALOGUE["thing"], options, Targets(interfaces=("lo",)))
    assert made._is_given(sensor, (need,)) == met
    assert made._is_given(sensor, ("option:more", need)) == met


def test_a_program_is_at_all_cpus_or_at_none(kernel: Kernel) -> None:
    def attach(name: str) -> Any:
        if name == "second":
            raise refusal(errno.EBUSY)
        return FakeLink(kernel, name)

    with pytest.raises(OSError, match="second: Device or resource busy"):
        module._attach_to_each(("first", "second", "third"), attach)
    assert (kernel.attached, kernel.detached) == ([], ["first"])
    assert len(module._attach_to_each(("first", "third"), attach)) == 2


def attach(program: Any, names: tuple[str, ...], attached: dict[str, Any]) -> dict[str, OSError]:
    """To interfaces, at what comes in."""
    return module._attach_to_interfaces(
        lambda index: module._to_incoming(program, index), names, attached
    )


def test_two_interfaces_that_have_changed_their_names(monkeypatch: pytest.MonkeyPatch) -> None:
    """There is room for one program at each: both are let go first."""
    taken: set[int] = set()

    class Link:
        def __init__(self, index: int) -> None:
            self.index = index
            taken.add(index)

        def destroy(self) -> None:
            taken.remove(self.index)

    class OneEach:
        def attach_to_interface(self, index: int, mode: int) -> Any:
            if index in taken:
                raise OSError(errno.EBUSY, "busy")
            return Link(index)

    program: Any = OneEach()
    attached: dict[str, Any] = {}
    for indexes in ({"a": 2, "b": 3}, {"a": 3, "b": 2}):
        monkeypatch.setattr(module, "_index_of", indexes.__getitem__)
        assert attach(program, ("a", "b"), attached) == {}
        assert {name: one.number for name, one in attached.items()} == indexes


def test_names_of_interfaces_are_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel takes any but its own spaces, `/` and `:`, and others' need not be text."""
    names = [b"lo", b"\xff", b"\xe2\x80\x83x", b"\x1cx"]
    rows = [b"Inter-|   Receive", b" face |bytes", *(b"%6s:  0  0" % name for name in names)]
    table = b"".join(row + b"\n" for row in rows)
    monkeypatch.setattr(module, "open", lambda *_: io.BytesIO(table), raising=False)
    assert module._interfaces() == set(names)


def test_an_interface_that_comes_meanwhile_is_no_other_namespace(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The names are read in two places, one after the other."""
    ours = module._interfaces()
    found = iter([ours | {b"veth1"}, ours - {b"eth9"}])
    monkeypatch.setattr(module, "_interfaces", lambda: next(found))
    assert module._index_of("lo") == socket.if_nametoindex("lo")


def test_where_it_is_attached_it_stays_while_too_much_comes_and_goes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "_interfaces", lambda: {b"lo", b"never shown"})
    program: Any = None
    link: Any = None
    attached = {"lo": module._AtInterface(1, "native", link)}
    assert attach(program, ("lo",), attached) == {}
    assert list(attached) == ["lo"]
    errors = attach(program, ("lo",), {})
    assert errors["lo"].errno == errno.EXDEV


def test_an_interface_that_is_not_there() -> None:
    """The others are attached to; one that was there before is let go."""

    class FakeProgram:
        section = "xdp"

        def attach_to_interface(self, index: int, mode: int) -> Any:
            return Gone(index)

    class Gone:
        def __init__(self, index: int) -> None:
            self.index, self.destroyed = index, False

        def destroy(self) -> None:
            self.destroyed = True

    program: Any = FakeProgram()
    gone: Any = Gone(99)
    attached = {"nosuch0": module._AtInterface(99, "native", gone)}
    errors = attach(program, ("nosuch0", "lo"), attached)
    assert [(name, error.strerror) for name, error in errors.items()] == [
        ("nosuch0", "No such device")
    ]
    assert gone.destroyed
    (lo,) = attached.values()
    assert (lo.number, lo.mode) == (socket.if_nametoindex("lo"), "native")
    again = dict(attached)
    assert attach(program, ("lo",), again) == {}
    assert again == attached  # it stays as it is


@pytest.mark.parametrize(
    ("needs", "targets", "functions", "filters"),
    [
        (("interface",), Targets(interfaces=("lo",)), True, True),
        (("interface",), Targets(), True, False),
        (("cgroup", "option:more"), Targets(cgroup="/c"), True, True),
        (("cgroup", "no fentry"), Targets(cgroup="/c"), True, False),
        (("cgroup", "no fentry"), Targets(cgroup="/c"), False, True),
        (("cgroup", "fentry"), Targets(cgroup="/c"), False, False),
        ((), Targets(cgroup="/c"), True, False),
    ],
)
def test_whether_packets_could_be_stopped(
    kernel: Kernel, needs: tuple[str, ...], targets: Targets, functions: bool, filters: bool
) -> None:
    """By a program that would be used here: only then is the capability kept."""
    kernel.functions_load = functions
    sensor = SensorInfo("thing", (ProgramInfo("plain", "thing", ("test.thing",), "", needs),))
    catalogue = {"core": CATALOGUE["core"], "thing": sensor}
    loader = Loader(sensors=catalogue, directory="/objects", targets={"thing": targets})
    assert loader.filters_packets == filters
    assert not kernel.attached
    loader.close()


def test_what_needs_programs_at_functions_or_their_lack(kernel: Kernel) -> None:
    sensor = SensorInfo(
        "thing",
        (
            ProgramInfo("plain", "at", ("test.thing",), "", ("fentry",)),
            ProgramInfo("slow", "elsewhere", ("test.thing",), "", ("no fentry",)),
        ),
    )
    for functions, used in ((True, "plain"), (False, "slow")):
        kernel.functions_load = functions
        loader = Loader(sensors={"core": CATALOGUE["core"], "thing": sensor}, directory="/objects")
        loader.load_core({"critical": 4096, "bulk": 4096}, None)
        assert [one.name for one in loader.load("thing", {}).programs] == [used]
        loader.close()


def test_the_kernels_names_for_numbers(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of the enum, without its own name; a number that has no room is left out."""
    known = {0: "OTHER", 1: "THE_ENUM_ONE", 2: "THE_ENUM_" + "x" * 20, -1: "THE_ENUM_MASK"}
    monkeypatch.setattr(module, "names_of_enum", lambda enum, btf: known)
    sensor = CATALOGUE["thing"]._replace(maps=(MapInfo("table", names="the_enum"),))
    loader = Loader(sensors={"core": CATALOGUE["core"], "thing": sensor}, directory="/objects")
    loader.load_core({"critical": 4096, "bulk": 4096}, None)
    loader.load("thing", {})
    assert dict(loader.read("table")) == {
        b"\1\0\0\0": b"ONE\0\0\0\0\0",
        b"\2\0\0\0": b"xxxxxxx\0",
    }
