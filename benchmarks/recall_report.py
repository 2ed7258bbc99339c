"""Writes the figures of docs/recall.md from result files of `benchmarks.recall`: python -m benchmarks.recall_report [--plot]

The files are benchmarks/results/recall-*.json, one a model; a test holds them and the page together. A figure is a mean over the
problems of a mean over steps, layers and query heads; its interval is a bootstrap's over problems, because neither steps nor
heads of one problem are independent.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.recall import BY_QUERY, CONTROLS, ONLY_IN, RESULTS
from benchmarks.report import table
from zoomr_local.errors import UsageError, ZoomrError
from zoomr_local.evaluate_report import require_matplotlib
from zoomr_local.policies.heads import HeadSettings

PAGE = RESULTS.parent.parent / "docs" / "recall.md"
BEGIN, END = "<!-- recall: begin -->", "<!-- recall: end -->"
RESAMPLES = 5000
FEW = 20
"""Problems below which the page says that a bootstrap's intervals are too narrow."""

DENSE_LAYERS = HeadSettings().dense_layers
"""The first layers, which ClusterKV's code leaves dense: in no mean, in the table of layers."""

AGAINST = "pages"
COMPARED = ("clusters", "clusters of 16", "clusters at once", "pages, kept", "blocks of 16", "blocks of 32")

Result = Mapping[str, Any]


def selectors(result: Result, measure: str) -> list[str]:
    """What has this measure in every problem, in the tables' order. Earlier files have no `most`; their share of attention that `best` holds is of no use."""
    rows = [row[measure] for row in result["problems"] if measure in row]
    return [name for name in (*BY_QUERY, *CONTROLS) if ONLY_IN.get(name, measure) == measure and all(name in row for row in rows)]


def by_problem(result: Result, measure: str, name: str, budget: int, whose: str = "own", layers: slice = slice(DENSE_LAYERS, None)) -> np.ndarray:
    """float64 [n]: one number a problem, the mean over ``layers``."""
    rows = [row for row in result["problems"] if measure in row]
    return np.array([np.mean(row[measure][name][str(budget)][whose][layers]) for row in rows])


def interval(values: np.ndarray) -> tuple[float, float]:
    """95 % of the means of problems drawn again with replacement."""
    drawn = np.random.default_rng(0).integers(0, len(values), (RESAMPLES, len(values)))
    low, high = np.percentile(values[drawn].mean(axis=1), [2.5, 97.5])
    return round(float(low), 7), round(float(high), 7)


def percent(values: np.ndarray, sign: str = "") -> str:
    """Mean and interval of shares, in percent or points."""
    low, high = interval(values)
    return f"{100 * values.mean():{sign}.1f} ({100 * low:{sign}.1f}, {100 * high:{sign}.1f})"


def budgets(result: Result) -> list[int]:
    """What was measured, ascending."""
    return sorted(result["asked"]["budgets"])


def levels(result: Result, measure: str, names: Sequence[str], whose: str = "own") -> str:
    """A line a selector, a column a budget."""
    rows = [[name, *(percent(by_problem(result, measure, name, b, whose)) for b in budgets(result))] for name in names]
    return table(["selector", *map(str, budgets(result))], rows)


def differences(result: Result, measure: str, whose: str = "own") -> str:
    """The same less that of `AGAINST`, paired by problem."""
    rows = []
    for name in COMPARED:
        pairs = [by_problem(result, measure, name, b, whose) - by_problem(result, measure, AGAINST, b, whose) for b in budgets(result)]
        rows.append([name, *(percent(pair, "+") for pair in pairs)])
    return table([f"less {AGAINST}, points", *map(str, budgets(result))], rows)


def of_layers(result: Result) -> str:
    """Recall in each layer: clusters and pages."""
    n_layer = len(next(row for row in result["problems"] if "recall" in row)["recall"]["clusters"][str(budgets(result)[0])]["own"])
    rows = []
    for layer in range(n_layer):
        at = slice(layer, layer + 1)
        pairs = [[100 * by_problem(result, "recall", name, b, layers=at).mean() for name in ("clusters", AGAINST)] for b in budgets(result)]
        rows.append([f"{layer}{' (dense in ClusterKV)' if layer < DENSE_LAYERS else ''}", *(f"{one:.1f} / {other:.1f}" for one, other in pairs)])
    return table(["layer", *(f"{b}: clusters / {AGAINST}" for b in budgets(result))], rows)


def verdict(result: Result, measure: str, name: str, whose: str = "own", other: str = AGAINST) -> str:
    """At which budgets ``name`` holds more than ``other``, by the whole interval of the paired difference."""
    found: dict[str, list[str]] = {"more": [], "less": [], "no difference shown": []}
    for b in budgets(result):
        low, high = interval(by_problem(result, measure, name, b, whose) - by_problem(result, measure, other, b, whose))
        found["more" if low > 0 else "less" if high < 0 else "no difference shown"].append(str(b))
    return "; ".join(f"{what} at {', '.join(at)}" for what, at in found.items() if at)


def measured(result: Result) -> str:
    """When, of which commit and by which command the problems were measured; of each start by itself where they differ."""
    starts: dict[tuple[str, str, str], int] = {}
    for row in result["problems"]:
        start = row["date"], row["commit"], "command not recorded" if row["command"] is None else f"`{row['command']}`"
        starts[start] = starts.get(start, 0) + 1
    said = [(f"{date}, commit {commit}, {command}", count) for (date, commit, command), count in starts.items()]
    return f"{said[0][0]}." if len(said) == 1 else f"Measured in {len(said)} starts: {'; '.join(f'{count} problems on {text}' for text, count in said)}."


def text_of(result: Result) -> str:
    """The tables of one model."""
    rows = [row for row in result["problems"] if "recall" in row]
    asked, model = result["asked"], result["model"]
    steps, tokens = sum(row["steps"] for row in rows), [row["tokens"] for row in rows]
    short = len(result["problems"]) - len(rows)
    left_out = f" {short} more replies ended before the first step." if short else ""
    few = f"; a bootstrap of {len(rows)} problems makes intervals that are too narrow"
    said = [
        f"- recall, `{name}` against `{other}`: {verdict(result, 'recall', name, whose, other)}{late}."
        for name, other, whose, late in (
            ("clusters", "pages", "own", ""), ("clusters", "blocks of 16", "own", ""), ("clusters of 16", "pages", "own", ""), ("clusters of 16", "blocks of 16", "own", ""),
            ("clusters at once", "pages", "own", ""), ("clusters", "pages", "before", ", by the query before"), ("clusters of 16", "pages", "before", ", by the query before"),
            ("clusters of 16", "blocks of 16", "before", ", by the query before"), ("clusters", "random", "own", ""),
        )
    ]  # fmt: skip
    if all(by_problem(result, "recall", "best", b).min() == 1 for b in budgets(result)):
        said.append("- `best` reaches all of it: the query heads of a KV head attend alike in these layers of this model, so that one selection for all of them costs nothing here. It would where they differ.")
    said += [
        f"- attention held, `{name}` against `pages`: {verdict(result, 'mass', name)}; by the query before {verdict(result, 'mass', name, 'before')}."
        for name in ("clusters", "clusters of 16", "blocks of 16")
    ]
    return "\n\n".join([
        f"### {model['file'].removesuffix('.gguf')}",
        f"{measured(result)} n = {len(rows)} {asked['split']} problems ({', '.join(dict.fromkeys(row['family'] for row in rows))}) of "
        f"{min(tokens):,} to {max(tokens):,} tokens, {steps} steps in all.{left_out} Model {model['file']}, SHA-256 of {model['hashed']} {model['sha256'][:16]}.",
        "More or less is said where the whole interval of the paired difference lies on one side of 0" + (few if len(rows) < FEW else "") + ":", "\n".join(said),
        "**Recall of the B tokens with most attention, %, by the token's own query**", levels(result, "recall", selectors(result, "recall")), differences(result, "recall"),
        "**Recall, %, by the query of the token before**", levels(result, "recall", BY_QUERY, "before"),
        "**Attention that the selection holds, %, by the token's own query**", levels(result, "mass", selectors(result, "mass")), differences(result, "mass"),
        "**Attention held, %, by the query of the token before**", levels(result, "mass", BY_QUERY, "before"),
        "**Recall in each layer, %, by the token's own query**", of_layers(result),
    ])  # fmt: skip


def filled(page: str, results: Sequence[Result]) -> str:
    """The page with its block written anew. Raises UsageError if it has none."""
    head, begin, rest = page.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not begin or not end:
        raise UsageError(f"the page has no block {BEGIN} ... {END}; put it into docs/recall.md")
    body = "\n\n".join(text_of(result) for result in results) or "Not measured."
    return f"{head}{BEGIN}\n\n{body}\n\n{END}{tail}"


def held(folder: Path = RESULTS) -> list[dict[str, Any]]:
    """The result files with something measured, by name."""
    found = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("recall-*.json"))]
    return [result for result in found if any("recall" in row for row in result["problems"])]


def picture_digest(results: Sequence[Result]) -> str:
    """A hash of every figure that `plot` draws."""
    drawn = [[r["model"]["file"], name, b, by_problem(r, m, name, b).tolist()] for r in results for m in ("recall", "mass") for name in selectors(r, m) for b in budgets(r)]
    return hashlib.sha256(json.dumps(drawn).encode()).hexdigest()[:16]


def plot(path: Path, results: Sequence[Result]) -> None:
    """Recall and attention held against the budget as a PNG, a row a model. Raises UsageError without matplotlib."""
    require_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.2, 3.4 * len(results) + 0.6), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(results), 2, squeeze=False, sharex=True, sharey=True)
    for row, result in zip(panels, results, strict=True):
        for axes, (measure, what) in zip(row, (("recall", "recall of the B tokens with most attention, %"), ("mass", "attention that the selection holds, %")), strict=True):
            for name in selectors(result, measure):
                means, ends = zip(*((v.mean(), interval(v)) for v in (by_problem(result, measure, name, b) for b in budgets(result))), strict=True)
                bars = [[max(0.0, 100 * (m - low)) for m, (low, _) in zip(means, ends)], [max(0.0, 100 * (high - m)) for m, (_, high) in zip(means, ends)]]
                style = {"color": f"C{BY_QUERY.index(name)}"} if name in BY_QUERY else {"color": "0.5", "linestyle": ("-", "--", ":", "-.")[CONTROLS.index(name)]}
                axes.errorbar(budgets(result), [100 * m for m in means], bars, label=name, marker="o", markersize=3, linewidth=1, capsize=2, **style)
            axes.set(title=f"{result['model']['file'].removesuffix('.gguf')}: {what}", ylim=(0, 103))
            axes.title.set_fontsize(9)
            axes.set_xscale("log", base=2)
            axes.set_xticks(budgets(result), list(map(str, budgets(result))))
            axes.grid(alpha=0.3)
    for axes in panels[-1]:
        axes.set_xlabel("budget, tokens")
    drawn = dict(pair for axes in panels[0] for pair in zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    figure.legend(drawn.values(), drawn.keys(), loc="outside lower center", ncols=5, frameon=False)
    figure.savefig(path, format="png", dpi=120, metadata={"Source": picture_digest(results)})


def main(argv: Sequence[str] | None = None) -> int:
    """Write the page, and draw if that is asked; the exit code."""
    p = argparse.ArgumentParser(prog="python -m benchmarks.recall_report", description=__doc__.split("\n", 1)[0])
    p.add_argument("--plot", action="store_true", help="draw docs/recall.png too (needs matplotlib)")
    args = p.parse_args(argv)
    try:
        if args.plot:
            plot(PAGE.with_suffix(".png"), held())
        PAGE.write_text(filled(PAGE.read_text(encoding="utf-8"), held()), encoding="utf-8")
    except ZoomrError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
