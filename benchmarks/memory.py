"""Memory and speed with the tiers on: 32k and 128k logical tokens, f16 pages to disk, q8_0 pages in RAM.

    python -m benchmarks.memory tiers --wait 10    # 1.5B shape: memory and speed at 1k, 32k, 128k, stock in turns
    python -m benchmarks.memory pages --wait 10    # logits with q8_0 pages against f16 pages
    python -m benchmarks.memory long --wait 10     # 131,072 tokens, every one decoded, on a small shape
    python -m benchmarks.memory --write-docs

Each part writes itself into benchmarks/results/memory.json. Ctrl-C at any moment: the same command goes on where it
was. `--quick` is a tiny model and small sizes, for trying it out; it writes nothing without `--json FILE`.
"""

from __future__ import annotations

import argparse
import datetime
import json
import subprocess
import sys
import tempfile
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from benchmarks import make_model, memory_report, tiers
from benchmarks.journal import Journal
from benchmarks.speed import commit, cores, find_stock, machine, tell, wait_for_idle
from benchmarks.turns import ROOT, Worker
from zoomr_local import bench_meter

PARTS = ("tiers", "pages", "long")
RESULT = ROOT / "benchmarks" / "results" / "memory.json"
DOCS = ROOT / "docs" / "benchmarks.md"
MIB = 1 << 20
BUNDLED = ROOT / "models" / "zoomr-tiny.gguf"


def options(argv: list[str]) -> argparse.Namespace:
    """Parse and check the command line."""
    p = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    p.add_argument("parts", nargs="*", metavar="PART", help=f"which of {', '.join(PARTS)} (default: all)")
    p.add_argument("--quick", action="store_true", help="a tiny model and small sizes: seconds instead of minutes")
    p.add_argument("--wait", type=float, default=0, metavar="MINUTES", help="wait so long for an idle machine at most")
    p.add_argument("--shape", choices=make_model.SHAPES, default="1.5b", help="of the tiers part and of the random pages")
    p.add_argument("--long-shape", choices=make_model.SHAPES, default="50m", help="of the long part")
    p.add_argument("--models", type=Path, default=Path(tempfile.gettempdir()), metavar="DIR", help="where random models are kept")
    p.add_argument("--stock", type=Path, default=find_stock(), help="folder of the unpatched library of the same source")
    p.add_argument("--threads", type=int, help="of the tiers part (default: one a core; the others use 1)")
    p.add_argument("--rounds", type=int, default=16, help="of the tiers part")
    p.add_argument("--budget", type=int, default=1024, help="tokens in cells")
    p.add_argument("--kv-ram", type=float, default=64, metavar="MIB", help="RAM tier beside the disk, tiers part")
    p.add_argument("--kv-dir", type=Path, help="where page files go (default: the user's cache folder)")
    p.add_argument("--long-tokens", type=int, default=131072)
    p.add_argument("--work", type=Path, default=ROOT / "build" / "bench", metavar="DIR", help="journals and sessions of unfinished runs")
    p.add_argument("--fresh", action="store_true", help="forget an unfinished run and begin again")
    p.add_argument("--json", type=Path, help=f"result file (default: {RESULT.relative_to(ROOT)})")
    p.add_argument("--write-docs", action="store_true", help="no run: put the results into docs/benchmarks.md")
    p.add_argument("--verbose", action="store_true", help="show the workers' stderr")
    args = p.parse_args(argv)
    unknown = set(args.parts) - set(PARTS)
    if unknown:
        p.error(f"no part {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    args.parts = args.parts or list(PARTS)
    if "tiers" in args.parts and not args.stock and not args.write_docs:
        p.error("--stock DIR is needed: build it with python native/build.py --stock")
    return args


def model_file(folder: Path, shape: str) -> Path:
    """The random-weight model of ``shape``, written if it is not there."""
    path = folder / f"zoomr-random-{shape}.gguf"
    if not path.exists():
        tell(f"writing a random-weight model, {shape}")
        make_model.write_model(path, shape, make_model.SHAPES[shape])
    return path


# ---------------------------------------------------------------- the parts


def run_tiers(args: argparse.Namespace, journal_of: Any) -> dict[str, Any]:
    """Items 1 and 2 of what must be shown, and the planted half of 3."""
    shape = "tiny" if args.quick else args.shape
    s = tiers.Setup(
        model=str(model_file(args.models, shape)), stock=str(args.stock), threads=args.threads or (1 if args.quick else cores()),
        budget=args.budget, near=1024, far=32768, farthest=131072, block=200, zoomed=2, refresh=8, turn=16, warm=2,
        rounds=args.rounds, ram_bytes=int(args.kv_ram * MIB), disk_bytes=8 << 30, kv_dir=str(args.kv_dir or ""),
    )  # fmt: skip
    if args.quick:
        s = replace(s, budget=384, near=512, far=2048, farthest=4096, block=64, turn=8, rounds=2, ram_bytes=MIB // 8, disk_bytes=64 * MIB)
    settings = asdict(s)
    journal = journal_of("tiers", settings)
    result = tiers.run(s, journal, tell, args.verbose)
    shown = {key: value for key, value in settings.items() if key not in ("model", "stock", "kv_dir")}
    return {"settings": shown, "shape": shape, **result}


def run_pages(args: argparse.Namespace, journal_of: Any) -> dict[str, Any]:
    """The other half of item 2: logits after zooming, with q8_0 pages against f16 pages."""
    shape = "tiny" if args.quick else args.shape
    demo = demo_prompts()
    threads = {"bundled": 1, "random": args.threads or (1 if args.quick else cores())}
    common = {"block": 64, "kv_ram": 1 << 30}
    cases = {
        "bundled": {"model": str(BUNDLED), "budget": 288, "tokens": 400 if args.quick else 2048, "scripted": False},
        "random": {"model": str(model_file(args.models, shape)), "budget": 384, "tokens": 500 if args.quick else 700, "scripted": True},
    }
    prompts = {"bundled": demo[: 1 if args.quick else 12], "random": ["How deep does this go?"]}
    types = ["q8_0", "q4_0"]
    journal = journal_of("pages", {"cases": cases, "prompts": prompts, "types": types})
    out: dict[str, Any] = {"settings": {"cases": {n: {**c, "model": Path(c["model"]).name} for n, c in cases.items()}}, "models": {}}
    log = None if args.verbose else subprocess.DEVNULL
    for name, case in cases.items():
        left = [(t, i) for t in types for i in range(len(prompts[name])) if f"{name} {t} {i}" not in journal]
        if left:
            worker = Worker("benchmarks.page_types", {**common, **case, "threads": threads[name]}, {}, sys.executable, log)
            try:
                journal.add(f"{name} model", worker.ask("prepare")["model"])
                for page_type, i in left:
                    tell(f"{name} model, {page_type} pages, prompt {i + 1} of {len(prompts[name])}")
                    journal.add(f"{name} {page_type} {i}", worker.ask("compare", prompt=prompts[name][i], page_type=page_type))
            finally:
                worker.close()
        out["models"][name] = journal[f"{name} model"]
        out[name] = {t: memory_report.page_summary([journal[f"{name} {t} {i}"] for i in range(len(prompts[name]))]) for t in types}
    return out


def demo_prompts() -> list[str]:
    """The bundled problems' texts."""
    from zoomr_models import demo_problems_path

    return [json.loads(line)["prompt"] for line in demo_problems_path().read_text().splitlines() if line.strip()]


def run_long(args: argparse.Namespace, journal_of: Any) -> dict[str, Any]:
    """The decoded half of item 3: every token of a very long thought, a window a time, saved on the way."""
    shape = "tiny" if args.quick else args.long_shape
    quick = args.quick
    settings = {
        "model": str(model_file(args.models, shape)), "threads": 1, "budget": 384 if quick else args.budget, "block": 64 if quick else 200,
        "refresh": 8, "zoomed": 2, "hold": 2, "tokens": 4096 if quick else args.long_tokens,
        "tiers": {"kv_ram": MIB // 8 if quick else 16 * MIB, "kv_disk": 4 << 30, "kv_dir": str(args.kv_dir or "")},
    }  # fmt: skip
    window, every = (256, 4) if quick else (1024, 16)
    journal = journal_of("long", {**settings, "window": window})
    session = journal.path.with_suffix(".session")
    windows = settings["tokens"] // window
    if f"window {windows - 1}" not in journal:
        log = None if args.verbose else subprocess.DEVNULL
        options = {**settings, "session": str(session)}
        worker, done = start_long(options, journal, log)
        near = Nearby(options, window, log)
        tell(f"{windows} windows of {window} tokens; {done} are done" if done else f"{windows} windows of {window} tokens")
        try:
            decode_long(worker, near, journal, done, windows, window, every)
        finally:
            worker.close()
            near.close()
    kept = [journal[f"window {n}"] for n in range(windows)]
    remove(session)
    shown = {**settings, "model": Path(settings["model"]).name, "window": window, "saved_every": every * window,
             "tiers": {key: value for key, value in settings["tiers"].items() if key != "kv_dir"}}
    return {"settings": shown, "shape": shape, "model": journal["said"]["model"], "token_bytes": journal["said"]["token_bytes"], "windows": kept}


def start_long(options: dict[str, Any], journal: Journal, log: Any) -> tuple[Worker, int]:
    """A worker at the last save, and how many windows that is; at the beginning if there is none."""
    saved = journal["saved"] if "saved" in journal else None
    while True:
        worker = Worker("benchmarks.long", options, {}, sys.executable, log)
        try:
            said = worker.ask("prepare", resume=saved)
        except BaseException:
            worker.close()
            raise
        journal.add("said", said)
        if saved is None or said["tokens"] == saved["tokens"]:
            return worker, saved["windows"] if saved else 0
        worker.close()  # ended between a save and its line in the journal
        tell(f"the saved session stands at {said['tokens']:,} tokens, the journal at {saved['tokens']:,}: beginning again")
        saved = None


class Nearby:
    """The same thought in a second process, where it is still short: what the last windows are compared with, in turns.

    A machine's speed drifts by more in a quarter of an hour than what the comparison has to see.
    """

    def __init__(self, options: dict[str, Any], window: int, log: Any) -> None:
        self.options, self.window_tokens, self.log = options, window, log
        self.worker: Worker | None = None

    def window(self) -> dict[str, Any]:
        """The next window, of those that follow the first ``ENDS``."""
        if self.worker is None:
            self.worker = Worker("benchmarks.long", self.options, {}, sys.executable, self.log)
            self.worker.ask("prepare", resume=None)
            for _ in range(memory_report.ENDS):
                self.worker.ask("window", tokens=self.window_tokens)
        found = self.worker.ask("window", tokens=self.window_tokens)
        return {key: found[key] for key in ("tokens", "ms", "others_cores", "rows")}

    def close(self) -> None:
        """End the process, if there is one."""
        if self.worker is not None:
            self.worker.close()


def decode_long(worker: Worker, near: Nearby, journal: Journal, done: int, windows: int, window: int, every: int) -> None:
    """The windows that are left, with a save after every few; the last ``ENDS`` in turns with windows near the beginning."""
    for number in range(done, windows):
        near_first = number % 2 == 0
        beside = near.window() if number >= windows - memory_report.ENDS and near_first else None
        found = worker.ask("window", tokens=window)
        if number >= windows - memory_report.ENDS and not near_first:
            beside = near.window()
        journal.add(f"window {number}", {**found, "resumed": bool(done) and number == done, "beside": beside})
        tell(f"{found['tokens']:,} tokens: {found['ms']:.2f} ms per token, peak {found['peak_bytes'] / MIB:.0f} MiB, "
             f"disk {found['disk_bytes'] / MIB:.0f} MiB")
        if (number + 1) % every == 0 and number + 1 < windows:
            journal.add("saved", {"windows": number + 1, **worker.ask("save")})


def remove(session: Path) -> None:
    """Forget a session of an unfinished run."""
    if session.is_dir():
        import shutil

        shutil.rmtree(session)


# ---------------------------------------------------------------- the run


def measure(args: argparse.Namespace, argv: list[str], path: Path | None) -> dict[str, Any]:
    """Run the parts that were asked for; each is written into ``path`` as soon as it is complete."""
    whole: dict[str, Any] = {"benchmark": "memory", "parts": {}}
    if path and path.exists():
        whole = json.loads(path.read_text())
    now = commit()
    for part in args.parts:
        wait_for_idle(args.wait)
        host = machine()
        busy = bench_meter.why_busy_now()
        host["busy"] = host["busy"] or busy
        if host["busy"]:
            tell(f"The machine is busy ({host['busy']}); the figures will say so.")
        journals: list[Journal] = []

        def journal_of(name: str, settings: dict[str, Any], kept: list[Journal] = journals) -> Journal:
            kept.append(Journal(args.work, name, settings, args.fresh, now))
            if kept[-1].pieces:
                tell(f"going on with an unfinished run of {name}; --fresh begins again")
            return kept[-1]

        found = {"tiers": run_tiers, "pages": run_pages, "long": run_long}[part](args, journal_of)
        host["others_cores"] = memory_report.others(found)
        if host["others_cores"] > bench_meter.BUSY_CORES and not host["busy"]:
            host["busy"] = f"other processes used up to {host['others_cores']:.2f} cores"
        whole["parts"][part] = {
            "date": datetime.date.today().isoformat(), "commit": now, "command": command(argv), "machine": host, **found,
        }  # fmt: skip
        commits = [name for journal in journals for name in journal.commits()]
        if any(name != now for name in commits):
            whole["parts"][part]["commits"] = list(dict.fromkeys(commits))
        if path:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(whole, indent=1) + "\n")
            tell(f"written: {path}")
        for journal in journals:
            journal.done()
    return whole


def command(argv: list[str]) -> str:
    """The command line with every path cut to its last part."""
    return " ".join(["python -m benchmarks.memory", *(a.rstrip("/").rsplit("/", 1)[-1] for a in argv)])


def main(argv: list[str] | None = None) -> int:
    """Run, print the report, write the JSON."""
    argv = sys.argv[1:] if argv is None else argv
    args = options(argv)
    path = args.json or (None if args.quick else RESULT)
    if args.write_docs:
        memory_report.write_docs(DOCS, path or RESULT)
        return 0
    try:
        whole = measure(args, argv, path)
    except KeyboardInterrupt:
        tell("interrupted; what is finished is kept, and the same command goes on")
        return 130
    print(memory_report.render({**whole, "parts": {part: whole["parts"][part] for part in args.parts}}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
