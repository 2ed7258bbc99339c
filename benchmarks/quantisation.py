"""What a file's types cost: two files of the same network read the same reference traces, token by token.

    python -m models.export CHECKPOINT [CHECKPOINT] f32.gguf --type f32
    python -m benchmarks.quantisation f32.gguf models/zoomr-tiny.gguf -n 20

Dev problems of the bundled tasks at the length of the test sets, everything in view, f16 cells, the thoughts given: so every
token is judged at the place where the reference stands, and a trace counts as whole if each of its tokens is the
favourite. Prints a table, writes benchmarks/results/quantisation-NAME.json, NAME being the second file's, and puts the table
into the card models/NAME.md, where that has its marks.
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.report import table
from benchmarks.runs import RESULTS, ended
from benchmarks.speed import commit, tell
from benchmarks.turns import ROOT
from zoomr_local.errors import UsageError
from zoomr_local.journal import model_fingerprint
from zoomr_local.libllama import LlamaContext
from zoomr_local.model import Model
from zoomr_models.tasks import LONG_THOUGHTS, Problem, generate, prompt_text

BEGIN, END = "<!-- quantisation: begin -->", "<!-- quantisation: end -->"
_BATCH_TOKENS = 256
_SEED = 77  # of the problems: those that training was judged by


def scores(context: LlamaContext, ids: Sequence[int]) -> np.ndarray:
    """Log-probabilities float64 [T - 1, n_vocab]: of each token after the first, everything before it in view."""
    context.clear()
    rows = []
    for start in range(0, len(ids) - 1, _BATCH_TOKENS):
        piece = ids[start : min(start + _BATCH_TOKENS, len(ids) - 1)]
        context.decode(piece, range(start, start + len(piece)), logits="all")
        rows += [context.logits(i).astype(np.float64) for i in range(len(piece))]
    logits = np.stack(rows)
    logits -= logits.max(axis=1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))


def compare(exact: np.ndarray, other: np.ndarray, told: Sequence[int]) -> dict[str, Any]:
    """Of one trace, from the log-probabilities [T, n_vocab] by either file: sums over its tokens ``told`` [T].

    ``wrong``: tokens that are not the favourite, by the first file and the second; ``changed``: favourites that differ;
    ``nats``: the KL divergence from the first to the second, summed; ``most_nats``: the largest.
    """
    rows = np.arange(len(told))
    divergence = (np.exp(exact) * (exact - other)).sum(axis=1)
    favourites = exact.argmax(axis=1), other.argmax(axis=1)
    return {
        "tokens": len(rows), "wrong": [int((best != np.asarray(told)).sum()) for best in favourites],
        "changed": int((favourites[0] != favourites[1]).sum()), "nats": float(divergence.sum()), "most_nats": float(divergence.max()),
    }  # fmt: skip


def family_row(contexts: Sequence[LlamaContext], problems: Sequence[Problem], model: Model, plain: bool) -> dict[str, Any]:
    """What `compare` finds over all problems, with ``whole``: traces without a wrong token by either file."""
    sums: dict[str, Any] = {"problems": len(problems), "tokens": 0, "wrong": [0, 0], "changed": 0, "nats": 0.0, "most_nats": 0.0, "whole": [0, 0]}
    for problem in problems:
        prompt = model.tokenize(prompt_text(problem.prompt))
        ids = model.tokenize(prompt_text(problem.prompt) + (problem.plain_trace if plain else problem.trace))
        exact, other = (scores(context, ids)[len(prompt) - 1 :] for context in contexts)
        found = compare(exact, other, ids[len(prompt) :])
        for name in ("tokens", "changed", "nats"):
            sums[name] += found[name]
        sums["most_nats"] = max(sums["most_nats"], found["most_nats"])
        for i, wrong in enumerate(found["wrong"]):
            sums["wrong"][i] += wrong
            sums["whole"][i] += not wrong
    return sums


def measure(exact: Path, other: Path, n: int, plain: bool) -> dict[str, Any]:
    """Every family's row. Raises UsageError for files whose vocabularies differ."""
    with ExitStack() as stack:
        models = [Model.open(path) for path in (exact, other)]
        for model in models:
            stack.callback(model.close)
        if models[0].llama.n_vocab != models[1].llama.n_vocab:
            raise UsageError(f"{exact.name} has {models[0].llama.n_vocab} tokens, {other.name} {models[1].llama.n_vocab}: give two files of one network")
        contexts = [LlamaContext(m.llama, n_cells=m.llama.n_ctx_train, n_batch=_BATCH_TOKENS, n_threads=1) for m in models]
        for context in contexts:
            stack.callback(context.close)
        rows = {}
        for family, thoughts in LONG_THOUGHTS.items():
            rows[family] = family_row(contexts, generate(family, n, _SEED, thoughts, "dev"), models[1], plain)
            tell(f"{family}: {n} traces")
        return rows


def report(rows: dict[str, dict[str, Any]]) -> str:
    """The table that is printed and stands in the model's card."""
    lines = [
        [f"`{family}`", f"{r['whole'][0]} and {r['whole'][1]} of {r['problems']}", *(f"{1e4 * w / r['tokens']:.2f}" for w in r["wrong"]),
         f"{1e4 * r['changed'] / r['tokens']:.2f}", f"{r['nats'] / r['tokens']:.1e}"]
        for family, r in rows.items()
    ]  # fmt: skip
    head = ["family", "traces without a wrong token, f32 and shipped", "wrong of 10,000 tokens, f32", "shipped", "favourites that differ, of 10,000", "KL, nats a token"]
    return table(head, lines)


def write_card(card: Path, rows: dict[str, dict[str, Any]]) -> None:
    """Put the table between the marks of a card that has them."""
    text = card.read_text(encoding="utf-8") if card.is_file() else ""
    if BEGIN in text and END in text:
        head, tail = text.split(BEGIN, 1)[0], text.split(END, 1)[1]
        card.write_text(f"{head}{BEGIN}\n\n{report(rows)}\n\n{END}{tail}", encoding="utf-8")


def main(argv: Sequence[str] | None = None) -> int:
    """Measure; the exit code."""
    p = argparse.ArgumentParser(prog="python -m benchmarks.quantisation", description=__doc__.split("\n", 1)[0])
    p.add_argument("exact", type=Path, metavar="F32.gguf")
    p.add_argument("other", type=Path, metavar="GGUF")
    p.add_argument("-n", type=int, default=10, help="problems a family (default: 10)")
    p.add_argument("--plain", action="store_true", help="of a model that was trained without summaries")
    p.add_argument("--results", type=Path, default=RESULTS, metavar="DIR", help="default: benchmarks/results")
    p.add_argument("--cards", type=Path, default=ROOT / "models", metavar="DIR", help="default: models")
    args = p.parse_args(argv)

    def body() -> int:
        if args.n < 1:
            raise UsageError(f"-n {args.n}: give at least 1")
        rows = measure(args.exact, args.other, args.n, args.plain)
        print(report(rows))
        whole = {"benchmark": "quantisation", "date": datetime.date.today().isoformat(), "commit": commit(), "command": f"python -m benchmarks.quantisation {args.exact.name} {args.other.name} -n {args.n}" + " --plain" * args.plain, "problems_seed": _SEED,
                 "files": [model_fingerprint(path) for path in (args.exact, args.other)], "families": rows}
        target = args.results / f"quantisation-{args.other.stem}.json"
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
        write_card(args.cards / f"{args.other.stem}.md", rows)
        tell(f"written: {target.name}")
        return 0

    return ended(body)


if __name__ == "__main__":
    sys.exit(main())
