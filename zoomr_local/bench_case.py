"""One case of `zoomr bench`, measured: a policy at a depth, in a process of its own.

    python -m zoomr_local.bench_case '{"model": ..., ...}'

`bench.py` starts it and reads JSON lines from its stdout: progress, and at last the result. The process is the
unit because its memory is part of the figure. Times are seconds, sizes bytes or tokens.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from . import bench_meter, machine
from .bench_depth import STATE_TOKENS, Deep, drain, open_deep
from .engine import Engine, EngineConfig
from .errors import UnsupportedModel, ZoomrError
from .libllama import LlamaContext, gpus
from .libllama.devices import usable_cores
from .model import Model

WARM_TOKENS = 8
MARGIN_BYTES = 256 << 20  # compute buffers and everything else, beside weights and cells
CALIBRATION_TOKENS = 4096  # the depth of the second point of an estimate
COMPUTED_CALIBRATION_TOKENS = 1024  # the same, where every token on the way to it must be computed
MEASURED, TOO_BUSY, NO_ROOM, UNSUPPORTED, FAILED = "measured", "busy", "does not fit", "unsupported", "failed"

Say = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Case:
    """What is measured. ``way`` is how the depth is reached (`bench_depth.WAYS`); ``config`` are fields of EngineConfig."""

    model: str
    policy: str
    depth: int
    way: str = "text"
    prompt_tokens: int = 512
    gen_tokens: int = 128
    repetitions: int = 3
    n_gpu_layers: int = 0
    config: dict[str, Any] = field(default_factory=dict)

    def engine_config(self) -> EngineConfig:
        """Raises UsageError for settings that are none."""
        config = dict(self.config)
        if config.get("kv_dir"):
            config["kv_dir"] = Path(config["kv_dir"])
        return EngineConfig(policy=self.policy, **config)

    @property
    def full_cells(self) -> int:
        """Cells that policy ``full`` needs: the depth, what is measured there, and a little; at least as many as the
        tokens it decodes, because they bound the reply."""
        at_depth = max(self.depth, STATE_TOKENS) + max(self.prompt_tokens, self.gen_tokens)
        return max(at_depth, self.repetitions * self.gen_tokens) + WARM_TOKENS + 64


class Pauses:
    """How long decoding stood still for paging: the cache's moves, timed one by one while this is ``on``.

    Not while text is prefilled: the moves of a piece of hundreds of tokens are no pause of any token."""

    def __init__(self, cache: Any) -> None:
        self.on = False
        self.seconds: dict[str, list[float]] = {"in": [], "out": []}
        self.blocks = {"in": 0, "out": 0}
        cache._page_in = self._timed("in", cache._page_in)
        cache._page_out = self._timed("out", cache._page_out)

    def _timed(self, way: str, move: Callable[..., Any]) -> Callable[..., Any]:
        def timed(part: str, blocks: Any) -> Any:
            start = time.perf_counter()
            event = move(part, blocks)
            if self.on:
                self.seconds[way].append(time.perf_counter() - start)
                self.blocks[way] += len(blocks)
            return event

        return timed

    def during(self, decode: Callable[[int], float], tokens: int) -> float:
        """What ``decode`` answers for ``tokens``, with this on meanwhile."""
        self.on = True
        try:
            return decode(tokens)
        finally:
            self.on = False


def measure(case: Case, say: Say) -> dict[str, Any]:
    """Everything of one case: ``status``, its ``reason``, ``tests``, ``memory``, ``paging``; see docs/bench.md.

    Raises nothing that a user can cause: a case that cannot be measured says so in its status.
    """
    result: dict[str, Any] = {**asdict(case), "status": FAILED, "reason": "", "warnings": [], "tests": []}
    try:
        result.update(_measured(case, say))
    except UnsupportedModel as error:
        result.update(status=UNSUPPORTED, reason=str(error))
    except MemoryError as error:
        result.update(status=NO_ROOM, reason=f"memory ran out: {error}" if str(error) else "memory ran out")
    except ZoomrError as error:
        result.update(status=FAILED, reason=str(error))
    return result


def _measured(case: Case, say: Say) -> dict[str, Any]:
    config = case.engine_config()
    free_bytes = machine.memory().free_bytes
    say("loading", 0, 1)
    model = Model.open(case.model, n_gpu_layers=case.n_gpu_layers)
    facts = about(model, case, config)
    if case.policy == "full" and not case.n_gpu_layers:
        reason = no_room(case, model, free_bytes)
        if reason:
            return {**facts, "status": NO_ROOM, "reason": reason}
    engine = Engine(model, config)
    try:
        deep = open_deep(engine, _reply_tokens(case))
        pauses = Pauses(deep.cache)
        start = time.perf_counter()
        deep.reach(case.depth, case.way, lambda done, total: say("reaching the depth", done, total))
        reached = time.perf_counter() - start
        whole_peak = bench_meter.memory().peak_bytes
        reset = bench_meter.reset_peak()
        tests = [_decode(deep, case, say, pauses), _prefill(deep, case, say)]
        return {
            **facts, "status": MEASURED, "tests": tests, "reach_seconds": reached, "warnings": deep.warnings,
            "memory": _memory(deep, reset, whole_peak), "paging": _paging(deep, pauses),
        }  # fmt: skip
    finally:
        engine.close()
        model.close()


def about(model: Model, case: Case, config: EngineConfig) -> dict[str, Any]:
    """What llama-bench says of a model and a run, in its words."""
    devices = [gpu.device for gpu in gpus()] if case.n_gpu_layers else []
    return {
        "model_name": model.name, "model_type": model.llama.desc, "model_size_bytes": model.size_bytes,
        "model_params": model.llama.n_params, "backend": ",".join(devices) or "CPU",
        "threads": config.threads or usable_cores(), "type_k": config.kv_type, "type_v": config.kv_type,
        "flash_attn": config.flash_attn,
    }  # fmt: skip


def no_room(case: Case, model: Model, free_bytes: int) -> str:
    """Why the full cache of ``case`` does not fit ``free_bytes`` (before the model was loaded), or empty."""
    context = LlamaContext(model.llama, n_cells=256, n_batch=16, n_ubatch=16, n_threads=1, paging=False,
                           type_k=case.config.get("kv_type", "f16"), type_v=case.config.get("kv_type", "f16"))
    cache_bytes = context.token_bytes * case.full_cells
    context.close()
    copies = 2 if case.way == "planted" and case.depth > STATE_TOKENS else 1
    need = cache_bytes * copies + model.size_bytes + MARGIN_BYTES
    if need <= free_bytes:
        return ""
    gib = 2**30
    twice = " (twice while it is planted)" if copies > 1 else ""
    return (f"the full cache of {case.full_cells:,} tokens takes {cache_bytes / gib:.2f} GiB{twice}, the weights "
            f"{model.size_bytes / gib:.2f} GiB; {free_bytes / gib:.2f} GiB are free")


def _reply_tokens(case: Case) -> int:
    if case.policy == "full":
        return case.full_cells
    return case.depth + WARM_TOKENS + case.repetitions * (case.gen_tokens + case.prompt_tokens) + 64


def _decode(deep: Deep, case: Case, say: Say, pauses: Pauses) -> dict[str, Any]:
    deep.decode(WARM_TOKENS)
    return _repeat("tg", case.gen_tokens, partial(pauses.during, deep.decode), deep, case, say)


def _prefill(deep: Deep, case: Case, say: Say) -> dict[str, Any]:
    return _repeat("pp", case.prompt_tokens, deep.prefill, deep, case, say)


def _repeat(
    test: str, tokens: int, run: Callable[[int], float], deep: Deep, case: Case, say: Say
) -> dict[str, Any]:
    seconds, depths = [], []
    meter = bench_meter.Meter()
    for number in range(case.repetitions):
        say(f"{test}{tokens}", number, case.repetitions)
        deep.rewind(case.depth)
        depths.append(deep.tokens)
        seconds.append(run(tokens))
    busy = meter.stop()
    return {"test": test, "tokens": tokens, "seconds": seconds, "depths": depths,
            "others_cores": busy.others_cores, "busy": busy.reason}


def _memory(deep: Deep, reset: bool, whole_peak: int) -> dict[str, Any]:
    now = bench_meter.memory()
    uses = deep.context.memory_use()
    stats = asdict(deep.running._stats())
    index = sum(use.index_bytes for use in uses)
    rows = (deep.context.n_rows, deep.context.n_rows_max) if index else (0, 1)
    return {
        "rss_peak_bytes": now.peak_bytes, "rss_peak_is": "phase" if reset else "process",
        "rss_peak_process_bytes": max(whole_peak, now.peak_bytes), "rss_anonymous_bytes": now.anonymous_bytes,
        "kv_bytes": sum(use.kv_bytes for use in uses),
        # rows that were never written are allocated, but no memory stands behind them yet
        "index_bytes": index * rows[0] // rows[1], "index_allocated_bytes": index,
        "compute_bytes": sum(use.compute_bytes for use in uses), "token_bytes": deep.context.token_bytes,
        "cells": deep.context.n_cells, "resident_peak_tokens": deep.cache.peak_tokens,
        "ram_bytes": stats["ram_bytes"], "disk_bytes": stats["disk_bytes"],
    }  # fmt: skip


def _paging(deep: Deep, pauses: Pauses) -> dict[str, Any]:
    drain(deep.cache.flush())  # or what is on its way to disk would count as not written
    stats = asdict(deep.running._stats())
    return {
        "logical_tokens": deep.tokens, "blocks": stats["blocks"], "page_outs": stats["page_outs"],
        "page_ins": stats["page_ins"], "disk_written_bytes": stats["disk_written_bytes"],
        "disk_read_bytes": stats["disk_read_bytes"], "lost_blocks": stats["lost_blocks"], "faults": stats["faults"],
        "dropped_tokens": stats["dropped_tokens"],
        **{f"page_{way}_seconds": pauses.seconds[way] for way in ("in", "out")},
        **{f"page_{way}_blocks": pauses.blocks[way] for way in ("in", "out")},
    }  # fmt: skip


# ---------------------------------------------------------------- an estimate, from two points


def calibrate(case: Case, say: Say) -> dict[str, Any]:
    """Seconds per token of prefill and decoding, near 0 and at a depth, with everything in cells; and loading.

    A few tokens each: good for saying whether it will be minutes or hours.
    """
    start = time.perf_counter()
    say("loading", 0, 1)
    model = Model.open(case.model, n_gpu_layers=case.n_gpu_layers)
    threads = {k: v for k, v in case.config.items() if k in ("threads", "flash_attn", "kv_type")}
    config = EngineConfig(policy="full", **threads)
    facts = about(model, case, config)
    loaded = time.perf_counter() - start
    engine = Engine(model, config)
    deep = open_deep(engine, CALIBRATION_TOKENS + 256)
    points = []
    way, last = ("planted", CALIBRATION_TOKENS) if deep.plantable else ("text", COMPUTED_CALIBRATION_TOKENS)
    for depth in (STATE_TOKENS, last):
        say("timing a few tokens at a depth", depth, last)
        deep.reach(depth, way)
        deep.decode(1)
        decode = deep.decode(3) / 3
        points.append({"depth": depth, "prefill": deep.prefill(64) / 64, "decode": decode})
    token_bytes = deep.context.token_bytes
    engine.close()
    model.close()
    return {**facts, "load_seconds": loaded, "points": points, "token_bytes": token_bytes}


# ---------------------------------------------------------------- the process


def main(argv: list[str] | None = None) -> int:
    """``measure`` or ``calibrate``, then a case as JSON. Lines on stdout: {"progress": ...} and one {"result": ...}."""
    what, text = sys.argv[1:] if argv is None else argv
    lines = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever libraries print stays out of the pipe

    def say(phase: str, done: int, total: int) -> None:
        print(json.dumps({"progress": [phase, done, total]}), file=lines, flush=True)

    given = json.loads(text)
    case = Case(**{**given, "model": str(Path(given["model"]))})
    result = {"measure": measure, "calibrate": calibrate}[what](case, say)
    print(json.dumps({"result": result}), file=lines, flush=True)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except ZoomrError as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)
    except (BrokenPipeError, KeyboardInterrupt):
        os._exit(130)  # nobody is left to tell, or the parent says it
