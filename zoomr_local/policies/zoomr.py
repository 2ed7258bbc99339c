"""ZoomR: summaries stay, the thoughts that the heads agree on come back.

Source: ZoomR (ACL 2026 long 76; read second-hand): every head of every layer votes for its top-k summaries by
query x mean summary key; the c blocks with most votes over all heads and layers are restored whole, for all
layers and heads alike; a window of the newest tokens stays. What the source leaves open, and what is done here:

- a head may also share its vote among all blocks by the softmax of its scores (k = 0), so that a head which looks for
  nothing votes for nothing; the bundled model's index was trained so;
- votes of the last few tokens are summed, so that a thought which names two things keeps both;
- blocks inside the window are kept anyway and do not use up one of the c places;
- summaries have their share of the budget before thoughts do, half of it for the newest; past it the least-voted live on
  as index rows. In a small budget the share shrinks, to an eighth of the room at least, until the thoughts asked for fit;
- room that is left over keeps the blocks used most recently, so a budget at least as long as the text pages nothing.
"""

from __future__ import annotations

import numpy as np

from .base import BlockView, Policy, Selection, fill


def head_votes(scores: np.ndarray, row_block: np.ndarray, n_blocks: int, k: int) -> np.ndarray:
    """Votes per block for one token: each head gives one vote to each of its top-k blocks.

    ``scores`` is float32 [n_layer, n_head, n_rows] (query x index row), ``row_block`` int [n_rows] names each
    row's block, ascending; a block with several rows scores by its best one. Returns float32 [n_blocks].
    """
    n_rows = scores.shape[-1]
    if n_rows == 0:
        return np.zeros(n_blocks, np.float32)
    best = np.array(scores, order="C").reshape(-1, n_rows)
    new_block = row_block[1:] != row_block[:-1]
    rows_differ = not new_block.all()
    if rows_differ:
        first = np.searchsorted(row_block, row_block)
        last = np.searchsorted(row_block, row_block, side="right") - 1
    heads, picks = np.arange(len(best)), []
    for _ in range(min(k, 1 + int(new_block.sum()))):
        if picks:  # a block that has a head's vote takes part no more, with none of its rows
            best[heads, picks[-1]] = -np.inf
            for j in range(int((last - first).max()) + 1 if rows_differ else 0):
                best[heads, np.minimum(first[picks[-1]] + j, last[picks[-1]])] = -np.inf
        picks.append(best.argmax(axis=1))
    return np.bincount(row_block[np.concatenate(picks)], minlength=n_blocks).astype(np.float32)


def shared_votes(scores: np.ndarray, row_block: np.ndarray, n_blocks: int) -> np.ndarray:
    """Votes per block for one token: each head shares one vote by the softmax over all rows, a block getting its rows' sum.

    ``scores`` as for ``head_votes``, times the attention's scale. Returns float32 [n_blocks].
    """
    if scores.shape[-1] == 0:
        return np.zeros(n_blocks, np.float32)
    shares = np.exp(scores - scores.max(axis=-1, keepdims=True))
    shares /= shares.sum(axis=-1, keepdims=True)
    return np.bincount(row_block, shares.sum(axis=(0, 1)), minlength=n_blocks).astype(np.float32)


class Zoomr(Policy):
    """Summaries resident, voted blocks zoomed in, everything else in a tier."""

    name = "zoomr"
    headline = "summaries stay; thoughts the attention heads vote for are paged back in"
    unit = "block"
    uses_votes = True

    def select(self, view: BlockView) -> Selection:
        s, n, free = self.settings, len(view.detail_tokens), view.free_tokens
        newest = np.arange(n)[::-1]
        room = free - min(free // 8, s.summary_tokens, int(view.summary_tokens.sum()))
        window, candidates = self._window_and_candidates(view, newest, room)

        # summaries first, and of those the newest for half of the share, then the most voted: a young one has few votes
        # yet, and the text goes on from it
        asked = fill(np.concatenate([window, candidates[: s.zoomed_blocks]]), view.detail_tokens, room)
        share = min(s.summary_tokens, free - int(view.detail_tokens[asked].sum()))
        back = n - int(window[-1]) if len(window) else 0  # to the oldest of the window, past blocks that are lost
        young = max(back, len(fill(newest, view.summary_tokens, share // 2)))
        others = newest[young:]
        by_votes = others[np.argsort(-view.lifetime_votes[others], kind="stable")]
        kept = fill(np.concatenate([newest[:young], by_votes]), view.summary_tokens, share)
        free -= int(view.summary_tokens[kept].sum())

        zoomed: list[int] = []
        free -= int(view.detail_tokens[window].sum())
        for block in candidates:
            if len(zoomed) == s.zoomed_blocks:
                break
            if view.detail_tokens[block] <= free:
                zoomed.append(int(block))
                free -= int(view.detail_tokens[block])

        details = np.zeros(n, bool)
        details[zoomed] = details[window] = True
        rest = np.argsort(-view.last_used, kind="stable")
        details[fill(rest[view.available[rest] & ~details[rest]], view.detail_tokens, free)] = True

        summaries = np.zeros(n, bool)
        summaries[kept] = True
        given = float(np.delete(view.votes, window).sum())
        agreement = float(view.votes[zoomed].sum()) / given if given else None
        return Selection(details, summaries, tuple(sorted(zoomed)), agreement)

    def _window_and_candidates(self, view: BlockView, newest: np.ndarray, room: int) -> tuple[np.ndarray, np.ndarray]:
        """The newest blocks that stay whole, and all others with votes, most first.

        The window gives way, its oldest block first, where it and the blocks asked for do not fit ``room`` tokens: what
        the heads point at now matters more than what was written last.
        """
        s = self.settings
        widest = fill(newest[view.available[newest]], view.detail_tokens, min(s.window_tokens, room))
        for blocks in range(len(widest), -1, -1):
            window, votes = widest[:blocks], np.where(view.available, view.votes, 0)
            votes[window] = 0
            candidates = np.argsort(-votes, kind="stable")
            candidates = candidates[votes[candidates] > 0]
            asked = fill(candidates[: s.zoomed_blocks], view.detail_tokens, room)
            if view.detail_tokens[asked].sum() + view.detail_tokens[window].sum() <= room:
                break
        return window, candidates
