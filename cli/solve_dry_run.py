"""`zoomr solve --dry-run`: what a run would do, from the input, the output and the model's vocabulary alone.

No weights are loaded, nothing is fetched and nothing is written. `solve.py` calls this with the job it would run.
"""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zoomr_local.errors import ModelError, UsageError, ZoomrError
from zoomr_local.sizes import counted

from . import options

if TYPE_CHECKING:
    from .solve_job import Job

_LISTED = 5


def model_path(given: Path | None, quiet: bool) -> Path:
    """The model's file if it is here. Raises ModelError for one that would have to be fetched, and says how."""
    from zoomr_local import hub_cache
    from zoomr_local.hub_names import parse

    if given is None or os.path.exists(os.path.expanduser(given)) or str(given) in options.bundled_models():
        return options.model_path(given)
    reference = parse(str(given))
    if reference is not None and hub_cache.find(reference) is None:
        raise ModelError(f"-m {given} is not on this machine, and --dry-run fetches nothing; zoomr models pull {given}")
    return options.model_path(given)


def run(job: Job, target: Path | None, overwrite: bool, retry_failed: bool) -> int:
    """Print the report and return 0. Raises UsageError for what would end the run: an output that does not fit, a prompt that cannot be made."""
    report = _report(job, target, overwrite, retry_failed)
    if job.as_json:
        print(json.dumps(report))
        return 0
    from .chat_view import visible

    for line in _lines(report):
        print(visible(line))  # the problems may be a stranger's
    return 0


def _report(job: Job, target: Path | None, overwrite: bool, retry_failed: bool) -> dict[str, Any]:
    refused = [p for p in job.problems if p.refused is not None]
    report: dict[str, Any] = {
        "problems": len(job.problems), "refused": [{"id": p.id, "line": p.line, "reason": p.refused} for p in refused],
        "replies_per_problem": job.replies.votes, "graded": sum(p.answer is not None for p in job.problems),
        "output": "stdout" if target is None else str(target), "done_already": _done(job, target, overwrite, retry_failed),
        "policy": job.config.policy, "kv_budget": None if job.config.policy == "full" else job.config.kv_budget, "max_tokens": job.max_tokens,
    }  # fmt: skip
    prompts = [p for p in job.problems if p.refused is None]
    with _vocabulary(job.model_file) as model:
        texts, bad = [], []
        for problem in prompts:
            try:
                texts.append(model.render(list(problem.messages)))
            except ZoomrError as error:
                bad.append(f"{problem.id} (line {problem.line}): {error}")
        if bad:
            more = f"\n  and {len(bad) - _LISTED:,} more" if len(bad) > _LISTED else ""
            raise UsageError(f"{counted(len(bad), 'prompt')} cannot be made" + "".join(f"\n  {entry}" for entry in bad[:_LISTED]) + more)
        counts = [len(model.tokenize(text)) for text in texts]
        if job.sampling.grammar is not None:
            job.replies.check_grammar(model)
        report["model"] = model.name
        report |= _fits(job, model, counts, [p.options.get("max_tokens", job.max_tokens) for p in prompts])
    report["prompt_tokens"] = {"min": min(counts), "median": int(statistics.median(counts)), "max": max(counts)} if counts else None
    report["first_prompt"] = texts[0] if texts else None
    return report


def _vocabulary(path: Path) -> Any:
    """The model without its weights, to be closed."""
    from contextlib import closing

    from zoomr_local import trial
    from zoomr_local.libllama import LlamaModel
    from zoomr_local.model import Model

    return closing(Model(path, LlamaModel(trial.check(path), no_alloc=True)))


def _done(job: Job, target: Path | None, overwrite: bool, retry_failed: bool) -> int:
    """Records that the output has already. Raises UsageError if it does not fit this run."""
    from zoomr_local.journal import Journal
    from zoomr_local.tally import Tally

    if target is None:
        return 0
    if not os.path.exists(target):
        if not os.access(target.parent, os.W_OK | os.X_OK):
            raise UsageError(f"cannot write {target}: {target.parent} is no folder that this user may write to; choose another output with -o")
        return 0
    with Journal.open(target, job.replies.line_form(), overwrite) as journal:
        return 0 if overwrite else len(job.problems) - len(job.left(journal, Tally(), retry_failed))


def _fits(job: Job, model: Any, counts: Sequence[int], longest: Sequence[int]) -> dict[str, Any]:
    """Of prompts of ``counts`` tokens with replies of at most ``longest``: which prompts are longer than what the budget keeps whole, and which replies may go beyond the positions that were trained."""
    from zoomr_local.engine import resolve_settings
    from zoomr_local.generation import pinned_ranges
    from zoomr_local.policies import POLICIES

    trained = model.llama.n_ctx_train
    found = {"trained_tokens": trained, "may_exceed_trained": sum(n + most > trained for n, most in zip(counts, longest, strict=True)), "not_kept_whole": 0}
    kind = POLICIES[job.config.policy]
    if kind.unit != "all":
        if kind.unit == "head":
            from zoomr_local.heads_setup import head_policy

            policy = head_policy(model, job.config)
        else:
            policy = kind(resolve_settings(job.config, model.settings))
        found["not_kept_whole"] = sum(pinned_ranges(n, job.config.kv_budget, policy) != [(0, n)] for n in counts)
    return found


def _lines(report: dict[str, Any]) -> list[str]:
    counts, total = report["prompt_tokens"], report["problems"]
    budget = "every token stays in the cache" if report["kv_budget"] is None else counted(report["kv_budget"], "cell")
    replies = f", {report['replies_per_problem']} replies each" if report["replies_per_problem"] > 1 else ""
    done = f"; {report['done_already']} {'is' if report['done_already'] == 1 else 'are'} done already" if report["done_already"] else ""
    lines = [
        f"problems  {total}{replies}, {report['graded']} with a reference{done}",
        f"output    {report['output']}",
        f"model     {report['model']}, policy {report['policy']}, {budget}, at most {counted(report['max_tokens'], 'token')} a reply",
    ]
    if counts:
        spread = f"{counts['min']} to {counts['max']} tokens, median {counts['median']}" if counts["min"] < counts["max"] else counted(counts["max"], "token")
        lines.append(f"prompts   {spread}")
    if report["not_kept_whole"]:
        n = report["not_kept_whole"]
        one = "1 prompt is too long to stay in the cache whole; a larger --kv-budget keeps it"
        lines.append(f"note      {one if n == 1 else f'{n:,} prompts are too long to stay in the cache whole; a larger --kv-budget keeps them'}")
    if report["may_exceed_trained"]:
        lines.append(f"note      {counted(report['may_exceed_trained'], 'reply', 'replies')} could go beyond the {report['trained_tokens']:,} positions that the model was trained on; a smaller -n bounds them")
    for refused in report["refused"][:_LISTED]:
        lines.append(f"refused   {refused['id']} (line {refused['line']}): {refused['reason']}")
    if len(report["refused"]) > _LISTED:
        lines.append(f"refused   {len(report['refused']) - _LISTED} more")
    if report["first_prompt"] is not None:
        lines += ["first prompt:", report["first_prompt"]]
    return lines
