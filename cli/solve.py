"""`zoomr solve`: a file of problems in, a file of records out, resumable after any kind of end.

Reads flags and hands over: files to `solve_input.py`, the run to `solve_job.py`, a look ahead to `solve_dry_run.py`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from zoomr_local.errors import UsageError

from . import heads, notes, options, tracing
from . import solve_dry_run as dry
from . import solve_flags as flags
from .solve_input import STDIO, Source, schema_of
from .solve_replies import Replies

if TYPE_CHECKING:
    from zoomr_local.engine import EngineConfig


def solve(
    context: typer.Context,
    file: flags.Input,
    output: flags.Output = None,
    overwrite: flags.Overwrite = False,
    retry_failed: flags.RetryFailed = False,
    dry_run: flags.DryRun = False,
    output_format: flags.OutputFormat = "records",
    checkpoint: flags.CheckpointDir = None,
    checkpoint_every: flags.CheckpointEvery = None,
    trace: options.Trace = None,
    input_format: flags.InputFormat = None,
    encoding: flags.Encoding = None,
    question_column: flags.QuestionColumn = None,
    answer_column: flags.AnswerColumn = None,
    id_column: flags.IdColumn = None,
    template: flags.Template = None,
    limit: flags.Limit = None,
    schema: flags.Schema = None,
    votes: flags.Votes = 1,
    vote_by: flags.VoteBy = None,
    retries: flags.Retries = 0,
    timeout: flags.Timeout = None,
    grader: flags.Grader = "auto",
    as_json: options.Json = False,
    quiet: options.Quiet = False,
    model: options.Model = None,
    n_gpu_layers: options.GpuLayers = 0,
    threads: options.Threads = None,
    policy: options.Policy = "zoomr",
    kv_budget: options.KvBudget = None,
    kv_type: options.KvType = "f16",
    flash_attn: options.FlashAttn = True,
    kv_ram: options.KvRam = "1GiB",
    kv_disk: options.KvDisk = "8GiB",
    kv_dir: options.KvDir = None,
    kv_page_type: options.KvPageType = "f16",
    on_full: options.OnFull = "drop",
    wait_for_disk: options.WaitForDisk = False,
    refresh: options.Refresh = None,
    votes_per_head: options.VotesPerHead = None,
    zoomed_blocks: options.ZoomedBlocks = None,
    window: options.Window = None,
    vote_window: options.VoteWindow = None,
    vote_layers: options.VoteLayers = None,
    summary_rows: options.SummaryRows = None,
    summaries: options.Summaries = "auto",
    thought_min: options.ThoughtMin = None,
    summary_max: options.SummaryMax = None,
    beacon_every: options.BeaconEvery = None,
    pin_prompt: heads.PinPrompt = "on",
    dense_layers: heads.DenseLayers = 0,
    cluster_query: heads.ClusterQuery = "own",
    clusters_added: heads.ClustersAdded = 32,
    sinks: options.Sinks = 4,
    max_tokens: options.MaxTokens = 4096,
    think_budget: flags.ThinkBudget = None,
    temp: options.Temperature = 0.0,
    top_k: options.TopK = 40,
    top_p: options.TopP = 0.95,
    min_p: options.MinP = 0.05,
    repeat_penalty: options.RepeatPenalty = 1.0,
    repeat_last_n: options.RepeatLastN = 64,
    seed: options.Seed = 0,
    stop: options.Stop = None,
) -> int:
    """Solve a file of problems; start the same command again to go on after any interruption."""
    options.known_policy(policy)
    pinned = heads.pinned(pin_prompt)
    heads.refuse(
        policy, checkpoint=checkpoint, think_budget=think_budget, kv_ram=kv_ram != "1GiB", kv_disk=kv_disk != "8GiB", kv_dir=kv_dir,
        kv_page_type=kv_page_type != "f16", on_full=on_full != "drop", wait_for_disk=wait_for_disk,
    )  # fmt: skip
    target = output or _default_output(file, policy)
    _check_targets(target, as_json and not dry_run, checkpoint, checkpoint_every)
    _check_think_budget(think_budget, max_tokens)
    held = None if schema is None else schema_of(schema, quiet)
    replies = Replies(votes, vote_by, retries, timeout, held, grader, output_format)
    replies.check(policy, temp, stop)
    source = Source(file, input_format, encoding, question_column, answer_column, id_column, template)
    every = source.read(quiet)
    problems = every[:limit]
    replies.check_problems(problems, temp, stop, quiet)

    from zoomr_local.engine import EngineConfig  # loads the native library
    from zoomr_local.sampling import SamplingParams

    from .solve_job import Job

    path = dry.model_path(model, quiet) if dry_run else options.model_path(model)
    tiers = options.tiers(kv_ram, kv_disk, kv_dir, kv_page_type, on_full, wait_for_disk)
    planned = {"kv_type": kv_type, "flash_attn": flash_attn, "n_gpu_layers": n_gpu_layers, "longest_tokens": max_tokens, "kv_ram_bytes": tiers["kv_ram"]}
    config = EngineConfig(
        policy=policy, **options.budget(policy, kv_budget, path, quiet, **planned), kv_type=kv_type, flash_attn=flash_attn,
        threads=options.thread_count(threads, path), refresh=refresh, votes_per_head=votes_per_head,
        zoomed_blocks=zoomed_blocks, window=window, vote_window=vote_window,
        vote_layers=options.layer_list(vote_layers), summary_rows=summary_rows, beacon_every=beacon_every,
        sinks=sinks, seed=seed, summaries=summaries, thought_min=thought_min, summary_max=summary_max, pin_prompt=pinned,
        dense_layers=dense_layers, cluster_query=cluster_query, clusters_added=clusters_added, **tiers,
    )  # fmt: skip
    grammar = None if held is None else held.grammar
    sampling = SamplingParams(temp, top_k, top_p, min_p, repeat_penalty, repeat_last_n, seed, tuple(stop or ()), grammar)
    job = Job(
        problems, config, sampling, max_tokens, path, n_gpu_layers, as_json, quiet, context.obj, checkpoint, checkpoint_every,
        think_budget, trace=trace, replies=replies, beyond=every[len(problems) :],
    )  # fmt: skip
    tracing.refuse_same_file(trace, file, target)
    notes.without_gpu(n_gpu_layers)
    notes.bundled(path, (problem.messages[-1]["content"] for problem in problems if problem.messages), quiet)
    if dry_run:
        return dry.run(job, None if target == STDIO else Path(target), overwrite, retry_failed)
    if target == STDIO:
        return job.run(None)
    _refuse_same_file(file, Path(target))
    from zoomr_local.journal import Journal

    with Journal.open(Path(target), replies.line_form(), overwrite) as journal:
        return job.run(journal, overwrite, retry_failed)


def _check_targets(target: str, as_json: bool, checkpoint: Path | None, checkpoint_every: float | None) -> None:
    if as_json and target == STDIO:
        raise UsageError("--json and -o - both want stdout; give the records a file with -o, or leave out --json")
    if checkpoint is None and checkpoint_every is not None:
        raise UsageError("--checkpoint-every needs --checkpoint DIR")
    if checkpoint is not None and target == STDIO:
        raise UsageError("--checkpoint needs an output to go on with; give the records a file with -o")


def _check_think_budget(text: str | None, max_tokens: int) -> None:
    if text is not None:
        from zoomr_local.thinking import budget_of

        budget_of(text, max_tokens)


@contextmanager
def open_engine(model_file: Path, config: EngineConfig, n_gpu_layers: int) -> Iterator[tuple[Any, Any]]:
    """A loaded model and an engine on it, both closed at the end."""
    from zoomr_local.engine import Engine
    from zoomr_local.model import Model

    from .summaries import user_markers

    model = Model.open(model_file, n_gpu_layers=n_gpu_layers, marker_sets=user_markers())
    try:
        engine = Engine(model, config)
        try:
            yield model, engine
        finally:
            engine.close()
    finally:
        model.close()


def _default_output(file: str, policy: str) -> str:
    return STDIO if file == STDIO else f"{Path(file).stem}.{policy}.out.jsonl"


def _refuse_same_file(file: str, target: Path) -> None:
    if file != STDIO and os.path.exists(target) and os.path.samefile(file, target):
        raise UsageError(f"the output {target} is the input; name another file with -o")
