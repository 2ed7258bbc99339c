"""Per-head policies: every layer and KV head keeps its own tokens.

The registry drives the tests and is part of `policies.POLICIES`; one line adds one.
"""

from __future__ import annotations

from .base import HeadPolicy, KeepBest, LayerView
from .calibration import Calibration
from .clusterkv import ClusterKV, ClusterSelection
from .clusters import ClusterCache, Clusters
from .h2o import H2O, Accumulated
from .pyramid import Pyramid
from .reasonalloc import ReasonAlloc
from .rkv import Rkv
from .settings import CLUSTER_CHOICES, CLUSTER_QUERIES, HeadSettings
from .snapkv import SnapKV

HEAD_POLICIES: dict[str, type[HeadPolicy]] = {p.name: p for p in (ClusterKV, SnapKV, H2O, Rkv, Pyramid, ReasonAlloc)}

__all__ = [
    "CLUSTER_CHOICES", "CLUSTER_QUERIES", "HEAD_POLICIES", "Accumulated", "Calibration", "ClusterCache", "ClusterKV", "ClusterSelection", "Clusters",
    "HeadPolicy", "HeadSettings", "KeepBest", "LayerView",
]  # fmt: skip
