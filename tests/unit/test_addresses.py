"""No address of the kernel is in what it wrote for us, nor in what is published of it."""

from __future__ import annotations

import pytest

from tests.addresses import in_lines, in_record, in_text, in_value
from tests.golden.cases import Case, load

TEXT = 0xFFFFFFFF81000000
DIRECT = 0xFF11000100000040


@pytest.mark.parametrize("address", [TEXT, DIRECT, 0xFFFF888000001000, 0xFFFF000012345678])
def test_an_address_would_be_found(address: int) -> None:
    assert list(in_value({"a": [{"b": address}]}))
    assert list(in_value({"a": address - (1 << 64)}))
    assert in_lines(b'{"a":"at %x"}' % address, "ff00112233445566")
    assert not in_lines(b'{"a":"ff00112233445566-1"}', "ff00112233445566")
    assert in_text(f"symbol at 0x{address:x} of it")
    assert in_record(bytes(8) + address.to_bytes(8, "little"))


@pytest.mark.parametrize("other", [-1, -4095, 4294967295, 1795366046847217390, 0x7FFF12345678])
def test_what_is_none_is_not_taken_for_one(other: int) -> None:
    assert not list(in_value({"a": other}))
    assert not in_text(str(other))


@pytest.mark.parametrize("case", load(), ids=lambda case: str(case.event["event"]))
def test_golden_records_have_none(case: Case) -> None:
    """Nor the bytes that are not published: nothing of the kernel's memory is left there."""
    assert not list(in_value(case.event))
    assert not in_record(case.record)
