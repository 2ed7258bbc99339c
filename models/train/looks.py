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
_NEED, _NEXT, _KEEP, _COMMA = (encode(word)[0] for word in (" Need", "Next", " Keep", ","))
_THOUGHT = 100
"""Tokens; no thought is longer."""

PARTED, GATHERED, ASKED, NEAR = range(4)
"""Kinds of looks: a token at the beacon before it, whose pair that parts; a beacon at a value among its tokens; the place that asks at the beacon;
the place that a sum, a name said again or a need follows, at the beacon of what it needs of its own thought."""

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
    """What a thought goes on with and only beacons are left of: see `_said_again`, `_added` and `_asked_by`."""
    said, beacons = ids[text], np.flatnonzero(ids == BEACON)
    looks = []
    for i, j in (*_said_again(said), *_added(said), *_asked_by(said)):
        at, place = text[i], text[j]
        if not mask[at, place]:
            looks.append((NEAR, row, at, beacons[np.searchsorted(beacons, place)]))
    return looks


def _said_again(said: np.ndarray) -> list[tuple[int, int]]:
    """(i, j): behind text token i comes the name that token j is; not what a thought begins with, which is in the prompt."""
    found = []
    for i in np.flatnonzero(np.isin(said, NAME_TOKENS)):
        before = np.flatnonzero(said[max(0, i - _THOUGHT) : i] == said[i])
        if len(before) and said[i - 1] not in (_NEED, _COMMA, _NEXT) and said[i - 3] != _NEED:
            found.append((i - 1, max(0, i - _THOUGHT) + before[-1]))
    return found


def _added(said: np.ndarray) -> list[tuple[int, int]]:
    """(i, j): what follows " makes" is the sum of numbers, or of the name before it; what "Keep" says ends a result."""
    found = []
    for i in np.flatnonzero(said == MAKES):
        j = i - 1
        if said[j] in NAME_TOKENS:
            found.append((i, j))
        while said[j] in NUMBER_TOKENS:
            found.append((i, j))
            if said[j - 1] not in (_PLUS, _MINUS):
                break
            j -= 2
    for i in np.flatnonzero(said == _KEEP):  # Keep 2 and 1, so NAME is; Keep 2 and 1, which makes
        at = i + 6 if said[min(i + 6, len(said) - 1)] == MAKES else i + 7
        if at < len(said):
            found += [(at, i + 1), (at, i + 3)]
    return found


def _asked_by(said: np.ndarray) -> list[tuple[int, int]]:
    """(i, j): "Need A and B" is said of what a thought begins with, "After Y, X", "After Y, X with Z" or "Next X"; B of A, too."""
    found = []
    for i in np.flatnonzero(said == _NEED):
        j = i - 2
        while j >= 0 and said[j] not in (_COMMA, _NEXT):
            if said[j] in NAME_TOKENS:
                found += [(at, j) for at in (i, i + 2) if at < len(said)]
            j -= 1
        if i + 2 < len(said):
            found.append((i + 2, i + 1))
    return found


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
