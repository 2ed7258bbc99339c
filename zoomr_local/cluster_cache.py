"""The cells of a per-head store whose tokens come back, and the tier in which they wait.

Only `cluster_generation.py` makes these. A token's rows never change once it was decoded, so each head's are written to
the tier once, when it leaves that head's cells for the first time. The tier is RAM alone: no disk, no checksums, no other page types. A
row is a few hundred bytes and any set of them may be wanted for the next token, so that pages of `tiers` would be read whole for
a part of them.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from .errors import TierSizeError
from .heads_cache import HeadCache
from .libllama.heads import HeadStore
from .sizes import format_bytes


class HeadTier:
    """Rows of single heads' tokens, each at the place that its layer, head and position name.

    ``layers`` are those that can lose tokens. stored_bytes: written so far; nothing is forgotten before `close`.
    """

    def __init__(self, store: HeadStore, layers: list[int], length_tokens: int, limit_bytes: int) -> None:
        """Room for every head's ``length_tokens`` in ``layers``. The system gives memory as rows are written.

        Raises TierSizeError, before anything is allocated, if that may become more than ``limit_bytes``.
        """
        self.need_bytes = len(layers) * store.n_head_kv * length_tokens * store.cell_bytes
        if self.need_bytes > limit_bytes:
            raise TierSizeError(
                f"--kv-ram {format_bytes(limit_bytes)}: a text of {length_tokens} tokens may need {format_bytes(self.need_bytes)} of RAM for"
                " what leaves the cells, and policy clusterkv has no disk tier; give --kv-ram that much, or a smaller -n"
            )
        self._place = {layer: i for i, layer in enumerate(layers)}
        shape = (len(layers), store.n_head_kv, length_tokens)
        try:
            self._rows = np.empty((*shape, store.cell_bytes), np.uint8)
            self._stored = np.zeros(shape, bool)
        except MemoryError:
            raise TierSizeError(f"no memory for --kv-ram: {format_bytes(self.need_bytes)} are needed; lower -n") from None
        self.stored_bytes = 0

    def of(self, layer: int) -> tuple[np.ndarray, np.ndarray]:
        """(bool [n_head_kv, length_tokens]: which rows of a layer are written, uint8 [n_head_kv, length_tokens, cell_bytes]: the rows)."""
        return self._stored[self._place[layer]], self._rows[self._place[layer]]

    def close(self) -> None:
        """Free the memory. Safe to call twice."""
        self._rows = self._stored = np.empty(0, np.uint8)


class RecallCache(HeadCache):
    """Cells of one sequence in a per-head store, and a tier (`open_tier`, before anything leaves).

    recalled_cells: how many cells of single heads were filled from the tier so far
    """

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.tier: HeadTier | None = None
        self.recalled_cells = 0

    def open_tier(self, layers: list[int], length_tokens: int) -> None:
        """Raises TierSizeError if a text of ``length_tokens`` may need more than the store's limit."""
        self.tier = HeadTier(self.heads, layers, length_tokens, self.store.limits.ram_bytes)

    def close_tier(self) -> None:
        """Free the tier's memory; its counters stay. Safe to call twice."""
        if self.tier is not None:
            self.tier.close()

    def try_token(self, token: int, position: int) -> None:
        """Decode a token for its queries alone: the store has them then, and no cell has it. ``position`` is the next one."""
        self.decode([token], position, "none")
        self.context.seq_rm(self.sequence, position, -1)
        self.held -= 1
        self._recount()

    def exchange(self, layer: int, wanted: np.ndarray) -> tuple[int, int]:
        """Let each head of a layer hold ``wanted``, bool [n_head_kv, n] by position, of the n tokens there are.

        First everything that goes leaves, then what comes is put back. Returns (cells that were freed, cells that were
        filled). Raises EngineError if that does not fit, or for a token that is neither in cells nor in the tier.
        """
        stored, rows = self.tier.of(layer)
        freed, filled, written = self.heads.exchange(layer, wanted, stored, rows)
        self.tier.stored_bytes += written * self.heads.cell_bytes
        self.recalled_cells += filled
        self.held[layer] = wanted.sum(axis=1)
        self._recount()
        return freed, filled
