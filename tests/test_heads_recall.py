"""`clusterkv` in the real engine: `full` where everything fits, the slow reference where it does not, every row back as it left."""

import heads_reference as slow
import numpy as np
import pytest
from test_heads_engine import BUDGET, long_reply, play, short, tokens  # noqa: F401

from zoomr_local.cluster_generation import ClusterGeneration
from zoomr_local.engine import Engine, EngineConfig
from zoomr_local.errors import BudgetError, StorageError, UsageError
from zoomr_local.events import Finished, HeadsEvicted, HeadsRecalled, PromptProgress, TokenDecoded
from zoomr_local.policies.heads.kmeans import draw_first
from zoomr_local.sampling import SamplingParams

MOVES = (HeadsEvicted, HeadsRecalled)


# ---------------------------------------------------------------- nothing has to leave


@pytest.mark.parametrize("more", [{}, {"dense_layers": 2}, {"pin_prompt": False, "flash_attn": False}], ids=["pinned", "dense", "unpinned"])
def test_with_cells_for_everything_tokens_and_logits_are_those_of_full(model, prompt, more):
    def logits_of(policy, **config):
        rows = []
        watch = lambda engine, event: isinstance(event, TokenDecoded) and rows.append(engine.context.logits().copy())  # noqa: E731
        events = play(model, short(prompt), policy, 256, 40, watch, **config)
        assert not any(isinstance(e, MOVES) for e in events)
        return tokens(events), rows, events[-1].cache

    flash = {"flash_attn": more.get("flash_attn", True)}
    full, expected, _ = logits_of("full", **flash)
    same, found, done = logits_of("clusterkv", **more)
    assert same == full and done.refreshes == done.paged_out_bytes == 0 and done.cluster_hit_rate is None
    if flash["flash_attn"]:
        np.testing.assert_array_equal(found, expected)
    else:  # the products are of other lengths
        np.testing.assert_allclose(found, expected, atol=0.05)


def test_a_token_that_is_only_tried_leaves_nothing_behind(model, prompt, monkeypatch):
    """With cells for everything, so that nothing else differs: the same tokens and logits, bit for bit, as if none had been tried."""
    def logits_of():
        rows = []
        watch = lambda engine, event: isinstance(event, TokenDecoded) and rows.append(engine.context.logits().copy())  # noqa: E731
        return tokens(play(model, short(prompt), "clusterkv", 256, 40, watch)), rows

    plain, expected = logits_of()
    step, held = ClusterGeneration.step, []

    def trying(self, token, fed, text):
        for other in (token, (token + 1) % 300):
            self.cache.try_token(other, len(self.timeline))
        held.append((self.cache.held == len(self.timeline)).all() and max((self.heads.positions(i).max()) for i in range(4)) == len(self.timeline) - 1)
        yield from step(self, token, fed, text)

    monkeypatch.setattr(ClusterGeneration, "step", trying)
    same, found = logits_of()
    assert same == plain and len(held) >= 30 and all(held)
    np.testing.assert_array_equal(found, expected)


# ---------------------------------------------------------------- what is kept


class Watcher:
    """Every token's rows and its query when it was decoded, and what each selection was; from outside."""

    def __init__(self, model_keeps, window, prompt_tokens, added, own):
        self.added, self.own, self.decodes = added, own, []
        self.keeps, self.window, self.prompt_tokens = model_keeps, window, prompt_tokens
        self.rows, self.keys, self.queries, self.asked, self.wanted, self.history = {}, {}, {}, 0, {}, {}

    def begun(self, engine):
        self.engine = engine
        engine.generation.asked = self.selected
        decode = engine.generation.cache.decode

        def watched(batch, first, logits):
            self.check_held()
            decode(batch, first, logits)
            self.decodes.append((first, logits))
            self.decoded(first, first + len(batch))

        engine.generation.cache.decode = watched

    @property
    def store(self):
        return self.engine._heads.store

    def decoded(self, first, stop):
        for layer in range(self.store.n_layers):
            self.queries[layer] = self.store.queries()[layer, -1].copy()
            for head in range(self.store.n_head_kv):
                cells, positions = self.store.resident(layer, head)
                new = cells[positions >= first]
                assert positions[positions >= first].tolist() == list(range(first, stop))
                keys, raw = self.store.keys(layer, head, new), [self.store.page_out(layer, head, [c]) for c in new]
                for i, position in enumerate(range(first, stop)):
                    self.keys[layer, head, position], self.rows[layer, head, position] = keys[i].astype(float).tolist(), raw[i]
                if (layer, head) in self.wanted:
                    self.wanted[layer, head] |= set(range(first, stop))

    def check_held(self):
        """After every selection and every decode each head holds what the reference says, and rows are as they were."""
        for (layer, head), wanted in self.wanted.items():
            cells, positions = self.store.resident(layer, head)
            assert set(positions.tolist()) == wanted, (layer, head)
            for cell, position in list(zip(cells.tolist(), positions.tolist(), strict=True))[:: 7]:
                assert (self.store.page_out(layer, head, [cell]) == self.rows[layer, head, position]).all(), "byte for byte"

    def pieces(self, now):
        """Which tokens were clustered together, if those of the prompt were all at once, and which are still to be."""
        found, start = [(0, self.prompt_tokens)], self.prompt_tokens
        while now + 1 - start > self.window:
            found.append((start, start + self.window))
            start += self.window
        return found, start

    def clusters_of(self, row, now):
        """(centroids, label of every clustered position) by the slow k-means, piece by piece."""
        layer, head = divmod(row, self.store.n_head_kv)
        centroids, labels = [], {}
        for start, stop in self.pieces(now)[0]:
            own = [p for p in range(start, stop) if p not in self.keeps]
            if own:
                n = len(own) // 80 if start == 0 else int(len(own) * self.added / 320 + 0.5)
                first = draw_first(row + 1, len(own), min(max(1, n), len(own)), (0, 0, own[0]))[row].tolist()
                key = (row, start)
                if key not in self.history:
                    self.history[key] = slow.kmeans([self.keys[layer, head, p] for p in own], first, 20)
                found, own_labels = self.history[key]
                labels |= {p: len(centroids) + label for p, label in zip(own, own_labels, strict=True)}
                centroids += [np.float32(c).astype(float).tolist() for c in found]
        return centroids, labels

    def selected(self, layers, clusters, queries, newest, found):
        now, store = len(self.engine.sequence), self.store
        self.asked += 1
        start = self.pieces(now)[1]
        assert newest == now + 1 + self.own - start and layers == list(range(store.n_layers))
        assert self.decodes[-1] == ((now, "none") if self.own else (now - 1, "last")), "whose query selects"
        group = store.n_head // store.n_head_kv
        for row in range(store.n_layers * store.n_head_kv):
            layer, head = divmod(row, store.n_head_kv)
            assert (queries[layer] == self.queries[layer]).all(), "the query of the last decoded token"
            centroids, labels = self.clusters_of(row, now)
            positions = sorted(labels)
            assert clusters.positions.tolist() == positions
            room = int(self.engine._heads.layer_tokens[layer]) - len(self.keeps) - newest
            own = queries[layer, head * group : (head + 1) * group].astype(float).tolist()
            chosen, taken, _ = slow.select_clusters(centroids, [labels[p] for p in positions], own, room, "mean")
            assert found.clusters[row].tolist() == taken
            self.wanted[layer, head] = set(self.keeps) | {positions[i] for i in chosen} | set(range(start, now))


@pytest.mark.parametrize(("pin", "added", "query"), [(True, 8, "last"), (False, 8, "own"), (False, 40, "own"), (True, 32, "own")], ids=str)
def test_on_a_real_run_every_layer_and_head_holds_what_the_reference_selects(model, prompt, long_reply, pin, added, query):  # noqa: F811
    first = short(prompt)[:60]
    keeps = range(60 if pin else 16)
    own = query == "own"
    seen = Watcher(keeps, (BUDGET - len(keeps) - own) // 2, 60, added, own)
    events = play(model, first, "clusterkv", BUDGET, 150, begun=seen.begun, pin_prompt=pin, cluster_query=query, clusters_added=added)
    done = events[-1].cache
    selections = sum(len(e.layers) for e in events if isinstance(e, HeadsEvicted))
    assert seen.asked == done.refreshes >= 50 and selections >= 100 and len(seen.wanted) == 8
    assert done.dropped_tokens == 0 and done.recalled_tokens > 0 and len(seen.history) >= 16
    assert done.recalled_tokens == -(-sum(sum(e.recalled_cells) for e in events if isinstance(e, HeadsRecalled)) // 8)
    every = {key for key in seen.rows if key[:2] in seen.wanted}
    assert done.paged_out_bytes <= len(every) * seen.rows[0, 0, 0].nbytes


def test_the_hit_rate_is_the_share_of_clusters_that_the_last_selection_had(model, prompt, long_reply):  # noqa: F811
    history = []

    def begun(engine):
        engine.generation.asked = lambda layers, c, q, n, found: history.append([set(x.tolist()) for x in found.clusters])

    events = play(model, short(prompt)[:60], "clusterkv", BUDGET, 120, begun=begun)
    rates = slow.hit_rates(history, 1)
    assert 0 < events[-1].cache.cluster_hit_rate < 1 and len(history[0]) == 8
    assert events[-1].cache.cluster_hit_rate == pytest.approx(np.mean(rates), abs=1e-4)
    told = [e.hit_rate for e in events if isinstance(e, HeadsRecalled) and e.hit_rate is not None]
    assert told and all(min(abs(np.array(rates) - rate)) < 1e-4 for rate in told)


def test_with_a_refresh_of_n_there_is_a_selection_every_n_tokens(model, prompt, long_reply):  # noqa: F811
    at, tried = {}, {}
    for every in (1, 5, 40):
        asked, found = at.setdefault(every, []), tried.setdefault(every, [])

        def begun(engine, asked=asked, found=found):
            try_token = engine.generation.cache.try_token
            engine.generation.asked = lambda *_: asked.append(len(engine.sequence))
            engine.generation.cache.try_token = lambda token, position: found.append(position) or try_token(token, position)

        play(model, short(prompt)[:60], "clusterkv", BUDGET, 120, begun=begun, refresh=every)
    assert set(np.diff(at[1])) == {1} and set(np.diff(at[5])) == {5} and len(at[5]) > 8
    assert 2 < len(at[40]) < 8 and np.diff(at[40]).max() <= 33, "no longer than the window has cells for"
    assert tried == at, "whatever the distance, a token's own query selects for it"


def test_a_token_decoded_for_its_queries_alone_leaves_those_of_the_token(model, prompt, long_reply):  # noqa: F811
    engine = Engine(model, EngineConfig(policy="clusterkv", kv_budget=256, threads=1))
    try:
        stream, found = engine.generate(short(prompt)[:60], SamplingParams(), 20), {}
        while not isinstance(next(stream), TokenDecoded):
            pass
        generation = engine.generation
        now, token = len(generation.timeline), generation.reply.token
        for other in (token + 1, token):
            generation.cache.try_token(other, now)
            found[other] = generation.heads.queries()[:, -1].copy()
        next(stream)
        assert len(generation.timeline) == now + 1
        real = generation.heads.queries()[:, -1]
        assert (found[token] == real).all() and not (found[token + 1] == real).all()
    finally:
        engine.close()


# ---------------------------------------------------------------- cells and bytes


@pytest.mark.parametrize("more", [{}, {"pin_prompt": False}, {"flash_attn": False}, {"refresh": 7}, {"dense_layers": 1}, {"cluster_query": "last"}], ids=str)
def test_bytes_are_the_uniform_caches_and_no_head_ever_holds_more_than_its_share(model, prompt, long_reply, more):  # noqa: F811
    """Over a prompt longer than the budget, so that it is read in pieces, and clustered and paged between them."""
    dense = more.get("dense_layers", 0)
    twice, reply = prompt * 2, 60
    budget = 192 if not dense else 256
    twice = twice if not dense else prompt
    peaks = []

    def watch(engine, event):
        cells, held = engine._heads, engine.generation.cache.held
        assert cells.store.kv_bytes == engine.context.token_bytes * budget and cells.layer_tokens.sum() == 4 * budget
        counted = np.array([[(row >= 0).sum() for row in cells.store.positions(layer)] for layer in range(4)])
        assert (counted == held).all() and (held.max(axis=1) <= cells.layer_tokens).all()
        in_use = -(-int(held.sum()) // held.size)
        assert in_use == engine.generation.cache.resident_tokens <= budget
        assert (held[:dense] == len(engine.sequence)).all(), "a dense layer holds everything"
        peaks.append(in_use)

    events = play(model, twice, "clusterkv", budget, reply, watch, **more)
    done = events[-1].cache
    assert 120 < max(peaks) <= done.resident_peak_tokens <= budget == done.allocated_tokens == done.budget_tokens
    assert (done.layer_cells[0] == len(twice) + reply) == bool(dense) and sum(done.layer_cells) == 4 * budget
    assert [e.done_tokens for e in events if isinstance(e, PromptProgress)][-1] == len(twice)
    assert any(isinstance(e, HeadsEvicted) for e in events) and isinstance(events[-1], Finished)
    assert 0 < done.ram_bytes == done.paged_out_bytes <= (4 - dense) * (len(twice) + reply) * 512


def test_too_many_dense_layers_are_refused_with_a_budget_that_suffices(model, prompt):
    first = short(prompt)[:60]
    with pytest.raises(BudgetError, match=r"--dense-layers 2: 2 of 4 layers with all 561 tokens and 63 .* 1248 .* --kv-budget 128 has 512; take --kv-budget 312, "):
        play(model, first, "clusterkv", BUDGET, 501, dense_layers=2)
    events = play(model, first, "clusterkv", 312, 501, watch=lambda engine, _: engine.cancel(), dense_layers=2)
    assert events[-1].cache.layer_cells == (561, 561, 63, 63)


def test_what_leaves_is_bounded_by_kv_ram_before_anything_is_allocated(model, prompt, long_reply):  # noqa: F811
    first, needed = short(prompt)[:60], (60 + 100) * 4 * 512
    with pytest.raises(StorageError, match="--kv-ram 319 KiB: a text of 160 tokens may need 320 KiB of RAM.*give --kv-ram that much, or a smaller -n"):
        play(model, first, "clusterkv", BUDGET, 100, kv_ram=needed - 1024)
    assert play(model, first, "clusterkv", BUDGET, 100, kv_ram=needed)[-1].cache.ram_bytes > 0
    play(model, first[:20], "clusterkv", BUDGET, 100, kv_ram=0)


def test_the_tier_is_gone_when_the_reply_is(model, prompt, long_reply):  # noqa: F811
    engine = Engine(model, EngineConfig(policy="clusterkv", kv_budget=BUDGET, threads=1))
    try:
        stream = engine.generate(short(prompt)[:60], SamplingParams(), 150)
        while not isinstance(next(stream), HeadsEvicted):
            pass
        tier = engine.generation.cache.tier
        assert tier._rows.nbytes == tier.need_bytes > 0
        list(engine.generate(short(prompt)[:50], SamplingParams(), 3))
        assert tier._rows.nbytes == 0
        assert engine.generation.cache.tier._rows.nbytes == 0
    finally:
        engine.close()


# ---------------------------------------------------------------- what is refused


def test_what_has_no_meaning_is_refused_by_name(model, prompt, tmp_path):
    with pytest.raises(UsageError, match="--dense-layers 1.*rkv.*clusterkv"):
        EngineConfig(policy="rkv", dense_layers=1)
    with pytest.raises(UsageError, match="--dense-layers -1: must be at least 0"):
        EngineConfig(policy="clusterkv", dense_layers=-1)
    with pytest.raises(UsageError, match="--kv-type q8_0.*clusterkv"):
        EngineConfig(policy="clusterkv", kv_type="q8_0")
    engine = Engine(model, EngineConfig(policy="clusterkv", kv_budget=BUDGET, threads=1))
    try:
        with pytest.raises(UsageError, match="--policy clusterkv has no conversations"):
            engine.generate(prompt, SamplingParams(), 5, room_tokens=2000)
        next(engine.generate(short(prompt), SamplingParams(), 5))
        with pytest.raises(UsageError, match="--policy clusterkv cannot be saved"):
            engine.save(tmp_path / "session")
    finally:
        engine.close()
