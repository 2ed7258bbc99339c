"""Sampling numbers are checked before anything runs; stop strings are found across token borders."""

import pytest

from zoomr_local.errors import UsageError
from zoomr_local.sampling import SamplingParams, StopScanner


@pytest.mark.parametrize("bad", [dict(temperature=-1), dict(top_p=0), dict(top_p=1.1), dict(min_p=1), dict(top_k=-1),
                                 dict(repeat_penalty=0), dict(seed=-1), dict(stop=("",)), dict(temperature=float("inf")),
                                 dict(temperature=float("nan")), dict(repeat_penalty=float("inf"))])
def test_a_value_out_of_range_names_its_flag(bad):
    with pytest.raises(UsageError, match="--"):
        SamplingParams(**bad)


def scan(stop, pieces):
    scanner, shown = StopScanner(stop), ""
    for piece in pieces:
        text, met = scanner.feed(piece)
        shown += text
        if met:
            return shown, True
    return shown + scanner.flush(), False


def test_stop_string_over_two_pieces_is_cut_off():
    assert scan(("END",), ["one E", "ND two"]) == ("one ", True)


def test_text_that_only_began_like_a_stop_string_is_shown_at_last():
    assert scan(("END",), ["one E", "N"]) == ("one EN", False)


def test_the_earliest_stop_string_wins():
    assert scan(("b", "ab"), ["xab"]) == ("x", True)


def test_what_is_compared_knows_no_grammar_and_a_held_answer_no_stop_strings():
    assert "grammar" not in SamplingParams().asked() and SamplingParams(seed=3).asked()["seed"] == 3
    with pytest.raises(UsageError, match="could cut"):
        SamplingParams(stop=("x",), grammar="root ::= [a]")
