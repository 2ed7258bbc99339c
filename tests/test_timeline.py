"""Every position belongs to one thing: pinned, a block, or the open segment."""

import pytest

from zoomr_local.timeline import Timeline


def line(n):
    t = Timeline()
    t.tokens.extend(range(n))
    return t


def test_blocks_tile_what_is_not_pinned():
    t = line(30)
    t.pin(0, 5)
    thought = t.close("thought", (5, 12), (12, 15))
    assert (thought.number, thought.detail_tokens, thought.summary_tokens, thought.stop) == (0, 7, 3, 15)
    assert t.open_start == 15 and t.open_tokens == 15
    assert t.close("thought", (15, 30)).summary is None and t.open_tokens == 0


def test_a_pin_behind_blocks_moves_the_open_segment():
    t = line(30)
    t.pin(0, 4)
    t.close("prompt", (4, 20))
    t.pin(20, 30)
    assert t.pinned == [(0, 4), (20, 30)] and t.pinned_tokens == 14 and t.open_tokens == 0


@pytest.mark.parametrize("detail, summary", [((3, 9), None), ((0, 9), (10, 12)), ((0, 99), None), ((0, 0), (0, 4))])
def test_a_block_that_does_not_join_up_is_refused(detail, summary):
    with pytest.raises(ValueError):
        line(20).close("thought", detail, summary)


def test_columns_grow_with_the_blocks():
    t = line(300)
    for i in range(100):
        t.close("thought", (3 * i, 3 * i + 2), (3 * i + 2, 3 * i + 3))
    assert t.detail_tokens.tolist() == [2] * 100 and t.summary_tokens.tolist() == [1] * 100
