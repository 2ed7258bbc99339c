"""Recall of the tokens with most attention: what is recorded is what the engine attends by, and each selector is what it is called."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.append(str(Path(__file__).resolve().parent.parent))  # benchmarks are not installed

from benchmarks import recall  # noqa: E402
from zoomr_local.libllama.heads import HeadStore  # noqa: E402

N_LAYER, N_HEAD, N_KV, D, PROMPT, T = 2, 4, 2, 8, 40, 400


@pytest.fixture(scope="module")
def trace():
    rng = np.random.default_rng(3)
    return recall.Trace(PROMPT, rng.normal(size=(T, N_LAYER, N_HEAD, D)), rng.normal(size=(N_LAYER, N_KV, T, D)), np.full(N_LAYER, D**-0.5))


def selectors(trace, step, budgets=(32, 96)):
    found = recall.Selectors(trace, 1, budgets, np.random.default_rng(0))
    found.at(step)
    return found


def test_the_attention_is_the_engines(model, prompt, monkeypatch):
    """Of the last token of a reply, against the weights that the store itself observes in the same decode."""
    seen = {}
    made, queries = HeadStore.__init__, HeadStore.queries

    def watched(store, context, n, **given):
        made(store, context, n, **{**given, "weights": True})

    def read(store):
        seen["weights"] = [store.weights(layer)[0].copy() for layer in range(store.n_layers)]
        seen["cells"] = [store.resident(layer, 0)[0] for layer in range(store.n_layers)]
        return queries(store)

    monkeypatch.setattr(HeadStore, "__init__", watched)
    monkeypatch.setattr(HeadStore, "queries", read)
    found = recall.record(model, prompt[:90], 12)
    last = len(found.queries) - 1
    assert found.prompt_tokens == 90 < last and found.keys.shape[2] == last + 1
    for layer in range(4):
        true = seen["weights"][layer][:, seen["cells"][layer]][:, :last].astype(np.float64)
        np.testing.assert_allclose(recall.softmax(found.logits(layer, last)), true / true.sum(axis=1, keepdims=True), atol=2e-3)


def test_clusters_grow_as_the_policy_makes_them(trace):
    """A budget of 32: 16 sinks, 8 newest tokens at most, and of 40 prompt tokens 24 are clustered at once."""
    grown = recall.Growing(selectors(trace, 50).policy, trace, 0, 32)
    assert grown.window == 8 and list(grown.clusters.kept) == list(range(16)) and list(grown.clusters.positions) == list(range(16, 40))
    assert grown.advance(47) == 7 and len(grown.clusters.positions) == 24
    assert grown.advance(48) == 0 and len(grown.clusters.positions) == 32  # a window that is full is clustered
    assert grown.advance(57) == 1 and list(grown.clusters.positions) == list(range(16, 56))
    selected = grown.selected(trace.queries[57, 0], 57)
    assert selected[:, :16].all() and selected[:, 56].all() and (selected.sum(axis=1) <= 32).all() and selected[:, 16:56].any()


@pytest.mark.parametrize("name", recall.BY_QUERY)
def test_no_selector_takes_more_than_its_budget_and_it_looks_at_its_query(trace, name):
    looked = selectors(trace, 371, (64, 96))
    for budget in (64, 96):
        one, other = (looked.by_query(name, trace.queries[at, 1], budget) for at in (371, 300))
        assert one.shape == (N_KV, 371) and (one.sum(axis=1) <= budget).all() and (one.sum(axis=1) > budget // 2).all()
        assert (one != other).any()


@pytest.mark.parametrize("name", recall.CONTROLS)
def test_the_controls_take_exactly_the_budget(trace, name):
    assert (selectors(trace, 371).control(name, trace.logits(1, 371), 96).sum(axis=1) == 96).all()


def test_pages_with_kept_tokens_have_the_sinks_and_newest_of_the_clusters(trace):
    looked = selectors(trace, 371)
    clusters, pages = (looked.by_query(name, trace.queries[371, 1], 96) for name in ("clusters", "pages, kept"))
    newest = looked.growing[96].advance(371)
    assert 0 < newest < 40
    for selected in (clusters, pages):
        assert selected[:, :16].all() and selected[:, -newest:].all()


def test_pages_and_blocks_are_whole(trace):
    looked = selectors(trace, 384)
    for name, size in (("pages", 16), ("blocks of 16", 16), ("blocks of 32", 32)):
        selected = looked.by_query(name, trace.queries[384, 1], 96)
        assert set(selected.reshape(-1, size).sum(axis=1)) == {0, size} and (size == 32 or 16 in selected.reshape(-1, 32).sum(axis=1))


def test_clusters_of_16_are_as_many_as_pages(trace):
    looked = selectors(trace, 384)
    many, few = (looked.by_query(name, trace.queries[384, 1], 96) for name in ("clusters of 16", "clusters"))
    counts = [grown[96].clusters.n_clusters for grown in (looked.fine, looked.growing)]
    assert (many != few).any() and 384 / 24 < counts[0] < 384 / 12 and counts[1] < 384 / 30


def test_attention_held_is_the_weight_of_what_is_selected(trace):
    found = recall.measure(trace, (32,), [200, 371])
    for layer in range(N_LAYER):
        newest = [recall.softmax(trace.logits(layer, step))[:, -32:].sum(axis=1).mean() for step in (200, 371)]
        assert found["mass"]["newest"]["32"]["own"][layer] == pytest.approx(np.mean(newest), abs=1e-5)


@pytest.mark.parametrize(("measure", "name"), [("recall", "best"), ("mass", "most")])
def test_nothing_beats_what_knows_the_answer(trace, measure, name):
    """Neither in recall nor in attention held, and each stands in its own measure only."""
    found = recall.measure(trace, (32, 96), [200, 371])
    other = found["mass" if measure == "recall" else "recall"]
    assert name not in other and set(found[measure]) - set(other) == {name}
    for budget in ("32", "96"):
        for layer in range(N_LAYER):
            best = found[measure][name][budget]["own"][layer]
            assert all(of[budget][whose][layer] <= best for of in found[measure].values() for whose in of[budget])
            assert 0.3 <= best < 1  # two query heads a KV head do not agree
    assert all(len(v) == N_LAYER for of in found["mass"].values() for b in of.values() for v in b.values())


def test_most_recall_is_not_most_attention():
    """Tops {0, 3} and {1, 2} and no vote is shared: age decides `best`, which so leaves out a token with nearly all of a head's attention."""
    logits = np.array([[0.0, -9, -9, 9], [-9, 0.0, 9, -9]])
    assert recall.most_in_all(logits, 1, 2).tolist() == [[True, True, False, False]]
    assert recall.most_held(logits, 1, 2).tolist() == [[False, False, True, True]]


def test_figures_by_hand():
    """One head; attention falls from token 0 on: the newest two of four hold none of the top two and little of the attention."""
    keys = np.array([3.0, 2, 1, 0, 0])[None, None, :, None]
    trace = recall.Trace(1, np.ones((5, 1, 1, 1)), keys, np.ones(1))
    logits = trace.logits(0, 4)
    np.testing.assert_allclose(logits, [[3, 2, 1, 0]])
    np.testing.assert_allclose(recall.softmax(logits)[0, 2:].sum(), (np.e + 1) / (np.e**3 + np.e**2 + np.e + 1))
    assert recall.most_in_all(logits, 1, 2).tolist() == [[True, True, False, False]]
    with pytest.raises(ValueError, match="no step"):
        recall.measure(trace)


def test_two_heads_share_the_cells_of_one():
    """Tops {0, 1} and {1, 2}: token 1 is wanted twice, so it is in any best selection; three quarters is the most there is."""
    logits = np.array([[5.0, 4, 0, 0], [0, 5, 4, 0]])
    selected = recall.most_in_all(logits, 1, 2)
    assert selected[0, 1] and selected.sum() == 2
    assert recall.recall_rate(selected, logits, 2).mean() == 0.75


def test_the_query_before_sees_the_same_tokens(trace):
    found = recall.measure(trace, (32,), [371])
    changed = recall.Trace(PROMPT, trace.queries.copy(), trace.keys, trace.scales)
    changed.queries[370] = trace.queries[371]
    same = recall.measure(changed, (32,), [371])
    for name in recall.BY_QUERY:
        assert same["recall"][name]["32"]["before"] == found["recall"][name]["32"]["own"] == same["recall"][name]["32"]["own"]
    assert found["recall"]["clusters"]["32"]["before"] != found["recall"]["clusters"]["32"]["own"]


def test_a_second_start_goes_on_and_another_models_result_is_not_taken(tmp_path, monkeypatch, capsys):
    short = recall.Trace(PROMPT, *(np.random.default_rng(1).normal(size=s) for s in ((60, 1, 2, 4), (1, 1, 60, 4))), np.ones(1))
    asked = []

    def recorded(model, prompt, max_tokens):
        asked.append(len(prompt))
        return short

    monkeypatch.setattr(recall, "record", recorded)
    words = ["-m", "zoomr-tiny", "--families", "series", "--results", str(tmp_path)]
    assert recall.main([*words, "-n", "1"]) == 0 and recall.main([*words, "-n", "2"]) == 0 and len(asked) == 2
    path = tmp_path / "recall-zoomr-tiny.json"
    rows = json.loads(path.read_text())["problems"]
    assert [row["family"] for row in rows] == ["series"] * 2 and len({row["id"] for row in rows}) == 2
    assert all(row["steps"] == 0 and "recall" not in row for row in rows)  # too short: said, not dropped
    assert [row["command"] for row in rows] == [f"python -m benchmarks.recall -n {n} --families series" for n in (1, 2)]
    path.write_text(path.read_text().replace(rows[0]["commit"], "before"))
    held = path.read_bytes()
    assert recall.main([*words, "-n", "1"]) == 0 and len(asked) == 2 and path.read_bytes() == held, "nothing was measured, so nothing is said anew"
    monkeypatch.setattr(recall, "commit", lambda: "now")
    assert recall.main([*words, "-n", "3"]) == 0 and [row["commit"] for row in json.loads(path.read_text())["problems"]] == ["before", "before", "now"]
    asked.clear()
    path.write_text(path.read_text().replace('"bytes": ', '"bytes": 1'))
    assert recall.main([*words, "-n", "1"]) == 0 and len(asked) == 1
    assert "measured anew" in capsys.readouterr().err and len(json.loads(path.read_text())["problems"]) == 1
    assert recall.main(["-n", "0"]) == 2 and recall.main(["-m", "no-such-model", "-n", "1"]) != 0
    assert "Traceback" not in capsys.readouterr().err
