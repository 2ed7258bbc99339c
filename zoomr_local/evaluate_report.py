"""What the records of a grid come to: accuracies, paired differences, costs, the agreement as a predictor.

Pure arithmetic over records of `solve.py`, and the files it can be written to (JSON, CSV, PNG). `cli/eval.py`
prints it, `benchmarks/accuracy.py` makes the page of it. Shares are in 0..1, sizes in tokens (cells) or bytes,
times in seconds.
"""

from __future__ import annotations

import csv
import hashlib
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .errors import UsageError
from .evaluate import REFERENCE, Cell
from .grading import wilson_interval
from .solve import Tally

Record = dict[str, Any]

# ---------------------------------------------------------------- statistics


def paired_difference(first: Sequence[bool], second: Sequence[bool]) -> dict[str, Any]:
    """How much more often ``first`` is right than ``second`` on the same problems, a share in -1..1.

    ``interval95`` is Newcombe's hybrid score interval for paired data (Statistics in Medicine 17, 1998, 2635-2650,
    method 10), and ``mcnemar_p`` the exact two-sided McNemar test. A bootstrap of pairs that all agree would claim
    an interval of width 0, however few they are; this one does not, and it needs no random numbers.
    ``gained`` and ``lost`` count the problems that only one of the two has right.
    """
    pairs = list(zip(first, second, strict=True))
    gained = sum(a and not b for a, b in pairs)
    lost = sum(b and not a for a, b in pairs)
    both = sum(a and b for a, b in pairs)
    n = len(pairs)
    low, high = newcombe_interval(both, gained, lost, n - both - gained - lost)
    return {
        "n": n, "gained": gained, "lost": lost, "difference": round((gained - lost) / n, 6) if n else None,
        "interval95": [round(low, 6), round(high, 6)] if n else None, "mcnemar_p": round(mcnemar_p(gained, lost), 6),
    }  # fmt: skip


def newcombe_interval(both: int, gained: int, lost: int, neither: int) -> tuple[float, float]:
    """95 % interval of (gained - lost) / n from the four counts of a paired table; (-1, 1) for an empty one.

    Newcombe 1998, method 10: the two Wilson intervals squared and added, less their covariance by the phi
    coefficient, which is shrunk towards 0 by n / 2 where it is positive.
    """
    n = both + gained + lost + neither
    if n == 0:
        return -1.0, 1.0
    right = both + gained, both + lost
    spread = []
    for count in right:
        low, high = wilson_interval(count, n)
        spread.append((count / n - low, high - count / n))
    phi = 0.0
    product = right[0] * (n - right[0]) * right[1] * (n - right[1])
    if product:
        moment = both * neither - gained * lost
        phi = (max(moment - n / 2, 0) if moment > 0 else moment) / math.sqrt(product)
    (down1, up1), (down2, up2) = spread
    difference = (gained - lost) / n
    below = math.sqrt(max(0.0, down1**2 - 2 * phi * down1 * up2 + up2**2))
    above = math.sqrt(max(0.0, up1**2 - 2 * phi * up1 * down2 + down2**2))
    return max(-1.0, difference - below), min(1.0, difference + above)


def mcnemar_p(gained: int, lost: int) -> float:
    """Two-sided exact McNemar test: the chance of a split as uneven as this if both sides were equally good."""
    n = gained + lost
    tail = sum(math.comb(n, k) for k in range(min(gained, lost) + 1)) / 2**n
    return min(1.0, 2 * tail)


LEAST_PROBLEMS = 5
"""Right, and wrong, problems that it takes to say what predicts which is which."""


def ranking_pairs(scores: Sequence[float], right: Sequence[bool]) -> tuple[float, int]:
    """(pairs won, pairs): of all pairs of a right and a wrong problem, how often the right one scored higher.

    Ties count half, so won / pairs is the area under the ROC curve (the Mann-Whitney statistic).
    """
    values, is_right = np.asarray(scores, float), np.asarray(right, bool)
    good, bad = values[is_right], values[~is_right]
    won = float((good[:, None] > bad).sum() + 0.5 * (good[:, None] == bad).sum())
    return won, len(good) * len(bad)


# ---------------------------------------------------------------- cells


def report(found: Mapping[Cell, Sequence[Record]]) -> dict[str, Any]:
    """Everything about a grid, ready for JSON: ``cells`` in order, and ``agreement`` over all of them."""
    references = {cell.family: records for cell, records in found.items() if cell.policy == REFERENCE}
    cells = [cell_report(cell, records, references.get(cell.family)) for cell, records in found.items()]
    return {"cells": cells, "agreement": agreement_report(found)}


def cell_report(cell: Cell, records: Sequence[Record], reference: Sequence[Record] | None) -> dict[str, Any]:
    """One cell's figures; ``from_full`` is None for the reference itself and where there is none.

    ``resident_mean`` is the mean over decoded tokens, ``sequence_mean`` the mean length of prompt and reply: what
    a full cache would have held at the end. Failed problems count in ``failed`` only.
    """
    tally = Tally()
    for record in records:
        tally.add(record)
    whole = [r for r in records if "error" not in r]
    low, high = wilson_interval(tally.right, tally.graded)
    tokens = [r["usage"]["completion_tokens"] for r in whole]
    mean = _mean([r["kv"]["resident_mean"] for r in whole], tokens)
    seconds = tally.prefill_seconds + tally.decode_seconds
    return {
        "family": cell.family, "policy": cell.policy, "kv_budget": cell.budget_tokens,
        "settings": {name: list(v) if isinstance(v, tuple) else v for name, v in cell.choices},
        "settings_text": cell.settings_text, "asked": {name: list(v) if isinstance(v, tuple) else v for name, v in cell.asked.items()},
        "n": tally.graded, "right": tally.right, "failed": tally.failed,
        "accuracy": round(tally.right / tally.graded, 6) if tally.graded else None,
        "wilson95": [round(low, 6), round(high, 6)],
        "from_full": None if reference is None or cell.policy == REFERENCE else _paired(records, reference),
        "resident_peak": tally.resident_peak, "resident_peak_bytes": tally.resident_peak * tally.token_bytes,
        "resident_mean": round(mean, 1), "resident_mean_bytes": round(mean * tally.token_bytes),
        "sequence_mean": round(_mean([r["usage"]["prompt_tokens"] + r["usage"]["completion_tokens"] for r in whole]), 1),
        "page_ins": tally.page_ins, "paged_out_bytes": tally.paged_out_bytes, "dropped_tokens": tally.dropped_tokens,
        "splits": tally.splits, "completion_tokens": tally.completion_tokens,
        "prompted_summaries": tally.prompted_summaries, "cut_summaries": tally.cut_summaries, "injected_tokens": tally.injected_tokens,
        "tokens_per_s": None if tally.tokens_per_s is None else round(tally.tokens_per_s, 1),
        "seconds": round(seconds, 2), "out_of_tokens": tally.out_of_tokens,
        "out_of_tokens_share": round(tally.out_of_tokens / len(whole), 6) if whole else None,
        "agreement": _agreement(records),
    }  # fmt: skip


def agreement_report(found: Mapping[Cell, Sequence[Record]]) -> dict[str, Any] | None:
    """How well a problem's mean agreement predicts that it is right, over all cells that vote; None without any.

    Only problems of one cell are compared with each other: pooled, an easy family whose heads agree more would
    look like prediction.
    """
    won, pairs, n, n_wrong = 0.0, 0, 0, 0
    for records in found.values():
        scores, right = _votes(records)
        n, n_wrong = n + len(scores), n_wrong + len(right) - sum(right)
        more, of = ranking_pairs(scores, right)
        won, pairs = won + more, pairs + of
    if not n:
        return None
    return {"auc": round(won / pairs, 4) if pairs else None, "pairs": pairs, "n": n, "n_wrong": n_wrong}


def auc_text(auc: float | None, n: int, n_wrong: int) -> str:
    """An AUC for a reader: one or two wrong problems, or right ones, would decide it, so fewer than `LEAST_PROBLEMS` give none."""
    if auc is None or min(n_wrong, n - n_wrong) < LEAST_PROBLEMS:
        return f"- (wrong problems: {n_wrong} of {n}; it takes {LEAST_PROBLEMS} of either kind)"
    return f"{auc:.3f}"


def _agreement(records: Sequence[Record]) -> dict[str, Any] | None:
    scores, right = _votes(records)
    if not scores:
        return None
    won, pairs = ranking_pairs(scores, right)
    return {
        "mean": round(_mean(scores), 4), "auc": round(won / pairs, 4) if pairs else None,
        "n": len(scores), "n_wrong": len(right) - sum(right),
    }  # fmt: skip


def _votes(records: Sequence[Record]) -> tuple[list[float], list[bool]]:
    used = [r for r in records if "correct" in r and r["kv"]["agreement"] is not None]
    return [r["kv"]["agreement"] for r in used], [bool(r["correct"]) for r in used]


def _paired(records: Sequence[Record], reference: Sequence[Record]) -> dict[str, Any]:
    """The difference over the problems that both have graded."""
    other = {r["id"]: bool(r["correct"]) for r in reference if "correct" in r}
    shared = [r for r in records if "correct" in r and r["id"] in other]
    return paired_difference([bool(r["correct"]) for r in shared], [other[r["id"]] for r in shared])


def _mean(values: Sequence[float], weights: Sequence[float] | None = None) -> float:
    weights = [1] * len(values) if weights is None else weights
    total = sum(weights)
    return sum(v * w for v, w in zip(values, weights, strict=True)) / total if total else 0.0


# ---------------------------------------------------------------- files


def write_json(path: Path, result: Mapping[str, Any]) -> None:
    """The whole result as one JSON object; readers see the old file or the new one."""
    _replace(path, json.dumps(result, indent=1) + "\n")


def write_csv(path: Path, result: Mapping[str, Any]) -> None:
    """One line a cell, one column a figure; nested figures have dotted names, absent ones are empty."""
    rows = [_flat({k: v for k, v in cell.items() if k not in ("settings", "asked")}) for cell in result["cells"]]
    columns = list(dict.fromkeys(name for row in rows for name in row))
    # A figure that is nested in one cell and absent in another has its parts' columns, and none of its own.
    columns = [name for name in columns if not any(other.startswith(name + ".") for other in columns)]
    lines: list[str] = []
    writer = csv.DictWriter(_Lines(lines), columns, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    _replace(path, "".join(lines))


class _Lines:
    """What csv needs of a file."""

    def __init__(self, lines: list[str]) -> None:
        self.write = lines.append


def _flat(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, item in value.items():
        if isinstance(item, Mapping):
            found.update(_flat(item, f"{prefix}{name}."))
        elif isinstance(item, list):
            found.update({f"{prefix}{name}.{end}": v for end, v in zip(("low", "high"), item, strict=False)})
        else:
            found[prefix + name] = item
    return found


def _replace(path: Path, text: str) -> None:
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        beside.write_text(text, encoding="utf-8")
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


# ---------------------------------------------------------------- plot


def require_matplotlib() -> None:
    """Raises UsageError that names the extra if matplotlib is missing: asked before a run, not after it."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise UsageError("--plot needs matplotlib, which the extra installs: pip install 'zoomr-local[bench]'") from error


_COLOURS = {
    REFERENCE: "black", "zoomr": "C0", "sumr": "C1", "recency": "C2", "random": "C3", "streaming": "C4", "breadcrumbs": "C5",
    "snapkv": "C6", "h2o": "C8", "rkv": "C9", "pyramid": "navy", "reasonalloc": "darkgreen",
}  # fmt: skip
_MARKERS = {REFERENCE: "D", "zoomr": "o", "sumr": "s", "recency": "^", "random": "v", "streaming": "P", "breadcrumbs": "X"}
_MORE_MARKERS = "*<>hdp8"
"""Of the second and later settings of one policy; a policy keeps its colour in every panel and every picture."""


def plot(path: Path, result: Mapping[str, Any]) -> None:
    """Accuracy against peak resident cells as a PNG: a panel a family, a colour a policy, bars of 95 %.

    Budgets are named on the axis, and the points of one budget stand side by side, because their bars would hide
    each other. The dotted line is what ``full`` gets. The file carries `plot_digest` of what it shows. Raises
    UsageError if matplotlib is missing or no cell has graded anything.
    """
    require_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    cells = [cell for cell in result["cells"] if cell["n"]]
    families = list(dict.fromkeys(cell["family"] for cell in cells))
    if not families:
        raise UsageError("nothing to draw: no cell has graded a problem")
    columns = 1 if len(families) == 1 else 2 if len(families) in (2, 4) else 3
    rows = -(-len(families) // columns)
    styles = _styles(cells)
    figure = Figure(figsize=(4.6 * columns, 3.3 * rows + 0.7), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(rows, columns, squeeze=False, sharey=True).ravel()
    for axes, family in zip(panels, families, strict=False):
        _draw_family(axes, family, [cell for cell in cells if cell["family"] == family], styles)
    for axes in panels[len(families) :]:
        axes.set_visible(False)
    handles: dict[str, Any] = {}
    for axes in panels[: len(families)]:
        handles.update({name: handle for handle, name in zip(*axes.get_legend_handles_labels(), strict=True)})
    figure.legend([handles[name] for name in styles], list(styles), loc="outside lower center", ncols=min(6, len(styles)), frameon=False)
    for axes in panels[::columns]:
        axes.set_ylabel("right answers, % (95 % interval)")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png", dpi=130, metadata={"Source": plot_digest(result)})


def plot_digest(result: Mapping[str, Any]) -> str:
    """A hash of every figure that `plot` draws, so that a picture of other results can be told."""
    names = ("family", "policy", "kv_budget", "settings_text", "n", "accuracy", "wilson95", "resident_peak", "sequence_mean")
    return hashlib.sha256(json.dumps([[cell[name] for name in names] for cell in result["cells"]]).encode()).hexdigest()[:16]


def _line_name(cell: Mapping[str, Any]) -> str:
    return f"{cell['policy']} {cell['settings_text']}".strip()


def _styles(cells: Iterable[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Colour and marker of every line, ``full`` first, otherwise in the cells' order."""
    names = dict.fromkeys((_line_name(cell), cell["policy"]) for cell in sorted(cells, key=lambda cell: cell["policy"] != REFERENCE))
    seen: dict[str, int] = {}
    styles = {}
    for name, policy in names:
        number = seen[policy] = seen.get(policy, -1) + 1
        marker = _MARKERS.get(policy, "o") if number == 0 else _MORE_MARKERS[(number - 1) % len(_MORE_MARKERS)]
        styles[name] = {"color": _COLOURS.get(policy, "C7"), "marker": marker, "alpha": 1 if number == 0 else 0.6}
    return styles


def _fills(cell: Mapping[str, Any]) -> bool:
    """Whether a cell's policy came near its budget. One that has no need of it, as `breadcrumbs`, is named on the axis where it stands."""
    return cell["kv_budget"] is not None and cell["resident_peak"] > 0.9 * cell["kv_budget"]


def _draw_family(axes: Any, family: str, cells: Sequence[Mapping[str, Any]], styles: Mapping[str, dict[str, Any]]) -> None:
    """One panel. Cells are on a logarithmic axis: a budget and ``full`` are often a factor of four apart, or eight."""
    budgets = sorted({cell["kv_budget"] for cell in cells if cell["kv_budget"] is not None})
    present = [name for name in styles if any(_line_name(cell) == name for cell in cells) and name != REFERENCE]
    gaps = [math.log2(second / first) for first, second in zip(budgets, budgets[1:], strict=False)]
    step = min([0.07, *(0.6 * gap / len(present) for gap in gaps)])  # octaves; what stands side by side keeps off the next budget
    for name in [REFERENCE, *present]:
        points = sorted((cell for cell in cells if _line_name(cell) == name), key=lambda cell: cell["resident_peak"])
        if not points:
            continue
        shares = [100 * cell["accuracy"] for cell in points]
        # Rounding may put a bound a hair inside its share, and matplotlib refuses bars of negative length.
        below = [max(0.0, share - 100 * cell["wilson95"][0]) for share, cell in zip(shares, points, strict=True)]
        above = [max(0.0, 100 * cell["wilson95"][1] - share) for share, cell in zip(shares, points, strict=True)]
        aside = 0.0 if name == REFERENCE else step * (present.index(name) - (len(present) - 1) / 2)
        cells_used = [cell["resident_peak"] * 2 ** (aside if _fills(cell) else 0) for cell in points]
        axes.errorbar(
            cells_used, shares, [below, above], label=name, linestyle="-" if len(points) > 1 else "none",
            linewidth=1, markersize=6, capsize=2, clip_on=False, **styles[name],
        )  # fmt: skip
        if name == REFERENCE:
            axes.axhline(shares[0], color="black", linestyle=":", linewidth=1)
    full = next((cell for cell in cells if cell["policy"] == REFERENCE), None)
    named = {cell["kv_budget"] if _fills(cell) else cell["resident_peak"] for cell in cells if cell["kv_budget"]}
    ticks = {place: f"{place:,}" + (f"\n{100 * place / full['sequence_mean']:.0f} %" if full else "") for place in sorted(named)}
    if full:
        ticks[full["resident_peak"]] = f"{full['resident_peak']:,}\nfull"
    axes.set_xscale("log", base=2)
    axes.set_xticks(list(ticks), list(ticks.values()))
    axes.minorticks_off()
    axes.margins(x=0.15)
    counts = sorted({cell["n"] for cell in cells})
    n = str(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    axes.set(title=f"{family}, n = {n}", xlabel="most KV cells in use; % of the mean full trace" if full else "most KV cells in use", ylim=(-3, 103))
    axes.grid(alpha=0.3)
