"""Family `series`: a recurrence with two lags that differ between odd and even terms.

Owned by models/tasks. Call it through `models.tasks.generate`.

A short question, a long trace: a term's value stands in its thought and nowhere else, and
the summary says only which term was done. Odd and even terms use different lags, so what
one thought needs is never one more than what the thought before it needed.
"""

from __future__ import annotations

from random import Random

from .addition import MODULUS, add_thought
from .problem import Problem, make_problem

ORDINALS = (
    "first second third fourth fifth sixth seventh eighth ninth tenth eleventh twelfth "
    "thirteenth fourteenth fifteenth sixteenth seventeenth eighteenth nineteenth twentieth"
).split()
GIVEN = 6  # terms whose value the question states; also the largest lag
LAGS = range(2, GIVEN + 1)
MAX_THOUGHTS = len(ORDINALS) - GIVEN
_FAR = 4  # each pair holds a lag of at least this, so that the newest thoughts never suffice


def _pick_lags(rng: Random) -> tuple[int, int]:
    while True:
        a, b = rng.sample(LAGS, 2)
        if max(a, b) >= _FAR:
            return a, b


def make(rng: Random, thoughts: int) -> Problem:
    """One random problem whose asked term is `thoughts` terms after the given ones."""
    if not 1 <= thoughts <= MAX_THOUGHTS:
        raise ValueError(f"series takes 1 to {MAX_THOUGHTS} thoughts, not {thoughts}")
    odd, even = _pick_lags(rng), _pick_lags(rng)
    while set(odd) == set(even):
        even = _pick_lags(rng)
    values = [rng.randrange(MODULUS) for _ in range(GIVEN)]
    facts = ", ".join(f"{ORDINALS[i]} is {v}" for i, v in enumerate(values))
    steps = []
    for i in range(GIVEN, GIVEN + thoughts):
        kind, lags = ("Odd", odd) if i % 2 == 0 else ("Even", even)  # i counts from 0
        back = [i - lag for lag in lags]
        operands = tuple((ORDINALS[j], values[j]) for j in back)
        needs = tuple(j - GIVEN for j in back if j >= GIVEN)
        opening = f"Next {ORDINALS[i]}. {kind} lags {lags[0]} and {lags[1]}."
        step, value = add_thought(opening, ORDINALS[i], operands, needs)
        steps.append(step)
        values.append(value)
    asked = ORDINALS[GIVEN + thoughts - 1]
    prompt = (
        f"A series starts with {facts}. Odd lags {odd[0]} and {odd[1]}."
        f" Even lags {even[0]} and {even[1]}. Each later term adds the two terms"
        f" those lags back. Keep only the last two digits. What is {asked}?"
    )
    return make_problem("series", prompt, values[-1], steps)
