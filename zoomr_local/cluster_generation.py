"""A generation in which every layer and KV head attends to the clusters that its query points at: policy `clusterkv`.

Only `engine.py` makes these. Before a token is decoded, every layer that does not hold everything selects clusters by the query
of the last decoded token, and cells are exchanged with the tier until each head holds what is kept, what is not clustered yet, and its
selection. In the paper the token's own query selects, in the middle of each layer; here all layers select together between two decodes, a
token late, so that no layer waits for the host.

While everything fits, nothing is clustered and nothing selected. Which tokens are clustered together does not depend on
that: pieces are noted when they are whole, and clustered when the first selection needs them.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Iterator

import numpy as np

from .cluster_cache import RecallCache
from .errors import BudgetError
from .events import CacheStats, Event, HeadsEvicted, HeadsRecalled
from .heads_generation import HeadGeneration
from .kv_cache import KVCache
from .policies.heads import ClusterCache, Clusters
from .timeline import Range


class ClusterGeneration(HeadGeneration):
    """Pages single heads' cells by the policy. ``asked`` is called with every (layer, clusters, query, newest_tokens,
    selection) before cells are exchanged: for tests."""

    def _new_cache(self, context: Any, store: Any, budget_tokens: int, on_full: str) -> KVCache:
        return RecallCache(self.cells, context, store, budget_tokens, self.timeline)

    def plan(self) -> None:
        self._pin_prompt()
        heads, tokens, s = self.heads, self.cells.layer_tokens, self.policy.settings
        length_tokens = len(self.prompt) + self.max_tokens
        self._reserved = self.policy.kept_tokens(len(self.prompt), self.timeline.pinned)
        self._selecting = np.flatnonzero(tokens < length_tokens).tolist()
        self._window = length_tokens
        if self._selecting:
            try:
                self._window = self.policy.window_tokens(int(tokens[self._selecting].min()), self._reserved)
            except ValueError as error:
                raise BudgetError(f"--kv-budget {self.cache.budget_tokens}: {error}; take a larger budget") from None
        self._ahead = min(s.select_every_tokens, max(1, self._window // 2))
        self.cache.open_tier(self._selecting, length_tokens)
        self._clusters = {layer: Clusters(heads.n_head_kv, heads.head_dim) for layer in self._selecting}
        self._used = {layer: ClusterCache(s.cluster_cache_steps) for layer in self._selecting}
        self._pieces: list[Range] = []
        self._open = self._next_selection = 0

    def resume(self) -> Iterator[Event]:
        try:
            yield from super().resume()
        finally:
            self.cache.close_tier()

    def _observe(self) -> None:
        """The last token's query is read when it selects, which is before the next decode."""

    def _make_room(self, n_tokens: int) -> Iterator[Event]:
        now = len(self.timeline)
        if not self._prompt_left:
            if self._open < len(self.prompt):
                self._close(len(self.prompt))
            if now + n_tokens - self._open > self._window:
                self._close(now)
        if not self._selecting:
            return
        due = not self._prompt_left and now >= self._next_selection and (self.cache.held < now).any()
        if due or self.cache.free_tokens < n_tokens:
            if self._prompt_left:
                self._close(now)
            self._next_selection = now + self.policy.settings.select_every_tokens
            yield from self._select(max(n_tokens, self._ahead))

    def _close(self, stop: int) -> None:
        """From here on the tokens that came since the last piece are one; whatever comes belongs to the next."""
        self._pieces.append((self._open, stop))
        self._open = stop

    def _select(self, n_coming: int) -> Iterator[Event]:
        """A selection of every layer, with room for so many tokens in each."""
        newest = len(self.timeline) - self._open + n_coming
        queries = self.heads.queries()[:, -1]
        for start, stop in self._pieces:
            for layer in self._selecting:
                self._cluster(layer, start, stop)
        self._pieces.clear()
        moved = np.array([self._exchange(layer, queries[layer], newest) for layer in self._selecting])
        self.refreshes += 1
        now, layers = len(self.timeline), np.array(self._selecting)
        freed, filled = moved.T
        if freed.any():
            some = freed > 0
            held = tuple(map(tuple, self.cache.held.tolist()))
            yield HeadsEvicted(now, tuple(layers[some].tolist()), tuple(freed[some].tolist()), held)
        if filled.any():
            some = filled > 0
            yield HeadsRecalled(now, tuple(layers[some].tolist()), tuple(filled[some].tolist()), self._last_hit_rate())

    def _exchange(self, layer: int, query: np.ndarray, newest_tokens: int) -> tuple[int, int]:
        clusters = self._clusters[layer]
        found = self.policy.select(clusters, query, self.cells.layer_tokens[layer], newest_tokens)
        self._used[layer].step(found.clusters)
        if self.asked is not None:
            self.asked(layer, clusters, query, newest_tokens, found)
        wanted = np.zeros((self.heads.n_head_kv, len(self.timeline)), bool)
        wanted[:, clusters.kept] = True
        wanted[:, clusters.positions] = found.tokens
        wanted[:, self._open :] = True
        return self.cache.exchange(layer, wanted)

    def _cluster(self, layer: int, start: int, stop: int) -> None:
        """Cluster the tokens of a piece, all of them in cells: of the prompt, or written since."""
        positions = np.arange(start, stop)
        keys = np.stack([self._keys(layer, head, start, stop) for head in range(self.heads.n_head_kv)])
        if start < len(self.prompt):
            self.policy.begin(self._clusters[layer], positions, keys, self._is_pinned[start:stop], layer)
        else:
            self.policy.grow(self._clusters[layer], positions, keys, layer)

    def _keys(self, layer: int, head: int, start: int, stop: int) -> np.ndarray:
        cells, positions = self.heads.resident(layer, head)
        return self.heads.keys(layer, head, cells[(positions >= start) & (positions < stop)])

    def _last_hit_rate(self) -> float | None:
        rates = [used.last_hit_rate for used in self._used.values() if used.last_hit_rate is not None]
        return round(sum(rates) / len(rates), 4) if rates else None

    def _hit_rate(self) -> float | None:
        """Over all layers and selections that are counted."""
        steps = sum(used.counted_steps for used in self._used.values())
        return round(sum(used.hit_rate_sum for used in self._used.values()) / steps, 4) if steps else None

    def _stats(self) -> CacheStats:
        stored, cells = self.cache.tier.stored_bytes, self.cache.held.size
        return replace(
            super()._stats(), paged_out_bytes=stored, ram_bytes=stored, cluster_hit_rate=self._hit_rate(),
            recalled_tokens=-(-self.cache.recalled_cells // cells),
        )  # fmt: skip
