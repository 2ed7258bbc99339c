"""The engine's rules, over scripted texts: the budget is hard, nothing is lost, and what was cut is said.

The context is a stand-in that keeps books and refuses what llama.cpp would refuse (see scripted.py); the same
rules run against the real library in test_engine.py.
"""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scripted import EOS, SPECIAL, STOP, WORD, BookContext, ScriptedModel, ScriptedSampler

from zoomr_local import generation
from zoomr_local.block_generation import BlockGeneration
from zoomr_local.errors import BudgetError
from zoomr_local.events import BlockClosed, Finished, PagedIn, PagedOut, Refreshed, Split, TokenDecoded, Warned
from zoomr_local.generation import TokenGeneration
from zoomr_local.policies import POLICIES, Settings
from zoomr_local.sampling import SamplingParams
from zoomr_local.tiers import RamTier

THINK, UNTHINK, OPEN, CLOSE = SPECIAL.values()


def run(policy, budget, prompt, script, max_tokens=None, **chosen):
    """Play a script through a generation; returns (generation, context, events)."""
    s = Settings(**{"summary_tokens": budget // 4, "window_tokens": budget // 4, "refresh_tokens": 3, **chosen})
    context = BookContext(budget)
    kind = BlockGeneration if POLICIES[policy].unit == "block" else TokenGeneration
    g = kind(ScriptedModel(), context, RamTier(), POLICIES[policy](s), budget, 64)
    ScriptedSampler.script = script
    original, generation.LlamaSampler = generation.LlamaSampler, ScriptedSampler
    try:
        events = list(g.run([*prompt, THINK], SamplingParams(), max_tokens or len(script) + 1))
    finally:
        generation.LlamaSampler = original
    return g, context, events


def words(n, every=9):
    return [STOP if i % every == every - 1 else WORD + 2 + i % 50 for i in range(n)]


def thoughts(*lengths, summary=5):
    return [t for n in lengths for t in (*words(n), OPEN, *words(summary), CLOSE)]


def of(kind, events):
    return [e for e in events if isinstance(e, kind)]


pieces = st.lists(st.tuples(st.integers(0, 400), st.integers(0, 120)), min_size=1, max_size=8)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(["zoomr", "sumr", "recency", "random", "streaming"]), st.integers(128, 400),
       st.integers(1, 900), pieces, st.integers(0, 300), st.integers(1, 40))
def test_no_length_of_prompt_thought_or_summary_exceeds_the_budget(policy, budget, prompt, parts, answer, every):
    script = [t for n, m in parts for t in (*words(n, every), OPEN, *words(m, every), CLOSE)]
    script += [UNTHINK, *words(answer, every)]
    g, context, events = run(policy, budget, words(prompt), script)
    done = events[-1]
    assert isinstance(done, Finished) and done.reason == "stop"
    assert context.peak <= budget and done.cache.resident_peak_tokens == context.peak
    assert context.decoded == [*words(prompt), THINK, *script], "every token was decoded, in order, once"
    assert len(context.cells) == g.cache.resident_tokens
    if policy in ("zoomr", "sumr"):
        assert_nothing_is_lost(g, context)
    else:
        assert len(context.cells) + done.cache.dropped_tokens == len(context.decoded)


def assert_nothing_is_lost(g, context):
    """Each position is in a cell or, whole with its block, in a page of the right bytes."""
    for block in g.timeline.blocks:
        for part in ("detail", "summary"):
            span = getattr(block, part)
            if span and not g.cache.resident(part)[block.number]:
                page = g.cache.pages[block.number, part]
                assert sorted(set(page.data.view(np.int64).tolist())) == list(range(*span)) and page.intact()
            elif span:
                assert set(range(*span)) <= context.cells
    parts = [g.cache.resident(part).all() for part in ("detail", "summary")]
    assert g.cache.everything_resident == all(parts)
    covered = sum(b.detail_tokens + b.summary_tokens for b in g.timeline.blocks)
    assert covered + g.timeline.pinned_tokens + g.timeline.open_tokens == len(g.timeline)
    for start, stop in g.timeline.pinned:
        assert set(range(start, stop)) <= context.cells


def test_a_budget_longer_than_the_text_pages_nothing():
    g, _, events = run("zoomr", 400, words(20), thoughts(40, 40, 40))
    assert len(g.timeline.blocks) == 3 and not of(PagedOut, events)


def test_a_thought_stays_until_its_own_summary_is_closed():
    """The summary's keys are computed with the thought in view: no page-out may touch the open segment."""
    g, _, events = run("zoomr", 160, words(20), thoughts(60, 60, 60, 60))
    closed = {}
    for event in events:
        if isinstance(event, BlockClosed):
            closed[event.block] = event
        if isinstance(event, PagedOut):
            assert set(event.blocks) <= set(closed)


def test_an_over_long_thought_is_cut_at_a_sentence_end_and_said():
    g, _, events = run("zoomr", 200, words(10), words(500))
    assert of(Split, events) and all(e.what == "thought" for e in of(Split, events))
    for block in g.timeline.blocks:
        assert g.timeline.tokens[block.stop - 1] == STOP and block.summary is None


def test_a_thought_without_sentence_ends_is_cut_at_its_limit():
    g, _, _ = run("zoomr", 200, words(10), [WORD + 5] * 500)
    assert {b.detail_tokens for b in g.timeline.blocks} == {g.thought_limit}


def test_an_over_long_summary_is_closed_and_its_rest_becomes_a_block():
    g, _, events = run("zoomr", 200, words(10), thoughts(30, summary=150))
    assert [e.what for e in of(Split, events)][0] == "summary"
    assert g.timeline.blocks[0].summary_tokens == g.summary_limit and g.timeline.blocks[-1].kind == "summary"


def test_an_over_long_prompt_becomes_blocks_between_its_head_and_the_question():
    g, context, events = run("zoomr", 256, words(600), words(20))
    assert of(Split, events)[0].what == "prompt"
    assert [b.kind for b in g.timeline.blocks] == ["prompt"] * len(g.timeline.blocks)
    (head, tail) = [(0, 32), (601 - 64, 601)]
    assert g.timeline.pinned == [head, tail]


def test_a_stored_block_is_never_written_again():
    g, _, events = run("zoomr", 160, words(20), thoughts(*[30] * 30), zoomed_blocks=2)
    outs = of(PagedOut, events)
    assert of(PagedIn, events), "noise votes zoom something"
    seen = set()
    for event in outs:
        new = [(b, event.part) for b in event.blocks if (b, event.part) not in seen]
        assert (event.written_bytes > 0) == bool(new)
        seen.update(new)
    assert g.cache.tier.stored_bytes == sum(e.written_bytes for e in outs)


def test_zoomed_blocks_are_resident_when_a_refresh_says_so():
    g, context, events = run("zoomr", 160, words(20), thoughts(*[30] * 20))
    assert all(0 <= e.agreement <= 1 for e in of(Refreshed, events))
    last = of(Refreshed, events)[-1]
    assert all(g.cache.resident("detail")[b] for b in last.zoomed)


def test_recency_keeps_prompt_and_newest_and_streaming_keeps_sinks():
    _, context, _ = run("recency", 128, words(29), words(300))
    assert sorted(context.cells) == [*range(30), *range(330 - 98, 330)]
    _, context, _ = run("streaming", 128, words(59), words(300))
    assert sorted(context.cells) == [*range(4), *range(60 - 16, 60), *range(360 - 108, 360)]


def test_sinks_that_fill_the_budget_are_refused():
    with pytest.raises(BudgetError, match="--sinks"):
        run("streaming", 128, words(300), words(3), sink_tokens=120)


def test_text_is_sorted_into_reasoning_and_content():
    script = [*thoughts(2, summary=1), UNTHINK, WORD, EOS]
    done = run("zoomr", 200, words(5), script)[2][-1]
    assert done.content == " w10" and done.reasoning == " w12 w13<|begin_of_summary|> w12<|end_of_summary|>"
    assert (done.completion_tokens, done.reasoning_tokens) == (7, 3)


@pytest.mark.parametrize("prompt, script, warnings", [(900, 90, 0), (900, 150, 1), (1200, 50, 1)])
def test_text_beyond_the_trained_positions_is_said_once(prompt, script, warnings):
    events = run("zoomr", 300, words(prompt), words(script))[2]
    assert len(of(Warned, events)) == warnings


def test_max_tokens_ends_with_length():
    for limit, reason in ((49, "length"), (51, "stop")):
        events = run("recency", 200, words(5), words(50), max_tokens=limit)[2]
        assert events[-1].reason == reason and len(of(TokenDecoded, events)) == min(limit, 50)
