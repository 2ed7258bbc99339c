"""Sizes are read as people write them, and nothing that is not a size passes for one."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zoomr_local.errors import UsageError
from zoomr_local.sizes import format_bytes, parse_bytes


@pytest.mark.parametrize("text, n_bytes", [
    ("0", 0), ("1073741824", 2**30), ("1GiB", 2**30), ("1gib", 2**30), ("1 GiB", 2**30), ("64MiB", 64 * 2**20),
    ("500MB", 500 * 10**6), ("1.5g", 3 * 2**29), ("8G", 2**33), ("2k", 2048), ("2kb", 2000), ("100B", 100), ("1.5KiB", 1536),
])  # fmt: skip
def test_sizes_are_read(text, n_bytes):
    assert parse_bytes(text) == n_bytes


@pytest.mark.parametrize("text", ["", "x", "-1", "1.5", "GiB", "1 GiB 2", "1e9", "8XB", "9999999TiB", "1,5GiB", "inf", "nan"])
def test_what_is_not_a_size_is_refused_with_the_flag(text):
    with pytest.raises(UsageError, match=r"--kv-ram .*give|--kv-ram .*for example"):
        parse_bytes(text, "--kv-ram")


@pytest.mark.parametrize("text", ["9" * 400, "9" * 5000, "9" * 5000 + ".5g", "9" * 5000 + "TiB", "1" + "x" * 5000])
def test_sizes_of_thousands_of_digits_are_refused_on_one_short_line(text):
    with pytest.raises(UsageError, match=r"^--memory [19][9x]{56}\.\.\.: (that is more|give a size)"):
        parse_bytes(text, "--memory")


def test_zeros_in_front_and_the_largest_size_are_read_exactly():
    assert parse_bytes("0" * 5000 + "1k") == 1024 and parse_bytes("000") == parse_bytes("0.0k") == 0
    assert parse_bytes(str(2**62 - 1)) == 2**62 - 1


@pytest.mark.parametrize("n_bytes, text", [
    (0, "0 B"), (1, "1 B"), (1023, "1023 B"), (1024, "1 KiB"), (1536, "1.5 KiB"), (2**30, "1 GiB"),
    (2**20 - 1, "1 MiB"), (64 * 2**20, "64 MiB"), (int(1.25 * 2**30), "1.25 GiB"), (5000 * 2**40, "5000 TiB"),
])  # fmt: skip
def test_sizes_are_written(n_bytes, text):
    assert format_bytes(n_bytes) == text


@given(st.integers(0, 2**55))
def test_what_is_written_is_read_again_within_its_digits(n_bytes):
    again = parse_bytes(format_bytes(n_bytes))
    assert abs(again - n_bytes) <= 0.006 * n_bytes
