"""Training code: the mask, the export and the step say what they should (needs torch)."""

import sys
from pathlib import Path
from random import Random

import pytest

torch = pytest.importorskip("torch")
np = pytest.importorskip("numpy")
try:
    from zoomr_models import export, tasks, tokenizer
    from zoomr_models.train import batches, losses, network, optimizer, recipe, run
except ImportError:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from models import export, tasks, tokenizer
    from models.train import batches, losses, network, optimizer, recipe, run

SMALL = network.Shape(len(tokenizer.TOKENS), layers=2, width=64, heads=2, kv_heads=1, ff=96)


def row_of(family="series", thoughts=6, seed=0):
    return batches.make_row(tasks.generate(family, 1, seed, thoughts)[0])


@pytest.mark.parametrize("family", sorted(tasks.FAMILIES))
def test_mask_shows_what_the_runtime_would_show(family):
    for seed in range(10):
        row = row_of(family, 7, seed)
        mask = batches.zoomr_mask(row, Random(seed), window=32)
        n = len(row.ids)
        assert mask.diagonal().all() and not np.triu(mask, 1).any()
        always = (row.owner < 0) | row.summary
        for q in range(n):
            past = np.arange(n) <= q
            assert mask[q][past & always].all()
            assert mask[q][past & (row.owner == row.owner[q])].all()
            assert mask[q][max(0, q - 31) : q + 1].all()
        for (_, first, last, _), needs in zip(row.spans, row.needs):
            for block in needs:
                assert mask[first : last + 1][:, row.owner == block].all()


@pytest.mark.parametrize("family", sorted(tasks.FAMILIES))
def test_spans_point_at_what_they_name(family):
    row = row_of(family)
    for named, first, last, end in row.spans:
        assert row.ids[first] == row.ids[last] == batches.IS
        assert row.ids[named] == row.ids[last - 1]
        assert row.ids[end] == tokenizer.END_SUMMARY
        assert first - named >= 8
    assert row.lookup.sum() == 2 * len(row.spans)
    assert np.allclose(row.index.sum(1), 1)


def test_causal_mask_equals_no_mask():
    net = network.Network(SMALL)
    ids = torch.tensor(row_of().ids)[None]
    causal = torch.ones(1, 1, ids.shape[1], ids.shape[1], dtype=torch.bool).tril()
    with torch.no_grad():
        assert torch.allclose(net(ids)[0], net(ids, causal)[0], atol=1e-4)


def test_rope_depends_on_distance_only():
    x, y = torch.randn(2, 32, generator=torch.Generator().manual_seed(0))
    shape = network.Shape(10, width=64, heads=2, kv_heads=1)

    def score(m, n):
        cos, sin = network.rope_angles(shape, torch.tensor([m, n]))
        return (network.rotate(x, cos[0], sin[0]) * network.rotate(y, cos[1], sin[1])).sum()

    assert torch.allclose(score(7, 3), score(107, 103), atol=1e-3)


def test_index_loss_is_least_when_the_needed_blocks_win():
    batch = batches.task_batch(Random(0), "dag", 5, 600, masked=True)
    b, t = batch.ids.shape
    k = torch.zeros(b, 1, t, 8)
    index = torch.from_numpy(batch.index)
    for block in range(5):
        k[:, 0, :, block] += 40 * index[:, block]
    q = torch.zeros(b, 2, t, 8)
    q[..., :5] = 40 * torch.from_numpy(batch.target).float()[:, None]
    good, hit = losses.index_loss(q, k, batch)
    bad, _ = losses.index_loss(torch.zeros_like(q), k, batch)
    assert hit == 1.0 and good < 0.7 < bad  # ln 2 where two blocks share the mass


def test_orthogonalise_flattens_the_singular_values():
    g = torch.randn(48, 96, generator=torch.Generator().manual_seed(1))
    values = torch.linalg.svdvals(optimizer.orthogonalise(g))
    assert 0.5 < values.min() and values.max() < 1.5


def test_a_run_learns_and_resumes(tmp_path):
    stage = recipe.Stage(1.0, {"dag": (1, 2), "series": (1, 2)}, 0.5, 100, 4, 0.1)
    plan = recipe.Recipe(
        "t", 0, 0, 8, 1, 300, 3e-3, 3e-3, 2, 0.5, (0, 1), 0.9, SMALL, (stage,)
    )  # fmt: skip
    first = run.Run(plan, tmp_path)
    reports = []
    for i in range(8):
        first.set_rate()
        reports.append(run.train_step(first, Random(i)))
        first.step += 1
    assert reports[-1]["loss"] < reports[0]["loss"]
    first.save()
    second = run.Run(plan, tmp_path)
    second.resume()
    assert second.step == 8
    for a, b in zip(first.net.parameters(), second.net.parameters()):
        assert torch.equal(a, b)


def test_exported_logits_equal_pytorch(tmp_path):
    pytest.importorskip("gguf")
    llama_cpp = pytest.importorskip(
        "llama_cpp", exc_type=(ImportError, FileNotFoundError, RuntimeError)
    )
    net = network.Network(SMALL)
    network.mimetic_init(net, 0)
    export.write_gguf(net, tmp_path / "t.gguf", "f32")
    ids = row_of("dag", 3).ids.tolist()
    f32 = llama_cpp.GGML_TYPE_F32
    model = llama_cpp.Llama(
        str(tmp_path / "t.gguf"), n_ctx=512, n_threads=1, type_k=f32, type_v=f32, verbose=False
    )
    model.eval(ids)
    got = np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(model.ctx, -1), (model.n_vocab(),))
    with torch.no_grad():
        want = net.logits(net(torch.tensor([ids]))[0][0, -1]).numpy()
    assert np.abs(got - want).max() < 2e-3 * max(1.0, np.abs(want).max())
