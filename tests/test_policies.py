"""Policies are pure: literal arrays in, literal selections out; and the fast vote equals the obvious one."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as settings_of_tests
from hypothesis import strategies as st

from zoomr_local.engine import Engine, EngineConfig
from zoomr_local.policies import POLICIES, BlockView, Settings, TokenView
from zoomr_local.policies.zoomr import head_votes, shared_votes
from zoomr_local.sampling import SamplingParams


def view(free, details, summaries=None, votes=None, lifetime=None, used=None):
    n = len(details)
    return BlockView(
        free,
        np.array(details, np.int32),
        np.array(summaries or [0] * n, np.int32),
        np.array(votes or [0] * n, np.float32),
        np.array(lifetime or [0] * n, float),
        np.array(used or range(n), np.int64),
    )


def slow_votes(scores, row_block, n_blocks, k):
    """The obvious way: head by head, best row per block, sort, take k."""
    votes = [0] * n_blocks
    for layer in scores:
        for head in layer:
            best = {}
            for row, block in enumerate(row_block):
                best[block] = max(best.get(block, -np.inf), head[row])
            for block in sorted(best, key=lambda b: -best[b])[:k]:
                votes[block] += 1
    return votes


@pytest.mark.parametrize("k", [1, 2, 5])
@pytest.mark.parametrize("rows", [[0, 1, 2, 3], [0, 0, 1, 3, 3, 3], [2]])
def test_votes_equal_the_obvious_count(rows, k):
    scores = np.random.default_rng(k).standard_normal((3, 4, len(rows)), np.float32)
    assert head_votes(scores, np.array(rows), 5, k).tolist() == slow_votes(scores, rows, 5, k)


@pytest.mark.parametrize("rows", [[0, 1, 2, 3], [0, 0, 1, 3, 3, 3], [2]])
def test_shared_votes_equal_the_obvious_softmax(rows):
    scores = 40 * np.random.default_rng(3).standard_normal((3, 4, len(rows)), np.float32)
    votes = [0.0] * 5
    for head in scores.reshape(-1, len(rows)).astype(float):
        total = sum(np.exp(head - head.max()))
        for row, score in zip(rows, head, strict=True):
            votes[row] += np.exp(score - head.max()) / total
    assert shared_votes(scores, np.array(rows), 5) == pytest.approx(votes, abs=1e-4)
    assert shared_votes(scores[..., :0], np.zeros(0, int), 3).tolist() == [0, 0, 0]


def test_votes_of_an_empty_index_are_zero():
    assert head_votes(np.zeros((2, 2, 0), np.float32), np.zeros(0, int), 3, 2).tolist() == [0, 0, 0]


def test_voting_leaves_the_scores_as_they_were():
    scores = np.ones((1, 2, 3), np.float32)
    head_votes(scores, np.arange(3), 3, 2)
    assert (scores == 1).all()


def zoomr(**settings):
    return POLICIES["zoomr"](Settings(**{"window_tokens": 0, "summary_tokens": 0, **settings}))


def test_zoomr_keeps_the_blocks_with_most_votes():
    s = zoomr(zoomed_blocks=2).select(view(20, [10, 10, 10, 10], votes=[1, 9, 0, 5]))
    assert s.zoomed == (1, 3) and s.details.tolist() == [False, True, False, True]
    assert s.agreement == pytest.approx(14 / 15)


def test_zoomr_never_zooms_a_block_without_votes():
    assert zoomr(zoomed_blocks=3).select(view(10, [10, 10], votes=[0, 0])).zoomed == ()


def test_zoomr_passes_over_a_block_that_does_not_fit():
    assert zoomr().select(view(12, [50, 10], votes=[9, 1])).zoomed == (1,)


def test_window_blocks_stay_and_use_no_zoom_place():
    s = zoomr(zoomed_blocks=1, window_tokens=10).select(view(20, [10, 10, 10], votes=[1, 2, 9]))
    assert s.zoomed == (1,) and s.details.tolist() == [False, True, True]


def test_the_window_gives_way_to_thoughts_that_were_asked_for():
    s = zoomr(zoomed_blocks=2, window_tokens=20).select(view(45, [10] * 6, votes=[1, 2, 0, 0, 0, 0]))
    assert s.zoomed == (0, 1) and s.details.tolist() == [True, True, False, False, True, True]
    s = zoomr(zoomed_blocks=2, window_tokens=20).select(view(35, [10] * 6, votes=[1, 2, 0, 0, 0, 0]))
    assert s.zoomed == (0, 1) and s.details.tolist() == [True, True, False, False, False, True]
    s = zoomr(zoomed_blocks=2, window_tokens=20).select(view(15, [10] * 6, votes=[1, 0, 0, 0, 0, 2]))
    assert s.zoomed == (5,), "a block that is in the window no more can be zoomed"


def test_the_newest_summaries_stay_however_few_votes_they_have():
    """The next thought goes on from the newest summary; votes are of the past."""
    s = zoomr(summary_tokens=8).select(view(8, [90] * 6, [2] * 6, lifetime=[9, 8, 7, 6, 0, 0]))
    assert s.summaries.tolist() == [True, True, False, False, True, True]


def test_in_a_small_budget_summaries_leave_room_for_the_thoughts_asked_for():
    details, summaries, votes = [60] * 10, [9] * 10, [0, 5, 0, 0, 5, 0, 0, 0, 0, 0]
    s = zoomr(summary_tokens=90).select(view(180, details, summaries, votes))
    assert s.zoomed == (1, 4) and s.summaries.sum() == 6
    s = zoomr(summary_tokens=90).select(view(100, details, summaries, votes))
    assert s.zoomed == (1,) and s.summaries.sum() == 4, "one thought fits beside an eighth for the summaries"
    s = zoomr(summary_tokens=90).select(view(65, details, summaries, votes))
    assert s.zoomed == () and s.summaries.sum() == 7, "none would: the summaries give nothing up"


def test_the_summaries_of_the_window_stay_past_a_block_that_is_lost():
    v = view(24, [10, 10, 10, 10], [2] * 4, lifetime=[9, 8, 0, 0])
    v.available[3] = False
    s = zoomr(window_tokens=10, summary_tokens=4).select(v)
    assert s.details[2] and s.summaries.tolist() == [False, False, True, True]


def test_least_voted_summaries_leave_first():
    s = zoomr(summary_tokens=4).select(view(4, [90, 90, 90], [2, 2, 2], lifetime=[5, 0, 1]))
    assert s.summaries.tolist() == [True, False, True]


def test_spare_room_keeps_the_blocks_used_last():
    assert zoomr().select(view(10, [10, 10, 10], used=[3, 7, 5])).details.tolist() == [False, True, False]


def test_everything_stays_when_everything_fits():
    s = zoomr(summary_tokens=9).select(view(99, [10, 20], [3, 3]))
    assert s.details.all() and s.summaries.all()


@pytest.mark.parametrize("name", ["zoomr", "sumr"])
def test_no_selection_exceeds_the_room(name):
    rng = np.random.default_rng(1)
    for _ in range(300):
        n = int(rng.integers(0, 12))
        v = view(
            int(rng.integers(-5, 200)), rng.integers(1, 90, n).tolist(), rng.integers(0, 20, n).tolist(),
            rng.integers(0, 9, n).tolist(), rng.integers(0, 99, n).tolist(), rng.integers(0, 999, n).tolist(),
        )
        s = POLICIES[name](Settings(window_tokens=64, summary_tokens=40)).select(v)
        kept = int(v.detail_tokens[s.details].sum() + v.summary_tokens[s.summaries].sum())
        assert kept <= max(0, v.free_tokens)
        assert all(s.details[b] for b in s.zoomed)


@st.composite
def rooms(draw):
    """Settings and a view in which any of room, window, summaries and votes may be tiny, empty or more than everything."""
    n = draw(st.integers(0, 10))
    many = lambda least, most: draw(st.lists(st.integers(least, most), min_size=n, max_size=n))  # noqa: E731
    settings = Settings(
        window_tokens=draw(st.integers(0, 60)), summary_tokens=draw(st.integers(0, 60)), zoomed_blocks=draw(st.integers(0, 4)),
    )  # fmt: skip
    seen = BlockView(
        draw(st.integers(-3, 120)), np.array(many(1, 40), np.int32), np.array(many(0, 12), np.int32),
        np.array(many(0, 3), np.float32), np.array(many(0, 9), float), np.array(many(0, 99), np.int64),
        np.array(draw(st.lists(st.booleans(), min_size=n, max_size=n)), bool),
    )  # fmt: skip
    return settings, seen


@settings_of_tests(deadline=None, max_examples=400)
@given(rooms())
@pytest.mark.parametrize("name", ["zoomr", "sumr"])
def test_whatever_the_room_a_selection_fits_and_takes_only_what_is_there(name, asked):
    settings, seen = asked
    before = [array.copy() for array in (seen.detail_tokens, seen.summary_tokens, seen.votes, seen.lifetime_votes, seen.last_used, seen.available)]
    s = POLICIES[name](settings).select(seen)
    assert int(seen.detail_tokens[s.details].sum() + seen.summary_tokens[s.summaries].sum()) <= max(0, seen.free_tokens)
    assert not (s.details & ~seen.available).any()
    assert len(s.zoomed) == len(set(s.zoomed)) <= settings.zoomed_blocks and list(s.zoomed) == sorted(s.zoomed)
    assert all(s.details[b] and seen.votes[b] > 0 for b in s.zoomed)
    assert s.agreement is None or 0 <= s.agreement <= 1
    assert int(seen.summary_tokens[s.summaries].sum()) <= settings.summary_tokens
    after = (seen.detail_tokens, seen.summary_tokens, seen.votes, seen.lifetime_votes, seen.last_used, seen.available)
    assert all((a == b).all() for a, b in zip(before, after, strict=True)), "a policy changes nothing that it sees"


def test_sumr_keeps_summaries_before_thoughts():
    s = POLICIES["sumr"](Settings(window_tokens=0)).select(view(16, [10, 10], [3, 3]))
    assert s.summaries.all() and s.details.tolist() == [False, True]


@settings_of_tests(deadline=None, max_examples=200)
@given(rooms())
def test_sumr_is_zoomr_where_no_head_votes(asked):
    """The ablation differs in the zooming alone: same share of summaries, same window, and no vote ever counts."""
    settings, seen = asked
    n = len(seen.detail_tokens)
    unasked = replace(seen, votes=np.zeros(n, np.float32), lifetime_votes=np.zeros(n), last_used=np.arange(n))
    got, want = POLICIES["sumr"](settings).select(seen), POLICIES["zoomr"](settings).select(unasked)
    assert got.details.tolist() == want.details.tolist() and got.summaries.tolist() == want.summaries.tolist()
    assert got.zoomed == () and got.agreement is None


def test_votes_for_the_window_have_no_part_in_the_agreement():
    """A block held otherwise has none either; and where heads ask for what is not zoomed, the agreement is 0, not missing."""
    window = zoomr(window_tokens=10, zoomed_blocks=1).select(view(40, [10, 10, 10], votes=[3, 1, 6]))
    assert window.zoomed == (0,) and window.agreement == pytest.approx(3 / 4)
    assert zoomr(zoomed_blocks=0).select(view(40, [10, 10], votes=[3, 1])).agreement == 0.0


def test_recency_keeps_the_newest():
    assert POLICIES["recency"]().select(TokenView(np.arange(5, dtype=np.int32), 2)).tolist() == [0, 0, 0, 1, 1]


def test_random_is_a_uniform_sample_of_all_that_was_seen():
    """Tokens arrive one by one; after the last, every old position survived equally often over many seeds."""
    survived = np.zeros(296)
    for seed in range(400):
        policy, held = POLICIES["random"](Settings(seed=seed)), np.zeros(0, np.int32)
        for position in range(296):
            held = np.append(held, np.int32(position))
            if len(held) > 164:
                held = held[policy.select(TokenView(held, 164))]
        survived[held] += 1
    old = survived[: 296 - policy.recent_tokens] / 400
    expected = (164 - policy.recent_tokens) / (296 - policy.recent_tokens)
    assert abs(old[:84].mean() - expected) < 0.02 and abs(old[84:].mean() - expected) < 0.02
    assert (survived[-policy.recent_tokens:] == 400).all()


def test_random_draws_others_of_every_text():
    """Of 300 tokens 100 stay beside the newest: as many are common to two texts as chance has it, a third."""
    policy = POLICIES["random"]()
    old = 300
    view = lambda text: TokenView(np.arange(old + policy.recent_tokens, dtype=np.int32), 100 + policy.recent_tokens, text)  # noqa: E731
    kept = [set(np.flatnonzero(policy.select(view(text))[:old])) for text in (1, 2, 2**32 - 1)]
    assert policy.select(view(1)).tolist() == policy.select(view(1)).tolist()
    for a, b in ((0, 1), (0, 2), (1, 2)):
        assert len(kept[a]) == len(kept[b]) == 100 and 18 <= len(kept[a] & kept[b]) <= 50


def test_every_policy_has_a_name_and_a_headline():
    assert list(POLICIES) == [p.name for p in POLICIES.values()] and all(p.headline for p in POLICIES.values())


def test_the_engine_says_which_text_it_is(model, prompt, monkeypatch):
    """One number while a text is written, and another for another text."""
    seen, select = [], POLICIES["random"].select
    monkeypatch.setattr(POLICIES["random"], "select", lambda policy, view: (seen.append(view.text), select(policy, view))[1])
    texts = []
    for begins in (prompt, [prompt[0], *prompt[2:]]):
        engine = Engine(model, EngineConfig(policy="random", kv_budget=192))
        list(engine.generate(begins, SamplingParams(), 30))
        engine.close()
        texts.append(set(seen))
        seen.clear()
    assert [len(found) for found in texts] == [1, 1] and texts[0] != texts[1]
