"""Which tokens stay: every per-head policy against the slow reference, on drawn layers with holes, ties and pins."""

import ast
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as settings_of_tests
from hypothesis import strategies as st

import heads_reference as slow
from zoomr_local.policies import heads
from zoomr_local.policies.heads import HEAD_POLICIES, Accumulated, HeadSettings, LayerView
from zoomr_local.policies.heads.attention import max_pool, observed
from zoomr_local.policies.heads.rkv import newest_similar, redundancy

TOKEN_POLICIES = [name for name, policy in HEAD_POLICIES.items() if policy.drops]


def layer(rng, n_kv_head=2, group=3, m=20, d=4, w=5, coarse=False, holes=0.2, pinned=0.2):
    """A layer in which cells stand in any order and some are empty. ``coarse`` numbers are small integers: many ties."""
    numbers = (lambda *shape: rng.integers(-1, 2, shape) if coarse else rng.standard_normal(shape))
    valid = rng.random((n_kv_head, m)) >= holes
    positions = np.stack([rng.permutation(3 * m)[:m] for _ in range(n_kv_head)]).astype(np.int32)
    n_head = n_kv_head * group
    keys, queries = numbers(n_kv_head, m, d).astype(np.float32), numbers(w, n_head, d).astype(np.float32)
    logits = np.einsum("whgd,hmd->whgm", queries.reshape(w, n_kv_head, group, d), keys) * d**-0.5
    parts = np.exp(logits) * valid[:, None]
    weights = parts / np.maximum(parts.sum(-1, keepdims=True), 1e-30)
    return LayerView(
        positions, valid, (rng.random((n_kv_head, m)) < pinned), weights.reshape(w, n_head, m).astype(np.float32), keys,
        queries, np.round(parts.sum((0, 2)), 1 if coarse else 9),
    )  # fmt: skip


def reference_scores(name, view, settings, h):
    """One head's tokens and scores by the slow way."""
    tokens = slow.tokens_of(view.positions[h], view.valid[h], view.pinned[h], view.keys[h])
    s = settings
    if name == "h2o":
        return tokens, [float(view.accumulated[h, token["place"]]) for token in tokens]
    group = view.weights.shape[1] // len(view.positions)
    mine = slice(h * group, (h + 1) * group)
    if s.group_pool == "logits":
        queries = view.queries[:, mine].astype(float).tolist()
        scale = view.scale or view.keys.shape[-1] ** -0.5
        votes = slow.importance_from_queries(tokens, queries, scale, s.observation_tokens, s.pool_tokens)
    else:
        votes = slow.importance_from_weights(tokens, view.weights[:, mine], s.observation_tokens, s.pool_tokens)
    if name == "snapkv":
        return tokens, votes
    return tokens, slow.rkv_scores(tokens, votes, s.similarity_threshold, s.importance_share)


def reference_kept(name, view, settings, budgets):
    kept = np.zeros_like(view.valid)
    for h, budget in enumerate(budgets):
        tokens, scores = reference_scores(name, view, settings, h)
        recent = settings.observation_tokens
        if name == "h2o":
            n_pinned = sum(token["pinned"] for token in tokens) if settings.pin_prompt else 0
            recent = slow.h2o_recent(budget, n_pinned, settings.heavy_share)
        kept[h, sorted(slow.keep(tokens, scores, budget, recent, settings.pin_prompt))] = True
    return kept


def enough(view, settings):
    """Per head the least budget that holds pinned tokens and the newest one."""
    least = []
    for h in range(len(view.positions)):
        tokens = slow.tokens_of(view.positions[h], view.valid[h], view.pinned[h])
        pinned = [token["pinned"] and settings.pin_prompt for token in tokens]
        least.append(sum(pinned) + (bool(tokens) and not pinned[-1]))
    return least


@st.composite
def cases(draw):
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    view = layer(
        rng, draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.integers(1, 18)), draw(st.integers(1, 4)),
        draw(st.integers(0, 5)), draw(st.booleans()), draw(st.sampled_from([0, 0.3, 1])), draw(st.sampled_from([0, 0.3])),
    )  # fmt: skip
    settings = HeadSettings(
        pin_prompt=draw(st.booleans()), observation_tokens=draw(st.integers(1, 6)), pool_tokens=draw(st.sampled_from([1, 3, 7])),
        group_pool=draw(st.sampled_from(["logits", "weights"])), importance_share=draw(st.sampled_from([0, 0.1, 0.5, 1])),
        similarity_threshold=draw(st.sampled_from([-1, 0, 0.5, 1])), heavy_share=draw(st.sampled_from([0, 0.5, 1])),
    )  # fmt: skip
    least = enough(view, settings)
    budgets = [draw(st.integers(low, low + 12)) for low in least]
    return view, settings, budgets


@settings_of_tests(deadline=None, max_examples=100)
@given(cases())
@pytest.mark.parametrize("name", TOKEN_POLICIES)
def test_whatever_the_layer_the_kept_cells_are_the_references(name, case):
    view, settings, budgets = case
    before = [np.copy(a) for a in (view.positions, view.valid, view.pinned, view.weights, view.keys, view.queries, view.accumulated)]
    kept = HEAD_POLICIES[name](settings).keep(view, np.array(budgets))
    assert (kept == reference_kept(name, view, settings, budgets)).all()
    assert (kept.sum(axis=1) == np.minimum(view.counts, budgets)).all() and not (kept & ~view.valid).any()
    after = (view.positions, view.valid, view.pinned, view.weights, view.keys, view.queries, view.accumulated)
    assert all((a == b).all() for a, b in zip(before, after, strict=True)), "a policy changes nothing that it sees"


@pytest.mark.parametrize("coarse", [False, True])
@pytest.mark.parametrize("name", TOKEN_POLICIES)
def test_a_long_layer_is_chosen_as_by_the_reference(name, coarse):
    """Longer than the block in which similar keys are looked for."""
    view = layer(np.random.default_rng(7), m=300, d=3, coarse=coarse, pinned=0.05)
    settings = HeadSettings(observation_tokens=4)
    budgets = [90, 140]
    kept = HEAD_POLICIES[name](settings).keep(view, np.array(budgets))
    assert (kept == reference_kept(name, view, settings, budgets)).all() and kept.sum(axis=1).tolist() == budgets


@pytest.mark.parametrize("pool", ["logits", "weights"])
def test_scores_are_the_formulas(pool):
    view = layer(np.random.default_rng(3), m=40)
    settings = HeadSettings(group_pool=pool)
    aged = view.taken(view.order())
    for name in ("snapkv", "rkv"):
        scores = HEAD_POLICIES[name](settings).scores(aged)
        for h in range(len(scores)):
            _, expected = reference_scores(name, view, settings, h)
            assert scores[h, : len(expected)] == pytest.approx(expected, abs=1e-13)
            assert (scores[h, len(expected):] == 0).all()


def test_without_groups_weights_and_logits_are_one():
    view = layer(np.random.default_rng(4), group=1, m=30)
    aged = view.taken(view.order())
    by_weights = observed(aged, HeadSettings(group_pool="weights"))
    assert observed(aged, HeadSettings(group_pool="logits")) == pytest.approx(by_weights, abs=1e-6)
    assert by_weights.max() > 0.05


def test_the_scale_of_the_attention_counts():
    view = layer(np.random.default_rng(5), m=30)
    aged = view.taken(view.order())
    other = LayerView(aged.positions, aged.valid, aged.pinned, None, aged.keys, aged.queries, scale=2.0)
    assert observed(other, HeadSettings()) != pytest.approx(observed(aged, HeadSettings()), abs=1e-3)
    tokens = slow.tokens_of(aged.positions[0], aged.valid[0], aged.pinned[0], aged.keys[0])
    expected = slow.importance_from_queries(tokens, aged.queries[:, :3].astype(float).tolist(), 2.0, 8, 7)
    assert observed(other, HeadSettings())[0, : len(expected)] == pytest.approx(expected, abs=1e-13)


def test_pooling_stays_within_the_candidates():
    scores, candidates = np.array([[1.0, 9, 2, 0, 8]]), np.array([[True, True, True, True, False]])
    assert max_pool(scores, candidates, 3).tolist() == [[9, 9, 9, 2, 0]]


def test_the_newest_similar_key_is_found_across_blocks():
    unit = np.zeros((300, 2))
    unit[:, 0] = 1
    unit[5], unit[290] = [0, 1], [0, 1]
    found = newest_similar(unit, 0.5)
    assert found[5] == 290 and found[290] == 5 and found[0] == 299 and found[299] == 298 and (found[6:290] == 299).all()
    assert newest_similar(np.eye(3), 0.5).tolist() == [0, 0, 0], "without a similar key the oldest is named"
    assert newest_similar(np.array([[1, 0], [0.5 + 1e-14, 0.866]]), 0.5)[0] == 0, "within rounding of the threshold is not above it"
    assert newest_similar(np.array([[1, 0], [0.5 + 1e-9, 0.866]]), 0.5)[0] == 1


def test_a_key_without_a_similar_one_forgives_the_oldest():
    keys = np.array([[[1, 0], [0.6, 0.8], [0, 1], [0.8, -0.6]]], np.float32)
    found = redundancy(keys, np.array([4]), 0.99)[0]
    tokens = slow.tokens_of(np.arange(4), np.ones(4), np.zeros(4), keys[0])
    assert found == pytest.approx(slow.redundancy(tokens, 0.99), abs=1e-13)


def test_keys_that_repeat_are_redundant():
    keys = np.array([[[1, 0], [1, 0.01], [1, -0.01], [-1, 0.5]]], np.float32)
    shares = redundancy(keys, np.array([4]), 0.5)[0]
    assert shares.argmin() == 3 and shares.sum() == pytest.approx(1)
    assert shares[2] < shares[0], "the newest of the similar keys is forgiven"


def test_h2o_keeps_heavy_and_recent_tokens_in_equal_parts():
    view = layer(np.random.default_rng(0), 1, 1, 10, holes=0, pinned=0)
    sums = np.zeros((1, 10))
    order = view.order()[0]
    sums[0, order[:3]] = [5, 9, 7]
    view = LayerView(view.positions, view.valid, view.pinned, accumulated=sums)
    kept = HEAD_POLICIES["h2o"]().keep(view, np.array([4]))
    assert sorted(np.flatnonzero(kept[0])) == sorted(order[[1, 2, 8, 9]])
    kept = HEAD_POLICIES["h2o"](HeadSettings(heavy_share=1)).keep(view, np.array([3]))
    assert sorted(np.flatnonzero(kept[0])) == sorted(order[[1, 2, 9]]), "the newest token stays also where all are to be heavy"


@settings_of_tests(deadline=None, max_examples=60)
@given(st.integers(0, 2**32), st.integers(1, 2), st.integers(1, 3))
def test_accumulated_attention_follows_tokens_through_their_cells(seed, n_kv_head, group):
    """Against a dictionary of sums by position: tokens come, move to other cells, and go."""
    rng = np.random.default_rng(seed)
    m, sums, state = 6, [{} for _ in range(n_kv_head)], Accumulated(n_kv_head)
    cells = [[None] * m for _ in range(n_kv_head)]
    for position in range(14):
        for h in range(n_kv_head):
            if rng.random() < 0.3:
                cells[h] = [cells[h][i] for i in rng.permutation(m)]
            free = [c for c in range(m) if cells[h][c] is None] or [int(rng.integers(m))]
            cells[h][free[0]] = position
        valid = np.array([[p is not None for p in head] for head in cells])
        positions = np.array([[77 if p is None else p for p in head] for head in cells], np.int32)
        weights = rng.integers(0, 9, (n_kv_head * group, m)).astype(np.float32)
        state.add(positions, valid, weights)
        for h in range(n_kv_head):
            sums[h] = {p: sums[h].get(p, 0) + weights[h * group: (h + 1) * group, c].sum() for c, p in enumerate(cells[h]) if p is not None}
        expected = [[0 if p is None else sums[h][p] for p in head] for h, head in enumerate(cells)]
        assert (state.sums == expected).all()
        if position == 7:
            other = Accumulated(n_kv_head)
            other.restore({name: array.copy() for name, array in state.state().items()})
            state = other
    shuffled = np.stack([rng.permutation(m) for _ in range(n_kv_head)])
    at = state.at(np.take_along_axis(positions, shuffled, 1), np.take_along_axis(valid, shuffled, 1))
    assert (at == np.take_along_axis(state.sums, shuffled, 1)).all()


def test_a_view_of_more_cells_than_before_keeps_the_sums():
    state = Accumulated(1)
    state.add(np.array([[0, 1]]), np.array([[True, True]]), np.array([[0.25, 0.5]]))
    assert state.at(np.array([[0, 1, 2]]), np.array([[True, True, True]])).tolist() == [[0.25, 0.5, 0]]
    with pytest.raises(ValueError, match="KV heads"):
        Accumulated(2).restore(state.state())


@pytest.mark.parametrize("name", TOKEN_POLICIES)
def test_pins_are_kept_only_if_the_setting_says_so(name):
    view = layer(np.random.default_rng(8), m=30, pinned=0.3)
    budgets = view.pinned.sum(axis=1) + 8
    pinned = view.pinned & view.valid
    assert (HEAD_POLICIES[name]().keep(view, budgets) & pinned == pinned).all()
    off = HEAD_POLICIES[name](HeadSettings(pin_prompt=False)).keep(view, budgets)
    assert (off & pinned).sum() < pinned.sum()


@pytest.mark.parametrize("name", TOKEN_POLICIES)
def test_the_newest_token_stays_and_what_cannot_fit_is_refused(name):
    view = layer(np.random.default_rng(9), m=16, holes=0)
    policy = HEAD_POLICIES[name]()
    least = np.array(enough(view, policy.settings))
    kept = policy.keep(view, least)
    assert np.take_along_axis(kept, view.order()[:, -1:], 1).all()
    with pytest.raises(ValueError, match=f"KV head 1: a budget of {least[1] - 1} cells cannot hold {least[1]} pinned"):
        policy.keep(view, least - [0, 1])


@pytest.mark.parametrize("name", TOKEN_POLICIES)
def test_a_view_without_what_a_policy_needs_is_refused_by_name(name):
    full = layer(np.random.default_rng(2))
    bare = LayerView(full.positions, full.valid, full.pinned)
    policy = HEAD_POLICIES[name]()
    with pytest.raises(ValueError, match=" and ".join(f for f in ("keys", "queries", "accumulated") if f in policy.needs)):
        policy.keep(bare, np.array(enough(full, policy.settings)))
    given_all = {name: getattr(full, name) for name in policy.needs}
    policy.keep(LayerView(full.positions, full.valid, full.pinned, **given_all), np.array([12, 12]))


@pytest.mark.parametrize(("field", "shape"), [("valid", (2, 3)), ("keys", (1, 4, 2)), ("weights", (1, 2, 3)), ("queries", (2, 2, 2))])
def test_arrays_that_do_not_belong_together_are_refused(field, shape):
    arrays = {"valid": np.ones((2, 4), bool), "pinned": np.zeros((2, 4), bool), "keys": np.zeros((2, 4, 2)),
              "weights": np.zeros((1, 2, 4)), "queries": np.zeros((1, 2, 2))}
    LayerView(np.zeros((2, 4), np.int32), **arrays)
    with pytest.raises(ValueError, match=field):
        LayerView(np.zeros((2, 4), np.int32), **{**arrays, field: np.zeros(shape)})


def test_query_heads_must_share_evenly():
    with pytest.raises(ValueError, match="3 query heads cannot share 2 KV heads"):
        LayerView(np.zeros((2, 4), np.int32), np.ones((2, 4), bool), np.zeros((2, 4), bool), weights=np.zeros((1, 3, 4)))


@pytest.mark.parametrize(("field", "value"), [
    ("evict_every_tokens", 0), ("pool_tokens", 4), ("importance_share", 1.5), ("demand_mass", 0), ("layer_most", 0.5),
    ("group_pool", "sum"), ("cluster_group", "sum"), ("similarity_threshold", 2), ("head_power", -1), ("layer_power", float("nan")),
])  # fmt: skip
def test_settings_outside_their_range_are_refused(field, value):
    with pytest.raises(ValueError, match=field):
        HeadSettings(**{field: value})


def test_every_policy_has_a_name_and_a_headline():
    assert list(HEAD_POLICIES) == [p.name for p in HEAD_POLICIES.values()] and all(p.headline for p in HEAD_POLICIES.values())
    assert all(p.unit == "head" and p.drops != p.recalls for p in HEAD_POLICIES.values())


def test_per_head_policies_import_numpy_and_their_own_folder_only():
    """Beside the standard library's text and number modules: no files, no processes, no model."""
    folder = Path(heads.__file__).parent
    for path in folder.glob("*.py"):
        nodes = list(ast.walk(ast.parse(path.read_text())))
        names = {a.name for node in nodes if isinstance(node, ast.Import) for a in node.names}
        names |= {f"{'.' * node.level}{node.module or ''}" for node in nodes if isinstance(node, ast.ImportFrom)}
        outside = {name for name in names if not (name.startswith(".") and not name.startswith(".."))}
        assert outside <= {"__future__", "dataclasses", "json", "math", "numpy", "typing"}, path
