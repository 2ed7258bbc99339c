"""How a model marks thoughts and summaries: tokens in, segment boundaries out.

The engine feeds every token of a reply to a dialect and acts on what it answers. Four modes, one of them chosen for a model
(`modes.py`): *learned*, the model writes special tokens itself; *prompted*, the runtime opens a summary and the model
writes it; *extractive*, the text is cut and indexed by its own keys; *off*. docs/summaries.md says what each costs.
"""

from __future__ import annotations

from .base import Dialect, Fed, ends_sentence
from .channels import ChannelReader, Channels
from .extractive import ExtractiveDialect
from .learned import LearnedDialect
from .markers import SUMMARY_CLOSE, SUMMARY_OPEN, TABLE, THINK_CLOSE, THINK_OPEN, Markers, MarkerSet, marker_sets
from .modes import LEAST_SUMMARY_MAX, LEAST_THOUGHT_TOKENS, MODES, Summaries, choose, resolve
from .prompted import Phrases, PromptedDialect

__all__ = [
    "LEAST_SUMMARY_MAX", "LEAST_THOUGHT_TOKENS", "MODES", "SUMMARY_CLOSE", "SUMMARY_OPEN", "TABLE", "THINK_CLOSE", "THINK_OPEN",
    "ChannelReader", "Channels", "Dialect", "ExtractiveDialect", "Fed", "LearnedDialect", "MarkerSet", "Markers", "Phrases", "PromptedDialect", "Summaries",
    "choose", "ends_sentence", "marker_sets", "resolve",
]  # fmt: skip
