"""The ring reader in plain Python: the oracle of the compiled `_records.c`, and its fallback.

The format of a ring is the kernel's (kernel/bpf/ringbuf.c). Positions are u64 that only ever
grow; masked with the size of the data area they are offsets into it. Each record follows a
u32 with its length, a BUSY bit while it is being written and a DISCARD bit when it was given
up, and a u32 that is the kernel's own; the whole is rounded up to 8 bytes. Behind the data area
its beginning is mapped again, so no record is ever split. Hosts are little-endian and of 64 bits.
"""

from __future__ import annotations

import codecs
import ctypes
import math
import socket
import struct
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from itertools import chain
from operator import itemgetter
from threading import Lock
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias

import msgspec

from streamer.events.clock import rfc3339
from streamer.events.layout import HEADER_FIELDS, MAX_LINE, MAX_STRINGS, FieldLayout, RecordLayout
from streamer.events.timing import KEY_BYTES, Timing

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer, WriteableBuffer

RING_HEADER = 8
BUSY = 1 << 31
DISCARD = 1 << 30
LENGTH_MASK = DISCARD - 1
MAX_RECORD = 1 << 30
U64 = (1 << 64) - 1

Gap: TypeAlias = tuple[Literal["missing", "late", "skipped"], int, int, int]
"""An anomaly of the sequence: `("missing", cpu, first, last)`, numbers that were passed over;
`("late", cpu, seq, seq)`, a number that had been passed over or was seen before; and
`("skipped", cpu, n, n)`, after the former two: the record's base says that the `n` numbers
before it were given up, so that they are no losses."""

_WIDTHS = {1: "B", 2: "H", 4: "I", 8: "Q"}
_INTEGERS = {"u8": "B", "u16": "H", "u32": "I", "u64": "Q", "s32": "i", "s64": "q", "serial": "Q"}


class Drained(NamedTuple):
    """What one drain gave.

    `events` are Structs in the order of the ring, `kinds` counts them per dotted kind. `more`
    says that the drain stopped at its limit of records, `busy` that it stopped at a record
    that is still being written; with neither, the ring was empty.
    """

    events: list[Any]
    kinds: dict[str, int]
    gaps: tuple[Gap, ...]
    more: bool
    busy: bool


# ------------------------------------------------------------------ words of a record


class _Word(NamedTuple):
    """Bytes at a fixed offset of a record, with their `struct` code."""

    offset: int
    code: str

    @property
    def end(self) -> int:
        return self.offset + struct.calcsize(f"<{self.code}")


_Words = tuple[Any, ...]


def _layers(words: Iterable[_Word]) -> list[list[_Word]]:
    """The words in as few lists as possible, such that those of a list do not overlap."""
    layers: list[list[_Word]] = []
    for word in sorted(set(words)):
        for layer in layers:
            if layer[-1].end <= word.offset:
                layer.append(word)
                break
        else:
            layers.append([word])
    return layers


def _struct_of(layer: list[_Word]) -> struct.Struct:
    parts, end = ["<"], 0
    for word in layer:
        parts.append(f"{word.offset - end}x{word.code}")
        end = word.end
    return struct.Struct("".join(parts))


class _WordReader:
    """Reads all words of a record in few calls; `index` says where each is in the result."""

    def __init__(self, words: Iterable[_Word]) -> None:
        layers = _layers(words)
        self._structs = [_struct_of(layer) for layer in layers]
        self.index = {word: index for index, word in enumerate(chain(*layers))}

    def read(self, record: bytes) -> _Words:
        words: _Words = ()
        for layer in self._structs:
            words += layer.unpack_from(record)
        return words


# ------------------------------------------------------------------ what each op does


class _Cursor:
    """What is carried from one field of a record to the next."""

    __slots__ = (
        "argv", "clock", "cut", "incomplete", "invalid", "line_bit", "line_cut", "parsed",
        "position", "raw_argv", "record", "truncated",
    )  # fmt: skip

    def __init__(self, record: bytes, position: int, clock: int, cut: int) -> None:
        self.record = record
        self.position = position
        self.clock = clock
        self.cut = cut
        self.argv: list[str] = []
        self.raw_argv = b""
        self.line_bit = self.line_cut = 0
        self.parsed: Any = ()
        self.invalid = False
        self.truncated = False
        self.incomplete = False

    def text(self, raw: bytes, whole_end: bool = True) -> str:
        """The text of `raw`, without what is left of a character that was cut at its end."""
        try:
            return codecs.utf_8_decode(raw, "strict", whole_end)[0]
        except UnicodeDecodeError:
            self.invalid = True
            return codecs.utf_8_decode(raw, "replace", whole_end)[0]

    def take(self, size: int) -> bytes:
        start = self.position
        self.position += size
        return self.record[start : self.position]

    def take_str(self, size: int, bit: int) -> str:
        raw, cut = self.take(size), self.cut & bit != 0
        return self.text(_without_cut_start(raw) if cut else raw, not cut)

    def take_argv(self, size: int, bit: int) -> list[str]:
        raw, cut = self.take(size), self.cut & bit != 0
        # The last argument, and only that, may have been cut, unless its NUL is there.
        self.argv = self._words(raw, cut)
        self.raw_argv = raw
        return self.argv

    def _words(self, raw: bytes, cut: bool) -> list[str]:
        *whole, last = raw.split(b"\0")
        words = [self.text(part) for part in whole]
        if last:
            words.append(self.text(last, not cut))
        return words

    def line(self) -> str:
        if len(self.raw_argv) <= MAX_LINE:
            return " ".join(self.argv)
        return " ".join(self._words(self.raw_argv[:MAX_LINE], cut=True))

    def take_parsed(self, parse: Callable[[bytes, bool], Any], size: int, bit: int) -> Any:
        self.parsed = parse(self.take(size), self.cut & bit != 0)
        return self.part(0)

    def part(self, index: int) -> Any:
        if not isinstance(self.parsed, tuple) or index >= len(self.parsed):
            raise TypeError(f"part {index} of {self.parsed!r}")
        return self.parsed[index]

    def mark_cut(self, choices: tuple[tuple[str, ...], ...], bits: int) -> tuple[str, ...]:
        names = choices[(bits & ~self.line_bit | self.line_cut) & (len(choices) - 1)]
        self.truncated = self.truncated or bool(names)
        return names

    def mark_flag(self, flag: bool) -> bool:
        self.incomplete = self.incomplete or flag
        return flag


def _without_cut_start(raw: bytes) -> bytes:
    """Without bytes at the start that continue a character; a character has at most three."""
    start = 0
    while start < min(len(raw), 3) and raw[start] & 0xC0 == 0x80:
        start += 1
    return raw[start:]


_Read = Callable[[_Words, _Cursor], Any]


class _Op(NamedTuple):
    """How a field is read: `make`, given where its words are, makes the function that does it.

    Without `make` the value is the word itself. Ops run by `stage`: a line needs the argv, and
    the mark of what was replaced needs all strings.
    """

    words: tuple[_Word, ...]
    make: Callable[..., _Read] | None
    stage: int = 0


def _ip_text(address: bytes, version: int) -> str:
    if version == 4:
        return socket.inet_ntop(socket.AF_INET, address[:4])
    return socket.inet_ntop(socket.AF_INET6, address) if version == 6 else ""


def _read_bool(at: int) -> _Read:
    return lambda words, cursor: words[at] != 0


def _read_cstr(at: int) -> _Read:
    return lambda words, cursor: cursor.text(words[at].partition(b"\0")[0])


def _read_counts(count: int) -> Callable[[int], _Read]:
    unpack = struct.Struct(f"<{count}I").unpack
    return lambda at: lambda words, cursor: unpack(words[at])


def _read_ip(address: int, version: int) -> _Read:
    return lambda words, cursor: _ip_text(words[address], words[version])


def _read_name(names: tuple[str, ...]) -> Callable[[int], _Read]:
    known = len(names)
    return lambda at: lambda words, cursor: names[words[at] if words[at] < known else 0]


def _read_str(bit: int) -> Callable[[int], _Read]:
    return lambda at: lambda words, cursor: cursor.take_str(words[at], bit)


def _read_argv(bit: int) -> Callable[[int], _Read]:
    return lambda at: lambda words, cursor: cursor.take_argv(words[at], bit)


def _read_parsed(parse: Callable[[bytes, bool], Any], bit: int) -> Callable[[int], _Read]:
    return lambda at: lambda words, cursor: cursor.take_parsed(parse, words[at], bit)


def _read_part(index: int) -> Callable[[], _Read]:
    return lambda: lambda words, cursor: cursor.part(index)


def _read_line() -> _Read:
    return lambda words, cursor: cursor.line()


def _read_constant(value: object) -> Callable[[], _Read]:
    return lambda: lambda words, cursor: value


def _read_id(prefix: str) -> Callable[[int, int], _Read]:
    return lambda cpu, seq: lambda words, cursor: f"{prefix}-{words[cpu]}-{words[seq]}"


_Coarse = Callable[[int], int]


def _as_it_is(ns: int) -> int:
    return ns


def _read_coarse(coarse: _Coarse) -> Callable[[int], _Read]:
    return lambda at: lambda words, cursor: coarse(words[at])


def _read_duration(timing: Timing) -> Callable[[int, int, int], _Read]:
    return lambda at, cgroup, uid: (
        lambda words, cursor: timing.duration(words[at], words[cgroup], words[uid])
    )


def _read_time(coarse: _Coarse) -> Callable[[int], _Read]:
    return lambda at: lambda words, cursor: (coarse(words[at]) + cursor.clock) & U64


def _read_rfc3339(coarse: _Coarse) -> Callable[[int], _Read]:
    return lambda at: lambda words, cursor: rfc3339((coarse(words[at]) + cursor.clock) & U64)


def _read_cut(names: tuple[str, ...]) -> Callable[[int], _Read]:
    choices = tuple(
        tuple(name for i, name in enumerate(names) if mask >> i & 1)
        for mask in range(1 << len(names))
    )
    return lambda at: lambda words, cursor: cursor.mark_cut(choices, words[at])


def _read_flag(mask: int) -> Callable[[int], _Read]:
    return lambda at: lambda words, cursor: cursor.mark_flag(words[at] & mask != 0)


def _read_invalid_utf8() -> _Read:
    return lambda words, cursor: cursor.invalid


# ------------------------------------------------------------------ from layout to plan


def _between(low: int, number: int, high: int, what: str) -> int:
    if not low <= number <= high:
        raise ValueError(f"{what} is {number!r}, not {low} to {high}")
    return number


class _Header:
    """Words of a record's base, checked."""

    def __init__(self, offsets: Mapping[str, int]) -> None:
        self.size = _between(0, offsets["header_size"], MAX_RECORD, "header: header_size")
        self.words = {
            name: self._word(name, offsets[name], width) for name, width in HEADER_FIELDS.items()
        }

    def _word(self, name: str, offset: int, width: int) -> _Word:
        _between(0, offset, self.size - width, f"header: {name}")
        return _Word(offset, _WIDTHS[width])

    def getter(self, *names: str) -> Callable[[bytes], tuple[int, ...]]:
        """A function that reads these words of a record that is at least a base long."""
        words = [self.words[name] for name in names]
        reader = _WordReader(words)
        pick = itemgetter(*(reader.index[word] for word in words))
        return lambda record: pick(reader.read(record))


class _Context(NamedTuple):
    """What the fields of a layout are read with."""

    header: _Header
    constants: Mapping[str, object]
    id_prefix: str
    timing: Timing | None = None
    strings: tuple[str, ...] = ()
    subject: tuple[_Word, ...] = ()

    @property
    def moment(self) -> _Coarse:
        return _as_it_is if self.timing is None else self.timing.moment

    @property
    def start(self) -> _Coarse:
        return _as_it_is if self.timing is None else self.timing.start


class _Field(NamedTuple):
    """A field with its place, for messages, and the size of its record, for checks."""

    layout: FieldLayout
    where: str
    size: int

    def word(self, code: str, offset: int | None = None) -> _Word:
        word = _Word(self.layout.offset if offset is None else offset, code)
        _between(0, word.offset, self.size - (word.end - word.offset), f"{self.where}: offset")
        return word

    def names(self, least: int, most: float = math.inf) -> tuple[str, ...]:
        names: Any = self.layout.argument
        fits = isinstance(names, tuple) and len(names) >= least
        if not (fits and all(isinstance(name, str) for name in names)):
            raise ValueError(f"{self.where}: names are {names!r}, not a tuple of str")
        if len(names) > most:
            raise ValueError(f"{self.where}: names are {names!r}, more than {most}")
        return tuple(names)


def _op_of(field: _Field, context: _Context) -> _Op:
    op, argument = field.layout.op, field.layout.argument
    if op in _INTEGERS:
        return _Op((field.word(_INTEGERS[op]),), None)
    match op:
        case "bool":
            return _Op((field.word("B"),), _read_bool)
        case "cstr":
            length = _between(1, argument, field.size, f"{field.where}: length")
            return _Op((field.word(f"{length}s"),), _read_cstr)
        case "counts":
            count = _between(1, argument, field.size // 4, f"{field.where}: count")
            return _Op((field.word(f"{4 * count}s"),), _read_counts(count))
        case "ip":
            return _Op((field.word("16s"), field.word("B", argument)), _read_ip)
        case "names":
            return _Op((field.word("B"),), _read_name(field.names(1)))
        case "ns":
            return _duration_op(field, context)
        case "moment":
            return _Op((field.word("Q"),), _read_coarse(context.moment))
        case "start":
            return _Op((field.word("Q"),), _read_coarse(context.start))
        case "boottime":
            return _Op((field.word("Q"),), _read_time(context.start))
        case "flag":
            mask = _between(1, argument, 255, f"{field.where}: mask")
            return _Op((field.word("B"),), _read_flag(mask))
        case "cut":
            return _Op((field.word("B"),), _read_cut(field.names(0, MAX_STRINGS)))
    if op not in _STRINGS:
        return _op_without_word(field, context)
    bit = 1 << context.strings.index(field.layout.name)
    if op == "parsed":
        if not callable(argument):
            raise ValueError(f"{field.where}: {argument!r} is no function")
        return _Op((field.word("H"),), _read_parsed(argument, bit))
    return _Op((field.word("H"),), _TEXTS[op](bit))


def _duration_op(field: _Field, context: _Context) -> _Op:
    word, timing = field.word("Q"), context.timing
    if timing is None:
        return _Op((word,), None)
    if context.subject:
        return _Op((word, *context.subject), _read_duration(timing))
    return _Op((word,), _read_coarse(timing.duration))


_TEXTS: dict[str, Callable[[int], Callable[[int], _Read]]] = {
    "str": _read_str,
    "argv": _read_argv,
}
_STRINGS = (*_TEXTS, "parsed")


def _op_without_word(field: _Field, context: _Context) -> _Op:
    header = context.header.words
    match field.layout.op:
        case "line":
            return _Op((), _read_line, stage=1)
        case "part":
            index = _between(1, field.layout.argument, 255, f"{field.where}: index")
            return _Op((), _read_part(index), stage=1)
        case "const":
            return _Op((), _read_constant(context.constants[field.layout.argument]))
        case "id":
            return _Op((header["cpu"], header["seq"]), _read_id(context.id_prefix))
        case "time":
            return _Op((header["boot_ns"],), _read_time(context.moment))
        case "rfc3339":
            return _Op((header["boot_ns"],), _read_rfc3339(context.moment))
        case "invalid_utf8":
            return _Op((), _read_invalid_utf8, stage=2)
    raise ValueError(f"{field.where}: unknown op {field.layout.op!r}")


def _check_struct(layout: RecordLayout) -> None:
    """Refuses a class that the compiled reader could not make without calling it."""
    cls: object = layout.struct
    names = tuple(field.name for field in layout.fields)
    if not (isinstance(cls, type) and issubclass(cls, msgspec.Struct)):
        trouble = "not a Struct"
    elif cls.__struct_config__.gc:
        trouble = "a Struct without gc=False"
    elif cls.__struct_fields__ != names:
        trouble = "a Struct with other fields than the layout"
    elif hasattr(cls, "__post_init__"):
        trouble = "a Struct with __post_init__"
    else:
        return
    raise TypeError(f"{layout.kind}: {cls!r} is {trouble}")


def _strings_of(layout: RecordLayout) -> tuple[str, ...]:
    return tuple(field.name for field in layout.fields if field.op in _STRINGS)


def _subject_of(layout: RecordLayout) -> tuple[_Word, ...]:
    """Cgroup and user, whose durations they are; empty where it has not both."""
    known = {(field.name, field.op): field.offset for field in layout.fields}
    cgroup, uid = known.get(("cgroup_id", "u64")), known.get(("uid", "u32"))
    return () if cgroup is None or uid is None else (_Word(cgroup, "Q"), _Word(uid, "I"))


def _check_strings(layout: RecordLayout) -> None:
    ops, count = [field.op for field in layout.fields], len(_strings_of(layout))
    if "line" in ops and ops.count("argv") != 1:
        raise ValueError(f"{layout.kind}: a line of {ops.count('argv')} argv")
    if "part" in ops and ops.count("parsed") != 1:
        raise ValueError(f"{layout.kind}: parts of {ops.count('parsed')} parsed")
    if count > MAX_STRINGS:
        raise ValueError(f"{layout.kind}: {count} strings, more than {MAX_STRINGS}")
    for field in layout.fields:
        if field.op == "cut" and len(field.argument) != count + ("line" in ops):
            names = len(field.argument)
            raise ValueError(f"{layout.kind}: a cut of {names} names and {count} strings")


def _maker(cls: type[msgspec.Struct]) -> Callable[[list[Any]], Any]:
    """A function that makes a Struct of all its values."""
    positional = len(cls.__match_args__)
    names = cls.__struct_fields__[positional:]  # keyword-only fields follow the others
    if not names:
        return lambda values: cls(*values)
    return lambda values: cls(
        *values[:positional], **dict(zip(names, values[positional:], strict=True))
    )


class _Plan:
    """How the records of one kind are decoded."""

    def __init__(self, layout: RecordLayout, context: _Context) -> None:
        _check_struct(layout)
        self.kind = layout.kind
        self.size = _between(context.header.size, layout.size, MAX_RECORD, f"{layout.kind}: size")
        context = context._replace(strings=_strings_of(layout), subject=_subject_of(layout))
        ops = [
            _op_of(_Field(field, f"{layout.kind}.{field.name}", self.size), context)
            for field in layout.fields
        ]
        _check_strings(layout)
        self._make = _maker(layout.struct)
        self._cut = context.header.words["cut"]
        self._set_readers(ops, layout)

    def _set_readers(self, ops: list[_Op], layout: RecordLayout) -> None:
        words = [self._cut, *(word for op in ops for word in op.words)]
        self._words = _WordReader(words)
        index = self._words.index
        self._lengths = [
            index[op.words[0]]
            for op, field in zip(ops, layout.fields, strict=True)
            if field.op in _STRINGS
        ]
        # Where the length of the argv is that a line is made of, and the bit that says it was cut.
        argvs = [op.words[0] for op, f in zip(ops, layout.fields, strict=True) if f.op == "argv"]
        has_line = any(field.op == "line" for field in layout.fields)
        self._line = index[argvs[0]] if has_line else None
        self._line_bit = 1 << len(self._lengths)
        self._plain = [None if op.make else index[op.words[0]] for op in ops]
        readers = [
            (op.stage, slot, op.make(*(index[word] for word in op.words)))
            for slot, op in enumerate(ops)
            if op.make
        ]
        readers.sort(key=itemgetter(0, 1))
        self._readers = [(slot, read) for _, slot, read in readers]

    def decode(self, record: bytes, clock: int) -> tuple[Any, _Cursor] | None:
        """The event and what was noticed; None when its strings run past the record's end."""
        words = self._words.read(record)
        if self.size + sum(words[at] for at in self._lengths) > len(record):
            return None
        cursor = _Cursor(record, self.size, clock, words[self._words.index[self._cut]])
        if self._line is not None:
            cursor.line_bit = self._line_bit
            cursor.line_cut = self._line_bit if words[self._line] > MAX_LINE else 0
        values = [None if at is None else words[at] for at in self._plain]
        for slot, read in self._readers:
            values[slot] = read(words, cursor)
        return self._make(values), cursor


class Decoder:
    """Makes Structs of records, as the layouts say.

    A record is refused, and counted, when its kind is unknown, or when it ends before its
    fixed part or its strings do; it ends where its base says, or where the ring does if
    that is sooner. A string that is not UTF-8 is decoded with U+FFFD for what is not, the
    event says so in its `invalid_utf8` field, and is counted once. What a cut left of a
    character is left off. Times are taken modulo 2^64, so that they can be encoded whatever a
    record holds.
    """

    def __init__(
        self,
        header: Mapping[str, int],
        layouts: Mapping[int, RecordLayout],
        constants: Mapping[str, object],
        id_prefix: str,
        timing: Timing | None = None,
    ) -> None:
        """Compile the layouts.

        Args:
            header: byte offsets of `layout.HEADER_FIELDS`, and `header_size` in bytes.
            layouts: how records are read, by the number of their kind (0 to 65535).
            constants: values of `const` fields, shared by all events.
            id_prefix: begins the `id` of each event; ASCII.
            timing: how coarse times and durations are; None: as they are.

        Raises:
            TypeError: a class that cannot be made as its layout says: not a Struct with
                `gc=False`, without `__post_init__` and with exactly the layout's fields.
            ValueError: an unknown op, an offset or size outside the record, or a timing that
                makes no sense.
            KeyError: an offset of the header or a constant that is not there.
        """
        if not id_prefix.isascii():
            raise ValueError(f"id_prefix {id_prefix!r} is not ASCII")
        if timing is not None:
            _between(2, timing.resolution_ns, (1 << 63) - 1, "timing: resolution_ns")
            if len(timing.key) != KEY_BYTES:
                raise ValueError(f"timing: not a Timing with a key of {KEY_BYTES} bytes")
        self.header = _Header(header)
        self._clock_offset_ns = 0
        self._unknown_kind = self._short_record = self._invalid_utf8 = 0
        self._truncated = self._incomplete = 0
        self._drained: dict[int, Counter[str]] = {}
        self._kind_and_size = self.header.getter("kind", "size")
        self.sequence_of = self.header.getter("cpu", "seq", "skipped")
        self.times_of = self.header.getter("boot_ns", "seq")
        context = _Context(self.header, constants, id_prefix, timing)
        self._plans = {
            _between(0, number, 65535, "layouts: kind"): _Plan(layout, context)
            for number, layout in layouts.items()
        }

    @property
    def clock_offset_ns(self) -> int:
        """Nanoseconds to add to time since boot to get time since the epoch; s64."""
        return self._clock_offset_ns

    @clock_offset_ns.setter
    def clock_offset_ns(self, value: int) -> None:
        if not -(1 << 63) <= value < 1 << 63:
            raise OverflowError("clock_offset_ns is not an s64")
        self._clock_offset_ns = value

    @property
    def unknown_kind(self) -> int:
        """Records refused because no layout has their kind."""
        return self._unknown_kind

    @property
    def short_record(self) -> int:
        """Records refused because they end before their fields do."""
        return self._short_record

    @property
    def invalid_utf8(self) -> int:
        """Events with a string in which U+FFFD replaced bytes."""
        return self._invalid_utf8

    @property
    def truncated(self) -> int:
        """Events with a string that was cut, as `cut` says."""
        return self._truncated

    @property
    def incomplete(self) -> int:
        """Events with a `flag` that is set."""
        return self._incomplete

    def decode(self, record: ReadableBuffer, /) -> Any:
        """The event of one record; None when it was refused, which is counted."""
        decoded = self.decode_kind(bytes(record))
        return None if decoded is None else decoded[1]

    def drained(self, cpu: int, /) -> dict[str, int]:
        """How many events of `cpu` (0 to 65535) came out of buffers so far, per dotted kind."""
        return dict(self._drained.get(_between(0, cpu, 65535, "cpu"), {}))

    def count_drained(self, cpu: int, kind: str) -> None:
        """An event came out of a buffer."""
        self._drained.setdefault(cpu, Counter())[kind] += 1

    def decode_kind(self, record: bytes) -> tuple[str, Any] | None:
        """The dotted kind and the event of one record; None when it was refused."""
        if len(record) < self.header.size:
            self._short_record += 1
            return None
        kind, size = self._kind_and_size(record)
        plan = self._plans.get(kind)
        if plan is None:
            self._unknown_kind += 1
            return None
        size = min(size, len(record))
        decoded = plan.decode(record[:size], self._clock_offset_ns) if size >= plan.size else None
        if decoded is None:
            self._short_record += 1
            return None
        event, cursor = decoded
        self._invalid_utf8 += cursor.invalid
        self._truncated += cursor.truncated
        self._incomplete += cursor.incomplete
        return plan.kind, event


# ------------------------------------------------------------------ the ring


class _Fence:
    """Keeps what is read before a call ahead of what is read or written after it.

    x86-64 does that anyway. arm64 does not, and plain Python has no acquire and release but
    those of a lock: to let go of it and take it again orders everything around both.
    """

    __slots__ = ("_lock",)

    def __init__(self) -> None:
        self._lock = Lock()
        self._lock.acquire()

    def __call__(self) -> None:
        self._lock.release()
        self._lock.acquire()


class _Sequence:
    """Follows the sequence numbers of each CPU, which start at 1."""

    __slots__ = ("_expected",)

    def __init__(self) -> None:
        self._expected: dict[int, int] = {}

    def expected(self, cpu: int) -> int:
        return self._expected.get(cpu, 1)

    def expect(self, cpu: int, seq: int) -> None:
        self._expected[cpu] = seq

    def follow(self, cpu: int, seq: int, skipped: int) -> list[Gap]:
        """The anomalies that a record shows."""
        gaps: list[Gap] = []
        expected = self.expected(cpu)
        if seq > expected:
            gaps.append(("missing", cpu, expected, seq - 1))
        if seq < expected:
            gaps.append(("late", cpu, seq, seq))
        else:
            self._expected[cpu] = (seq + 1) & U64
        if skipped > 0:
            gaps.append(("skipped", cpu, skipped, skipped))
        return gaps


class _Slice(NamedTuple):
    """A record in the data area; `discarded` ones have no content. `end` is a position."""

    offset: int
    length: int
    discarded: bool
    end: int


class Ring:
    """The consumer of one BPF ring buffer. There must be only one per ring."""

    def __init__(
        self, consumer: WriteableBuffer, producer: ReadableBuffer, data_offset: int = 4096
    ) -> None:
        """Take the mapped pages of a ring; `close` lets go of them.

        Args:
            consumer: the consumer's page: at least 8 bytes, its u64 position first. Writable.
            producer: `data_offset` bytes, the producer's u64 position first, then the data
                area, whose size is a power of two, and again its first bytes, or all: as many
                as the largest record and its header have.
            data_offset: where the data area begins, in bytes; a multiple of 8.

        Raises:
            ValueError: a buffer of another shape.
            BufferError, TypeError: a consumer's page that is not writable.
        """
        if data_offset < RING_HEADER or data_offset % 8:
            raise ValueError("data_offset is not a positive multiple of 8")
        # A ctypes integer stores all 8 bytes at once, which struct.pack_into does not.
        self._consumer: ctypes.c_uint64 | None = ctypes.c_uint64.from_buffer(consumer)
        self._producer = memoryview(producer)
        self._mapped = mapped = self._producer.nbytes - data_offset
        if mapped < 2 * RING_HEADER or mapped % 8:
            raise ValueError("producer does not hold data, and some of it again")
        self._data_offset = data_offset
        self._size = 1 << (mapped - 1).bit_length() - 1
        self._fence = _Fence()
        self._sequence = _Sequence()
        self._records = self._discarded = 0
        self._draining = False

    @property
    def pending(self) -> int:
        """Bytes between the consumer's and the producer's position."""
        consumed = self._page().value
        return (self._producer_position() - consumed) & U64

    @property
    def records(self) -> int:
        """Records consumed that were not discarded, refused ones included."""
        return self._records

    @property
    def discarded(self) -> int:
        """Records consumed that the producer had discarded."""
        return self._discarded

    def next_seq(self, cpu: int, /) -> int:
        """The sequence number that the next record of `cpu` (0 to 65535) should have."""
        return self._sequence.expected(_between(0, cpu, 65535, "cpu"))

    def expect(self, cpu: int, seq: int, /) -> None:
        """Go on where another reader of the ring has come to: the next of `cpu` is `seq` (1 on)."""
        if seq == 0:
            raise ValueError("seq is 0, and numbers begin at 1")
        if not 0 < seq <= U64:
            raise OverflowError("seq does not fit into 64 bits")
        self._sequence.expect(_between(0, cpu, 65535, "cpu"), seq)

    def close(self) -> None:
        """Let go of both buffers, so that they can be unmapped. Harmless when called twice."""
        if self._draining:
            raise RuntimeError("the ring is being drained")
        self._consumer = None
        self._producer.release()

    def drain(self, decoder: Decoder, max_records: int, /) -> Drained:
        """Consume and decode up to `max_records` records, discarded ones included.

        A record that cannot be consumed does not take the ones before it along: the drain ends
        before it, with `more`, and the next one raises.

        Raises:
            ValueError: a ring whose positions or lengths make no sense ("corrupt ring …"), or
                one that was closed. Nothing has been consumed.
            MemoryError: no room for an event. Nothing has been lost: calling again goes on.
        """
        if max_records < 1:
            raise ValueError(f"max_records is {max_records}, not at least 1")
        page = self._page()
        if self._draining:
            raise RuntimeError("the ring is being drained")
        self._draining = True
        try:
            return self._drain(decoder, max_records, page)
        finally:
            self._draining = False

    def _drain(self, decoder: Decoder, limit: int, page: ctypes.c_uint64) -> Drained:
        walked, more, busy = self._walk(page.value, limit)
        self._fence()
        drained = Drained([], {}, (), more, busy)
        gaps: list[Gap] = []
        for index, found in enumerate(walked):
            try:
                self._take(decoder, found, drained, gaps)
            except MemoryError:
                if index == 0:
                    raise
                del walked[index:]
                drained = drained._replace(more=True, busy=False)
                break
        self._fence()
        if walked:
            page.value = walked[-1].end
        return drained._replace(gaps=tuple(gaps))

    def _take(self, decoder: Decoder, found: _Slice, drained: Drained, gaps: list[Gap]) -> None:
        if found.discarded:
            self._discarded += 1
            return
        start = self._data_offset + found.offset
        record = bytes(self._producer[start : start + found.length])
        decoded = decoder.decode_kind(record)
        self._records += 1
        if len(record) >= decoder.header.size:
            gaps += self._sequence.follow(*decoder.sequence_of(record))
        if decoded is not None:
            kind, event = decoded
            drained.events.append(event)
            drained.kinds[kind] = drained.kinds.get(kind, 0) + 1
            decoder.count_drained(decoder.sequence_of(record)[0], kind)

    def _walk(self, start: int, limit: int) -> tuple[list[_Slice], bool, bool]:
        """The records to consume, and whether there are more, and whether the next is busy."""
        walked: list[_Slice] = []
        position = end = start
        try:
            while True:
                if position == end:
                    end = self._end(position)
                    if position == end:
                        return walked, False, False
                if len(walked) == limit:
                    return walked, True, False
                found = self._find(position, (end - position) & U64)
                if found is None:
                    return walked, False, True
                walked.append(found)
                position = found.end
        except ValueError:
            if not walked:
                raise
            return walked, True, False

    def _end(self, position: int) -> int:
        end = self._producer_position()
        self._fence()
        if (end - position) & U64 > self._size or position % 8:
            raise ValueError(
                f"corrupt ring: consumer at {position}, producer at {end}, size {self._size}"
            )
        return end

    def _find(self, position: int, pending: int) -> _Slice | None:
        """The record at a position; None when it is busy."""
        offset = position & (self._size - 1)
        (word,) = struct.unpack_from("@I", self._producer, self._data_offset + offset)
        if word & BUSY:
            return None
        length = word & LENGTH_MASK
        step = (RING_HEADER + length + 7) & ~7
        if step > pending:
            raise ValueError(
                f"corrupt ring: a record of {length} bytes at {position}, "
                f"where {pending} are pending"
            )
        if offset + step > self._mapped and not word & DISCARD:
            raise ValueError(
                f"corrupt ring: a record of {length} bytes at {position} is longer than "
                f"what is mapped"
            )
        end = (position + step) & U64
        return _Slice(offset + RING_HEADER, length, bool(word & DISCARD), end)

    def _page(self) -> ctypes.c_uint64:
        if self._consumer is None:
            raise ValueError("the ring is closed")
        return self._consumer

    def _producer_position(self) -> int:
        # In the machine's own format, struct copies all 8 bytes at once.
        position: int = struct.unpack_from("@Q", self._producer)[0]
        return position


# ------------------------------------------------------------------ the perf buffers

PERF_HEAD, PERF_TAIL = 1024, 1032
"""Offsets of the positions in a buffer's first page (struct perf_event_mmap_page)."""
PERF_HEADER, PERF_DATA = 8, 12
PERF_SAMPLE, PERF_LOST = 9, 2
_PERF_RECORD = struct.Struct("<IHH")


class _PerfBuffer:
    """One buffer, and how far the drain that is under way has come in it."""

    def __init__(self, cpu: int, memory: WriteableBuffer, data_offset: int) -> None:
        if data_offset < PERF_TAIL + 8 or data_offset % 8:
            raise ValueError("data_offset is not a multiple of 8 behind the positions")
        view = memoryview(memory)
        self.size = view.nbytes - data_offset
        if self.size < 8 or self.size & (self.size - 1):
            raise ValueError("memory does not hold a power of two of data")
        # A ctypes integer stores all 8 bytes at once, which struct.pack_into does not.
        self._head = ctypes.c_uint64.from_buffer(memory, PERF_HEAD)
        self._tail = ctypes.c_uint64.from_buffer(memory, PERF_TAIL)
        self._data = view[data_offset:]
        self.cpu = cpu
        self.before = 0
        self.replaced = False
        self.position = self.end = self.step = self.length = self.boot_ns = 0

    @property
    def head(self) -> int:
        return self._head.value

    @property
    def tail(self) -> int:
        return self._tail.value

    @tail.setter
    def tail(self, position: int) -> None:
        self._tail.value = position

    def read(self, position: int, size: int) -> bytes:
        offset = position & (self.size - 1)
        first = bytes(self._data[offset : offset + size])
        return first + bytes(self._data[: size - len(first)])

    def release(self) -> None:
        del self._head, self._tail
        self._data.release()


class PerfBuffers:
    """The consumer of the perf buffers of all CPUs: the same as `Ring` to whoever reads it.

    Its records are those of the kernel (linux/perf_event.h): samples, of which each holds a
    record, and the numbers of those that found no room.
    """

    def __init__(self) -> None:
        """Without any; `add` brings them."""
        self._buffers: list[_PerfBuffer] = []
        self._fence = _Fence()
        self._sequence = _Sequence()
        self._records = self._discarded = self._lost = 0
        self._draining = self._closed = False

    @property
    def pending(self) -> int:
        """Bytes that were written and not read, in all buffers."""
        self._check()
        return sum((one.head - one.tail) & U64 for one in self._buffers) & U64

    @property
    def records(self) -> int:
        """Records consumed, refused ones included."""
        return self._records

    @property
    def discarded(self) -> int:
        """The kernel's own records, other than those of losses."""
        return self._discarded

    @property
    def lost(self) -> int:
        """Records that found no room, as the kernel's own records say."""
        return self._lost

    def next_seq(self, cpu: int, /) -> int:
        """The sequence number that the next record of `cpu` (0 to 65535) should have."""
        return self._sequence.expected(_between(0, cpu, 65535, "cpu"))

    def produced(self, cpu: int, /) -> int:
        """Bytes that were ever written for a CPU."""
        return self._sum(cpu, lambda one: one.head)

    def consumed(self, cpu: int, /) -> int:
        """Bytes that were ever read of a CPU."""
        return self._sum(cpu, lambda one: one.tail)

    def _sum(self, cpu: int, position: Callable[[_PerfBuffer], int]) -> int:
        _between(0, cpu, 65535, "cpu")
        self._check()
        return sum(one.before + position(one) for one in self._buffers if one.cpu == cpu) & U64

    def add(self, cpu: int, memory: WriteableBuffer, data_offset: int = 4096, /) -> None:
        """Read the buffer of a CPU as well; if it has one already, that one to its end first.

        Args:
            cpu: 0 to 65535.
            memory: the mapped pages: `data_offset` bytes with the positions, then the data area,
                whose size must be a power of two. Writable.
            data_offset: where the data area begins, in bytes; a multiple of 8.

        Raises:
            ValueError: memory of another shape.
            BufferError, TypeError: memory that is not writable.
        """
        _between(0, cpu, 65535, "cpu")
        self._check()
        made = _PerfBuffer(cpu, memory, data_offset)
        for one in self._buffers:
            one.replaced |= one.cpu == cpu
        self._buffers.append(made)
        self._drop_replaced()

    def close(self) -> None:
        """Let go of all buffers, so that they can be unmapped. Harmless when called twice."""
        if self._draining:
            raise RuntimeError("the buffers are being drained")
        for one in self._buffers:
            one.release()
        self._buffers = []
        self._closed = True

    def drain(self, decoder: Decoder, max_records: int, /) -> Drained:
        """Consume and decode up to `max_records` records, the oldest first; see `Ring.drain`."""
        self._check()
        if max_records < 1:
            raise ValueError(f"max_records is {max_records}, not at least 1")
        self._draining = True
        try:
            return self._drain(decoder, max_records)
        finally:
            self._draining = False
            self._drop_replaced()

    def _drain(self, decoder: Decoder, limit: int) -> Drained:
        drained = Drained([], {}, (), False, False)
        gaps: list[Gap] = []
        taken, more = 0, False
        for one in self._buffers:
            one.position = one.end = one.tail
        try:
            heads = self._heads(decoder)
            while heads:
                oldest = min(heads, key=lambda one: (one.boot_ns, one.cpu))
                if taken == limit:
                    more = True
                    break
                self._take(decoder, oldest, drained, gaps)
                taken += 1
                oldest.position = (oldest.position + oldest.step) & U64
                if not self._find(decoder, oldest):
                    heads.remove(oldest)
        except (ValueError, MemoryError):
            if not taken:
                raise
            more = True
        finally:
            self._fence()
            for one in self._buffers:
                one.tail = one.position
        return drained._replace(gaps=tuple(gaps), more=more)

    def _heads(self, decoder: Decoder) -> list[_PerfBuffer]:
        """Those that have a sample."""
        found = []
        for one in self._buffers:
            head = one.head
            if (head - one.position) & U64 > one.size or one.position % 8:
                raise ValueError(
                    f"corrupt perf buffer: CPU {one.cpu}, read to {one.position}, "
                    f"written to {head}, size {one.size}"
                )
            one.end = head
            self._fence()
            if self._find(decoder, one):
                found.append(one)
        return found

    def _find(self, decoder: Decoder, one: _PerfBuffer) -> bool:
        """Go on to the next sample, if there is one."""
        while one.position != one.end:
            kind, _, size = _PERF_RECORD.unpack(one.read(one.position, PERF_HEADER))
            pending = (one.end - one.position) & U64
            if size < PERF_HEADER or size % 8 or size > pending:
                raise ValueError(
                    f"corrupt perf buffer: CPU {one.cpu}, a record of {size} bytes at "
                    f"{one.position}, where {pending} are pending"
                )
            one.step = size
            if kind == PERF_SAMPLE:
                self._see(decoder, one)
                return True
            if kind == PERF_LOST and size >= 24:
                lost = int.from_bytes(one.read(one.position + 16, 8), "little")
                self._lost = (self._lost + lost) & U64
            else:
                self._discarded += 1
            one.position = (one.position + size) & U64
        return False

    def _see(self, decoder: Decoder, one: _PerfBuffer) -> None:
        one.length = one.boot_ns = 0
        if one.step >= PERF_HEADER + 8:
            said = int.from_bytes(one.read(one.position + PERF_HEADER, 4), "little")
            one.length = min(said, one.step - PERF_DATA)
        if one.length >= decoder.header.size:
            record = one.read(one.position + PERF_DATA, decoder.header.size)
            one.boot_ns, _ = decoder.times_of(record)

    def _take(self, decoder: Decoder, one: _PerfBuffer, drained: Drained, gaps: list[Gap]) -> None:
        record = one.read(one.position + PERF_DATA, one.length)
        decoded = decoder.decode_kind(record)
        self._records += 1
        if len(record) >= decoder.header.size:
            gaps += self._sequence.follow(*decoder.sequence_of(record))
        if decoded is not None:
            kind, event = decoded
            drained.events.append(event)
            drained.kinds[kind] = drained.kinds.get(kind, 0) + 1
            decoder.count_drained(decoder.sequence_of(record)[0], kind)

    def _drop_replaced(self) -> None:
        """Let go of buffers that are empty, and that nothing writes to any more."""
        for one in [one for one in self._buffers if one.replaced and one.head == one.tail]:
            index = self._buffers.index(one)
            newer = next(other for other in self._buffers[index + 1 :] if other.cpu == one.cpu)
            newer.before += one.before + one.tail
            self._buffers.remove(one)
            one.release()

    def _check(self) -> None:
        if self._draining:
            raise RuntimeError("the buffers are being drained")
        if self._closed:
            raise ValueError("the buffers are closed")
