"""What counts as the answer of a reply, and what counts as the same answer."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zoomr_local.grading import Grade, equivalent, extract_answer, grade, number, wilson_interval


@pytest.mark.parametrize(
    ("content", "answer"),
    [
        (r"So \boxed{42}.", "42"),
        (r"\boxed{1} no, \boxed{\frac{3}{4}}", r"\frac{3}{4}"),
        (r"\boxed{ \text{for } \{1, 2\} }", r"\text{for } \{1, 2\}"),
        (r"The answer is 7. I checked \boxed{8", "7"),
        ("The answer is 12.", "12"),
        ("The answer is 3.14. It is not 3.", "3.14"),
        ("First I thought the answer is 3.\nThe final answer is 4", "4"),
        ("**Answer:** 42", "42"),
        ("**Final answer: 42**", "42"),
        ("She pays 3 and 4.\n#### 7", "7"),
        ("It costs $1,234.50 in all", "$1,234.50"),
        ("between 3 and 5", "5"),
        ("a\nParis\n\n", "Paris"),
        ("", ""),
    ],
)
def test_the_last_stated_answer_is_found(content, answer):
    assert extract_answer(content) == answer


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("42", "42.0"),
        ("1,234", "1234"),
        ("1/2", "0.5"),
        (r"\frac{1}{2}", "0.5"),
        (r"-\dfrac{1}{2}", "-0.5"),
        ("50%", "0.5"),
        ("50%", "50"),
        ("50", "50%"),
        (r"50\%", "0.50"),
        ("$5", "5"),
        (r"\$5", "5"),
        ("1e3", "1000"),
        ("\u22127", "-7"),
        ("42 apples", "42"),
        (r"42 \text{ cm}", "42"),
        ("12.", "12"),
        ("Paris", " paris."),
        ("`x + 1`", "x + 1"),
    ],
)
def test_two_spellings_of_one_answer_are_equal(answer, expected):
    assert equivalent(answer, expected)


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("42", "43"),
        ("0.333", "1/3"),
        ("12 or 13", "12"),
        ("12 or 13", "13"),
        ("1,23", "123"),
        ("", "0"),
        ("Paris", "London"),
        ("1/0", "0"),
        ("5", "0.05"),
    ],
)
def test_different_answers_are_different(answer, expected):
    assert not equivalent(answer, expected)


def test_a_reply_equal_to_the_reference_is_right_even_if_it_holds_a_number():
    assert grade("Flight 90", "flight 90") == Grade("Flight 90", True)


def test_without_a_reference_nothing_is_right_or_wrong():
    assert grade("The answer is 5.", None) == Grade("5", None)


def test_an_empty_reply_is_wrong():
    assert grade("", "5") == Grade("", False)


def test_absurdly_long_numbers_are_not_numbers():
    assert number("1e999999999") is None
    assert number("9" * 5000) is None


@given(st.fractions(max_denominator=10**6).filter(lambda f: abs(f) < 10**9))
def test_every_fraction_reads_back(value):
    assert number(f"{value.numerator}/{value.denominator}") == value
    assert equivalent(f"The answer is {value.numerator}", str(value.numerator))


@given(st.integers(-(10**12), 10**12))
def test_integers_read_back_with_and_without_commas(value):
    assert number(str(value)) == number(f"{value:,}") == Fraction(value)
    assert grade(f"The answer is {value:,}.", str(value)).correct


@given(st.text(max_size=200), st.text(max_size=40))
def test_no_text_breaks_the_grader(content, expected):
    grade(content, expected)


def test_wilson_interval_of_known_cases():
    low, high = wilson_interval(8, 10)
    assert (round(low, 3), round(high, 3)) == (0.490, 0.943)
    assert wilson_interval(0, 0) == (0.0, 1.0)
    assert wilson_interval(12, 12)[1] == pytest.approx(1.0)
    assert 0.75 < wilson_interval(12, 12)[0] < 0.76
