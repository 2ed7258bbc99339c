"""A KV cache of fixed size with its graph: decode, page, index, score. Imported by this package only."""

from __future__ import annotations

import ctypes

import numpy as np

from zoomr_local.errors import EngineError, UnsupportedModel

from .batch import Batch
from .devices import BufferUse, usable_cores
from .library import GGML_TYPES, Info, MemoryEntry, Params, checked, last_log_line, llama, zoomr
from .pages import PageCalls

_TOO_MANY = 2**31  # a greater number would be cut to its last 32 bits on the way to C

DECODE_CODES = {
    1: "no free cells for the batch",
    2: "aborted",
    -1: "invalid batch",
    -2: "no memory for the computation",
    -3: "the computation failed",
}


def _bytes_of(array: np.ndarray):
    return array.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))


class LlamaContext(PageCalls):
    """``n_cells`` cells a stream: all sequences share one stream if ``kv_unified``, else each has its own.

    With ``paging`` the hooks are attached and an UnsupportedModel is raised where they cannot be; without it
    the context is stock llama.cpp and every page_*, index_* and score call raises EngineError.
    ``n_outputs``: for how many tokens of a batch logits can be asked. Buffers are made for as many, which is
    hundreds of MB for a large vocabulary. None: for all.

    n_cells, n_batch, n_seq_max: what llama.cpp made of the arguments (cells are rounded up to 256)
    token_bytes: K and V of one token over all layers of the (full-attention) cache; what one cell costs
    layer_ids, n_paged_layers, n_head, n_head_kv, head_dim, n_rows_max: shapes of the arrays below (paging only)
    geometry: equal for two contexts if and only if they can read each other's pages (paging only)
    """

    def __init__(self, model, *, n_cells: int, n_batch: int = 512, n_ubatch: int = 512, n_seq_max: int = 1,
                 n_threads: int | None = None, flash_attn: bool = True, type_k: str = "f16", type_v: str = "f16",
                 kv_unified: bool = False, paging: bool = True, index_rows: int = 2048, tap_query: bool = False,
                 key_probe: int = 0, n_outputs: int | None = None):
        self._ctx = None
        self._zoomr = None
        if min(n_cells, n_batch, n_ubatch, n_seq_max) < 1:
            raise EngineError(f"a context needs at least 1 cell, batch token and sequence, not n_cells={n_cells}, "
                              f"n_batch={n_batch}, n_ubatch={n_ubatch}, n_seq_max={n_seq_max}")
        if max(n_cells * n_seq_max, n_batch, n_ubatch, n_threads or 0, index_rows) >= _TOO_MANY:
            raise EngineError(f"a context of {n_cells} cells for {n_seq_max} sequences, n_batch={n_batch}, n_ubatch={n_ubatch}, "
                              f"n_threads={n_threads}, index_rows={index_rows}: every number must be below {_TOO_MANY}")
        self._views: dict[tuple, np.ndarray] = {}
        self._n_rows = 0
        self.model = model
        self.kv_unified = kv_unified
        params = llama.llama_context_default_params()
        params.n_ctx = n_cells if kv_unified else n_cells * n_seq_max
        params.n_batch, params.n_ubatch, params.n_seq_max = n_batch, n_ubatch, n_seq_max
        params.n_threads = params.n_threads_batch = n_threads or usable_cores()
        params.flash_attn_type = int(flash_attn)
        for name, value in (("type_k", type_k), ("type_v", type_v)):
            if value not in GGML_TYPES:
                raise EngineError(f"{name}={value!r} is not one of {', '.join(GGML_TYPES)}")
            setattr(params, name, GGML_TYPES[value])
        self.n_outputs: int = max(min(n_outputs or n_batch, n_batch), n_seq_max)
        params.n_outputs_max = self.n_outputs
        params.kv_unified = kv_unified
        params.swa_full = False  # a sliding-window cache holds its window, not the whole budget a second time
        params.no_perf = True
        self._ctx = llama.llama_init_from_model(model.handle, params)
        if not self._ctx:
            raise EngineError(f"llama.cpp made no context of {n_cells} cells: {last_log_line()}")
        self._memory = llama.llama_get_memory(self._ctx)
        self.n_seq_max: int = n_seq_max
        self.n_batch: int = llama.llama_n_batch(self._ctx)
        self.n_cells: int = zoomr.kv_size(self._ctx)
        self.token_bytes: int = zoomr.token_bytes(self._ctx)
        self._batch = Batch(self.n_batch, n_seq_max)
        if paging:
            self._attach(index_rows, key_probe, tap_query)
        model._contexts.add(self)

    def _attach(self, index_rows: int, key_probe: int, tap_query: bool) -> None:
        out = ctypes.c_void_p()
        try:
            checked(zoomr.init(self._ctx, Params(index_rows, key_probe, tap_query), ctypes.byref(out)))
        except UnsupportedModel as error:
            self.close()
            refused = UnsupportedModel(f"{self.model.path.name} ({self.model.desc}) cannot be paged. {error}. "
                                       "Run it with --policy full instead.")
            refused.reason = str(error)
            raise refused from None
        except EngineError:
            self.close()
            raise
        self._zoomr = out.value
        info = Info()
        zoomr.get_info(self._zoomr, ctypes.byref(info))
        self.n_paged_layers: int = info.n_layer
        self.n_head: int = info.n_head
        self.n_head_kv: int = info.n_head_kv
        self.head_dim: int = info.n_embd_head
        self.n_rows_max: int = info.n_rows_max
        self.n_keys_max: int = info.n_keys_max
        self.geometry: int = info.geometry
        self.tap_query = tap_query
        self.layer_ids: list[int] = [zoomr.layer_id(self._zoomr, i) for i in range(info.n_layer)]

    @property
    def handle(self):
        """The C pointer; raises EngineError once closed."""
        if not self._ctx:
            raise EngineError("the context is closed")
        return self._ctx

    @property
    def _pager(self):
        if not self._zoomr:
            raise EngineError("the context is closed" if not self._ctx else "the context was made with paging=False")
        return self._zoomr

    # decoding

    def decode(self, tokens, positions, *, seq: int = 0, logits: str = "last") -> None:
        """Tokens of one sequence at their logical positions, at most n_batch.

        ``logits``: "last", "all" or "none". Positions must follow the newest resident one. Raises EngineError,
        for instance where fewer cells are free than tokens are given; the cache is unchanged then.
        """
        batch = self._batch
        if not 0 <= seq < self.n_seq_max:
            batch.check_seq(seq)
        if len(tokens) == 1:
            batch.fill_one(tokens[0], positions[0], seq, logits != "none")
        else:
            batch.fill(tokens, positions, seq, logits == "all")
            if logits == "all":
                self._check_outputs(len(tokens))
            if logits == "last":
                batch.want[len(tokens) - 1] = 1
        self._decode()

    def decode_batch(self, tokens, positions, seqs, logits) -> None:
        """General form: a position, a sequence and a logits flag for every token."""
        for seq in set(seqs):
            self._batch.check_seq(seq)
        wanted = np.asarray(logits, dtype=bool)
        self._check_outputs(int(wanted.sum()))
        self._batch.fill(tokens, positions, seqs, wanted)
        self._decode()

    def _check_outputs(self, n: int) -> None:
        if n > self.n_outputs:  # llama.cpp would abort the process
            raise EngineError(f"logits of {n} tokens are asked for, the context was made with n_outputs={self.n_outputs}")

    def _decode(self) -> None:
        if self.model.no_alloc:
            raise EngineError("the model was opened without its weights, to be measured; it cannot decode")
        code = llama.llama_decode(self._ctx or self.handle, self._batch.c)
        if code != 0:
            words = DECODE_CODES.get(code, "fatal error")
            detail = (f"{self._batch.c.n_tokens} tokens, {self.n_used()} of {self.n_cells} cells in use" if code == 1
                      else last_log_line())
            raise EngineError(f"decoding failed ({code}): {words} ({detail})")

    def logits(self, i: int = -1) -> np.ndarray:
        """View, float32 [n_vocab]: of token ``i`` of the last batch, or of its last output (-1)."""
        address = zoomr.llama_get_logits_ith(self.handle, i)
        if not address:
            raise EngineError(f"there are no logits {i}: decode with logits first")
        return self._view(address, (self.model.n_vocab,))

    def set_threads(self, n_threads: int) -> None:
        llama.llama_set_n_threads(self.handle, n_threads, n_threads)

    def _view(self, address: int, shape: tuple[int, ...]) -> np.ndarray:
        view = self._views.get((address, shape))
        if view is None:
            count = int(np.prod(shape))
            memory = (ctypes.c_float * count).from_address(address)
            view = np.frombuffer(memory, dtype=np.float32).reshape(shape)
            view.flags.writeable = False
            self._views[(address, shape)] = view
        return view

    def memory_use(self) -> list[BufferUse]:
        """What the model and this context hold, an entry for each kind of buffer; with a model made with
        ``no_alloc`` what they would hold."""
        entries = (MemoryEntry * 16)()
        found = min(checked(zoomr.memory_use(self.handle, self._zoomr, entries, len(entries))), len(entries))
        return [BufferUse(e.buffer.decode(), e.device.decode(), e.weights, e.kv, e.compute, e.index, e.in_ram, e.mappable)
                for e in entries[:found]]

    # cells

    def seq_rm(self, seq: int, p0: int, p1: int) -> bool:
        """Forgets positions [p0, p1) of a sequence in every cache (p1 -1: to the end). False if it cannot be partial."""
        if seq != -1:
            self._batch.check_seq(seq)
        return bool(llama.llama_memory_seq_rm(self._memory_alive(), seq, p0, p1))

    def seq_cp(self, src: int, dst: int, p0: int = 0, p1: int = -1) -> None:
        """Adds the cells of ``src`` in [p0, p1) to ``dst``. Between streams only whole sequences can be copied."""
        self._batch.check_seq(src)
        self._batch.check_seq(dst)
        if not self.kv_unified and src != dst and (p0 > 0 or p1 >= 0):
            raise EngineError("a part of a sequence can be copied only with kv_unified=True")
        llama.llama_memory_seq_cp(self._memory_alive(), src, dst, p0, p1)

    def clear(self) -> None:
        """Forgets every token of every sequence; index rows stay."""
        llama.llama_memory_clear(self._memory_alive(), False)

    def _memory_alive(self):
        self.handle
        if not self._memory:
            raise EngineError(f"{self.model.desc} keeps no memory between decodes")
        return self._memory

    def n_used(self) -> int:
        """Cells in use, over all streams."""
        return zoomr.kv_used(self.handle)

    def resident(self, seq: int = 0) -> np.ndarray:
        """int32, the positions of a sequence that are in cells, ascending."""
        out = np.empty(self.n_cells, dtype=np.int32)
        n = checked(zoomr.resident(self.handle, seq, out.ctypes.data, out.size))
        return out[:n]

    def state_get(self, seq: int) -> np.ndarray:
        """uint8, llama.cpp's own serialised cells of a sequence (its format: `bench_state.py`)."""
        self._batch.check_seq(seq)
        out = np.empty(llama.llama_state_seq_get_size(self.handle, seq), np.uint8)
        n = llama.llama_state_seq_get_data(self.handle, _bytes_of(out), out.nbytes, seq)
        return out[:n]

    def state_set(self, seq: int, state: np.ndarray) -> None:
        """Puts such a state in place of a sequence's cells; raises EngineError if llama.cpp refuses it."""
        self._batch.check_seq(seq)
        data = np.ascontiguousarray(state, np.uint8)
        if not llama.llama_state_seq_set_data(self.handle, _bytes_of(data), data.nbytes, seq):
            raise EngineError(f"llama.cpp refused a state of {data.nbytes} bytes: {last_log_line()}")

    def snapshot(self) -> np.ndarray:
        """uint8, every cell with its number and what else a later decode depends on; for a context of one sequence.

        Raises UnsupportedModel, with the reason, where the memory is more than a KV cache.
        """
        out = np.empty(checked(zoomr.state_bytes(self.handle)), np.uint8)
        checked(zoomr.state_write(self.handle, out.ctypes.data, out.nbytes))
        return out

    def restore_snapshot(self, snapshot: np.ndarray) -> int:
        """Puts a snapshot in place of all cells, number by number; returns how many tokens are in cells now.

        All or nothing. Raises EngineError for bytes that are not a snapshot of a context like this one.
        """
        data = np.ascontiguousarray(snapshot, np.uint8)
        return checked(zoomr.state_read(self.handle, data.ctypes.data, data.nbytes))

    # index rows

    @property
    def n_rows(self) -> int:
        """Rows that the probe scores. Growing it past a multiple of 64 rebuilds the graph once (about 1 ms)."""
        return self._n_rows

    @n_rows.setter
    def n_rows(self, n: int) -> None:
        checked(zoomr.rows_set_n(self._pager, n))
        self._n_rows = n

    def index_mean(self, row: int, seq: int, p0: int, p1: int) -> int:
        """Writes the mean of the resident keys in [p0, p1) to a row; returns how many keys that were."""
        return checked(zoomr.rows_mean(self._pager, row, seq, p0, p1))

    def index_key(self, row: int, seq: int, pos: int) -> None:
        """Writes the key of one resident position to a row."""
        checked(zoomr.rows_mean(self._pager, row, seq, pos, pos + 1))

    def index_get(self, row: int) -> np.ndarray:
        """Copy, float32 [n_paged_layers, n_head_kv, head_dim], in the cache's own rotation."""
        out = np.empty((self.n_paged_layers, self.n_head_kv, self.head_dim), dtype=np.float32)
        checked(zoomr.rows_get(self._pager, row, out.ctypes.data))
        return out

    def index_set(self, row: int, array: np.ndarray) -> None:
        """Writes what index_get returned, possibly in another process."""
        values = np.ascontiguousarray(array, dtype=np.float32)
        if values.shape != (self.n_paged_layers, self.n_head_kv, self.head_dim):
            raise EngineError(f"an index row has shape {(self.n_paged_layers, self.n_head_kv, self.head_dim)}, not {values.shape}")
        checked(zoomr.rows_set(self._pager, row, values.ctypes.data))

    def index_clear(self) -> None:
        """Forgets all rows; n_rows becomes 0."""
        zoomr.rows_clear(self._pager)
        self._n_rows = 0

    # what the last decode left

    def scores(self) -> np.ndarray:
        """View, float32 [n_paged_layers, n_seq_max, n_head, n_rows]: q . row, not yet times kq_scale.

        Of the last token of every sequence in the last decode; a sequence that was not in it keeps its old
        scores. A row that was never written scores 0.
        """
        address = zoomr.scores(self._pager)
        return self._view(address, (self.n_paged_layers, self.n_seq_max, self.n_head, self.n_rows_max))[..., :self._n_rows]

    def query(self) -> np.ndarray:
        """View, float32 [n_paged_layers, n_seq_max, n_head, head_dim]; needs tap_query=True."""
        address = zoomr.query(self._pager)
        if not address:
            raise EngineError("the context was made without tap_query")
        return self._view(address, (self.n_paged_layers, self.n_seq_max, self.n_head, self.head_dim))

    def set_key_probe(self, seq: int, positions) -> None:
        """Test oracle: the next decodes score the resident keys at these positions; needs key_probe >= len(positions)."""
        pos = np.ascontiguousarray(positions, dtype=np.int32)
        checked(zoomr.set_key_probe(self._pager, seq, pos.ctypes.data, pos.size))

    def key_scores(self) -> np.ndarray:
        """View, float32 [n_paged_layers, n_seq_max, n_head, key_probe], in the order of set_key_probe."""
        address = zoomr.key_scores(self._pager)
        if not address:
            raise EngineError(zoomr.last_error().decode() if self.n_keys_max else "the context was made without key_probe")
        return self._view(address, (self.n_paged_layers, self.n_seq_max, self.n_head, self.n_keys_max))

    def kq_scale(self, i: int) -> float:
        """What the model multiplies q . k by before softmax, in paged layer ``i``."""
        return zoomr.kq_scale(self._pager, i)

    # life

    def close(self) -> None:
        """Frees everything; views become invalid. Safe to call twice."""
        pager, self._zoomr = self._zoomr, None
        ctx, self._ctx = self._ctx, None
        self._views.clear()
        if pager:
            zoomr.free(pager)
        if ctx:
            llama.llama_free(ctx)

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.close()

    def __del__(self):
        if getattr(self, "_ctx", None) and llama is not None:
            self.close()
