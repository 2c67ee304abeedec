"""The kernel's state over programs in memory: filters, sensors, what they missed, and loading."""

from __future__ import annotations

import errno
import os
import struct
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from streamer.config.settings import Filters, Kernel, Settings
from streamer.errors import ConfigError, KernelError, PrivilegeError
from streamer.events.kinds import KINDS
from streamer.kernel import capabilities, state
from streamer.kernel.loader import Attached
from streamer.kernel.objects import CONTRACT
from streamer.kernel.state import (
    KernelState,
    executables,
    filter_entries,
    filter_modes_bytes,
    identity_of_file,
    settings_bytes,
    size_of,
)
from tests.memory_kernel import MemoryPrograms

ALL = frozenset(KINDS)
AT = {name: offset for name, offset, _ in CONTRACT["settings"]}
MODE_AT = {name: offset for name, offset, _ in CONTRACT["filter_modes"]}
GENERATION_AT = {
    map: next(at for name, at, _ in CONTRACT[key] if name == "generation")
    for map, key in (
        ("filter_comms", "comm_key"),
        ("filter_exes", "exe_key"),
        ("filter_paths", "path_prefix"),
    )
}
MODES = {name: number for name, number, _ in CONTRACT["enum filter_mode"]}
OFF, EXCLUDE, INCLUDE = (MODES[f"FILTER_{name}"] for name in ("OFF", "EXCLUDE", "INCLUDE"))


@pytest.fixture
def programs() -> Iterator[MemoryPrograms]:
    made = MemoryPrograms()
    yield made
    made.release()


def mode(programs: MemoryPrograms, name: str) -> int:
    """What the programs find in their settings, of the generation that is in force."""
    memory = programs.memory("settings")
    generation = memory[AT["generation"]]
    return memory[AT["filters"] + generation * size_of("filter_modes") + MODE_AT[name]]


# ---------------------------------------------------------------- filters


def test_what_the_programs_are_told_of_the_filters(programs: MemoryPrograms) -> None:
    filters = Filters(uids=(1,), exclude_uids=(2,), exclude_comms=("sshd",), ports=(80,))
    kernel = KernelState(programs, Settings(filters=filters))
    assert {name: mode(programs, name) for name in MODE_AT} == {
        "pid": OFF,
        "uid": INCLUDE,
        "comm": EXCLUDE,
        "cgroup": OFF,
        "exe": OFF,
        "task": 1,
        "port": INCLUDE,
        "path": OFF,
    }
    kernel.set_filters(Filters(path_prefixes=("/etc/",)))
    assert (mode(programs, "path"), mode(programs, "task")) == (INCLUDE, 0)
    kernel.close()


def test_the_reader_is_woken_when_a_quarter_of_a_ring_is_full() -> None:
    packed = settings_bytes({"critical": 4096, "bulk": 8192, "bulk.1": 8192})
    assert struct.unpack_from("<2Q", packed, AT["wakeup_bytes"]) == (1024, 2048)


def in_force(programs: MemoryPrograms) -> tuple[bytes, dict[tuple[str, bytes], bytes]]:
    """All that programs judge by: the modes, and the entries, of the generation in force."""
    modes = bytes(mode(programs, name) for name in MODE_AT)
    generation = programs.memory("settings")[AT["generation"]]
    return modes, {
        (map, key): value
        for (map, key), value in programs.filters.items()
        if key[GENERATION_AT.get(map, 8)] == generation
    }


def test_filters_change_by_one_store(programs: MemoryPrograms) -> None:
    """Until then all of the old ones are in force, and from then on all of the new ones.

    Also with each change after the first, which finds the entries of earlier ones in its way.
    """
    every = (
        Filters(uids=(1, 2), exclude_comms=("sshd",), exes=("/bin/sh",), ports=(80,)),
        Filters(uids=(2, 3), exclude_comms=("sshd",), path_prefixes=("/etc",), pids=(5,)),
        Filters(exclude_uids=(1,), exclude_path_prefixes=("/etc",), exclude_cgroups=(7,)),
        Filters(),
    )
    kernel = KernelState(programs, Settings(filters=every[0]))
    seen = []
    update, delete = programs.update, programs.delete

    def watched(map: str, key: bytes, value: bytes) -> None:
        update(map, key, value)
        seen.append(in_force(programs))

    def watched_delete(map: str, key: bytes) -> None:
        delete(map, key)
        seen.append(in_force(programs))

    programs.update, programs.delete = watched, watched_delete  # type: ignore[method-assign]
    for filters in (*every[1:], *every):
        before = in_force(programs)
        seen.clear()
        kernel.prepare_filters(filters)
        assert all(one == before for one in seen)
        assert in_force(programs) == before
        kernel.use_filters()
        modes, entries = in_force(programs)
        assert modes == filter_modes_bytes(filters)
        names = {name for name, value in msgspec.structs.asdict(filters).items() if value}
        assert len(entries) == sum(len(getattr(filters, name)) for name in names)
    kernel.close()


def test_filters_that_the_kernel_refuses_leave_those_before(programs: MemoryPrograms) -> None:
    kernel = KernelState(programs, Settings(filters=Filters(uids=(1,), ports=(80,))))

    def refuse(map: str, key: bytes, value: bytes) -> None:
        raise OSError(errno.E2BIG, os.strerror(errno.E2BIG))

    programs.update = refuse  # type: ignore[method-assign]
    with pytest.raises(KernelError, match="cannot set the filters: Argument list too long"):
        kernel.set_filters(Filters(uids=(5,), ports=(80,)))
    assert (mode(programs, "uid"), mode(programs, "port")) == (INCLUDE, INCLUDE)
    assert {key[0] for map, key in in_force(programs)[1] if map == "filter_uids"} == {1}
    kernel.close()


def test_a_path_is_matched_over_all_its_length() -> None:
    filters = Filters(exclude_path_prefixes=("/etc/",))
    ((name, key, value),) = filter_entries(filters, 1, {})
    assert (name, value) == ("filter_paths", b"\x02")
    assert key == struct.pack("<IB", 8 * 6, 1) + b"/etc/".ljust(255, b"\0")


def test_what_is_kept_within_what_is_left_out_is_left_out() -> None:
    filters = Filters(path_prefixes=("/a/b/", "/c/"), exclude_path_prefixes=("/a/",))
    entries = filter_entries(filters, 0, {})
    kept = [key[5:].rstrip(b"\0") for _, key, value in entries if value == b"\x01"]
    assert kept == [b"/c/"]


def test_a_file_is_known_by_inode_and_device(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    found = (tmp_path / "file").stat()
    before = set(os.listdir("/proc/self/fd"))
    inode, device = identity_of_file(str(tmp_path / "file"))
    assert set(os.listdir("/proc/self/fd")) <= before
    assert inode == found.st_ino
    mounted = [line.split()[2] for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    assert f"{os.major(device)}:{os.minor(device)}" in mounted


def test_an_executable_that_is_not_there_is_named() -> None:
    with pytest.raises(ConfigError, match=r'filters.exes\[0\]: found "/no/such": No such file'):
        executables(Filters(exes=("/no/such",)), {"/no/such": (1, 2)})


def test_an_executable_that_is_out_of_reach_is_the_one_that_it_was(tmp_path: Path) -> None:
    """Where a directory is root's alone, the agent cannot look once it is another user."""
    closed = tmp_path / "closed"
    closed.mkdir(mode=0)
    filters = Filters(exes=(f"{closed}/program",))
    user = os.geteuid()
    if not user:
        os.seteuid(65534)
    try:
        found = executables(filters, {f"{closed}/program": (1, 2)})
        with pytest.raises(ConfigError, match="Permission denied"):
            executables(filters)
    finally:
        os.seteuid(user)
    assert found == {f"{closed}/program": (1, 2)}


# ---------------------------------------------------------------- kinds and sensors


def test_kinds_and_their_sampling_can_be_changed(programs: MemoryPrograms) -> None:
    kernel = KernelState(programs, Settings())
    kernel.enable({"net.close", "file.open"})
    kernel.set_sample({"net.close": 10})
    assert {kind for kind in KINDS if programs.enabled(kind)} == {"net.close", "file.open"}
    assert (programs.sample("net.close"), programs.sample("file.open")) == (10, 1)
    kernel.set_sample({})
    assert programs.sample("net.close") == 1
    kernel.close()


def test_a_sensor_is_loaded_once_and_unloaded_alone(programs: MemoryPrograms) -> None:
    kernel = KernelState(programs, Settings())
    kernel.load("net")
    kernel.load("file")
    with pytest.raises(KernelError, match="net is loaded already"):
        kernel.load("net")
    kernel.attach()
    kernel.unload("net")
    assert kernel.sensors == ["file"]
    assert programs.attached == {"file"}
    assert {one.sensor for one in kernel.statuses} == {"file"}
    kernel.load("net")
    assert kernel.sensors == ["file", "net"]
    kernel.close()


def test_what_is_run_every_second_is_asked_for_of_its_sensor_alone(
    programs: MemoryPrograms,
) -> None:
    kernel = KernelState(programs, Settings())
    for sensor in ("process", "net_dns"):
        kernel.load(sensor)
    kernel.run_timed()
    assert "run net_dns" not in programs.done  # it is not attached yet
    kernel.attach()
    kernel.run_timed()
    kernel.unload("net_dns")
    kernel.run_timed()
    assert [step for step in programs.done if step.startswith("run")] == ["run net_dns"]
    kernel.close()


def test_runs_missed_by_what_was_unloaded_still_count(
    programs: MemoryPrograms, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = Counter({"on_exec": 3, "on_openat_exit": 4})

    def missed(sensors: object) -> dict[str, int]:
        names = {p.name for one in list(sensors) for p in one.programs}  # type: ignore[call-overload]
        return {name: count for name, count in now.items() if name in names}

    monkeypatch.setattr(state, "missed_runs", missed)
    kernel = KernelState(programs, Settings())
    for sensor in ("process", "file"):
        kernel.load(sensor)
    kernel.attach()
    names = {one.name for one in kernel.statuses}
    assert "on_exec" in names
    assert kernel.missed()["on_exec"] == 3
    now["on_exec"] = 5  # since it was last looked at
    kernel.unload("process")
    assert kernel.missed()["on_exec"] == 5
    kernel.load("process")
    kernel.attach()
    now["on_exec"] = 2  # counted anew
    assert kernel.missed()["on_exec"] == 7
    now["on_exec"] = 3
    kernel.detach()
    assert kernel.missed()["on_exec"] == 8
    kernel.close()


def test_the_end_releases_loader_and_memory(programs: MemoryPrograms) -> None:
    kernel = KernelState(programs, Settings())
    kernel.close()
    assert programs.done[-1] == "close"
    assert kernel.counters.closed
    kernel.close()


def test_a_core_that_cannot_be_used_is_released(programs: MemoryPrograms) -> None:
    with pytest.raises(ConfigError, match=r"filters\.exes"):
        KernelState(programs, Settings(filters=Filters(exes=("/no/such",))))
    assert programs.done[-1] == "close"


# ---------------------------------------------------------------- loading all of it


@pytest.fixture
def privileged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capabilities, "require", lambda: None)


def test_loading_leaves_the_kinds_on_and_nothing_attached(
    programs: MemoryPrograms, privileged: None
) -> None:
    kernel = state.load(Settings(), {"process.exec", "net.close"}, programs)
    assert sorted(kernel.sensors) == ["net", "process"]
    assert programs.attached == set()
    assert {kind for kind in KINDS if programs.enabled(kind)} == {"process.exec", "net.close"}
    kernel.close()


def test_one_sensor_that_does_not_load_leaves_the_others(privileged: None) -> None:
    programs = MemoryPrograms(refused=frozenset({"net"}))
    kernel = state.load(Settings(), ALL, programs)
    assert sorted(kernel.sensors) == [
        *("file", "kprobe_syscall_latency", "net_dns", "process", "tc_classifier"),
        "tracepoint_net",
    ]
    assert kernel.coverage({"net.close"})["net.close"].reason == "net is refused"
    kernel.close()
    programs.release()


def test_when_no_sensor_loads_all_reasons_are_told(privileged: None) -> None:
    programs = MemoryPrograms(refused=frozenset({"net", "file"}))
    with pytest.raises(KernelError, match="file is refused; net is refused"):
        state.load(Settings(), {"net.close", "file.open"}, programs)
    assert programs.done[-1] == "close"
    programs.release()


def test_without_privileges_nothing_is_tried(
    programs: MemoryPrograms, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse() -> None:
        raise PrivilegeError("needs root")

    monkeypatch.setattr(capabilities, "require", refuse)
    with pytest.raises(PrivilegeError, match="needs root"):
        state.load(Settings(), ALL, programs)
    assert programs.done == []


def test_what_is_attached_is_forgotten_with_its_sensor(programs: MemoryPrograms) -> None:
    """Else its descriptors, which are closed, would be looked at for missed runs."""
    kernel = KernelState(programs, Settings())
    kernel.load("process")
    attach = programs.attach
    opened = os.open("/proc/self/status", os.O_RDONLY)

    def with_descriptor(sensor: str) -> Attached:
        return attach(sensor)._replace(descriptors={"on_exec": opened})

    programs.attach = with_descriptor  # type: ignore[method-assign]
    kernel.attach()
    kernel.unload("process")
    os.close(opened)
    assert kernel._attached == {}
    kernel.close()


# ---------------------------------------------------------------- interfaces


def test_an_interface_that_comes_back_takes_no_further_place_in_the_map(
    programs: MemoryPrograms, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The map has few: those of a container's interface would fill it within days."""
    there: dict[str, int] = {"tun0": 7, "eth0": 2}
    monkeypatch.setattr(state, "_index_of", lambda name: there.get(name, 0))
    kernel = KernelState(programs, Settings(kernel=Kernel(interfaces=("eth0", "tun0"))))
    kernel.load("xdp_counter")
    kernel.attach()
    for there["tun0"] in (0, 8, 9, 2):
        there["eth0"] = 3 if there["tun0"] == 2 else 2
        assert kernel.follow_interfaces()
        assert not kernel.follow_interfaces()
        places = {struct.unpack("<I", k)[0]: v for k, v in programs.read("interfaces")}
        names = {struct.unpack("<I", v)[0] // programs.cpus: i for i, v in places.items()}
        wanted = {place: there[name] for place, name in enumerate(kernel.interfaces) if there[name]}
        assert (len(places), names) == (len(wanted), wanted)
        assert all(kernel.interfaces.values())  # what was counted before it went is published
    kernel.close()
