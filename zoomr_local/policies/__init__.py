"""The registry of policies: it drives the command line's choices, the tests and the docs. One line adds one."""

from __future__ import annotations

from .base import MAX_ROWS, BlockView, Policy, Selection, Settings, TokenView
from .breadcrumbs import Breadcrumbs
from .full import Full
from .heads import HEAD_POLICIES, HeadPolicy
from .sumr import Sumr
from .tokens import Random, Recency, Streaming
from .zoomr import Zoomr

POLICIES: dict[str, type[Policy] | type[HeadPolicy]] = {
    **{p.name: p for p in (Zoomr, Full, Sumr, Recency, Streaming, Random, Breadcrumbs)},
    **HEAD_POLICIES,
}

__all__ = ["POLICIES", "BlockView", "Policy", "Selection", "Settings", "TokenView"]
