"""Greedy decoding under a cache policy, simulated in PyTorch: accuracy before any runtime.

`python -m models.train.evaluate CHECKPOINT --family series --thoughts 14 -n 40`.

Owned by models/train; called by hand and by the card's figures. Problems of a batch decode
side by side. The whole cache is kept and a mask says what is resident, so a policy is only
a rule for the mask; the rule of `zoomr` is the runtime's: at each token every head of the
voting layers votes for its best k closed blocks by q.k against the mean rotated key of the
summary text, votes of the last few tokens are summed, and the best c blocks are resident
for the next token, with the prompt, all summaries, the open thought and the last W tokens.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from .. import tokenizer as tok
from ..export import load_network
from ..tasks import Problem, generate, prompt_text
from .network import Network, rope_angles


@dataclass(frozen=True)
class Policy:
    """How the mask is made. `budget` is recency's count of resident tokens, or zoomr's
    limit when spare room is filled with the newest blocks (0: no filling)."""

    name: str
    window: int = 48
    votes: int = 2
    blocks: int = 2
    vote_window: int = 8
    layers: tuple[int, ...] = (2, 3)
    budget: int = 0


@dataclass
class Text:
    """One problem being decoded: its tokens and what each of them is."""

    problem: Problem
    ids: list[int]
    prompt: int
    owner: Tensor  # int64 [limit]; -1 where not yet written, as in the prompt
    summary: Tensor  # bool [limit]
    block: int = 0
    in_summary: bool = False
    done: bool = False
    spans: list[tuple[int, int]] = field(default_factory=list)  # summary text of closed blocks
    rows: list[list[Tensor]] = field(default_factory=list)  # index rows [G, E] a block, layer
    votes: list[Tensor] = field(default_factory=list)
    zoomed: list[int] = field(default_factory=list)
    peak: int = 0
    total: int = 0

    def feed(self, token: int) -> None:
        """Append a token and follow the markers."""
        if token == tok.BEGIN_SUMMARY:
            self.in_summary = True
        self.owner[len(self.ids)] = self.block
        self.summary[len(self.ids)] = self.in_summary
        self.ids.append(token)
        if token == tok.END_SUMMARY:
            end = len(self.ids) - 1
            start = end
            while self.ids[start - 1] != tok.BEGIN_SUMMARY and start > self.prompt:
                start -= 1
            self.spans.append((start, max(end, start + 1)))
            self.in_summary = False
            self.block += 1
        if token == tok.IM_END:
            self.done = True


def _start(problem: Problem, limit: int) -> Text:
    ids = tok.encode(prompt_text(problem.prompt))
    return Text(problem, ids, len(ids), torch.full((limit,), -1), torch.zeros(limit).bool())


def resident(text: Text, policy: Policy) -> Tensor:
    """bool [T]: what the newest token of `text` may attend to, itself included."""
    length = len(text.ids)
    owner, summary = text.owner[:length], text.summary[:length]
    position = torch.arange(length)
    if policy.name == "full":
        return torch.ones(length, dtype=torch.bool)
    if policy.name == "recency":
        return (owner < 0) | (position >= length - (policy.budget - text.prompt))
    keep = (owner < 0) | summary | (owner == text.block) | (position >= length - policy.window)
    if policy.name == "zoomr":
        for block in text.zoomed:
            keep |= owner == block
    if policy.budget:
        for block in range(text.block - 1, -1, -1):
            wider = keep | (owner == block)
            if int(wider.sum()) > policy.budget:
                break
            keep = wider
    return keep


def _vote(text: Text, queries: list[Tensor], keys: list[Tensor], policy: Policy) -> None:
    """Count the newest token's votes and choose the blocks for the next token.

    queries [H, E] and keys [G, T, E], rotated, one pair for each voting layer.
    """
    n = len(text.spans)
    if not n:
        return
    count = torch.zeros(n)
    while len(text.rows) < n:
        a, b = text.spans[len(text.rows)]
        text.rows.append([k[:, a:b].mean(1) for k in keys])
    for i, q in enumerate(queries):
        rows = torch.stack([r[i] for r in text.rows], 1)
        rows = rows.repeat_interleave(q.shape[0] // rows.shape[0], 0)
        best = torch.einsum("he,hne->hn", q, rows).topk(min(policy.votes, n), -1).indices
        count += torch.bincount(best.flatten(), minlength=n)
    text.votes.append(count)
    total = torch.zeros(n)
    for old in text.votes[-policy.vote_window :]:
        total[: len(old)] += old
    total += torch.arange(n) * 1e-6  # the newer wins a tie
    text.zoomed = total.topk(min(policy.blocks, n)).indices.tolist()


class Decoder:
    """Batched greedy decoding with a full key/value store and a mask for each step."""

    def __init__(self, net: Network, problems: list[Problem], policy: Policy, limit: int) -> None:
        self.net, self.policy = net, policy
        self.texts = [_start(p, limit + 8) for p in problems]
        s = net.shape
        size = (s.layers, len(problems), s.kv_heads, limit + 8, s.head_dim)
        self.keys, self.values = torch.zeros(size), torch.zeros(size)
        self.angles = rope_angles(s, torch.arange(limit + 8))
        self.limit = limit

    @torch.no_grad()
    def _prefill(self, row: int) -> int:
        text, net = self.texts[row], self.net
        ids = torch.tensor([text.ids])
        taps = tuple(range(net.shape.layers))
        angles = rope_angles(net.shape, torch.arange(text.prompt))
        x = net.embedding(ids)
        for i in taps:
            block = net.blocks[i]
            q, k, v = block.attention.project(block.norm1(x), angles)
            self.keys[i, row, :, : text.prompt] = k[0]
            self.values[i, row, :, : text.prompt] = v[0]
            x = block.feed_forward(x + block.attention.mix(q, k, v, None))
        return int(net.logits(net.norm(x[0, -1])).argmax())

    @torch.no_grad()
    def _step(self, rows: list[int]) -> list[int]:
        """Run the newest token of each text in `rows`; returns the next tokens."""
        net, texts = self.net, [self.texts[r] for r in rows]
        at = torch.tensor([len(t.ids) - 1 for t in texts])
        width = int(at.max()) + 1
        mask = torch.zeros(len(rows), 1, 1, width, dtype=torch.bool)
        for i, t in enumerate(texts):
            keep = resident(t, self.policy)
            mask[i, 0, 0, : len(keep)] = keep
            size = int(keep.sum())
            t.peak, t.total = max(t.peak, size), t.total + size
        cos, sin = (a[at][:, None, None] for a in self.angles)
        x = net.embedding(torch.tensor([[t.ids[-1]] for t in texts]))
        index = torch.tensor(rows)
        queries = []
        for i, block in enumerate(net.blocks):
            q, k, v = block.attention.project(block.norm1(x), (cos, sin))
            self.keys[i, index, :, at] = k[:, :, 0]
            self.values[i, index, :, at] = v[:, :, 0]
            keys, values = self.keys[i, index, :, :width], self.values[i, index, :, :width]
            queries.append(q[:, :, 0])
            x = block.feed_forward(x + block.attention.mix(q, keys, values, mask))
        if self.policy.name == "zoomr":
            for j, r in enumerate(rows):
                chosen = self.policy.layers
                _vote(
                    self.texts[r], [queries[i][j] for i in chosen],
                    [self.keys[i, r] for i in chosen], self.policy,
                )  # fmt: skip
        return net.logits(net.norm(x[:, 0])).argmax(-1).tolist()

    def run(self) -> list[Text]:
        """Decode every text to its end of turn or the limit."""
        for r, text in enumerate(self.texts):
            text.feed(self._prefill(r))
        while live := [r for r, t in enumerate(self.texts) if not t.done]:
            for r, token in zip(live, self._step(live), strict=True):
                text = self.texts[r]
                text.feed(token)
                text.done |= len(text.ids) >= self.limit
        return self.texts


def is_right(text: Text) -> bool:
    """Whether what follows the thinking ends in the answer (its last number)."""
    out = tok.decode(text.ids[text.prompt :])
    words = out.split("</think>")[-1].replace("<|im_end|>", "").replace(".", " ").split()
    numbers = [w for w in words if w.isdigit()]
    return bool(numbers) and numbers[-1] == text.problem.answer


def measure(net: Network, problems: list[Problem], policy: Policy) -> dict:
    """Accuracy, share of traces reproduced exactly, and resident tokens of a policy."""
    lengths = [len(tok.encode(prompt_text(p.prompt) + p.trace)) for p in problems]
    texts = Decoder(net, problems, policy, max(lengths) + 80).run()
    n = len(problems)
    exact = [tok.decode(t.ids[t.prompt :]) == t.problem.trace for t in texts]
    return {
        "policy": policy.name, "n": n, "right": sum(map(is_right, texts)) / n,
        "exact": sum(exact) / n, "peak": max(t.peak for t in texts),
        "mean_peak": sum(t.peak for t in texts) / n,
        "mean": sum(t.total / max(1, len(t.ids) - t.prompt) for t in texts) / n,
        "trace": sum(lengths) / n,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--family", default="series")
    parser.add_argument("--thoughts", type=int, default=14)
    parser.add_argument("--split", default="dev")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("-n", type=int, default=40)
    parser.add_argument("--policy", default="full,zoomr,sumr,recency")
    parser.add_argument("--window", type=int, default=48)
    parser.add_argument("--votes", type=int, default=2)
    parser.add_argument("--blocks", type=int, default=2)
    parser.add_argument("--vote-window", type=int, default=8)
    parser.add_argument("--layers", default="2,3")
    parser.add_argument("--budget", type=int, default=0, help="resident tokens, for all but full")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--raw", action="store_true", help="last weights, not their average")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    net, _ = load_network(args.checkpoint, not args.raw)
    problems = generate(args.family, args.n, args.seed, args.thoughts, args.split)
    layers = tuple(int(x) for x in args.layers.split(","))
    budget = args.budget
    for name in args.policy.split(","):
        policy = Policy(
            name, args.window, args.votes, args.blocks, args.vote_window, layers, budget
        )
        result = measure(net, problems, policy)
        if name == "zoomr" and not budget:
            budget = result["peak"]  # the others get what zoomr used
        print({k: round(v, 3) if isinstance(v, float) else v for k, v in result.items()}, flush=True)


if __name__ == "__main__":
    main()
