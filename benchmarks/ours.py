"""A worker that decodes through the real engine: probe, votes, paging, sampling and Python are all in its time."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.planted import Busiest, DeepGeneration
from benchmarks.report import spread
from benchmarks.stopwatch import watching
from benchmarks.turns import serve
from zoomr_local import bench_meter, libllama
from zoomr_local.block_index import BlockIndex
from zoomr_local.engine import Engine, EngineConfig
from zoomr_local.kv_cache import KVCache
from zoomr_local.libllama import library
from zoomr_local.model import Model

DECODE = "llama_decode"


def describe(model: Model) -> str:
    """One line: architecture, shape, size."""
    keys = ("block_count", "embedding_length", "attention.head_count", "attention.head_count_kv")
    layers, width, heads, kv_heads = (model.llama.meta(f"{model.arch}.{key}") for key in keys)
    return (f"{model.name}, {model.arch}, {layers} layers, width {width}, {heads} heads over {kv_heads}, "
            f"{model.llama.n_vocab} tokens, {model.size_bytes / 1e6:.0f} MB")


def tier_settings(given: dict[str, Any]) -> dict[str, Any]:
    """Fields of EngineConfig from their JSON form: a directory is a path there."""
    return {key: (Path(value) if value else None) if key == "kv_dir" else value for key, value in given.items()}


def native_parts() -> list[tuple[Any, str, str]]:
    """The library's own functions that a step calls, by the part they are charged to."""
    llama, zoomr = library.llama, library.zoomr
    pages = ("page_tokens", "page_bytes", "page_write", "page_free", "page_in")
    return [
        (llama, "llama_decode", DECODE),
        (llama, "llama_sampler_sample", "sampling, native"),
        *((zoomr, name, "paging, native") for name in pages),
        (zoomr, "rows_mean", "index rows of closed blocks, native"),
    ]


def python_parts() -> list[tuple[Any, str, str]]:
    """Our functions that a step calls; what no part claims is bookkeeping."""
    return [
        (libllama.LlamaSampler, "sample", "sampling, Python"),
        (BlockIndex, "vote", "votes"),
        (BlockIndex, "add", "index rows of closed blocks, Python"),
        (Busiest, "select", "selection"),
        (KVCache, "_page_out", "paging, Python"),
        (KVCache, "_page_in", "paging, Python"),
    ]


class Ours:
    """One model, an engine and a generation for every depth."""

    def __init__(self, options: dict[str, Any]) -> None:
        self.options = options
        self.deep: dict[int, DeepGeneration] = {}

    def prepare(self) -> dict[str, Any]:
        """Load the model and plant every depth; what to say of it beside the figures."""
        o = self.options
        self.model = Model.open(o["model"])
        config = EngineConfig(policy="zoomr", kv_budget=o["budget"], threads=o["threads"], flash_attn=o["flash"],
                              refresh=o["refresh"], zoomed_blocks=o["zoomed"], **tier_settings(o.get("tiers", {})))
        for depth in o["depths"]:
            engine = Engine(self.model, config)
            self.deep[depth] = DeepGeneration(engine, depth, o["block"], o["rows"], o["reply"], o.get("hold", 1))
        bench_meter.reset_peak()  # planting holds a page of its own
        return {"model": describe(self.model), "flash": o["flash"], "settings": engine.resolved()}

    def turn(self, depth: int, tokens: int) -> list[float]:
        """Seconds of each of the next ``tokens`` steps."""
        return self.deep[depth].turn(tokens)

    def tally(self) -> dict[str, dict[str, Any]]:
        """What each depth's turns did."""
        return {str(depth): deep.tally() for depth, deep in self.deep.items()}

    def memory(self, depth: int) -> dict[str, Any]:
        """What the process and the caches of ``depth`` hold, in bytes; the process's peak is since all depths were planted."""
        run = self.deep[depth].running
        uses = run.context.memory_use()
        return {**asdict(bench_meter.memory()), "cells_bytes": sum(use.kv_bytes for use in uses),
                "index_bytes": sum(use.index_bytes for use in uses), "token_bytes": run.context.token_bytes,
                "cells": run.context.n_cells, "cache": asdict(run._stats())}

    def probe(self, depth: int, tokens: int, rounds: int) -> dict[str, Any]:
        """Milliseconds of a decode with and without the probe, by turns, always over the same cells."""
        on, off = [], []
        deep = self.deep[depth]
        rows = self.options["rows"]
        for number in range(2 * (rounds + 1)):
            probing = number % 4 in (0, 3)
            seconds = deep.decode_only(tokens + 2, rows if probing else 0)[2:]
            if number > 1:
                (on if probing else off).append(1e3 * sum(seconds) / tokens)
        return {"rows": rows, "depth": depth, "on_ms": spread(on), "off_ms": spread(off),
                "overhead": spread([a / b - 1 for a, b in zip(on, off)])}

    def share(self, depth: int, tokens: int) -> dict[str, Any]:
        """What a step spends outside `llama_decode`, by part, in microseconds a token, over turns of 16 tokens."""
        native = {part for _, _, part in native_parts()}
        steps, parts = [], []
        for _ in range(max(1, tokens // 16)):
            with watching([*native_parts(), *python_parts()]) as watch:
                steps.append(sum(self.deep[depth].turn(16)) / 16 * 1e6)
            parts.append({part: seconds / 16 * 1e6 for part, seconds in watch.seconds.items()})
            parts[-1]["bookkeeping"] = steps[-1] - sum(parts[-1].values())
        outside = [step - p[DECODE] for step, p in zip(steps, parts)]
        python = [step - sum(p[name] for name in native) for step, p in zip(steps, parts)]
        return {
            "depth": depth, "step_us": spread(steps),
            "parts_us": {name: spread([p[name] for p in parts]) for name in parts[0]},
            "outside": spread([a / b for a, b in zip(outside, steps)]),
            "python": spread([a / b for a, b in zip(python, steps)]),
        }


def main() -> None:
    """Options (JSON): model, threads, flash, depths, budget, rows, block, zoomed, refresh, reply, and perhaps tiers (fields of EngineConfig) and
    hold (refreshes that a choice stands for)."""
    ours = Ours(json.loads(sys.argv[1]))
    serve({name: getattr(ours, name) for name in ("prepare", "turn", "tally", "memory", "probe", "share")})


if __name__ == "__main__":
    main()
