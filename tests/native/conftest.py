"""Fixtures of the native tests: tiny models, the stock oracle, and replaying operations on our library.

The oracle is the same pinned source without the patch, in another process. It is looked for in
ZOOMR_STOCK_LIB (a folder with libllama), then in build/*/stock; if there is none it is built here, which
takes a minute or two, so that these tests never pass by not comparing.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
sys.path.insert(0, str(HERE))

import tiny_models  # noqa: E402

import zoomr_local.libllama as libllama  # noqa: E402
from zoomr_local.libllama.library import ENGINE_VERSION, library_name  # noqa: E402

# key type, value type, flash attention. llama.cpp has no quantised V without flash attention
KV_CONFIGS = {
    "f16-fa": {"type_k": "f16", "type_v": "f16", "flash_attn": True},
    "q8-fa": {"type_k": "q8_0", "type_v": "q8_0", "flash_attn": True},
    "f16-nofa": {"type_k": "f16", "type_v": "f16", "flash_attn": False},
    "q8-nofa": {"type_k": "q8_0", "type_v": "f16", "flash_attn": False},
}


def config(name: str, **more) -> dict:
    """Arguments of a context, the same for our library and for stock. One thread: no test needs more."""
    return {"n_cells": 256, "n_seq_max": 1, "n_threads": 1, "kv_unified": False, **KV_CONFIGS[name], **more}


@pytest.fixture(params=KV_CONFIGS)
def kv(request) -> str:
    """Name of a KV configuration; a test that takes it runs for all of them."""
    return request.param


def find_stock() -> Path | None:
    if os.environ.get("ZOOMR_STOCK_LIB"):
        return Path(os.environ["ZOOMR_STOCK_LIB"])
    built = [path.parent for path in ROOT.glob(f"build/*/stock/{library_name()}")
             if f"{ENGINE_VERSION} " in (path.parent.parent / "engine" / "pristine" / ".zoomr-origin").read_text()]
    return max(built, key=lambda path: path.stat().st_mtime) if built else None


class StockWorker:
    """A process on the stock library; answers are cached by request, as several tests compare with the same run."""

    def __init__(self, folder: Path, out: Path):
        env = {**os.environ, "LLAMA_CPP_LIB_PATH": str(folder)}
        self._out = out
        self._cache: dict[str, np.ndarray] = {}
        self._log = open(out / "stock.log", "w+")
        self._process = subprocess.Popen([sys.executable, str(HERE / "stock_worker.py")], text=True, env=env,
                                         stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log)

    def run(self, model: Path, context: dict, ops: list) -> np.ndarray:
        key = json.dumps([str(model), context, ops])
        if key not in self._cache:
            out = self._out / f"{len(self._cache)}.npy"
            request = {"model": str(model), "context": context, "ops": ops, "out": str(out)}
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
            if not line:
                self._log.seek(0)
                raise RuntimeError("the stock process died:\n" + self._log.read()[-2000:])
            answer = json.loads(line)
            if "error" in answer:
                raise RuntimeError("stock: " + answer["error"])
            self._cache[key] = np.load(out)
        return self._cache[key]

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait(timeout=30)


@pytest.fixture(scope="session")
def stock_folder() -> Path:
    """Where the stock library is, built here if there is none."""
    folder = find_stock()
    if folder is None:
        # a folder of its own: a library in build/dev/lib would be taken for the developer's
        done = subprocess.run([sys.executable, str(ROOT / "native" / "build.py"), "--only-stock",
                               "--dir", str(ROOT / "build" / "oracle")],
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        assert done.returncode == 0, "the stock library could not be built:\n" + done.stdout[-3000:]
        folder = find_stock()
    return folder


@pytest.fixture(scope="session")
def llama_models(stock_folder) -> Path:
    """llama.cpp's own vocabulary-only files and chat templates, which the stock build leaves beside its library."""
    folders = [stock_folder / "models", *sorted(ROOT.glob("build/*/stock/models"))]
    folder = next((folder for folder in folders if (folder / "ggml-vocab-qwen2.gguf").is_file()), None)
    assert folder is not None, (
        f"{folders[0]} holds no vocabularies: a build of before they were kept, or of a source without them; make them with\n"
        "  python native/build.py --only-stock")
    return folder


@pytest.fixture(scope="session")
def stock(stock_folder, tmp_path_factory):
    worker = StockWorker(stock_folder, tmp_path_factory.mktemp("stock"))
    yield worker
    worker.close()


@pytest.fixture(scope="session")
def paths(tmp_path_factory) -> dict[str, Path]:
    return tiny_models.write_all(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="session")
def models(paths):
    """Loads a tiny model by name, once."""
    loaded: dict[str, libllama.LlamaModel] = {}

    def load(name: str) -> libllama.LlamaModel:
        if name not in loaded:
            loaded[name] = libllama.LlamaModel(paths[name])
        return loaded[name]

    yield load
    for model in loaded.values():
        model.close()


def random_tokens(n: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(3, 259, n).tolist()


def replay(context, ops: list) -> np.ndarray:
    """The operations of stock_worker on our library; what stock removes, ours pages out, if it pages."""
    rows = []
    for name, *args in ops:
        if name == "rm":
            seq, p0, p1 = args
            if context._zoomr:
                assert context.page_free(seq, p0, p1) > 0
            else:
                context.seq_rm(seq, p0, p1)
            continue
        tokens, positions, seq, logits = args
        context.decode(tokens, positions, seq=seq, logits=logits)
        if logits == "all":
            rows += [context.logits(i).copy() for i in range(len(tokens))]
        elif logits == "last":
            rows.append(context.logits().copy())
    return np.stack(rows)


def prompt_op(n: int, seed: int = 0, logits: str = "last", start: int = 0, seq: int = 0) -> list:
    return ["decode", random_tokens(n, seed), list(range(start, start + n)), seq, logits]


def step_ops(start: int, n: int, seed: int = 1, seq: int = 0) -> list[list]:
    """n single tokens from position ``start``."""
    return [["decode", [token], [start + i], seq, "last"] for i, token in enumerate(random_tokens(n, seed))]


def rel_rms(a: np.ndarray, b: np.ndarray) -> float:
    """Root mean square of the difference, relative to that of ``b``."""
    return float(np.sqrt(np.mean((a.astype(np.float64) - b) ** 2) / np.mean(b.astype(np.float64) ** 2)))
