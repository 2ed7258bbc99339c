"""A stand-in for the native library: a context that only keeps books, and a sampler that plays a script.

It checks what the real one would refuse (a position twice, a gap at the end, more than its cells), so that the
engine's rules can be tested over long random texts in milliseconds. Tests only.
"""

from __future__ import annotations

import pickle

import numpy as np

SPECIAL = {"<think>": 1, "</think>": 2, "<|begin_of_summary|>": 3, "<|end_of_summary|>": 4}
EOS, BEACON = 0, 5
WORD, STOP = 10, 11
"""An ordinary word, and one that ends a sentence."""

TOKEN_BYTES = 16


class ScriptedModel:
    """Vocabulary of the scripts: ids below 10 are special, STOP ends a sentence, the rest are words."""

    n_vocab = 100
    n_ctx_train = 1000
    marker_text = False
    marker_sets = ()
    name = "scripted"

    def __init__(self) -> None:
        self.llama = self
        from zoomr_local.dialects import Markers

        self.markers = Markers.find(SPECIAL.get)
        self.settings: dict = {}

    def piece(self, token: int, special: bool = False) -> bytes:
        if token < 10:
            return b"<marker>" if self.marker_text else b""
        return b" end." if token == STOP else b" w%d" % token

    def is_eog(self, token: int) -> bool:
        return token == EOS


class BeaconModel(ScriptedModel):
    """A scripted model that claims to be trained with beacons: token BEACON after every ``every`` tokens (or "8,4")."""

    n_swa = 0
    path = "scripted.gguf"

    def __init__(self, every: int | str) -> None:
        super().__init__()
        self.every = every

    def token_of(self, text: str) -> int | None:
        return {**SPECIAL, "<|beacon|>": BEACON}.get(text)

    def meta(self, key: str) -> str | None:
        return {"zoomr.beacon_every": str(self.every)}.get(key)


class ScriptedSampler:
    """Plays ``script`` (set on the class), then EOS."""

    script: list[int] = []

    def __init__(self, model, **_) -> None:
        self._left = iter(self.script)
        self.draws = 0

    def sample(self, context) -> int:
        self.draws += 1
        return next(self._left, EOS)

    def skip(self, draws: int) -> None:
        for _ in range(draws):
            self.sample(None)

    def accept(self, token: int) -> None:
        pass

    def close(self) -> None:
        pass


class BookContext:
    """Cells as a set of positions; pages hold their own positions as bytes.

    Scores are seeded noise, and on top of it ``wanted``: every head scores the rows that average that position highest.
    """

    token_bytes = TOKEN_BYTES
    layer_ids = [0, 1]
    n_heads = 3

    def __init__(self, n_cells: int, index_rows: int = 64) -> None:
        self.n_cells, self.n_rows_max, self.n_batch = n_cells, index_rows, 64
        self.rows: dict[int, tuple[int, int]] = {}
        self.wanted: int | None = None
        self.wanted_layers = [0, 1]
        self.cells: set[int] = set()
        self.n_rows = 0
        self.next_position = 0
        self.peak = 0
        self.decoded: list[int] = []
        self._random = np.random.default_rng(0)

    def clear(self) -> None:
        self.cells.clear()
        self.next_position = 0

    def decode(self, tokens, positions, *, seq=0, logits="last") -> None:
        positions = list(positions)
        assert positions == list(range(self.next_position, self.next_position + len(positions)))
        assert not self.cells or max(self.cells) == positions[0] - 1, "the newest token must be resident"
        self.cells.update(positions)
        self.next_position += len(positions)
        self.peak = max(self.peak, len(self.cells))
        assert self.peak <= self.n_cells
        self.decoded.extend(tokens)

    def resident(self, seq=0) -> np.ndarray:
        return np.array(sorted(self.cells), np.int32)

    def seq_rm(self, seq, p0, p1) -> bool:
        assert p1 == -1
        self.cells, self.next_position = {p for p in self.cells if p < p0}, p0
        return True

    def page_size(self, n_tokens) -> int:
        return TOKEN_BYTES * n_tokens

    def page_bytes(self, seq, p0, p1) -> int:
        return TOKEN_BYTES * sum(p0 <= p < p1 for p in self.cells)

    def page_write(self, seq, p0, p1, out) -> int:
        inside = np.array(sorted(p for p in self.cells if p0 <= p < p1), np.int64)
        assert out.nbytes == TOKEN_BYTES * len(inside)
        out.view(np.int64)[:] = np.repeat(inside, TOKEN_BYTES // 8)
        return out.nbytes

    def page_free(self, seq, p0, p1) -> int:
        gone = {p for p in self.cells if p0 <= p < p1}
        self.cells -= gone
        return len(gone)

    def page_in(self, seq, page) -> int:
        positions = page.view(np.int64)[:: TOKEN_BYTES // 8].tolist()
        assert not self.cells & set(positions), "a position may not be resident twice"
        self.cells.update(positions)
        self.peak = max(self.peak, len(self.cells))
        assert self.peak <= self.n_cells
        return len(positions)

    def index_clear(self) -> None:
        self.n_rows = 0

    def index_mean(self, row, seq, p0, p1) -> None:
        assert p0 < p1 and all(p in self.cells for p in range(p0, p1)), "index rows need resident keys"
        self.rows[row] = (p0, p1)

    def index_get(self, row) -> np.ndarray:
        return np.array(self.rows[row], np.float32)

    def index_set(self, row, array) -> None:
        self.rows[row] = tuple(int(p) for p in array)

    def snapshot(self) -> np.ndarray:
        books = (self.cells, self.next_position, self._random.bit_generator.state)
        return np.frombuffer(pickle.dumps(books), np.uint8)

    def restore_snapshot(self, snapshot) -> None:
        self.cells, self.next_position, self._random.bit_generator.state = pickle.loads(snapshot.tobytes())

    def kq_scale(self, layer: int) -> float:
        return 0.125

    def scores(self) -> np.ndarray:
        scores = self._random.standard_normal((2, 1, self.n_heads, self.n_rows), np.float32)
        for row in range(self.n_rows):
            if self.wanted is not None and self.rows[row][0] <= self.wanted < self.rows[row][1]:
                scores[self.wanted_layers, ..., row] += 99
        return scores

    def close(self) -> None:
        pass
