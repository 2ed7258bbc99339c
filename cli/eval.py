"""`zoomr eval`: policies, budgets and families over the same problems, with intervals and paired differences.

Reads flags, opens engines and prints; the grid and its running are `zoomr_local.evaluate`, the arithmetic and
the files `zoomr_local.evaluate_report`.
"""

from __future__ import annotations

import json
import os
import platform
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from zoomr_local.errors import ModelError, UsageError

from . import INTERRUPTED, SOME_FAILED, eval_check, eval_view, heads, notes, options, solve_job
from . import solve as solving
from . import summaries as ways
from .solve_replies import Replies

if TYPE_CHECKING:
    from zoomr_local.evaluate import Cell, Run, Suite
    from zoomr_local.solve import Tally

    from . import eval_trace

BUNDLED = "bundled"
DEFAULT_PROBLEMS = 100
_FIRST_LOOK = 10
_FILE_MAX_TOKENS = 4096  # as `zoomr solve`

_SUITE, _GRID, _COMPARE = "Problems", "What is compared", "Settings of zoomr: lists compare"


def _listed(panel: str, *names: str, metavar: str = "LIST", **more: Any) -> Any:
    return typer.Option(*names, metavar=metavar, rich_help_panel=panel, show_default=more.pop("show_default", False), **more)


def evaluation(
    context: typer.Context,
    suite: Annotated[str, _listed(_SUITE, "--suite", metavar="NAME", help="bundled, or a JSONL file: id, prompt, answer, perhaps family.", show_default=True)] = BUNDLED,
    family: Annotated[str | None, _listed(_SUITE, "--family", help="dag,ledger,linsys,series. Default: all of the suite.")] = None,
    count: Annotated[int | None, _listed(_SUITE, "-n", "--n", metavar="N", min=1, help="Problems a family. Default: 100 of the bundled, all of a file.")] = None,
    thoughts: Annotated[int | None, _listed(_SUITE, "--thoughts", metavar="N", min=1, help="Steps each bundled problem takes. Default: as many as make traces of about 2,650 tokens.")] = None,
    split: Annotated[str, _listed(_SUITE, "--split", metavar="NAME", help="test, or dev for choosing settings.", show_default=True)] = "test",
    question_column: Annotated[str | None, _listed(_SUITE, "--question-column", metavar="NAME", help="Key of the question in a file. Default: question, problem or prompt.")] = None,
    answer_column: Annotated[str | None, _listed(_SUITE, "--answer-column", metavar="NAME", help="Key of the reference in a file. Default: answer.")] = None,
    id_column: Annotated[str | None, _listed(_SUITE, "--id-column", metavar="NAME", help="Key of the id in a file. Default: id; without any, the number of the line.")] = None,
    grader: Annotated[str, _listed(_SUITE, "--grader", metavar="NAME", help="built-in, math-verify, or auto: math-verify for a file's problems if it is installed, built-in for the bundled ones.", show_default=True)] = "auto",
    seed: Annotated[int, _listed(_SUITE, "--seed", metavar="N", min=0, help="Seed of the problems, of sampling and of policy `random`.", show_default=True)] = 0,
    policy: Annotated[str, _listed(_GRID, "--policy", help="`zoomr policies` lists them.", show_default=True)] = "full,zoomr,sumr,recency,random,streaming",
    kv_budget: Annotated[str, _listed(_GRID, "--kv-budget", help="Hard peaks of cells, the same for every policy but full: tokens, sizes (1MiB) or auto.", show_default=True)] = "512,800",
    beacon_every: Annotated[str | None, _listed(_GRID, "--beacon-every", help="Tokens that a beacon of breadcrumbs stands for: a list compares. Default: the model's first.")] = None,
    refresh: Annotated[str | None, _listed(_COMPARE, "--refresh", help="Tokens between two selections, at most.")] = None,
    votes_per_head: Annotated[str | None, _listed(_COMPARE, "--votes-per-head", help="Blocks each head votes for; 0: it shares one vote by its softmax.")] = None,
    zoomed_blocks: Annotated[str | None, _listed(_COMPARE, "--zoomed-blocks", help="Most blocks zoomed at once.")] = None,
    window: Annotated[str | None, _listed(_COMPARE, "--window", help="Tokens of the newest blocks that stay whole.")] = None,
    vote_window: Annotated[str | None, _listed(_COMPARE, "--vote-window", help="Tokens whose votes are summed.")] = None,
    vote_layers: Annotated[list[str] | None, _listed(_COMPARE, "--vote-layers", help="Layers that vote: 2,3 or all (repeat to compare).")] = None,
    summary_rows: Annotated[str | None, _listed(_COMPARE, "--summary-rows", help="Index rows a summary gets.")] = None,
    summaries: Annotated[str | None, _listed(_COMPARE, "--summaries", help="How thoughts become blocks: auto,learned,prompted,extractive,off. Default: auto.")] = None,
    thought_min: Annotated[str | None, _listed(_COMPARE, "--thought-min", help="Least tokens of a thought that prompted and extractive cut.")] = None,
    pin_prompt: Annotated[str | None, _listed(_COMPARE, "--pin-prompt", help="Per-head policies: the prompt stays (on), or is evicted as the rest is (off). Default: on.")] = None,
    dense_layers: Annotated[str | None, _listed(_COMPARE, "--dense-layers", help="Policy clusterkv: so many first layers keep every token, paid for by the others. Default: 0.")] = None,
    cluster_query: Annotated[str | None, _listed(_COMPARE, "--cluster-query", help="Policy clusterkv: a token's own query selects for it, which decodes it twice (own), or that of the token before (last). Default: own.")] = None,
    clusters_added: Annotated[str | None, _listed(_COMPARE, "--clusters-added", help="Policy clusterkv: clusters for 320 generated tokens. Default: 32.")] = None,
    summary_max: Annotated[str | None, _listed(_COMPARE, "--summary-max", help="Most tokens the model writes in a prompted summary.")] = None,
    output: Annotated[Path | None, typer.Option("-o", "--output", metavar="DIR", help="Folder of records and results. Default: MODEL.eval here.", show_default=False)] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Throw away this grid's records and start again.")] = False,
    retry_failed: Annotated[bool, typer.Option("--retry-failed", help="Solve the failed ones of an earlier run again.")] = False,
    trace: Annotated[Path | None, typer.Option("--trace", metavar="DIR", help="Record what the cache does in some problems of every cell, texts included, a file each, for `zoomr view`.", show_default=False)] = None,
    trace_problems: Annotated[int | None, typer.Option("--trace-problems", metavar="N", min=1, help="With --trace: so many of each family, the first ones. Default: 3.", show_default=False)] = None,
    plot: Annotated[Path | None, typer.Option("--plot", metavar="PNG", help="Draw accuracy against resident cells (extra `bench`).", show_default=False)] = None,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
    model: options.Model = None,
    n_gpu_layers: options.GpuLayers = 0,
    threads: options.Threads = None,
    jobs: Annotated[int, typer.Option("-j", "--jobs", metavar="N", min=1, help="Processes that solve problems side by side, each with a cache of its own.", rich_help_panel="Model and threads")] = 1,
    kv_type: options.KvType = "f16",
    flash_attn: options.FlashAttn = True,
    kv_ram: options.KvRam = "1GiB",
    kv_disk: options.KvDisk = "8GiB",
    kv_dir: options.KvDir = None,
    kv_page_type: options.KvPageType = "f16",
    on_full: options.OnFull = "drop",
    wait_for_disk: options.WaitForDisk = False,
    sinks: options.Sinks = 4,
    max_tokens: Annotated[int | None, typer.Option("--max-tokens", metavar="N", min=1, help="Most tokens of a reply. Default: one and a half reference traces; 4096 for a file.", rich_help_panel="Sampling", show_default=False)] = None,
    temp: options.Temperature = 0.0,
) -> int:  # fmt: skip
    """Compare policies at equal budgets on the same problems; start the same command again to go on."""
    from zoomr_local.engine import EngineConfig
    from zoomr_local.evaluate import grid
    from zoomr_local.evaluate_report import require_matplotlib
    from zoomr_local.sampling import SamplingParams

    from . import eval_trace

    if plot is not None:  # before hours of running, not after
        require_matplotlib()
        if plot.is_dir():
            raise UsageError(f"--plot {plot} is a folder; name a PNG file in it")
    if trace is None and trace_problems is not None:
        raise UsageError("--trace-problems needs --trace DIR")
    columns = {name: value for name, value in (("question", question_column), ("answer", answer_column), ("id", id_column)) if value is not None}
    problems = _suite(suite, family, count, seed, thoughts, split, max_tokens, columns)
    replies = Replies(grader="built-in" if suite == BUNDLED and grader == "auto" else grader)  # the bundled answers need no algebra
    replies.check("full", temp, None)
    policies = [options.known_policy(name) for name in _names("--policy", policy)]
    path = options.model_path(model)
    notes.without_gpu(n_gpu_layers)
    planned = {"kv_type": kv_type, "flash_attn": flash_attn, "n_gpu_layers": n_gpu_layers}
    paged = next((name for name in policies if name != "full"), "zoomr")
    budgets = [options.budget_tokens(part, path, paged, quiet, **planned) for part in _names("--kv-budget", kv_budget)]
    options.check_policies(policies, budgets, _numbers("--beacon-every", beacon_every) or [None], path, n_gpu_layers)
    lists = {"refresh": refresh, "votes_per_head": votes_per_head, "zoomed_blocks": zoomed_blocks, "window": window, "vote_window": vote_window, "summary_rows": summary_rows, "beacon_every": beacon_every, "thought_min": thought_min, "summary_max": summary_max, "dense_layers": dense_layers, "clusters_added": clusters_added}
    heads.check_calibrated(policies, path)
    pins = [] if pin_prompt is None else [heads.pinned(part) for part in _names("--pin-prompt", pin_prompt)]
    queries = [] if cluster_query is None else [heads.cluster_query(part) for part in _names("--cluster-query", cluster_query)]
    modes = [] if summaries is None else _names("--summaries", summaries)
    if modes:
        ways.check(modes, policies, path, quiet)
    tiers = options.tiers(kv_ram, kv_disk, kv_dir, kv_page_type, on_full, wait_for_disk)
    share = threads or (1 if jobs > 1 else options.thread_count(None, path))
    base = EngineConfig(kv_type=kv_type, flash_attn=flash_attn, threads=share, sinks=sinks, seed=seed, **tiers)
    cells = grid(problems.families, policies, budgets, base, {**_choices(lists, vote_layers), "summaries": modes, "pin_prompt": pins, "cluster_query": queries})
    eval_check.check(cells, problems, path, n_gpu_layers)
    folder = output or Path(f"{path.stem}.eval")
    sampling = SamplingParams(temperature=temp, seed=seed)
    traces = {} if trace is None else eval_trace.files(trace, cells, problems, trace_problems)
    with solve_job._interruptible() as interrupted:
        run = _run(cells, problems, folder, path, sampling, n_gpu_layers, interrupted, context.obj, jobs, traces, replies)
        found = _evaluate(run, quiet, overwrite, retry_failed)
    if traces and not quiet:
        eval_trace.say(trace, traces, found is not None)
    if found is None:
        again = notes.typed_again(context.obj, without=("--overwrite",))
        print(f"interrupted: everything finished is in {folder}; to go on: {again}", file=sys.stderr)
        return INTERRUPTED
    asked = {"suite": suite, "n": count, "seed": seed, "max_tokens": max_tokens, **({"thoughts": thoughts, "split": split} if suite == BUNDLED else {f"{name}_column": value for name, value in columns.items()})}
    return _conclude(_result(run, found, asked), folder, plot, as_json, quiet)


def _run(
    cells: list[Cell], suite: Suite, folder: Path, model_file: Path, sampling: Any, n_gpu_layers: int,
    interrupted: Callable[[], bool], arguments: list[str], jobs: int, traces: eval_trace.Files, replies: Replies,
) -> Run:  # fmt: skip
    from zoomr_local.evaluate import Run
    from zoomr_local.journal import model_fingerprint

    from .eval_trace import TracedSolver
    from .versions import versions

    try:
        fingerprint = model_fingerprint(model_file)
    except OSError as error:
        raise ModelError(f"cannot read the model {model_file}: {error.strerror}; give a .gguf file with -m") from error
    every = [problem for problems in suite.problems.values() for problem in problems]
    return Run(
        cells, suite, folder, partial(_open_engine, model_file, n_gpu_layers), fingerprint, versions(),
        sampling, n_gpu_layers, {"command": notes.typed_again(arguments)}, interrupted, bool(os.environ.get("ZOOMR_DEBUG")), jobs,
        solver=partial(TracedSolver, files=traces), markers=ways.user_markers(),
        open_grader=partial(replies.grader_for, every), grader=replies.settings(every).get("grader", ""),
    )  # fmt: skip


def _open_engine(model_file: Path, n_gpu_layers: int, config: Any) -> Any:
    return solving.open_engine(model_file, config, n_gpu_layers)


def _evaluate(run: Run, quiet: bool, overwrite: bool, retry_failed: bool) -> Any:
    from zoomr_local.evaluate import evaluate

    from .render import make_progress

    @contextmanager
    def watch(number: int, cell: Cell, tally: Tally) -> Iterator[Any]:
        total = len(run.suite.problems[cell.family])
        if not quiet:
            if number == 0:
                print(_amount(run), file=sys.stderr, flush=True)
            begun = f", {tally.done} done already" if tally.done else ""
            print(f"[{number + 1} of {len(run.cells)}] {cell.label}: {total} problems{begun}", file=sys.stderr, flush=True)
        with make_progress(total, tally, cell.budget_tokens, quiet) as progress:
            yield progress

    return evaluate(run, watch, overwrite, retry_failed)


def _amount(run: Run) -> str:
    """How much the whole grid is, before hours of it have begun."""
    every = [len(run.suite.problems[cell.family]) for cell in run.cells]
    first = f"; for a first look: -n {_FIRST_LOOK}" if max(every) > _FIRST_LOOK else ""
    return f"{len(every)} cell{'s' * (len(every) != 1)}, {sum(every):,} problems in all{first}"


def _result(run: Run, found: Any, asked: dict[str, Any]) -> dict[str, Any]:
    """The report with everything needed to read it: what was asked, of which model, on which machine."""
    from zoomr_local.evaluate_report import report
    from zoomr_local.journal import code_of

    code = sorted({name for cell in run.cells for name in code_of(run.folder / cell.file_name)} | {run.versions["zoomr"]})
    return {
        "date": datetime.now(timezone.utc).date().isoformat(), "command": run.info["command"],
        "asked": {**asked, **({"grader": run.grader} if run.grader else {})}, "max_tokens": run.suite.max_tokens,
        "temperature": run.sampling.temperature, "model": run.model, "versions": run.versions, **({"code": code} if len(code) > 1 else {}),
        "kv_type": run.cells[0].config.kv_type, "threads": run.cells[0].config.threads,
        "machine": {"system": f"{platform.system()} {platform.machine()}", "cores": os.cpu_count()},
        **report(found),
    }  # fmt: skip


def _conclude(result: dict[str, Any], folder: Path, plot: Path | None, as_json: bool, quiet: bool) -> int:
    """Write the files, print the result, and give the exit code."""
    from zoomr_local import evaluate_report

    evaluate_report.write_json(folder / "results.json", result)
    evaluate_report.write_csv(folder / "results.csv", result)
    failed = sum(cell["failed"] for cell in result["cells"])
    if "code" in result and not quiet:
        print(f"note: records in {folder} were made with zoomr {', '.join(result['code'])}; --overwrite makes all anew", file=sys.stderr)
    if not quiet:
        print(f"in {folder}: results.json, results.csv and a file of records a cell", file=sys.stderr)
    if failed:
        print(f"{failed} problems failed and count neither right nor wrong; to try them again, add --retry-failed", file=sys.stderr)
    if as_json:
        print(json.dumps(result), flush=True)
    else:
        eval_view.show(result)
    if plot is not None:  # last: a picture that cannot be drawn costs no answer
        _draw(plot, result, quiet)
    return SOME_FAILED if failed else 0


def _draw(path: Path, result: dict[str, Any], quiet: bool) -> None:
    """Draw the picture. Raises UsageError where it cannot be written; says on stderr where there is nothing to draw."""
    from zoomr_local import evaluate_report

    if not any(cell["n"] for cell in result["cells"]):
        print(f"note: nothing to draw in {path}: no cell has graded a problem", file=sys.stderr)
        return
    try:
        evaluate_report.plot(path, result)
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error.strerror}; the results are kept: the same command with another --plot draws them") from error
    if not quiet:
        print(f"drawn: {path}", file=sys.stderr)


# ---------------------------------------------------------------- flags


def _names(flag: str, text: str) -> list[str]:
    """The parts of a comma list, each once. Raises UsageError if there are none."""
    parts = list(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
    if not parts:
        raise UsageError(f"{flag} {text}: give at least one name or number")
    return parts


def _numbers(flag: str, text: str | None) -> list[int]:
    if text is None:
        return []
    try:
        return [int(part) for part in _names(flag, text)]
    except ValueError as error:
        raise UsageError(f"{flag} {text}: give whole numbers, for example 4,8") from error


def _choices(lists: dict[str, str | None], vote_layers: list[str] | None) -> dict[str, list[Any]]:
    """The values of every setting of zoomr that was given, by its name in EngineConfig."""
    found = {name: _numbers("--" + name.replace("_", "-"), text) for name, text in lists.items()}
    return {**found, "vote_layers": [() if text == "all" else options.layer_list(text) for text in vote_layers or ()]}


def _suite(
    suite: str, family: str | None, count: int | None, seed: int, thoughts: int | None, split: str, max_tokens: int | None,
    columns: dict[str, str],
) -> Suite:  # fmt: skip
    from zoomr_local.evaluate import bundled_suite, file_suite
    from zoomr_local.problems import Columns

    if split not in ("test", "dev"):
        raise UsageError(f"--split {split}: choose test or dev")
    families = None if family is None else _names("--family", family)
    if suite == BUNDLED:
        for name in columns:
            raise UsageError(f"--{name}-column is for a file of problems; give one with --suite, or leave --{name}-column out")
        return bundled_suite(families, count or DEFAULT_PROBLEMS, seed, thoughts, split, max_tokens)
    if thoughts is not None or split != "test":
        flag = "--thoughts" if thoughts is not None else "--split"
        raise UsageError(f"{flag} is for --suite {BUNDLED}, whose problems are drawn; those of {suite} are what they are: leave {flag} out")
    try:
        lines = Path(suite).read_bytes().split(b"\n")
    except OSError as error:
        raise UsageError(f"--suite {suite}: {error.strerror}; give {BUNDLED} or a JSONL file") from error
    return file_suite(lines, suite, families, count, max_tokens or _FILE_MAX_TOKENS, Columns(**columns))
