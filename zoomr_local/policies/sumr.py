"""SumR: summaries and no zoom. ZoomR's own ablation (same source), and a control: if it answers as well, the task never
needed the thoughts that left."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from .base import BlockView, Selection
from .zoomr import Zoomr


class Sumr(Zoomr):
    """What ZoomR keeps where no head votes: the newest summaries in their share, the window, the newest thoughts in what is left."""

    name = "sumr"
    headline = "zoomr without zooming: summaries and the newest thoughts (ablation)"
    uses_votes = False

    def select(self, view: BlockView) -> Selection:
        n = len(view.detail_tokens)
        return super().select(replace(view, votes=np.zeros(n, np.float32), lifetime_votes=np.zeros(n), last_used=np.arange(n)))
