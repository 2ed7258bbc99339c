"""Per-head policies in the real engine: `full` where everything fits, the slow references where it does not, never a cell too many."""

import dataclasses

import heads_reference as slow
import numpy as np
import pytest
from scripted import ScriptedSampler

from zoomr_local import calibrations, generation
from zoomr_local.engine import Engine, EngineConfig
from zoomr_local.errors import UsageError
from zoomr_local.events import HeadsEvicted, PromptProgress, TokenDecoded
from zoomr_local.policies import POLICIES
from zoomr_local.policies.heads import Calibration, HeadSettings
from zoomr_local.sampling import SamplingParams

HEADS = [name for name, policy in POLICIES.items() if policy.unit == "head" and policy.drops]
UNEVEN = Calibration((4.0, 1.0, 2.0, 9.0), 0.93, 8, 800)
BUDGET = 128


@pytest.fixture(autouse=True)
def calibrated(monkeypatch):
    """A calibration that asks for different layer budgets, whatever the shipped one says."""
    monkeypatch.setattr(calibrations, "find", lambda path: UNEVEN)


def play(model, prompt, policy, budget, max_tokens, watch=None, begun=None, **config):
    engine = Engine(model, EngineConfig(policy=policy, kv_budget=budget, threads=1, **config))
    try:
        stream, events = engine.generate(prompt, SamplingParams(), max_tokens), []
        if begun:
            begun(engine)
        for event in stream:
            events.append(event)
            if watch:
                watch(engine, event)
        return events
    finally:
        engine.close()


def tokens(events):
    return [e.token for e in events if isinstance(e, TokenDecoded)]


@pytest.fixture
def long_reply(prompt, monkeypatch):
    """However the model would go on, it writes words, 360 of them."""
    ScriptedSampler.script = (prompt[10:40] * 12)[:360]
    monkeypatch.setattr(generation, "LlamaSampler", ScriptedSampler)


def short(prompt):
    return prompt[: len(prompt) // 2]


# ---------------------------------------------------------------- 1: nothing has to leave


def logits_of(model, prompt, policy, **config):
    rows = []
    watch = lambda engine, event: isinstance(event, TokenDecoded) and rows.append(engine.context.logits().copy())  # noqa: E731
    events = play(model, prompt, policy, 1024, 40, watch, **config)
    assert not any(isinstance(e, HeadsEvicted) for e in events)
    return tokens(events), np.stack(rows)


@pytest.mark.parametrize("policy", HEADS)
def test_with_cells_for_everything_tokens_and_logits_are_those_of_full(model, prompt, policy, monkeypatch):
    batch = {"batch": 32} if policy == "h2o" else {}
    full, expected = logits_of(model, short(prompt), "full", **batch)
    ScriptedSampler.script = full  # one rounded logit must not change the text that is compared
    monkeypatch.setattr(generation, "LlamaSampler", ScriptedSampler)
    same, found = logits_of(model, short(prompt), policy)
    assert same == full
    if POLICIES[policy].moves_head_budgets:  # one pool a layer: the same rows in another order
        assert np.sqrt(((found - expected) ** 2).mean() / (expected**2).mean()) < 1.5e-2
        assert (found.argmax(axis=1) == expected.argmax(axis=1)).mean() > 0.9
    else:
        np.testing.assert_array_equal(found, expected)


# ---------------------------------------------------------------- 2: what is kept


class Recorder:
    """What the engine decoded, seen from outside, and every question it asked the policy."""

    def __init__(self):
        self.asked, self.queries, self.sums, self.keys, self.done = [], {}, {}, {}, 0

    def begun(self, engine):
        engine.generation.asked = lambda layer, view, budgets, kept: self.question(engine, layer, view, budgets, kept)
        decode = engine.generation.cache.decode

        def watched(batch, first, logits):
            decode(batch, first, logits)
            self.decoded(engine._heads.store, range(first, first + len(batch)))

        engine.generation.cache.decode = watched

    def decoded(self, store, positions):
        """Take down queries, and for every head a sum for every token it holds, the obvious way."""
        if store.n_observe <= 8:
            last = store.queries()
            for i, position in enumerate(positions[-last.shape[1]:]):
                self.queries[position] = last[:, i].copy()
            return
        group = store.n_head // store.n_head_kv
        for layer in range(store.n_layers):
            weights, held = store.weights(layer), store.positions(layer)
            assert len(weights) == len(positions), "every query of a piece is seen"
            for head in range(store.n_head_kv):
                for cell in np.flatnonzero(held[head] >= 0):
                    key = (layer, head, int(held[head, cell]))
                    add = weights[:, head * group : (head + 1) * group, cell].astype(np.float64).sum()
                    self.sums[key] = self.sums.get(key, 0.0) + float(add)

    def question(self, engine, layer, view, budgets, kept):
        store, now = engine._heads.store, len(engine.sequence)
        pinned = np.zeros(now + 1, bool)
        for start, stop in engine.generation.timeline.pinned:
            pinned[start:stop] = True
        assert (view.positions == store.positions(layer)).all() and (view.valid == (view.positions >= 0)).all()
        assert (view.pinned[view.valid] == pinned[view.positions[view.valid]]).all() and not view.pinned[~view.valid].any()
        for head in range(store.n_head_kv) if view.keys is not None else ():
            for cell in np.flatnonzero(view.valid[head])[::5]:
                key = self.keys.setdefault((layer, head, int(view.positions[head, cell])), view.keys[head, cell].copy())
                assert (view.keys[head, cell] == key).all(), "a token's key never changes"
        if view.queries is not None:
            assert (view.queries == np.stack([self.queries[p][layer] for p in range(max(0, now - 8), now)])).all()
        if view.accumulated is not None:
            for head in range(store.n_head_kv):
                for cell in np.flatnonzero(view.valid[head]):
                    assert view.accumulated[head, cell] == pytest.approx(self.sums[layer, head, int(view.positions[head, cell])], rel=1e-9)
        stays = [set(view.positions[head][kept[head]].tolist()) for head in range(store.n_head_kv)]
        self.asked.append((layer, dataclasses.replace(view), budgets.copy(), kept.copy(), stays))


def scores_of(policy, view, head, s):
    """One head's tokens and their scores by the slow reference."""
    heard = slow.tokens_of(view.positions[head], view.valid[head], view.pinned[head], None if view.keys is None else view.keys[head])
    if policy == "h2o":
        return heard, [float(view.accumulated[head, token["place"]]) for token in heard]
    group = view.queries.shape[1] // len(view.positions)
    queries = view.queries[:, head * group : (head + 1) * group].astype(float).tolist()
    votes = slow.importance_from_queries(heard, queries, view.scale, s.observation_tokens, s.pool_tokens)
    if policy == "snapkv":
        return heard, votes
    return heard, slow.rkv_scores(heard, votes, s.similarity_threshold, s.importance_share)


def check_against_the_reference(policy, view, budgets, kept, s):
    for head in range(len(budgets)):
        heard, scores = scores_of(policy, view, head, s)
        recent = s.observation_tokens
        if policy == "h2o":
            recent = slow.h2o_recent(int(budgets[head]), sum(t["pinned"] for t in heard) if s.pin_prompt else 0, s.heavy_share)
        expected = slow.keep(heard, scores, int(budgets[head]), recent, s.pin_prompt)
        assert set(np.flatnonzero(kept[head]).tolist()) == expected, (policy, view.layer, head)


@pytest.mark.parametrize("pin", [True, False], ids=["pinned", "unpinned"])
@pytest.mark.parametrize("policy", HEADS)
def test_on_a_real_run_every_layer_and_head_keeps_what_the_reference_keeps(model, prompt, long_reply, policy, pin):
    seen, held = Recorder(), []
    events = play(model, short(prompt)[:60], policy, BUDGET, 200, begun=seen.begun, pin_prompt=pin,
                  watch=lambda engine, _: held.append(engine.generation.cache.held.copy()))
    assert len(seen.asked) >= 24 and {layer for layer, *_ in seen.asked} == {0, 1, 2, 3}
    s, before = HeadSettings(pin_prompt=pin), {}
    every = 1 if policy in ("snapkv", "h2o") else 9  # redundancy the slow way is seconds a layer
    for number, (layer, view, budgets, kept, stays) in enumerate(seen.asked):
        for head, last in enumerate(before.get(layer, ())):
            older = set(view.positions[head][view.valid[head]].tolist())
            assert last <= older and min(older - last) > max(last), "what stayed is there, and what came since"
        before[layer] = stays
        asks = sum(layer == other for other, *_ in seen.asked[:number])
        if asks % every == 0 and asks <= 2 * every + 12:
            check_against_the_reference(policy, view, budgets, kept, s)
    done = events[-1].cache
    assert done.refreshes and done.dropped_tokens == -(-sum(sum(e.freed_cells) for e in events if isinstance(e, HeadsEvicted)) // held[0].size)


def test_reasonalloc_shares_a_layer_out_as_algorithm_1_does_and_not_more_often_than_every_128_tokens(model, prompt, long_reply):
    seen, at, s = Recorder(), [], HeadSettings()

    def begun(engine):
        seen.begun(engine)
        share = engine.policy.head_budgets

        def told(view, cells, most=None):
            found = share(view, cells, most)
            at.append((len(engine.sequence), view, cells, found))
            return found

        engine.policy.head_budgets = told

    play(model, short(prompt)[:60], "reasonalloc", BUDGET, 300, begun=begun)
    mine = {layer: [entry for entry in at if entry[1].layer == layer] for layer in range(4)}
    assert any(len(set(found.tolist())) > 1 for *_, found in at), "heads differ"
    for layer, entries in mine.items():
        steps = np.diff([when for when, *_ in entries])
        assert len(entries) >= 2 and (steps >= s.head_every_tokens).all()
        _, view, cells, found = entries[0]
        heads, scores = zip(*(scores_of("reasonalloc", view, h, s) for h in range(len(found))), strict=True)
        assert found.tolist() == slow.head_budgets(heads, scores, s.observation_tokens, cells, s.head_power, s.head_floor, True)
    for layer, _, budgets, kept, _ in seen.asked:
        assert (kept.sum(axis=1) <= budgets).all() and any((budgets == found).all() for *_, found in mine[layer])


# ---------------------------------------------------------------- 3: cells and bytes


@pytest.mark.parametrize("policy", HEADS)
@pytest.mark.parametrize("flash_attn", [True, False])
def test_bytes_are_the_uniform_caches_and_no_layer_ever_holds_more_than_its_share(model, prompt, long_reply, policy, flash_attn):
    """Over a prompt longer than the budget, so that pieces of it are evicted too."""
    peaks = []

    def watch(engine, event):
        cells, held = engine._heads, engine.generation.cache.held
        assert cells.store.kv_bytes == engine.context.token_bytes * 192, "the bytes of 192 cells of all layers and heads"
        per_layer = cells.layer_tokens * cells.store.n_head_kv * cells.store.cell_bytes
        assert per_layer.sum() == cells.store.kv_bytes
        counted = np.array([[(row >= 0).sum() for row in cells.store.positions(layer)] for layer in range(cells.store.n_layers)])
        assert (counted == held).all() and (held.sum(axis=1) <= cells.layer_tokens * cells.store.n_head_kv).all()
        in_use = -(-int(held.sum()) // held.size)
        assert in_use == engine.generation.cache.resident_tokens <= 192
        assert not isinstance(event, TokenDecoded) or event.resident_tokens == in_use
        peaks.append(in_use)

    events = play(model, prompt * 2, policy, 192, 60, watch, flash_attn=flash_attn)
    done = events[-1].cache
    assert 120 < max(peaks) <= done.resident_peak_tokens <= 192 == done.allocated_tokens == done.budget_tokens
    assert sum(done.layer_cells) == 4 * 192 and (len(set(done.layer_cells)) > 1) == (policy in ("pyramid", "reasonalloc"))
    assert [e.done_tokens for e in events if isinstance(e, PromptProgress)][-1] == len(prompt) * 2


@pytest.mark.parametrize("policy", HEADS)
def test_a_pinned_prompt_stays_in_every_head_and_an_unpinned_one_does_not(model, prompt, long_reply, policy):
    first = short(prompt)[:60]
    for pin in (True, False):
        left = []

        def watch(engine, _):
            store = engine._heads.store
            left[:] = [set(store.resident(layer, head)[1].tolist()) for layer in range(store.n_layers) for head in range(store.n_head_kv)]

        play(model, first, policy, BUDGET, 120, watch, pin_prompt=pin)
        assert all(set(range(len(first))) <= held for held in left) == pin


@pytest.mark.parametrize("policy", ["rkv", "pyramid", "reasonalloc"])
def test_an_engine_runs_prompts_of_other_lengths_one_after_another(model, prompt, policy):
    engine = Engine(model, EngineConfig(policy=policy, kv_budget=BUDGET, threads=1))
    runs = [list(engine.generate(short(prompt)[:n], SamplingParams(), 40)) for n in (60, 75, 60)]
    engine.close()
    assert tokens(runs[0]) == tokens(runs[2]) and runs[0][-1].cache.layer_cells == runs[2][-1].cache.layer_cells
    assert (runs[0][-1].cache.layer_cells != runs[1][-1].cache.layer_cells) == (policy != "rkv")


# ---------------------------------------------------------------- what is refused


def test_what_has_no_meaning_is_refused_by_name(model, prompt, tmp_path):
    with pytest.raises(UsageError, match="--kv-type q8_0.*snapkv"):
        EngineConfig(policy="snapkv", kv_type="q8_0")
    with pytest.raises(UsageError, match="--pin-prompt off.*zoomr.*clusterkv, snapkv, h2o, rkv, pyramid, reasonalloc"):
        EngineConfig(pin_prompt=False)
    engine = Engine(model, EngineConfig(policy="rkv", kv_budget=BUDGET, threads=1))
    try:
        with pytest.raises(UsageError, match="--policy rkv has no conversations"):
            engine.generate(prompt, SamplingParams(), 5, room_tokens=2000)
        next(engine.generate(short(prompt), SamplingParams(), 5))
        with pytest.raises(UsageError, match="--policy rkv cannot be saved"):
            engine.save(tmp_path / "session")
        with pytest.raises(UsageError, match="--policy rkv cannot be saved"):
            engine.load(tmp_path / "session")
    finally:
        engine.close()
