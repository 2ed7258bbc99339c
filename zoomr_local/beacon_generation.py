"""A generation in which a beacon stands for every c tokens that were written: policy `breadcrumbs`.

Only `engine.py` makes these. Source: Breadcrumbs Reasoning (arXiv 2510.13797, read second-hand): after every c generated tokens
a learned beacon token is decoded, and once its keys and values are stored those of the c tokens before it leave for good. The
next token is the one drawn before the beacon, which predicts nothing. What the source leaves open is done as
`models/train/beacons.py` trains it: a beacon takes a position of its own, and the prompt stays.

Beacons are in the timeline and in cells, and nowhere else: not in the text, not among the completion tokens, not in the sampler's
history. Where they stand follows from the prompt's length and c alone, so no list of them is kept.

Past the budget the policy says what goes: first what is not pinned of a long prompt, then the oldest beacons.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Iterator

import numpy as np

from .dialects import Fed
from .errors import BudgetError, ModelError, UnsupportedModel, UsageError
from .events import BeaconDecoded, CacheStats, Event, Warned
from .generation import TokenGeneration
from .model import Model

BEACON = "<|beacon|>"
"""The text by which a vocabulary names its beacon token."""

BEACON_EVERY = "zoomr.beacon_every"
"""The metadata key of c, in tokens: a number, or several as text (``8,4,16``)."""


@dataclass(frozen=True)
class Beacons:
    """The id of a model's beacon token, and after how many generated tokens (c) one came in training: perhaps after
    different numbers, of which the first is taken unless another is chosen."""

    token: int
    every: tuple[int, ...]


def find_beacons(model: Model) -> Beacons:
    """What ``model`` says of its beacons.

    Raises UsageError, which names what is missing, for a model without them; ModelError for an impossible c;
    UnsupportedModel where evicted tokens would live on in a sliding window, which paging never touches.
    """
    token, text = model.llama.token_of(BEACON), model.llama.meta(BEACON_EVERY)
    missing = [what for what, found in ((f"token {BEACON}", token), (f"metadata {BEACON_EVERY}", text)) if found is None]
    if missing:
        raise UsageError(
            f"--policy breadcrumbs needs a model that was trained with beacons; {model.name} has no {' and no '.join(missing)}."
            " Give such a model with -m, or choose another policy (zoomr policies)"
        )
    try:
        every = tuple(int(part) for part in text.split(","))
    except ValueError:
        raise ModelError(f"{model.path}: metadata {BEACON_EVERY} is {text!r}, not whole numbers") from None
    if min(every) < 1:
        raise ModelError(f"{model.path}: metadata {BEACON_EVERY} is {text!r}, must be at least 1")
    if model.llama.n_swa:
        raise UnsupportedModel(
            f"--policy breadcrumbs cannot serve {model.name}: what a beacon stands for would live on in its sliding window of"
            f" {model.llama.n_swa} tokens; choose --policy full"
        )
    return Beacons(token, every)


def check_beacons(model: Model, chosen: int | None, budget_tokens: int) -> int:
    """After how many tokens a beacon comes, ``chosen`` by the user or not.

    Raises what `find_beacons` does, UsageError for a number that the model was not trained with, and BudgetError unless a
    window, its beacon and an older one fit beside any prompt.
    """
    trained = find_beacons(model).every
    every = trained[0] if chosen is None else chosen
    if every not in trained:
        raise UsageError(f"--beacon-every {every}: {model.name} was trained with a beacon after {' or '.join(map(str, trained))} tokens")
    if every + 2 > budget_tokens // 3:
        raise BudgetError(
            f"--kv-budget {budget_tokens}: a third of it is for what is written, and {every} tokens with their beacon and one"
            f" older beacon need {every + 2}; take at least {3 * (every + 2)}"
        )
    return every


class BeaconGeneration(TokenGeneration):
    """Writes a beacon after every ``every`` tokens and evicts them; ``dropped_beacons`` counts beacons without room."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.beacon, self.every = find_beacons(self.model).token, self.policy.settings.beacon_every
        self.never_sampled = (self.beacon,)
        self.dropped_beacons = 0

    def step(self, token: int, fed: Fed, text: str) -> Iterator[Event]:
        if self._beacon_is_due:
            yield from self._place_beacon()
        yield from super().step(token, fed, text)

    def state(self) -> dict[str, Any]:
        return {**super().state(), "dropped_beacons": self.dropped_beacons}

    def restore(self, state: dict[str, Any]) -> None:
        super().restore(state)
        self.dropped_beacons = state["dropped_beacons"]

    @property
    def _written_tokens(self) -> int:
        """Everything decoded behind the prompt, beacons included."""
        return max(0, len(self.timeline) - len(self.prompt))

    @property
    def _window_tokens(self) -> int:
        """Tokens since the last beacon, which no beacon stands for yet."""
        return self._written_tokens % (self.every + 1)

    @property
    def _beacon_is_due(self) -> bool:
        return self._window_tokens == self.every

    @property
    def _next_position(self) -> int:
        return len(self.timeline) + self._beacon_is_due

    def _place_beacon(self) -> Iterator[Event]:
        yield from self._make_room(1)
        position = self.timeline.append(self.beacon)
        self.cache.decode([self.beacon], position, "none")
        yield BeaconDecoded(position, self.every)
        yield self.cache.drop(np.arange(position - self.every, position, dtype=np.int32))

    def _droppable(self) -> np.ndarray:
        candidates = super()._droppable()
        return candidates[candidates < len(self.timeline) - self._window_tokens]

    def _dropped(self, positions: np.ndarray) -> Iterator[Event]:
        beacons = int((positions >= len(self.prompt)).sum())
        if beacons and not self.dropped_beacons:
            yield Warned(
                f"the budget of {self.cache.budget_tokens} cells is full of beacons; from here on the oldest are dropped,"
                " and what they stand for is forgotten; raise --kv-budget to keep them"
            )
        self.dropped_beacons += beacons

    def _written(self) -> list[int]:
        return [token for at, token in enumerate(super()._written()) if at % (self.every + 1) != self.every]

    def _stats(self) -> CacheStats:
        placed = self._written_tokens // (self.every + 1)
        return replace(super()._stats(), beacons=placed, dropped_beacons=self.dropped_beacons)
