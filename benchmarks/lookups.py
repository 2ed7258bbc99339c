"""Lookups in what a model wrote, and how well a score predicts something: pure functions for `benchmarks.agreement`.

A lookup is a sentence `NAME is VALUE.` of a thought whose NAME was worked out (`so NAME is VALUE.`) in an earlier
thought. It is right if it repeats the value that the model itself wrote there, correct or not: so every lookup of a
trace counts, also after the trace has left the reference, and what is judged is reading and not arithmetic.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from zoomr_local.evaluate_report import LEAST_PROBLEMS
from zoomr_local.events import BlockClosed, Event, PagedIn, PagedOut, Refreshed, TokenDecoded

ZOOMED, RESIDENT, OUT = "zoomed", "resident", "out"

RESAMPLES = 2000
_WORKED_OUT = re.compile(r"\bso ([^\s.]+) is (\d+)\.")
_LOOKED_UP = re.compile(r"(?<=\. )([^\s.]+) is (\d+)\.")


@dataclass(frozen=True)
class Lookup:
    """One value that was read. ``position`` is the value's first token.

    ``distance`` counts blocks back from the newest closed one, which is 1. ``where`` the needed thought was while the
    value's logits were computed: "zoomed" (in cells, and chosen by votes), "resident" (in cells for another reason:
    new, or room was left) or "out". ``agreement`` is that of the last selection before then, None if there was none.
    """

    name: str
    position: int
    right: bool
    distance: int
    where: str
    agreement: float | None


@dataclass
class _Cells:
    """What the moves so far come to."""

    resident: set[int]
    closed: int = 0
    zoomed: tuple[int, ...] = ()
    agreement: float | None = None

    def apply(self, event: Event) -> None:
        if isinstance(event, BlockClosed):
            self.resident.add(event.block)
            self.closed = event.block + 1
        elif isinstance(event, Refreshed):
            self.zoomed, self.agreement = event.zoomed, event.agreement
        elif isinstance(event, PagedIn) and event.part == "detail":
            self.resident.update(event.blocks)
        elif isinstance(event, PagedOut) and event.part == "detail":
            self.resident.difference_update(event.blocks)

    def where(self, block: int) -> str:
        if block not in self.resident:
            return OUT
        return ZOOMED if block in self.zoomed else RESIDENT


def lookups(events: Iterable[Event]) -> list[Lookup]:
    """The lookups of one generation from its events, in the order of writing.

    There must be a `Refreshed` for every selection. A value at position v is predicted by the token before it, so
    what was selected or moved at position v came too late for it; what happened at v - 1 or earlier counts.
    """
    events = list(events)
    text, owner = thought_text(events)
    blocks = [event for event in events if isinstance(event, BlockClosed)]
    written: list[tuple[int, str, str]] = [(owner[m.start(2)], m[1], m[2]) for m in _WORKED_OUT.finditer(text)]
    moves = sorted((e for e in events if _position(e) is not None), key=_position)  # stable: one position keeps its order
    cells, done = _Cells(set()), 0
    found = []
    for match in _LOOKED_UP.finditer(text):
        position = owner[match.start(2)]
        while done < len(moves) and _position(moves[done]) < position:
            cells.apply(moves[done])
            done += 1
        # the newest value of that name in a block that was closed by then
        known = [(block.block, value) for at, name, value in written if name == match[1]
                 for block in blocks if block.detail[0] <= at < block.detail[1] and _position(block) < position]  # fmt: skip
        if known:
            block, value = known[-1]
            found.append(Lookup(match[1], position, value == match[2], cells.closed - block, cells.where(block), cells.agreement))
    return found


def thought_text(events: Iterable[Event]) -> tuple[str, list[int]]:
    """The text of all thoughts, and for each of its characters the position of the token that wrote it.

    What is no thought stands as a line break, which no sentence reaches over.
    """
    parts: list[str] = []
    owner: list[int] = []
    for event in events:
        if isinstance(event, TokenDecoded):
            part = event.text if event.role == "thought" else "\n"
            parts.append(part)
            owner += [event.position] * len(part)
    return "".join(parts), owner


def _position(event: Event) -> Any:
    """How many tokens the sequence had when it happened; None for what moves nothing."""
    if isinstance(event, BlockClosed):
        return (event.summary or event.detail)[1]
    return event.position if isinstance(event, PagedIn | PagedOut | Refreshed) else None


# ---------------------------------------------------------------- prediction

Cases = Sequence[tuple[float, bool]]
"""Score and outcome of everything that belongs to one problem."""


def weighted_auc(scores: np.ndarray, right: np.ndarray, weights: np.ndarray) -> tuple[float, float]:
    """(pairs won, pairs): of all pairs of a right and a wrong case, where the right one scored higher; ties count half.

    ``scores`` float [n], ``right`` bool [n], ``weights`` float [n]: how many times a case counts. O(n log n).
    """
    _, level = np.unique(scores, return_inverse=True)
    good = np.bincount(level, weights * right, level.max(initial=-1) + 1)
    bad = np.bincount(level, weights * ~right, level.max(initial=-1) + 1)
    won = good @ (np.cumsum(bad) - bad / 2)
    return float(won), float(good.sum() * bad.sum())


def auc(strata: Sequence[Sequence[Cases]], resamples: int = RESAMPLES, seed: int = 0) -> dict[str, Any]:
    """The area under the ROC curve over all ``strata`` (families), each a list of problems.

    Pairs are made within a stratum only: pooled, an easy family that agrees more would look like prediction. The
    interval is a bootstrap's: problems are drawn anew within each stratum, with all their cases, because the cases of
    one problem are not independent. None where fewer than LEAST_PROBLEMS problems have a right, or a wrong, case.
    """
    arrays = [_arrays(problems) for problems in strata]
    n = sum(len(scores) for scores, _, _ in arrays)
    n_wrong = sum(int((~right).sum()) for _, right, _ in arrays)
    won, pairs = _total([weighted_auc(scores, right, np.ones(len(scores))) for scores, right, _ in arrays])
    sides = [sum(any(outcome is side for _, outcome in problem) for problems in strata for problem in problems) for side in (True, False)]
    interval = None
    if min(sides) >= LEAST_PROBLEMS and pairs:
        rng = np.random.default_rng(seed)
        drawn = [_draw(arrays, strata, rng) for _ in range(resamples)]
        known = [more / of for more, of in drawn if of]
        interval = [round(float(bound), 4) for bound in np.quantile(known, [0.025, 0.975])]
    return {
        "auc": round(won / pairs, 4) if pairs else None, "interval95": interval, "n": n, "n_wrong": n_wrong,
        "problems": sum(len(problems) for problems in strata), "pairs": round(pairs),
    }  # fmt: skip


def paired_share(one: Sequence[tuple[int, int]], other: Sequence[tuple[int, int]], seed: int = 0) -> dict[str, Any]:
    """How much larger the share of right lookups is in ``one`` than in ``other``, -1..1.

    Both have (right lookups, lookups) of the same problems in the same order. The interval is a bootstrap's over
    problems; None where fewer than LEAST_PROBLEMS problems differ, as it would be too narrow. None without lookups.
    """
    pairs = np.concatenate([np.array(side, float).reshape(-1, 2) for side in (one, other)], axis=1)
    if not len(pairs) or not pairs[:, [1, 3]].sum(axis=0).all():
        return {"difference": None, "interval95": None}
    interval = None
    if (pairs[:, :2] != pairs[:, 2:]).any(axis=1).sum() >= LEAST_PROBLEMS:
        rng = np.random.default_rng(seed)
        drawn = pairs[rng.integers(0, len(pairs), (RESAMPLES, len(pairs)))].sum(axis=1)
        drawn = drawn[(drawn[:, 1] > 0) & (drawn[:, 3] > 0)]
        interval = [round(float(bound), 4) for bound in np.quantile(_difference(drawn), [0.025, 0.975])]
    return {"difference": round(float(_difference(pairs.sum(axis=0))), 4), "interval95": interval}


def _difference(sums: np.ndarray) -> np.ndarray:
    return sums[..., 0] / sums[..., 1] - sums[..., 2] / sums[..., 3]


def _arrays(problems: Sequence[Cases]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    flat = [(score, outcome, number) for number, problem in enumerate(problems) for score, outcome in problem]
    scores, right, problem = zip(*flat, strict=True) if flat else ((), (), ())
    return np.array(scores, float), np.array(right, bool), np.array(problem, int)


def _draw(arrays: Any, strata: Sequence[Sequence[Cases]], rng: np.random.Generator) -> tuple[float, float]:
    parts = []
    for (scores, right, problem), problems in zip(arrays, strata, strict=True):
        if len(scores):
            times = np.bincount(rng.integers(0, len(problems), len(problems)), minlength=len(problems))
            parts.append(weighted_auc(scores, right, times[problem].astype(float)))
    return _total(parts)


def _total(parts: Sequence[tuple[float, float]]) -> tuple[float, float]:
    return sum(won for won, _ in parts), sum(pairs for _, pairs in parts)
