"""One preallocated llama_batch, filled in place: a decode step must not allocate. Imported by this package only."""

from __future__ import annotations

import ctypes

import numpy as np

from zoomr_local.errors import EngineError

from .library import llama


class Batch:
    """Room for ``n_max`` tokens of sequences 0..n_seq_max-1, each token in one sequence."""

    def __init__(self, n_max: int, n_seq_max: int):
        self.n_max = n_max
        self.n_seq_max = n_seq_max
        # ctypes arrays for the one-token path (an item costs 40 ns), numpy views of the same memory for many
        self.token = (ctypes.c_int32 * n_max)()
        self.pos = (ctypes.c_int32 * n_max)()
        self.want = (ctypes.c_int8 * n_max)()
        self.seq_ptr = (ctypes.c_void_p * n_max)()
        self._n_seq = (ctypes.c_int32 * n_max)(*[1] * n_max)
        self._seqs = (ctypes.c_int32 * n_seq_max)(*range(n_seq_max))
        base = ctypes.addressof(self._seqs)
        self.seq_addr = [base + 4 * s for s in range(n_seq_max)]
        self._token_np = np.frombuffer(self.token, dtype=np.int32)
        self._pos_np = np.frombuffer(self.pos, dtype=np.int32)
        self._want_np = np.frombuffer(self.want, dtype=np.int8)
        self._seq_np = np.frombuffer(self.seq_ptr, dtype=np.uintp)
        pointers = ctypes.POINTER(ctypes.POINTER(ctypes.c_int32))
        self.c = llama.llama_batch(
            n_tokens=0, token=ctypes.cast(self.token, ctypes.POINTER(ctypes.c_int32)), embd=None,
            pos=ctypes.cast(self.pos, ctypes.POINTER(ctypes.c_int32)),
            n_seq_id=ctypes.cast(self._n_seq, ctypes.POINTER(ctypes.c_int32)),
            seq_id=ctypes.cast(self.seq_ptr, pointers),
            logits=ctypes.cast(self.want, ctypes.POINTER(ctypes.c_int8)))

    def check_seq(self, seq: int) -> None:
        if not 0 <= seq < self.n_seq_max:
            raise EngineError(f"sequence {seq} of {self.n_seq_max}")

    def fill_one(self, token: int, position: int, seq: int, want: bool) -> None:
        self.token[0] = token
        self.pos[0] = position
        self.seq_ptr[0] = self.seq_addr[seq]
        self.want[0] = want
        self.c.n_tokens = 1

    def fill(self, tokens, positions, seqs, want) -> None:
        """``seqs`` and ``want`` may be one value for all tokens or an array."""
        n = len(tokens)
        if not 0 < n <= self.n_max:
            raise EngineError(f"a batch of {n} tokens, at most {self.n_max} and at least 1 can be decoded at once")
        if len(positions) != n:
            raise EngineError(f"{n} tokens with {len(positions)} positions")
        self._token_np[:n] = tokens
        self._pos_np[:n] = positions
        self._want_np[:n] = want
        self._seq_np[:n] = self.seq_addr[0] + 4 * np.asarray(seqs, dtype=np.uintp)
        self.c.n_tokens = n
