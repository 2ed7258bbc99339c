"""Layers that gather what stands between beacons, put into a network after its first, and the loss that shows them where to look.

Owned by models/train; `breadcrumbs.py` puts the layers in, `run.py` asks for the loss. Where to look is in `looks.py`.

A plain network binds a value to the name before it in its first layer and finds it by that name in its second. Under the beacon mask
three steps come between: the first token after a beacon takes from it the name that it can no longer see; the beacon takes from the tokens it
will stand for what each of them is bound to; only then can a name find it. A network of four layers that was trained without beacons has no
layer free for that, and learned it for pairs that end next to their beacon and no others (models/LOG.md). So the beacon network has layers more:
they begin as copies of whatever they attend to, and the drill and the reference traces, of which it is known where each thing stands, supervise their attention. None of this is in
the paper, whose models are deep and pretrained.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ..tokenizer import BEACON
from .looks import ASKED, GATHERED, NEAR, PARTED
from .network import Network, mimetic_init, rope_angles


@torch.no_grad()
def with_layers(net: Network, layers: int, seed: int) -> Network:
    """A copy of ``net`` with so many layers more after its first, which attend to everything a little and copy what they attend to.

    Each copies 64 dimensions a KV head, the last ones together the whole stream, so that a beacon becomes what it gathers.
    """
    shape = replace(net.shape, layers=net.shape.layers + layers)
    grown = Network(shape)
    mimetic_init(grown, seed)
    rows, group, e = shape.kv_heads * shape.head_dim, shape.heads // shape.kv_heads, shape.head_dim
    basis = torch.linalg.qr(torch.randn(shape.width, shape.width, generator=torch.Generator().manual_seed(seed)))[0].T
    for i in range(1, layers + 1):
        attention = grown.blocks[i].attention
        attention.wq.weight.mul_(0.05)
        copied = basis.roll(-rows * (layers - i), 0)[:rows]
        attention.wv.weight.copy_(copied)
        for head in range(shape.heads):
            mine = copied[head // group * e : (head // group + 1) * e]
            attention.wo.weight[:, head * e : (head + 1) * e] = mine.T * ((0.3 if i == 1 else 1.0) / group)
        grown.blocks[i].down.weight.zero_()
    grown.embedding.load_state_dict(net.embedding.state_dict())
    grown.norm.load_state_dict(net.norm.state_dict())
    for i, block in enumerate(net.blocks):
        grown.blocks[i if i == 0 else i + layers].load_state_dict(block.state_dict())
    return grown


def look_layers(layers: int) -> dict[int, tuple[int, ...]]:
    """Which layers are to look so, for each kind, where so many were put in: the first, the others, and the one after them.

    What is near is needed before the old layers begin, as these add up what their first one brings together: the first of the new ones sees what
    stands next to a beacon, the last of them what it has gathered.
    """
    return {PARTED: (1,), GATHERED: tuple(range(2, layers + 1)), ASKED: (layers + 1,), NEAR: (1, layers)}


def look_loss(taps: dict[int, tuple[Tensor, Tensor]], looks: Tensor, mask: Tensor, layers: int) -> tuple[Tensor, list[float]]:
    """Minus the log of the chance that one of a layer's heads at least looks there, if each does with its attention, averaged over what is
    to be looked at and added up over the layers; and for each layer the best head's attention. Asked of their mean, all heads would look
    at one thing and a beacon gather nothing else (models/LOG.md).

    taps: (q, k) of layers 1 to ``layers`` + 1, rotated; looks int64 [N, 4], of ``Look``s; mask bool [B, 1, T, T].
    """
    total, best = torch.zeros(()), []
    for kind, some in look_layers(layers).items():
        mine = looks[looks[:, 0] == kind, 1:]
        for layer in some if len(mine) else ():
            q, k = taps[layer]
            paid = []
            for row in mine[:, 0].unique():
                at, to = mine[mine[:, 0] == row, 1:].T
                keys = k[row].repeat_interleave(q.shape[1] // k.shape[1], 0)
                scores = torch.einsum("hne,hte->hnt", q[row][:, at], keys) / q.shape[-1] ** 0.5
                shares = scores.masked_fill(~mask[row, 0, at], float("-inf")).softmax(-1)
                paid.append(shares.gather(-1, to.expand(len(shares), -1)[..., None])[..., 0])
            attention = torch.cat(paid, 1)
            total = total - (1 - (1 - attention).prod(0)).clamp_min(1e-6).log().mean()
            best.append(attention.max(0).values.mean().item())
    return total, best


def hidden_after(net: Network, ids: Tensor, layers: int) -> Tensor:
    """Hidden states [B, T, D] behind the first layer and ``layers`` more, with everything before it in view; ids int64 [B, T]."""
    angles = rope_angles(net.shape, torch.arange(ids.shape[1]))
    x = net.embedding(ids)
    for block in net.blocks[: layers + 1]:
        x = block.feed_forward(x + block.attention.mix(*block.attention.project(block.norm1(x), angles), None))
    return x


NEAR_WEIGHT = 8.0
"""How much more the places count that need what is near: one token in six to sixteen, and the hardest."""


def repair_loss(net: Network, states: Tensor, ids: Tensor, own: Tensor, looks: Tensor, layers: int) -> Tensor:
    """How far the tokens of the reply are, where the old layers begin, from what they are without beacons and eviction: squared
    distance in squared lengths, weighted. The side without beacons takes no gradient.

    states float32 [B, T, D], under beacons, behind the first layer and ``layers`` more; ids int64 [B, T]; own bool [B, T], true for the
    reply's tokens, beacons left out; looks int64 [N, 4], of which those of kind NEAR begin at places of more weight.
    """
    weights = own.float()
    near = looks[looks[:, 0] == NEAR]
    weights[near[:, 1], near[:, 2]] *= NEAR_WEIGHT
    with torch.no_grad():
        goals = []
        for row, mine in zip(ids, own, strict=True):
            text = row != BEACON
            goals.append(hidden_after(net, row[text][None], layers)[0][mine[text]])
        goal = torch.cat(goals)
    found = states[own]
    return (weights[own] * (found - goal).square().sum(-1)).sum() / (weights[own] * goal.square().sum(-1)).sum()
