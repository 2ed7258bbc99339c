"""A layer of the per-head store in one call: what leaves is written once, what comes back is what left, and a refusal changes nothing."""

import numpy as np
import pytest
from conftest import prompt_op, step_ops
from heads_run import CONFIGS, Run

from zoomr_local.errors import EngineError


def rows_of(store, layer, head):
    """{position: the row as the tier has it, K then V}."""
    cells, positions = store.resident(layer, head)
    return {int(p): store.page_out(layer, head, [c]) for c, p in zip(cells, positions, strict=True)}


def memory(store, length):
    """(stored, rows) of every layer, rows full of something else."""
    shape = (store.n_layers, store.n_head_kv, length)
    return np.zeros(shape, bool), np.full((*shape, store.cell_bytes), 77, np.uint8)


@pytest.mark.parametrize("share", [False, True], ids=["parts", "pool"])
@pytest.mark.parametrize("kv", CONFIGS)
def test_each_head_holds_what_is_wanted_byte_for_byte_and_rows_are_written_once(kv, share, models):
    rng = np.random.default_rng(0)
    with Run(models("llama"), kv, n_cells=70, share=share) as run:
        run.replay([prompt_op(60)])
        store = run.store
        stored, rows = memory(store, 90)
        truth = {(layer, head): rows_of(store, layer, head) for layer, head in run.pairs()}
        for n in range(60, 75):
            for layer in range(store.n_layers):
                wanted = rng.random((store.n_head_kv, n)) < rng.choice([0.3, 0.6])
                wanted[:, -1] = True
                before = [set(store.resident(layer, head)[1].tolist()) for head in range(store.n_head_kv)]
                was, was_rows = stored[layer].copy(), rows[layer].copy()
                freed, filled, written = store.exchange(layer, wanted, stored[layer], rows[layer])
                expected = [set(np.flatnonzero(row).tolist()) for row in wanted]
                assert freed == sum(len(a - b) for a, b in zip(before, expected, strict=True))
                assert filled == sum(len(b - a) for a, b in zip(before, expected, strict=True))
                assert written == (stored[layer] & ~was).sum() and (stored[layer] >= was).all()
                for head in range(store.n_head_kv):
                    assert set(store.resident(layer, head)[1].tolist()) == expected[head]
                    new = {p for p in before[head] - expected[head] if not was[head, p]}
                    assert set(np.flatnonzero(stored[layer, head] & ~was[head]).tolist()) == new
                    kept = ~np.isin(np.arange(90), list(new))
                    assert (rows[layer, head][kept] == was_rows[head][kept]).all(), "nothing is written twice"
                    for position, row in rows_of(store, layer, head).items():
                        assert (row == truth[layer, head][position]).all()
            run.replay(step_ops(n, 1, seed=n))
            for layer, head in run.pairs():
                truth[layer, head][n] = rows_of(store, layer, head)[n]
        assert stored.any() and (rows[~stored] == 77).all()


def test_an_exchange_is_evicting_and_paging_in(models):
    """The same sets by the calls for single heads: the same logits to the bit."""
    steps = step_ops(60, 3, seed=8)
    wanted = np.random.default_rng(2).random((2, 60)) < 0.5
    back = wanted | (np.random.default_rng(3).random((2, 60)) < 0.5)
    with Run(models("llama"), "f16-fa") as run:
        run.replay([prompt_op(60)])
        stored, rows = memory(run.store, 60)
        for layer in range(run.store.n_layers):
            run.store.exchange(layer, wanted, stored[layer], rows[layer])
            run.store.exchange(layer, back, stored[layer], rows[layer])
        ours = run.replay(steps)
    with Run(models("llama"), "f16-fa") as run:
        run.replay([prompt_op(60)])
        for layer, head in run.pairs():
            cells, positions = run.store.resident(layer, head)
            comes = np.flatnonzero(back[head] & ~wanted[head])
            page = run.store.page_out(layer, head, cells[comes])
            run.store.evict(layer, head, cells[~wanted[head]])
            run.store.page_in(layer, head, comes, page)
        np.testing.assert_array_equal(ours, run.replay(steps))


def test_a_refusal_changes_nothing(models):
    with Run(models("llama"), "f16-fa", n_cells=64) as run:
        store = run.store
        run.replay([prompt_op(60)])
        stored, rows = memory(store, 64)
        everything, half = np.ones((2, 60), bool), np.arange(60) < np.array([[30], [60]])
        store.exchange(0, np.ascontiguousarray(half), stored[0], rows[0])
        run.replay([prompt_op(4, start=60)])
        stored[0, 0, 40] = False
        before, was, was_rows = store.positions(0).copy(), stored.copy(), rows.copy()
        wide = np.ones((2, 64), bool)
        for message, wanted, m in (
            ("layer 0, KV head 0: position 40 is wanted, in no cell and not stored", wide, 64),
            ("layer 0, KV head 0 holds position 60, it is said of 60", everything, 64),
            ("of 65 tokens it is said which are wanted; 64 were decoded, 64 can be stored", np.ones((2, 65), bool), 64),
            ("of 64 tokens .* 63 can be stored", wide, 63),
            ("wanted of layer 0 is bool .1, 64., must be bool .2, 64.", wide[:1], 64),
        ):
            with pytest.raises(EngineError, match=message):
                store.exchange(0, wanted, np.ascontiguousarray(stored[0, :, :m]), np.ascontiguousarray(rows[0, :, :m]))
        with pytest.raises(EngineError, match="layer 3, KV head 0 of 3 layers"):
            store.exchange(3, wide, stored[0], rows[0])
        with pytest.raises(EngineError, match="rows of layer 0 is uint8 .2, 64, 1., must be"):
            store.exchange(0, wide, stored[0], np.zeros((2, 64, 1), np.uint8))
        sealed = rows[0].copy()
        sealed.flags.writeable = False
        with pytest.raises(EngineError, match="rows of layer 0 cannot be written to"):
            store.exchange(0, wide, stored[0], sealed)
        assert (store.positions(0) == before).all() and (stored == was).all() and (rows == was_rows).all()


def test_what_does_not_fit_changes_nothing(models):
    with Run(models("llama"), "f16-fa", n_cells=64) as run:
        store = run.store
        run.replay([prompt_op(60)])
        stored, rows = memory(store, 80)
        none = np.zeros((2, 60), bool)
        store.exchange(0, none, stored[0], rows[0])
        for layer in (1, 2):
            store.exchange(layer, none, stored[layer], rows[layer])
        run.replay([prompt_op(10, start=60)])
        before = store.positions(0).copy()
        with pytest.raises(EngineError, match="does not fit into layer 0, KV head 0: 60 cells more than now, 54 of 64 are free"):
            store.exchange(0, np.ones((2, 70), bool), stored[0], rows[0])
        assert (store.positions(0) == before).all()
