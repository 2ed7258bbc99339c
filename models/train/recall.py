"""Short rows of lookups and little else: the drills that make them form early and keep them sharp.

Owned by models/train; called by the training loop. `recall_batch`: a row lists `KEY is VALUE.` for distinct
keys, then asks for all of them again in another order; only the repeated values count. `reading_batch`: a row is
a problem's prompt and then what each of its thoughts copies from there, the thoughts in another order; what the
prompt determines counts. A trace has one such lookup in twenty tokens, such a row one in five.
`beacon_recall_batch`: the first of the two as a reply in which beacons are all that is left of what was listed. `beacon_echo_batch`: what
thoughts begin with and say again of it, in a reply under beacons of such beginnings alone.
"""

from __future__ import annotations

import re
from random import Random

import numpy as np

from ..tasks import FAMILIES, Problem, prompt_text, split_of
from ..tokenizer import encode
from .batches import SO, reply_row
from .beacons import with_beacons
from .looks import NAME_TOKENS, NUMBER_TOKENS, drill_looks, trace_looks

_IS, _STOP = (encode(word)[0] for word in (" is", "."))
_DIGITS = re.compile(r"Ones: \d+ \w+ \d+")


def recall_batch(rng: Random, tokens: int, pairs: int) -> tuple[np.ndarray, np.ndarray]:
    """(ids, weights), int64 and float32 [B, 8 * pairs], about `tokens` in all.

    weights[b, t] is the loss weight of predicting ids[b, t]: 1 on asked values, else 0.
    """
    length = 8 * pairs
    rows = max(1, tokens // length)
    ids = np.zeros((rows, length), np.int64)
    weights = np.zeros((rows, length), np.float32)
    for row in range(rows):
        keys = rng.sample(NAME_TOKENS, pairs)
        values = [rng.choice(NUMBER_TOKENS) for _ in keys]
        again = rng.sample(range(pairs), pairs)
        flat = [(keys[i], _IS, values[i], _STOP) for i in [*range(pairs), *again]]
        ids[row] = np.array(flat).reshape(-1)
        weights[row, 4 * pairs + 2 :: 4] = 1.0
    return ids, weights


def beacon_recall_batch(
    rng: Random, tokens: int, pairs: int, every: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """(ids, weights, mask, sources) of `recall_batch` under beacons every ``every`` tokens: as in `Batch`, about ``tokens`` in all.

    The fifth, int64 [N, 4], is where attention has to look for that, as `looks.py` has it.

    Names that nothing is said of stand between the pairs, a quarter of ``every`` on average. So in each row some pairs are parted by a beacon
    where they are listed, some where they are asked, some in both: with all pairs at one distance from the beacons, those of a row would be
    parted in both or in neither, and the one is not learned without the other.
    """
    others = pairs * every // 2
    rows = max(1, tokens * every // (every + 1) // (8 * pairs + others))
    made = []
    for row, told in zip(*recall_batch(rng, rows * 8 * pairs, pairs), strict=True):
        unsaid = sorted(set(NAME_TOKENS) - set(row.tolist()))
        before = sorted(4 * rng.randrange(2 * pairs) for _ in range(others))
        ids = np.insert(row, before, rng.choices(unsaid, k=others))
        made.append(with_beacons(reply_row(ids, 0, np.insert(told, before, 0.0)), every))
    rows, masks, sources = zip(*made, strict=True)
    looks = [look for i, (row, mask, _) in enumerate(made) for look in drill_looks(i, row.ids, mask, _IS, pairs)]
    return np.stack([r.ids for r in rows]), np.stack([r.weights for r in rows]), np.stack(masks)[:, None], np.stack(sources), np.array(looks)


def beacon_echo_batch(
    rng: Random, family: str, thoughts: int, tokens: int, every: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """As `beacon_recall_batch`, of training-split problems and the beginnings of their thoughts, half of them up to the first two digits.

    What the text before it determines counts: names, what is needed, names again, digits of values; a beginning's first token, its end and the
    values do not.
    """
    made, length = [], 0
    while length < tokens:
        problem = FAMILIES[family](rng, thoughts)
        if split_of(family, problem.prompt) != "train":
            continue
        ids, room = encode(prompt_text(problem.prompt)), tokens - length
        prompt = len(ids)
        if made and room < 2 * prompt:
            break
        weights = [0.0] * prompt
        for thought in problem.thoughts:
            stops = _DIGITS.search(thought.text).end() if rng.random() < 0.5 else thought.text.index(" now.") + len(" now.")
            said = encode(thought.text[:stops] + "\n")
            ids += said
            weights += [0.0] + [float(before != _IS) for before in said[:-2]] + [0.0]  # no thought ends there
        room = max(room, prompt + 2 * every)
        told = np.array(weights[:room], np.float32)
        made.append(with_beacons(reply_row(np.array(ids[:room]), prompt, told), every))
        length += len(told)
    looks = [look for i, (row, mask, _) in enumerate(made) for look in trace_looks(i, row.ids, mask, row.lookup, SO)]
    size = max(len(row.ids) for row, _, _ in made)
    masks = np.tile(np.eye(size, dtype=bool), (len(made), 1, 1))  # padding must attend to something
    for whole, (_, mask, _) in zip(masks, made, strict=True):
        whole[: len(mask), : len(mask)] = mask

    def padded(arrays: list[np.ndarray]) -> np.ndarray:
        return np.stack([np.pad(a, (0, size - len(a))) for a in arrays])

    return (
        padded([row.ids for row, _, _ in made]), padded([row.weights for row, _, _ in made]), masks[:, None], padded([s for _, _, s in made]),
        np.array(looks, np.int64).reshape(-1, 4),
    )  # fmt: skip


def copied(problem: Problem) -> list[tuple[list[int], list[int]]]:
    """(ids, weights) of what each thought copies from the prompt: its first two sentences and each that stands there as it is.

    The name that a thought begins with is not determined (weight 0), nor is which sentence comes next; the rest is.
    """
    given = set(problem.prompt.split(". "))
    pieces = []
    for thought in problem.thoughts:
        begins, needs, *others = thought.text.removesuffix(".").split(". ")
        ids = encode(f"{begins}. {needs}.")
        weights = [0, 0] + [1] * (len(ids) - 2)
        for sentence in others:
            if sentence in given:
                more = encode(f" {sentence}.")
                ids += more
                weights += [0] * (len(more) - 2) + [1, 0]
        pieces.append((ids, weights))
    return pieces


def reading_batch(
    rng: Random, family: str, thoughts: int, tokens: int, context: int = 4096
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(ids, weights, positions), int64, float32 and int64 [B, T], about ``tokens`` in all, of training-split problems.

    weights[b, t] is the loss weight of predicting ids[b, t]; padding has none. Positions leave random gaps before
    the thoughts, so that the prompt is as far away as in a long trace.
    """
    rows: list[tuple[list[int], list[int], np.ndarray]] = []
    while not rows or len(rows) * len(rows[0][0]) < tokens - len(rows[0][0]) // 2:
        problem = FAMILIES[family](rng, thoughts)
        if split_of(family, problem.prompt) != "train":
            continue
        ids, weights, starts = encode(prompt_text(problem.prompt)), [], []
        weights += [0] * len(ids)
        pieces = copied(problem)
        for piece, told in rng.sample(pieces, len(pieces)):
            starts.append(len(ids))
            ids, weights = ids + piece, weights + told
        spare = rng.randint(0, max(0, context - len(ids)))
        gaps = np.zeros(len(ids), np.int64)
        gaps[starts] = np.diff(sorted(rng.randint(0, spare) for _ in starts), prepend=0)
        rows.append((ids, weights, np.arange(len(ids)) + gaps.cumsum()))
    length = max(len(ids) for ids, _, _ in rows)
    pad = [length - len(ids) for ids, _, _ in rows]
    return (
        np.array([[*ids, *[0] * n] for (ids, _, _), n in zip(rows, pad, strict=True)]),
        np.array([[*w, *[0] * n] for (_, w, _), n in zip(rows, pad, strict=True)], np.float32),
        np.array([[*at, *[at[-1]] * n] for (_, _, at), n in zip(rows, pad, strict=True)]),
    )
