"""Numbers as people read them."""

import math

import pytest

from lowbit.report.units import decibel, decibel_text, duration, number, quantity, significant, size, with_error


def plain(text):
    return text.replace("\u00a0", " ").replace("\u2212", "-")


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (10**6 - 1, "1.0 MB"), (113_157_120, "113.2 MB"),
     (10**9, "1.0 GB"), (3 * 10**15, "3,000.0 TB")],
)  # fmt: skip
def test_sizes_are_decimal(count, text):
    assert plain(size(count)) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0.0 s"), (0.84, "0.8 s"), (9.97, "10 s"), (59.7, "1 min 00 s"), (192, "3 min 12 s"), (18420, "5 h 07 min")],
)
def test_durations_carry(seconds, text):
    assert plain(duration(seconds)) == text


@pytest.mark.parametrize(
    ("value", "error", "text"),
    [(0.047134, 0.000512, ("0.04713", "0.00051")), (1.03787, 0.00142, ("1.0379", "0.0014")), (22.9, 0, ("22.90", None)),
     (22.9, None, ("22.90", None)), (0, None, ("0", None)), (12.3, 24.1, ("12", "24"))],
)  # fmt: skip
def test_a_value_is_cut_where_its_error_begins(value, error, text):
    assert with_error(value, error) == text


def test_decibels_are_ten_per_decade():
    assert decibel(0.01) == -20
    assert decibel(0) == -math.inf
    assert plain(decibel_text(0.01)) == "-20.0"
    assert decibel_text(0) == "exact"


def test_small_numbers_keep_their_significant_digits():
    assert significant(0.0123456) == "0.0123"
    assert plain(significant(0.0000123)) == "1.23e-5"
    assert significant(1234.5) == "1,234"
    assert plain(number(-3.5, 1)) == "-3.5"


@pytest.mark.parametrize(
    ("count", "text"), [(9_999, "9,999"), (49_152, "49.2 K"), (134_515_008, "134.5 M"), (7 * 10**9, "7.0 B")]
)
def test_quantities_are_short(count, text):
    assert plain(quantity(count)) == text
