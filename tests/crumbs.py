"""What the tests of Breadcrumbs training share: a small network that samples lively, replies of it, and the obvious way to score them (needs torch)."""

import sys
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest

torch = pytest.importorskip("torch")
try:
    from zoomr_models import tokenizer
    from zoomr_models.train import breadcrumbs, network, recipe, rollout
except ImportError:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from models import tokenizer
    from models.train import breadcrumbs, network, recipe, rollout

BEACON = tokenizer.BEACON
PLAIN = network.Shape(len(tokenizer.TOKENS), layers=2, width=64, heads=2, kv_heads=1, ff=96)
STAGE = recipe.Stage(1.0, {"series": (1, 2), "dag": (1, 2)}, 1.0, 0, 4, 0.0)
CRUMBS = recipe.Breadcrumbs(
    mode="joint", warm_up=2, problems=2, samples=4, temperature=1.0, slack=0.3, clip=0.2, policy_lr=3e-3
)
PLAN = recipe.Recipe(
    "crumbs", 0, 0, 6, 1, 300, 3e-3, 3e-3, 1, 0.5, (), 0.9, replace(PLAIN, vocab=BEACON + 1), (STAGE,),
    style="beacons", beacon_every=(4, 8), breadcrumbs=CRUMBS,
)  # fmt: skip


def lively(shape=PLAIN, seed=0):
    """A random network whose scores differ enough for a wrong key or place to show in what is sampled."""
    net = network.Network(shape)
    network.mimetic_init(net, seed)
    with torch.no_grad():
        net.norm.weight *= 6
    return net.requires_grad_(False)


def replies_of(net, n=3, limit=19, every=0, seed=0):
    """Replies of different lengths, the last few tokens cut off some."""
    rng = Random(seed)
    prompts = [[rng.randrange(300, 1000) for _ in range(rng.randint(3, 9))] for _ in range(n)]
    numbers = torch.rand(n, limit, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    made = rollout.sample(net, prompts, limit, uniforms=numbers, every=every, stop=-1)
    ends = [limit - 3 * i for i in range(n)]
    return [rollout.Reply(r.ids[: r.prompt + e], r.prompt, r.log_probs[:e]) for r, e in zip(made, ends)]


def next_scores(net, ids, prompt, every):
    """The obvious way: log-probabilities of the next token, all computed anew, eviction as lists of what each place still sees."""
    tokens, views, resident = [], [], []
    for t, token in enumerate(ids):
        newest = len(tokens)
        resident = [*resident, newest]
        tokens.append(token)
        views.append(resident)
        if every and t >= prompt and (t - prompt + 1) % every == 0:
            views.append([*resident, len(tokens)])
            resident = [*resident[:-every], len(tokens)]
            tokens.append(BEACON)
    mask = torch.zeros(1, 1, len(tokens), len(tokens), dtype=torch.bool)
    for place, view in enumerate(views):
        mask[0, 0, place, view] = True
    hidden, _ = net(torch.tensor([tokens]), mask)
    return net.logits(hidden[0, newest])[:BEACON]


def fresh(tmp_path, plan=PLAN):
    return breadcrumbs.BreadcrumbsRun(plan, tmp_path, lively())


def weights_of(net):
    return torch.cat([p.detach().flatten() for p in net.parameters()])


def end_even(reply, problem):
    """A reward that a random network gets half of the time."""
    return int(reply.ids[-1]) % 2 == 0
