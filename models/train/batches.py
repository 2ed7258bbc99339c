"""Training batches: problems as token arrays, with the ZoomR mask and the index targets.

Owned by models/train; called by the training loop and the evaluation.

Every token belongs to a block. Block j is thought j with its summary; the prompt is -1 and
what follows the last summary is N. Under the ZoomR mask a token sees: the prompt, every
earlier summary, its own block, the last W positions, the thoughts its own thought needs
(from a random moment after they were named), and random others, because a runtime fills
spare cells with blocks nobody asked for.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from random import Random

import numpy as np

from .. import tokenizer as tok
from ..tasks import FAMILIES, Problem, prompt_text, split_of

NEED, ONES, IS, STOP, SO = (tok.encode(x)[0] for x in (" Need", " Ones", " is", ".", " so"))


@dataclass(frozen=True)
class Row:
    """One problem as arrays over its T tokens; N thoughts.

    ids int64 [T]; owner int64 [T], the block; summary bool [T], markers included; weights
    float32 [T], loss weight of predicting ids[t]; lookup bool [T], values to be looked up;
    index float32 [N, T], row j averages the summary text of block j; spans int [N, 4]: second
    name of the need line, the two ` is` whose next token is looked up, end of the block.
    """

    ids: np.ndarray
    owner: np.ndarray
    summary: np.ndarray
    weights: np.ndarray
    lookup: np.ndarray
    index: np.ndarray
    spans: np.ndarray
    needs: tuple[tuple[int, ...], ...]


def _spans(ids: list[int], start: int, end: int) -> tuple[int, int, int, int]:
    need = ids.index(NEED, start)
    ones = ids.index(ONES, need)
    return ids.index(STOP, need) - 1, ones - 7, ones - 3, end


@lru_cache(maxsize=4096)
def _encode(text: str) -> tuple[int, ...]:
    return tuple(tok.encode(text))


def make_row(problem: Problem, stop_weight: float = 20.0, result_weight: float = 3.0) -> Row:
    """The arrays of one problem.

    Tokens that decide much and are few weigh more: whether to stop after a summary, and the name and
    value of the thought's result.
    """
    ids = list(tok.encode(prompt_text(problem.prompt)))
    owner, summary, spans, marks = [-1] * len(ids), [False] * len(ids), [], []
    for j, thought in enumerate(problem.thoughts):
        start = len(ids)
        text = _encode(thought.text)
        short = (tok.BEGIN_SUMMARY, *_encode(thought.summary), tok.END_SUMMARY)
        ids += [*text, *short]
        owner += [j] * (len(text) + len(short))
        summary += [False] * len(text) + [True] * len(short)
        spans.append(_spans(ids, start, len(ids) - 1))
        marks.append((start + len(text) + 1, len(ids) - 1))
    tail = [tok.END_THINK, *_encode(f"The answer is {problem.answer}."), tok.IM_END]
    ids += tail
    n = len(problem.thoughts)
    owner += [n] * len(tail)
    summary += [False] * len(tail)
    length = len(ids)
    index = np.zeros((n, length), np.float32)
    for j, (a, b) in enumerate(marks):
        index[j, a:b] = 1.0 / (b - a)
    owners, spans_ = np.array(owner), np.array(spans)
    weights = (owners >= 0).astype(np.float32)
    lookup = np.zeros(length, bool)
    lookup[spans_[:, 1] + 1] = lookup[spans_[:, 2] + 1] = True
    results = np.flatnonzero(np.array(ids) == SO) + 3
    weights[results] = weights[results - 2] = weights[-3] = result_weight
    weights[spans_[:, 3] + 1] = stop_weight
    return Row(
        np.array(ids), owners, np.array(summary), weights, lookup, index, spans_,
        tuple(t.needs for t in problem.thoughts),
    )  # fmt: skip


def zoomr_mask(row: Row, rng: Random, window: int | None = None) -> np.ndarray:
    """One random ZoomR mask, bool [T, T]: mask[q, k] is true where q may attend to k."""
    length, n = len(row.ids), len(row.needs)
    window = window or rng.randint(24, 96)
    zoom = np.zeros((length, n + 2), bool)  # the last two columns stand for owners n and -1
    noise = np.random.default_rng(rng.getrandbits(32))
    chunk = rng.choice((1, 4, 16, 64))
    few = noise.random((length // chunk + 1, n)) < rng.choice((0.0, 0.05, 0.2, 0.5))
    zoom[:, :n] = np.repeat(few, chunk, 0)[:length]
    recent = rng.choice((0, 0, 1, 2, 4))
    for back in range(1, recent + 1):
        rows = np.flatnonzero(row.owner >= back)
        zoom[rows, row.owner[rows] - back] = True
    for (named, first, last, end), needs in zip(row.spans, row.needs, strict=True):
        for block in needs:
            zoom[rng.randint(named + 1, first) : rng.randint(last, end) + 1, block] = True
    position = np.arange(length)
    mask = zoom[:, row.owner]
    mask |= (row.owner < 0) | row.summary
    mask |= row.owner[:, None] == row.owner[None, :]
    mask |= position[:, None] - position[None, :] < window
    return mask & (position[:, None] >= position[None, :])


def index_target(row: Row) -> np.ndarray:
    """bool [T, N]: the blocks each token's query should point at, from naming to reading them."""
    target = np.zeros((len(row.ids), len(row.needs)), bool)
    for (named, _, last, _), needs in zip(row.spans, row.needs, strict=True):
        for block in needs:
            target[named : last + 1, block] = True
    return target


@dataclass(frozen=True)
class Batch:
    """Rows of one family, padded to one length; fields as in Row with a leading axis B.

    mask bool [B, 1, T, T] or None for plain causal; target bool [B, T, N].
    """

    ids: np.ndarray
    weights: np.ndarray
    lookup: np.ndarray
    owner: np.ndarray
    index: np.ndarray
    target: np.ndarray
    mask: np.ndarray | None


def _padded(arrays: list[np.ndarray], axes: tuple[int, ...], fill: float = 0) -> np.ndarray:
    size = max(a.shape[axes[0]] for a in arrays)
    out = []
    for a in arrays:
        pad = [(0, size - a.shape[i]) if i in axes else (0, 0) for i in range(a.ndim)]
        out.append(np.pad(a, pad, constant_values=fill))
    return np.stack(out)


def task_batch(rng: Random, family: str, thoughts: int, tokens: int, masked: bool) -> Batch:
    """About `tokens` tokens of training-split problems, all under the mask or none."""
    rows: list[Row] = []
    while not rows or len(rows) * len(rows[0].ids) < tokens - len(rows[0].ids) // 2:
        problem = FAMILIES[family](rng, thoughts)
        if split_of(family, problem.prompt) == "train":
            rows.append(make_row(problem))
    mask = None
    if masked:
        mask = _padded([zoomr_mask(r, rng) for r in rows], (0, 1))[:, None]
        mask |= np.eye(mask.shape[-1], dtype=bool)  # padding must attend to something
    return Batch(
        ids=_padded([r.ids for r in rows], (0,)),
        weights=_padded([r.weights for r in rows], (0,)),
        lookup=_padded([r.lookup for r in rows], (0,)),
        owner=_padded([r.owner for r in rows], (0,), -1),
        index=_padded([r.index for r in rows], (1,)),
        target=_padded([index_target(r) for r in rows], (0,)),
        mask=mask,
    )
