"""What beacons have to hold, read back from them (needs torch), and the start of a run from a shipped file."""

import sys
from dataclasses import replace
from pathlib import Path
from random import Random

import numpy as np
import pytest

torch = pytest.importorskip("torch")
from crumbs import BEACON, CRUMBS, PLAIN, lively  # noqa: E402
from test_models_gathering import GROWN  # noqa: E402

try:
    from zoomr_models import export
    from zoomr_models.train import batches, breadcrumbs, held, side_by_side
    from zoomr_models.train.looks import NAME_TOKENS, NUMBER_TOKENS
except ImportError:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from models import export
    from models.train import batches, breadcrumbs, held, side_by_side
    from models.train.looks import NAME_TOKENS, NUMBER_TOKENS


@pytest.mark.parametrize("every", [4, 8, 16])
def test_held_are_the_names_and_numbers_that_a_beacon_replaces(every):
    """Against the mask: what a beacon sees and the place after it does not."""
    batch = batches.task_batch(Random(0), "ledger", 3, 900, True, "beacons", every)
    found = held.held_places(batch.ids, every)
    want = []
    for row, ids in enumerate(batch.ids):
        mask = batch.mask[row, 0]
        for beacon in np.flatnonzero(ids == BEACON)[:-1]:
            replaced = np.flatnonzero(mask[beacon] & ~mask[beacon + 1])
            want += [(row, beacon, at, beacon - at) for at in replaced if ids[at] in (*NAME_TOKENS, *NUMBER_TOKENS)]
    last = {row: np.flatnonzero(ids == BEACON)[-1] for row, ids in enumerate(batch.ids)}  # nothing may stand behind the last one
    assert [tuple(x) for x in found.tolist() if x[1] != last[x[0]]] == want and len(want) > 30


def test_the_held_loss_is_its_definition():
    net = lively(replace(PLAIN, vocab=BEACON + 1))
    readers = held.Readers(net.shape.width, 16, seed=0)
    batch = batches.task_batch(Random(0), "dag", 2, 300, True, "beacons", 8)
    states = torch.randn(*batch.ids.shape, net.shape.width, generator=torch.Generator().manual_seed(0))
    loss, share = held.held_loss(readers, states, net.embedding.weight, torch.from_numpy(batch.ids), 8)
    want, right = [], []
    for row, beacon, at, distance in held.held_places(batch.ids, 8).tolist():
        state = states[row, beacon] / states[row, beacon].square().mean().add(torch.finfo(torch.float32).eps).sqrt()
        scores = (net.embedding.weight @ (readers.weight[distance - 1] @ state)).log_softmax(-1)
        want.append(-scores[batch.ids[row, at]].item())
        right.append(scores.argmax().item() == batch.ids[row, at])
    assert loss.item() == pytest.approx(np.mean(want), rel=1e-4) and share == pytest.approx(np.mean(right))


def test_without_a_beacon_nothing_is_to_be_held():
    readers = held.Readers(8, 4, seed=0)
    loss, share = held.held_loss(readers, torch.zeros(1, 5, 8), torch.zeros(BEACON + 1, 8), torch.full((1, 5), NUMBER_TOKENS[0]), 4)
    assert loss.item() == 0 and share == 1


def test_a_run_learns_to_hold(tmp_path):
    """The readers learn with the network, are in the checkpoint, and in no file that ships."""
    plan = replace(GROWN, breadcrumbs=replace(GROWN.breadcrumbs, held_weight=1.0))
    made = breadcrumbs.BreadcrumbsRun(plan, tmp_path, lively())
    before = made.readers.weight.detach().clone()
    made.set_rate()
    first = breadcrumbs.train_step(made, Random(0))
    assert not torch.equal(made.readers.weight, before) and {"held", "trace_held", "sums", "repair"} <= first.keys()
    for _ in range(25):
        last = breadcrumbs.train_step(made, Random(0))
    assert last["held"] > first["held"] + 0.02
    made.save()
    again = breadcrumbs.BreadcrumbsRun(plan, tmp_path)
    again.resume()
    assert torch.equal(again.readers.weight, made.readers.weight)
    assert breadcrumbs.train_step(again, Random(1)) == breadcrumbs.train_step(made, Random(1)), "the optimiser of the readers goes on too"
    assert torch.equal(again.readers.weight, made.readers.weight)
    assert not any("readers" in name for name in export.tensor_names(made.net))


def test_the_rates_fall_from_the_step_that_the_recipe_says(tmp_path):
    plan = replace(GROWN, steps=10, warmup=1, breadcrumbs=replace(CRUMBS, layers=GROWN.breadcrumbs.layers, warm_up=8, fall=5))
    made = breadcrumbs.BreadcrumbsRun(plan, tmp_path, lively())
    factors = []
    for made.step in range(10):
        factors.append(made.set_rate())
        policy = made.policy.optimizers[0].param_groups[0]["lr"] / CRUMBS.policy_lr
        assert policy == pytest.approx(0.5 if made.step == 9 else 1), "the policy's rates fall with its rollouts"
    assert factors == pytest.approx([1, 1, 1, 1, 1, 1, 0.8, 0.6, 0.4, 0.2])


def _step(plan, folder):
    made = breadcrumbs.BreadcrumbsRun(plan, folder, lively())
    made.set_rate()
    breadcrumbs.train_step(made, Random(side_by_side.rank()))
    torch.save([made.readers.weight.detach(), made.net.blocks[1].attention.wv.weight.detach()], folder / f"{side_by_side.rank()}.pt")


def test_processes_have_the_same_readers(tmp_path):
    """After a step in which each had another batch."""
    plan = replace(GROWN, breadcrumbs=replace(GROWN.breadcrumbs, held_weight=1.0))
    side_by_side.start(2, _step, plan, tmp_path)
    one, other = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_a_run_begins_with_what_a_file_holds(tmp_path):
    """Every weight of a GGUF, as its types left it, and the shape it was trained with."""
    net = lively()
    for kind, off in (("f32", 0.0), ("q8_0", 0.02)):
        path = tmp_path / f"{kind}.gguf"
        export.write_gguf(net, path, kind, "tiny", summaries=False)
        again, rest = export.load_network(path)
        assert again.shape == net.shape and rest == {}
        for name, value in net.state_dict().items():
            assert (again.state_dict()[name] - value).abs().max() <= off * value.abs().max(), name
    models = Path(export.__file__).parent
    shipped, _ = export.load_network(models / "plain-tiny.gguf")
    recipe = breadcrumbs.load_recipe(models / "train" / "breadcrumbs.toml")
    breadcrumbs.BreadcrumbsRun(recipe, tmp_path, shipped)


def test_a_network_with_beacons_can_go_on(tmp_path):
    """Its weights are those of the file, the policy's those of its own; either of the wrong shape is said."""
    begun = breadcrumbs.BreadcrumbsRun(GROWN, tmp_path, lively())
    for p in begun.net.parameters():
        p.data.mul_(1.25)
    export.write_gguf(begun.net, tmp_path / "b.gguf", "f32", "b", (8, 4))
    start, policy = export.load_network(tmp_path / "b.gguf")[0], lively(seed=3)
    made = breadcrumbs.BreadcrumbsRun(GROWN, tmp_path, start, policy)
    for mine, theirs in ((made.net, begun.net), (made.average, begun.net), (made.policy.net, policy), (made.policy.average, policy)):
        assert all(torch.equal(a, b) for a, b in zip(mine.parameters(), theirs.parameters(), strict=True))
    with pytest.raises(ValueError, match="the policy is .*, but the recipe needs"):
        breadcrumbs.BreadcrumbsRun(GROWN, tmp_path, start, start)
    with pytest.raises(ValueError, match="with a policy beside it the recipe needs"):
        breadcrumbs.BreadcrumbsRun(GROWN, tmp_path, policy, lively())
    with pytest.raises(ValueError, match="the start is .*, but the recipe needs"):
        breadcrumbs.BreadcrumbsRun(GROWN, tmp_path, start)


@pytest.mark.parametrize("content", [b"", b"GGUF", b"GGUF\3\0\0\0" + b"\xff" * 64, b"no model at all"])
def test_a_start_that_is_no_model_is_said_so(tmp_path, content):
    path = tmp_path / "broken.gguf"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="broken.gguf is no model that models.export wrote"):
        export.load_network(path)
