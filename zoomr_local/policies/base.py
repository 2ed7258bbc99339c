"""What a policy sees and what it answers: arrays and sizes in, a selection out.

A policy never touches a cell, a page or a model, so it is tested with literal arrays. `engine.py` builds the
views and `kv_cache.py` carries the selection out; policies import only this file and numpy.

Every size is a count of tokens. n = number of closed blocks, in order of closing (index 0 is the oldest).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np


LEAST = {"votes_per_head": 0, "zoomed_blocks": 0, "refresh_tokens": 1, "window_tokens": 0, "vote_window_tokens": 1,
         "summary_rows": 1, "summary_tokens": 0, "sink_tokens": 0, "beacon_every": 0}

MAX_ROWS = 8
"""No block takes more index rows than this, so that a long piece does not crowd the index."""


@dataclass(frozen=True)
class Settings:
    """The numbers a policy may use; sizes in tokens.

    ``votes_per_head`` (k) and ``zoomed_blocks`` (c) default to 2, the knee of both ablations in ZoomR
    (section 1 of the project's reading notes; second-hand); k = 0: every head shares one vote by its softmax. ``refresh_tokens`` is R, the longest time between
    two selections. ``window_tokens`` keeps the newest closed blocks whole. ``vote_window_tokens`` is how many
    of the last tokens' votes are summed. ``vote_layers`` empty means every paged layer.
    ``summary_rows`` is how many index rows a summary gets, each the mean key of a part of it; its best row counts.
    ``summary_tokens`` bounds the resident summaries; the least-voted ones beyond it live on as index rows.
    ``wait_for_disk``: a chosen block that is on disk comes in at once instead of with the next selection.
    ``beacon_every`` is after how many tokens (c) a beacon comes, 0 where none do.
    """

    votes_per_head: int = 2
    zoomed_blocks: int = 2
    refresh_tokens: int = 8
    window_tokens: int = 128
    vote_window_tokens: int = 8
    vote_layers: tuple[int, ...] = ()
    summary_rows: int = 1
    summary_tokens: int = 128
    sink_tokens: int = 4
    seed: int = 0
    wait_for_disk: bool = False
    beacon_every: int = 0

    def __post_init__(self) -> None:
        """Raises ValueError for a number below its least value, and for too many rows."""
        for name, least in LEAST.items():
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}, must be at least {least}")
        if self.summary_rows > MAX_ROWS:
            raise ValueError(f"summary_rows is {self.summary_rows}, must be at most {MAX_ROWS}")


@dataclass(frozen=True)
class BlockView:
    """Closed blocks as a block policy sees them; pinned tokens and the open segment are already set aside."""

    free_tokens: int
    """Tokens that details and summaries of closed blocks may occupy together."""
    detail_tokens: np.ndarray
    """int32 [n]: length of each block's detail (its thought)."""
    summary_tokens: np.ndarray
    """int32 [n]: length of each block's summary, 0 if it has none or it was lost."""
    votes: np.ndarray
    """float32 [n]: votes of the last ``vote_window_tokens`` tokens."""
    lifetime_votes: np.ndarray
    """float64 [n]: all votes so far; orders summaries when they no longer all fit."""
    last_used: np.ndarray
    """int64 [n]: position at which the block was closed or last zoomed."""
    available: np.ndarray | None = None
    """bool [n]: the detail is in cells or a tier has it; the others must not be chosen. None becomes all true."""

    def __post_init__(self) -> None:
        if self.available is None:
            object.__setattr__(self, "available", np.ones(len(self.detail_tokens), bool))


@dataclass(frozen=True)
class Selection:
    """What should be resident: bool [n] for details and for summaries, the zoomed blocks, and the agreement."""

    details: np.ndarray
    summaries: np.ndarray
    zoomed: tuple[int, ...] = ()
    agreement: float | None = None


@dataclass(frozen=True)
class TokenView:
    """Resident tokens that are not pinned, oldest first, as a token policy sees them."""

    positions: np.ndarray
    """int32 [m]: their logical positions, ascending."""
    keep_tokens: int
    """How many of them may stay; less than m whenever a token policy is asked."""
    text: int = 0
    """A number below 2^32 of what the text begins with: a policy that draws does not draw the same positions of every text."""


@dataclass
class Policy:
    """Base of all policies. ``unit`` says which view ``select`` takes: "block", "token" (also for "beacon") or "all"."""

    settings: Settings = field(default_factory=Settings)

    name = ""
    headline = ""
    unit = "all"
    uses_votes = False
    pins_prompt = True
    drops = False

    def select(self, view):
        """The selection for a ``BlockView``, or a keep mask (bool [m]) for a ``TokenView``."""
        raise TypeError(f"policy {self.name} keeps everything and is never asked")


def fill(order: np.ndarray, tokens: np.ndarray, free_tokens: int) -> np.ndarray:
    """The prefix of ``order`` (block indices) whose summed ``tokens`` fit ``free_tokens``."""
    return order[np.cumsum(tokens[order]) <= free_tokens]
