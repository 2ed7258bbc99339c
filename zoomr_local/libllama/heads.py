"""The per-head store: a memory in which every (layer, KV head) keeps its own tokens. Mechanism only.

What it stores and what it refuses: native/README.md, "Per-head store". May be called by ``engine``, policies'
runners and the tests. Layers are counted over the attention layers, in model order; heads are KV heads unless said.
Cells are numbers of one (layer, KV head): a policy that evicts "the third resident token" names its cell.
"""

from __future__ import annotations

import ctypes

import numpy as np

from zoomr_local.errors import EngineError, UnsupportedModel

from .context import LlamaContext
from .library import HeadsInfo, HeadsMoved, HeadsParams, checked, llama, zoomr


def _view(address: int, ctype, dtype, shape: tuple[int, ...]) -> np.ndarray:
    memory = (ctype * int(np.prod(shape))).from_address(address)
    view = np.frombuffer(memory, dtype=dtype).reshape(shape)
    view.flags.writeable = False
    return view


class HeadStore:
    """Takes the place of the KV cache of ``context``, which must be new, of one sequence and made with paging=False.

    n_cells: cells a KV head, one number for all layers or one a layer. A layer allocates n_head_kv times as many;
        with ``share`` its heads take them from one pool, so that one may hold more and another fewer.
    observe: of how many last tokens of a decode (of its last ubatch) weights and queries are kept; 0: of none.
        Who wants them of the last w tokens of a prompt decodes it so that its last ubatch has as many.

    The context goes on decoding with ``context.decode``; its own cells (it needs no more than n_batch), pages and snapshots
    are gone, its n_cells says nothing any more. A decode needs a free cell in every layer and head for each of its tokens: ask ``require_room``
    first, which says where there is none.

    n_layers, n_head, n_head_kv, head_dim (of a key), value_dim, n_observe
    n_cells: list, cells that a head of each layer can name (n_head_kv times the argument if shared)
    cell_bytes: K and V of one cell of one head; kv_bytes: of all cells; observe_bytes: of weights and queries
    """

    def __init__(self, context: LlamaContext, n_cells, *, share: bool = False, observe: int = 0, weights: bool = True,
                 queries: bool = True):
        n_layers = context.model.n_layer
        counts = [n_cells] * n_layers if isinstance(n_cells, int) else list(n_cells)
        if not counts or not 1 <= min(counts) <= max(counts) < 2**31 or not 0 <= observe < 2**31:
            raise EngineError(f"a per-head store needs at least 1 cell a head in every layer, not {n_cells}, and observe={observe} >= 0, all below 2^31")
        array = (ctypes.c_uint32 * len(counts))(*counts)
        params = HeadsParams(array, len(counts), observe, share, weights, queries)
        out = ctypes.c_void_p()
        try:
            checked(zoomr.heads_init(context.handle, params, ctypes.byref(out)))
        except UnsupportedModel as error:
            refused = UnsupportedModel(f"{context.model.path.name} ({context.model.desc}) cannot have a per-head store. {error}. "
                                       "Run it with --policy full instead.")
            refused.reason = str(error)
            raise refused from None
        context._memory = llama.llama_get_memory(context.handle)  # the one it was made with is freed
        self.context = context
        self._heads = out.value
        info = HeadsInfo()
        zoomr.heads_get_info(self._heads, ctypes.byref(info))
        self.n_layers: int = info.n_layer
        self.n_head: int = info.n_head
        self.n_head_kv: int = info.n_head_kv
        self.head_dim: int = info.n_embd_head_k
        self.value_dim: int = info.n_embd_head_v
        self.n_observe: int = info.n_observe
        self.cell_bytes: int = info.cell_bytes
        self.kv_bytes: int = info.kv_bytes
        self.observe_bytes: int = info.observe_bytes
        self.n_cells: list[int] = [zoomr.heads_n_cells(self._heads, i) for i in range(self.n_layers)]
        self.layer_ids: list[int] = [zoomr.heads_layer_id(self._heads, i) for i in range(self.n_layers)]
        self._positions = [_view(zoomr.heads_pos(self._heads, i), ctypes.c_int32, np.int32, (self.n_head_kv, n))
                           for i, n in enumerate(self.n_cells)]

    @property
    def _alive(self):
        self.context.handle  # the store is freed with its context
        return self._heads

    # cells

    def positions(self, layer: int) -> np.ndarray:
        """View, int32 [n_head_kv, n_cells[layer]]: the position in each cell, -1 where it holds no token of that head.

        Always current; the same array every time.
        """
        self._alive
        return self._positions[layer]

    def resident(self, layer: int, head: int) -> tuple[np.ndarray, np.ndarray]:
        """(cells, positions) of a head's tokens, int64 and int32, by position."""
        row = self.positions(layer)[head]
        cells = np.flatnonzero(row >= 0)
        cells = cells[np.argsort(row[cells])]
        return cells, row[cells]

    def require_room(self, n_tokens: int) -> None:
        """Raises EngineError, naming the layer and head, unless ``n_tokens`` have a free cell everywhere."""
        checked(zoomr.heads_fits(self._alive, n_tokens))

    def n_free(self, layer: int, head: int) -> int:
        """Cells that a head could take; with ``share`` the pool's, which its other heads could take as well."""
        return checked(zoomr.heads_free_cells(self._alive, layer, head))

    def evict(self, layer: int, head: int, cells) -> int:
        """Frees cells of a head; all or nothing. Raises EngineError for a cell that holds no token of it."""
        array = np.ascontiguousarray(cells, np.uint32)
        return checked(zoomr.heads_evict(self._alive, layer, head, array.ctypes.data, array.size))

    def keep(self, layer: int, keep: np.ndarray) -> int:
        """Evicts every token of a layer that is not in ``keep``, bool [n_head_kv, n_cells[layer]]; returns how many."""
        held = self.positions(layer) >= 0
        if keep.shape != held.shape or keep.dtype != bool:
            raise EngineError(f"cells to keep in layer {layer} are {keep.dtype} {keep.shape}, must be bool {held.shape}")
        return sum(self.evict(layer, head, np.flatnonzero(row)) for head, row in enumerate(held & ~keep) if row.any())

    def layer_keys(self, layer: int) -> np.ndarray:
        """Copy, float32 [n_head_kv, n_cells[layer], head_dim]: keys after RoPE; 0 in cells that hold no token of the head."""
        out = np.zeros((self.n_head_kv, self.n_cells[layer], self.head_dim), np.float32)
        for head, row in enumerate(self.positions(layer) >= 0):
            out[head, row] = self.keys(layer, head, np.flatnonzero(row))
        return out

    def keys(self, layer: int, head: int, cells) -> np.ndarray:
        """Copy, float32 [len(cells), head_dim]: keys after RoPE."""
        return self._read(layer, head, cells, True, False)[0]

    def keys_and_values(self, layer: int, head: int, cells) -> tuple[np.ndarray, np.ndarray]:
        """Copies, float32 [len(cells), head_dim] and [len(cells), value_dim]."""
        return self._read(layer, head, cells, True, True)

    def _read(self, layer: int, head: int, cells, want_k: bool, want_v: bool) -> tuple[np.ndarray, np.ndarray]:
        array = np.ascontiguousarray(cells, np.uint32)
        k = np.empty((array.size, self.head_dim), np.float32) if want_k else None
        v = np.empty((array.size, self.value_dim), np.float32) if want_v else None
        address = lambda a: None if a is None else a.ctypes.data  # noqa: E731
        checked(zoomr.heads_read(self._alive, layer, head, array.ctypes.data, array.size, address(k), address(v)))
        return k, v

    def page_out(self, layer: int, head: int, cells) -> np.ndarray:
        """uint8 [len(cells) * cell_bytes]: the cells' K rows, then their V rows, as stored. They stay resident."""
        array = np.ascontiguousarray(cells, np.uint32)
        out = np.empty(array.size * self.cell_bytes, np.uint8)
        checked(zoomr.heads_page_out(self._alive, layer, head, array.ctypes.data, array.size, out.ctypes.data, out.nbytes))
        return out

    def page_in(self, layer: int, head: int, positions, page: np.ndarray) -> np.ndarray:
        """Puts tokens of ``page_out`` back into the lowest free cells; uint32, the cell of each position.

        All or nothing. Raises EngineError where a position is resident, was never decoded, or cells are missing.
        """
        array = np.ascontiguousarray(positions, np.int32)
        data = np.ascontiguousarray(page, np.uint8)
        cells = np.empty(array.size, np.uint32)
        checked(zoomr.heads_page_in(self._alive, layer, head, array.ctypes.data, array.size, data.ctypes.data, data.nbytes,
                                    cells.ctypes.data))
        return cells

    def exchange(self, layer: int, wanted: np.ndarray, stored: np.ndarray, rows: np.ndarray) -> tuple[int, int, int]:
        """Lets each head of a layer hold the tokens that are ``wanted``, bool [n_head_kv, n] by position, and no others.

        What leaves is written to ``rows``, uint8 [n_head_kv, m, cell_bytes] by position (K, then V), unless ``stored``, bool
        [n_head_kv, m], says that it is there, and what comes is read from it. Returns (cells freed, cells filled, rows written). All or nothing.
        Raises EngineError where a position is wanted that is neither in cells nor stored, and where cells are missing.
        """
        n, m, all_heads = wanted.shape[-1], stored.shape[-1], self.n_head_kv
        for name, array, dtype, shape in (("wanted", wanted, bool, (all_heads, n)), ("stored", stored, bool, (all_heads, m)),
                                          ("rows", rows, np.uint8, (all_heads, m, self.cell_bytes))):
            if array.dtype != dtype or array.shape != shape or not array.flags.c_contiguous:
                raise EngineError(f"{name} of layer {layer} is {array.dtype} {array.shape}, must be {np.dtype(dtype)} {shape} in one piece")
            if array is not wanted and not array.flags.writeable:
                raise EngineError(f"{name} of layer {layer} cannot be written to")
        moved = HeadsMoved()
        checked(zoomr.heads_exchange(self._alive, layer, wanted.ctypes.data, n, stored.ctypes.data, rows.ctypes.data, m, ctypes.byref(moved)))
        return moved.n_evicted, moved.n_recalled, moved.n_stored

    # what the last decode left

    def observe(self, on: bool) -> None:
        """Whether the next decodes leave weights and queries; at first they do. A change rebuilds the graph once."""
        zoomr.heads_observe(self._alive, on)

    def n_observed(self) -> int:
        """Tokens that ``weights`` and ``queries`` show: the last of the last decode's last ubatch, at most n_observe."""
        return zoomr.heads_observed(self._alive)

    def weights(self, layer: int) -> np.ndarray:
        """View, float32 [n_observed, n_head, n_cells[layer]]: attention weights, oldest token first, overwritten by
        the next decode. Cells that held no token of the query's KV head at that decode say nothing; mask them with
        ``positions``. Tokens of the same batch that come after a row's own have weight 0 in it.
        """
        address = zoomr.heads_weights(self._alive, layer)
        if not address:
            raise EngineError(f"layer {layer} of {self.n_layers}: the store was made without observing weights")
        return _view(address, ctypes.c_float, np.float32, (self.n_observe, self.n_head, self.n_cells[layer]))[:self.n_observed()]

    def queries(self) -> np.ndarray:
        """View, float32 [n_layers, n_observed, n_head, head_dim] after RoPE, overwritten by the next decode."""
        address = zoomr.heads_queries(self._alive)
        if not address:
            raise EngineError("the store was made without observing queries")
        return _view(address, ctypes.c_float, np.float32,
                     (self.n_layers, self.n_observe, self.n_head, self.head_dim))[:, :self.n_observed()]

    def kq_scale(self, layer: int) -> float:
        """What the model multiplies q . k by before softmax."""
        return zoomr.heads_kq_scale(self._alive, layer)
