"""The numbers that the per-head policies may use, each with the source that it comes from.

"Code" is the authors' repository, read for facts; "second-hand" is a summary or a third party's re-implementation
that quotes the paper. docs/heads.md has the table with the reasons.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

GROUP_POOLS = ("logits", "weights")
CLUSTER_GROUPS = ("mean", "max")
CLUSTER_QUERIES = ("last", "own")

CLUSTER_CHOICES = ("dense_layers", "cluster_query", "clusters_added")
"""Settings of `clusterkv` that a user may choose."""

DECIMALS = 12
"""Scores are compared rounded to so many places: which of two equal tokens stays must not depend on the order in which
a machine's matrix product adds. Ties go to the older token, or to the cluster made first."""

_LEAST = {
    "evict_every_tokens": 1, "observation_tokens": 1, "pool_tokens": 1, "pyramid_slope": 1, "head_every_tokens": 1,
    "sink_tokens": 0, "dense_layers": 0, "prefill_cluster_tokens": 1, "cluster_every_tokens": 1, "clusters_added": 1,
    "kmeans_iterations": 1, "cluster_cache_steps": 0, "select_every_tokens": 1, "seed": 0, "layer_power": 0, "head_power": 0,
}  # fmt: skip
_SHARES = ("importance_share", "heavy_share", "demand_mass", "layer_least", "head_floor")


@dataclass(frozen=True)
class HeadSettings:
    """Settings of all per-head policies; sizes in tokens, shares in 0..1.

    All of them. ``pin_prompt``: pinned tokens stay in every head and count in its budget; off is the papers' own setting
    (Random Attention, 2609.03430, second-hand: it changes the ranking). ``evict_every_tokens``: a selection after so many
    decoded tokens (R-KV's readme, B_buffer; its code, divide_length). ``seed``: of whatever is drawn.

    SnapKV and R-KV (R-KV's code, `window_size`, `kernel_size`). ``observation_tokens``: the newest queries that vote, and
    the newest tokens, beside pinned ones, that always stay. ``pool_tokens``: width of the max-pool over neighbours, odd. ``group_pool``: how the
    query heads of a KV head become one vote; "logits" is the maximum before the softmax, as in the code, and needs the
    queries; "weights" is the maximum of the soft-maxed weights, for callers that have no queries.

    R-KV. ``importance_share``: lambda, 0.1 in the readme and in the paper's Eq. 7 (second-hand); the code's own default is
    0.07. ``similarity_threshold``: cosine above which two keys say the same (code, `threshold`).

    H2O. ``heavy_share``: part of the budget for the tokens with most attention, the rest for the newest (its code:
    heavy_ratio = recent_ratio).

    Pyramid. ``pyramid_slope``: the last layer gets 1/slope of the mean, the first the rest of twice the mean
    (PyramidKV's code, `beta`).

    ReasonAlloc (2606.11164, section 5 and Algorithm 1; all second-hand). ``demand_mass``: rho, the attention that a layer's
    demand must cover. ``layer_power``: gamma, ``layer_least`` and ``layer_most``: bounds of a layer's budget in means.
    ``head_every_tokens``: Delta. ``head_power``: beta. ``head_floor``: mu, a head's least budget in means.

    ClusterKV (2412.03213). ``sink_tokens``, ``dense_layers``, ``kmeans_iterations``, ``cluster_every_tokens`` (m) and
    ``clusters_added`` (C+): its code; the paper's C+ is said to be 4 (second-hand). ``prefill_cluster_tokens``: one cluster
    for so many prompt tokens (L/80, inferred from the code's 400 clusters for 32,000). ``cluster_cache_steps``: R (1 and 2
    in the paper, second-hand). ``cluster_group``: how the query heads of a KV head score together; "mean" is the code's
    `qavg`. Its default there is a selection for every query head, which a cell per KV head cannot hold. ``select_every_tokens``:
    a selection after so many; in the code after each. ``cluster_query``: whose query selects for a token; "own" is the
    code's, "last" that of the token before.
    """

    pin_prompt: bool = True
    evict_every_tokens: int = 128
    seed: int = 0
    observation_tokens: int = 8
    pool_tokens: int = 7
    group_pool: str = "logits"
    importance_share: float = 0.1
    similarity_threshold: float = 0.5
    heavy_share: float = 0.5
    pyramid_slope: int = 20
    demand_mass: float = 0.93
    layer_power: float = 0.5
    layer_least: float = 0.25
    layer_most: float = 2.0
    head_every_tokens: int = 128
    head_power: float = 0.5
    head_floor: float = 0.25
    sink_tokens: int = 16
    dense_layers: int = 2
    prefill_cluster_tokens: int = 80
    cluster_every_tokens: int = 320
    clusters_added: int = 8
    kmeans_iterations: int = 20
    cluster_cache_steps: int = 1
    cluster_group: str = "mean"
    select_every_tokens: int = 1
    cluster_query: str = "own"

    def __post_init__(self) -> None:
        """Raises ValueError for a number outside its range."""
        for name, least in _LEAST.items():
            if not getattr(self, name) >= least:
                raise ValueError(f"{name} is {getattr(self, name)}, must be at least {least}")
        for name in _SHARES:
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}, must be from 0 to 1")
        if not self.demand_mass > 0:
            raise ValueError("demand_mass is 0, must be more: no token is needed for no attention")
        if not (1 <= self.layer_most < math.inf):
            raise ValueError(f"layer_most is {self.layer_most}, must be at least 1: no layer could have the mean")
        if self.pool_tokens % 2 == 0:
            raise ValueError(f"pool_tokens is {self.pool_tokens}, must be odd: as many neighbours on either side")
        if not -1 <= self.similarity_threshold <= 1:
            raise ValueError(f"similarity_threshold is {self.similarity_threshold}, must be from -1 to 1: it is a cosine")
        for name, known in (("group_pool", GROUP_POOLS), ("cluster_group", CLUSTER_GROUPS), ("cluster_query", CLUSTER_QUERIES)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} is {getattr(self, name)!r}, must be one of {', '.join(known)}")
