"""Milliseconds per token with a per-head store against the uniform cache, both full, and against stock llama.cpp at depth.

    python -m benchmarks.heads --wait 5 --deep 32768 --stock DIR --json
    python -m benchmarks.heads --write-docs benchmarks/results/stores-1.5b.json

One process, one computing at a time, in turns whose order rotates, as in `benchmarks.speed`. Every configuration is filled
with a real prefill to its budget; then each turn frees as many tokens as it decodes, so that attention always runs over
a full budget. In the uniform cache the oldest tokens leave, in the stores random ones of each layer and head.
Sampling and policies are not part of it. With ``--deep`` stock llama.cpp (as in `benchmarks.speed`, a process of its own each with
flash attention on and off) takes its turns in the same rounds, with so many tokens in its cache: what a text of that
length costs where nothing ever leaves. Nothing is compared with another run's figures: ratios are taken within a round.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import heads_report, make_model, report, speed
from benchmarks.turns import ROOT, Worker, machine_cpu_seconds, process_cpu_seconds
from zoomr_local.libllama import LlamaContext, LlamaModel
from zoomr_local.libllama.heads import HeadStore

UBATCH_TOKENS = 128
STORES: dict[str, dict[str, Any]] = {
    "heads": {},
    "heads, queries": {"observe": 8, "weights": False},
    "heads, weights and queries": {"observe": 8},
    "heads, one pool a layer": {"share": True},
}


class Filled:
    """A context whose ``budget`` cells are all taken but those of the next turn."""

    def __init__(self, model: LlamaModel, store: dict[str, Any] | None, args: argparse.Namespace) -> None:
        self.args, self.rng = args, np.random.default_rng(0)
        batch = min(UBATCH_TOKENS, args.budget)
        self.context = LlamaContext(model, n_cells=batch if store is not None else args.budget, n_batch=batch, n_ubatch=batch,
                                    n_threads=args.threads, flash_attn=not args.fa_off, paging=store is None)
        self.store = None if store is None else HeadStore(self.context, args.budget, **store)
        self.tokens = np.random.default_rng(1).integers(3, model.n_vocab, args.budget).tolist()
        for start in range(0, args.budget, batch):
            piece = self.tokens[start:start + batch]
            self.context.decode(piece, range(start, start + len(piece)))
        self.position = args.budget

    def free(self, n_tokens: int) -> None:
        """Free the cells of so many tokens, in every layer and head."""
        if self.store is None:
            oldest = self.context.resident()[:n_tokens]
            self.context.page_free(0, int(oldest[0]), int(oldest[-1]) + 1)
            return
        for layer in range(self.store.n_layers):
            for head in range(self.store.n_head_kv):
                cells = self.store.resident(layer, head)[0]
                self.store.evict(layer, head, self.rng.choice(cells, n_tokens, replace=False))

    def turn(self) -> tuple[float, float]:
        """(mean milliseconds of a decoded token after the first few, milliseconds of freeing a turn's cells)."""
        a = self.args
        start = time.perf_counter()
        self.free(a.warm + a.turn)
        freed, seconds = time.perf_counter() - start, []
        for i in range(a.warm + a.turn):
            start = time.perf_counter()
            self.context.decode([self.tokens[i % len(self.tokens)]], [self.position])
            seconds.append(time.perf_counter() - start)
            self.position += 1
        return 1e3 * sum(seconds[a.warm:]) / a.turn, 1e3 * freed


class Deep:
    """Stock llama.cpp with ``args.deep`` tokens in its cache, in a process of its own."""

    def __init__(self, model: Path, flash: bool, args: argparse.Namespace) -> None:
        self.args = args
        room = max(speed.LEAST_ROOM, args.warm + args.turn)
        options = {"model": str(model), "threads": args.threads, "room": room, "depths": [args.deep], "flash": flash}
        self.worker = Worker("benchmarks.stock", options, {"LLAMA_CPP_LIB_PATH": str(args.stock.resolve())})
        self.worker.ask("prepare")

    def turn(self) -> tuple[float, float]:
        """As `Filled.turn`; nothing is freed."""
        seconds = self.worker.ask("turn", depth=self.args.deep, tokens=self.args.warm + self.args.turn)
        return 1e3 * sum(seconds[self.args.warm:]) / self.args.turn, 0.0


def options(argv: list[str]) -> argparse.Namespace:
    """Parse and check the command line."""
    p = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    p.add_argument("--shape", choices=make_model.SHAPES, default="1.5b", help="a random-weight model of this shape")
    p.add_argument("--model", type=Path, help="a GGUF file instead")
    p.add_argument("--budget", type=int, default=1024, help="cells a KV head")
    p.add_argument("--threads", type=int, default=speed.cores())
    p.add_argument("--rounds", type=int, default=15)
    p.add_argument("--turn", type=int, default=16, help="counted tokens of a turn")
    p.add_argument("--warm", type=int, default=2, help="tokens at a turn's start that are not counted")
    p.add_argument("--deep", type=int, default=0, metavar="TOKENS", help="also stock llama.cpp with so many tokens in its cache")
    p.add_argument("--stock", type=Path, default=speed.find_stock(), help="directory of the stock library, for --deep")
    p.add_argument("--fa-off", action="store_true", help="without flash attention")
    p.add_argument("--wait", type=float, default=0, metavar="MINUTES", help="wait so long for an idle machine at most")
    p.add_argument("--json", nargs="?", type=Path, const=Path("."), help="write the result here (default: benchmarks/results/)")
    p.add_argument("--write-docs", type=Path, nargs="+", metavar="JSON", help="no run: put these results into docs/benchmarks.md")
    args = p.parse_args(argv)
    if args.turn + args.warm > args.budget:
        p.error(f"a turn of {args.warm} + {args.turn} tokens does not fit into a budget of {args.budget}")
    if args.deep and not args.stock:
        p.error("--deep needs the stock library: python native/build.py --stock")
    return args


def measure(args: argparse.Namespace, model: LlamaModel) -> dict[str, Any]:
    """The result that is written as JSON, without what it ran on."""
    runs: dict[str, Filled | Deep] = {"uniform": Filled(model, None, args)}
    runs |= {name: Filled(model, store, args) for name, store in STORES.items()}
    deep = {f"stock at {args.deep}, FA {'on' if flash else 'off'}": flash for flash in (True, False)} if args.deep else {}
    runs |= {name: Deep(model.path, flash, args) for name, flash in deep.items()}
    names, mark = list(runs), (0.0, 0.0, 0.0)
    ms: dict[str, list[float]] = {name: [] for name in names}
    freed: dict[str, list[float]] = {name: [] for name in names}
    for number in range(-1, args.rounds):  # the first round is thrown away
        if number == 0:
            mark = clock(runs[name].worker for name in deep)
        shift = number % len(names)
        for name in names[shift:] + names[:shift]:
            token, free = runs[name].turn()
            if number >= 0:
                ms[name].append(token)
                freed[name].append(free)
        speed.tell(f"round {number + 1} of {args.rounds}")
    wall, machine, own = (b - a for a, b in zip(mark, clock(runs[name].worker for name in deep)))
    for name in deep:
        runs[name].worker.close()
    best = min(deep, key=lambda name: report.spread(ms[name])["median"], default=None)
    return {"others_cores": max(0.0, machine - own) / wall, "ms_per_token": {n: report.spread(v) for n, v in ms.items()},
            "over_uniform": {name: report.ratio(ms[name], ms["uniform"]) for name in STORES},
            "stock_best": best, "stock_over": {name: report.ratio(ms[best], ms[name]) for name in STORES if best},
            "ms_freeing_a_turn": {n: report.spread(v) for n, v in freed.items() if n not in deep},
            "kv_bytes": {n: runs[n].store.kv_bytes for n in STORES}}


def clock(workers: Iterable[Worker]) -> tuple[float, float, float]:
    """Seconds: now, of processor time of the machine, and of this process and its ``workers``."""
    own = process_cpu_seconds(os.getpid()) + sum(worker.cpu_seconds() for worker in workers)
    return time.time(), machine_cpu_seconds(), own


def main(argv: list[str] | None = None) -> int:
    """Run, print a table, and write the JSON if asked."""
    argv = sys.argv[1:] if argv is None else argv
    args = options(argv)
    if args.write_docs:
        heads_report.write_docs(ROOT / "docs" / "benchmarks.md", args.write_docs)
        return 0
    path = args.model or Path(tempfile.gettempdir()) / f"zoomr-random-{args.shape}.gguf"
    if not path.exists():
        make_model.write_model(path, args.shape, make_model.SHAPES[args.shape])
    speed.wait_for_idle(args.wait)
    host = speed.machine()
    with LlamaModel(path) as model:
        result = measure(args, model)
    host["others_cores"] = result.pop("others_cores")
    if host["others_cores"] > 0.1 and not host["busy"]:
        host["busy"] = f"other processes used {host['others_cores']:.2f} cores"
    if host["busy"]:
        print(f"The machine is busy ({host['busy']}): these figures say nothing.")
    for name, figures in result["ms_per_token"].items():
        ratio = result["over_uniform"].get(name)
        tail = f", {ratio['median']:.3f} of uniform ({ratio['min']:.3f} to {ratio['max']:.3f})" if ratio else ""
        deep = result["stock_over"].get(name)
        tail += f", {result['stock_best']} {deep['median']:.2f} times as long ({deep['min']:.2f} to {deep['max']:.2f})" if deep else ""
        print(f"{name}: {figures['median']:.2f} ms a token ({figures['min']:.2f} to {figures['max']:.2f}){tail}")
    if args.json:
        target = args.json if args.json.suffix == ".json" else ROOT / "benchmarks" / "results" / f"stores-{args.shape}.json"
        settings = {"budget_tokens": args.budget, "deep_tokens": args.deep, "rounds": args.rounds, "turn_tokens": args.turn, "flash": not args.fa_off}
        whole = {"benchmark": "heads", "date": datetime.date.today().isoformat(), "commit": speed.commit(), "command": speed.command(argv, "heads"), "machine": host,
                 "threads": args.threads, "model": path.name, "settings": settings, **result}
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(json.dumps(whole, indent=1) + "\n")
        speed.tell(f"written: {target}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
