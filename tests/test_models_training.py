"""Training code: the mask, the export and the step say what they should (needs torch)."""

import sys
from pathlib import Path
from random import Random

import pytest

torch = pytest.importorskip("torch")
np = pytest.importorskip("numpy")
try:
    from zoomr_models import export, tasks, tokenizer
    from zoomr_models.train import ablate, batches, beacons, losses, network, optimizer, probe, recipe, run
except ImportError:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from models import export, tasks, tokenizer
    from models.train import ablate, batches, beacons, losses, network, optimizer, probe, recipe, run

SMALL = network.Shape(len(tokenizer.TOKENS), layers=2, width=64, heads=2, kv_heads=1, ff=96)


def row_of(family="series", thoughts=6, seed=0):
    return batches.make_row(tasks.generate(family, 1, seed, thoughts)[0])


@pytest.mark.parametrize("family", sorted(tasks.FAMILIES))
def test_mask_shows_what_the_runtime_would_show(family):
    hidden = lingering = 0
    for seed in range(10):
        row = row_of(family, 7, seed)
        mask = batches.zoomr_mask(row, Random(seed), window=32)
        n = len(row.ids)
        assert mask.diagonal().all() and not np.triu(mask, 1).any()
        for q in range(n):
            past = np.arange(n) <= q
            newest = (row.owner >= row.owner[q] - 3) & row.summary
            assert mask[q][past & ((row.owner < 0) | newest)].all()
            assert mask[q][past & (row.owner == row.owner[q])].all()
            assert mask[q][max(0, q - 31) : q + 1].all()
            hidden += (~mask[q][past & row.summary]).sum()
        for (_, first, last, _), needs in zip(row.spans, row.needs, strict=True):
            for block in needs:
                assert mask[first : last + 1][:, (row.owner == block) & ~row.summary].all()
        for (_, _, _, end), needs in zip(row.spans[:-1], row.needs, strict=False):
            lingering += any(mask[end + 2 : end + 30, at].any() for block in needs for at in [np.argmax(row.owner == block)])
    assert hidden > 0, "old summaries must sometimes be away"
    assert lingering > 0, "what a thought needed must sometimes be there still when the next one begins"


def test_without_extra_zooms_only_needed_thoughts_are_in_view():
    for seed in range(6):
        row = row_of("dag", 9, seed)
        at = np.arange(len(row.ids))
        mask = batches.zoomr_mask(row, Random(seed), window=24, extra_zooms=False)
        needed = np.zeros_like(mask)
        for (_, _, _, end), needs in zip(row.spans, row.needs, strict=True):
            for block in needs:
                needed[: end + 31, row.owner == block] = True
        elsewhere = (row.owner[:, None] != row.owner) & ~row.summary & (row.owner >= 0) & (at[:, None] - at >= 24)
        assert not (mask & elsewhere & ~needed).any()


@pytest.mark.parametrize("family", sorted(tasks.FAMILIES))
def test_spans_point_at_what_they_name(family):
    row = row_of(family)
    for named, first, last, end in row.spans[:-1]:
        assert row.ids[first] == row.ids[last] == batches.IS
        assert row.ids[named] == row.ids[last - 1]
        assert row.ids[end] == tokenizer.END_SUMMARY
        assert first - named >= 8
    think, first, last, end = row.spans[-1]
    assert row.ids[think] == tokenizer.END_THINK and row.ids[first] == row.ids[last] == batches.IS
    assert row.ids[end] == tokenizer.IM_END and row.needs[-1] == (len(row.needs) - 2,)
    assert row.lookup.sum() == 2 * (len(row.spans) - 1)
    assert np.allclose(row.index.sum(1), 1)


@pytest.mark.parametrize("family", sorted(tasks.FAMILIES))
def test_index_rows_are_the_parts_of_each_summary(family):
    problem = tasks.generate(family, 1, 0, 5)[0]
    whole, parts = batches.make_row(problem), batches.make_row(problem, summary_rows=2)
    for j in range(5):
        text = np.flatnonzero(whole.index[j])
        first, second = (np.flatnonzero(row) for row in parts.index[2 * j : 2 * j + 2])
        assert np.concatenate([first, second]).tolist() == text.tolist() and len(first) == len(text) // 2
    assert np.allclose(parts.index.sum(1), 1)
    if family == "ledger":  # what it is for: a row for each of the two accounts
        assert all("with" not in tokenizer.decode(whole.ids[np.flatnonzero(r)].tolist()) for r in parts.index[::2])


@pytest.mark.parametrize("family", sorted(tasks.FAMILIES))
def test_no_value_can_travel_through_a_summary(family):
    """Two steps lead from a value to a later thought by way of a summary; one of them is always shut."""
    shut = {"into": 0, "out of": 0}
    for seed in range(12):
        row = row_of(family, 9, seed)
        forbidden = batches.guard(row, Random(seed))
        for j, needs in enumerate(row.needs):
            for block in needs:
                keys = (row.owner == block) & row.summary
                values = (row.owner == block) & ~row.summary & (np.arange(len(row.ids)) > row.spans[block][2] + 1)
                assert values.sum() > 20
                into = forbidden[keys][:, values].all()
                readers = (row.owner == j) & (np.arange(len(row.ids)) > row.spans[j][0])
                out_of = forbidden[readers][:, keys].all()
                assert into or out_of
                shut["into"] += into
                shut["out of"] += out_of
        assert not forbidden[:, row.owner < 0].any()
    assert min(shut.values()) > 0, "both ways are shut in turn, so that both sights are trained"


def test_stretched_rows_keep_their_order_and_leave_room_between_blocks_only():
    farthest = 0
    for seed in range(20):
        row = row_of("dag", 5, seed)
        wide = batches.stretched(row, Random(seed))
        steps = np.diff(wide.positions)
        starts = np.flatnonzero(np.diff(row.owner) > 0)
        assert wide.positions[0] == 0 and (np.delete(steps, starts) == 1).all() and (steps >= 1).all()
        assert wide.positions[-1] < 4096
        farthest = max(farthest, wide.positions[-1])
    assert farthest > 2000


def test_positions_change_what_the_network_computes_as_moving_tokens_would():
    net = network.Network(SMALL)
    network.mimetic_init(net, 0)
    ids = torch.tensor(row_of().ids)[None]
    at = torch.arange(ids.shape[1])[None]
    with torch.no_grad():
        assert torch.allclose(net(ids)[0], net(ids, positions=at + 50)[0], atol=1e-3)
        assert not torch.allclose(net(ids)[0], net(ids, positions=at * 2)[0], atol=1e-3)


def test_plain_rows_have_the_thoughts_and_no_summary():
    problem = tasks.generate("dag", 1, 3, 5)[0]
    row = batches.make_row(problem, summaries=False)
    assert tokenizer.decode(row.ids.tolist()) == tasks.prompt_text(problem.prompt) + problem.plain_trace
    assert not row.summary.any() and not row.index.any()
    assert row.lookup.sum() == 10 and "<|begin_of_summary|>" not in problem.plain_trace
    for at in row.spans[:-1, 3]:
        assert row.weights[at + 1] == 20 and row.ids[at] == tokenizer.encode("\n")[0]


@pytest.mark.parametrize("every", [1, 4, 8])
def test_beacons_show_what_eviction_would_leave(every):
    """Against the run time's rule, played token by token: store a beacon, then evict the tokens before it."""
    plain = batches.make_row(tasks.generate("series", 1, 2, 3)[0], summaries=False)
    row, mask, sources = beacons.with_beacons(plain, every)
    assert row.ids[row.ids != tokenizer.BEACON].tolist() == plain.ids.tolist()
    prompt = int((plain.owner < 0).sum())
    resident, since, newest = set(), 0, 0
    for t, token in enumerate(row.ids.tolist()):
        resident.add(t)
        assert set(np.flatnonzero(mask[t])) == resident
        if t:
            assert sources[t] == newest
        if token == tokenizer.BEACON:
            assert row.weights[t] == 0 and since == every
            resident -= set(range(t - every, t))
            since = 0
        else:
            newest, since = t, since + (t >= prompt)
    assert (row.weights > 0).sum() == (plain.weights > 0).sum()


def test_a_beacon_batch_predicts_over_its_beacons():
    batch = batches.task_batch(Random(0), "dag", 2, 600, True, "beacons", 4)
    net = network.Network(network.Shape(len(tokenizer.TOKENS) + 1, layers=2, width=64, heads=2, kv_heads=1, ff=96))
    ids, mask, sources = (torch.from_numpy(x) for x in (batch.ids, batch.mask, batch.sources))
    with torch.no_grad():
        hidden, _ = net(ids, mask, (), torch.from_numpy(batch.positions))
        loss, _ = losses.token_loss(net, hidden, ids, torch.from_numpy(batch.weights), sources)
        changed = hidden.clone()
        changed[ids == tokenizer.BEACON] = 9.0
        assert losses.token_loss(net, changed, ids, torch.from_numpy(batch.weights), sources)[0] == loss


def test_causal_mask_equals_no_mask():
    net = network.Network(SMALL)
    ids = torch.tensor(row_of().ids)[None]
    causal = torch.ones(1, 1, ids.shape[1], ids.shape[1], dtype=torch.bool).tril()
    with torch.no_grad():
        assert torch.allclose(net(ids)[0], net(ids, causal)[0], atol=1e-4)


def test_attention_through_views_is_attention_under_the_mask():
    torch.manual_seed(0)
    attention = network.Attention(SMALL)
    q, k, v = torch.randn(2, 2, 90, 32), torch.randn(2, 1, 90, 32), torch.randn(2, 1, 90, 32)
    mask = (torch.rand(2, 1, 90, 90) < 0.2).tril() | torch.eye(90, dtype=torch.bool)
    mask[:, :, :, 40:60] &= torch.eye(90, dtype=torch.bool)[:, 40:60]
    scores = (q @ k.mT / 32**0.5).masked_fill(~mask, -torch.inf)
    expected = attention.wo((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))
    for rows in (16, 64, 256):
        views = network.views_of(mask, rows)
        assert torch.allclose(attention.mix(q, k, v, views), expected, atol=1e-5)
        assert sum(len(w.seen) for w in views) < 90 * len(views) or rows > 90


def test_query_heads_of_a_group_begin_apart():
    net = network.Network(SMALL)
    network.mimetic_init(net, 0)
    for block in net.blocks:
        one, other = block.attention.wq.weight.view(2, 32, 64)
        assert (one - other).abs().max() > 0.01


def test_rope_depends_on_distance_only():
    x, y = torch.randn(2, 32, generator=torch.Generator().manual_seed(0))
    shape = network.Shape(10, width=64, heads=2, kv_heads=1)

    def score(m, n):
        cos, sin = network.rope_angles(shape, torch.tensor([m, n]))
        return (network.rotate(x, cos[0], sin[0]) * network.rotate(y, cos[1], sin[1])).sum()

    assert torch.allclose(score(7, 3), score(107, 103), atol=1e-3)


@pytest.mark.parametrize("rows", [1, 2])
def test_index_loss_is_least_when_the_needed_blocks_win(rows):
    """Also where only the last of a summary's rows is what the query points at."""
    batch = batches.task_batch(Random(0), "dag", 5, 600, masked=True, summary_rows=rows)
    b, t = batch.ids.shape
    k = torch.zeros(b, 1, t, 8)
    index = torch.from_numpy(batch.index)
    for block in range(5):
        k[:, 0, :, block] += 40 * index[:, block * rows + rows - 1]
    q = torch.zeros(b, 2, t, 8)
    q[..., :5] = 40 * torch.from_numpy(batch.target).float()[:, None]
    good, hit = losses.index_loss(q, k, batch)
    bad, _ = losses.index_loss(torch.zeros_like(q), k, batch)
    assert hit == 1.0 and good < 0.7 < bad  # ln 2 where two blocks share the mass


def test_orthogonalise_flattens_the_singular_values():
    g = torch.randn(48, 96, generator=torch.Generator().manual_seed(1))
    values = torch.linalg.svdvals(optimizer.orthogonalise(g))
    assert 0.5 < values.min() and values.max() < 1.5


@pytest.mark.parametrize("family", sorted(tasks.FAMILIES))
def test_the_probe_counts_what_it_says(family):
    row = row_of(family, 16, 3)
    net = network.Network(SMALL)
    network.mimetic_init(net, 0)
    count = probe.measure(net, [row], "full")
    ids = torch.tensor(row.ids)[None]
    with torch.no_grad():
        _, right = losses.token_loss(net, net(ids)[0], ids, torch.from_numpy(row.weights)[None])
    assert (count.right, count.told, count.traces) == (int(right.sum()), int((row.weights[1:] > 0).sum()), 1)
    far = probe.far_values(row)
    assert count.far == len(far) > 2 and row.lookup[far].all() and sum(count.errors.values()) == count.told - count.right
    full, zoomed, sumr = (probe.sight(row, kind) for kind in probe.MASKS)
    assert (full >= zoomed).all() and (zoomed >= sumr).all()
    for at in far:  # the value is in view where it is read, and only by zooming
        name = row.ids[at - 2]
        source = np.flatnonzero((row.ids[:at] == name) & (row.ids[1 : at + 1] == batches.IS) & ~row.summary[:at])[:-1]
        assert zoomed[at - 1, source + 2].any() and not sumr[at - 1, source + 2].any()


def test_index_hits_are_those_of_the_heads_votes():
    rows = [batches.make_row(tasks.generate("dag", 1, 5, 6)[0], summary_rows=2)]

    class Pointing:
        """Every head's query is the sum of the needed blocks' keys; block j's summary has key e_j in its second half."""

        def __init__(self, right):
            self.right = right

        def __call__(self, ids, mask, layers):
            target = torch.from_numpy(batches.index_target(rows[0])).float()
            k = torch.from_numpy(rows[0].index[1::2].T > 0).float()[None, None]
            q = target if self.right else target.roll(1, 1)
            return None, {layer: (q[None, None].expand(1, 2, -1, -1), k) for layer in layers}

    assert ablate.index_hits(Pointing(True), rows, (0, 1)) == 1.0
    assert ablate.index_hits(Pointing(False), rows, (0, 1)) < 0.3


def test_every_ablation_changes_the_recipe_and_one_runs(tmp_path, monkeypatch, capsys):
    stage = recipe.Stage(1.0, {"dag": (1, 2)}, 0.5, 0, 4, 0.1)
    plan = recipe.Recipe(
        "t", 0, 0, 2, 1, 300, 3e-3, 3e-3, 1, 0.5, (0, 1), 0.9, SMALL, (stage,), summary_rows=2
    )  # fmt: skip
    made = {name: change(plan) for name, change in ablate.VARIANTS.items()}
    assert len(set(map(repr, made.values()))) == len(made) and made["whole"] == plan
    steady = run.Run(made["no-decay"], tmp_path)
    steady.step = 2
    assert steady.set_rate() == 1.0
    monkeypatch.setattr(ablate, "load_recipe", lambda path: plan)
    monkeypatch.setattr(ablate, "PROBLEMS", 1)
    monkeypatch.setattr(run, "plot", lambda out: None)
    monkeypatch.setattr(sys, "argv", ["ablate", "x", str(tmp_path / "out"), "--variants", "no-decay"])
    ablate.main()
    assert capsys.readouterr().out.count("no-decay") == len(tasks.FAMILIES)


def test_the_mean_of_checkpoints_is_the_mean_of_their_weights(tmp_path):
    nets = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        nets.append(network.Network(SMALL))
        state = {"shape": SMALL.__dict__, "average": nets[-1].state_dict(), "step": seed}
        torch.save(state, tmp_path / f"{seed}.pt")
    mean, state = export.mean_network([tmp_path / "0.pt", tmp_path / "1.pt"])
    for a, b, m in zip(*(n.parameters() for n in (*nets, mean)), strict=True):
        assert torch.allclose(m, (a + b) / 2)
    assert state["step"] == 1
    other = network.Shape(len(tokenizer.TOKENS), layers=1, width=64, heads=2, kv_heads=1, ff=96)
    torch.save({"shape": other.__dict__, "average": network.Network(other).state_dict()}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match="different shapes"):
        export.mean_network([tmp_path / "0.pt", tmp_path / "other.pt"])


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
