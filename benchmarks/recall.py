"""Recall of the tokens with most attention, ClusterKV's claim in its own terms: clusters against pages, blocks and controls.

    python -m benchmarks.recall -n 5                    # both bundled models; goes on where it was stopped
    python -m benchmarks.recall -m zoomr-tiny -n 1      # one of them; what its file already holds is neither measured again nor thrown away
    python -m benchmarks.recall_report                  # puts the result files into docs/recall.md

The engine answers dev problems greedily in a per-head store with cells for everything, and the queries and keys of every
token are recorded. At steps along the reply each selector then gets the same keys and the same budget, and what it selects
is compared with the true attention. Keys of a model's later tokens do not depend on a selection here: nothing is evicted.
Writes benchmarks/results/recall-MODEL.json after every problem; each has the date, the commit and the command that it was measured with.
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.runs import RESULTS, ended
from benchmarks.speed import commit, tell
from zoomr_cli import options, versions
from zoomr_local.errors import UsageError
from zoomr_local.evaluate import bundled_suite
from zoomr_local.journal import model_fingerprint
from zoomr_local.libllama import LlamaContext
from zoomr_local.libllama.heads import HeadStore
from zoomr_local.model import Model
from zoomr_local.policies.heads import ClusterKV, Clusters, HeadSettings
from zoomr_local.policies.heads.recall import recall_rate, select_blocks, select_pages

BUDGETS = (64, 128, 256, 512)
FIRST_STEP, EVERY = 1024, 307
"""Steps begin where the greatest budget is half of the text, so that all budgets are measured at the same steps; they keep clear of the pages' period."""
PAGE_TOKENS, BLOCK_TOKENS = 16, 32
_BATCH_TOKENS = 512

FINE = HeadSettings(prefill_cluster_tokens=PAGE_TOKENS, clusters_added=320 // PAGE_TOKENS)
"""As many clusters as there are pages."""

BY_QUERY = ("clusters", "clusters of 16", "clusters at once", "pages", "pages, kept", "blocks of 16", "blocks of 32")
CONTROLS = ("newest", "random", "best", "most")
"""What is compared; the second group needs no query, or knows the answer."""
ONLY_IN = {"best": "recall", "most": "mass"}
"""The two that know the answer, each by the measure that nothing can beat it in; the other measure says nothing of it."""


# ---------------------------------------------------------------- a recorded reply


@dataclass(frozen=True)
class Trace:
    """Prompt and reply as one text of T tokens. ``queries`` float32 [T, n_layer, n_head, d], those of the prompt 0;
    ``keys`` float32 [n_layer, n_head_kv, T, d], both after RoPE; ``scales`` [n_layer]."""

    prompt_tokens: int
    queries: np.ndarray
    keys: np.ndarray
    scales: np.ndarray

    def steps(self, first: int = FIRST_STEP, every: int = EVERY) -> range:
        """The positions whose attention is looked at: in the reply, with a token of the reply before them."""
        return range(max(first, self.prompt_tokens + 1), len(self.queries), every)

    def logits(self, layer: int, step: int) -> np.ndarray:
        """float64 [n_head, step]: what the softmax of the token at ``step`` is over, of all tokens before it."""
        keys = self.keys[layer, :, :step].astype(np.float64)
        grouped = self.queries[step, layer].astype(np.float64).reshape(len(keys), -1, keys.shape[2])
        return self.scales[layer] * (grouped @ keys.swapaxes(1, 2)).reshape(-1, step)


def softmax(logits: np.ndarray) -> np.ndarray:
    """Attention, a row a query head: shares of what the tokens get together."""
    rows = np.exp(logits - logits.max(axis=1, keepdims=True))
    return rows / rows.sum(axis=1, keepdims=True)


def record(model: Model, prompt: list[int], max_tokens: int) -> Trace:
    """Answer ``prompt`` greedily with at most ``max_tokens`` in cells for everything, and keep queries and keys."""
    n = len(prompt) + max_tokens
    with LlamaContext(model.llama, n_cells=n, n_batch=_BATCH_TOKENS, n_ubatch=_BATCH_TOKENS, n_threads=1, paging=False, n_outputs=1) as context:
        store = HeadStore(context, n, observe=1, weights=False)
        queries = [np.zeros((store.n_layers, store.n_head, store.head_dim), np.float32)] * len(prompt)
        store.observe(False)
        for start in range(0, len(prompt), _BATCH_TOKENS):
            piece = prompt[start : start + _BATCH_TOKENS]
            context.decode(piece, range(start, start + len(piece)))
        store.observe(True)
        for position in range(len(prompt), n):
            token = int(context.logits().argmax())
            if model.llama.is_eog(token):
                break
            context.decode([token], [position])
            queries.append(store.queries()[:, 0].copy())
        keys = []
        for layer in range(store.n_layers):
            cells = [store.resident(layer, head)[0] for head in range(store.n_head_kv)]
            keys.append(np.stack([store.keys(layer, head, at) for head, at in enumerate(cells)]))
        scales = np.array([store.kq_scale(layer) for layer in range(store.n_layers)])
    return Trace(len(prompt), np.stack(queries), np.stack(keys), scales)


# ---------------------------------------------------------------- selectors


class Growing:
    """Clusters of one layer for one budget, made as the policy makes them: of the prompt, then whenever the newest tokens are
    as many as it keeps. Nothing is pinned; the sinks are kept."""

    def __init__(self, policy: ClusterKV, trace: Trace, layer: int, budget_tokens: int) -> None:
        self.policy, self.keys, self.layer, self.budget_tokens = policy, trace.keys[layer], layer, budget_tokens
        self.clusters = Clusters(len(self.keys), self.keys.shape[2])
        self.clustered = trace.prompt_tokens
        policy.begin(self.clusters, np.arange(self.clustered), self.keys[:, : self.clustered], np.zeros(self.clustered, bool), layer)
        self.window = policy.window_tokens(budget_tokens, len(self.clusters.kept))

    def advance(self, step: int) -> int:
        """Take over the tokens before ``step``; how many of them are in no cluster yet."""
        while step - self.clustered >= self.window:
            positions = np.arange(self.clustered, self.clustered + self.window)
            self.policy.grow(self.clusters, positions, self.keys[:, positions], self.layer)
            self.clustered += self.window
        return step - self.clustered

    def selected(self, queries: np.ndarray, step: int) -> np.ndarray:
        """bool [n_head_kv, step]: what one token's queries select of the tokens before ``step``, kept and newest ones included."""
        newest = self.advance(step)
        return _of_clusters(self.policy, self.clusters, queries, self.budget_tokens, newest, step)


def _of_clusters(policy: ClusterKV, clusters: Clusters, queries: np.ndarray, budget_tokens: int, newest: int, step: int) -> np.ndarray:
    chosen = policy.select(clusters, queries, np.full(len(clusters.labels), budget_tokens), newest)
    selected = np.zeros((len(clusters.labels), step), bool)
    selected[:, clusters.positions] = chosen.tokens
    selected[:, clusters.kept] = True
    selected[:, step - newest :] = True
    return selected


def most_in_all(logits: np.ndarray, n_kv_head: int, budget_tokens: int) -> np.ndarray:
    """bool [n_kv_head, n]: the tokens that give the greatest mean recall, of all query heads of a KV head together."""
    n_head, n = logits.shape
    rank = np.argsort(np.argsort(-logits, axis=1, kind="stable"), axis=1, kind="stable")
    votes = (rank < budget_tokens).reshape(n_kv_head, n_head // n_kv_head, n).sum(axis=1)
    return _greatest(votes, budget_tokens)


def most_held(logits: np.ndarray, n_kv_head: int, budget_tokens: int) -> np.ndarray:
    """bool [n_kv_head, n]: the tokens with most attention in the mean over the query heads of a KV head. No selection of as many holds more."""
    attention = softmax(logits)
    return _greatest(attention.reshape(n_kv_head, -1, attention.shape[1]).mean(axis=1), budget_tokens)


def _greatest(scores: np.ndarray, count: int) -> np.ndarray:
    """bool, as ``scores``: the ``count`` greatest of each row, of equal ones the first."""
    selected = np.zeros(scores.shape, bool)
    np.put_along_axis(selected, np.argsort(-scores, axis=1, kind="stable")[:, :count], True, axis=1)
    return selected


def with_kept(keys: np.ndarray, queries: np.ndarray, budget_tokens: int, sinks: int, newest: int) -> np.ndarray:
    """bool [n_kv_head, n]: the first ``sinks`` and the ``newest`` tokens, and whole pages of what lies between in the rest of the budget."""
    n = keys.shape[1]
    selected = np.ones((len(keys), n), bool)
    selected[:, sinks : n - newest] = select_pages(queries, keys[:, sinks : n - newest], budget_tokens - sinks - newest, PAGE_TOKENS)
    return selected


class Selectors:
    """All of them on one layer of one trace. Steps must ascend."""

    def __init__(self, trace: Trace, layer: int, budgets: Sequence[int], rng: np.random.Generator) -> None:
        self.trace, self.layer, self.rng = trace, layer, rng
        self.policy = ClusterKV(HeadSettings(pin_prompt=False))
        fine = ClusterKV(FINE)
        self.growing = {b: Growing(self.policy, trace, layer, b) for b in budgets}
        self.fine = {b: Growing(fine, trace, layer, b) for b in budgets}

    def at(self, step: int) -> None:
        """Look at the token at ``step``, which all attend to and none selects."""
        self.step, self.keys = step, self.trace.keys[self.layer, :, :step]
        self.whole = Clusters(len(self.keys), self.keys.shape[2])
        self.policy.begin(self.whole, np.arange(step), self.keys, np.zeros(step, bool), self.layer)

    def by_query(self, name: str, queries: np.ndarray, budget: int) -> np.ndarray:
        """bool [n_head_kv, step]: what ``name`` selects by one token's queries."""
        grown = self.growing[budget]
        ways: dict[str, Callable[[], np.ndarray]] = {
            "clusters": lambda: grown.selected(queries, self.step),
            "clusters of 16": lambda: self.fine[budget].selected(queries, self.step),
            "clusters at once": lambda: _of_clusters(self.policy, self.whole, queries, budget, 0, self.step),
            "pages": lambda: select_pages(queries, self.keys, budget, PAGE_TOKENS),
            "pages, kept": lambda: with_kept(self.keys, queries, budget, len(grown.clusters.kept), grown.advance(self.step)),
            "blocks of 16": lambda: select_blocks(queries, self.keys, budget, PAGE_TOKENS),
            "blocks of 32": lambda: select_blocks(queries, self.keys, budget, BLOCK_TOKENS),
        }
        return ways[name]()

    def control(self, name: str, logits: np.ndarray, budget: int) -> np.ndarray:
        """The same of what needs no query."""
        n_kv = len(self.keys)
        if name == "newest":
            return np.tile(np.arange(self.step) >= self.step - budget, (n_kv, 1))
        if name == "random":
            return np.argsort(self.rng.random((n_kv, self.step)), axis=1) < budget
        return (most_held if name == "most" else most_in_all)(logits, n_kv, budget)


# ---------------------------------------------------------------- measuring


def measure(trace: Trace, budgets: Sequence[int] = BUDGETS, steps: Sequence[int] | None = None, seed: int = 0) -> dict[str, Any]:
    """``recall`` and ``mass``: by selector, budget and whose query ("own", or "before": the token before's), a number a layer.

    ``recall``: of the B tokens with most attention, B being the budget, the share that is selected. ``mass``: the share
    of the attention to earlier tokens that the selection holds. Means over steps and query heads; the token itself, which
    every method attends to, counts in neither. Raises ValueError for a trace with no step.
    """
    steps = list(trace.steps() if steps is None else steps)
    if not steps:
        raise ValueError(f"a text of {len(trace.queries)} tokens has no step to look at")
    found: dict[str, Any] = {"recall": {}, "mass": {}}
    for layer in range(len(trace.keys)):
        selectors = Selectors(trace, layer, budgets, np.random.default_rng((seed, layer)))
        sums: dict[tuple[str, int, str], list[tuple[float, float]]] = {}
        for step in steps:
            selectors.at(step)
            logits = trace.logits(layer, step)  # not weights: those of most tokens are all 0 as far as they are compared
            attention = softmax(logits)
            for name, budget, whose, selected in _all(selectors, logits, budgets):
                held = np.repeat(selected, len(logits) // len(selected), axis=0)
                rates = recall_rate(selected, logits, budget).mean(), (attention * held).sum(axis=1).mean()
                sums.setdefault((name, budget, whose), []).append(rates)
        for (name, budget, whose), rates in sums.items():
            for measure_name, value in zip(("recall", "mass"), np.mean(rates, axis=0), strict=True):
                if ONLY_IN.get(name, measure_name) != measure_name:
                    continue
                rows = found[measure_name].setdefault(name, {}).setdefault(str(budget), {}).setdefault(whose, [])
                rows.append(round(float(value), 5))
    return found


def _all(selectors: Selectors, logits: np.ndarray, budgets: Sequence[int]) -> Iterator[tuple[str, int, str, np.ndarray]]:
    queries = selectors.trace.queries
    for budget in budgets:
        for whose, step in (("own", selectors.step), ("before", selectors.step - 1)):
            for name in BY_QUERY:
                yield name, budget, whose, selectors.by_query(name, queries[step, selectors.layer], budget)
        for name in CONTROLS:
            yield name, budget, "own", selectors.control(name, logits, budget)


# ---------------------------------------------------------------- the command


def run(name: str, n: int, families: Sequence[str] | None, folder: Path, command: str) -> Path:
    """Measure ``n`` dev problems a family with one model, those of its result file excepted; the file."""
    path = options.model_path(Path(name))
    model, now = Model.open(path), {"date": datetime.date.today().isoformat(), "commit": commit(), "command": command}
    try:
        result = begun(folder / f"recall-{path.stem}.json", model_fingerprint(path))
        suite = bundled_suite(families, n, 0, None, "dev", None)
        total = sum(map(len, suite.problems.values()))
        for family, problems in suite.problems.items():
            for problem in problems:
                if any(done["id"] == str(problem.id) for done in result["problems"]):
                    continue
                trace = record(model, model.tokenize(model.render(problem.messages)), suite.max_tokens[family])
                steps = list(trace.steps())
                row = {**now, "family": family, "id": str(problem.id), "prompt_tokens": trace.prompt_tokens, "tokens": len(trace.queries), "steps": len(steps)}
                if steps:
                    row |= measure(trace, steps=steps)
                result["problems"].append(row)
                write(folder / f"recall-{path.stem}.json", result)
                tell(f"{path.stem}: {len(result['problems'])} of {total} problems")
    finally:
        model.close()
    return folder / f"recall-{path.stem}.json"


def begun(path: Path, model: dict[str, Any]) -> dict[str, Any]:
    """The result to go on with: the file's as it is, or an empty one if there is none or it is of another model or other settings."""
    fresh = {
        "model": model, "versions": versions.versions(),
        "asked": {"split": "dev", "seed": 0, "budgets": list(BUDGETS), "first_step": FIRST_STEP, "every": EVERY}, "problems": [],
    }  # fmt: skip
    try:
        held = json.loads(path.read_text(encoding="utf-8"))
        same = (held["model"], held["asked"]) == (fresh["model"], fresh["asked"]) and isinstance(held["problems"], list)
    except (OSError, ValueError, KeyError, TypeError):
        return fresh
    if not same:
        tell(f"{path.name} is of another model or other settings: measured anew")
    return held if same else fresh


def write(path: Path, result: dict[str, Any]) -> None:
    """The result file, a line a problem."""
    path.parent.mkdir(parents=True, exist_ok=True)
    head = json.dumps({k: v for k, v in result.items() if k != "problems"})[:-1]
    rows = ",\n".join(json.dumps(row) for row in result["problems"])
    path.write_text(f'{head}, "problems": [\n{rows}\n]}}\n', encoding="utf-8")


def main(argv: Sequence[str] | None = None) -> int:
    """Measure; the exit code."""
    p = argparse.ArgumentParser(prog="python -m benchmarks.recall", description=__doc__.split("\n", 1)[0])
    p.add_argument("-m", "--models", default="plain-tiny,zoomr-tiny", metavar="LIST", help="default: %(default)s")
    p.add_argument("-n", type=int, default=5, help="dev problems a family (default: 5)")
    p.add_argument("--families", metavar="LIST", help="for example dag,series (default: all)")
    p.add_argument("--results", type=Path, default=RESULTS, metavar="DIR", help="default: benchmarks/results")
    args = p.parse_args(argv)

    def body() -> int:
        if args.n < 1:
            raise UsageError(f"-n {args.n}: give at least 1")
        families = args.families and [part.strip() for part in args.families.split(",") if part.strip()]
        command = f"python -m benchmarks.recall -n {args.n}" + (f" --families {args.families}" if families else "")
        for name in filter(None, (part.strip() for part in args.models.split(","))):
            print(run(name, args.n, families, args.results, command).name)
        return 0

    return ended(body)


if __name__ == "__main__":
    sys.exit(main())
