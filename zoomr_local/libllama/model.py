"""A loaded GGUF file: shapes, metadata, tokenizer. Imported by this package only."""

from __future__ import annotations

import ctypes
import os
import weakref
from pathlib import Path

from zoomr_local.errors import ModelError, UsageError

from .library import last_log_line, llama

NULL_TOKEN = -1


def _sized_text(call, guess: int = 256) -> str | None:
    """The text of a C function that fills (buffer, size) and returns the full length, or None if negative."""
    buffer = ctypes.create_string_buffer(guess)
    length = call(buffer, len(buffer))
    if length < 0:
        return None
    if length >= len(buffer):
        buffer = ctypes.create_string_buffer(length + 1)
        call(buffer, len(buffer))
    return buffer.value.decode(errors="replace")


class LlamaModel:
    """Weights and vocabulary. Raises ModelError if the file cannot be read. Thread-safe once loaded.

    ``no_alloc``: metadata and vocabulary only. No weight is read and nothing is allocated, neither here nor in the
    contexts made from it, which know what they would hold (``LlamaContext.memory_use``) and cannot decode.
    """

    def __init__(self, path, *, n_gpu_layers: int = 0, use_mmap: bool = True, no_alloc: bool = False):
        self.path = Path(path)
        self.no_alloc = no_alloc
        self._handle = None
        self._contexts: weakref.WeakSet = weakref.WeakSet()
        self._check_file()
        params = llama.llama_model_default_params()
        params.n_gpu_layers = n_gpu_layers
        params.load_mode = llama.LLAMA_LOAD_MODE_MMAP if use_mmap and not no_alloc else llama.LLAMA_LOAD_MODE_NONE
        params.no_alloc = no_alloc
        handle = llama.llama_model_load_from_file(os.fsencode(self.path), params)
        if not handle:
            raise ModelError(f"{self.path} cannot be loaded: {last_log_line()}")
        self._handle = handle
        self._vocab = llama.llama_model_get_vocab(handle)
        self._pieces: dict[tuple[int, bool], bytes] = {}
        self._read_shapes()

    def _check_file(self) -> None:
        try:
            with open(self.path, "rb") as file:
                magic = file.read(4)
        except OSError as error:
            raise ModelError(f"{self.path} cannot be read: {error.strerror}") from error
        if magic != b"GGUF":
            raise ModelError(f"{self.path} is not a GGUF file (it starts with {magic!r}, not b'GGUF')")

    def _read_shapes(self) -> None:
        m = self._handle
        self.n_vocab: int = llama.llama_vocab_n_tokens(self._vocab)
        self.n_layer: int = llama.llama_model_n_layer(m)
        self.n_head: int = llama.llama_model_n_head(m)
        self.n_head_kv: int = llama.llama_model_n_head_kv(m)
        self.n_embd: int = llama.llama_model_n_embd(m)
        self.n_ctx_train: int = llama.llama_model_n_ctx_train(m)
        self.n_swa: int = llama.llama_model_n_swa(m)  # tokens of the sliding window, 0 without one
        self.size_bytes: int = llama.llama_model_size(m)
        self.n_params: int = llama.llama_model_n_params(m)
        self.arch: str = self.meta("general.architecture") or ""
        self.desc: str = _sized_text(lambda b, n: llama.llama_model_desc(m, b, n)) or self.arch
        bos, eos = llama.llama_vocab_bos(self._vocab), llama.llama_vocab_eos(self._vocab)
        self.bos_token: int | None = None if bos == NULL_TOKEN else bos
        self.eos_token: int | None = None if eos == NULL_TOKEN else eos
        self.add_bos: bool = bool(llama.llama_vocab_get_add_bos(self._vocab))

    @property
    def handle(self):
        """The C pointer; raises ModelError once closed."""
        if not self._handle:
            raise ModelError(f"{self.path} is closed")
        return self._handle

    def meta(self, key: str) -> str | None:
        """A metadata value as text (arrays are abbreviated by llama.cpp), None if the file has no such key."""
        return _sized_text(lambda b, n: llama.llama_model_meta_val_str(self.handle, key.encode(), b, n))

    def metadata(self) -> dict[str, str]:
        """All metadata but arrays, as text."""
        m, out = self.handle, {}
        for i in range(llama.llama_model_meta_count(m)):
            key = _sized_text(lambda b, n: llama.llama_model_meta_key_by_index(m, i, b, n))
            out[key] = _sized_text(lambda b, n: llama.llama_model_meta_val_str_by_index(m, i, b, n))
        return out

    def chat_template(self) -> str | None:
        """The Jinja source stored in the file."""
        source = llama.llama_model_chat_template(self.handle, None)
        return source.decode(errors="replace") if source else None

    def tokenize(self, text: str | bytes, *, add_special: bool, parse_special: bool) -> list[int]:
        """Token ids. ``add_special``: with the model's own BOS/EOS; ``parse_special``: markers in text become tokens.

        Raises UsageError for text that cannot be written as UTF-8.
        """
        try:
            data = text.encode() if isinstance(text, str) else bytes(text)
        except UnicodeEncodeError:
            raise UsageError("the text has bytes that are not UTF-8; write it in UTF-8") from None
        size = len(data) + 8
        for _ in range(2):
            ids = (ctypes.c_int32 * size)()
            n = llama.llama_tokenize(self._alive_vocab(), data, len(data), ids, size, add_special, parse_special)
            if n >= 0:
                return ids[:n]
            size = -n
        raise ModelError(f"{self.path}: the tokenizer could not take {len(data)} bytes")

    def piece(self, token: int, *, special: bool = False) -> bytes:
        """A token's bytes; control tokens are empty unless ``special``. Bytes need not be whole characters."""
        key = (token, special)
        if key not in self._pieces:
            if not 0 <= token < self.n_vocab:
                raise ModelError(f"token {token} is outside of the vocabulary of {self.n_vocab}")
            size = 64
            for _ in range(2):
                buffer = ctypes.create_string_buffer(size)
                n = llama.llama_token_to_piece(self._alive_vocab(), token, buffer, size, 0, special)
                if n >= 0:
                    break
                size = -n
            self._pieces[key] = buffer.raw[:n]
        return self._pieces[key]

    def token_of(self, text: str) -> int | None:
        """The id if ``text`` is exactly one token (a marker in the vocabulary, usually), else None."""
        ids = self.tokenize(text, add_special=False, parse_special=True)
        return ids[0] if len(ids) == 1 and self.piece(ids[0], special=True) == text.encode() else None

    def is_eog(self, token: int) -> bool:
        """True for every token that ends a generation (EOS, end of turn, ...)."""
        return bool(llama.llama_vocab_is_eog(self._alive_vocab(), token))

    def support(self) -> str | None:
        """None if the model can be paged, else the reason. Makes a tiny context to find out (milliseconds)."""
        from zoomr_local.errors import UnsupportedModel

        from .context import LlamaContext
        try:
            LlamaContext(self, n_cells=256, n_batch=16, n_ubatch=16, n_threads=1, index_rows=64).close()
        except UnsupportedModel as error:
            return error.reason
        return None

    def _alive_vocab(self):
        return self.handle and self._vocab

    def close(self) -> None:
        """Frees the model and every context made from it. Safe to call twice."""
        for context in list(self._contexts):
            context.close()
        handle, self._handle = self._handle, None
        if handle:
            llama.llama_model_free(handle)

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.close()

    def __del__(self):
        # no interpreter state is needed by the C side, but the bindings may be gone at exit
        if getattr(self, "_handle", None) and llama is not None:
            self.close()
