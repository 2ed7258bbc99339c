"""Task families with exact answers: the registry and the one way to draw problems.

Owned by models/tasks. Anyone may call it: pure Python, no third-party package.
"""

from __future__ import annotations

import re
from random import Random

from . import dag, ledger, linsys, series
from .problem import SPLITS, Problem, Thought, prompt_text, split_of

_MODULES = {"dag": dag, "ledger": ledger, "linsys": linsys, "series": series}
FAMILIES = {name: module.make for name, module in _MODULES.items()}
MAX_THOUGHTS = {name: module.MAX_THOUGHTS for name, module in _MODULES.items()}
LONG_THOUGHTS = {name: module.LONG_THOUGHTS for name, module in _MODULES.items()}
"""Thoughts of the test sets: full traces of 2,500 to 4,000 tokens."""


def generate(
    family: str, n: int, seed: int = 0, thoughts: int = 8, split: str = "train"
) -> list[Problem]:
    """`n` different problems of `family` with `thoughts` thoughts each, all of `split`.

    Equal arguments give equal problems. Whatever the seed, no problem of one split can
    appear in another: the split is a hash of the question (see `split_of`).
    """
    if family not in FAMILIES:
        raise ValueError(f"unknown family {family!r}; there are {', '.join(sorted(FAMILIES))}")
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}; there are {', '.join(SPLITS)}")
    if not 1 <= thoughts <= MAX_THOUGHTS[family]:
        raise ValueError(f"{family} takes 1 to {MAX_THOUGHTS[family]} thoughts, not {thoughts}")
    rng = Random(f"{family}/{seed}/{thoughts}")
    found: dict[str, Problem] = {}
    while len(found) < n:
        problem = FAMILIES[family](rng, thoughts)
        if split_of(family, problem.prompt) == split:
            found.setdefault(problem.id, problem)
    return list(found.values())


def is_worded(prompt: str) -> bool:
    """Whether ``prompt`` asks as the problems of the families do. The bundled models know no other question."""
    return re.search(r" Keep only the last two digits\. What is \w+\?\s*\Z", prompt) is not None


__all__ = [
    "FAMILIES", "LONG_THOUGHTS", "MAX_THOUGHTS", "SPLITS", "Problem", "Thought",
    "generate", "is_worded", "prompt_text", "split_of",
]
