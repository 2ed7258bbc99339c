"""ClusterKV's state, apart from its decisions: which clusters a layer has, and which were used in the last steps.

All of a state is arrays, so that it can be saved and restored. `clusterkv.py` decides what is clustered and selected.
"""

from __future__ import annotations

import numpy as np

from .kmeans import draw_first, kmeans


class Clusters:
    """Clusters of the KV heads of one layer, or of several. Every one has as many, over the same tokens; a cluster may be empty.

    ``kept`` int32 [k]: positions that are always resident (sinks, pinned), in no cluster. ``positions`` int32 [n]: the
    clustered tokens, ascending. ``labels`` int32 [n_kv_head, n]: each one's cluster. ``centroids`` float32 [n_kv_head, C, d].
    ``members`` int32 [n_kv_head, n] are indices into ``positions`` by cluster, each cluster's ascending; cluster c has those
    from ``starts[h, c]`` to ``starts[h, c + 1]``.
    """

    def __init__(self, n_kv_head: int, d: int) -> None:
        self.kept = np.zeros(0, np.int32)
        self.positions = np.zeros(0, np.int32)
        self.labels = np.zeros((n_kv_head, 0), np.int32)
        self.centroids = np.zeros((n_kv_head, 0, d), np.float32)
        self._index()

    @property
    def n_clusters(self) -> int:
        """C, also counting empty ones."""
        return self.centroids.shape[1]

    @property
    def sizes(self) -> np.ndarray:
        """int64 [n_kv_head, C]: tokens in each cluster."""
        return np.diff(self.starts, axis=1)

    def keep(self, positions: np.ndarray) -> None:
        """Tokens that are always resident."""
        self.kept = np.concatenate([self.kept, positions]).astype(np.int32)

    def append(self, positions: np.ndarray, keys: np.ndarray, n_clusters: int, iterations: int, seed: tuple[int, ...]) -> None:
        """Cluster newer tokens among themselves; clusters made before stay as they are.

        ``positions`` int [n] ascending, ``keys`` float [n_kv_head, n, d] after RoPE. No more clusters than tokens. The draw
        is fixed by ``seed`` and the first position. Raises ValueError if a token is older than one that is clustered.
        """
        if len(positions) == 0:
            return
        if (np.diff(positions) <= 0).any() or (len(self.positions) and positions[0] <= self.positions[-1]):
            raise ValueError(f"tokens from position {positions[0]} cannot be clustered after position {self.positions[-1:]}: not ascending")
        first = draw_first(len(keys), len(positions), min(n_clusters, len(positions)), (*seed, int(positions[0])))
        made = [kmeans(keys[h : h + 1], first[h : h + 1], iterations) for h in range(len(keys))]  # one by one: n x C floats at a time
        centroids, labels = (np.concatenate(each) for each in zip(*made, strict=True))
        self.labels = np.concatenate([self.labels, labels + self.n_clusters], axis=1).astype(np.int32)
        self.centroids = np.concatenate([self.centroids, centroids], axis=1).astype(np.float32)
        self.positions = np.concatenate([self.positions, positions]).astype(np.int32)
        self._index()

    def state(self) -> dict[str, np.ndarray]:
        """Everything, as arrays."""
        return {"kept": self.kept, "positions": self.positions, "labels": self.labels, "centroids": self.centroids}

    @classmethod
    def restored(cls, state: dict[str, np.ndarray]) -> Clusters:
        """What ``state`` was taken from. Raises ValueError for arrays that do not belong together."""
        labels, centroids = state["labels"], state["centroids"]
        if labels.shape != (len(centroids), len(state["positions"])):
            raise ValueError(f"labels {labels.shape} are not of {len(centroids)} KV heads and {len(state['positions'])} tokens")
        if labels.size and not (0 <= labels.min() and labels.max() < centroids.shape[1]):
            raise ValueError(f"a label is outside the {centroids.shape[1]} clusters")
        clusters = cls(len(centroids), centroids.shape[2])
        clusters.kept, clusters.positions = state["kept"].astype(np.int32), state["positions"].astype(np.int32)
        clusters.labels, clusters.centroids = labels.astype(np.int32), centroids.astype(np.float32)
        clusters._index()
        return clusters

    def _index(self) -> None:
        self.members = np.argsort(self.labels, axis=1, kind="stable").astype(np.int32)
        counts = np.array([np.bincount(head, minlength=self.n_clusters) for head in self.labels], np.int64)
        counts = counts.reshape(len(self.labels), self.n_clusters)
        self.starts = np.concatenate([np.zeros((len(counts), 1), np.int64), np.cumsum(counts, axis=1)], axis=1)


class ClusterCache:
    """Which clusters the last R steps used, in every KV head: a cluster among them need not be brought in again.

    Source: ClusterKV's code (its cache simulator): the hit rate of a step is the share of its clusters that one of the R
    steps before used, the mean over heads; steps before there are R others are not counted.
    """

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self.used: list[list[np.ndarray]] = []
        self.counted_steps = 0
        self.hit_rate_sum = 0.0
        self.last_hit_rate: float | None = None
        """Of the last step; None if it was not counted."""

    def step(self, chosen: list[np.ndarray]) -> list[np.ndarray]:
        """Take a step's clusters (int [c_h] for every KV head); those of them that the last R steps did not use."""
        before = [set().union(*(step[h].tolist() for step in self.used)) for h in range(len(chosen))]
        missing = [np.array(sorted(set(now.tolist()) - seen), np.int64) for now, seen in zip(chosen, before, strict=True)]
        rates = [1 - len(new) / len(now) for new, now in zip(missing, chosen, strict=True) if len(now)]
        counts = bool(rates) and 0 < self.steps == len(self.used)
        self.last_hit_rate = sum(rates) / len(rates) if counts else None
        if counts:
            self.counted_steps += 1
            self.hit_rate_sum += self.last_hit_rate
        self.used.append([np.array(now, np.int32) for now in chosen])
        del self.used[: max(0, len(self.used) - self.steps)]
        return missing

    @property
    def hit_rate(self) -> float | None:
        """The mean hit rate of the counted steps, 0..1; None before there is one."""
        return self.hit_rate_sum / self.counted_steps if self.counted_steps else None

    def state(self) -> dict[str, np.ndarray]:
        """Everything, as arrays."""
        flat = [head for step in self.used for head in step]
        return {
            "clusters": np.concatenate(flat) if flat else np.zeros(0, np.int32),
            "lengths": np.array([[len(head) for head in step] for step in self.used], np.int64),
            "counts": np.array([self.steps, self.counted_steps], np.int64), "sum": np.array([self.hit_rate_sum]),
        }  # fmt: skip

    @classmethod
    def restored(cls, state: dict[str, np.ndarray]) -> ClusterCache:
        """What ``state`` was taken from. Raises ValueError for arrays that do not belong together."""
        lengths = state["lengths"]
        if int(lengths.sum()) != len(state["clusters"]) or len(lengths) > state["counts"][0]:
            raise ValueError(f"{len(state['clusters'])} clusters, {int(lengths.sum())} in {len(lengths)} steps of {state['counts'][0]}")
        cache = cls(int(state["counts"][0]))
        flat = iter(np.split(state["clusters"].astype(np.int32), np.cumsum(lengths.ravel())[:-1]) if lengths.size else [])
        cache.used = [[next(flat) for _ in step] for step in lengths]
        cache.counted_steps, cache.hit_rate_sum = int(state["counts"][1]), float(state["sum"][0])
        return cache
