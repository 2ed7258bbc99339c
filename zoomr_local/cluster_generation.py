"""A generation in which every layer and KV head attends to the clusters that its query points at: policy `clusterkv`.

Only `engine.py` makes these. Before a token is decoded, every layer that does not hold everything selects clusters by the query
of the last decoded token, and cells are exchanged with the tier until each head holds what is kept, what is not clustered yet, and its
selection. In the paper the token's own query selects, in the middle of each layer; here all layers select together between two decodes, a
token late, so that no layer waits for the host. With the setting ``cluster_query`` "own" a token that selects is decoded twice: once on the
cells as they are, for its queries, and again on those that they select. Its queries are then off by what the layers below attended to.

While everything fits, nothing is clustered and nothing selected. Which tokens are clustered together does not depend on
that: pieces are noted when they are whole, and clustered when the first selection needs them.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Iterator

import numpy as np

from .cluster_cache import RecallCache
from .dialects import Fed
from .errors import BudgetError
from .events import CacheStats, Event, HeadsEvicted, HeadsRecalled
from .heads_generation import HeadGeneration
from .kv_cache import KVCache
from .policies.heads import ClusterCache, Clusters
from .timeline import Range


class ClusterGeneration(HeadGeneration):
    """Pages single heads' cells by the policy. Clusters are of all layers that select, one after the other.

    ``asked`` is called with every (layers, clusters, queries, newest_tokens, selection) before cells are exchanged: for tests.
    """

    def _new_cache(self, context: Any, store: Any, budget_tokens: int, on_full: str) -> KVCache:
        return RecallCache(self.cells, context, store, budget_tokens, self.timeline)

    def plan(self) -> None:
        self._pin_prompt()
        heads, tokens, s = self.heads, self.cells.layer_tokens, self.policy.settings
        length_tokens = len(self.prompt) + self.max_tokens
        self._twice = s.cluster_query == "own"
        self._reserved = self.policy.kept_tokens(len(self.prompt), self.timeline.pinned) + self._twice
        self._selecting = np.flatnonzero(tokens < length_tokens).tolist()
        self._window = length_tokens
        if self._selecting:
            try:
                self._window = self.policy.window_tokens(int(tokens[self._selecting].min()), self._reserved)
            except ValueError as error:
                raise BudgetError(f"--kv-budget {self.cache.budget_tokens}: {error}; take a larger budget") from None
        self._ahead = min(s.select_every_tokens, max(1, self._window // 2))
        self.cache.open_tier(self._selecting, length_tokens)
        self._clusters = Clusters(len(self._selecting) * heads.n_head_kv, heads.head_dim)
        self._used = ClusterCache(s.cluster_cache_steps)
        self._pieces: list[Range] = []
        self._open = self._next_selection = 0

    def resume(self) -> Iterator[Event]:
        try:
            yield from super().resume()
        finally:
            self.cache.close_tier()

    def _observe(self) -> None:
        """The last token's query is read when it selects, which is before the next decode."""

    def step(self, token: int, fed: Fed, text: str) -> Iterator[Event]:
        yield from self._make_room(1, token)
        self._decode_token(token)

    def _make_room(self, n_tokens: int, token: int | None = None) -> Iterator[Event]:
        """``token``: the one that comes, if it is one."""
        now = len(self.timeline)
        if not self._prompt_left:
            if self._open < len(self.prompt):
                self._close(len(self.prompt))
            if now + n_tokens - self._open > self._window:
                self._close(now)
        if not self._selecting:
            return
        due = not self._prompt_left and now >= self._next_selection and (self.cache.held < now).any()
        tried = self._twice and token is not None
        if due or self.cache.free_tokens < n_tokens + tried:
            if self._prompt_left:
                self._close(now)
            self._next_selection = now + self.policy.settings.select_every_tokens
            if tried and self.cache.free_tokens:  # none where the prompt took them all: the query before selects this once
                self.cache.try_token(token, now)
            yield from self._select(max(n_tokens, self._ahead) + self._twice)

    def _close(self, stop: int) -> None:
        """From here on the tokens that came since the last piece are one; whatever comes belongs to the next."""
        self._pieces.append((self._open, stop))
        self._open = stop

    def _select(self, n_coming: int) -> Iterator[Event]:
        """A selection of every layer, with room for so many tokens in each."""
        for start, stop in self._pieces:
            self._cluster(start, stop)
        self._pieces.clear()
        now, layers, n = len(self.timeline), np.array(self._selecting), self.heads.n_head_kv
        clusters, queries, newest = self._clusters, self.heads.queries()[layers, -1], now - self._open + n_coming
        budgets = self.cells.layer_tokens[layers].repeat(n)
        found = self.policy.select(clusters, queries.reshape(-1, queries.shape[-1]), budgets, newest)
        self._used.step(found.clusters)
        if self.asked is not None:
            self.asked(self._selecting, clusters, queries, newest, found)
        wanted = np.zeros((len(found.tokens), now), bool)
        wanted[:, clusters.kept] = True
        wanted[:, clusters.positions] = found.tokens
        wanted[:, self._open :] = True
        freed, filled = np.array([self.cache.exchange(layer, wanted[i * n : i * n + n]) for i, layer in enumerate(self._selecting)]).T
        self.refreshes += 1
        held = tuple(map(tuple, self.cache.held.tolist()))
        if freed.any():
            some = freed > 0
            yield HeadsEvicted(now, tuple(layers[some].tolist()), tuple(freed[some].tolist()), held)
        if filled.any():
            some = filled > 0
            yield HeadsRecalled(now, tuple(layers[some].tolist()), tuple(filled[some].tolist()), held, _rounded(self._used.last_hit_rate))

    def _cluster(self, start: int, stop: int) -> None:
        """Cluster the tokens of a piece, all of them in cells: of the prompt, or written since."""
        positions = np.arange(start, stop)
        heads = range(self.heads.n_head_kv)
        keys = np.stack([self._keys(layer, head, start, stop) for layer in self._selecting for head in heads])
        if start < len(self.prompt):
            self.policy.begin(self._clusters, positions, keys, self._is_pinned[start:stop])
        else:
            self.policy.grow(self._clusters, positions, keys)

    def _keys(self, layer: int, head: int, start: int, stop: int) -> np.ndarray:
        cells, positions = self.heads.resident(layer, head)
        return self.heads.keys(layer, head, cells[(positions >= start) & (positions < stop)])

    def _stats(self) -> CacheStats:
        stored, cells = self.cache.tier.stored_bytes, self.cache.held.size
        return replace(
            super()._stats(), paged_out_bytes=stored, ram_bytes=stored, cluster_hit_rate=_rounded(self._used.hit_rate),
            recalled_tokens=-(-self.cache.recalled_cells // cells),
        )  # fmt: skip


def _rounded(rate: float | None) -> float | None:
    return None if rate is None else round(rate, 4)
