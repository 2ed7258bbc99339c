"""ClusterKV: keys that point the same way are one cluster, and the clusters that the query points at are brought back whole.

Source: ClusterKV (2412.03213) and its code. Nothing is dropped: tokens outside the selection wait in a tier. What the code
does otherwise, and what is done here:

- the code's budget leaves out the newest tokens, here it holds everything: kept tokens, newest tokens, selected ones;
- its newest tokens stay until 320 of them are clustered; where half of what a budget leaves is less, so many are, with clusters in proportion;
- its accuracy figures are of a version that never clusters generated tokens; here they are clustered, as its kernels do;
- every query head selects for itself there; a cell of a KV head is seen by all of its query heads, so here they score as one;
- a pinned prompt is kept and in no cluster, so with ``pin_prompt`` only what is not pinned of a prompt, and generated tokens, are.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .allocation import dense_layers
from .base import HeadPolicy, free_tokens
from .clusters import Clusters
from .settings import DECIMALS


@dataclass(frozen=True)
class ClusterSelection:
    """What one step attends to beside kept and newest tokens."""

    tokens: np.ndarray
    """bool [n_kv_head, n], aligned with ``Clusters.positions``."""
    clusters: list[np.ndarray]
    """int64 [c_h] for every KV head: its clusters, the best first. They are recalled whole."""
    trimmed: np.ndarray
    """int64 [n_kv_head]: tokens of the last cluster that did not fit, its newest."""


class ClusterKV(HeadPolicy):
    """Selects clusters by centroid x query, in every KV head its own; makes them as tokens come."""

    name = "clusterkv"
    headline = "clusters of keys that the query points at, in every head its own; the others wait in a tier"
    drops = False
    recalls = True

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"keys", "queries"})

    def layer_budgets(
        self, n_layer: int, budget_tokens: int, reserved_tokens: int = 0, length_tokens: int | None = None
    ) -> np.ndarray:
        """As the base's, with the first ``dense_layers`` layers holding a whole text of ``length_tokens``.

        Raises ValueError if they leave the others too little, and without a length if there are dense layers.
        """
        free_tokens(budget_tokens, reserved_tokens)
        if self.settings.dense_layers and length_tokens is None:
            raise ValueError(f"clusterkv keeps everything in {self.settings.dense_layers} layers and must be told the longest text")
        return dense_layers(n_layer, budget_tokens, self.settings.dense_layers, length_tokens or 0, reserved_tokens)

    def window_tokens(self, budget_tokens: int, kept_tokens: int) -> int:
        """How many newest tokens stay resident before they are clustered: m, or half of what the budget leaves if that is less.

        Raises ValueError if the budget leaves no room for the newest token and a selected one.
        """
        free = free_tokens(budget_tokens, kept_tokens)
        if free < 2:
            raise ValueError(f"a budget of {budget_tokens} tokens with {kept_tokens} kept ones leaves clusterkv no room to select")
        return min(self.settings.cluster_every_tokens, free // 2)

    def begin(self, clusters: Clusters, positions: np.ndarray, keys: np.ndarray, pinned: np.ndarray, layer: int = 0) -> None:
        """Cluster a prompt, or a piece of one: ``positions`` int [n] ascending, ``keys`` [n_kv_head, n, d], bool ``pinned`` [n]."""
        kept = positions < self.settings.sink_tokens
        if self.settings.pin_prompt:
            kept |= pinned
        clusters.keep(positions[kept])
        n = int((~kept).sum())
        self._append(clusters, positions[~kept], keys[:, ~kept], n // self.settings.prefill_cluster_tokens, layer)

    def kept_tokens(self, prompt_tokens: int, pinned: list[tuple[int, int]]) -> int:
        """How much of a prompt is in no cluster: its sinks and the ranges that are ``pinned``."""
        kept = np.arange(prompt_tokens) < self.settings.sink_tokens
        for start, stop in pinned if self.settings.pin_prompt else ():
            kept[start:stop] = True
        return int(kept.sum())

    def grow(self, clusters: Clusters, positions: np.ndarray, keys: np.ndarray, layer: int = 0) -> None:
        """Cluster generated tokens, usually ``window_tokens`` of them, with C+ clusters for m tokens, rounded."""
        s = self.settings
        wanted = (2 * len(positions) * s.clusters_added + s.cluster_every_tokens) // (2 * s.cluster_every_tokens)
        self._append(clusters, positions, keys, wanted, layer)

    def _append(self, clusters: Clusters, positions: np.ndarray, keys: np.ndarray, n_clusters: int, layer: int) -> None:
        clusters.append(positions, keys, max(1, n_clusters), self.settings.kmeans_iterations, (self.settings.seed, layer))

    def select(self, clusters: Clusters, queries: np.ndarray, budgets: np.ndarray, newest_tokens: int) -> ClusterSelection:
        """The clusters for one token's queries (float [n_head, d]) in each head's budget (int [n_kv_head]).

        ``clusters`` and ``queries`` may be of several layers, one after the other. Clusters are taken by descending
        score until they fill what kept and newest tokens leave; of the last one the oldest tokens stay. Of equal
        scores the cluster made first. O(n_head * C * d + n_kv_head * (C log C + n)).
        Raises ValueError if a budget does not hold kept and newest tokens.
        """
        fixed = len(clusters.kept) + newest_tokens
        rooms = np.broadcast_to(np.asarray(budgets, np.int64), len(clusters.labels)) - fixed
        if (rooms < 0).any():
            raise ValueError(f"a budget of {rooms.min() + fixed} cells cannot hold {fixed} kept and newest tokens")
        scores = np.round(self.cluster_scores(clusters, queries), DECIMALS)
        order, n_taken, trimmed = take(scores, clusters.sizes, rooms)
        taken = np.zeros(scores.shape, bool)
        np.put_along_axis(taken, order, np.arange(scores.shape[1]) < n_taken[:, None], axis=1)
        tokens = np.take_along_axis(taken, clusters.labels, axis=1)
        for h in np.flatnonzero(trimmed):
            last = clusters.starts[h, order[h, n_taken[h] - 1] + 1]
            tokens[h, clusters.members[h, last - trimmed[h] : last]] = False
        return ClusterSelection(tokens, [row[:n] for row, n in zip(order, n_taken.tolist(), strict=True)], trimmed)

    def cluster_scores(self, clusters: Clusters, queries: np.ndarray) -> np.ndarray:
        """float64 [n_kv_head, C]: inner products with the centroids, mean or maximum over the query heads of a KV head."""
        n_kv_head, _, d = clusters.centroids.shape
        grouped = queries.astype(np.float64).reshape(n_kv_head, len(queries) // n_kv_head, d)
        products = grouped @ clusters.centroids.astype(np.float64).swapaxes(1, 2)
        return products.mean(axis=1) if self.settings.cluster_group == "mean" else products.max(axis=1)


def take(scores: np.ndarray, sizes: np.ndarray, rooms: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(order int64 [n_kv_head, C], taken int64 [n_kv_head], over int64 [n_kv_head]): of each head's clusters by descending score,
    empty ones last, the first ``taken`` fill ``rooms``, and of the last of them ``over`` tokens are too many.

    Of equal scores the first. ``scores`` and ``sizes`` [n_kv_head, C].
    """
    order = np.argsort(np.where(sizes > 0, -scores, np.inf), axis=1, kind="stable")
    by_score = np.take_along_axis(sizes, order, axis=1)
    filled = by_score.cumsum(axis=1)
    some = (filled - by_score < rooms[:, None]) & (by_score > 0)
    taken = some.sum(axis=1)
    return order, taken, np.maximum(0, (by_score * some).sum(axis=1) - rooms)
