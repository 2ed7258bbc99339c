"""ClusterKV's clusters, selections and cache, and the recall measure, against the slow reference."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as settings_of_tests
from hypothesis import strategies as st

import heads_reference as slow
from zoomr_local.policies.heads import ClusterCache, ClusterKV, Clusters, HeadSettings
from zoomr_local.policies.heads.clusterkv import take
from zoomr_local.policies.heads.kmeans import draw_first, kmeans
from zoomr_local.policies.heads.recall import recall_rate, select_blocks, select_pages


def drawn(seed, *shape, coarse=False):
    rng = np.random.default_rng(seed)
    return (rng.integers(-1, 2, shape) if coarse else rng.standard_normal(shape)).astype(np.float32)


def clustered(policy, n_kv_head=2, d=4, prompt=40, windows=(12, 7), coarse=False, pinned=0, seed=0):
    """A layer's clusters of a prompt and of windows after it, and all keys by position."""
    keys = drawn(seed, n_kv_head, prompt + sum(windows), d, coarse=coarse)
    clusters = Clusters(n_kv_head, d)
    policy.begin(clusters, np.arange(prompt), keys[:, :prompt], np.arange(prompt) < pinned, layer=3)
    at = prompt
    for n in windows:
        policy.grow(clusters, np.arange(at, at + n), keys[:, at: at + n], layer=3)
        at += n
    return clusters, keys


SMALL = HeadSettings(sink_tokens=4, prefill_cluster_tokens=6, cluster_every_tokens=12, clusters_added=3, kmeans_iterations=4)


# ---------------------------------------------------------------- k-means


@settings_of_tests(deadline=None, max_examples=50)
@given(st.integers(0, 2**32), st.integers(1, 3), st.integers(1, 25), st.integers(1, 3), st.booleans(), st.integers(1, 6), st.data())
def test_kmeans_is_the_references_head_by_head(seed, n_kv_head, n, d, coarse, iterations, data):
    keys = drawn(seed, n_kv_head, n, d, coarse=coarse)
    first = draw_first(n_kv_head, n, data.draw(st.integers(1, min(n, 6))), (seed,))
    centroids, labels = kmeans(keys, first, iterations)
    for h in range(n_kv_head):
        expected, expected_labels = slow.kmeans(keys[h].astype(float).tolist(), first[h].tolist(), iterations)
        assert labels[h].tolist() == expected_labels
        assert centroids[h] == pytest.approx(np.array(expected), abs=1e-12)


def test_first_centroids_are_different_keys_and_the_same_every_time():
    first = draw_first(3, 50, 20, (1, 2))
    assert all(len(set(head)) == 20 and sorted(head) == list(head) for head in first.tolist())
    assert (first == draw_first(3, 50, 20, (1, 2))).all() and (first != draw_first(3, 50, 20, (1, 3))).any()
    assert first.tolist()[0] != first.tolist()[1]


def test_keys_that_point_the_same_way_share_a_cluster_whatever_their_length():
    keys = np.array([[[1, 0], [0, 1], [9, 0.1], [0.1, 7], [0, 0]]], np.float32)
    centroids, labels = kmeans(keys, np.array([[0, 1]]), 20)
    assert labels.tolist() == [[0, 1, 0, 1, 0]], "a key of length 0 goes to the first"
    assert centroids[0, 1] == pytest.approx([0.05, 4])


def test_an_empty_cluster_stays_what_it_was():
    keys = np.array([[[1, 0], [2, 0], [3, 0], [0, 1]]], np.float32)
    centroids, labels = kmeans(keys, np.array([[0, 1, 3]]), 5)
    assert labels.tolist() == [[0, 0, 0, 2]] and centroids[0].tolist() == [[2, 0], [2, 0], [0, 1]]


# ---------------------------------------------------------------- clusters of a layer


@settings_of_tests(deadline=None, max_examples=50)
@given(st.integers(0, 2**32), st.booleans(), st.integers(0, 12), st.booleans(), st.lists(st.integers(1, 15), max_size=3))
def test_a_layers_clusters_are_the_references_of_each_piece(seed, coarse, pinned, pin_prompt, windows):
    s = HeadSettings(sink_tokens=4, prefill_cluster_tokens=6, cluster_every_tokens=12, clusters_added=3, kmeans_iterations=4,
                     pin_prompt=pin_prompt, seed=5)  # fmt: skip
    clusters, keys = clustered(ClusterKV(s), prompt=30, windows=windows, coarse=coarse, pinned=pinned, seed=seed)
    kept = max(4, pinned if pin_prompt else 0)
    assert clusters.kept.tolist() == list(range(kept))
    assert clusters.positions.tolist() == list(range(kept, 30 + sum(windows)))
    at, done = kept, 0
    for n, wanted in [(30 - kept, max(1, (30 - kept) // 6)), *((w, max(1, math.floor(w * 3 / 12 + 0.5))) for w in windows)]:
        first = draw_first(2, n, min(wanted, n), (5, 3, at))
        for h in range(2):
            centroids, labels = slow.kmeans(keys[h, at: at + n].astype(float).tolist(), first[h].tolist(), 4)
            assert clusters.labels[h, at - kept: at - kept + n].tolist() == [done + label for label in labels]
            assert clusters.centroids[h, done: done + len(centroids)] == pytest.approx(np.array(centroids), abs=1e-6)
        at, done = at + n, done + min(wanted, n)
    assert clusters.n_clusters == done and (clusters.sizes.sum(axis=1) == len(clusters.positions)).all()


def test_a_prompt_that_is_all_kept_has_no_clusters():
    policy = ClusterKV()
    clusters, _ = clustered(policy, prompt=16, windows=())
    assert clusters.n_clusters == 0 and len(clusters.kept) == 16
    found = policy.select(clusters, drawn(0, 4, 4), 20, 2)
    assert found.tokens.shape == (2, 0) and [c.tolist() for c in found.clusters] == [[], []]
    clusters, _ = clustered(policy, prompt=0, windows=(9,))
    assert clusters.n_clusters == 1 and clusters.positions.tolist() == list(range(9))


def test_tokens_come_in_order():
    clusters, keys = clustered(ClusterKV(SMALL))
    for positions in ([5], [58], [60, 60], [61, 60]):
        with pytest.raises(ValueError, match="not ascending"):
            clusters.append(np.array(positions), keys[:, : len(positions)], 1, 1, (0,))
    clusters.append(np.array([59]), keys[:, :1], 4, 1, (0,))


def test_clusters_and_cache_survive_as_arrays():
    policy = ClusterKV(SMALL)
    clusters, _ = clustered(policy)
    again = Clusters.restored({name: array.copy() for name, array in clusters.state().items()})
    assert all((again.state()[name] == array).all() for name, array in clusters.state().items())
    new = drawn(9, 2, 8, 4)
    for one in (clusters, again):
        policy.grow(one, np.arange(59, 67), new)
    queries = drawn(1, 4, 4)
    a, b = (policy.select(one, queries, 30, 5) for one in (clusters, again))
    assert (a.tokens == b.tokens).all() and (again.labels == clusters.labels).all()
    state = clusters.state()
    with pytest.raises(ValueError, match="labels"):
        Clusters.restored({**state, "positions": state["positions"][1:]})
    with pytest.raises(ValueError, match="outside"):
        Clusters.restored({**state, "labels": state["labels"] + 99})


# ---------------------------------------------------------------- selection


@settings_of_tests(deadline=None, max_examples=50)
@given(st.integers(0, 2**32), st.booleans(), st.integers(1, 3), st.lists(st.integers(9, 70), min_size=2, max_size=2), st.sampled_from(["mean", "max"]))
def test_a_selection_is_the_references(seed, coarse, group, budgets, pool):
    policy = ClusterKV(HeadSettings(**{**SMALL.__dict__, "cluster_group": pool}))
    clusters, _ = clustered(policy, coarse=coarse, seed=seed)
    queries = drawn(seed + 1, 2 * group, 4, coarse=coarse)
    found = policy.select(clusters, queries, np.array(budgets), 5)
    for h, budget in enumerate(budgets):
        tokens, taken, trimmed = slow.select_clusters(
            clusters.centroids[h].astype(float).tolist(), clusters.labels[h].tolist(),
            queries[h * group: (h + 1) * group].astype(float).tolist(), budget - 4 - 5, pool,
        )  # fmt: skip
        assert set(np.flatnonzero(found.tokens[h])) == tokens
        assert found.clusters[h].tolist() == taken and found.trimmed[h] == trimmed
        assert found.tokens[h].sum() == min(budget - 9, len(clusters.positions))


def test_of_the_last_cluster_the_oldest_tokens_stay():
    clusters, _ = clustered(ClusterKV(SMALL))
    found = ClusterKV(SMALL).select(clusters, drawn(3, 4, 4), 20, 3)
    for h in range(2):
        last = clusters.members[h, clusters.starts[h, found.clusters[h][-1]]: clusters.starts[h, found.clusters[h][-1] + 1]]
        held = found.tokens[h, last]
        assert found.trimmed[h] == (~held).sum() and (np.diff(held.astype(int)) <= 0).all()
    assert found.trimmed.any()


def taken(scores, sizes, room):
    order, n, over = take(np.array([scores], float), np.array([sizes]), np.array([room]))
    return order[0, : n[0]].tolist(), over[0]


def test_taking_clusters():
    scores, sizes = [1.0, 3, 3, 2], [5, 0, 4, 6]
    assert taken(scores, sizes, 12) == ([2, 3, 0], 3)
    assert taken(scores, sizes, 10) == ([2, 3], 0)
    assert taken(scores, sizes, 99) == ([2, 3, 0], 0)
    assert taken(scores, sizes, 0) == ([], 0) and taken([0, 0], [3, 3], 4) == ([0, 1], 2)


def test_scores_that_differ_by_rounding_are_equal():
    """The three query heads add up to 1 + 2^-52 for both clusters, which the first one's sum misses."""
    tiny = 2.0**-53
    clusters = Clusters.restored({
        "kept": np.zeros(0), "positions": np.arange(2), "labels": np.array([[0, 1]]), "centroids": np.eye(2)[None],
    })  # fmt: skip
    queries = np.array([[1, tiny], [tiny, tiny], [tiny, 1]], np.float32)
    assert ClusterKV().select(clusters, queries, 1, 0).clusters[0].tolist() == [0]


def test_a_budget_must_hold_kept_and_newest_tokens():
    policy = ClusterKV(SMALL)
    clusters, _ = clustered(policy)
    assert not policy.select(clusters, drawn(3, 4, 4), 9, 5).tokens.any()
    with pytest.raises(ValueError, match="a budget of 8 cells cannot hold 9 kept and newest"):
        policy.select(clusters, drawn(3, 4, 4), [20, 8], 5)


def test_the_window_shrinks_with_the_budget():
    policy = ClusterKV()
    assert policy.window_tokens(1024, 16) == 320 and policy.window_tokens(256, 16) == 120 and policy.window_tokens(18, 16) == 1
    with pytest.raises(ValueError, match="17 tokens with 16 kept ones leaves clusterkv no room"):
        policy.window_tokens(17, 16)
    clusters, _ = clustered(policy, prompt=16, windows=(320, 120, 10))
    assert clusters.n_clusters == 8 + 3 + 1


# ---------------------------------------------------------------- cache


@settings_of_tests(deadline=None, max_examples=50)
@given(st.integers(0, 3), st.integers(1, 3), st.integers(1, 8), st.data())
def test_the_hit_rate_is_the_references(steps, n_head, length, data):
    some = st.lists(st.integers(0, 6), min_size=1, max_size=5, unique=True)
    history = [[data.draw(some) for _ in range(n_head)] for _ in range(length)]
    cache, split = ClusterCache(steps), data.draw(st.integers(0, length))
    for t, chosen in enumerate(history):
        if t == split:
            cache = ClusterCache.restored({name: array.copy() for name, array in cache.state().items()})
        missing = cache.step([np.array(head) for head in chosen])
        for h in range(n_head):
            before = set().union(*(history[s][h] for s in range(max(0, t - steps), t)))
            assert missing[h].tolist() == sorted(set(chosen[h]) - before)
    rates = slow.hit_rates(history, steps) if steps else []
    assert cache.counted_steps == len(rates)
    assert cache.hit_rate == (pytest.approx(sum(rates) / len(rates)) if rates else None)


def test_a_cache_of_other_arrays_is_refused():
    cache = ClusterCache(1)
    cache.step([np.array([1, 2])])
    with pytest.raises(ValueError, match="clusters"):
        ClusterCache.restored({**cache.state(), "clusters": np.array([1])})


# ---------------------------------------------------------------- recall


@settings_of_tests(deadline=None, max_examples=50)
@given(st.integers(0, 2**32), st.integers(1, 3), st.integers(1, 3), st.integers(0, 30), st.booleans(), st.integers(1, 7), st.integers(0, 40))
def test_recall_and_selectors_are_the_references(seed, n_kv_head, group, n, coarse, size, budget):
    keys, queries = drawn(seed, n_kv_head, n, 3, coarse=coarse), drawn(seed + 1, n_kv_head * group, 3, coarse=coarse)
    attention = np.einsum("hgd,hnd->hgn", queries.reshape(n_kv_head, group, 3), keys).reshape(n_kv_head * group, n)
    for fast, obvious in ((select_pages, slow.quest_pages), (select_blocks, slow.mean_blocks)):
        selected = fast(queries, keys, budget, size)
        rates = recall_rate(selected, attention, budget)
        assert selected.shape == (n_kv_head, n) and rates.shape == (n_kv_head * group,)
        for h in range(n_kv_head):
            mine = queries[h * group: (h + 1) * group].astype(float).tolist()
            expected = obvious(mine, keys[h].astype(float).tolist(), budget, size)
            assert set(np.flatnonzero(selected[h])) == expected and len(expected) <= budget
            for g in range(group):
                assert rates[h * group + g] == pytest.approx(slow.recall(expected, attention[h * group + g], budget))


def test_recall_of_a_known_selection():
    selected = np.array([[True, True, False, False]])
    attention = np.array([[4, 3, 2, 1], [1, 2, 3, 4], [5, 0, 5, 0]])
    assert recall_rate(selected, attention, 2).tolist() == [1, 0, 0.5]
    assert recall_rate(selected, attention, 9).tolist() == [0.5, 0.5, 0.5]
    assert recall_rate(selected, attention, 0).tolist() == [1, 1, 1]
    assert recall_rate(selected, np.zeros((1, 4)), 2).tolist() == [1], "of equal tokens the older"


def test_a_page_that_is_not_full_is_bounded_by_its_own_keys():
    keys = np.array([[[-1], [-2], [-3]]], np.float32)
    assert select_pages(np.ones((1, 1)), keys, 2, 2).tolist() == [[True, True, False]]


def test_clusters_recall_more_than_pages_where_like_keys_are_far_apart():
    """What the paper claims, on keys made for it: tokens of eight directions in turn."""
    rng = np.random.default_rng(2)
    directions = np.linalg.qr(rng.standard_normal((16, 16)))[0][:8]
    keys = (directions[np.arange(320) % 8] + 0.05 * rng.standard_normal((1, 320, 16))).astype(np.float32)
    query = (9 * directions[:1]).astype(np.float32)
    s = HeadSettings(sink_tokens=0, prefill_cluster_tokens=16)
    clusters = Clusters(1, 16)
    policy = ClusterKV(s)
    policy.begin(clusters, np.arange(320), keys, np.zeros(320, bool))
    attention = query @ keys[0].T
    by_cluster = recall_rate(policy.select(clusters, query, 48, 0).tokens, attention, 48)
    assert by_cluster[0] > 0.8 > 0.4 > recall_rate(select_pages(query, keys, 48), attention, 48)[0]
