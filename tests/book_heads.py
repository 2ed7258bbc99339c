"""A per-head store that only keeps books, under the real engine's per-head policies on scripted text. Tests only."""

from __future__ import annotations

from contextlib import contextmanager

import numpy as np
from scripted import BookContext, ScriptedSampler
from talk import BookEngine, TalkModel

from zoomr_local import calibrations, generation, heads_setup
from zoomr_local.engine import EngineConfig
from zoomr_local.policies.heads import Calibration

LAYERS, KV_HEADS, HEAD_DIM = 3, 2, 8
UNEVEN = Calibration((1.0, 2.0, 6.0), 0.93, 8, 800)


class HeadModel(TalkModel):
    n_layer = LAYERS


class HeadContext(BookContext):
    """Puts every token into the first free cell of each head of its store, which counts the cells."""

    heads = None

    def clear(self) -> None:
        super().clear()
        if self.heads is not None:
            self.heads.clear()

    def decode(self, tokens, positions, *, seq=0, logits="last") -> None:
        for position in positions:
            self.heads.add(position)
        self.next_position = positions[-1] + 1

    def seq_rm(self, seq, p0, p1) -> bool:
        self.heads.remove(p0)
        return super().seq_rm(seq, p0, p1)


class BookHeads:
    """`HeadStore` with made-up queries, keys and weights: seeded noise, and every key the same for ever."""

    n_layers, n_head_kv, n_head, head_dim, value_dim, cell_bytes = LAYERS, KV_HEADS, 2 * KV_HEADS, HEAD_DIM, HEAD_DIM, 32

    def __init__(self, context, n_cells, *, share=False, observe=0, weights=True, queries=True) -> None:
        context.heads, self.share, self.n_observe = self, share, observe
        self.layer_cells = list(n_cells)
        self._positions = [np.full((KV_HEADS, n * (KV_HEADS if share else 1)), -1, np.int32) for n in n_cells]
        self._random = np.random.default_rng(0)
        self._wants = self._random.standard_normal((LAYERS, KV_HEADS, HEAD_DIM)).astype(np.float32) * 3

    def add(self, position) -> None:
        for layer, row in enumerate(self._positions):
            for head in row:
                head[np.flatnonzero(head < 0)[0]] = position
            assert (row >= 0).sum() <= KV_HEADS * self.layer_cells[layer]

    def remove(self, first) -> None:
        for row in self._positions:
            row[row >= first] = -1

    def clear(self) -> None:
        for row in self._positions:
            row[:] = -1

    def positions(self, layer):
        return self._positions[layer]

    def require_room(self, n_tokens) -> None:
        pass  # `add` finds no cell otherwise

    def keep(self, layer, kept) -> int:
        row = self._positions[layer]
        gone = (row >= 0) & ~kept
        row[gone] = -1
        return int(gone.sum())

    def resident(self, layer, head):
        row = self._positions[layer][head]
        cells = np.flatnonzero(row >= 0)
        cells = cells[np.argsort(row[cells])]
        return cells, row[cells]

    def exchange(self, layer, wanted, stored, rows):
        """Rows hold their own position, so that what comes back can be told from what was never written."""
        freed = filled = written = 0
        for head, row in enumerate(self._positions[layer]):
            for cell in np.flatnonzero(row >= 0):
                position = row[cell]
                if not wanted[head, position]:
                    written += not stored[head, position]
                    stored[head, position], row[cell] = True, -1
                    rows[head, position].view(np.int32)[:] = position
                    freed += 1
            for position in np.setdiff1d(np.flatnonzero(wanted[head]), row):
                assert stored[head, position] and (rows[head, position].view(np.int32) == position).all()
                row[np.flatnonzero(row < 0)[0]] = position
                filled += 1
        return freed, filled, written

    def queries(self):
        noise = self._random.standard_normal((LAYERS, 1, self.n_head, HEAD_DIM)).astype(np.float32)
        return noise + np.repeat(self._wants, 2, axis=1)[:, None]

    def weights(self, layer):
        return self._random.dirichlet(np.ones(self._positions[layer].shape[1]), (1, self.n_head)).astype(np.float32)

    def layer_keys(self, layer):
        phase = self._positions[layer][..., None] * np.arange(1, HEAD_DIM + 1) * 0.1
        return np.sin(phase + layer).astype(np.float32)

    def keys(self, layer, head, cells):
        return self.layer_keys(layer)[head, cells]

    def kq_scale(self, layer) -> float:
        return 1.0


class HeadEngine(BookEngine):
    def _new_context(self, n_tokens):
        context = HeadContext(n_tokens)
        context.geometry = 0
        return context


@contextmanager
def engine_of(policy, budget=128, **more):
    """An engine on books whose sampler plays ``ScriptedSampler.script``."""
    patched = [(generation, "LlamaSampler", ScriptedSampler), (heads_setup, "HeadStore", BookHeads), (calibrations, "find", lambda path: UNEVEN)]
    before = [(module, name, getattr(module, name)) for module, name, _ in patched]
    for module, name, value in patched:
        setattr(module, name, value)
    try:
        made = HeadEngine(HeadModel(), EngineConfig(**{"policy": policy, "kv_budget": budget, **more}))
        try:
            yield made
        finally:
            made.close()
    finally:
        for module, name, value in before:
            setattr(module, name, value)
