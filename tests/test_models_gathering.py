"""Layers that gather what stands between beacons, and where the drill has them look (needs torch)."""

import sys
from dataclasses import replace
from pathlib import Path
from random import Random

import numpy as np
import pytest

torch = pytest.importorskip("torch")
from crumbs import BEACON, CRUMBS, PLAIN, PLAN, STAGE, lively  # noqa: E402

try:
    from zoomr_models.train import batches, breadcrumbs, gathering, network, recall
    from zoomr_models.train.looks import ASKED, GATHERED, NEAR, PARTED
except ImportError:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from models.train import batches, breadcrumbs, gathering, network, recall
    from models.train.looks import ASKED, GATHERED, NEAR, PARTED

LAYERS = 3
GROWN = replace(
    PLAN, shape=replace(PLAN.shape, layers=PLAIN.layers + LAYERS), breadcrumbs=replace(CRUMBS, layers=LAYERS, look_weight=4.0),
    stages=(replace(STAGE, recall_tokens=150),),
)  # fmt: skip


def test_the_old_layers_stand_around_the_new_ones():
    net = lively()
    grown = gathering.with_layers(net, LAYERS, seed=0)
    assert grown.shape == replace(net.shape, layers=net.shape.layers + LAYERS)
    old = [0, *range(1 + LAYERS, net.shape.layers + LAYERS)]
    for block, at in zip(net.blocks, old, strict=True):
        mine, theirs = block.state_dict(), grown.blocks[at].state_dict()
        assert mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)
    assert torch.equal(net.embedding.weight, grown.embedding.weight) and torch.equal(net.norm.weight, grown.norm.weight)


def test_the_new_layers_copy_what_they_attend_to():
    """Of a stream all of whose places are the same, the last of them together add what they read, and their feed-forwards nothing."""
    grown = gathering.with_layers(lively(), LAYERS, seed=0)
    shape = grown.shape
    parts = shape.width // (shape.kv_heads * shape.head_dim)
    assert parts <= LAYERS
    x = torch.randn(1, 1, shape.width, generator=torch.Generator().manual_seed(1)).expand(1, 5, -1)
    added = torch.zeros_like(x)
    for block in grown.blocks[LAYERS + 1 - parts : LAYERS + 1]:
        q, k, v = block.attention.project(x, (torch.ones(5, shape.head_dim // 2), torch.zeros(5, shape.head_dim // 2)))
        added = added + block.attention.mix(q, k, v, None)
        assert torch.equal(block.feed_forward(x), x)
    assert torch.allclose(added, x, atol=1e-4)


@pytest.mark.parametrize("every", [4, 8, 16])
def test_the_drill_says_where_to_look(every):
    """Every look is at something in view; of each pair one beacon gathers the value, and where a beacon parts a pair the value looks back."""
    pairs, kinds = 12, set()
    for seed in range(4):
        ids, weights, mask, sources, looks = recall.beacon_recall_batch(Random(seed), 1200, pairs, every)
        assert looks.dtype == np.int64 and looks.shape[1] == 4
        for kind, row, at, to in looks.tolist():
            assert mask[row, 0, at, to] and to < at
            kinds.add(kind)
            if kind == GATHERED:
                assert ids[row, at] == BEACON and ids[row, to - 1 - (ids[row, to - 1] == BEACON)] == recall._IS
                assert (ids[row, to:at] != BEACON).all(), "the first beacon after the value"
            if kind == PARTED:
                between = ids[row, to + 1 : at]
                assert ids[row, to] == BEACON and (between != BEACON).all() and len(between) < 2
            if kind == ASKED:
                assert ids[row, to] == BEACON and ids[row, at] == recall._IS
                asked = next(t for t in np.flatnonzero(weights[row]) if sources[row, t] == at)
                said = [i for k, r, i, j in looks.tolist() if k == GATHERED and r == row and i == to and ids[row, j] == ids[row, asked]]
                assert said, "that beacon gathered the value that is asked for"
        assert ((looks[:, 0] == GATHERED).sum(), (looks[:, 0] == ASKED).sum()) > (len(ids) * (pairs - 2),) * 2
    assert kinds == {PARTED, GATHERED, ASKED}


def test_the_look_loss_is_its_definition():
    """One head suffices; by loops over looks, layers and heads; and the best head's attention beside it."""
    net = gathering.with_layers(breadcrumbs.with_beacon_row(lively()), LAYERS, seed=0)
    ids, _, mask, _, looks = map(torch.from_numpy, recall.beacon_recall_batch(Random(0), 300, 5, 4))
    _, taps = net(ids, mask, tuple(range(1, LAYERS + 2)))
    loss, best = gathering.look_loss(taps, looks, mask, LAYERS)
    want, want_best = 0.0, []
    group = net.shape.heads // net.shape.kv_heads
    for kind, layers in ((PARTED, [1]), (GATHERED, [2, 3]), (ASKED, [4])):
        for layer in layers:
            q, k = taps[layer]
            logs, tops = [], []
            for _, row, at, to in looks[looks[:, 0] == kind].tolist():
                paid = []
                for h in range(net.shape.heads):
                    scores = k[row, h // group] @ q[row, h, at] / q.shape[-1] ** 0.5
                    scores[~mask[row, 0, at]] = float("-inf")
                    paid.append(scores.softmax(0)[to].item())
                logs.append(-np.log(1 - np.prod(1 - np.array(paid))))
                tops.append(max(paid))
            want += np.mean(logs)
            want_best.append(np.mean(tops))
    assert loss.item() == pytest.approx(want, rel=1e-4) and best == pytest.approx(want_best, rel=1e-4)


def under(net, ids, mask):
    """Hidden states behind the new layers, as a step of training has them."""
    states: dict = {}
    net(ids, mask, states=states)
    return states[LAYERS]


def test_the_repair_loss_is_the_distance_to_the_view_without_beacons():
    """Of the reply's tokens alone, behind the new layers; by whole forwards of a network that ends there, row by row."""
    net = gathering.with_layers(breadcrumbs.with_beacon_row(lively()), LAYERS, seed=0).requires_grad_()
    batch = batches.task_batch(Random(0), "dag", 2, 250, True, "beacons", 4)
    ids, mask, own = torch.from_numpy(batch.ids), torch.from_numpy(batch.mask), torch.from_numpy(batch.weights) > 0
    looks = torch.from_numpy(batch.looks)
    loss = gathering.repair_loss(net, under(net, ids, mask), ids, own, looks, LAYERS)
    short = network.Network(replace(net.shape, layers=LAYERS + 1))
    short.load_state_dict(net.state_dict(), strict=False)
    short.norm = torch.nn.Identity()
    far, long = [], []
    for row in range(len(ids)):
        text = ids[row] != BEACON
        goal = short(ids[row, text][None])[0][0]
        found = short(ids[row][None], mask[row][None])[0][0][text]
        mine = own[row][text]
        places = text.nonzero()[:, 0][mine].tolist()
        near = {at for kind, r, at, _ in looks.tolist() if kind == NEAR and r == row}
        counts = torch.tensor([8.0 if place in near else 1.0 for place in places])
        assert 1 < counts.mean() < 4
        far += (counts * (found - goal)[mine].square().sum(-1)).tolist()
        long += (counts * goal[mine].square().sum(-1)).tolist()
    assert loss.item() == pytest.approx(np.sum(far) / np.sum(long), rel=1e-3) and loss > 0.01
    no_beacons = torch.where(ids == BEACON, 7, ids)
    causal = torch.ones_like(mask).tril()
    assert gathering.repair_loss(net, under(net, no_beacons, causal), no_beacons, own, looks, LAYERS).item() == pytest.approx(0, abs=1e-6)


def test_the_repair_draws_the_view_with_beacons_alone():
    """The goal takes no gradient: what changes nothing under the mask is not moved by it."""
    net = gathering.with_layers(breadcrumbs.with_beacon_row(lively()), LAYERS, seed=0).requires_grad_()
    batch = batches.task_batch(Random(0), "dag", 2, 150, True, "beacons", 4)
    ids, mask, own = torch.from_numpy(batch.ids), torch.from_numpy(batch.mask), torch.from_numpy(batch.weights) > 0
    looks = torch.from_numpy(batch.looks)
    gathering.repair_loss(net, under(net, ids, mask), ids, own, looks, LAYERS).backward()
    assert net.blocks[LAYERS].attention.wo.weight.grad.abs().sum() > 0 and net.blocks[LAYERS + 1].attention.wo.weight.grad is None
    with torch.no_grad():
        goals = [gathering.hidden_after(net, row[row != BEACON][None], LAYERS)[0][mine[row != BEACON]] for row, mine in zip(ids, own)]
        goal = torch.cat(goals)
    mine = under(net, ids, mask)[own]
    weights = torch.ones(ids.shape)
    weights[looks[:, 1][looks[:, 0] == NEAR], looks[:, 2][looks[:, 0] == NEAR]] = 8.0
    weights = weights[own]
    want = torch.autograd.grad((weights * ((mine - goal) ** 2).sum(-1)).sum() / (weights * (goal**2).sum(-1)).sum(), net.blocks[1].attention.wv.weight)[0]
    assert torch.allclose(net.blocks[1].attention.wv.weight.grad, want, atol=1e-6)


def test_a_run_begins_grown_and_learns_to_look(tmp_path):
    made = breadcrumbs.BreadcrumbsRun(GROWN, tmp_path, lively())
    assert made.policy.net.shape == PLAIN and made.net.shape.layers == PLAIN.layers + LAYERS
    first = breadcrumbs.train_step(made, Random(0))
    assert len(first["looks"]) == LAYERS + 1 and 0 <= first["recall"] <= 1 and first["beacon_every"] in (4, 8)
    for _ in range(25):
        last = breadcrumbs.train_step(made, Random(0))
    assert sum(last["looks"]) > sum(first["looks"]) + 0.2


def test_one_layer_more_is_refused():
    with pytest.raises(ValueError, match="layers is 1, must be 0 or at least 2"):
        replace(CRUMBS, layers=1)
