"""Breadcrumbs training: the two losses and the run (needs torch)."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest

torch = pytest.importorskip("torch")
from crumbs import BEACON, PLAIN, lively, next_scores, replies_of  # noqa: E402

try:
    from zoomr_models import export, tasks, tokenizer
    from zoomr_models.train import breadcrumbs, network, recipe, rollout, run, side_by_side
except ImportError:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from models import export, tasks, tokenizer
    from models.train import breadcrumbs, network, recipe, rollout, run, side_by_side

TOML = Path(breadcrumbs.__file__).parent / "breadcrumbs.toml"
STAGE = recipe.Stage(1.0, {"series": (1, 2), "dag": (1, 2)}, 1.0, 0, 4, 0.0)
CRUMBS = recipe.Breadcrumbs(
    mode="joint", warm_up=2, problems=2, samples=4, temperature=1.0, slack=0.3, clip=0.2, policy_lr=3e-3
)
PLAN = recipe.Recipe(
    "crumbs", 0, 0, 6, 1, 300, 3e-3, 3e-3, 1, 0.5, (), 0.9, replace(PLAIN, vocab=BEACON + 1), (STAGE,),
    style="beacons", beacon_every=(4, 8), breadcrumbs=CRUMBS,
)  # fmt: skip


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


def fresh(tmp_path, plan=PLAN):
    return breadcrumbs.BreadcrumbsRun(plan, tmp_path, lively())


def weights_of(net):
    return torch.cat([p.detach().flatten() for p in net.parameters()])


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


def end_even(reply, problem):
    """A reward that a random network gets half of the time."""
    return int(reply.ids[-1]) % 2 == 0


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


RECIPE = """
name = "t"
style = "beacons"
seed = 0
minutes = 0.0
steps = 3
threads = 1
tokens = 300
lr = 3e-3
embedding_lr = 3e-3
warmup = 1
recall_weight = 0.5
index_layers = []
beacon_every = [4, 8]
average = 0.9
[breadcrumbs]
mode = "joint"
warm_up = 1
problems = 2
samples = 4
temperature = 1.0
slack = 0.3
clip = 0.2
policy_lr = 1e-3
references = 1
thoughts = { series = [1, 1] }
[shape]
layers = 2
width = 64
heads = 2
kv_heads = 1
ff = 96
[[stage]]
until = 1.0
masked = 1.0
recall_tokens = 0
recall_pairs = 4
index_weight = 0.0
thoughts = { series = [1, 2] }
"""


@pytest.fixture
def folder(tmp_path):
    """A recipe, the comparison that extends it, and a plain checkpoint to begin with."""
    (tmp_path / "joint.toml").write_text(RECIPE)
    (tmp_path / "alone.toml").write_text('extends = "joint.toml"\nname = "alone"\n[breadcrumbs]\nmode = "distill"\n')
    plain = run.Run(replace(PLAN, shape=PLAIN, name="plain"), tmp_path)
    plain.average.load_state_dict(lively().state_dict())
    plain.save()
    (tmp_path / "checkpoint.pt").rename(tmp_path / "plain.pt")
    return tmp_path


@pytest.mark.parametrize("name", ["joint", "alone"])
def test_a_command_trains_and_another_measures(folder, name, capsys, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(breadcrumbs, "is_right", end_even)
    out = folder / name
    breadcrumbs.main([str(folder / f"{name}.toml"), str(out), "--start", str(folder / "plain.pt")])
    lines = [json.loads(x) for x in (out / "log.jsonl").read_text().splitlines()]
    assert [x["step"] for x in lines] == [1, 2, 3] and "loss" in lines[0] and all(x["kl"] > 0 and x["thoughts"] == 1 and x["reference"] > 0 for x in lines[1:])
    assert all(("used" in x) is (name == "joint") for x in lines[1:])
    assert (out / "loss.png").stat().st_size > 1000
    net, state = export.load_network(out / "checkpoint.pt")
    policy, _ = export.load_network(out / "policy.pt")
    assert net.shape.vocab == BEACON + 1 and policy.shape.vocab == BEACON and state["step"] == 3
    assert torch.equal(weights_of(policy), weights_of(lively())) is (name == "alone")
    breadcrumbs.main([str(folder / f"{name}.toml"), str(out)])  # a finished run has nothing left to do
    assert len((out / "log.jsonl").read_text().splitlines()) == 3
    for checkpoint, kinds in (("checkpoint", ["c = 4", "c = 8", "c = 16"]), ("policy", ["uncompressed"])):
        monkeypatch.setattr(sys, "argv", ["rollout", str(out / f"{checkpoint}.pt"), "--families", "series", "--thoughts", "1", "-n", "2"])
        rollout.main()
        told = capsys.readouterr().out.splitlines()
        assert len(told) == len(kinds) and all(f"series  {kind}" in line for kind, line in zip(kinds, told))


def test_measures_are_what_they_say():
    """Of a network that knows nothing, token by token from the slow view of its caches."""
    problems = tasks.generate("series", 2, 0, 1, "dev")
    net = lively(replace(PLAIN, vocab=BEACON + 1))
    share, whole = rollout.teacher_forced(net, problems, 4)
    right = told = 0
    for p in problems:
        prompt, reply = tokenizer.encode(tasks.prompt_text(p.prompt)), tokenizer.encode(p.plain_trace)
        for n, token in enumerate(reply):
            right += int(next_scores(net, prompt + reply[:n], len(prompt), 4).argmax()) == token
            told += 1
    assert share == pytest.approx(right / told) and whole == 0
    assert rollout.sampled(net, problems, 4) == 0


def test_right_answers_and_whole_traces_are_counted(monkeypatch):
    """Replies that are two of three reference traces, and a network that misses one token of one trace."""
    problems = tasks.generate("series", 3, 0, 1, "dev")
    written = [tokenizer.encode(p.plain_trace) + [tokenizer.IM_END] * (not p.plain_trace.endswith("<|im_end|>")) for p in problems]
    written[1] = written[1][:-3]
    monkeypatch.setattr(rollout, "sample", lambda net, prompts, limit, every: [
        rollout.Reply(torch.tensor(prompt + reply), len(prompt), torch.zeros(len(reply))) for prompt, reply in zip(prompts, written, strict=True)
    ])  # fmt: skip
    net, calls = lively(replace(PLAIN, vocab=BEACON + 1)), []
    assert rollout.sampled(net, problems, 4) == 2

    def told(net, hidden, ids, weights, sources):
        calls.append(ids)
        hits = weights > 0
        hits[0, int(hits[0].nonzero()[-1])] = len(calls) != 2
        return torch.zeros(()), hits

    monkeypatch.setattr(f"{rollout.__package__}.losses.token_loss", told)
    share, whole = rollout.teacher_forced(net, problems, 4)
    assert whole == 2 and 0.9 < share < 1


def test_what_is_missing_is_said(folder, capsys):
    out = str(folder / "out")

    def refuses(*arguments):
        with pytest.raises(SystemExit) as stop:
            breadcrumbs.main([str(a) for a in arguments])
        assert stop.value.code == 2
        return capsys.readouterr().err

    assert "--start" in refuses(folder / "joint.toml", out)
    assert "there is no file" in refuses(folder / "none.toml", out)
    assert "there is no file" in refuses(folder / "joint.toml", out, "--start", folder / "none.pt")
    (folder / "bad.toml").write_text('extends = "joint.toml"\n[breadcrumbs]\nmode = "both"\n')
    assert "'both'" in refuses(folder / "bad.toml", out, "--start", folder / "plain.pt")
    (folder / "far.toml").write_text('extends = "joint.toml"\n[breadcrumbs]\nthoughts = { serie = [1, 2] }\n')
    assert "no family serie" in refuses(folder / "far.toml", out, "--start", folder / "plain.pt")
    (folder / "less.toml").write_text('extends = "joint.toml"\n[breadcrumbs]\nreferences = -1\n')
    assert "references is -1" in refuses(folder / "less.toml", out, "--start", folder / "plain.pt")
    (folder / "long.toml").write_text('extends = "joint.toml"\n[breadcrumbs]\nwarm_up = 3\n')
    assert "3 steps" in refuses(folder / "long.toml", out, "--start", folder / "plain.pt")
    (folder / "wide.toml").write_text('extends = "joint.toml"\n[shape]\nwidth = 128\n')
    assert "width=128" in refuses(folder / "wide.toml", out, "--start", folder / "plain.pt")
    assert "[breadcrumbs]" in refuses(TOML.parent / "plain.toml", out, "--start", folder / "plain.pt")
    fresh(folder, replace(PLAN, name="other")).save()
    assert "'other'" in refuses(folder / "joint.toml", folder)


def test_the_compared_recipes_differ_in_the_mode_alone():
    whole, joint, alone = (recipe.load_recipe(TOML.parent / f"{name}.toml") for name in ("breadcrumbs", "weak-joint", "weak-distill"))
    assert (joint.breadcrumbs.mode, alone.breadcrumbs.mode) == ("joint", "distill")
    assert replace(alone, name=joint.name, breadcrumbs=joint.breadcrumbs) == joint
    assert replace(alone.breadcrumbs, mode="joint") == joint.breadcrumbs
    assert (whole.shape, whole.breadcrumbs.noise) == (joint.shape, 0) and joint.breadcrumbs.noise > 0
    for made in (whole, joint):
        assert breadcrumbs._checked(made, TOML) is made and set(made.beacon_every) == {4, 8, 16}
    plain = recipe.load_recipe(TOML.parent / "plain.toml").shape
    assert joint.shape == replace(plain, vocab=BEACON + 1, layers=plain.layers + joint.breadcrumbs.layers)
    with pytest.raises(ValueError, match="at least 2"):
        replace(joint.breadcrumbs, samples=1)
    with pytest.raises(ValueError, match="noise -1"):
        replace(joint.breadcrumbs, noise=-1)


def test_a_recipe_with_noise_begins_with_both_networks_weakened_alike_in_every_process(tmp_path):
    """What was given stays as it is: a run is made once to be checked and once in each process."""
    start, plan = lively(), replace(PLAN, breadcrumbs=replace(CRUMBS, noise=0.5))
    first, second = (breadcrumbs.BreadcrumbsRun(plan, tmp_path, start) for _ in range(2))
    assert torch.equal(weights_of(start), weights_of(lively()))
    whole = breadcrumbs.BreadcrumbsRun(PLAN, tmp_path, start)
    for one, other, clean in ((first.net, second.net, whole.net), (first.policy.net, second.policy.net, whole.policy.net)):
        assert torch.equal(weights_of(one), weights_of(other))
        for a, b in zip(one.parameters(), clean.parameters(), strict=True):
            if b.ndim > 1 and b.std() > 0:
                assert ((a - b).std() / b.std()).item() == pytest.approx(0.5, rel=0.2)
            elif b.ndim == 1:
                assert torch.equal(a, b)
    assert torch.equal(weights_of(first.net), weights_of(first.average))
