"""Where attention has to look under beacons, in the drill and in reference traces: what `gathering.py` supervises.

Owned by models/train; called by `recall.py` and `batches.py`. Needs no torch.
"""

from __future__ import annotations

import numpy as np

from ..tasks.series import NUMERALS
from ..tasks.wording import NAMES
from ..tokenizer import BEACON, encode

NAME_TOKENS = tuple(encode(" " + name)[0] for name in (*NAMES, *NUMERALS))
NUMBER_TOKENS = tuple(encode(f" {i}")[0] for i in range(100))
MAKES, _PLUS, _MINUS = (encode(word)[0] for word in (" makes", " plus", " minus"))
_THOUGHT = 100
"""Tokens; no thought is longer."""

PARTED, GATHERED, ASKED, NEAR = range(4)
"""Kinds of looks: a token at the beacon before it, whose pair that parts; a beacon at a value among its tokens; the place that asks at the beacon;
the place that a sum or a name said again follows, at the beacon of what it needs of its own thought."""

Look = tuple[int, int, int, int]
"""(kind, row, from, to)"""


def drill_looks(row: int, ids: np.ndarray, mask: np.ndarray, says: int, pairs: int) -> list[Look]:
    """Of a row of the recall drill under beacons: ``pairs`` pairs are listed in it and then each is asked.

    ids int64 [T]; mask bool [T, T]; ``says`` is the token between name and value.
    """
    text = np.flatnonzero(ids != BEACON)
    said = [text[i - 1 : i + 2] for i in np.flatnonzero(ids[text] == says)]
    return _looks(row, ids, mask, said[:pairs], said[pairs:])


def trace_looks(row: int, ids: np.ndarray, mask: np.ndarray, lookup: np.ndarray, tells: int) -> list[Look]:
    """Of a reference trace under beacons: what a thought works out, "so NAME is VALUE", and the values that are looked up.

    ids int64 [T]; mask bool [T, T]; lookup bool [T]; ``tells`` is the token before the name of what was worked out.
    """
    text = np.flatnonzero(ids != BEACON)
    told = [text[i + 1 : i + 4] for i in np.flatnonzero(ids[text] == tells)]
    asked = [text[i - 2 : i + 1] for i in np.flatnonzero(lookup[text])]
    return _looks(row, ids, mask, told, asked) + _near_looks(row, ids, mask, text)


def _near_looks(row: int, ids: np.ndarray, mask: np.ndarray, text: np.ndarray) -> list[Look]:
    """What a thought says again of itself and only beacons are left of: a name that it named, the numbers that it adds or subtracts."""
    said, beacons = ids[text], np.flatnonzero(ids == BEACON)
    needed = []
    for i in np.flatnonzero(np.isin(said, NAME_TOKENS)):
        before = np.flatnonzero(said[max(0, i - _THOUGHT) : i] == said[i])
        if len(before):
            needed.append((text[i - 1], text[max(0, i - _THOUGHT) + before[-1]]))
    for i in np.flatnonzero(said == MAKES):
        j = i - 1
        while said[j] in NUMBER_TOKENS:
            needed.append((text[i], text[j]))
            if said[j - 1] not in (_PLUS, _MINUS):
                break
            j -= 2
    looks = []
    for at, place in needed:
        if not mask[at, place]:
            beacon = beacons[np.searchsorted(beacons, place)]
            looks.append((NEAR, row, at, beacon))
    return looks


def _looks(row: int, ids: np.ndarray, mask: np.ndarray, listed: list[np.ndarray], asked: list[np.ndarray]) -> list[Look]:
    """``listed`` and ``asked`` are places of (name, is, value); what is asked and never listed stands where no beacon replaces it."""
    beacons = np.flatnonzero(ids == BEACON)
    looks, held = [], {}
    for name, _, value in listed:
        after = np.searchsorted(beacons, value)
        if after < len(beacons):
            held[ids[name]] = beacons[after]
            looks.append((GATHERED, row, beacons[after], value))
            if after and beacons[after - 1] > name:
                looks.append((PARTED, row, value, beacons[after - 1]))
    for name, at, _ in asked:
        before = np.searchsorted(beacons, at) - 1
        if before >= 0 and beacons[before] > name:
            looks.append((PARTED, row, at, beacons[before]))
        beacon = held.get(ids[name])
        if beacon is not None and mask[at, beacon]:
            looks.append((ASKED, row, at, beacon))
    return looks
