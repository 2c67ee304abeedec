"""The privileged helper: keeps the capabilities, and answers the requests of `requests.py`.

It is small, has one thread, and imports nothing that it does not need. It lives for as long as
the worker does, and its end of the socketpair is open.
"""

from __future__ import annotations

import binascii
import ctypes
import errno
import gc
import os
import resource
import select
import signal
import socket
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any, NamedTuple, Protocol

from streamer.errors import StreamerError
from streamer.kernel import capabilities
from streamer.kernel.loader import Loader, Targets, ensure_tracefs, online_cpus
from streamer.kernel.loading import LoaderLike
from streamer.kernel.perf_event import open_sampling
from streamer.kernel.waiting import BoundedCalls
from streamer.privilege import proc, seccomp
from streamer.privilege.channel import Channel, Message, MessageError
from streamer.privilege.files import Appendable, AppendTarget, NamedFile, open_read
from streamer.privilege.policies import helper_filter
from streamer.privilege.requests import Refused, parse

SEND_SECONDS = 60.0
LOOKUP_SECONDS = 1.0
"""How long to wait for what is asked about a process: it may keep whoever asks waiting."""
MOST_STUCK = 32
"""Look-ups that wait in vain. Then there are no more, until some of those processes have ended."""
"""How long an answer waits to be taken, before it is looked whether the worker is still there."""
_LAST_MESSAGES = 2
"""What a worker can have left when it ended: a request without an answer, and a farewell."""
CHUNK_BYTES = 1 << 15
"""Bytes of keys and values in one of the messages that answer `read`."""
ORPHANED = "streamer: the worker ended without a word; its programs are detached"

# What reaches all processes of a terminal or a service: the worker decides when both end.
_IGNORED = (
    *(signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGTERM),
    *(signal.SIGUSR1, signal.SIGUSR2, signal.SIGALRM, signal.SIGPIPE),
)
_PR_SET_NAME = 15
_NAME = b"streamer-helper"


class Answer(NamedTuple):
    """A result, or a part of one with `more` to follow.

    `descriptors` go with it; those `owned` are closed when they are sent.
    """

    result: Any
    descriptors: Sequence[int] = ()
    owned: bool = False
    more: bool = False


class Files:
    """The files that were named at the start, by index."""

    def __init__(self, named: Sequence[NamedFile]) -> None:
        """Directories of files to append to are held from now on."""
        self._named = named
        self._targets = {
            index: _target(file) for index, file in enumerate(named) if file.use == "append"
        }

    def __getitem__(self, index: int) -> NamedFile:
        """Raises Refused: there is none of that index."""
        if index >= len(self._named):
            raise Refused("no file of that index")
        return self._named[index]

    def open(self, index: int) -> Answer:
        """A new descriptor of the file. Raises Refused, OSError."""
        file = self[index]
        if file.use == "read":
            return Answer({"torn": False}, [open_read(file.path)], owned=True)
        return _opened(self.target(index).open())

    def target(self, index: int) -> AppendTarget:
        """Raises Refused: it is no file to append to. Raises OSError: its directory was missing."""
        if self[index].use != "append":
            raise Refused("no file to append to")
        target = self._targets[index]
        if isinstance(target, OSError):
            raise target
        return target

    def path_to_read(self, index: int) -> str:
        """Raises Refused: it is no file to read."""
        file = self[index]
        if file.use != "read":
            raise Refused("no file to read")
        return file.path


def _opened(file: Appendable) -> Answer:
    return Answer({"torn": file.torn}, [file.fd], owned=True)


def _target(file: NamedFile) -> AppendTarget | OSError:
    try:
        return AppendTarget(file.path, file.bits)
    except OSError as error:  # said when it is to be opened
        return error


class Helper:
    """Does what is asked, one request after the other."""

    def __init__(
        self,
        channel: Channel,
        worker: int,
        files: Files,
        loader: LoaderLike,
        *,
        profiles: bool,
        further: Sequence[Channel] = (),
    ) -> None:
        """`worker` is a pidfd: another process may have got the socket from it, and outlive it.

        `profiles`: there is a sampling rate, and the code of processes may be looked up. `further`
        workers may have files opened to be read, and nothing else.
        """
        self._channel = channel
        self._worker = worker
        self._last = _LAST_MESSAGES
        self._poll = select.poll()
        self._further = {one.fileno(): one for one in further}
        for source in (worker, channel.fileno(), *self._further):
            self._poll.register(source, select.POLLIN)
        self._files = files
        self._loader = loader
        self._profiles = profiles
        self._lookups = BoundedCalls(LOOKUP_SECONDS, MOST_STUCK)
        self._core = False
        self._sensors: set[str] = set()
        self._ended = False
        self._requests: dict[str, Callable[..., Iterable[Answer]]] = {
            "load_core": self._load_core,
            "open_buffers": self._open_buffers,
            "load": self._load,
            "attach": self._attach,
            "run": self._run,
            "unload": self._unload,
            "detach": self._detach,
            "run_program": self._run_program,
            "update": self._update,
            "delete": self._delete,
            "read": self._read,
            "take": self._take,
            "locate": self._locate,
            "open_module": self._open_module,
            "open": self._open,
            "current": self._current,
            "rotate": self._rotate,
            "pack": self._pack,
            "packed": self._packed,
            "proc": self._proc,
            "end": self._end,
        }

    def serve(self) -> bool:
        """Answer until the worker has gone. Whether it said so before."""
        self._channel.settimeout(SEND_SECONDS)
        while not self._ended:
            if not self._wait():
                return False
            try:
                received = self._channel.receive()
                if received is None:
                    return False
                self._answer(self._channel, received[0], self._requests)
            except MessageError as error:
                _refuse(self._channel, None, Refused(str(error)))
        return True

    def _wait(self) -> bool:
        """Wait for a message, and serve further workers meanwhile. False: the worker has ended."""
        while True:
            ready = dict(self._poll.poll())
            for descriptor in self._further.keys() & ready.keys():
                self._serve_further(descriptor)
            if self._worker in ready:
                self._last -= 1
                break
            if self._channel.fileno() in ready:
                break
        return self._channel.fileno() in ready and self._last >= 0

    def _serve_further(self, descriptor: int) -> None:
        """Answer one request of a further worker; forget it when it has gone."""
        channel = self._further[descriptor]
        channel.settimeout(0)  # whoever does not read gets no answer, and keeps nobody waiting
        try:
            received = channel.receive()
            if received is not None:
                self._answer(channel, received[0], {"open": self._open_to_read})
                return
        except MessageError as error:
            _refuse(channel, None, Refused(str(error)))
            return
        except OSError:
            pass
        self._poll.unregister(descriptor)
        self._further.pop(descriptor).close()

    def _answer(
        self, channel: Channel, message: Message, requests: Mapping[str, Callable[..., Any]]
    ) -> None:
        number: int | None = None
        try:
            number, name, parameters = parse(message)
            if name not in requests:
                raise Refused("not for a further worker")
            for answer in requests[name](**parameters):
                _send(channel, number, answer)
        except Exception as error:  # of this request; the next may be in order
            _refuse(channel, number, error)

    # ------------------------------------------------------------ the kernel

    def _load_core(
        self, rings: dict[str, int], btf: int | None, transport: str
    ) -> Iterator[Answer]:
        if self._core:
            raise Refused("it is loaded already")
        path = None if btf is None else self._files.path_to_read(btf)
        maps = self._loader.load_core(rings, path, transport)
        self._core = True
        trim()
        result = {
            "maps": list(maps),
            "no_functions": self._loader.no_functions,
            "transport": list(self._loader.transport),
            "types": list(self._loader.types),
        }
        yield Answer(result, list(maps.values()))

    def _open_buffers(self, cpu: int) -> Iterator[Answer]:
        if not self._core:
            raise Refused("no core")
        found = self._loader.open_buffers(cpu)
        yield Answer(list(found), list(found.values()), owned=True)

    def _load(self, sensor: str, options: dict[str, int]) -> Iterator[Answer]:
        if not self._core or sensor in self._sensors:
            raise Refused("no core, or it is loaded already")
        loaded = self._loader.load(sensor, options)
        self._sensors.add(sensor)
        trim()
        result = {"programs": listed(loaded.programs), "maps": list(loaded.maps)}
        yield Answer(result, list(loaded.maps.values()))

    def _attach(self, sensor: str) -> Iterator[Answer]:
        self._check_loaded(sensor)
        attached = self._loader.attach(sensor)
        result = {"programs": listed(attached.programs), "attached": list(attached.descriptors)}
        yield Answer(result, list(attached.descriptors.values()))
        trim()  # of what did not attach another way was loaded

    def _run(self, sensor: str) -> Iterator[Answer]:
        self._check_loaded(sensor)
        self._loader.run(sensor)
        yield Answer(None)

    def _unload(self, sensor: str) -> Iterator[Answer]:
        self._check_loaded(sensor)
        self._sensors.discard(sensor)
        self._loader.unload(sensor)
        trim()
        yield Answer(None)

    def _detach(self, sensor: str) -> Iterator[Answer]:
        self._check_loaded(sensor)
        self._loader.detach(sensor)
        yield Answer(None)

    def _run_program(self, sensor: str, program: str, repeat: int) -> Iterator[Answer]:
        self._check_loaded(sensor)
        yield Answer(self._loader.run_program(sensor, program, repeat))

    def _check_loaded(self, sensor: str) -> None:
        if sensor not in self._sensors:
            raise Refused("no such sensor is loaded")

    def _update(self, map: str, key: bytes, value: bytes) -> Iterator[Answer]:
        self._loader.update(map, key, value)
        yield Answer(None)

    def _delete(self, map: str, key: bytes) -> Iterator[Answer]:
        self._loader.delete(map, key)
        yield Answer(None)

    def _read(self, map: str) -> Iterator[Answer]:
        yield from _in_parts(self._loader.read(map))

    def _take(self, map: str) -> Iterator[Answer]:
        yield from _in_parts(self._loader.take(map))

    def _locate(self, pid: int, start: int, image: int, addresses: list[int]) -> Iterator[Answer]:
        self._check_profiles()
        found = self._lookups.call(lambda: self._loader.locate(pid, start, image, addresses))
        yield Answer({"modules": listed(found.modules), "places": found.places})

    def _open_module(
        self, pid: int, start: int, image: int, first: int, last: int
    ) -> Iterator[Answer]:
        self._check_profiles()
        where = pid, start, image, first, last
        fd = self._lookups.call(lambda: self._loader.open_module(*where), os.close)
        yield Answer(None, [fd], owned=True)

    def _check_profiles(self) -> None:
        if not self._profiles:
            raise Refused("nothing is sampled")

    # ------------------------------------------------------------ the rest

    def _open(self, index: int) -> Iterator[Answer]:
        yield self._files.open(index)

    def _open_to_read(self, index: int) -> Iterator[Answer]:
        self._files.path_to_read(index)
        yield self._files.open(index)

    def _current(self, index: int) -> Iterator[Answer]:
        yield Answer(self._files.target(index).current())

    def _rotate(self, index: int, keep: int) -> Iterator[Answer]:
        yield _opened(self._files.target(index).rotate(keep))

    def _pack(self, index: int, keep: int) -> Iterator[Answer]:
        found = self._files.target(index).pack(keep)
        yield Answer(None, found or (), owned=True)

    def _packed(self, index: int, whole: bool) -> Iterator[Answer]:
        self._files.target(index).packed(whole)
        yield Answer(None)

    def _proc(self, pid: int, name: str) -> Iterator[Answer]:
        found = proc.look_up(pid, name)
        yield Answer({"data": text(found.data), "cut": found.cut})

    def _end(self) -> Iterator[Answer]:
        self._ended = True
        _close(self._loader)
        yield Answer(None)


def _send(channel: Channel, number: int, answer: Answer) -> None:
    message = {"id": number, "result": answer.result, "more": answer.more}
    try:
        channel.send(message, answer.descriptors)
    finally:
        for fd in answer.descriptors if answer.owned else ():
            os.close(fd)


def _refuse(channel: Channel, number: int | None, error: Exception) -> None:
    # Without a worker there is nobody to tell: the next `receive` notices.
    with suppress(OSError):
        channel.send({"id": number, "error": told(error)})


def _in_parts(entries: Iterable[tuple[bytes, bytes]]) -> Iterator[Answer]:
    keys, values = b"", b""
    count = 0
    for key, value in entries:
        if count and len(keys) + len(values) + len(key) + len(value) > CHUNK_BYTES:
            yield _entries(count, keys, values, more=True)
            keys, values, count = b"", b"", 0
        keys, values, count = keys + key, values + value, count + 1
    yield _entries(count, keys, values, more=False)


def _entries(count: int, keys: bytes, values: bytes, *, more: bool) -> Answer:
    result = {"count": count, "keys": text(keys), "values": text(values)}
    return Answer(result, more=more)


def text(data: bytes) -> str:
    """Bytes as JSON can hold them: Base64."""
    return binascii.b2a_base64(data, newline=False).decode()


def listed(tuples: Iterable[tuple[Any, ...]]) -> list[list[Any]]:
    """Named tuples as JSON can hold them."""
    return [list(one) for one in tuples]


def told(error: Exception) -> Message:
    """An error as the worker gets it: kind, error number and text."""
    match error:
        case StreamerError():
            return {"kind": type(error).__name__, "errno": 0, "text": str(error)}
        case OSError():
            words = error.strerror or str(error)
            return {"kind": "OSError", "errno": error.errno or errno.EIO, "text": words}
        case Refused() | MessageError():
            return {"kind": "Refused", "errno": errno.EINVAL, "text": str(error)}
        case _:
            return {"kind": "Failed", "errno": errno.EIO, "text": repr(error)[:1000]}


def trim() -> None:
    """Give back what loading took: most of it is never needed again."""
    gc.collect()
    with suppress(AttributeError):  # glibc's alone
        ctypes.CDLL(None).malloc_trim(0)


# ---------------------------------------------------------------- the process


class OwnLoader(LoaderLike, Protocol):
    """A loader in this process."""

    def prepare(self, headers: str) -> None:
        """Do what takes other processes: afterwards none can be started."""

    @property
    def filters_packets(self) -> bool:
        """Whether a program may be attached where it could stop packets."""


MakeLoader = Callable[[Mapping[str, Targets], int], OwnLoader]
"""A loader for sensors that attach to these targets, by the sensor's name, and so many further
workers."""


def main(
    descriptor: int, further: Sequence[int] = (), make_loader: MakeLoader | None = None
) -> int:
    """Run the helper on its end of the socketpair. The exit code of the process.

    `further` are those of socketpairs to further workers, which the first one starts.
    """
    for number in _IGNORED:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())  # the worker had them all blocked
    channel, *others = (
        Channel(socket.socket(fileno=one), descriptors=0) for one in (descriptor, *further)
    )
    worker = os.pidfd_open(os.getppid())
    started = _start(channel, make_loader or _kernel_loader)
    if started is None:
        return 1
    files, loader, profiles = started
    try:
        helper = Helper(channel, worker, files, loader, profiles=profiles, further=others)
        orderly = helper.serve()
    finally:
        _close(loader)
        channel.close()
    if not orderly:
        _say(ORPHANED)
    return 0


def _close(loader: LoaderLike) -> None:
    """What the kernel refuses to detach outlives both processes, and is said by this one."""
    try:
        loader.close()
    except OSError as error:
        _say(f"streamer: not detached: {error.strerror or error}")


def _say(line: str) -> None:
    """On standard error, unless that takes nothing: a pipe that nobody reads must not hold it."""
    poll = select.poll()
    poll.register(2, select.POLLOUT)
    with suppress(OSError):
        if poll.poll(0):
            os.write(2, f"{line}\n".encode())


def _kernel_loader(targets: Mapping[str, Targets], workers: int) -> Loader:
    ensure_tracefs()  # afterwards nothing can be mounted; what failed is found out again
    return Loader(parent_is_agent=True, targets=targets, workers=workers)


def _start(channel: Channel, make_loader: MakeLoader) -> tuple[Files, LoaderLike, bool] | None:
    """Take the lists of files and targets, and give up what is not needed.

    Whether there is a sampling rate is the last of what is returned. None: the worker was told why.
    """
    try:
        received = channel.receive()
        if received is None:
            return None
        named = [NamedFile(*one) for one in received[0]["files"]]
        targets = {
            sensor: Targets(tuple(interfaces), cgroup, rate, tuple(functions))
            for sensor, (interfaces, cgroup, rate, functions) in received[0]["targets"].items()
        }
        files = Files(named)
        loader = make_loader(targets, int(received[0]["workers"]))
        loader.prepare(str(received[0]["headers"]))
        profiles = any(one.rate for one in targets.values())
        confine(
            writes=any(file.use == "append" for file in named),
            filters_packets=loader.filters_packets,
            profiles=profiles,
        )
        channel.send({"id": 0, "result": None, "more": False})
    except Exception as error:
        with suppress(OSError):
            channel.send({"id": 0, "error": told(error)})
        return None
    return files, loader, profiles


def _needed(*, writes: bool, filters_packets: bool, profiles: bool) -> frozenset[int]:
    have = capabilities.effective()
    needed = capabilities.needed_by_helper(
        have, writes=writes, filters_packets=filters_packets, profiles=profiles
    )
    with capabilities.only(needed):
        # Debian's kernels have a level of kernel.perf_event_paranoid that in 5.10 only it passes.
        perf_events = _can_open_perf_events()
    return needed if perf_events else needed | {capabilities.CAP_SYS_ADMIN} & have


def _can_open_perf_events() -> bool:
    try:
        os.close(open_sampling(online_cpus()[0], 1))
    except OSError as error:
        return error.errno != errno.EACCES
    return True


def confine(*, writes: bool, filters_packets: bool, profiles: bool) -> None:
    """Keep the capabilities that the helper needs, and the system calls.

    `writes`: there are files to append to, which may be any user's; `filters_packets`: there are
    interfaces or cgroups to attach to; `profiles`: there is a rate to sample at.

    Raises:
        PrivilegeError: the kernel refused.
    """
    os.chdir("/")
    ctypes.CDLL(None).prctl(_PR_SET_NAME, _NAME, 0, 0, 0)
    # Kernels before 5.11 count maps against it, and raising it takes another capability.
    with suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (resource.RLIM_INFINITY,) * 2)
    capabilities.limit_to(
        _needed(writes=writes, filters_packets=filters_packets, profiles=profiles)
    )
    capabilities.forgo_gains()
    capabilities.hide_memory()
    seccomp.install(helper_filter(os.getpid(), os.uname().machine, threads=profiles))
