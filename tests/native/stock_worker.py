"""The oracle's process: runs operations on the unpatched library and hands back logits.

Started by ``StockWorker`` in conftest.py with LLAMA_CPP_LIB_PATH pointing at the stock build; knows nothing
of zoomr_local. One JSON request a line on stdin, one answer a line on stdout:

    {"model": PATH, "context": {...}, "ops": [...], "out": PATH.npy}  ->  {"ok": true} or {"error": "..."}

Operations: ["decode", tokens, positions, seq, "last"|"all"|"none"] and ["rm", seq, p0, p1].
The logits of all wanted tokens, in order, are the rows of the array that is written.
"""

from __future__ import annotations

import ctypes
import json
import sys

import llama_cpp.llama_cpp as llama
import numpy as np

TYPES = {"f32": 0, "f16": 1, "q8_0": 8}
MODELS: dict[str, object] = {}


def load(path: str):
    if path not in MODELS:
        params = llama.llama_model_default_params()
        params.n_gpu_layers = 0
        params.load_mode = llama.LLAMA_LOAD_MODE_MMAP
        MODELS[path] = llama.llama_model_load_from_file(path.encode(), params)
    return MODELS[path]


def make_context(model, *, n_cells, n_seq_max, n_threads, flash_attn, type_k, type_v, kv_unified, n_batch=512):
    params = llama.llama_context_default_params()
    params.n_ctx = n_cells if kv_unified else n_cells * n_seq_max
    params.n_batch = params.n_ubatch = n_batch
    params.n_seq_max = n_seq_max
    params.n_threads = params.n_threads_batch = n_threads
    params.flash_attn_type = int(flash_attn)
    params.type_k, params.type_v = TYPES[type_k], TYPES[type_v]
    params.kv_unified = kv_unified
    params.swa_full = False
    return llama.llama_init_from_model(model, params)


def decode(context, batch, tokens, positions, seq, logits) -> int:
    n = len(tokens)
    for i in range(n):
        batch.token[i], batch.pos[i] = tokens[i], positions[i]
        batch.n_seq_id[i], batch.seq_id[i][0] = 1, seq
        batch.logits[i] = logits == "all" or (logits == "last" and i == n - 1)
    batch.n_tokens = n
    code = llama.llama_decode(context, batch)
    if code != 0:
        raise RuntimeError(f"llama_decode returned {code}")
    return {"all": n, "last": 1, "none": 0}[logits]


def run(request: dict) -> np.ndarray:
    model = load(request["model"])
    n_vocab = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(model))
    context = make_context(model, **request["context"])
    if not context:
        raise RuntimeError("no context")
    memory = llama.llama_get_memory(context)
    batch = llama.llama_batch_init(512, 0, 1)
    rows = []
    for name, *args in request["ops"]:
        if name == "rm":
            llama.llama_memory_seq_rm(memory, *args)
            continue
        n_out = decode(context, batch, *args)
        if n_out:
            flat = np.ctypeslib.as_array(ctypes.cast(llama.llama_get_logits(context), ctypes.POINTER(ctypes.c_float)),
                                         shape=(n_out, n_vocab))
            rows.append(flat.copy())
    llama.llama_batch_free(batch)
    llama.llama_free(context)
    return np.concatenate(rows)


def main() -> None:
    if hasattr(llama._lib, "zoomr_version"):
        print(json.dumps({"error": f"{llama._lib._name} is patched, the oracle must be stock"}), flush=True)
        return
    for line in sys.stdin:
        request = json.loads(line)
        try:
            np.save(request["out"], run(request))
            answer = {"ok": True}
        except Exception as error:  # handed to the test, which fails with it
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
