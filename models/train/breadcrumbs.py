"""Breadcrumbs: a policy is improved by its reward while its rollouts teach a second network to read beacons.

`python -m models.train.breadcrumbs models/train/breadcrumbs.toml OUT --start models/plain-tiny.gguf` trains both jointly;
with `--start models/breadcrumbs-tiny.gguf --policy models/plain-tiny.gguf` a network that has beacons goes on.
`models/train/weak-joint.toml` and `weak-distill.toml` compare joint training with distillation alone: as many rollouts are distilled, but of the policy
as it began, which in both was made wrong often. Every run resumes from OUT/checkpoint.pt. That file holds the beacon network where other checkpoints hold theirs, so every tool that takes a checkpoint reads it; the
policy is written beside it as OUT/policy.pt. OUT/log.jsonl has every step of every process, OUT/loss.png is drawn at the end.

Owned by models/train; a command, called by nothing but its tests. Sampling is in `rollout.py`, the beacon mask in `beacons.py`, the loop, the
checkpoint and the supervised step in `run.py`.

A step: problems of one family and length are drawn, the policy (pi_RL, which always has everything in view) answers each several times,
the replies are distilled into the beacon network (pi_BR), and then, in the mode `joint`, the policy takes its gradient. Distilling comes first, so
that the teacher is the policy that wrote the replies.

Source: Breadcrumbs Reasoning (arXiv 2510.13797), read second-hand. It says that the two are trained jointly, that the reward is an exact
answer, that beacons come at a fixed rate and that the student sees beacons under the eviction mask and the teacher everything. It does
not say (to us) what follows; chosen here:

- Policy gradient: the reward less the mean of the replies to the same problem, in their standard deviations (GRPO), with a clipped importance ratio,
  averaged over tokens. No value network, and no KL to the start: the reward cannot be deceived, and a reply that loses the wording loses it.
  Problems whose replies are all right or all wrong say nothing and cost nothing.
- AdamW for the policy where the supervised loop has Muon: Muon makes every update equally large, also when next to nothing is left to learn.
- Distillation loss: KL from the teacher's distribution to the student's at each token of the reply. It uses the same tokens as cross-entropy and
  tells more with each. The beacon's own score is part of the student's distribution, so it learns never to say one.
- All replies are distilled, the wrong ones too (`only_right` changes that). Choosing the right ones improves the student beyond its teacher by
  itself, and the comparison with distillation alone would no longer be one of joint training.
- One network for all rates: c is drawn for each reply. It ships as one file instead of three, and a beacon can see how much it stands for. The paper
  has one network a rate.
- A supervised warm-up (`warm_up` steps on reference traces under the beacon mask) before the first rollout, in either mode. The paper starts from a
  pretrained model and has none; here a beacon begins as one new embedding row that means nothing, and reference traces cost no sampling.
- The beacon network has three layers more than the policy. Where they look is supervised (`gathering.py` says why), and so is what a beacon holds
  (`held.py`).
- Rollouts are of shorter problems than those that are evaluated, as their tokens are sampled one after the other on two cores. So that long traces
  are not forgotten meanwhile, each rollout step is followed by `references` supervised ones of the stage's lengths, in either mode.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from random import Random

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from .. import tokenizer as tok
from ..export import load_network
from ..tasks import Problem, generate, prompt_text
from . import side_by_side
from .batches import Row, reply_row
from .beacons import with_beacons
from .gathering import with_layers
from .held import Readers
from .network import Network
from .recipe import Recipe, load_recipe
from .rollout import Reply, is_right, reply_limit, sample
from .run import Learner, Run, loop, train_step


_READERS_LR = 3e-3
"""AdamW, of `Readers`, which serve training alone; it does not fall."""


def with_beacon_row(net: Network) -> Network:
    """A copy of ``net`` that knows one token more, the beacon, embedded at the mean of the others."""
    grown = Network(replace(net.shape, vocab=net.shape.vocab + 1))
    state = net.state_dict()
    rows = state["embedding.weight"]
    grown.load_state_dict({**state, "embedding.weight": torch.cat([rows, rows.mean(0, keepdim=True)])})
    return grown


@torch.no_grad()
def weakened(net: Network, noise: float, seed: int) -> Network:
    """A copy of ``net`` with normal noise on every matrix, in its own standard deviations: a stand-in for one that was trained for less long."""
    made, draws = Network(net.shape), torch.Generator().manual_seed(seed)
    made.load_state_dict(net.state_dict())
    for p in made.parameters():
        if p.ndim > 1:
            p.add_(noise * p.std() * torch.randn(p.shape, generator=draws))
    return made


class BreadcrumbsRun(Run):
    """A run whose own network is the beacon network, and the policy beside it."""

    def __init__(self, recipe: Recipe, out: Path, start: Network | None = None, policy: Network | None = None) -> None:
        """Both networks begin as ``start``, a plain one, or the one with beacons as ``start`` and the policy as ``policy``; None where a checkpoint
        is there to resume from. Raises ValueError for one of another shape."""
        super().__init__(recipe, out)
        layers = recipe.breadcrumbs.layers
        shape = replace(recipe.shape, vocab=recipe.shape.vocab - 1, layers=recipe.shape.layers - layers)
        teacher = Network(shape)
        if start is not None:
            plain = policy or start
            if plain.shape != shape:
                raise ValueError(f"the {'policy' if policy else 'start'} is {plain.shape}, but the recipe needs {shape}")
            if policy and start.shape != recipe.shape:
                raise ValueError(f"the start is {start.shape}, but with a policy beside it the recipe needs {recipe.shape}")
            begun = start if policy else with_beacon_row(start)
            if layers and not policy:
                begun = with_layers(begun, layers, recipe.seed)
            if recipe.breadcrumbs.noise:
                begun, plain = (weakened(net, recipe.breadcrumbs.noise, recipe.seed) for net in (begun, plain))
            teacher.load_state_dict(plain.state_dict())
            for net in (self.net, self.average):
                net.load_state_dict(begun.state_dict())
        self.readers = Readers(recipe.shape.width, max(recipe.beacon_every), recipe.seed)
        self.readers_optimizer = torch.optim.AdamW(self.readers.parameters(), _READERS_LR, (0.9, 0.98), weight_decay=0.0)
        rate = recipe.breadcrumbs.policy_lr
        self.policy = Learner(teacher, [torch.optim.AdamW(teacher.parameters(), rate, (0.9, 0.98), weight_decay=0.0)], (rate,))

    def state(self) -> dict:
        readers = {"weights": self.readers.state_dict(), "optimizer": self.readers_optimizer.state_dict()}
        return {**super().state(), "policy": self.policy.state(), "readers": readers}

    def load(self, state: dict) -> None:
        if "readers" not in state:
            raise ValueError(f"{self.out} holds a run of an earlier version, which nothing was read back from; give another folder")
        super().load(state)
        self.policy.load(state["policy"])
        self.readers.load_state_dict(state["readers"]["weights"])
        self.readers_optimizer.load_state_dict(state["readers"]["optimizer"])

    def update(self, keep: float) -> None:
        super().update(keep)
        if self.readers.weight.grad is not None:  # a distilled reply has none
            side_by_side.average_gradients(self.readers)
            self.readers_optimizer.step()
            self.readers_optimizer.zero_grad()

    def save(self) -> None:
        super().save()
        super().save("policy", self.policy.state())

    def set_rate(self) -> float:
        """Linear rise at the start, full to the end of the warm-up or to `fall`, then a linear fall to 0 at the end; the policy, which learns
        after the warm-up, falls from there. Returns the beacon network's factor."""
        left, crumbs, rise = self.recipe.steps - self.step, self.recipe.breadcrumbs, (self.step + 1) / self.recipe.warmup

        def factor(since: int) -> float:
            return min(1.0, rise, left / max(1, self.recipe.steps - since))

        found = factor(crumbs.warm_up if crumbs.fall is None else crumbs.fall)
        self.scale_rates(found)
        self.policy.scale_rates(factor(crumbs.warm_up))
        return found


def roll_out(net: Network, problems: Sequence[Problem], recipe: Recipe, rng: Random) -> tuple[list[Reply], Tensor]:
    """The policy's replies to the problems and their rewards, float32 [problems, samples]: 1 for the exact answer, else 0."""
    crumbs = recipe.breadcrumbs
    limit = reply_limit(problems, crumbs.slack)
    draws = torch.Generator().manual_seed(rng.getrandbits(48))
    uniforms = torch.rand(len(problems) * crumbs.samples, limit, dtype=torch.float64, generator=draws)
    prompts = [tok.encode(prompt_text(p.prompt)) for p in problems]
    replies = sample(net, prompts, limit, crumbs.samples, uniforms, crumbs.temperature)
    rewards = [float(is_right(reply, problems[i // crumbs.samples])) for i, reply in enumerate(replies)]
    return replies, torch.tensor(rewards).view(len(problems), crumbs.samples)


def group_advantages(rewards: Tensor) -> Tensor:
    """float32 [problems * samples]: how many standard deviations each reward is above the mean of its problem; 0 where all are equal."""
    off = rewards - rewards.mean(1, keepdim=True)
    return (off / (rewards.std(1, unbiased=False, keepdim=True) + 1e-6)).flatten()


def _told(replies: Sequence[Reply]) -> tuple[Tensor, Tensor, Tensor]:
    """(ids [B, T], row [N], at [N]), all int64: the replies padded, and the places of their own tokens, row by row."""
    ids = pad_sequence([r.ids for r in replies], batch_first=True)
    place = torch.arange(ids.shape[1])
    own = torch.stack([(place >= r.prompt) & (place < len(r.ids)) for r in replies])
    return ids, *own.nonzero(as_tuple=True)


def log_probs(net: Network, replies: Sequence[Reply], temperature: float) -> tuple[Tensor, Tensor]:
    """float32 [N], of the replies' own tokens, row by row, as ``sample`` computes them; and int64 [N], the reply each is of."""
    ids, row, at = _told(replies)
    hidden, _ = net(ids)
    scores = (net.logits(hidden[row, at - 1]) / temperature).log_softmax(-1)
    return scores.gather(-1, ids[row, at, None])[:, 0], row


def policy_loss(
    net: Network, replies: Sequence[Reply], advantages: Tensor, temperature: float, clip: float
) -> tuple[Tensor, float]:
    """The clipped policy-gradient loss, a mean over the replies' tokens, and the share of tokens whose ratio was clipped.

    advantages float32 [B].
    """
    now, row = log_probs(net, replies, temperature)
    ratio = (now - torch.cat([r.log_probs for r in replies])).exp()
    gain = advantages[row]
    bounded = ratio.clamp(1 - clip, 1 + clip)
    return -torch.minimum(ratio * gain, bounded * gain).mean(), (ratio != bounded).float().mean().item()


def _beacon_row(reply: Reply, every: int) -> tuple[Row, np.ndarray, np.ndarray]:
    """What `with_beacons` makes of a reply."""
    own = np.arange(len(reply.ids)) >= reply.prompt
    return with_beacons(reply_row(reply.ids.numpy(), reply.prompt, own.astype(np.float32)), every)


def student_scores(student: Network, replies: Sequence[Reply], rates: Sequence[int]) -> Tensor:
    """Log-probabilities [N, vocab] of the replies' tokens, row by row, under beacons every ``rates[b]`` tokens of reply b."""
    rows, seen, sources = zip(*map(_beacon_row, replies, rates), strict=True)
    ids = pad_sequence([torch.from_numpy(r.ids) for r in rows], batch_first=True)
    weights = pad_sequence([torch.from_numpy(r.weights) for r in rows], batch_first=True)
    source = pad_sequence([torch.from_numpy(s) for s in sources], batch_first=True)
    mask = torch.eye(ids.shape[1], dtype=torch.bool).repeat(len(rows), 1, 1, 1)  # padding must attend to something
    for m, view in zip(mask, seen, strict=True):
        m[0, : len(view), : len(view)] = torch.from_numpy(view)
    hidden, _ = student(ids, mask)
    row, at = (weights > 0).nonzero(as_tuple=True)
    return student.logits(hidden[row, source[row, at]]).log_softmax(-1)


def distillation_loss(
    student: Network, teacher: Network, replies: Sequence[Reply], rates: Sequence[int]
) -> tuple[Tensor, float]:
    """KL from the teacher's distribution to the student's, nats a token, and the share of tokens at which both have the same favourite.

    The teacher sees all of a reply; the student sees what eviction leaves, with a beacon every ``rates[b]`` tokens of reply b.
    """
    with torch.no_grad():
        ids, row, at = _told(replies)
        goal = teacher.logits(teacher(ids)[0][row, at - 1]).log_softmax(-1)
    scores = student_scores(student, replies, rates)
    loss = F.kl_div(scores[:, : goal.shape[-1]], goal, reduction="batchmean", log_target=True)
    return loss, (scores.argmax(-1) == goal.argmax(-1)).float().mean().item()


def _parts(chosen: list[int], replies: Sequence[Reply], tokens: int, rng: Random) -> Iterator[list[int]]:
    """``chosen`` in random order, cut into equal parts of about ``tokens`` tokens at most.

    As many parts as the process with most of them has, since all take their steps together; some may be empty.
    """
    chosen = rng.sample(chosen, len(chosen))
    rows = max(1, tokens // max((len(replies[i].ids) for i in chosen), default=1))
    n = side_by_side.most(-(-len(chosen) // rows))
    yield from (chosen[i::n] for i in range(n))


def _learn(learner: Learner, loss: Tensor | None, replies: Sequence[Reply], keep: float) -> None:
    """An update along ``loss``, a mean over the tokens of ``replies``, so that those of every process count alike; None of a process without any."""
    part = side_by_side.share(sum(len(r.ids) - r.prompt for r in replies))
    if loss is None:
        for p in learner.net.parameters():
            p.grad = torch.zeros_like(p)
    else:
        (part * loss).backward()
    learner.update(keep)


def distill(run: BreadcrumbsRun, replies: Sequence[Reply], rewards: Tensor, rng: Random) -> dict:
    """Update the beacon network on the replies, once each; returns what the log says of it."""
    recipe, losses, agreed = run.recipe, [], []
    right = rewards.flatten().tolist()
    chosen = [i for i, r in enumerate(right) if r or not recipe.breadcrumbs.only_right]
    for part in _parts(chosen, replies, recipe.tokens, rng):
        loss, mine = None, [replies[i] for i in part]
        if part:
            rates = [rng.choice(recipe.beacon_every) for _ in part]
            loss, agree = distillation_loss(run.net, run.policy.net, mine, rates)
            losses.append(loss.item())
            agreed.append(agree)
        _learn(run, loss, mine, recipe.average)
        run.tokens += sum(len(r.ids) for r in mine) * side_by_side.count()  # about as many in every process
    return {"kl": float(np.mean(losses)), "agree": float(np.mean(agreed))} if losses else {"kl": None, "agree": None}


def improve(run: BreadcrumbsRun, replies: Sequence[Reply], advantages: Tensor, rng: Random) -> dict:
    """Update the policy on the replies that differ in reward from another to the same problem; returns what the log says of it."""
    recipe, crumbs, shares = run.recipe, run.recipe.breadcrumbs, []
    chosen = advantages.nonzero()[:, 0].tolist()
    for part in _parts(chosen, replies, recipe.tokens, rng):
        loss, mine = None, [replies[i] for i in part]
        if part:
            loss, share = policy_loss(run.policy.net, mine, advantages[part], crumbs.temperature, crumbs.clip)
            shares.append(share)
        _learn(run.policy, loss, mine, recipe.average)
    return {"used": len(chosen) / len(replies), "clipped": float(np.mean(shares)) if shares else 0.0}


def rollout_step(run: BreadcrumbsRun, rng: Random) -> dict:
    """Draw problems, let the policy answer, distill, and improve the policy if the mode says so; returns what the log says of it."""
    recipe = run.recipe
    spans = recipe.breadcrumbs.thoughts or recipe.stage(run.progress).thoughts
    family = sorted(spans)[run.step % len(spans)]
    thoughts = Random(f"{recipe.seed}/{run.step}").randint(*spans[family])  # processes wait for each other, so all draw one length
    problems = generate(family, recipe.breadcrumbs.problems, rng.getrandbits(48), thoughts, "train")
    replies, rewards = roll_out(run.policy.net, problems, recipe, rng)
    report = {
        "family": family, "thoughts": thoughts, "T": max(len(r.ids) for r in replies), "right": rewards.mean().item(),
        "ended": sum(r.ids[-1].item() == tok.IM_END for r in replies) / len(replies),
        **distill(run, replies, rewards, rng),
    }  # fmt: skip
    if recipe.breadcrumbs.mode == "joint":
        report |= improve(run, replies, group_advantages(rewards), rng)
    return report


def take_step(run: BreadcrumbsRun, rng: Random) -> dict:
    """One step: supervised during the warm-up, with rollouts and supervised ones beside them after it."""
    crumbs = run.recipe.breadcrumbs
    if run.step < crumbs.warm_up:
        return train_step(run, rng)
    report = rollout_step(run, rng)
    beside = Random(f"{run.recipe.seed}/{run.step}/references/{side_by_side.rank()}")  # the same problems in either mode
    losses = [train_step(run, beside)["loss"] for _ in range(crumbs.references)]
    return report | ({"reference": float(np.mean(losses))} if losses else {})


def train(recipe: Recipe, out: Path, start: Network | None = None, policy: Network | None = None) -> None:
    """Train to the end of the recipe and draw what the log says."""
    side_by_side.start(recipe.processes, _train, recipe, out, start, policy)
    plot(out)


def _train(recipe: Recipe, out: Path, start: Network | None, policy: Network | None) -> None:
    run = BreadcrumbsRun(recipe, out, start, policy)
    run.resume()
    loop(run, take_step, lambda step: True)


def plot(out: Path) -> None:
    """Draw OUT/loss.png from OUT/log.jsonl: right rollouts of the policy, and the beacon network's losses, by step."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    lines = [json.loads(x) for x in (out / "log.jsonl").read_text().splitlines()]
    figure, (top, bottom) = pyplot.subplots(2, figsize=(8, 7), sharex=True)
    for family in sorted({x["family"] for x in lines}):
        mine = [x for x in lines if x["family"] == family]
        rolled, warm = ([x for x in mine if key in x] for key in ("right", "loss"))
        top.plot([x["step"] for x in rolled], [x["right"] for x in rolled], ".", label=family)
        told = [x for x in rolled if x["kl"] is not None]
        (line,) = bottom.plot([x["step"] for x in told], [x["kl"] for x in told], ".", label=f"{family}, KL to the policy")
        bottom.plot([x["step"] for x in warm], [x["loss"] for x in warm], ",", color=line.get_color(), label=f"{family}, warm-up")
    top.set(ylabel="share of rollouts right", ylim=(0, 1))
    bottom.set(xlabel="step", ylabel="nats a token", yscale="log")
    top.legend()
    bottom.legend()
    figure.tight_layout()
    figure.savefig(out / "loss.png", dpi=110)
    pyplot.close(figure)


def _checked(recipe: Recipe, path: Path) -> Recipe:
    """The recipe, or ValueError with what is missing for this command."""
    if recipe.breadcrumbs is None or recipe.style != "beacons" or not recipe.beacon_every:
        raise ValueError(f"{path} needs style = \"beacons\", beacon_every and a [breadcrumbs] table; see models/train/breadcrumbs.toml")
    if recipe.steps <= recipe.breadcrumbs.warm_up:
        raise ValueError(f"{path} has {recipe.steps} steps, which leaves none after a warm-up of {recipe.breadcrumbs.warm_up}; set steps higher")
    return recipe


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipe", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--start", type=Path, help="plain network to begin with, a checkpoint or a GGUF file; not needed to resume")
    parser.add_argument("--policy", type=Path, help="plain network of the policy, where --start is a network with beacons that is to go on")
    args = parser.parse_args(arguments)
    for path in (args.recipe, args.start, args.policy):
        if path and not path.is_file():
            parser.error(f"there is no file {path}")
    if not args.start and not (args.out / "checkpoint.pt").is_file():
        parser.error(f"{args.out} holds no run to resume; give the plain network to begin with: --start models/plain-tiny.gguf")
    try:
        recipe = _checked(load_recipe(args.recipe), args.recipe)
        start, policy = (load_network(path)[0] if path else None for path in (args.start, args.policy))
        BreadcrumbsRun(recipe, args.out, start, policy).resume()  # what does not fit is said before any process is started
    except (ValueError, OSError) as error:
        parser.error(str(error))
    train(recipe, args.out, start, policy)


if __name__ == "__main__":
    main()
