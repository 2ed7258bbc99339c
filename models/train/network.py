"""The network: a small Llama, written so that llama.cpp's `llama` graph computes the same.

Owned by models/train. Called by the training loop, the evaluation and the export.

Shapes: B sequences, T positions, D width, H query heads, G key/value heads, E = D // H.
Everything is float32. RoPE rotates the neighbouring pairs (2i, 2i+1) of a head, which is
the layout llama.cpp expects of this architecture, so export permutes nothing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class Shape:
    """Sizes of the network; `rope_base` and `eps` are llama.cpp's names for the same."""

    vocab: int
    layers: int = 4
    width: int = 256
    heads: int = 8
    kv_heads: int = 4
    ff: int = 704
    rope_base: float = 1e6
    eps: float = 1e-5

    @property
    def head_dim(self) -> int:
        return self.width // self.heads


def rope_angles(shape: Shape, positions: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin, each [T, E/2], of angle = position * base^(-2i/E) for pair i."""
    pairs = torch.arange(0, shape.head_dim, 2, dtype=torch.float32)
    angle = positions.float()[..., None] * shape.rope_base ** (-pairs / shape.head_dim)
    return angle.cos(), angle.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE on [..., T, E], pairs (2i, 2i+1); cos and sin broadcast as [..., T, E/2]."""
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1).flatten(-2)


@dataclass(frozen=True)
class View:
    """A stretch of queries and the keys that any of them may attend to: half of a causal mask, and less of a ZoomR mask."""

    rows: slice
    seen: Tensor
    """int64 [S]"""
    mask: Tensor
    """bool [B, 1, rows, S]"""


def views_of(mask: Tensor, rows: int = 256) -> list[View]:
    """The views of a mask, bool [B, 1, T, T], ``rows`` queries each."""
    views = []
    for start in range(0, mask.shape[2], rows):
        stretch = slice(start, start + rows)
        seen = mask[:, :, stretch].any(2).any(0)[0].nonzero()[:, 0]
        views.append(View(stretch, seen, mask[:, :, stretch][..., seen]))
    return views


class Attention(nn.Module):
    """Grouped-query attention; returns also the rotated queries and keys for index scores."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        kv = shape.kv_heads * shape.head_dim
        self.wq = nn.Linear(shape.width, shape.width, bias=False)
        self.wk = nn.Linear(shape.width, kv, bias=False)
        self.wv = nn.Linear(shape.width, kv, bias=False)
        self.wo = nn.Linear(shape.width, shape.width, bias=False)

    def project(self, x: Tensor, angles: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated queries [B, H, T, E], rotated keys and plain values [B, G, T, E]."""
        b, t, _ = x.shape
        s = self.shape
        q = self.wq(x).view(b, t, s.heads, s.head_dim).transpose(1, 2)
        k = self.wk(x).view(b, t, s.kv_heads, s.head_dim).transpose(1, 2)
        v = self.wv(x).view(b, t, s.kv_heads, s.head_dim).transpose(1, 2)
        return rotate(q, *angles), rotate(k, *angles), v

    def mix(self, q: Tensor, k: Tensor, v: Tensor, views: list[View] | None) -> Tensor:
        """Attention output [B, T, D], through the `views` of a mask; None means causal."""
        group = self.shape.heads // self.shape.kv_heads
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        if views is None:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            parts = [(q[:, :, w.rows], k[:, :, w.seen], v[:, :, w.seen], w.mask) for w in views]
            y = torch.cat([F.scaled_dot_product_attention(*part) for part in parts], 2)
        return self.wo(y.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """One layer: attention and SwiGLU, each behind its RMSNorm."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.norm1 = nn.RMSNorm(shape.width, eps=shape.eps)
        self.attention = Attention(shape)
        self.norm2 = nn.RMSNorm(shape.width, eps=shape.eps)
        self.gate = nn.Linear(shape.width, shape.ff, bias=False)
        self.up = nn.Linear(shape.width, shape.ff, bias=False)
        self.down = nn.Linear(shape.ff, shape.width, bias=False)

    def feed_forward(self, x: Tensor) -> Tensor:
        h = self.norm2(x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


class Network(nn.Module):
    """The language model, with output tied to the embedding."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.embedding = nn.Embedding(shape.vocab, shape.width)
        self.blocks = nn.ModuleList(Block(shape) for _ in range(shape.layers))
        self.norm = nn.RMSNorm(shape.width, eps=shape.eps)

    def forward(
        self, ids: Tensor, mask: Tensor | None = None, taps: tuple[int, ...] = (),
        positions: Tensor | None = None, states: dict[int, Tensor] | None = None,
    ) -> tuple[Tensor, dict[int, tuple[Tensor, Tensor]]]:
        """Hidden states [B, T, D] after the last norm, and (q, k) of the layers in `taps`.

        ids int64 [B, T]; mask boolean [B, 1, T, T] or None for causal; positions int64
        [B, T] or None for 0, 1, 2, ...; `states`, if given, gets the hidden states behind every layer.
        """
        at = torch.arange(ids.shape[1]) if positions is None else positions[:, None]
        angles = rope_angles(self.shape, at)
        x = self.embedding(ids)
        views = None if mask is None else views_of(mask)
        tapped = {}
        for i, block in enumerate(self.blocks):
            q, k, v = block.attention.project(block.norm1(x), angles)
            if i in taps:
                tapped[i] = (q, k)
            x = block.feed_forward(x + block.attention.mix(q, k, v, views))
            if states is not None:
                states[i] = x
        return self.norm(x), tapped

    def logits(self, hidden: Tensor) -> Tensor:
        """Token scores [..., vocab] of hidden states [..., D]."""
        return F.linear(hidden, self.embedding.weight)


def _orthonormal_rows(rows: int, columns: int, seed: torch.Generator) -> Tensor:
    q, _ = torch.linalg.qr(torch.randn(columns, rows, generator=seed))
    return q.T.contiguous()


@torch.no_grad()
def mimetic_init(net: Network, seed: int, offsets: tuple[int, ...] = (1, 2, 3, 4)) -> None:
    """Start where induction is near, in place.

    Layer 0: head h attends to the position offsets[h] back. All embeddings share one constant
    coordinate; queries and keys read only that one, so the score depends on distance alone:
    u'R(m-n-offset)u is largest at the offset. Its values are copied into the stream.
    Later layers: W_q = W_k on the slow half of the RoPE pairs (equal content attracts equal
    content at any distance) and W_o = W_v' (what is attended to is copied). A little noise in W_q tells the query heads
    of a group apart: equal ones have equal gradients and would stay equal for ever.
    """
    s, rng = net.shape, torch.Generator().manual_seed(seed)
    e, group = s.head_dim, s.heads // s.kv_heads
    for p in net.parameters():
        if p.dim() == 2:
            p.copy_(torch.randn(p.shape, generator=rng) / math.sqrt(p.shape[1]))
    net.embedding.weight.copy_(torch.randn(s.vocab, s.width, generator=rng) * 0.06)
    net.embedding.weight[:, 0] = 0.3  # the constant coordinate
    for i, block in enumerate(net.blocks):
        a = block.attention
        block.down.weight.mul_(0.3)
        for g in range(s.kv_heads):
            rows = slice(g * e, (g + 1) * e)
            copy = _orthonormal_rows(e, s.width, rng)
            a.wv.weight[rows] = copy
            slow = _orthonormal_rows(e, s.width, rng) * 2.0
            slow[: e // 2] *= 0.05
            a.wk.weight[rows] = slow
            for h in range(g * group, (g + 1) * group):
                heads = slice(h * e, (h + 1) * e)
                a.wo.weight[:, heads] = copy.T * (0.7 if i == 0 else 0.5)
                a.wq.weight[heads] = slow + 0.02 * torch.randn(e, s.width, generator=rng)
        if i == 0:
            _attend_to_offsets(net, a, offsets)


def _attend_to_offsets(net: Network, a: Attention, offsets: tuple[int, ...]) -> None:
    """Make layer 0's queries and keys read the constant coordinate only, peaked at `offsets`."""
    s = net.shape
    e, group = s.head_dim, s.heads // s.kv_heads
    pairs = 5  # fast pairs, enough for a peak one position wide without a second one nearby
    u = torch.zeros(e)
    u[0 : 2 * pairs : 2] = 1.0
    a.wk.weight.mul_(0.05)
    a.wq.weight.mul_(0.05)
    for h in range(s.heads):
        cos, sin = rope_angles(s, torch.tensor([-float(offsets[h % len(offsets)])]))
        turned = rotate(u[None], cos, sin)[0]
        a.wq.weight[h * e : (h + 1) * e, 0] = turned * 2.2
        if h % group == 0:
            a.wk.weight[h // group * e : (h // group + 1) * e, 0] = u * 2.2
