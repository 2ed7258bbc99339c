"""The coarse index: which index rows stand for which block, and the votes the heads gave them.

`engine.py` adds a block when it closes and asks for a vote after each decoded token. Rows live in native memory
in the cache's own rotation, so a block can be scored when neither its thought nor its summary is in cells.
"""

from __future__ import annotations

from typing import Any, Sequence

import numpy as np

from .libllama import LlamaContext
from .policies import MAX_ROWS, Settings
from .policies.zoomr import head_votes, shared_votes
from .timeline import Block

ROW_TOKENS = 32
"""A block without a summary gets one row per this many tokens of its own keys: one mean over more loses too much."""

LEAST_ROW_TOKENS = 16
"""A sentence shorter than this shares a row with its neighbour."""


def sentence_edges(ends: Sequence[int], start: int, stop: int) -> list[int]:
    """Between which positions a block of [start, stop) is averaged so that a row is a sentence or a few: ascending, both ends
    included, ``MAX_ROWS`` rows at most.

    ``ends`` are the positions after its sentences, ascending. Rows have ``LEAST_ROW_TOKENS`` at least, if the block has; a row
    of more than two ``ROW_TOKENS`` is halved while there are rows left, as one mean over many tokens finds little.
    """
    edges = [start]
    for end in ends:
        if end - edges[-1] >= LEAST_ROW_TOKENS and stop - end >= LEAST_ROW_TOKENS:
            edges.append(end)
    edges.append(stop)
    while len(edges) - 1 > MAX_ROWS:  # the shortest pair of neighbours is made one
        lengths = [edges[i + 2] - edges[i] for i in range(len(edges) - 2)]
        del edges[lengths.index(min(lengths)) + 1]
    while len(edges) - 1 < MAX_ROWS:
        lengths = [after - before for before, after in zip(edges, edges[1:])]
        longest = lengths.index(max(lengths))
        if lengths[longest] <= 2 * ROW_TOKENS:
            break
        edges.insert(longest + 1, (edges[longest] + edges[longest + 1]) // 2)
    return edges


class BlockIndex:
    """Index rows and votes of one generation."""

    def __init__(self, context: LlamaContext, settings: Settings, sequence: int = 0) -> None:
        self.context, self.settings, self.sequence = context, settings, sequence
        self.capacity_rows = context.n_rows_max
        self.unindexed_blocks = 0
        context.index_clear()
        context.n_rows = 0
        voting = settings.vote_layers or context.layer_ids
        self._layers = [i for i, layer in enumerate(context.layer_ids) if layer in voting]
        self._scales = np.array([context.kq_scale(i) for i in self._layers], np.float32)[:, None, None]
        self._row_block = np.zeros(context.n_rows_max, np.int32)
        self._ring = np.zeros((max(1, settings.vote_window_tokens), 64), np.float32)
        self._lifetime = np.zeros(64)
        self._turn = 0

    @property
    def n_rows(self) -> int:
        """Rows in use."""
        return self.context.n_rows

    def add(self, block: Block, text: tuple[int, int] | None = None, edges: Sequence[int] | None = None) -> None:
        """Write the rows of a block whose positions are all in cells.

        ``summary_rows`` rows, each the mean key of a part of ``text`` (the summary without its markers), or several
        over the detail if the block has no summary: between ``edges``, or one for each ``ROW_TOKENS``. A block that finds the
        index full cannot be recalled; it is counted.
        """
        self._grow(block.number + 1)
        if edges is None:
            edges = self._even_edges(block, text)
        if self.n_rows + len(edges) - 1 > self.capacity_rows:
            self.unindexed_blocks += 1
            return
        for p0, p1 in zip(edges, edges[1:]):
            row = self.context.n_rows
            self.context.index_mean(row, self.sequence, p0, p1)
            self._row_block[row] = block.number
            self.context.n_rows = row + 1

    def _even_edges(self, block: Block, text: tuple[int, int] | None) -> list[int]:
        start, stop = text if text and text[0] < text[1] else block.summary or block.detail
        wanted = self.settings.summary_rows if block.summary else -(-(stop - start) // ROW_TOKENS)
        pieces = min(MAX_ROWS, wanted, stop - start)
        return np.linspace(start, stop, pieces + 1).astype(int).tolist()

    def forget(self, blocks: list[int]) -> None:
        """Remove the rows of ``blocks``: no head votes for them any more, and the index has room for others."""
        kept = np.flatnonzero(~np.isin(self._row_block[: self.n_rows], blocks)).tolist()
        for row, old in enumerate(kept):
            if row != old:
                self.context.index_set(row, self.context.index_get(old))
        self._row_block[: len(kept)] = self._row_block[kept]
        self.context.n_rows = len(kept)

    def vote(self, n_rows: int, n_blocks: int) -> None:
        """Count the votes of the token that was just decoded, for which ``n_rows`` rows were scored."""
        scores = self.context.scores()[:, self.sequence, :, :n_rows]
        if len(self._layers) < len(scores):
            scores = scores[self._layers]
        if self.settings.votes_per_head:
            votes = head_votes(scores, self._row_block[:n_rows], n_blocks, self.settings.votes_per_head)
        else:
            votes = shared_votes(scores * self._scales, self._row_block[:n_rows], n_blocks)
        turn = self._ring[self._turn]
        turn[:n_blocks] = votes
        turn[n_blocks:] = 0
        self._lifetime[:n_blocks] += votes
        self._turn = (self._turn + 1) % len(self._ring)

    def recent_votes(self, n_blocks: int) -> np.ndarray:
        """float32 [n_blocks]: votes of the last ``vote_window_tokens`` tokens."""
        return self._ring[:, :n_blocks].sum(axis=0)

    def lifetime_votes(self, n_blocks: int) -> np.ndarray:
        """float64 [n_blocks]: all votes so far."""
        return self._lifetime[:n_blocks]

    def state(self) -> dict[str, Any]:
        """Rows and votes as arrays, counters as they are."""
        rows = [self.context.index_get(row) for row in range(self.n_rows)]
        return {
            "rows": np.stack(rows) if rows else np.zeros(0, np.float32), "row_block": self._row_block[: self.n_rows],
            "ring": self._ring, "lifetime": self._lifetime, "turn": self._turn, "unindexed": self.unindexed_blocks,
        }  # fmt: skip

    def restore(self, state: dict[str, Any]) -> None:
        """Become what ``state`` was taken from. Raises ValueError if its votes are of another window."""
        ring, lifetime, rows = state["ring"], state["lifetime"], state["rows"]
        if ring.shape != (len(self._ring), len(lifetime)) or len(rows) != len(state["row_block"]):
            raise ValueError(f"votes {ring.shape} and {lifetime.shape}, {len(rows)} rows of {len(state['row_block'])} blocks")
        for row, values in enumerate(rows):
            self.context.index_set(row, values)
        self.context.n_rows = len(rows)
        self._row_block[: len(rows)] = state["row_block"]
        self._ring, self._lifetime = ring.astype(np.float32), lifetime.astype(np.float64)
        self._turn, self.unindexed_blocks = state["turn"] % len(ring), state["unindexed"]

    def _grow(self, n_blocks: int) -> None:
        if n_blocks > self._ring.shape[1]:
            self._ring = np.concatenate([self._ring, np.zeros_like(self._ring)], axis=1)
            self._lifetime = np.concatenate([self._lifetime, np.zeros_like(self._lifetime)])
