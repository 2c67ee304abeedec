"""What a DNS message says: RFC 1035, names as RFC 4343 writes them.

A message comes from anybody, and may hold anything. Whatever it holds, `parse` gives fields: those
before the first mistake, and in `malformed` what that was. What it costs is bounded: a pointer in a
name leads only further back, and of all names of a message only so many bytes are read.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable, Sequence
from socket import AF_INET, AF_INET6, inet_ntop
from typing import Annotated, NamedTuple

from msgspec import Meta, Struct

MOST_ANSWERS = 32
"""Of a response; how many more there were is said."""
MOST_RECORDS = 256
"""That are looked at, in all sections: an OPT record behind that is not found."""

HIDDEN = "<redacted:dns>"
"""In place of what is secret."""

_OF_NAMES = ("NS", "CNAME", "PTR", "DNAME", "MX", "SRV", "SOA")
_MOST_BYTES = 8192
"""Of all names of a message, each with those that its pointers lead to: 1.7 KB can say 30 times as
much otherwise. What is behind is left out."""
_MOST_NAME = 255
_MOST_LABEL = 63
_POINTER = 0xC0
_HEADER = struct.Struct("!6H")
_QUESTION = struct.Struct("!2H")
_RECORD = struct.Struct("!HHIH")
_SOA = struct.Struct("!5I")
_ONE, _THREE = struct.Struct("!H"), struct.Struct("!3H")
_LENGTH = struct.Struct("<H")
_OPT = 41
# As zone files and dig write them; a dot in a label is no end of it.
_ODD = {byte: f"\\{byte:03d}" for byte in range(256) if not 0x20 <= byte < 0x7F}
_IN_NAMES = {**_ODD, 0x20: "\\032", **{byte: f"\\{byte:c}" for byte in b'"().;\\@$'}}
_IN_TEXTS = {**_ODD, **{byte: f"\\{byte:c}" for byte in b'"\\'}}
_PLAIN = re.compile(rb"[!#%&'*+,\-/0-9:<=>?A-Z\[\]^_`a-z{|}~]*")
_PLAIN_TEXT = re.compile(rb"[ !#-\[\]-~]*")

TYPES = {
    **{1: "A", 2: "NS", 5: "CNAME", 6: "SOA", 12: "PTR", 13: "HINFO", 15: "MX", 16: "TXT"},
    **{17: "RP", 18: "AFSDB", 24: "SIG", 25: "KEY", 28: "AAAA", 29: "LOC", 33: "SRV"},
    **{35: "NAPTR", 36: "KX", 37: "CERT", 39: "DNAME", 41: "OPT", 42: "APL", 43: "DS"},
    **{44: "SSHFP", 45: "IPSECKEY", 46: "RRSIG", 47: "NSEC", 48: "DNSKEY", 49: "DHCID"},
    **{50: "NSEC3", 51: "NSEC3PARAM", 52: "TLSA", 53: "SMIMEA", 55: "HIP", 59: "CDS"},
    **{60: "CDNSKEY", 61: "OPENPGPKEY", 62: "CSYNC", 63: "ZONEMD", 64: "SVCB", 65: "HTTPS"},
    **{99: "SPF", 108: "EUI48", 109: "EUI64", 249: "TKEY", 250: "TSIG", 251: "IXFR"},
    **{252: "AXFR", 255: "ANY", 256: "URI", 257: "CAA", 32769: "DLV"},
}
CLASSES = {1: "IN", 3: "CH", 4: "HS", 254: "NONE", 255: "ANY"}
OPCODES = {0: "QUERY", 1: "IQUERY", 2: "STATUS", 4: "NOTIFY", 5: "UPDATE", 6: "DSO"}
RESPONSE_CODES = {
    **{0: "NOERROR", 1: "FORMERR", 2: "SERVFAIL", 3: "NXDOMAIN", 4: "NOTIMP", 5: "REFUSED"},
    **{6: "YXDOMAIN", 7: "YXRRSET", 8: "NXRRSET", 9: "NOTAUTH", 10: "NOTZONE", 11: "DSOTYPENI"},
    **{16: "BADVERS", 17: "BADKEY", 18: "BADTIME", 19: "BADMODE", 20: "BADNAME", 21: "BADALG"},
    **{22: "BADTRUNC", 23: "BADCOOKIE"},
}


class DnsAnswer(Struct, gc=False):
    """A record of the answer section."""

    name: Annotated[str, Meta(description="of whom it is, as `query` is written")]
    type: Annotated[str, Meta(description="as `query_type`")]
    ttl: Annotated[int, Meta(ge=0, le=4294967295, description="seconds that it may be kept")]
    data: Annotated[
        str,
        Meta(
            description="address, name, or what else zone files have there; of other types, and "
            "where it is malformed, its bytes: `\\# length hexadecimal` (RFC 3597)"
        ),
    ]


class DnsMessage(NamedTuple):
    """What `parse` gives, in the order of `PARTS`."""

    answers: list[DnsAnswer]
    query: str = ""
    query_type: str = ""
    query_class: str = ""
    opcode: str = ""
    response_code: str = ""
    authoritative: bool = False
    response_truncated: bool = False
    recursion_desired: bool = False
    recursion_available: bool = False
    authenticated: bool = False
    edns_bytes: int = 0
    answers_left_out: int = 0
    malformed: str = ""


PARTS = {
    "answers": f"records of the answer section, at most {MOST_ANSWERS}",
    "query": "name that was asked for, without the dot at its end; `.` is the root. Its case is "
    "kept; what is no printable ASCII is `\\DDD`, in decimal, and special characters have a `\\`",
    "query_type": "what was asked for, such as A; `TYPE65280` where it has no name here",
    "query_class": "almost always IN; `CLASS32` where it has no name here",
    "opcode": "almost always QUERY",
    "response_code": "such as NOERROR, NXDOMAIN, SERVFAIL; empty where there is no response",
    "authoritative": "whether the server answers for the zone itself (AA)",
    "response_truncated": "whether the server left out what had no room (TC): it is then asked "
    "over TCP",
    "recursion_desired": "whether the server was asked to ask others (RD)",
    "recursion_available": "whether it would do that (RA)",
    "authenticated": "whether it says to have checked signatures (AD)",
    "edns_bytes": "what the server can take over UDP (EDNS); 0 where it does not say",
    "answers_left_out": "records of the answer section that are not in `answers`",
    "malformed": "the first mistake in the message, in words; empty where there is none",
}
"""What each part means."""


class _Malformed(Exception):
    """What is wrong with a message."""


class _TooMuch(Exception):
    """Its names are longer than what is read of them."""


class _Short(_Malformed):
    """It ends before what it announces."""

    def __init__(self) -> None:
        super().__init__("it ends too early")


def parse(data: bytes, cut: bool) -> DnsMessage:
    """What is in a query and its response; never raises.

    `data` is a u16 with the length of the query's beginning (header and question), that, and the
    response, which is `cut` where it is not all there, and empty where there is none.
    """
    (length,) = _LENGTH.unpack_from(data)
    query, response = data[2 : 2 + length], data[2 + length :]
    message = response or query
    if len(message) < _HEADER.size:
        return DnsMessage([], malformed="it is shorter than a header")
    reader = _Reader(message, query)
    try:
        reader.read_question()
        if response:
            reader.read_records()
    except _TooMuch:
        pass  # the number of answers that are left out says so
    except _Malformed as mistake:
        # A message that was cut is not malformed because it ends there.
        if not (cut and isinstance(mistake, _Short)):
            reader.note(str(mistake))
    flags, says = reader.flags, bool(response)
    return DnsMessage(
        reader.answers,
        reader.name,
        reader.type,
        reader.klass,
        _name_of(OPCODES, "OPCODE", flags >> 11 & 15),
        _name_of(RESPONSE_CODES, "RCODE", reader.code) if says else "",
        says and bool(flags & 0x0400),
        says and bool(flags & 0x0200),
        bool(flags & 0x0100),
        says and bool(flags & 0x0080),
        says and bool(flags & 0x0020),
        reader.edns,
        reader.announced - len(reader.answers) if says else 0,
        reader.malformed,
    )


def hiding(suffixes: Sequence[str]) -> Callable[[bytes, bool], DnsMessage]:
    """A `parse` that leaves out what is in front of these names: they are secret, and `.` is all.

    Of answers of such a name only addresses are told. Names in data of other types that are not
    read here are in bytes, which are left out only with the name that they belong to.
    """
    ends = tuple(f".{suffix.lower().strip('.')}" for suffix in suffixes)

    def is_hidden(name: str) -> str | None:
        lower = f".{name.lower()}"
        return next((end for end in ends if end == "." or lower.endswith(end)), None)

    def hide(name: str) -> str:
        end = is_hidden(name)
        if end is None or f".{name.lower()}" == end:
            return name
        return HIDDEN if end == "." else f"{HIDDEN}{name[-len(end) :]}"

    def hide_data(answer: DnsAnswer) -> str:
        if answer.type in ("A", "AAAA"):
            return answer.data
        if answer.type in _OF_NAMES and not answer.data.startswith("\\#"):
            return " ".join(map(hide, answer.data.split(" ")))
        return answer.data if is_hidden(answer.name) is None else HIDDEN

    def parse_and_hide(data: bytes, cut: bool) -> DnsMessage:
        found = parse(data, cut)
        answers = [
            DnsAnswer(hide(one.name), one.type, one.ttl, hide_data(one)) for one in found.answers
        ]
        return found._replace(query=hide(found.query), answers=answers)

    return parse_and_hide


class _Reader:
    """Reads a message, and has what it has found so far."""

    def __init__(self, message: bytes, query: bytes) -> None:
        """`query` is the beginning of the query: as `message` where there is no response."""
        self._message = message
        self._query = query
        self._at = _HEADER.size
        self._left = _MOST_BYTES
        _, self.flags, self._questions, self.announced, *others = _HEADER.unpack_from(message)
        self._others = sum(others)
        self.code = self.flags & 15
        self.answers: list[DnsAnswer] = []
        self.name = self.type = self.klass = self.malformed = ""
        self.edns = 0

    def note(self, mistake: str) -> None:
        """The first one is kept."""
        self.malformed = self.malformed or mistake

    def read_question(self) -> None:
        """Of the query, where the response leaves it out. Raises _Malformed."""
        if not self._questions:
            self._read_query()
            return
        self._at = self._read_one_question()
        for _ in range(min(self._questions, MOST_RECORDS) - 1):
            self._at = self._skip_name(self._at) + _QUESTION.size
        start, end = _HEADER.size, len(self._query)
        if self._message[start:end].lower() != self._query[start:].lower():
            self.note("it answers another question")

    def _read_query(self) -> None:
        message, self._message = self._message, self._query
        if len(self._query) > _HEADER.size:
            self._read_one_question()
        self._message = message

    def _read_one_question(self) -> int:
        self.name, at = self._read_name(_HEADER.size)
        kind, klass = self._unpack(_QUESTION, at)
        self.type = _name_of(TYPES, "TYPE", kind)
        self.klass = _name_of(CLASSES, "CLASS", klass)
        return at + _QUESTION.size

    def read_records(self) -> None:
        """Answers, and behind them the OPT record. Raises _Malformed."""
        taken = min(self.announced, MOST_ANSWERS)
        for index in range(min(self.announced + self._others, MOST_RECORDS)):
            start, at = self._at, self._skip_name(self._at)
            kind, klass, ttl, length = self._unpack(_RECORD, at)
            at += _RECORD.size
            self._at = at + length
            if self._at > len(self._message):
                raise _Short
            if index < taken:
                name, _ = self._read_name(start)
                data = self._data_of(at, self._at, kind)
                self.answers.append(DnsAnswer(name, _name_of(TYPES, "TYPE", kind), ttl, data))
            elif kind == _OPT and index >= self.announced:
                self.edns = klass
                self.code = ttl >> 24 << 4 | self.flags & 15

    # ------------------------------------------------------------ names

    def _unpack(self, layout: struct.Struct, at: int) -> tuple[int, ...]:
        if at + layout.size > len(self._message):
            raise _Short
        return layout.unpack_from(self._message, at)

    def _skip_name(self, at: int) -> int:
        """Where the name ends that begins there: a pointer ends it."""
        message = self._message
        try:
            while length := message[at]:
                if length >= _POINTER:
                    return at + 2
                if length > _MOST_LABEL:
                    raise _Malformed("a label of an unknown type")
                at += length + 1
        except IndexError:
            raise _Short from None
        return at + 1

    def _read_name(self, at: int) -> tuple[str, int]:
        """A name, and where it ends."""
        message = self._message
        labels: list[bytes] = []
        size, before, end = 1, at, 0
        try:
            while length := message[at]:
                self._left -= 2 if length >= _POINTER else length + 1
                if self._left < 0:
                    raise _TooMuch
                if length <= _MOST_LABEL:
                    labels.append(message[at + 1 : at + 1 + length])
                    at += length + 1
                    size += length + 1
                    if size > _MOST_NAME:
                        raise _Malformed("a name that is too long")
                elif length < _POINTER:
                    raise _Malformed("a label of an unknown type")
                else:
                    pointer = (length & ~_POINTER) << 8 | message[at + 1]
                    if pointer >= before:
                        raise _Malformed("a pointer that does not lead back")
                    end = end or at + 2
                    at = before = pointer
        except IndexError:
            raise _Short from None
        return ".".join(map(_label, labels)) or ".", end or at + 1

    # ------------------------------------------------------------ data

    def _data_of(self, at: int, end: int, kind: int) -> str:
        """A record's data as text; in bytes where its type has no text here, or it is malformed."""
        read = _READERS.get(kind)
        if read is not None:
            try:
                text, stop = read(self, at, end)
                if stop == end:
                    return text
                self.note(f"a record of type {TYPES[kind]} of another length")
            except _Short:
                self.note(f"a record of type {TYPES[kind]} of another length")
            except _Malformed as mistake:
                self.note(str(mistake))
        data = self._message[at:end]
        return f"\\# {len(data)} {data.hex()}".rstrip()

    def ipv4(self, at: int, end: int) -> tuple[str, int]:
        """An A record."""
        return (inet_ntop(AF_INET, self._message[at:end]), end) if end - at == 4 else ("", at)

    def ipv6(self, at: int, end: int) -> tuple[str, int]:
        """An AAAA record."""
        return (inet_ntop(AF_INET6, self._message[at:end]), end) if end - at == 16 else ("", at)

    def one_name(self, at: int, end: int) -> tuple[str, int]:
        """A CNAME record, and others that are a name."""
        return self._read_name(at)

    def mx(self, at: int, end: int) -> tuple[str, int]:
        """A number and a name."""
        return self._numbers_and_name(_ONE, at)

    def srv(self, at: int, end: int) -> tuple[str, int]:
        """Three numbers and a name."""
        return self._numbers_and_name(_THREE, at)

    def _numbers_and_name(self, layout: struct.Struct, at: int) -> tuple[str, int]:
        values = self._unpack(layout, at)
        name, stop = self._read_name(at + layout.size)
        return " ".join([*map(str, values), name]), stop

    def soa(self, at: int, end: int) -> tuple[str, int]:
        """Two names and five numbers."""
        primary, at = self._read_name(at)
        mailbox, at = self._read_name(at)
        numbers = map(str, self._unpack(_SOA, at))
        return " ".join([primary, mailbox, *numbers]), at + _SOA.size

    def texts(self, at: int, end: int) -> tuple[str, int]:
        """A TXT record."""
        texts = []
        while at < end:
            size = self._message[at]
            if at + 1 + size > end:
                return "", at
            texts.append(_text(self._message[at + 1 : at + 1 + size]))
            at += size + 1
        return " ".join(texts), at


_READERS: dict[int, Callable[[_Reader, int, int], tuple[str, int]]] = {
    **dict.fromkeys((2, 5, 12, 39), _Reader.one_name),  # NS, CNAME, PTR, DNAME
    1: _Reader.ipv4,
    6: _Reader.soa,
    15: _Reader.mx,
    16: _Reader.texts,
    28: _Reader.ipv6,
    33: _Reader.srv,
}


def _label(label: bytes) -> str:
    if _PLAIN.fullmatch(label):
        return label.decode("ascii")
    return label.decode("latin-1").translate(_IN_NAMES)


def _name_of(names: dict[int, str], prefix: str, number: int) -> str:
    return names.get(number) or f"{prefix}{number}"


def _text(text: bytes) -> str:
    if _PLAIN_TEXT.fullmatch(text):
        return f'"{text.decode("ascii")}"'
    return f'"{text.decode("latin-1").translate(_IN_TEXTS)}"'
