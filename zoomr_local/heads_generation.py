"""A generation in which every layer and KV head keeps its own tokens: policies `snapkv`, `h2o`, `rkv`, `pyramid`, `reasonalloc`.

Only `engine.py` makes these. A layer is asked when it has no cell left for the tokens that come, and frees some for
later ones too: the methods' code selects every 128 tokens with as many cells beside its budget, here the budget is the
peak, so that those come out of it (`spare_tokens`). Layers with fewer cells are asked more often.

What a selection sees at that moment: the queries of the newest tokens (as many as vote) and all keys in cells; for `h2o` the sum of the
attention that each token has had from every query since it was decoded, those of the prompt included. A prompt that does
not fit is read in pieces, with a selection between them that sees nothing of what is still to come.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Iterator

import numpy as np

from .dialects import Fed
from .errors import BudgetError
from .events import CacheStats, Event, HeadsEvicted
from .generation import Generation, pinned_ranges
from .heads_cache import HeadCache, HeadCells
from .heads_setup import OBSERVED_TOKENS
from .kv_cache import KVCache
from .policies.heads import Accumulated, LayerView

SPARE_SHARE = 8
"""Of the cells of a layer that are neither pinned nor the newest tokens' one in so many is freed at a time, at most."""


def spare_tokens(layer_tokens: np.ndarray, reserved_tokens: int, most_tokens: int) -> np.ndarray:
    """int64 [n_layers]: for how many tokens a layer of so many cells a head frees cells at once."""
    return np.clip((layer_tokens - reserved_tokens) // SPARE_SHARE, 1, most_tokens)


class HeadGeneration(Generation):
    """Evicts in each layer and KV head by the policy. ``asked`` is called with every (layer, view, budgets, kept): for tests."""

    def __init__(self, cells: HeadCells, *args: Any) -> None:
        self.cells = cells
        super().__init__(*args)
        self.heads = heads = cells.store
        self.asked: Any = None
        needs = self.policy.needs
        self._queries = np.zeros((heads.n_layers, 0, heads.n_head, heads.head_dim), np.float32) if "queries" in needs else None
        self._sums = [Accumulated(heads.n_head_kv) for _ in range(heads.n_layers)] if "accumulated" in needs else None
        self._budgets = np.zeros((heads.n_layers, heads.n_head_kv), np.int64)
        self._shared_at = np.full(heads.n_layers, -1, np.int64)

    def _new_cache(self, context: Any, store: Any, budget_tokens: int, on_full: str) -> KVCache:
        return HeadCache(self.cells, context, store, budget_tokens, self.timeline)

    def plan(self) -> None:
        self._pin_prompt()
        s = self.policy.settings
        self._reserved = self.timeline.pinned_tokens + s.observation_tokens
        if int(self.cells.layer_tokens.min()) <= self._reserved:
            raise BudgetError(
                f"--kv-budget {self.cache.budget_tokens}: a layer of {self.cells.layer_tokens.min()} cells a head has none beside"
                f" {self.timeline.pinned_tokens} pinned and {s.observation_tokens} newest tokens; take a larger budget"
            )
        self._spare = spare_tokens(self.cells.layer_tokens, self._reserved, s.evict_every_tokens)

    def _pin_prompt(self) -> None:
        for start, stop in pinned_ranges(len(self.prompt), self.cache.budget_tokens, self.policy):
            self.timeline.pin(start, stop)
        self._is_pinned = np.zeros(len(self.prompt), bool)
        for start, stop in self.timeline.pinned:
            self._is_pinned[start:stop] = True

    def prefill(self) -> Iterator[Event]:
        n = self._piece_tokens()
        yield from self._make_room(n)
        yield self._decode_prompt(n)

    def step(self, token: int, fed: Fed, text: str) -> Iterator[Event]:
        yield from self._make_room(1)
        self._decode_token(token)

    def _piece_tokens(self) -> int:
        """How much of the prompt comes next: what is free; else what can be, leaving half for tokens that were read."""
        n = min(self.batch_tokens, self._prompt_left)
        if self._sums is not None:
            n = min(n, OBSERVED_TOKENS)
        half = max(1, (int(self.cells.layer_tokens.min()) - self._reserved) // 2)
        return min(n, max(self.cache.free_tokens, half))

    def _decode_prompt(self, n_tokens: int) -> Event:
        event = super()._decode_prompt(n_tokens)
        self._observe()
        return event

    def _decode_token(self, token: int) -> int:
        position = super()._decode_token(token)
        self._observe()
        return position

    def _observe(self) -> None:
        """Take over what the last decode left, before the next one overwrites it."""
        if self._queries is not None:
            both = np.concatenate([self._queries, self.heads.queries()], axis=1)
            self._queries = both[:, -self.policy.settings.observation_tokens :]
        for layer, sums in enumerate(self._sums or ()):
            positions = self.heads.positions(layer)
            sums.add(positions, positions >= 0, self.heads.weights(layer).sum(axis=0, dtype=np.float64))

    def _make_room(self, n_tokens: int) -> Iterator[Event]:
        full = np.flatnonzero(self.cache.layer_free < n_tokens)
        if not len(full):
            return
        freed = [self._evict(int(layer), max(n_tokens, int(self._spare[layer]))) for layer in full]
        self.refreshes += 1
        budgets = tuple(map(tuple, self._budgets[full].tolist())) if self.policy.moves_head_budgets else None
        yield HeadsEvicted(len(self.timeline), tuple(full.tolist()), tuple(freed), tuple(map(tuple, self.cache.held.tolist())), budgets)

    def _evict(self, layer: int, spare_tokens: int) -> int:
        """Free cells for so many tokens in every head of a layer; how many cells of single heads that frees."""
        view = self._view(layer)
        budgets = self._head_budgets(view, self.heads.n_head_kv * (int(self.cells.layer_tokens[layer]) - spare_tokens))
        kept = self.policy.keep(view, budgets)
        if self.asked is not None:
            self.asked(layer, view, budgets, kept)
        return self.cache.keep(layer, kept)

    def _head_budgets(self, view: LayerView, layer_cells: int) -> np.ndarray:
        """int64 [n_head_kv], ``layer_cells`` in all: shared out again when that is due, or when the sum is another."""
        layer, now = view.layer, len(self.timeline)
        due = now - self._shared_at[layer] >= self.policy.settings.head_every_tokens or self._shared_at[layer] < len(self.prompt)
        if due or not self.policy.moves_head_budgets or self._budgets[layer].sum() != layer_cells:
            self._budgets[layer] = self.policy.head_budgets(view, layer_cells)
            self._shared_at[layer] = now
        return self._budgets[layer].copy()

    def _view(self, layer: int) -> LayerView:
        positions = self.heads.positions(layer).copy()
        valid = positions >= 0
        old = valid & (positions < len(self.prompt))
        pinned = np.zeros_like(valid)
        pinned[old] = self._is_pinned[positions[old]]
        return LayerView(
            positions, valid, pinned,
            keys=self.heads.layer_keys(layer) if "keys" in self.policy.needs else None,
            queries=None if self._queries is None else self._queries[layer],
            accumulated=None if self._sums is None else self._sums[layer].at(positions, valid),
            scale=self.heads.kq_scale(layer), layer=layer,
        )  # fmt: skip

    def _stats(self) -> CacheStats:
        tokens = self.cells.layer_tokens
        return replace(super()._stats(), allocated_tokens=int(tokens.sum()) // len(tokens), layer_cells=tuple(tokens.tolist()))
