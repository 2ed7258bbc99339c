"""The cells of a per-head store whose tokens come back, and the tier in which they wait.

Only `cluster_generation.py` makes these. A token's rows never change once it was decoded, so each head's are written to
the tier once, when it leaves that head's cells for the first time. The tier is RAM alone: no disk, no checksums, no other page types. A
row is a few hundred bytes and any set of them may be wanted for the next token, so that pages of `tiers` would be read whole for
a part of them.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from .errors import EngineError, StorageError
from .heads_cache import HeadCache
from .libllama.heads import HeadStore
from .sizes import format_bytes


class HeadTier:
    """Rows of single heads' tokens, each at the place that its layer, head and position name.

    ``layers`` are those that can lose tokens. stored_bytes: written so far; nothing is forgotten before `close`.
    """

    def __init__(self, store: HeadStore, layers: list[int], length_tokens: int, limit_bytes: int) -> None:
        """Room for every head's ``length_tokens`` in ``layers``. The system gives memory as rows are written.

        Raises StorageError, before anything is allocated, if that may become more than ``limit_bytes``.
        """
        self.need_bytes = len(layers) * store.n_head_kv * length_tokens * store.cell_bytes
        if self.need_bytes > limit_bytes:
            raise StorageError(
                f"--kv-ram {format_bytes(limit_bytes)}: a text of {length_tokens} tokens may need {format_bytes(self.need_bytes)} of RAM for"
                " what leaves the cells, and policy clusterkv has no disk tier; give --kv-ram that much, or a smaller -n"
            )
        self._key_bytes = store.cell_bytes * store.head_dim // (store.head_dim + store.value_dim)
        self._place = {layer: i for i, layer in enumerate(layers)}
        shape = (len(layers), store.n_head_kv, length_tokens)
        try:
            self._rows = np.empty((*shape, store.cell_bytes), np.uint8)
        except MemoryError:
            raise StorageError(f"no memory for --kv-ram: {format_bytes(self.need_bytes)} are needed; lower -n") from None
        self._stored = np.zeros(shape, bool)
        self.stored_bytes = 0

    def missing(self, layer: int, head: int, positions: np.ndarray) -> np.ndarray:
        """bool [n]: which of ``positions`` were not written yet."""
        return ~self._stored[self._place[layer], head, positions]

    def write(self, layer: int, head: int, positions: np.ndarray, page: np.ndarray) -> None:
        """Take over a page as `HeadStore.page_out` makes it: all K rows, then all V rows."""
        n, at = len(positions), self._place[layer]
        split = n * self._key_bytes
        self._rows[at, head, positions, : self._key_bytes] = page[:split].reshape(n, -1)
        self._rows[at, head, positions, self._key_bytes :] = page[split:].reshape(n, -1)
        self._stored[at, head, positions] = True
        self.stored_bytes += page.nbytes

    def read(self, layer: int, head: int, positions: np.ndarray) -> np.ndarray:
        """uint8: the page of ``positions``, byte for byte as it was written."""
        rows = self._rows[self._place[layer], head, positions]
        return np.concatenate([rows[:, : self._key_bytes].ravel(), rows[:, self._key_bytes :].ravel()])

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
        """Raises StorageError if a text of ``length_tokens`` may need more than the store's limit."""
        self.tier = HeadTier(self.heads, layers, length_tokens, self.store.limits.ram_bytes)

    def close_tier(self) -> None:
        """Free the tier's memory; its counters stay. Safe to call twice."""
        if self.tier is not None:
            self.tier.close()

    def exchange(self, layer: int, wanted: np.ndarray) -> tuple[int, int]:
        """Let each head of a layer hold ``wanted``, bool [n_head_kv, n] by position, of the n tokens there are.

        First everything that goes leaves, then what comes is put back. Returns (cells that were freed, cells that were
        filled). Raises EngineError if that does not fit, or for a token that is neither in cells nor in the tier.
        """
        row = self.heads.positions(layer)
        held = row >= 0
        goes = held & ~np.take_along_axis(wanted, np.where(held, row, 0), axis=1)
        here = np.zeros_like(wanted)
        head_of, cell_of = np.nonzero(held)
        here[head_of, row[head_of, cell_of]] = True
        comes = wanted & ~here
        freed = filled = 0
        for head in range(len(row)):
            freed += self._leave(layer, head, np.flatnonzero(goes[head]))
            filled += self._return(layer, head, np.flatnonzero(comes[head]))
        self.held[layer] = wanted.sum(axis=1)
        self.recalled_cells += filled
        self._recount()
        return freed, filled

    def _leave(self, layer: int, head: int, cells: np.ndarray) -> int:
        if not len(cells):
            return 0
        positions = self.heads.positions(layer)[head][cells]
        new = self.tier.missing(layer, head, positions)
        if new.any():
            self.tier.write(layer, head, positions[new], self.heads.page_out(layer, head, cells[new]))
        return self.heads.evict(layer, head, cells)

    def _return(self, layer: int, head: int, positions: np.ndarray) -> int:
        if not len(positions):
            return 0
        lost = self.tier.missing(layer, head, positions)
        if lost.any():
            raise EngineError(f"layer {layer}, KV head {head}: position {positions[lost][0]} is neither in cells nor in the tier")
        self.heads.page_in(layer, head, positions, self.tier.read(layer, head, positions))
        return len(positions)
