"""The engine on the real library and the bundled model: the budget is hard, and nothing is silently different."""

import pytest

from scripted import ScriptedSampler

from zoomr_local import generation
from zoomr_local.engine import Engine, EngineConfig, resolve_settings
from zoomr_local.errors import BudgetError, EngineError, ModelError, UsageError
from zoomr_local.events import PagedIn, PagedOut, PromptProgress, Split, TokenDecoded
from zoomr_local.model import Model
from zoomr_local.policies import POLICIES
from zoomr_local.sampling import SamplingParams
from zoomr_models.tasks import generate

THREADS = 1
SERVED = [name for name, policy in POLICIES.items() if policy.unit not in ("beacon", "head")]
"""Policies that the bundled model can be run under with uniform cells. Beacons: test_beacons_engine.py; heads: test_heads_engine.py."""


@pytest.fixture(scope="module")
def prompt(model):
    problem = generate("series", 1, seed=5, thoughts=9, split="dev")[0]
    return model.tokenize(model.render([{"role": "user", "content": problem.prompt}]))


def play(model, prompt, sampling=SamplingParams(), max_tokens=1200, watch=None, **config):
    engine = Engine(model, EngineConfig(threads=THREADS, **config))
    try:
        events = []
        for event in engine.generate(prompt, sampling, max_tokens):
            events.append(event)
            if watch:
                watch(engine, event)
        return events
    finally:
        engine.close()


def tokens(events):
    return [e.token for e in events if isinstance(e, TokenDecoded)]


def test_a_budget_as_long_as_the_text_gives_the_tokens_of_full(model, prompt):
    full = play(model, prompt, policy="full")
    for policy in SERVED:
        assert tokens(play(model, prompt, policy=policy, kv_budget=2048)) == tokens(full)


@pytest.mark.parametrize("policy", [name for name in SERVED if name != "full"])
@pytest.mark.parametrize("flash_attn, kv_type", [(True, "f16"), (False, "f16"), (True, "q8_0")])
def test_cells_in_use_are_what_the_books_say_and_never_above_the_budget(model, prompt, policy, flash_attn, kv_type):
    seen = []

    def watch(engine, event):
        used = engine.context.n_used()
        seen.append(used)
        assert used <= 192
        if isinstance(event, TokenDecoded):
            assert used == event.resident_tokens

    events = play(model, prompt * 3, policy=policy, kv_budget=192, flash_attn=flash_attn, kv_type=kv_type,
                  max_tokens=200, watch=watch)
    # events come between decodes, so the books may have seen one token more than the test did
    assert 150 < max(seen) <= events[-1].cache.resident_peak_tokens <= 192


def test_a_prompt_of_twenty_times_the_budget_is_read_and_said(model, prompt):
    long = (prompt * 99)[: 20 * 256]
    used = []
    events = play(model, long, kv_budget=256, max_tokens=40, watch=lambda e, _: used.append(e.context.n_used()))
    assert 200 < max(used) <= 256
    assert any(isinstance(e, Split) and e.what == "prompt" for e in events)
    progress = [e.done_tokens for e in events if isinstance(e, PromptProgress)]
    assert progress == sorted(progress) and progress[-1] == len(long)
    done = events[-1]
    assert done.cache.resident_peak_tokens <= 256 and done.prompt_tokens == len(long)


@pytest.mark.parametrize("policy", ["zoomr", "sumr", "recency"])
def test_thoughts_and_summaries_of_many_times_the_budget_stay_inside_it(model, prompt, policy, monkeypatch):
    """A forced text: a thought of 1,000 tokens, a summary of 600, many short thoughts, an answer of 500."""
    word, full_stop = model.tokenize(" and")[0], model.tokenize(".")[0]
    text = [full_stop if i % 20 == 19 else word for i in range(1000)]
    m = model.markers
    script = [*text, m.summary_open, *text[:600], m.summary_close]
    script += 20 * [*text[:45], m.summary_open, *text[:6], m.summary_close] + [m.think_close, *text[:500]]
    ScriptedSampler.script = script
    monkeypatch.setattr(generation, "LlamaSampler", ScriptedSampler)
    used = []
    events = play(model, prompt, policy=policy, kv_budget=256, max_tokens=len(script),
                  watch=lambda engine, _: used.append(engine.context.n_used()))
    assert max(used) <= 256 < len(script) // 10 and tokens(events) == script
    assert (policy == "recency") or {"thought", "summary", "answer"} <= {e.what for e in events if isinstance(e, Split)}


def test_blocks_go_out_and_come_back(model, prompt):
    events = play(model, prompt, kv_budget=256)
    out, back = ([e for e in events if isinstance(e, kind)] for kind in (PagedOut, PagedIn))
    assert out and back
    done = events[-1].cache
    assert done.page_ins == sum(len(e.blocks) for e in back if e.part == "detail")
    assert done.paged_out_bytes == sum(e.written_bytes for e in out) >= done.token_bytes


def test_the_same_seed_gives_the_same_text_and_another_seed_another(model, prompt):
    def draw(seed):
        return tokens(play(model, prompt, SamplingParams(temperature=3.0, top_k=0, top_p=1.0, min_p=0.0, seed=seed), 60, kv_budget=256))

    assert draw(1) == draw(1) != draw(2)


def test_an_engine_runs_one_problem_after_another(model, prompt):
    engine = Engine(model, EngineConfig(kv_budget=256, threads=THREADS))
    runs = [tokens(list(engine.generate(prompt, SamplingParams(), 200))) for _ in range(2)]
    engine.close()
    assert runs[0] == runs[1]


def test_cancel_ends_the_generation_and_keeps_its_text(model, prompt):
    engine = Engine(model, EngineConfig(kv_budget=256, threads=THREADS))
    events = []
    for event in engine.generate(prompt, SamplingParams(), 200):
        events.append(event)
        if len(tokens(events)) == 10:
            engine.cancel()
    engine.close()
    assert events[-1].reason == "cancelled" and events[-1].completion_tokens == 10 and events[-1].reasoning


def test_a_stop_string_ends_the_text_before_it(model, prompt):
    text = play(model, prompt, max_tokens=100)[-1].reasoning
    word = text.split()[8]
    cut = play(model, prompt, SamplingParams(stop=(word,)), 100)[-1]
    assert cut.reason == "stop" and cut.reasoning == text[: text.index(word)]


@pytest.mark.parametrize("bad, error, match", [
    (dict(kv_budget=64), BudgetError, "kv-budget 64"),
    (dict(policy="best"), UsageError, "choose one of"),
    (dict(kv_type="q2"), UsageError, "kv-type"),
    (dict(refresh=0), UsageError, "--refresh 0"),
    (dict(kv_type="q8_0", flash_attn=False), UsageError, "needs flash attention"),
])
def test_a_bad_setting_is_named(bad, error, match):
    with pytest.raises(error, match=match):
        EngineConfig(**bad)


@pytest.mark.parametrize("bad, max_tokens", [([], 5), ([10**9], 5), ([5], 0)])
def test_a_bad_request_is_refused_before_anything_is_decoded(model, bad, max_tokens):
    engine = Engine(model, EngineConfig(threads=THREADS))
    with pytest.raises(UsageError):
        list(engine.generate(bad, SamplingParams(), max_tokens))
    engine.close()


def test_the_user_goes_before_the_model_and_the_model_before_the_default():
    assert resolve_settings(EngineConfig(), {}).zoomed_blocks == 2
    assert resolve_settings(EngineConfig(), {"zoomed_blocks": 3}).zoomed_blocks == 3
    assert resolve_settings(EngineConfig(zoomed_blocks=5), {"zoomed_blocks": 3}).zoomed_blocks == 5


def test_every_flag_reaches_its_setting():
    config = EngineConfig(refresh=3, votes_per_head=4, zoomed_blocks=5, window=6, vote_window=7, vote_layers=(1,), sinks=9, seed=11)
    settings = resolve_settings(config, {})
    assert (settings.refresh_tokens, settings.votes_per_head, settings.zoomed_blocks, settings.window_tokens) == (3, 4, 5, 6)
    assert (settings.vote_window_tokens, settings.vote_layers, settings.sink_tokens, settings.seed) == (7, (1,), 9, 11)


def test_the_bundled_model_states_its_own_settings(model):
    assert set(model.settings) >= {"window_tokens", "votes_per_head", "zoomed_blocks", "vote_window_tokens", "vote_layers"}
    assert set(model.settings["vote_layers"]) < set(range(model.llama.n_layer))


def test_layers_the_model_does_not_have_cannot_vote(model):
    with pytest.raises(UsageError, match="--vote-layers 99: .* pages layers 0 to 3"):
        Engine(model, EngineConfig(vote_layers=(2, 99)))


def test_sinks_without_room_are_refused_before_anything_runs(model):
    with pytest.raises(BudgetError, match="--sinks"):
        Engine(model, EngineConfig(policy="streaming", sinks=120, kv_budget=128))


def test_impossible_metadata_is_the_models_fault(model, monkeypatch):
    monkeypatch.setitem(model.settings, "refresh_tokens", 0)
    with pytest.raises(ModelError, match="refresh_tokens is 0"):
        Engine(model, EngineConfig())


def test_a_closed_engine_says_so_and_a_new_generation_ends_the_old(model, prompt):
    engine = Engine(model, EngineConfig(kv_budget=256, threads=THREADS))
    first = engine.generate(prompt, SamplingParams(), 50)
    next(first)
    assert list(engine.generate(prompt, SamplingParams(), 5))[-1].reason == "length" and list(first) == []
    engine.close()
    with pytest.raises(EngineError, match="closed"):
        engine.generate(prompt, SamplingParams(), 5)


def test_cancel_before_the_first_event_counts(model, prompt):
    engine = Engine(model, EngineConfig(kv_budget=256, threads=THREADS))
    stream = engine.generate(prompt, SamplingParams(), 50)
    engine.cancel()
    assert list(stream)[-1].reason == "cancelled"
    engine.close()


def test_a_small_batch_reads_a_long_prompt(model, prompt):
    assert play(model, prompt * 20, kv_budget=256, batch=32, max_tokens=3)[-1].prompt_tokens == 20 * len(prompt)


def test_a_missing_file_is_one_clear_error():
    with pytest.raises(ModelError, match="no model file"):
        Model.open("/nowhere/model.gguf")
