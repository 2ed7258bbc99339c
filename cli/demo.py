"""`zoomr demo`: the bundled problems under two policies, a table, and one problem with its blocks drawn."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import notes, options, tracing

if TYPE_CHECKING:
    from pathlib import Path

    from rich.console import Console

    from zoomr_local.solve import Problem, Tally

    from .blocks import Trace

DEMO_BUDGET = 652  # tokens: a quarter of what the bundled problems take
_MAX_TOKENS = 3900  # a third more than a bundled problem takes, within the trained length; a model that loops is cut off here
_MOST_COLUMNS = 100
_MOST_CHARS = 400  # of a question or a reply: about five lines


def demo(
    policy: Annotated[
        list[str] | None,
        typer.Option(
            "--policy", metavar="NAME", autocompletion=options.policy_names,
            help="Compare these (repeatable). Default: full and zoomr.",
        ),  # fmt: skip
    ] = None,
    kv_budget: Annotated[
        str, typer.Option("--kv-budget", metavar="TOKENS|SIZE|auto", help="Cells of KV cache for every policy but full.")
    ] = str(DEMO_BUDGET),
    model: options.Model = None,
    n_gpu_layers: options.GpuLayers = 0,
    threads: options.Threads = None,
    kv_ram: options.KvRam = "1GiB",
    kv_disk: options.KvDisk = "8GiB",
    kv_dir: options.KvDir = None,
    kv_page_type: options.KvPageType = "f16",
    on_full: options.OnFull = "drop",
    wait_for_disk: options.WaitForDisk = False,
    trace: options.Trace = None,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> int:
    """Solve eight bundled problems with everything in the cache and with zooming, and draw one of them."""
    names = [options.known_policy(name) for name in policy or ["full", "zoomr"]]
    tiers = options.tiers(kv_ram, kv_disk, kv_dir, kv_page_type, on_full, wait_for_disk)
    from zoomr_local.engine import EngineConfig
    from zoomr_local.solve import read_problems
    from zoomr_models import demo_problems_path

    problems = read_problems(demo_problems_path().read_bytes().split(b"\n"), str(demo_problems_path()))
    path = options.model_path(model)
    notes.without_gpu(n_gpu_layers)
    tokens = options.budget_tokens(kv_budget, path, quiet=quiet, n_gpu_layers=n_gpu_layers, longest_tokens=_MAX_TOKENS, kv_ram_bytes=tiers["kv_ram"])
    if not quiet:
        print(f"{len(problems)} problems, {path.name}, policies {', '.join(names)}", file=sys.stderr)
    runs = []
    for name in names:
        budget = {} if name == "full" else {"kv_budget": tokens}
        config = EngineConfig(policy=name, threads=options.thread_count(threads, path), **budget, **tiers)
        runs.append(_run(name, config, problems, path, n_gpu_layers, quiet, trace))
    if as_json:
        print(json.dumps(_as_dict(path.name, runs)))
        return 0
    _show(runs, problems)
    return 0


@dataclass
class Run:
    """One policy over all problems: the tally, and for each problem its record and its trace."""

    policy: str
    budget_tokens: int | None
    tally: Tally
    records: list[dict[str, Any]] = field(default_factory=list)
    traces: dict[str, Trace] = field(default_factory=dict)


def _run(
    name: str, config: Any, problems: list[Problem], path: Any, n_gpu_layers: int, quiet: bool, trace: Path | None
) -> Run:
    from zoomr_local.sampling import SamplingParams
    from zoomr_local.solve import Solver, Tally, solve_all

    from .render import make_progress
    from .solve import open_engine

    run = Run(name, None if name == "full" else config.kv_budget, Tally())
    with open_engine(path, config, n_gpu_layers) as (loaded, engine):
        solver = Solver(loaded, engine, SamplingParams(), _MAX_TOKENS, debug=True)
        recorded = tracing.recording(trace, engine, SamplingParams(), _MAX_TOKENS, quiet)
        with recorded as recorder, make_progress(len(problems), run.tally, run.budget_tokens, quiet, name) as progress, _traced(progress, run.traces):
            solve_all(problems, solver, run.records.append, tracing.listener(progress, recorder))
    return run


@contextmanager
def _traced(progress: Any, traces: dict[str, Trace]) -> Iterator[None]:
    """While this lasts, every event that ``progress`` is told is kept for the drawing too."""
    from .blocks import Trace

    started, event = progress.started, progress.event
    current: list[Trace] = []

    def begin(problem: Problem) -> None:
        current[:] = [traces.setdefault(str(problem.id), Trace())]
        started(problem)

    def note(happened: Any) -> None:
        current[0].feed(happened)
        event(happened)

    progress.started, progress.event = begin, note
    yield


def _show(runs: list[Run], problems: list[Problem]) -> None:
    from rich.console import Console

    console = Console(markup=False, highlight=False, emoji=False)
    console.print(_table(runs))
    paged = next((run for run in reversed(runs) if any(t.zooms for t in run.traces.values())), None)
    if paged is None:
        console.print("No policy here zoomed anything, so there is nothing to draw; try --policy zoomr.")
        return
    _show_problem(console, paged, problems)


def _table(runs: list[Run]) -> Any:
    from rich import box
    from rich.table import Table

    from .render import human_bytes

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("policy", style="bold")
    for heading in ("right", "peak KV", "in bytes", "tokens/s", "zooms"):
        table.add_column(heading, justify="right", no_wrap=True)
    for run in runs:
        s = run.tally.summary()
        zooms = sum(trace.zooms for trace in run.traces.values())
        table.add_row(
            run.policy,
            f"{run.tally.right} of {run.tally.graded}",
            f"{s['resident_peak']:,} cells",
            human_bytes(s["resident_peak_bytes"]),
            f"{s['tokens_per_s'] or 0:,.0f}",
            f"{zooms:,}" if zooms else "-",
        )
    return table


def _show_problem(console: Console, run: Run, problems: list[Problem]) -> None:
    """The solved problem with the most zooms, drawn."""
    from .blocks import ASCII, UNICODE, draw, legend

    right = [r for r in run.records if r.get("correct")] or run.records
    record = max(right, key=lambda r: run.traces[str(r["id"])].zooms)
    problem = next(p for p in problems if p.id == record["id"])
    trace = run.traces[str(record["id"])]
    width = min(console.width, _MOST_COLUMNS)
    glyphs = UNICODE if (console.encoding or "").lower().startswith("utf") else ASCII
    console.print(f"One of them under {run.policy}, {record['id']}:", style="bold")
    console.print(_short(problem.messages[-1]["content"]), style="dim", width=width)
    verdict = "right" if record.get("correct") else f"wrong, it is {problem.answer}"
    console.print(
        f"-> {_short(record['content'])} ({verdict}; {record['kv']['blocks']} thoughts,"
        f" {record['usage']['reasoning_tokens']:,} tokens of them, {trace.zooms} zooms)\n",
        width=width,
    )
    console.print(f"{'thought (its summary)':>25} time ->", style="dim")
    console.print(draw(trace, width, glyphs), end="")
    console.print(legend(width, glyphs))


def _short(text: str) -> str:
    """``text`` on one line, safe to print; a long one without its middle, as a question's point stands at its end."""
    from .blocks import shown

    words = " ".join(shown(text).split())
    half = _MOST_CHARS // 2
    return words if len(words) <= _MOST_CHARS else f"{words[:half]} ... {words[-half:]}"


def _as_dict(model: str, runs: list[Run]) -> dict[str, Any]:
    return {
        "model": model,
        "runs": [
            {
                "policy": run.policy, "kv_budget": run.budget_tokens, **run.tally.summary(),
                "records": run.records, "traces": {name: trace.as_dict() for name, trace in run.traces.items()},
            }
            for run in runs
        ],
    }  # fmt: skip
