"""`zoomr bench`: tokens/s, memory and paging at depth, for policies side by side.

Reads flags, shows progress and prints; the cases run in `zoomr_local.bench`, the tables are
`zoomr_local.bench_report` and, for a terminal, `bench_view.py`.
"""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from zoomr_local.errors import UsageError, ZoomrError

from . import INTERRUPTED, SOME_FAILED, notes, options

if TYPE_CHECKING:
    from zoomr_local.bench import Progress
    from zoomr_local.bench_case import Case

DEFAULT_BUDGET = 512  # tokens, as in every command
LONG_SECONDS = 600  # a depth that takes longer to reach by text gets the advice to plant it

_WHAT, _OUT = "What is measured", "Output"


def _option(panel: str, *names: str, **more: Any) -> Any:
    return typer.Option(*names, rich_help_panel=panel, **more)


def bench(
    context: typer.Context,
    model: options.Model = None,
    depth: Annotated[str, _option(_WHAT, "-d", "--depth", metavar="LIST", help="Tokens before a measurement: 1k,8k,32k,128k.")] = "1k,8k,32k",
    policy: Annotated[str, _option(_WHAT, "--policy", metavar="LIST", help="`zoomr policies` lists them.")] = "full,zoomr",
    depth_by: Annotated[
        str, _option(_WHAT, "--depth-by", metavar="WAY", help="text: every token is computed. planted: a few are, and are repeated; for depths that would take hours.")
    ] = "text",
    prompt: Annotated[int, _option(_WHAT, "-p", "--n-prompt", metavar="N", min=1, help="Tokens of a prefill measurement (pp).")] = 512,
    gen: Annotated[int, _option(_WHAT, "-n", "--n-gen", metavar="N", min=1, help="Tokens of a decoding measurement (tg).")] = 128,
    repetitions: Annotated[int, _option(_WHAT, "-r", "--repetitions", metavar="N", min=1, help="Repetitions of each.")] = 3,
    force: Annotated[bool, _option(_WHAT, "--force", help="Quote figures, marked, although the machine is busy.")] = False,
    as_json: Annotated[bool, _option(_OUT, "--json", help="Print everything as one JSON object on stdout.")] = False,
    as_csv: Annotated[bool, _option(_OUT, "--csv", help="Print the rows as CSV on stdout.")] = False,
    plot: Annotated[Path | None, _option(_OUT, "--plot", metavar="PNG", help="Draw tokens/s and memory against depth (extra `bench`).", show_default=False)] = None,
    quiet: options.Quiet = False,
    n_gpu_layers: options.GpuLayers = 0,
    threads: options.Threads = None,
    kv_budget: options.KvBudget = None,
    kv_type: options.KvType = "f16",
    flash_attn: options.FlashAttn = True,
    kv_ram: options.KvRam = "1GiB",
    kv_disk: options.KvDisk = "8GiB",
    kv_dir: options.KvDir = None,
    kv_page_type: options.KvPageType = "f16",
    on_full: options.OnFull = "drop",
    wait_for_disk: options.WaitForDisk = False,
) -> int:  # fmt: skip
    """Measure prefill and decoding speed, memory and paging at depth, policies side by side."""
    from zoomr_local import bench_report, trial
    from zoomr_local.bench import grid
    from zoomr_local.bench_case import Case
    from zoomr_local.bench_depth import WAYS

    if as_json and as_csv:
        raise UsageError("--json and --csv: give one of them")
    if depth_by not in WAYS:
        raise UsageError(f"--depth-by {depth_by}: choose one of {', '.join(WAYS)}")
    if plot is not None:
        bench_report.require_matplotlib()
        if plot.is_dir():
            raise UsageError(f"--plot {plot} is a folder; name a PNG file in it")
    path = trial.check(options.model_path(model))  # here, where it costs no row of the table
    policies = [options.known_policy(name) for name in _names("--policy", policy)]
    depths = [options.token_count("--depth", part) for part in _names("--depth", depth)]
    if len(set(depths)) < len(depths):
        raise UsageError(f"--depth {depth}: give a list without repetitions, for example 1k,8k")
    tiers = options.tiers(kv_ram, kv_disk, kv_dir, kv_page_type, on_full, wait_for_disk)
    planned = {"kv_type": kv_type, "flash_attn": flash_attn, "n_gpu_layers": n_gpu_layers, "kv_ram_bytes": tiers["kv_ram"]}
    paged = next((name for name in policies if name != "full"), None)
    budget = options.budget_tokens(kv_budget, path, paged, quiet, longest_tokens=max(depths), **planned) if kv_budget and paged else DEFAULT_BUDGET
    if kv_budget and not paged:
        options.budget("full", kv_budget, path)  # says that it is not used
    config: dict[str, Any] = {
        "threads": options.thread_count(threads, path), "kv_type": kv_type, "flash_attn": flash_attn, "kv_budget": budget,
        **tiers, "kv_dir": kv_dir and str(tiers["kv_dir"]),
    }  # fmt: skip
    notes.without_gpu(n_gpu_layers)
    base = Case(str(path), policies[0], depths[0], depth_by, prompt, gen, repetitions, n_gpu_layers, config)
    cases = grid(base, policies, depths)
    run = Run(cases, force, quiet)
    run.refuse_busy()
    run.announce()
    whole = run.measure()
    found = run.rows
    _print(run, found, as_json, as_csv, context.obj)  # before the plot: a full disk must not cost the figures
    if plot is not None and any(row["kv_bytes"] is not None for row in found):
        bench_report.plot(plot, found)
        run.tell(f"drawn: {plot}")
    if not whole:
        run.tell(f"interrupted: {len(run.results)} of {len(cases)} cases were measured", always=True)
        return INTERRUPTED
    return SOME_FAILED if any(row["status"] in ("busy", "failed") for row in found) else 0


class Run:
    """The cases of one command line, their results so far, and what is said on stderr meanwhile."""

    def __init__(self, cases: list[Case], force: bool, quiet: bool) -> None:
        self.cases, self.force, self.quiet = cases, force, quiet
        self.results: list[dict[str, Any]] = []
        self._busy_before: str | None = None  # why every figure is marked, whatever was seen while it was taken

    @property
    def rows(self) -> list[dict[str, Any]]:
        """The rows of all results so far."""
        return [row for result in self.results for row in self._rows(result)]

    def _rows(self, result: dict[str, Any]) -> list[dict[str, Any]]:
        from zoomr_local.bench_report import rows

        found = rows(result, self.force)
        if self._busy_before:  # a short measurement may meet nobody between two ticks of the clock
            for row in found:
                row.update(busy=True, reason=row["reason"] or f"before it began, {self._busy_before}")
        return found

    def refuse_busy(self) -> None:
        """Raises ZoomrError if other processes are computing now and ``force`` was not given."""
        from zoomr_local import bench_meter

        reason = bench_meter.why_busy_now()
        if reason and not self.force:
            raise ZoomrError(f"the machine is busy: {reason}, so no figure could be quoted; wait for it, or measure all the same with --force")
        self._busy_before = reason
        if reason:
            self.tell(f"the machine is busy ({reason}); figures are marked with *", always=True)

    def announce(self) -> None:
        """Say what will be measured and about how long it takes."""
        from zoomr_local import bench

        if self.quiet:
            return
        with self._watched("estimating") as progress:
            found = bench.calibrate(self.cases[0], progress)
        seconds = [bench.estimate(found, case) for case in self.cases]
        count = "1 case" if len(self.cases) == 1 else f"{len(self.cases)} cases"
        each = ", ".join(f"{_name(case)} {_about(s)}" for case, s in zip(self.cases, seconds, strict=True))
        self.tell(f"{count}, about {_about(sum(seconds))} if they fit: {each}")
        longest = max(zip(seconds, self.cases, strict=True), key=lambda pair: pair[0])
        if longest[0] > LONG_SECONDS and longest[1].way == "text":
            self.tell("most of it is computing every token of the depths; --depth-by planted repeats a few instead, and says so")

    def measure(self) -> bool:
        """Measure every case; False if Ctrl-C ended it, and the results so far stand."""
        from zoomr_local import bench

        try:
            for number, case in enumerate(self.cases):
                label = f"[{number + 1} of {len(self.cases)}] {_name(case)}"
                with self._watched(label) as progress:
                    self.results.append(bench.measured(case, progress))
                self.tell("\n  ".join([f"{label}: {self._outcome()}", *self._new_warnings()]))
        except KeyboardInterrupt:
            return False
        return True

    def tell(self, text: str, always: bool = False) -> None:
        """A line on stderr."""
        if always or not self.quiet:
            print(text, file=sys.stderr, flush=True)

    def _outcome(self) -> str:
        from zoomr_local.bench_report import speed_text

        found = self._rows(self.results[-1])
        texts = [f"{row['test'].split(' @')[0]} {speed_text(row)}" for row in found if row["tokens_per_second"] is not None]
        return ", ".join(texts) + " t/s" if texts else f"{found[0]['status']}: {found[0]['reason']}"

    def _new_warnings(self) -> list[str]:
        before = {text for result in self.results[:-1] for text in result["warnings"]}
        return [text for text in self.results[-1]["warnings"] if text not in before]

    @contextmanager
    def _watched(self, label: str) -> Iterator[Progress]:
        """A line on a terminal that says what the measuring process is doing; nothing elsewhere."""
        from rich.console import Console

        console = Console(stderr=True, markup=False, highlight=False, quiet=self.quiet)
        if not console.is_terminal:
            yield lambda phase, done, total: None
            return
        with console.status(label) as status:
            yield lambda phase, done, total: status.update(f"{label}: {phase}" + (f", {done:,} of {total:,}" if total > 1 else ""))


def _print(run: Run, found: list[dict[str, Any]], as_json: bool, as_csv: bool, arguments: list[str]) -> None:
    from zoomr_local import bench_report

    from . import bench_view

    if as_json:
        print(json.dumps(document(run, found, arguments)))
    elif as_csv:
        print(bench_report.to_csv(found), end="")
    elif found and sys.stdout.isatty():
        bench_view.show(found, run.cases[0].repetitions)
    elif found:
        print(bench_report.markdown(found), end="")
        print("\n" + "\n".join(bench_report.notes(found, run.cases[0].repetitions)))


def document(run: Run, found: list[dict[str, Any]], arguments: list[str]) -> dict[str, Any]:
    """Everything, for a program: rows as in CSV, and every case with all its samples."""
    import os
    import platform

    from .versions import versions

    machine = {"system": f"{platform.system()} {platform.machine()}", "cores": os.cpu_count(), "python": platform.python_version()}
    return {
        "bench": 1, "date": datetime.now(timezone.utc).isoformat(timespec="seconds"), "command": shlex.join(["zoomr", *(arguments or [])]),
        "versions": versions(), "machine": machine, "forced": run.force, "complete": len(run.results) == len(run.cases),
        "rows": found, "cases": run.results,
    }  # fmt: skip


def _names(flag: str, text: str) -> list[str]:
    names = [part.strip() for part in text.split(",") if part.strip()]
    if not names or len(set(names)) < len(names):
        raise UsageError(f"{flag} {text}: give a list without repetitions, for example 1k,8k" if flag == "--depth"
                         else f"{flag} {text}: give a list without repetitions, for example full,zoomr")
    return names


def _name(case: Case) -> str:
    from zoomr_local.bench_report import depth_text

    return f"{case.policy} @ {depth_text(case.depth)}" + (" (planted)" if case.way == "planted" else "")


def _about(seconds: float) -> str:
    from .render import human_seconds

    whole = max(1, round(seconds))
    return f"{whole} s" if whole < 60 else human_seconds(whole)
