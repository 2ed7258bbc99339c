"""Full: stock llama.cpp. Hooks off, every token resident; the reference for exactness, accuracy and speed."""

from __future__ import annotations

from .base import Policy


class Full(Policy):
    """Keeps everything; never asked for a selection."""

    name = "full"
    headline = "everything resident: stock llama.cpp, bit for bit"
    unit = "all"
