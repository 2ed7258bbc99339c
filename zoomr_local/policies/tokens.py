"""The token policies: rules that keep single tokens and drop the rest for good. They are the controls.

Each rule is a few lines, so they share this file. The prompt's head and the question are pinned for all of them
by the engine: without that, baselines look worse than they are (Random Attention, 2609.03430, second-hand).
"""

from __future__ import annotations

import numpy as np

from .base import Policy, TokenView


class Recency(Policy):
    """Pinned prompt and the newest tokens ("prefix sliding")."""

    name = "recency"
    headline = "pinned prompt and the newest tokens; the rest is dropped"
    unit = "token"
    drops = True

    def select(self, view: TokenView) -> np.ndarray:
        keep = np.zeros(len(view.positions), bool)
        keep[len(keep) - view.keep_tokens:] = True
        return keep


class Streaming(Recency):
    """StreamingLLM (2309.17453): attention sinks and the newest tokens; of the prompt only the question stays.

    Positions are not renumbered as the paper does inside its window: a cell's key keeps its RoPE.
    """

    name = "streaming"
    headline = "first tokens (sinks), the question and the newest tokens; the rest is dropped"
    pins_prompt = False


class Random(Policy):
    """Pinned prompt, the newest few tokens, and a uniform random sample of all others: the control to beat.

    Every position of a text draws one fixed random number; the largest stay. That is reservoir sampling: at any time the
    survivors are a uniform sample of everything seen, not of the survivors before. All layers and heads have the same sample; Random
    Attention (2609.03430, second-hand) draws one for each KV head.
    """

    name = "random"
    headline = "pinned prompt and random tokens; the control every selector must beat"
    unit = "token"
    drops = True
    recent_tokens = 128
    """The thought in the making, with room: the other policies have it whole, so without it this one would fail by that alone."""

    def select(self, view: TokenView) -> np.ndarray:
        draws = _draw(view.positions, (view.text << 32) + self.settings.seed)
        recent = min(self.recent_tokens, view.keep_tokens)
        if recent:
            draws[-recent:] = np.iinfo(np.uint64).max
        keep = np.zeros(len(draws), bool)
        keep[np.argsort(draws, kind="stable")[len(draws) - view.keep_tokens:]] = True
        return keep


def _draw(positions: np.ndarray, seed: int) -> np.ndarray:
    """uint64 [m]: a fixed pseudo-random number for every (seed, position), by a 64-bit mix of multiplications."""
    z = positions.astype(np.uint64) + np.uint64((seed * 0x9E3779B97F4A7C15 + 0x632BE59BD9B4E019) % 2**64)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        z = (z ^ (z >> np.uint64(shift))) * np.uint64(factor)
    return z ^ (z >> np.uint64(31))
