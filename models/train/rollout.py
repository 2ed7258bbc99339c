"""Replies sampled from a network, and how many of them are right.

`python -m models.train.rollout CHECKPOINT --thoughts 8 -n 20` prints a network's accuracy on dev problems, teacher-forced and sampled: a plain
network's with everything in view, a Breadcrumbs network's under beacons every 4, 8 and 16 tokens.

Owned by models/train; called by `breadcrumbs.py`, the tests and by hand. It needs no runtime, so it can stand inside a training step; what
counts as accuracy elsewhere is measured by `zoomr eval` in the real engine.

Many replies are sampled side by side. Eviction is played as at run time: a beacon is fed after every c tokens of a reply, and the entries of
those c tokens are then overwritten. Training says the same with a mask (`beacons.py`), and a test holds the two together.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from .. import tokenizer as tok
from ..tasks import FAMILIES, Problem, generate, prompt_text
from .network import Attention, Network, rope_angles

_CROWDED = 0.75
"""Finished replies leave the store when no more than this share of it is still being written: every leave-taking copies the store."""


def _attend(attention: Attention, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Attention output [B, T, D] of q [B, H, T, E] over k and v [B, G, S, E]; mask bool [B, 1, T, S].

    `Attention.mix` takes a query's slot in q for its place among the keys, which does not hold here. The query heads of a
    group stand one behind the other as further queries, so that no key is copied for them.
    """
    b, h, t, e = q.shape
    group = h // k.shape[1]
    y = F.scaled_dot_product_attention(q.reshape(b, k.shape[1], group * t, e), k, v, attn_mask=mask.repeat(1, 1, group, 1))
    return attention.wo(y.view(b, h, t, e).transpose(1, 2).flatten(2))


class Store:
    """Keys and values of B sequences; sequence b fills its slots from 0 up to ``used[b]``, both int64 [B].

    A slot is a place in the store and no position: what follows an eviction has a smaller slot than its position.
    """

    def __init__(self, net: Network, rows: int, slots: int) -> None:
        s = net.shape
        size = (s.layers, rows, s.kv_heads, slots, s.head_dim)
        self.net = net
        self.keys, self.values = torch.zeros(size), torch.zeros(size)
        self.used = torch.zeros(rows, dtype=torch.long)
        self.position = torch.zeros(rows, dtype=torch.long)

    def feed(self, ids: Tensor, counts: Tensor) -> Tensor:
        """Store ids[b, :counts[b]] of each sequence; returns the hidden states [B, D] of the last ones.

        ids int64 [B, T], counts int64 [B]. Behind ``counts[b]`` stands padding, whose entries the next tokens overwrite.
        """
        steps = torch.arange(ids.shape[1])
        slots, at = self.used[:, None] + steps, self.position[:, None] + steps
        width = int(slots.max()) + 1
        mask = (torch.arange(width) <= slots[..., None])[:, None]
        cos, sin = (a[:, None] for a in rope_angles(self.net.shape, at))
        rows = torch.arange(len(ids))
        x = self.net.embedding(ids)
        for block, keys, values in zip(self.net.blocks, self.keys, self.values, strict=True):
            q, k, v = block.attention.project(block.norm1(x), (cos, sin))
            keys[rows[:, None], :, slots] = k.transpose(1, 2)
            values[rows[:, None], :, slots] = v.transpose(1, 2)
            x = block.feed_forward(x + _attend(block.attention, q, keys[:, :, :width], values[:, :, :width], mask))
        self.used, self.position = self.used + counts, self.position + counts
        return self.net.norm(x[rows, counts - 1])

    def evict(self, count: int) -> None:
        """Forget the ``count`` entries before the newest one, which moves to where the first of them was."""
        rows, newest = torch.arange(len(self.used)), self.used - 1
        for held in (self.keys, self.values):
            held[:, rows, :, newest - count] = held[:, rows, :, newest]
        self.used = self.used - count

    def keep(self, rows: Tensor) -> None:
        """Make these rows, int64 [B'], the whole store; a row may be named more than once."""
        self.keys, self.values = self.keys[:, rows], self.values[:, rows]
        self.used, self.position = self.used[rows], self.position[rows]


@dataclass(frozen=True)
class Reply:
    """A sampled reply. ids int64 [T], the prompt first; log_probs float32 [T - prompt], of its tokens as they were sampled."""

    ids: Tensor
    prompt: int
    log_probs: Tensor


@torch.no_grad()
def sample(
    net: Network, prompts: Sequence[Sequence[int]], limit: int, samples: int = 1, uniforms: Tensor | None = None,
    temperature: float = 1.0, every: int = 0, stop: int = tok.IM_END,
) -> list[Reply]:  # fmt: skip
    """``samples`` replies to each prompt, those to one prompt together, each of at most ``limit`` tokens with ``stop``.

    uniforms float64 [prompts * samples, limit]: each token is the one in whose share of the cumulated distribution its number falls;
    None takes the likeliest. every: a beacon after every so many tokens, which are then evicted (0: none). A beacon is never sampled.
    """
    lengths = torch.tensor([len(p) for p in prompts])
    room = limit // every + every + 1 if every else limit
    store = Store(net, len(prompts), int(lengths.max()) + room)
    hidden = store.feed(pad_sequence([torch.tensor(p) for p in prompts], batch_first=True), lengths)
    store.keep(torch.arange(len(prompts)).repeat_interleave(samples))
    hidden = hidden.repeat_interleave(samples, 0)
    n_rows = len(hidden)
    tokens, log_probs = torch.zeros(n_rows, limit, dtype=torch.long), torch.zeros(n_rows, limit)
    counts, live = torch.full((n_rows,), limit), torch.arange(n_rows)
    for n in range(limit):
        scores = (net.logits(hidden)[:, : tok.BEACON].double() / temperature).log_softmax(-1)
        if uniforms is None:
            chosen = scores.argmax(-1)
        else:
            below = scores.exp().cumsum(-1) < uniforms[live, n, None]
            chosen = below.sum(-1).clamp_max(scores.shape[-1] - 1)
        tokens[live, n] = chosen
        log_probs[live, n] = scores.gather(-1, chosen[:, None])[:, 0].float()
        ended = live[chosen == stop]
        counts[ended] = counts[ended].clamp_max(n + 1)
        writing = counts[live] > n + 1
        if not writing.any():
            break
        if writing.float().mean() <= _CROWDED:
            store.keep(writing.nonzero()[:, 0])
            live, chosen = live[writing], chosen[writing]
        one = torch.ones_like(live)
        hidden = store.feed(chosen[:, None], one)
        if every and (n + 1) % every == 0:
            store.feed(torch.full_like(chosen, tok.BEACON)[:, None], one)
            store.evict(every)
    return [
        Reply(torch.cat([torch.tensor(prompts[i // samples]), tokens[i, :count]]), len(prompts[i // samples]), log_probs[i, :count])
        for i, count in enumerate(counts.tolist())
    ]


def is_right(reply: Reply, problem: Problem) -> bool:
    """Whether the reply came to its end and the last number after its thinking is the problem's answer."""
    ids = reply.ids[reply.prompt :].tolist()
    _, thought, said = tok.decode(ids).rpartition("</think>")
    numbers = re.findall(r"\d+", said)
    return ids[-1:] == [tok.IM_END] and bool(thought) and numbers[-1:] == [problem.answer]


def reply_limit(problems: Sequence[Problem], slack: float) -> int:
    """Tokens a reply may have: the longest reference trace without summaries times ``slack``."""
    return int(slack * max(len(tok.encode(p.plain_trace)) for p in problems))


def sampled(net: Network, problems: Sequence[Problem], every: int) -> int:
    """How many of the problems are answered right by the likeliest token at each place."""
    prompts = [tok.encode(prompt_text(p.prompt)) for p in problems]
    replies = sample(net, prompts, reply_limit(problems, 1.5), every=every)
    return sum(map(is_right, replies, problems))


@torch.no_grad()
def teacher_forced(net: Network, problems: Sequence[Problem], every: int) -> tuple[float, int]:
    """Share of the reference traces' tokens predicted right, and how many traces are right throughout."""
    from .batches import make_row
    from .beacons import with_beacons
    from .losses import token_loss

    right, told, whole = 0, 0, 0
    for problem in problems:
        row = make_row(problem, summaries=False)
        made, mask, sources = with_beacons(row, every or len(row.ids))
        ids, weights = torch.from_numpy(made.ids)[None], torch.from_numpy(made.weights)[None]
        hidden, _ = net(ids, torch.from_numpy(mask)[None, None])
        _, hits = token_loss(net, hidden, ids, weights, torch.from_numpy(sources)[None])
        right, told = right + int(hits.sum()), told + int((weights > 0).sum())
        whole += int(hits.sum()) == int((weights > 0).sum())
    return right / told, whole


def main() -> None:
    from ..export import load_network

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--families", default=",".join(FAMILIES))
    parser.add_argument("--thoughts", type=int, default=8)
    parser.add_argument("--split", default="dev")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("-n", type=int, default=20, help="problems a family")
    parser.add_argument("--beacons", help="tokens between two beacons, 0 for none; default: 4,8,16, or 0 where the network has no beacon")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--raw", action="store_true", help="last weights, not their average")
    args = parser.parse_args()
    if not args.checkpoint.is_file():
        parser.error(f"there is no checkpoint {args.checkpoint}")
    torch.set_num_threads(args.threads)
    try:
        net, _ = load_network(args.checkpoint, not args.raw)
    except ValueError as error:
        parser.error(str(error))
    has_beacon = net.shape.vocab > tok.BEACON
    rates = [int(c) for c in (args.beacons or ("4,8,16" if has_beacon else "0")).split(",")]
    if any(rates) and not has_beacon:
        parser.error(f"{args.checkpoint} has no beacon: its vocabulary is {net.shape.vocab} tokens; give --beacons 0")
    for family in args.families.split(","):
        try:
            problems = generate(family, args.n, args.seed, args.thoughts, args.split)
        except ValueError as error:
            parser.error(str(error))
        for every in rates:
            share, whole = teacher_forced(net, problems, every)
            right = sampled(net, problems, every)
            name = f"c = {every}" if every else "uncompressed"
            print(f"{family:7} {name:12} tokens {share:.4f}  whole traces {whole}/{args.n}  answers {right}/{args.n}", flush=True)


if __name__ == "__main__":
    main()
