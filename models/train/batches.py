"""Training batches: problems as token arrays, with the ZoomR mask and the index targets.

Owned by models/train; called by the training loop and the evaluation.

Every token belongs to a block. Block j is thought j with its summary; the prompt is -1 and
what follows the last summary is N. Under the ZoomR mask a token sees: the prompt, the
summaries that are resident, its own block, the last W positions, the thoughts its own thought
needs (from a random moment after they were named), and random others, because a runtime fills
spare cells with blocks nobody asked for.

Summaries must stay an index: nothing may teach the network to store a value in their keys and
values, where a later thought could read it without the thought. Every batch therefore forbids
one of the two steps of that detour (`guard`): summaries may not see the values of their
thought, or a thought may not see the summaries of the thoughts it needs.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from random import Random

import numpy as np

from .. import tokenizer as tok
from ..tasks import FAMILIES, Problem, prompt_text, split_of
from .looks import Look, trace_looks

NEED, ONES, IS, STOP, SO = (tok.encode(x)[0] for x in (" Need", " Ones", " is", ".", " so"))


@dataclass(frozen=True)
class Row:
    """One problem as arrays over its T tokens; N thoughts.

    ids int64 [T]; owner int64 [T], the block; summary bool [T], markers included; weights
    float32 [T], loss weight of predicting ids[t]; lookup bool [T], values to be looked up;
    index float32 [N * R, T], the R index rows of each block, each the mean of a part of its summary's text; positions int64 [T];
    spans int [N + 1, 4], the last row for what follows the last summary: second name of the need
    line, the two ` is` whose next token is looked up, end of the block; needs has as many rows.
    """

    ids: np.ndarray
    owner: np.ndarray
    summary: np.ndarray
    weights: np.ndarray
    lookup: np.ndarray
    index: np.ndarray
    positions: np.ndarray
    spans: np.ndarray
    needs: tuple[tuple[int, ...], ...]


def _spans(ids: list[int], start: int, end: int) -> tuple[int, int, int, int]:
    need = ids.index(NEED, start)
    ones = ids.index(ONES, need)
    return ids.index(STOP, need) - 1, ones - 7, ones - 3, end


@lru_cache(maxsize=4096)
def _encode(text: str) -> tuple[int, ...]:
    return tuple(tok.encode(text))


def make_row(
    problem: Problem, stop_weight: float = 20.0, result_weight: float = 3.0, summaries: bool = True, summary_rows: int = 1
) -> Row:
    """The arrays of one problem; without ``summaries`` of its plain trace, and no block has an index.

    Tokens that decide much and are few weigh more: whether to stop after a summary, and the name and
    value of the thought's result.
    """
    ids = list(tok.encode(prompt_text(problem.prompt)))
    owner, summary, spans, marks = [-1] * len(ids), [False] * len(ids), [], []
    for j, thought in enumerate(problem.thoughts):
        start = len(ids)
        text = _encode(thought.text)
        short = (tok.BEGIN_SUMMARY, *_encode(thought.summary), tok.END_SUMMARY) if summaries else _encode("\n")
        ids += [*text, *short]
        owner += [j] * (len(text) + len(short))
        summary += [False] * len(text) + [summaries] * len(short)
        spans.append(_spans(ids, start, len(ids) - 1))
        marks.append((start + len(text) + 1, len(ids) - 1))
    spans.append((len(ids), len(ids) + 3, len(ids) + 3, len(ids) + 6))
    tail = [tok.END_THINK, *_encode(f"The answer is {problem.answer}."), tok.IM_END]
    ids += tail
    n = len(problem.thoughts)
    owner += [n] * len(tail)
    summary += [False] * len(tail)
    length = len(ids)
    index = np.zeros((n * summary_rows, length), np.float32)
    for j, (start, stop) in enumerate(marks if summaries else ()):
        edges = np.linspace(start, stop, summary_rows + 1).astype(int)  # as `zoomr_local.block_index` cuts it
        for i, (a, b) in enumerate(zip(edges, edges[1:], strict=False)):
            index[j * summary_rows + i, a:b] = 1.0 / (b - a)
    owners, spans_ = np.array(owner), np.array(spans)
    weights = (owners >= 0).astype(np.float32)
    lookup = np.zeros(length, bool)
    lookup[spans_[:n, 1] + 1] = lookup[spans_[:n, 2] + 1] = True
    results = np.flatnonzero(np.array(ids) == SO) + 3
    weights[results] = weights[results - 2] = weights[-3] = result_weight
    weights[spans_[:n, 3] + 1] = stop_weight
    return Row(
        np.array(ids), owners, np.array(summary), weights, lookup, index,
        np.arange(length), spans_, (*(t.needs for t in problem.thoughts), (n - 1,)),
    )  # fmt: skip


def reply_row(ids: np.ndarray, prompt: int, weights: np.ndarray) -> Row:
    """A reply of any tokens behind ``prompt`` of them: int64 and float32 [T]; one thought, of which nothing else is known."""
    own, nothing = np.arange(len(ids)) >= prompt, np.zeros(len(ids), bool)
    return Row(
        ids=ids, owner=np.where(own, 0, -1), summary=nothing, weights=weights, lookup=nothing, index=np.zeros((0, len(ids)), np.float32),
        positions=np.arange(len(ids)), spans=np.zeros((0, 4), int), needs=(),
    )  # fmt: skip


def stretched(row: Row, rng: Random, context: int = 4096) -> Row:
    """The row with random gaps in its positions between blocks, as if what lies between were paged out.

    A short problem thus trains the distances of a long one.
    """
    starts = np.flatnonzero(np.diff(row.owner, prepend=-1) > 0)
    spare = rng.randint(0, max(0, context - len(row.ids) - 1))
    chosen = rng.sample(starts.tolist(), rng.randint(1, len(starts)))
    cuts = sorted(rng.randint(0, spare) for _ in chosen)
    gaps = np.zeros(len(row.ids), np.int64)
    gaps[sorted(chosen)] = np.diff(cuts, prepend=0)
    return replace(row, positions=np.arange(len(row.ids)) + gaps.cumsum())


def _noise(rng: Random, length: int, n: int, share: float) -> np.ndarray:
    """bool [length, n], true for about ``share``, constant over stretches of 1 to 64 tokens."""
    chunk = rng.choice((1, 4, 16, 64))
    few = np.random.default_rng(rng.getrandbits(32)).random((length // chunk + 1, n)) < share
    return np.repeat(few, chunk, 0)[:length]


def zoomr_mask(row: Row, rng: Random, window: int | None = None, extra_zooms: bool = True) -> np.ndarray:
    """One random ZoomR mask, bool [T, T]: mask[q, k] is true where q may attend to k.

    Without ``extra_zooms`` no thought is in view but the open one and those it needs.
    """
    length, n = len(row.ids), len(row.needs) - 1
    window = window or rng.randint(24, 96)
    zoom = np.zeros((length, n + 2), bool)  # the last two columns stand for owners n and -1
    zoom[:, :n] = _noise(rng, length, n, rng.choice((0.0, 0.02, 0.1, 0.3))) & extra_zooms
    shown = np.ones((length, n + 2), bool)
    shown[:, :n] = ~_noise(rng, length, n, rng.choice((0.0, 0.0, 0.3, 0.7)))
    recent = rng.choice((0, 0, 1, 2, 4))
    for back in range(0, max(3, recent) + 1):
        rows = np.flatnonzero(row.owner >= back)
        shown[rows, row.owner[rows] - back] = True
        if 0 < back <= recent and extra_zooms:
            zoom[rows, row.owner[rows] - back] = True
    for (named, first, last, end), needs in zip(row.spans, row.needs, strict=True):
        for block in needs:  # a runtime leaves it there until the next thought asks for others
            until = rng.randint(last, end) if rng.random() < 0.5 else rng.randint(end, end + 30)
            zoom[rng.randint(named + 1, first) : until + 1, block] = True
    position = np.arange(length)
    mask = zoom[:, row.owner]
    mask[:, row.summary] = shown[:, row.owner[row.summary]]
    mask[:, row.owner < 0] = True
    mask |= row.owner[:, None] == row.owner[None, :]
    mask |= position[:, None] - position[None, :] < window
    return mask & (position[:, None] >= position[None, :])


def guard(row: Row, rng: Random) -> np.ndarray:
    """bool [T, T], pairs to forbid so that no value can travel through a summary (see the top of the file)."""
    length, n = len(row.ids), len(row.needs) - 1
    forbidden = np.zeros((length, length), bool)
    starts = np.searchsorted(row.owner, np.arange(n + 1))
    if rng.random() < 0.5:
        for j, (_, _, last, end) in enumerate(row.spans[:n]):
            summary = starts[j] + int(np.argmax(row.summary[starts[j] : end + 1]))
            forbidden[summary : end + 1, last + 2 : summary] = True
    else:
        for j, ((named, _, _, end), needs) in enumerate(zip(row.spans, row.needs, strict=True)):
            for block in needs:
                keys = (row.owner == block) & row.summary
                forbidden[named + 1 if block == j - 1 else starts[j] : end + 1, keys] = True
    return forbidden


def index_target(row: Row) -> np.ndarray:
    """bool [T, N]: the blocks each token's query should point at, from naming to reading them."""
    target = np.zeros((len(row.ids), len(row.needs) - 1), bool)
    for (named, _, last, _), needs in zip(row.spans, row.needs, strict=True):
        for block in needs:
            target[named : last + 1, block] = True
    return target


@dataclass(frozen=True)
class Batch:
    """Rows of one family, padded to one length; fields as in Row with a leading axis B; R index rows a summary.

    mask bool [B, 1, T, T]; target bool [B, T, N]; sources int64 [B, T], the place whose hidden state
    predicts each token; looks int64 [M, 4], under beacons, as `looks.py` has them.
    """

    ids: np.ndarray
    weights: np.ndarray
    lookup: np.ndarray
    owner: np.ndarray
    index: np.ndarray
    target: np.ndarray
    positions: np.ndarray
    mask: np.ndarray
    sources: np.ndarray
    looks: np.ndarray


def _padded(arrays: list[np.ndarray], axes: tuple[int, ...], fill: float = 0) -> np.ndarray:
    size = max(a.shape[axes[0]] for a in arrays)
    out = []
    for a in arrays:
        pad = [(0, size - a.shape[i]) if i in axes else (0, 0) for i in range(a.ndim)]
        out.append(np.pad(a, pad, constant_values=fill))
    return np.stack(out)


def task_batch(
    rng: Random, family: str, thoughts: int, tokens: int, masked: bool, style: str = "zoomr", beacon_every: int = 0,
    summary_rows: int = 1, extra_zooms: bool = True,
) -> Batch:
    """About `tokens` tokens of training-split problems, under the style's mask or with all before them in view.

    Styles: `zoomr`, thoughts with summaries; `plain`, thoughts alone, under which nothing is masked;
    `beacons`, the plain trace with a beacon after every `beacon_every` tokens, or without any if not `masked`.
    """
    rows: list[Row] = []
    while not rows or len(rows) * len(rows[0].ids) < tokens - len(rows[0].ids) // 2:
        problem = FAMILIES[family](rng, thoughts)
        if split_of(family, problem.prompt) == "train":
            row = make_row(problem, summaries=style == "zoomr", summary_rows=summary_rows)
            rows.append(stretched(row, rng) if style == "zoomr" and rng.random() < 0.5 else row)
    seen = [np.tri(len(r.ids), dtype=bool) for r in rows]
    sources = [np.maximum(np.arange(len(r.ids)) - 1, 0) for r in rows]
    if style == "zoomr":
        seen = [(zoomr_mask(r, rng, extra_zooms=extra_zooms) if masked else m) & ~guard(r, rng) for r, m in zip(rows, seen, strict=True)]
    looks: list[Look] = []
    if style == "beacons" and masked:
        from .beacons import with_beacons

        rows, seen, sources = map(list, zip(*(with_beacons(r, beacon_every) for r in rows), strict=True))
        looks = [look for i, (r, m) in enumerate(zip(rows, seen, strict=True)) for look in trace_looks(i, r.ids, m, r.lookup, SO)]
    mask = _padded(seen, (0, 1))[:, None]
    mask |= np.eye(mask.shape[-1], dtype=bool)  # padding must attend to something
    return Batch(
        ids=_padded([r.ids for r in rows], (0,)),
        weights=_padded([r.weights for r in rows], (0,)),
        lookup=_padded([r.lookup for r in rows], (0,)),
        owner=_padded([r.owner for r in rows], (0,), -1),
        index=_padded([r.index for r in rows], (1,)),
        target=_padded([index_target(r) for r in rows], (0,)),
        positions=_padded([r.positions for r in rows], (0,)),
        mask=mask,
        sources=_padded(sources, (0,)),
        looks=np.array(looks, np.int64).reshape(-1, 4),
    )
