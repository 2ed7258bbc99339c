"""Milliseconds per token at growing depth: stock llama.cpp with flash attention on and off, and zoomr end to end.

    python -m benchmarks.speed --stock DIR --json

DIR holds a libllama.so built from the same pinned source without the patch (`python native/build.py --stock`; one in
build/*/stock or $ZOOMR_STOCK_LIB is found by itself). A configuration is a process of its own; one computes at a
time, for a turn of some tokens, in a rotated order, for some rounds. A turn's figure is its mean, pagings and all; a
configuration's figure is the median of its turns, and a ratio is the median of the ratios within a round. zoomr runs
through the real engine: probe, votes, paging, sampling and Python are all in its time. Stock's time is
`llama_decode` and an argmax, no more.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks import make_model, report
from benchmarks.turns import ROOT, Worker, machine_cpu_seconds, process_cpu_seconds

BUSY_LOAD = 0.5  # one-minute load average above which the machine is not idle
LEAST_ROOM = 256  # tokens a context is made longer than its depth


class Bench:
    """The workers of one run and the turns they took."""

    def __init__(self, args: argparse.Namespace, model: Path) -> None:
        self.args, self.model = args, model
        self.workers: dict[str, Worker] = {}
        self.turns: list[tuple[str, int]] = []
        self.ms: dict[str, list[float]] = {}

    def start(self) -> dict[str, Any]:
        """Start and fill every configuration; what each worker says of itself, by name."""
        a = self.args
        common = {"model": str(self.model), "threads": a.threads, "room": max(LEAST_ROOM, a.turn)}
        stock = {"stock": ({"LLAMA_CPP_LIB_PATH": str(a.stock.resolve())}, sys.executable)}
        if a.released:
            stock["released"] = ({"LLAMA_CPP_LIB_PATH": None}, a.released)
        said = {}
        for kind, (env, python) in stock.items():
            for flash, label in ((True, "on"), (False, "off")):
                name = f"{kind}, FA {label}"
                options = {**common, "depths": a.depths, "flash": flash}
                said[name] = self._start(name, "benchmarks.stock", options, env, python)
        ours = {**common, "depths": [*a.depths, *a.deeper], "budget": a.budget, "rows": a.rows, "block": a.block,
                "zoomed": a.zoomed, "refresh": a.refresh, "flash": not a.zoomr_fa_off,
                "tiers": {"kv_ram": 16 << 30, "kv_disk": 0},  # of which as much is taken as the depth needs
                "reply": (a.turn + a.warm) * (a.rounds + 4) + a.share_tokens + 64}
        said["zoomr"] = self._start("zoomr", "benchmarks.ours", ours, {}, sys.executable)
        for name in self.workers:
            deeper = a.deeper if name == "zoomr" else []
            self.turns += [(name, depth) for depth in (*a.depths, *deeper)]
        return said

    def _start(self, name: str, module: str, options: dict, env: dict, python: str) -> Any:
        log = None if self.args.verbose else subprocess.DEVNULL
        tell(f"starting {name}")
        self.workers[name] = Worker(module, options, env, python, log)
        return self.workers[name].ask("prepare")

    def turn(self, name: str, depth: int) -> float:
        """Mean milliseconds per token of one turn, after its first few tokens."""
        seconds = self.workers[name].ask("turn", depth=depth, tokens=self.args.warm + self.args.turn)
        counted = seconds[self.args.warm:]
        return 1e3 * sum(counted) / len(counted)

    def run(self) -> float:
        """All rounds, after one that is thrown away; the cores that other processes kept busy meanwhile."""
        for name, depth in self.turns:
            self.turn(name, depth)
        mark = self._clock()
        for number in range(self.args.rounds):
            shift = number % len(self.turns)
            for name, depth in self.turns[shift:] + self.turns[:shift]:
                self.ms.setdefault(f"{name} @ {depth}", []).append(self.turn(name, depth))
            tell(f"round {number + 1} of {self.args.rounds}: " + self._last())
        wall, machine, own = (b - a for a, b in zip(mark, self._clock()))
        return max(0.0, machine - own) / wall

    def _last(self) -> str:
        return ", ".join(f"{name}@{depth} {self.ms[f'{name} @ {depth}'][-1]:.1f}" for name, depth in self.turns)

    def _clock(self) -> tuple[float, float, float]:
        own = process_cpu_seconds(os.getpid()) + sum(w.cpu_seconds() for w in self.workers.values())
        return datetime.datetime.now().timestamp(), machine_cpu_seconds(), own

    def close(self) -> None:
        """End every worker."""
        for worker in self.workers.values():
            worker.close()


def find_stock() -> Path | None:
    """The folder of the stock library that $ZOOMR_STOCK_LIB names, or one that native/build.py made; the newest."""
    if os.environ.get("ZOOMR_STOCK_LIB"):
        return Path(os.environ["ZOOMR_STOCK_LIB"])
    found = [f for f in ROOT.glob("build/*/stock/*llama.*") if f.suffix in (".so", ".dylib", ".dll")]
    return max(found, key=lambda f: f.stat().st_mtime).parent if found else None


def wait_for_idle(minutes: float) -> None:
    """Sleep until the machine's load average is below `BUSY_LOAD`, at most so long."""
    until = time.monotonic() + 60 * minutes
    while os.getloadavg()[0] > BUSY_LOAD and time.monotonic() < until:
        tell(f"load average {os.getloadavg()[0]:.2f}, waiting for {BUSY_LOAD}")
        time.sleep(min(15.0, max(0.0, until - time.monotonic())))


def tell(text: str) -> None:
    """Progress on stderr."""
    print(text, file=sys.stderr, flush=True)


def cores() -> int:
    """Cores this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def machine() -> dict[str, Any]:
    """What the figures depend on. ``busy`` says why they are not to be trusted, or is empty."""
    cpu = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    load = os.getloadavg()[0]
    return {
        "cpu": cpu, "cores": cores(), "system": f"{platform.system()} {platform.machine()}",
        "memory_gb": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9,
        "python": platform.python_version(), "load_before": load, "others_cores": 0.0,
        "busy": f"load average {load:.2f} before the start" if load > BUSY_LOAD else "",
    }


def commit() -> str:
    """The checkout's commit, with "+" if the library or the benchmarks differ from it; "unknown" outside git."""
    def git(*words: str) -> str:
        return subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True).stdout.strip()
    changed = git("status", "--porcelain", "--", "zoomr_local", "native", "benchmarks", ":!benchmarks/results")
    return (git("rev-parse", "--short=10", "HEAD") or "unknown") + ("+" if changed else "")


def command(argv: list[str], module: str = "speed") -> str:
    """The command line with every path cut to its last part."""
    return " ".join([f"python -m benchmarks.{module}", *(a.rstrip("/").rsplit("/", 1)[-1] for a in argv)])


def options(argv: list[str]) -> argparse.Namespace:
    """Parse and check the command line."""
    p = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    p.add_argument("--shape", choices=make_model.SHAPES, default="1.5b", help="a random-weight model of this shape")
    p.add_argument("--model", type=Path, help="a GGUF file instead")
    p.add_argument("--stock", type=Path, default=find_stock(), help="folder of the unpatched library of the same source")
    p.add_argument("--released", help="a Python interpreter whose own llama-cpp-python is measured too")
    p.add_argument("--threads", type=int, default=cores())
    p.add_argument("--depths", type=int, nargs="+", default=[1024, 8192, 32768], help="logical tokens")
    p.add_argument("--deeper", type=int, nargs="*", default=[], help="depths for zoomr only, such as 131072")
    p.add_argument("--rounds", type=int, default=15)
    p.add_argument("--turn", type=int, default=16, help="counted tokens of a turn; a multiple of --refresh")
    p.add_argument("--warm", type=int, default=2, help="tokens at a turn's start that are not counted")
    p.add_argument("--budget", type=int, default=1024, help="tokens in cells, zoomr")
    p.add_argument("--rows", type=int, default=200, help="index rows that the probe scores, at least")
    p.add_argument("--block", type=int, default=200, help="tokens of a block")
    p.add_argument("--zoomed", type=int, default=2, help="blocks paged in, and out, at a refresh")
    p.add_argument("--refresh", type=int, default=8, help="tokens between refreshes")
    p.add_argument("--share-tokens", type=int, default=160, help="tokens over which Python's share is measured")
    p.add_argument("--wait", type=float, default=0, metavar="MINUTES", help="wait so long for an idle machine at most")
    p.add_argument("--zoomr-fa-off", action="store_true", help="run zoomr without flash attention")
    p.add_argument("--json", nargs="?", type=Path, const=Path("."),
                   help="write the result here (default: benchmarks/results/)")
    p.add_argument("--write-docs", type=Path, nargs="+", metavar="JSON",
                   help="no run: put these results into docs/benchmarks.md")
    p.add_argument("--verbose", action="store_true", help="show the workers' stderr")
    args = p.parse_args(argv)
    if not args.write_docs and not args.stock:
        p.error("--stock DIR is needed: build it with python native/build.py --stock")
    if args.turn % args.refresh:
        p.error(f"--turn {args.turn} is not a multiple of --refresh {args.refresh}: turns would differ in pagings")
    return args


def measure(args: argparse.Namespace, model: Path, argv: list[str]) -> dict[str, Any]:
    """One whole run; the result that is written as JSON."""
    wait_for_idle(args.wait)
    host = machine()
    if host["busy"]:
        tell(f"The machine is busy ({host['busy']}); the figures will say so.")
    bench = Bench(args, model)
    try:
        said = bench.start()
        host["others_cores"] = bench.run()
        tally = bench.workers["zoomr"].ask("tally")
        probe = bench.workers["zoomr"].ask("probe", depth=max(args.depths), tokens=args.turn, rounds=args.rounds)
        share = bench.workers["zoomr"].ask("share", depth=max(args.depths), tokens=args.share_tokens)
    finally:
        bench.close()
    if host["others_cores"] > 0.1 and not host["busy"]:
        host["busy"] = f"other processes used {host['others_cores']:.2f} cores"
    ms = {key: report.spread(values) for key, values in bench.ms.items()}
    ours = said["zoomr"]
    return {
        "benchmark": "speed", "date": datetime.date.today().isoformat(), "commit": commit(), "command": command(argv),
        "machine": host, "threads": args.threads, "model": ours["model"], "workers": said,
        "settings": {"rounds": args.rounds, "turn_tokens": args.turn, "warm_tokens": args.warm,
                     "budget_tokens": args.budget, "block_tokens": args.block, "index_rows": args.rows,
                     "zoomed_blocks": args.zoomed, "refresh_tokens": args.refresh, "zoomr_fa": ours["flash"]},
        "tally": tally, "ms_per_token": ms, "claims": [*report.claims(ms, args.depths), *report.own_claims(probe, share)],
        "probe": probe, "python_share": share,
    }


def main(argv: list[str] | None = None) -> int:
    """Run, print the report, and write the JSON if asked."""
    argv = sys.argv[1:] if argv is None else argv
    args = options(argv)
    if args.write_docs:
        report.write_docs(ROOT / "docs" / "benchmarks.md", args.write_docs)
        return 0
    model = args.model or Path(tempfile.gettempdir()) / f"zoomr-random-{args.shape}.gguf"
    if not model.exists():
        make_model.write_model(model, args.shape, make_model.SHAPES[args.shape])
    result = measure(args, model, argv)
    print(report.render(result))
    if args.json:
        path = args.json if args.json.suffix == ".json" else ROOT / "benchmarks" / "results" / f"speed-{args.shape}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result, indent=1) + "\n")
        tell(f"written: {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
