"""The worker's side of the helper: requests, and what stands for loader, files and /proc."""

from __future__ import annotations

import asyncio
import binascii
import errno
import os
import signal
import socket
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from threading import Lock
from typing import Any

from streamer import errors
from streamer.errors import HelperGone, KernelError, StreamerError
from streamer.kernel.loader import (
    NO_TARGETS,
    Attached,
    Loaded,
    ProgramState,
    Targets,
    Transport,
    last_possible_cpu,
)
from streamer.kernel.processes import Located, Module
from streamer.kernel.types import KernelTypes
from streamer.privilege.channel import MOST_DESCRIPTORS, Channel, Message, MessageError
from streamer.privilege.files import (
    Appendable,
    AppendFile,
    NamedFile,
    OwnDescriptor,
    Packing,
    own_descriptor,
)
from streamer.privilege.proc import Found

ANSWER_SECONDS = 30.0
LOAD_SECONDS = 300.0
"""Interpreter and verifier take their time, in an emulated machine a hundredfold."""
START_SECONDS = 900.0
"""As long as the compiler may take, and more."""
END_SECONDS = 10.0

_ERRORS: Mapping[str, type[StreamerError]] = {
    one.__name__: one
    for one in (errors.ConfigError, errors.PrivilegeError, KernelError, errors.ContractError)
}


class HelperClient:
    """Asks the helper. Every request waits for its answer; they are few and short."""

    def __init__(self, channel: Channel, process: subprocess.Popen[bytes]) -> None:
        """`process` is the helper, a child of the first worker."""
        self._channel = channel
        self._process = process
        self._lock = Lock()
        self._number = 0
        self._gone = ""

    @property
    def pid(self) -> int:
        """The helper's process id."""
        return self._process.pid

    def set_up(
        self,
        files: Sequence[NamedFile],
        targets: Mapping[str, Targets] = NO_TARGETS,
        headers: str = "off",
        workers: int = 0,
    ) -> None:
        """Name the files, and what each sensor attaches to, which ends the helper's start.

        `headers` as for `kernel.types.find`. So many further `workers` are started before anything
        is loaded.

        Raises:
            HelperGone: it did not start.
            StreamerError: what kept it from starting.
        """
        with self._lock:
            named = {sensor: list(one) for sensor, one in targets.items()}
            message: Message = {"files": [list(file) for file in files], "targets": named}
            message |= {"headers": headers, "workers": workers}
            self._send(message, START_SECONDS)
            self._receive(0)

    def ask(self, request: str, *, seconds: float = ANSWER_SECONDS, **parameters: Any) -> Any:
        """The result of a request that brings no descriptors. Raises as `ask_for`."""
        return self.ask_for(request, 0, seconds=seconds, **parameters)[0]

    def ask_for(
        self,
        request: str,
        descriptors: int | None,
        *,
        seconds: float = ANSWER_SECONDS,
        **parameters: Any,
    ) -> tuple[Any, list[int]]:
        """The result of a request, and as many descriptors, which are the caller's; None: any.

        Raises:
            HelperGone: the helper has ended, or does not answer within `seconds`.
            OSError, KernelError: what the helper was told by the kernel; or the request is too
                large (KernelError).
        """
        with self._lock:
            number = self._begin(request, seconds, parameters)
            result, found, _ = self._receive(number)
        if descriptors is not None and len(found) != descriptors:
            _close(found)
            raise self._lost(f"it sent {len(found)} descriptors")
        return result, found

    def ask_parts(self, request: str, **parameters: Any) -> Iterator[Any]:
        """The results of a request that is answered in parts. Raises as `ask_for`.

        Nothing else can be asked before the last part was taken.
        """
        with self._lock:
            number = self._begin(request, ANSWER_SECONDS, parameters)
            more = True
            while more:
                result, found, more = self._receive(number)
                _close(found)
                yield result

    def watch(self, loop: asyncio.AbstractEventLoop, gone: Callable[[], None]) -> None:
        """Call `gone` once, when the helper has ended."""

        def look() -> None:
            # Another thread may have asked: then it is its answer, which it is about to take.
            if not self._lock.acquire(blocking=False):
                return
            try:
                unasked = self._channel.readable()
            finally:
                self._lock.release()
            if unasked:  # what comes without having been asked for is not an answer
                loop.remove_reader(self._channel.fileno())
                gone()

        loop.add_reader(self._channel.fileno(), look)

    def unwatch(self, loop: asyncio.AbstractEventLoop) -> None:
        """No longer call what `watch` was given."""
        loop.remove_reader(self._channel.fileno())

    def obituary(self) -> str:
        """How the helper ended, in one line."""
        try:
            code = self._process.wait(1)
        except subprocess.TimeoutExpired:
            return f"the privileged helper {self._gone or 'closed the connection'}"
        if code < 0:
            return f"the privileged helper was ended by {signal.Signals(-code).name}"
        return f"the privileged helper ended with exit code {code}"

    def for_further(self, end: socket.socket) -> HelperClient:
        """What another worker asks the same helper with, in its own process, on `end`.

        This one is closed there, without a word to the helper.
        """
        self._channel.close()
        return HelperClient(Channel(end, MOST_DESCRIPTORS), self._process)

    def farewell(self) -> None:
        """Say that the end is meant, without waiting for anything."""
        with suppress(OSError):
            self._channel.settimeout(0)
            self._channel.send({"id": self._number + 1, "request": "end"})

    def close(self) -> None:
        """Let the helper detach everything and end. Harmless when it has ended."""
        with suppress(OSError, StreamerError):
            # A thread may wait for a disk that hangs.
            if not self._gone and self._lock.acquire(timeout=END_SECONDS):
                try:
                    self._receive(self._begin("end", END_SECONDS, {}))
                finally:
                    self._lock.release()
        self._channel.close()
        # It is another user's process by now, and cannot be killed; without its socket it ends.
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(END_SECONDS)

    def _begin(self, request: str, seconds: float, parameters: Mapping[str, Any]) -> int:
        self._number += 1
        self._send({"request": request, "id": self._number, **parameters}, seconds)
        return self._number

    def _send(self, message: Message, seconds: float) -> None:
        if self._gone:
            raise self._lost(self._gone)
        self._channel.settimeout(seconds)
        try:
            self._channel.send(message)
        except TimeoutError:
            raise self._lost("does not answer") from None
        except OSError:
            raise self._lost("has ended") from None
        except MessageError as error:  # nothing was sent: the next request may be in order
            raise KernelError(f"the privileged helper cannot be asked: {error}") from None

    def _receive(self, number: int) -> tuple[Any, list[int], bool]:
        try:
            received = self._channel.receive()
        except TimeoutError:
            raise self._lost("does not answer") from None
        except OSError:
            raise self._lost("has ended") from None
        except MessageError as error:
            raise self._lost(f"cannot be understood: {error}") from None
        if received is None:
            raise self._lost("has ended")
        message, descriptors = received
        if "error" in message:
            _close(descriptors)
            raise _error(message["error"])
        if message.get("id") != number:
            _close(descriptors)
            raise self._lost("answers something else")
        return message.get("result"), descriptors, message.get("more") is True

    def _lost(self, why: str) -> HelperGone:
        self._gone = why
        return HelperGone(f"the privileged helper {why}")


def _error(told: Any) -> Exception:
    kind, text = str(told["kind"]), str(told["text"])
    if kind == "OSError":
        return OSError(int(told["errno"]), text)
    return _ERRORS.get(kind, KernelError)(text)


def _close(descriptors: Sequence[int]) -> None:
    for fd in descriptors:
        os.close(fd)


class RemoteLoader:
    """What stands for `Loader` in the worker. Descriptors that it returns are closed with it."""

    def __init__(self, client: HelperClient, files: Sequence[NamedFile]) -> None:
        """`files` are those that the helper was told."""
        self.cpus = last_possible_cpu() + 1
        self.no_functions = "not tried"
        self.transport = Transport("ring", {})
        self.types = KernelTypes()
        self._client = client
        self._descriptors: dict[str, list[int]] = {}  # of maps: a sensor's, the core's as ""
        self._attached: dict[str, list[int]] = {}  # of a sensor's programs
        self._indexes = {file.path: i for i, file in enumerate(files) if file.use == "read"}

    def load_core(
        self, rings: Mapping[str, int], btf: str | None, transport: str = "auto"
    ) -> dict[str, int]:
        """See `Loader`; `btf` has to be a file that was named."""
        index = None if btf is None else self._indexes[os.path.abspath(btf)]
        result, found = self._client.ask_for(
            "load_core",
            None,
            seconds=LOAD_SECONDS,
            rings=dict(rings),
            btf=index,
            transport=transport,
        )
        self._descriptors[""] = found
        self.no_functions = str(result["no_functions"])
        self.transport = Transport(*result["transport"])
        self.types = KernelTypes(*result["types"])
        return _by_name(result["maps"], found)

    def open_buffers(self, cpu: int) -> dict[str, int]:
        """See `Loader`."""
        rings, found = self._client.ask_for("open_buffers", None, cpu=cpu)
        return _by_name(rings, found)

    def load(self, sensor: str, options: Mapping[str, int]) -> Loaded:
        """See `Loader`."""
        result, found = self._client.ask_for(
            "load", None, seconds=LOAD_SECONDS, sensor=sensor, options=dict(options)
        )
        self._descriptors[sensor] = found
        return Loaded(_programs(result), _by_name(result["maps"], found))

    def attach(self, sensor: str) -> Attached:
        """See `Loader`."""
        result, found = self._client.ask_for("attach", None, seconds=LOAD_SECONDS, sensor=sensor)
        _close(self._attached.pop(sensor, ()))
        self._attached[sensor] = found
        return Attached(_programs(result), _by_name(result["attached"], found))

    def run(self, sensor: str) -> None:
        """See `Loader`."""
        self._client.ask("run", sensor=sensor)

    def unload(self, sensor: str) -> None:
        """See `Loader`."""
        self._client.ask("unload", sensor=sensor)
        _close(self._descriptors.pop(sensor, ()))
        _close(self._attached.pop(sensor, ()))

    def detach(self, sensor: str) -> None:
        """See `Loader`."""
        self._client.ask("detach", sensor=sensor)

    def run_program(self, sensor: str, program: str, repeat: int) -> int:
        """See `Loader`."""
        return int(self._client.ask("run_program", sensor=sensor, program=program, repeat=repeat))

    def update(self, map: str, key: bytes, value: bytes) -> None:
        """See `Loader`."""
        self._client.ask("update", map=map, key=_text(key), value=_text(value))

    def delete(self, map: str, key: bytes) -> None:
        """See `Loader`."""
        self._client.ask("delete", map=map, key=_text(key))

    def read(self, map: str) -> list[tuple[bytes, bytes]]:
        """See `Loader`."""
        return [
            entry for part in self._client.ask_parts("read", map=map) for entry in _entries(part)
        ]

    def take(self, map: str) -> list[tuple[bytes, bytes]]:
        """See `Loader`."""
        return [
            entry for part in self._client.ask_parts("take", map=map) for entry in _entries(part)
        ]

    def locate(self, pid: int, start: int, image: int, addresses: Sequence[int]) -> Located:
        """See `Loader`; of as many addresses as a request may have."""
        result = self._client.ask(
            "locate", pid=pid, start=start, image=image, addresses=list(addresses)
        )
        modules = [Module(*module) for module in result["modules"]]
        return Located(modules, [(module, offset) for module, offset in result["places"]])

    def open_module(self, pid: int, start: int, image: int, first: int, last: int) -> int:
        """See `Loader`."""
        where = {"pid": pid, "start": start, "image": image, "first": first, "last": last}
        return self._client.ask_for("open_module", 1, **where)[1][0]

    def close(self) -> None:
        """Detach and release everything, and let the helper end."""
        self._client.close()
        for descriptors in (*self._descriptors.values(), *self._attached.values()):
            _close(descriptors)
        self._descriptors, self._attached = {}, {}


class RemoteOpener:
    """An `Opener` that has the helper open what was named to it."""

    def __init__(
        self, client: HelperClient, files: Sequence[NamedFile], directory: str | None = None
    ) -> None:
        """`files` are those that the helper was told, `directory` where relative paths begin."""
        self._client = client
        # It is another one when privileges are given up.
        self._directory = directory if directory is not None else os.getcwd()
        self._indexes: dict[tuple[str, str], int] = {
            (file.path, file.use): index for index, file in enumerate(files)
        }

    def open(self, path: str) -> int:
        """See `Opener`."""
        own = own_descriptor(path)
        if own is not None:
            return os.dup(own)
        index = self._index(path, "read")
        return self._client.ask_for("open", 1, index=index)[1][0]

    def append(self, path: str, bits: int) -> AppendFile:
        """See `Opener`; `bits` are what the helper was told."""
        own = own_descriptor(path)
        if own is not None:
            return OwnDescriptor(own)
        return RemoteFile(self._client, self._index(path, "append"))

    def _index(self, path: str, use: str) -> int:
        try:
            return self._indexes[os.path.normpath(os.path.join(self._directory, path)), use]
        except KeyError:
            raise PermissionError(errno.EPERM, "not named in the configuration", path) from None


class RemoteFile:
    """An `AppendFile` that the helper opens and renames. Any thread may use it."""

    def __init__(self, client: HelperClient, index: int) -> None:
        """`index` is that of the file among those named to the helper."""
        self._client = client
        self._index = index

    def open(self) -> Appendable:
        """See `AppendFile`."""
        result, (fd,) = self._client.ask_for("open", 1, index=self._index)
        return Appendable(fd, result["torn"] is True)

    def current(self) -> bool:
        """See `AppendFile`."""
        return self._client.ask("current", index=self._index) is True

    def rotate(self, keep: int) -> Appendable:
        """See `AppendFile`."""
        result, (fd,) = self._client.ask_for("rotate", 1, index=self._index, keep=keep)
        return Appendable(fd, result["torn"] is True)

    def pack(self, keep: int) -> Packing | None:
        """See `AppendFile`."""
        _, found = self._client.ask_for("pack", None, index=self._index, keep=keep)
        return Packing(*found) if found else None

    def packed(self, whole: bool) -> None:
        """See `AppendFile`."""
        self._client.ask("packed", index=self._index, whole=whole)

    def close(self) -> None:
        """Nothing is held here."""


def look_up(client: HelperClient, pid: int, name: str) -> Found:
    """A file or link below /proc/PID. See `proc.look_up`."""
    result = client.ask("proc", pid=pid, name=name)
    return Found(binascii.a2b_base64(result["data"]), result["cut"] is True)


def _text(data: bytes) -> str:
    return binascii.b2a_base64(data, newline=False).decode()


def _programs(result: Any) -> list[ProgramState]:
    return [ProgramState(*program) for program in result["programs"]]


def _by_name(names: Sequence[str], descriptors: list[int]) -> dict[str, int]:
    if len(names) != len(descriptors):
        raise HelperGone("the privileged helper sent other descriptors than it said")
    return dict(zip(names, descriptors, strict=True))


def _entries(part: Any) -> Iterator[tuple[bytes, bytes]]:
    keys, values = binascii.a2b_base64(part["keys"]), binascii.a2b_base64(part["values"])
    count = part["count"]
    if count:
        wide, high = len(keys) // count, len(values) // count
        for i in range(count):
            yield keys[i * wide : (i + 1) * wide], values[i * high : (i + 1) * high]
