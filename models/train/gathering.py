"""Layers that gather what stands between beacons, put into a network after its first, and where the drill says they look.

Owned by models/train; `breadcrumbs.py` puts the layers in, `recall.py` says where to look, `run.py` asks for the loss.

A plain network binds a value to the name before it in its first layer and finds it by that name in its second. Under the beacon mask
three steps come between: the first token after a beacon takes from it the name that it can no longer see; the beacon takes from the tokens it
will stand for what each of them is bound to; only then can a name find it. A network of four layers that was trained without beacons has no
layer free for that, and learned it for pairs that end next to their beacon and no others (models/LOG.md). So the beacon network has layers more:
they begin as copies of whatever they attend to, and the drill, which knows where each thing stands, supervises their attention. None of this is in
the paper, whose models are deep and pretrained.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from ..tokenizer import BEACON
from .network import Network, mimetic_init

PARTED, GATHERED, ASKED = range(3)
"""Kinds of looks: a token at the beacon before it, whose pair that parts; a beacon at a value among its tokens; the place that asks at the beacon."""


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


def looks_of(row: int, ids: np.ndarray, mask: np.ndarray, says: int, pairs: int) -> list[tuple[int, int, int, int]]:
    """(kind, row, from, to) of a row of the recall drill under beacons: ``pairs`` pairs are listed in it and then each is asked.

    ids int64 [T]; mask bool [T, T]; ``says`` is the token between name and value.
    """
    beacons, text = np.flatnonzero(ids == BEACON), np.flatnonzero(ids != BEACON)
    said = [text[i - 1 : i + 2] for i in np.flatnonzero(ids[text] == says)]
    looks, held = [], {}
    for name, _, value in said[:pairs]:
        after = np.searchsorted(beacons, value)
        if after < len(beacons):
            held[ids[name]] = beacons[after]
            looks.append((GATHERED, row, beacons[after], value))
            if after and beacons[after - 1] > name:
                looks.append((PARTED, row, value, beacons[after - 1]))
    for name, at, _ in said[pairs:]:
        before = np.searchsorted(beacons, at) - 1
        if before >= 0 and beacons[before] > name:
            looks.append((PARTED, row, at, beacons[before]))
        beacon = held.get(ids[name])
        if beacon is not None and mask[at, beacon]:
            looks.append((ASKED, row, at, beacon))
    return looks


def look_layers(layers: int) -> dict[int, tuple[int, ...]]:
    """Which layers are to look so, for each kind, where so many were put in: the first, the others, and the one after them."""
    return {PARTED: (1,), GATHERED: tuple(range(2, layers + 1)), ASKED: (layers + 1,)}


def look_loss(taps: dict[int, tuple[Tensor, Tensor]], looks: Tensor, mask: Tensor, layers: int) -> tuple[Tensor, list[float]]:
    """Minus the log of the attention that the mean of a layer's heads pays, averaged over what is to be looked at and added up over
    the layers; and for each layer the best head's attention.

    taps: (q, k) of layers 1 to ``layers`` + 1, rotated; looks int64 [N, 4] (see ``looks_of``); mask bool [B, 1, T, T].
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
            total = total - attention.mean(0).clamp_min(1e-6).log().mean()
            best.append(attention.max(0).values.mean().item())
    return total, best
