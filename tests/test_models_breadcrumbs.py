"""Breadcrumbs training: the two losses and the run (needs torch)."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest

torch = pytest.importorskip("torch")
from crumbs import BEACON, CRUMBS, PLAIN, PLAN, end_even, fresh, lively, replies_of, weights_of  # noqa: E402

try:
    from zoomr_models.train import breadcrumbs, rollout, run, side_by_side
except ImportError:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from models.train import breadcrumbs, rollout, run, side_by_side

def test_without_a_beacon_the_student_begins_as_its_teacher():
    """Both sides of the KL are of the same tokens."""
    teacher = lively()
    student = breadcrumbs.with_beacon_row(teacher)
    replies = replies_of(teacher)
    ids, row, at = breadcrumbs._told(replies)
    goal = teacher.logits(teacher(ids)[0][row, at - 1]).log_softmax(-1)
    scores = breadcrumbs.student_scores(student, replies, [100] * 3)
    assert torch.allclose(scores[:, :BEACON].log_softmax(-1), goal, atol=1e-3)
    loss, agree = breadcrumbs.distillation_loss(student, teacher, replies, [100] * 3)
    assert torch.allclose(loss, -torch.log1p(-scores[:, BEACON].exp()).mean(), atol=1e-3) and agree > 0.95
    assert breadcrumbs.distillation_loss(student, teacher, replies, [4] * 3)[0] > loss + 0.1


def test_the_kl_is_the_teachers_surprise_at_the_student():
    """By its definition, from the teacher's distribution to the student's: the other direction is another number."""
    teacher, student = lively(), lively(replace(PLAIN, vocab=BEACON + 1), seed=1)
    replies, rates = replies_of(teacher), [4, 8, 4]
    ids, row, at = breadcrumbs._told(replies)
    p = teacher.logits(teacher(ids)[0][row, at - 1]).log_softmax(-1)
    scores = breadcrumbs.student_scores(student, replies, rates)
    q = scores[:, :BEACON]
    loss, agree = breadcrumbs.distillation_loss(student, teacher, replies, rates)
    assert torch.allclose(loss, (p.exp() * (p - q)).sum(1).mean(), rtol=1e-4)
    assert agree == pytest.approx((p.argmax(1) == scores.argmax(1)).float().mean().item())


def test_advantages_compare_replies_to_one_problem():
    rewards = torch.tensor([[1.0, 0, 0, 0], [1, 1, 1, 1], [0, 0, 0, 0], [1, 1, 0, 0]])
    got = breadcrumbs.group_advantages(rewards).view(4, 4)
    assert (got[1:3] == 0).all() and torch.allclose(got.sum(1), torch.zeros(4), atol=1e-5)
    assert torch.allclose(got[0, 0], torch.tensor(3**0.5), atol=1e-4)
    assert torch.allclose(got[3], torch.tensor([1.0, 1, -1, -1]), atol=1e-4)


def test_both_networks_begin_as_the_start_and_so_do_their_averages(tmp_path):
    made, start = fresh(tmp_path), lively()
    rows = start.embedding.weight
    for net in (made.net, made.average):
        assert torch.equal(net.embedding.weight, torch.cat([rows, rows.mean(0, keepdim=True)]))
        assert torch.equal(net.blocks[1].down.weight, start.blocks[1].down.weight)
    for net in (made.policy.net, made.policy.average):
        assert torch.equal(weights_of(net), weights_of(start))


def test_replies_are_distilled_before_the_policy_that_wrote_them_changes(tmp_path, monkeypatch):
    order = []
    monkeypatch.setattr(breadcrumbs, "distill", lambda *_: order.append("distill") or {})
    monkeypatch.setattr(breadcrumbs, "improve", lambda *_: order.append("improve") or {})
    breadcrumbs.rollout_step(fresh(tmp_path), Random(0))
    assert order == ["distill", "improve"]


def test_the_policy_gradient_makes_rewarded_tokens_likelier(tmp_path):
    """The reward is an even first token."""
    made = fresh(tmp_path)
    made.policy.scale_rates(3.0)
    made.policy.net.norm.weight.data.fill_(1.0)  # nearly every token has a chance
    prompts = [[400, 500, 600], [700, 800, 900]]

    def evenness():
        with torch.no_grad():
            hidden, _ = made.policy.net(torch.tensor(prompts))
            return made.policy.net.logits(hidden[:, -1]).softmax(-1)[:, ::2].sum(-1)

    before, draws = evenness(), torch.Generator().manual_seed(0)
    for i in range(8):
        numbers = torch.rand(32, 3, dtype=torch.float64, generator=draws)
        replies = rollout.sample(made.policy.net, prompts, 3, 16, numbers)
        rewards = torch.tensor([float(r.ids[3] % 2 == 0) for r in replies]).view(2, 16)
        report = breadcrumbs.improve(made, replies, breadcrumbs.group_advantages(rewards), Random(i))
        assert report["used"] == 1.0
    assert (evenness() > before + 0.05).all()


def test_problems_answered_all_alike_do_not_move_the_policy(tmp_path):
    made = fresh(tmp_path)
    made.policy.scale_rates(1.0)
    before = weights_of(made.policy.net)
    replies = replies_of(made.policy.net, 4)
    report = breadcrumbs.improve(made, replies, breadcrumbs.group_advantages(torch.ones(2, 2)), Random(0))
    assert report == {"used": 0.0, "clipped": 0.0} and torch.equal(weights_of(made.policy.net), before)
    breadcrumbs.improve(made, replies, breadcrumbs.group_advantages(torch.tensor([[1.0, 1], [1, 0]])), Random(0))
    assert not torch.equal(weights_of(made.policy.net), before)


def _uneven(folder, plan):
    """A step of process 0, which has something to learn; the replies of any other are all right and none is distilled."""
    made, rank = breadcrumbs.BreadcrumbsRun(plan, folder, lively()), side_by_side.rank()
    made.policy.scale_rates(1.0)
    made.scale_rates(1.0)
    replies = replies_of(made.policy.net, 4, seed=rank)
    rewards = torch.tensor([[1.0, 0], [1, 0]]) if rank == 0 else torch.ones(2, 2)
    breadcrumbs.distill(made, replies, rewards * (1 - rank), Random(rank))
    breadcrumbs.improve(made, replies, breadcrumbs.group_advantages(rewards), Random(rank))
    torch.save([weights_of(made.net), weights_of(made.policy.net)], folder / f"{side_by_side.count()}-{rank}.pt")


def test_processes_side_by_side_stay_equal_where_one_has_nothing_to_learn(tmp_path):
    plan = replace(PLAN, tokens=40, breadcrumbs=replace(CRUMBS, only_right=True))
    side_by_side.start(2, _uneven, tmp_path, plan)
    side_by_side.start(1, _uneven, tmp_path, plan)
    one, other, alone = (torch.load(tmp_path / f"{name}.pt") for name in ("2-0", "2-1", "1-0"))
    made = fresh(tmp_path, plan)
    for a, b, c, start in zip(one, other, alone, map(weights_of, (made.net, made.policy.net)), strict=True):
        assert torch.equal(a, b)
        assert (a - c).abs().mean() < 0.3 * (c - start).abs().mean(), "nothing is learned from nothing"


class Watched:
    """A learner that keeps the gradient of an update, averaged over the processes."""

    def __init__(self, net):
        self.net = net

    def update(self, keep):
        side_by_side.average_gradients(self.net)
        self.gradient = weights_of_gradients(self.net)


def _unequal(folder, shares):
    """The gradient of a part of the replies in each process."""
    net, rank = lively().requires_grad_(True), side_by_side.rank()
    mine = [replies_of(lively(), 4)[i] for i in shares[rank]]
    watched = Watched(net)
    loss = breadcrumbs.policy_loss(net, mine, torch.ones(len(mine)), 1.0, 0.2)[0] if mine else None
    breadcrumbs._learn(watched, loss, mine, 0.9)
    torch.save(watched.gradient, folder / f"{rank}.pt")


@pytest.mark.parametrize("shares", [[[0, 1, 2], [3]], [[0, 1, 2, 3], []]])
def test_every_token_counts_alike_whichever_process_has_it(tmp_path, shares):
    side_by_side.start(2, _unequal, tmp_path, shares)
    both = [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]
    _unequal(tmp_path, [[0, 1, 2, 3]])
    whole = torch.load(tmp_path / "0.pt")
    assert whole.abs().max() > 0 and all(torch.allclose(one, whole, atol=1e-6, rtol=1e-4) for one in both)


@pytest.mark.parametrize(("shift", "advantage", "moves"), [(-1, 1, False), (1, 1, True), (-1, -1, True), (1, -1, False)])
def test_ratios_are_clipped_on_the_side_that_has_gone_far_enough(shift, advantage, moves):
    """`shift` moves the log-probability at sampling, so -1 means that the token has become e times likelier since."""
    net = lively()
    replies = [replace(r, log_probs=r.log_probs + shift) for r in replies_of(net)]
    net.requires_grad_(True)
    loss, clipped = breadcrumbs.policy_loss(net, replies, torch.full((3,), float(advantage)), 1.0, 0.2)
    loss.backward()
    assert clipped == 1.0
    assert bool(weights_of_gradients(net).abs().max() > 0) is moves


def weights_of_gradients(net):
    return torch.cat([p.grad.flatten() for p in net.parameters()])


def test_distillation_lowers_the_kl_under_the_beacon_mask(tmp_path, monkeypatch):
    """At the rates of the recipe, each of which is drawn."""
    drawn, loss = [], breadcrumbs.distillation_loss
    made = fresh(tmp_path)
    made.scale_rates(1.0)
    replies, rates = replies_of(made.policy.net), [4, 8, 4]

    def gap():
        with torch.no_grad():
            return loss(made.net, made.policy.net, replies, rates)[0].item()

    monkeypatch.setattr(breadcrumbs, "distillation_loss", lambda s, t, r, c: (drawn.extend(c), loss(s, t, r, c))[1])
    before, policy = gap(), weights_of(made.policy.net)
    for i in range(12):
        breadcrumbs.distill(made, replies, torch.zeros(1, 3), Random(i))
    assert gap() < 0.7 * before
    assert set(drawn) == set(PLAN.beacon_every) and len(drawn) == 12 * len(replies)
    assert torch.equal(weights_of(made.policy.net), policy), "the teacher is not taught"


def test_only_right_replies_are_distilled_if_the_recipe_says_so(tmp_path, monkeypatch):
    seen = []
    loss = breadcrumbs.distillation_loss
    monkeypatch.setattr(breadcrumbs, "distillation_loss", lambda s, t, r, c: (seen.extend(r), loss(s, t, r, c))[1])
    made = fresh(tmp_path, replace(PLAN, breadcrumbs=replace(CRUMBS, only_right=True)))
    replies = replies_of(made.policy.net)
    breadcrumbs.distill(made, replies, torch.tensor([[0.0, 1, 0]]), Random(0))
    assert len(seen) == 1 and seen[0] is replies[1]
    before = weights_of(made.net)
    assert breadcrumbs.distill(made, replies, torch.zeros(1, 3), Random(0)) == {"kl": None, "agree": None}
    assert torch.equal(weights_of(made.net), before)
    breadcrumbs.distill(fresh(tmp_path), replies, torch.zeros(1, 3), Random(0))
    assert len(seen) == 4


def test_the_rate_is_full_through_the_warm_up_and_then_falls_to_nothing(tmp_path):
    made, factors = fresh(tmp_path, replace(PLAN, warmup=2)), []
    for made.step in range(PLAN.steps):
        factors.append(made.set_rate())
        assert made.policy.optimizers[0].param_groups[0]["lr"] == pytest.approx(3e-3 * factors[-1])
        assert made.optimizers[0].param_groups[0]["lr"] == pytest.approx(3e-3 * factors[-1])
    assert factors == pytest.approx([0.5, 1, 1, 0.75, 0.5, 0.25])


def test_the_warm_up_draws_every_rate_under_the_mask(tmp_path, monkeypatch):
    seen = []
    batch = run.task_batch
    monkeypatch.setattr(run, "task_batch", lambda *a: (seen.append(a), batch(*a))[1])
    made = fresh(tmp_path)
    for i in range(8):
        breadcrumbs.take_step(made, Random(i))
    assert {a[6] for a in seen} == {4, 8} and {a[5] for a in seen} == {"beacons"} and {a[4] for a in seen} == {True}


def test_rollouts_have_lengths_of_their_own_and_reference_traces_beside_them(tmp_path, monkeypatch):
    crumbs = replace(CRUMBS, warm_up=0, thoughts={"series": (3, 3)}, references=2)
    drawn, beside = [], []
    generate, batch = breadcrumbs.generate, run.task_batch
    monkeypatch.setattr(breadcrumbs, "generate", lambda *a: (drawn.append((a[0], a[3])), generate(*a))[1])
    monkeypatch.setattr(run, "task_batch", lambda *a: (beside.append((a[1], a[2])), batch(*a))[1])
    made = fresh(tmp_path, replace(PLAN, breadcrumbs=crumbs))
    report = breadcrumbs.take_step(made, Random(0))
    assert drawn == [("series", 3)] and len(beside) == 2 and all(thoughts <= 2 for _, thoughts in beside)
    assert report["thoughts"] == 3 and report["reference"] > 0 and "right" in report


class Interrupted(Exception):
    pass


@pytest.mark.parametrize("mode", ["joint", "distill"])
def test_a_stopped_run_goes_on_as_if_it_had_not_been(tmp_path, monkeypatch, mode):
    monkeypatch.setattr(breadcrumbs, "is_right", end_even)
    plan = replace(PLAN, breadcrumbs=replace(CRUMBS, mode=mode, references=1))
    whole = fresh(tmp_path / "whole", plan)
    run.loop(whole, breadcrumbs.take_step, lambda step: True)

    def stopping(made, rng):
        if made.step == 4:
            made.save()
            raise Interrupted
        return breadcrumbs.take_step(made, rng)

    with pytest.raises(Interrupted):
        run.loop(fresh(tmp_path / "cut", plan), stopping, lambda step: True)
    second = breadcrumbs.BreadcrumbsRun(plan, tmp_path / "cut")
    second.resume()
    assert second.step == 4
    run.loop(second, breadcrumbs.take_step, lambda step: True)
    for a, b in ((whole, second), (whole.policy, second.policy)):
        assert torch.equal(weights_of(a.net), weights_of(b.net)) and torch.equal(weights_of(a.average), weights_of(b.average))
    logs = [[json.loads(x) for x in (tmp_path / name / "log.jsonl").read_text().splitlines()] for name in ("whole", "cut")]
    assert [{**x, "minutes": 0} for x in logs[0]] == [{**x, "minutes": 0} for x in logs[1]]
    assert whole.tokens == second.tokens > 0
    moved = not torch.equal(weights_of(whole.policy.net), weights_of(lively()))
    assert moved is (mode == "joint"), "the policy learns in the joint mode only"
