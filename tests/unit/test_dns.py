"""The parser of DNS messages: what dnspython makes of them, and whatever bytes there are."""

from __future__ import annotations

import random
import struct
from typing import Any

import dns.exception
import dns.flags
import dns.message
import dns.name
import dns.rcode
import dns.rdatatype
import dns.rrset
import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streamer.events.dns import (
    CLASSES,
    MOST_ANSWERS,
    OPCODES,
    RESPONSE_CODES,
    TYPES,
    DnsMessage,
    hiding,
    parse,
)
from streamer.events.kinds import NetDns

NAME = "www.example.org"


def packed(query: bytes, response: bytes = b"") -> bytes:
    """As the programs give it: the beginning of the query, and the response."""
    return struct.pack("<H", len(query)) + query + response


def asked(name: str = f"{NAME}.", kind: str = "A", **options: Any) -> dns.message.QueryMessage:
    return dns.message.make_query(name, kind, use_edns=options.pop("use_edns", False), **options)


def beginning(query: dns.message.Message) -> bytes:
    """Header and question."""
    wire = query.to_wire()
    parsed = dns.message.from_wire(wire)
    size = 12 + len(parsed.question[0].name.to_wire() or b"") + 4
    return wire[:size]


def answered(query: dns.message.QueryMessage, *records: str) -> dns.message.Message:
    """A response with these records: `name ttl class type data`."""
    response = dns.message.make_response(query)
    for record in records:
        name, ttl, klass, kind, data = record.split(" ", 4)
        response.answer.append(dns.rrset.from_text(name, int(ttl), klass, kind, data))
    return response


def read(query: dns.message.QueryMessage, response: dns.message.Message) -> DnsMessage:
    return parse(packed(beginning(query), response.to_wire(max_size=65535)), False)


# ------------------------------------------------------------------ what it gives


def test_a_response() -> None:
    query = asked("WwW.Example.ORG.", "AAAA")
    response = answered(
        query,
        "www.example.org. 300 IN CNAME web.example.net.",
        "web.example.net. 60 IN AAAA 2001:db8::1",
    )
    response.flags |= dns.flags.RA | dns.flags.AA | dns.flags.AD
    found = read(query, response)
    assert (found.query, found.query_type, found.query_class) == ("WwW.Example.ORG", "AAAA", "IN")
    assert (found.opcode, found.response_code, found.malformed) == ("QUERY", "NOERROR", "")
    assert [(a.name, a.type, a.ttl, a.data) for a in found.answers] == [
        ("WwW.Example.ORG", "CNAME", 300, "web.example.net"),  # a pointer to the question
        ("web.example.net", "AAAA", 60, "2001:db8::1"),
    ]
    assert found.authoritative
    assert found.recursion_available
    assert found.authenticated
    assert found.recursion_desired
    assert not found.response_truncated
    assert (found.answers_left_out, found.edns_bytes) == (0, 0)


def test_a_query_alone() -> None:
    """What only a server says is not taken from it."""
    query = asked()
    query.flags |= dns.flags.AD | dns.flags.AA | dns.flags.TC
    found = parse(packed(beginning(query)), False)
    assert found == DnsMessage([], NAME, "A", "IN", "QUERY", recursion_desired=True)


def test_a_response_that_leaves_the_question_out() -> None:
    """The query has it."""
    query = asked()
    (number,) = struct.unpack_from("!H", query.to_wire())
    found = parse(packed(beginning(query), struct.pack("!6H", number, 0x8182, 0, 0, 0, 0)), False)
    assert (found.query, found.response_code, found.malformed) == (NAME, "SERVFAIL", "")


def test_an_answer_to_another_question() -> None:
    other = asked("other.example.org.")
    found = parse(packed(beginning(asked()), answered(other).to_wire()), False)
    assert (found.query, found.malformed) == ("other.example.org", "it answers another question")


def test_edns_and_its_part_of_the_code() -> None:
    query = asked(use_edns=0)
    response = dns.message.make_response(query, our_payload=1400)
    response.set_rcode(dns.rcode.BADVERS)
    response.flags |= dns.flags.TC
    found = read(query, response)
    assert (found.edns_bytes, found.response_code) == (1400, "BADVERS")
    assert found.response_truncated


def test_only_so_many_answers() -> None:
    """The others are counted, and walked over to what follows."""
    query = asked(use_edns=0)
    records = [f"{NAME}. 1 IN A 10.0.{i // 200}.{i % 200}" for i in range(200)]
    found = read(query, answered(query, *records))
    assert (len(found.answers), found.answers_left_out) == (MOST_ANSWERS, 200 - MOST_ANSWERS)
    assert (found.edns_bytes, found.malformed) == (8192, "")


@pytest.mark.parametrize("end", range(13, 80))
def test_a_message_that_was_cut_is_not_malformed(end: int) -> None:
    query = asked()
    whole = answered(query, f"{NAME}. 1 IN A 192.0.2.1", f"{NAME}. 1 IN TXT x").to_wire()
    data = packed(beginning(query), whole[:end])
    cut, torn = parse(data, True), parse(data, False)
    assert cut.malformed == "" or "another question" in cut.malformed
    assert torn.malformed if end < len(whole) else not torn.malformed
    assert cut.answers == torn.answers
    assert len(cut.answers) + cut.answers_left_out == 2


def test_a_message_that_was_cut_can_be_malformed_before_that() -> None:
    """Only that it ends is no mistake."""
    query = asked()
    whole = answered(query, f"{NAME}. 1 IN A 192.0.2.1", f"{NAME}. 1 IN TXT x").to_wire()
    start = len(beginning(query))
    odd = whole[:start] + b"\x80" + whole[start + 1 : -3]
    assert parse(packed(beginning(query), odd), True).malformed == "a label of an unknown type"


def test_a_name_that_leads_to_itself() -> None:
    query = asked()
    whole = answered(query, f"{NAME}. 1 IN A 192.0.2.1").to_wire()
    start = len(beginning(query))
    loop = whole[:start] + struct.pack("!H", 0xC000 | start) + whole[start + 2 :]
    found = parse(packed(beginning(query), loop), False)
    assert (found.answers, found.malformed) == ([], "a pointer that does not lead back")


def test_what_edns_says_is_not_taken_from_answers() -> None:
    """Behind those that are told there may be anything, too."""
    query = asked()
    response = answered(query, *(f"{NAME}. 1 IN A 10.0.0.{i}" for i in range(MOST_ANSWERS)))
    wire = bytearray(response.to_wire())
    wire += b"\0" + struct.pack("!HHIH", 41, 4096, 1 << 24, 0)
    struct.pack_into("!H", wire, 6, MOST_ANSWERS + 1)
    found = parse(packed(beginning(query), bytes(wire)), False)
    assert (found.edns_bytes, found.response_code, found.answers_left_out) == (0, "NOERROR", 1)
    assert found.malformed == ""


@pytest.mark.parametrize(
    ("wire", "text"),
    [
        (b"\0", "."),
        (b"\3a.b\0", r"a\.b"),
        (b"\1a\1b\0", "a.b"),
        (b"\4a\\.b\0", r"a\\\.b"),
        (b"\7\0\x1f \x7f\xff\xc3\xa9\0", r"\000\031\032\127\255\195\169"),
        (b"\x0bxn--bcher-k\0", "xn--bcher-k"),
        (b'\7a"$;(@)\0', r"a\"\$\;\(\@\)"),
        (b"\3\xe2\x80\xae\0", r"\226\128\174"),
    ],
)
def test_names_are_written_unambiguously(wire: bytes, text: str) -> None:
    query = struct.pack("!6H", 1, 0, 1, 0, 0, 0) + wire + b"\0\1\0\1"
    assert parse(packed(query), False).query == text
    assert dns.name.from_text(text).to_wire() == wire


def test_different_names_are_never_the_same_text() -> None:
    """Of two labels, whatever they hold: the text leads back to the bytes."""
    generator = random.Random(1)
    for _ in range(2000):
        labels = [generator.randbytes(generator.randint(1, 20)) for _ in range(2)]
        wire = b"".join(bytes([len(label)]) + label for label in labels) + b"\0"
        query = struct.pack("!6H", 1, 0, 1, 0, 0, 0) + wire + b"\0\1\0\1"
        assert dns.name.from_text(parse(packed(query), False).query).to_wire() == wire


def test_names_are_those_that_dnspython_has() -> None:
    for number, name in TYPES.items():
        assert dns.rdatatype.to_text(dns.rdatatype.RdataType.make(number)) == name
    for number, name in RESPONSE_CODES.items():
        known = dns.rcode.to_text(dns.rcode.Rcode.make(number))
        assert known == name or number == 16  # BADVERS and BADSIG are one number
    assert dns.rdatatype.to_text(dns.rdatatype.RdataType.make(65280)) == "TYPE65280"
    assert set(CLASSES.values()) == {"IN", "CH", "HS", "NONE", "ANY"}
    assert OPCODES[0] == "QUERY"


# ------------------------------------------------------------------ what is left out


def test_secret_names_are_left_out() -> None:
    query = asked("DB7.Corp.Example.", "ANY")
    response = answered(
        query,
        "db7.corp.example. 1 IN CNAME srv.corp.example.",
        "srv.corp.example. 1 IN A 192.0.2.1",
        "srv.corp.example. 1 IN MX 10 mail.corp.example.",
        'srv.corp.example. 1 IN TXT "secret"',
        "public.example. 1 IN CNAME www.corp.example.",
        'corp.example. 1 IN TXT "secret, too"',
        'notcorp.example. 1 IN TXT "public"',
    )
    data = packed(beginning(query), response.to_wire())
    found = hiding(["corp.example."])(data, False)
    hidden = "<redacted:dns>.corp.example"
    assert found.query == "<redacted:dns>.Corp.Example"
    assert [(a.name.lower(), a.data.lower()) for a in found.answers] == [
        (hidden, hidden),
        (hidden, "192.0.2.1"),
        (hidden, f"10 {hidden}"),
        (hidden, "<redacted:dns>"),
        ("public.example", hidden),
        ("corp.example", "<redacted:dns>"),
        ("notcorp.example", '"public"'),
    ]
    everything = hiding(["."])(data, False)
    assert {everything.query} | {a.name for a in everything.answers} == {"<redacted:dns>"}
    shown = repr(everything).lower()
    assert not any(word in shown for word in ("corp", "mail", "secret", "public", "example"))
    assert found._replace(query="", answers=[]) == parse(data, False)._replace(query="", answers=[])


# ------------------------------------------------------------------ the oracle

RECORDS = (
    f"{NAME}. 0 IN A 192.0.2.1",
    f"{NAME}. 4294967295 IN AAAA ::ffff:192.0.2.1",
    f"{NAME}. 1 IN NS ns.example.org.",
    f"{NAME}. 1 IN DNAME elsewhere.example.org.",
    f"{NAME}. 1 IN PTR host.example.org.",
    f"{NAME}. 1 IN MX 10 mail.example.org.",
    f"{NAME}. 1 IN SRV 1 2 443 {NAME}.",
    f"{NAME}. 1 IN SOA ns.{NAME}. admin.{NAME}. 1 2 3 4 4294967295",
    f'{NAME}. 1 IN TXT "one" "a \\"quoted\\" text" "\\000\\255" ""',
)


def test_records_are_what_dnspython_says() -> None:
    query = asked(kind="ANY")
    found = read(query, answered(query, *RECORDS))
    assert found.malformed == ""
    shown = [(a.name, a.ttl, a.type, as_absolute(a.type, a.data)) for a in found.answers]
    expected = []
    for record in RECORDS:
        name, ttl, klass, kind, data = record.split(" ", 4)
        (parsed,) = dns.rrset.from_text(name, int(ttl), klass, kind, data)
        expected.append((name.rstrip("."), int(ttl), kind, parsed.to_text()))
    assert shown == expected


def as_absolute(kind: str, data: str) -> str:
    """With the dots at the end of names, as dnspython has them."""
    if kind == "SOA":
        primary, mailbox, numbers = data.split(" ", 2)
        return f"{primary}. {mailbox}. {numbers}"
    return f"{data}." if kind in ("NS", "DNAME", "PTR", "MX", "SRV", "CNAME") else data


def test_other_types_are_told_in_bytes() -> None:
    query = asked(kind="HTTPS")
    found = read(query, answered(query, f"{NAME}. 1 IN HTTPS 1 . alpn=h2"))
    assert [(a.type, a.data) for a in found.answers] == [("HTTPS", r"\# 10 00010000010003026832")]
    assert found.query_type == "HTTPS"


@given(st.data())
@settings(max_examples=300, deadline=None)
def test_where_dnspython_reads_a_message_so_does_this(data: st.DataObject) -> None:
    """A message with a few bytes changed: names, types, times and codes are the same."""
    query = asked(kind="ANY", use_edns=0)
    wire = bytearray(answered(query, *RECORDS[:7]).to_wire())
    for _ in range(data.draw(st.integers(1, 3))):
        wire[data.draw(st.integers(0, len(wire) - 1))] = data.draw(st.integers(0, 255))
    try:
        theirs = dns.message.from_wire(bytes(wire), one_rr_per_rrset=True, ignore_trailing=True)
    except (dns.exception.DNSException, ValueError):
        parse(packed(beginning(query), bytes(wire)), False)
        return
    ours = parse(packed(b"", bytes(wire)), False)
    if ours.malformed:  # it may be stricter: what is in a record that is left out is not looked at
        return
    # Of times beyond 2^31 it makes 0 (RFC 2181), and here they are told as they are.
    assert [(a.name, a.ttl if a.ttl < 1 << 31 else 0) for a in ours.answers] == [
        (rrset.name.to_text(omit_final_dot=True), rrset.ttl) for rrset in theirs.answer
    ]
    if theirs.question:
        name = theirs.question[0].name.to_text(omit_final_dot=True)
        assert (ours.query or ".") == name


# ------------------------------------------------------------------ whatever there is

FUZZED = 100_000


def test_a_hundred_thousand_messages_that_are_none() -> None:
    """Random bytes, and a message with bytes changed, cut and repeated: fields each time.

    What comes out of it fits the schema, so that it can be published, and is printable ASCII.
    """
    generator = random.Random(20)
    query = asked(kind="ANY", use_edns=0)
    whole = answered(query, *RECORDS).to_wire()
    mistakes = set()
    for number in range(FUZZED):
        message = _odd(generator, whole)
        found = parse(packed(beginning(query), message), bool(number & 1))
        mistakes.add(found.malformed)
        assert len(found.answers) <= MOST_ANSWERS
        assert found.answers_left_out >= 0
        if number % 50 == 0:
            event = msgspec.convert(_event(found), NetDns)
            assert msgspec.json.encode(event).isascii()
    assert {
        "",
        "it ends too early",
        "a pointer that does not lead back",
        "a label of an unknown type",
        "it answers another question",
    } <= mistakes


def _odd(generator: random.Random, whole: bytes) -> bytes:
    way = generator.randrange(4)
    if way == 0:
        return generator.randbytes(generator.randrange(200))
    message = bytearray(whole)
    for _ in range(generator.randrange(1, 8)):
        message[generator.randrange(len(message))] = generator.choice((0, 0xC0, 0xFF, 0x3F, 12))
    if way == 1:
        return bytes(message[: generator.randrange(len(message))])
    if way == 2:
        return bytes(message) * generator.randrange(1, 5)
    return bytes(message)


def _event(found: DnsMessage) -> dict[str, Any]:
    """An event with these parts, and nothing but zeros besides."""
    zeros: dict[str, Any] = {
        name: "127.0.0.1" if name.endswith("_addr") else 0 for name in NetDns.__struct_fields__
    }
    zeros |= {"schema": 1, "weight": 1, "seq": 1, "ip_version": 4, "ring": "bulk"}
    zeros |= {
        "state": "answered",
        "transport": "udp",
        "host": "",
        "boot_id": "",
        "id": "",
        "comm": "",
        "truncated": (),
    }
    zeros |= {"incomplete": False, "invalid_utf8": False, "owner_known": True}
    zeros.pop("time")
    zeros.pop("replayed")
    parts = {**found._asdict(), "answers": [msgspec.to_builtins(a) for a in found.answers]}
    return {"event": "net.dns", **zeros, **parts}


def test_what_costs_most_is_bounded() -> None:
    """Many names of a thousand pointers each, of which each leads to the one before."""
    head = struct.pack("!6H", 1, 0x8180, 0, 200, 0, 0)
    message = head + b"\0" + struct.pack("!HHIH", 10, 1, 1, 2002) + b"\0\0"
    start = len(message) - 2
    message += b"".join(struct.pack("!H", 0xC000 | start + 2 * i) for i in range(1000))
    last = struct.pack("!H", 0xC000 | len(message) - 2)
    message += (last + struct.pack("!HHIH", 1, 1, 1, 4) + b"\1\2\3\4") * 100
    found = parse(packed(beginning(asked()), message), False)
    # Of each 2 KB are read. So many answers that do not come are a mistake of the message too, but
    # what is not looked at is not judged.
    assert (len(found.answers), found.answers_left_out, found.malformed) == (5, 195, "")


def test_a_short_message_does_not_become_a_long_text() -> None:
    """Answers of 14 bytes, each with twice the longest name, of bytes that are told as four."""
    head = struct.pack("!6H", 1, 0x8180, 1, MOST_ANSWERS, 0, 0)
    name = b"".join(bytes([size]) + b"\xff" * size for size in (63, 63, 63, 61)) + b"\0"
    pointer = struct.pack("!H", 0xC000 | len(head))
    cname = pointer + struct.pack("!HHIH", 5, 1, 1, 2) + pointer
    question = head + name + struct.pack("!HH", 5, 1)
    found = parse(packed(question, question + cname * MOST_ANSWERS), False)
    text = len(found.query) + sum(len(one.name) + len(one.data) for one in found.answers)
    assert (len(found.answers), found.answers_left_out) == (15, MOST_ANSWERS - 15)
    assert found.malformed == ""
    assert text == 31 * (4 * 250 + 3)
