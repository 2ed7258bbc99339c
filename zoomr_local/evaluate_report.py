"""What the records of a grid come to: accuracies, paired differences, costs, the agreement as a predictor.

Pure arithmetic over records of `solve.py`, and the files it can be written to (JSON, CSV, PNG). `cli/eval.py`
prints it, `benchmarks/accuracy.py` makes the page of it. Shares are in 0..1, sizes in tokens (cells) or bytes,
times in seconds.
"""

from __future__ import annotations

import csv
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
        "settings_text": cell.settings_text, "n": tally.graded, "right": tally.right, "failed": tally.failed,
        "accuracy": round(tally.right / tally.graded, 6) if tally.graded else None,
        "wilson95": [round(low, 6), round(high, 6)],
        "from_full": None if reference is None or cell.policy == REFERENCE else _paired(records, reference),
        "resident_peak": tally.resident_peak, "resident_peak_bytes": tally.resident_peak * tally.token_bytes,
        "resident_mean": round(mean, 1), "resident_mean_bytes": round(mean * tally.token_bytes),
        "sequence_mean": round(_mean([r["usage"]["prompt_tokens"] + r["usage"]["completion_tokens"] for r in whole]), 1),
        "page_ins": tally.page_ins, "paged_out_bytes": tally.paged_out_bytes, "dropped_tokens": tally.dropped_tokens,
        "splits": tally.splits, "completion_tokens": tally.completion_tokens,
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
    won, pairs, n = 0.0, 0, 0
    for records in found.values():
        scores, right = _votes(records)
        n += len(scores)
        more, of = ranking_pairs(scores, right)
        won, pairs = won + more, pairs + of
    if not n:
        return None
    return {"auc": round(won / pairs, 4) if pairs else None, "pairs": pairs, "n": n}


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
    rows = [_flat({k: v for k, v in cell.items() if k != "settings"}) for cell in result["cells"]]
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


def plot(path: Path, result: Mapping[str, Any]) -> None:
    """Accuracy against peak resident cells as a PNG: a panel a family, a line a policy, bars of 95 %.

    Lines stand a hundredth apart, because budgets are equal and bars would hide each other. Raises
    UsageError if matplotlib is missing.
    """
    require_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    families = list(dict.fromkeys(cell["family"] for cell in result["cells"]))
    figure = Figure(figsize=(5.2 * len(families), 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, family in zip(figure.subplots(1, len(families), squeeze=False)[0], families, strict=True):
        _draw_family(axes, [c for c in result["cells"] if c["family"] == family and c["n"]])
        axes.set(title=family, xlabel="peak of resident KV cells (tokens)", ylim=(-0.03, 1.03))
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("share of right answers, 95 % interval")
    figure.axes[0].legend(fontsize="small")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png", dpi=150)


def _draw_family(axes: Any, cells: Iterable[Mapping[str, Any]]) -> None:
    lines: dict[str, list[Mapping[str, Any]]] = {}
    for cell in cells:
        lines.setdefault(f"{cell['policy']} {cell['settings_text']}".strip(), []).append(cell)
    for number, (name, points) in enumerate(lines.items()):
        points = sorted(points, key=lambda c: c["resident_peak"])
        shares = [c["accuracy"] for c in points]
        below = [c["accuracy"] - c["wilson95"][0] for c in points]
        above = [c["wilson95"][1] - c["accuracy"] for c in points]
        style = {"color": "black", "linestyle": "none"} if name == REFERENCE else {}
        # Rounding may put a bound a hair inside its share, and matplotlib refuses bars of negative length.
        bars = [[max(0.0, b) for b in below], [max(0.0, a) for a in above]]
        cells_used = [c["resident_peak"] * (1 + 0.01 * (number - len(lines) / 2)) for c in points]
        drawn = axes.errorbar(cells_used, shares, bars, marker="o", markersize=4, capsize=2, label=name, **style)
        if name == REFERENCE:
            axes.axhline(shares[0], color=drawn[0].get_color(), linestyle=":", linewidth=1)
