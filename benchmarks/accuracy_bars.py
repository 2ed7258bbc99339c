"""The bars of the accuracy page, judged on the cells of results of `zoomr eval`. `accuracy.py` writes them.

Every line says the number of problems that it rests on, because the controls have fewer than the policies that are compared.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from zoomr_local.grading import wilson_interval

BEACON_BAR = "breadcrumbs at c = 8: at least 80 % of the uncompressed model's accuracy"
CONTROLS = ("recency", "random", "streaming", "sumr")

Result = dict[str, Any]
Cell = dict[str, Any]
Bar = tuple[str, str, bool | None]
"""What is asked, what was measured, and whether it is met; None where nothing was measured."""


def bars(result: Result, models: Sequence[Result] = ()) -> list[Bar]:
    """Every bar of the project that is for this result's model, those that are not met first, then those not measured.

    A model that `breadcrumbs` was run on has a bar of its own, and the others are for the one that zooms. ``models``
    are the results of all models, among which the uncompressed one is looked for.
    """
    families = list(dict.fromkeys(cell["family"] for cell in result["cells"]))
    if has(result, "breadcrumbs"):
        found = [_beacon_bar(result, models)]
    else:
        found = [bar for family in families for bar in _family_bars(result, family)]
        if not any(has(other, "breadcrumbs") for other in models):
            found.append((BEACON_BAR, "not measured", None))
    found.append(_time_bar(result))
    return sorted(found, key=lambda bar: (True if bar[2] is None else bar[2], bar[2] is not None))


def has(result: Result, policy: str) -> bool:
    """Whether any cell of ``policy`` has graded a problem."""
    return any(cell["policy"] == policy and cell["n"] for cell in result["cells"])


def uncompressed(result: Result, models: Sequence[Result]) -> Result:
    """What breadcrumbs is held against: the model that was trained without beacons, or ``result`` where it was not run."""
    return next((other for other in models if other["model"]["file"].startswith("plain") and has(other, "full")), result)


def _beacon_bar(result: Result, models: Sequence[Result]) -> Bar:
    """The mean over all families that both have, so that the numbers of problems weigh nothing: of the model that was trained without
    beacons, or of this one without a budget."""
    plain = uncompressed(result, models)
    full = {cell["family"]: cell for cell in plain["cells"] if cell["policy"] == "full" and cell["n"]}
    crumbs = [cell for cell in result["cells"] if cell["policy"] == "breadcrumbs" and cell["n"] and cell["settings_text"] in ("", "beacon_every=8")]
    # a c that is named counts before the model's own; the method has no budget, so the greatest is the nearest to it
    mine = {cell["family"]: cell for cell in sorted(crumbs, key=lambda cell: (cell["settings_text"], cell["kv_budget"]))}
    both = [family for family in mine if family in full]
    if not both:
        return BEACON_BAR, "not measured", None
    shares = [sum(cells[family]["right"] / cells[family]["n"] for family in both) / len(both) for cells in (mine, full)]
    texts = [_pooled([cells[family] for family in both]) for cells in (mine, full)]
    ratio = shares[0] / shares[1] if shares[1] else 0.0
    what = f"{100 * ratio:.0f} %: {texts[0]} against {texts[1]}, of {plain['model']['file']} under full, {', '.join(both)}"
    return BEACON_BAR, what, round(ratio, 6) >= 0.8


def _pooled(cells: Sequence[Cell]) -> str:
    right, n = sum(cell["right"] for cell in cells), sum(cell["n"] for cell in cells)
    low, high = wilson_interval(right, n)
    return _with_n({"accuracy": right / n, "wilson95": [low, high], "n": n})


def _family_bars(result: Result, family: str) -> list[Bar]:
    full = _find(result, family, "full", None)
    if full is None:
        return [(f"{family}: full", "not measured", None)]
    found: list[Bar] = [(f"{family}: full, at least 97 % right", _with_n(full), full["accuracy"] >= 0.97)]
    for part, name in ((4, "a quarter"), (8, "an eighth"))[: 2 if family == "series" else 1]:
        budget = _budget(result, family, full["sequence_mean"] / part)
        where = f"{family}, {name} of the full trace"
        if budget is None:
            found.append((f"{where}: zoomr within 2 points of full", f"not measured: it is {full['sequence_mean'] / part:.0f} cells", None))
            continue
        where = f"{where} ({budget} cells)"
        found.append(_gap(result, family, "zoomr", budget, f"{where}: zoomr within 2 points of full", lambda d: d >= -0.02))
        for control in CONTROLS:
            asked = f"{where}: {control} at least 10 points behind full"
            found.append(_gap(result, family, control, budget, asked, lambda d: d <= -0.1))
    return found


def _gap(result: Result, family: str, policy: str, budget: int, asked: str, enough: Callable[[float], bool]) -> Bar:
    cell = _find(result, family, policy, budget)
    if cell is None or cell["from_full"] is None or cell["from_full"]["difference"] is None:
        return asked, "not measured", None
    return asked, f"{difference(cell)}, n = {cell['from_full'].get('n', cell['n'])}", enough(round(cell["from_full"]["difference"], 6))


def _time_bar(result: Result) -> Bar:
    name = "200 problems of one family, policy and budget: at most 10 minutes on two cores"
    measured = [cell for cell in result["cells"] if cell["n"]]
    if not measured:
        return name, "not measured", None
    slowest = max(measured, key=lambda cell: cell["seconds"] / cell["n"])
    minutes = 200 * slowest["seconds"] / slowest["n"] / 60 / 2  # seconds are a process's, and two cores have two
    cell = " ".join(filter(None, (slowest["family"], slowest["policy"], str(slowest["kv_budget"] or ""), slowest["settings_text"])))
    return name, f"{minutes:.1f} minutes for 200 in two processes at the pace of the slowest cell, {cell}, n = {slowest['n']}", minutes <= 10


def _budget(result: Result, family: str, limit: float) -> int | None:
    """The greatest measured budget of zoomr with default settings that is no more than ``limit`` cells."""
    have = [c["kv_budget"] for c in result["cells"] if (c["family"], c["policy"], c["settings_text"]) == (family, "zoomr", "")]
    return max((budget for budget in have if budget <= limit), default=None)


def _find(result: Result, family: str, policy: str, budget: int | None) -> Cell | None:
    """The cell with default settings, if it graded anything."""
    wanted = (family, policy, budget, "")
    for cell in result["cells"]:
        if (cell["family"], cell["policy"], cell["kv_budget"], cell["settings_text"]) == wanted and cell["n"]:
            return cell
    return None


def share(cell: Cell) -> str:
    """Right answers in percent, with the interval."""
    low, high = cell["wilson95"]
    return f"{100 * cell['accuracy']:.1f} ({100 * low:.1f}, {100 * high:.1f})"


def _with_n(cell: Cell) -> str:
    return f"{share(cell)}, n = {cell['n']}"


def difference(cell: Cell) -> str:
    """From `full`, in points, with the interval; ``-`` where there is none."""
    pair = cell["from_full"]
    if pair is None or pair["difference"] is None:
        return "-"
    low, high = pair["interval95"]
    return f"{100 * pair['difference']:+.1f} ({100 * low:+.1f}, {100 * high:+.1f})"
