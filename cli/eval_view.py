"""The tables that `zoomr eval` prints: accuracies with their intervals, and what they cost. `eval.py` calls it."""

from __future__ import annotations

import os
from typing import Any

_PIPE_COLUMNS = 160  # where stdout is no terminal nothing is wrapped


def show(result: dict[str, Any]) -> None:
    """Print both tables and what the brackets mean."""
    from rich.console import Console

    from zoomr_local.evaluate_report import auc_text

    console = Console(markup=False, highlight=False, emoji=False)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = _PIPE_COLUMNS
    console.print(_accuracy_table(result["cells"]))
    console.print(_cost_table(result["cells"]))
    console.print("In brackets: 95 % intervals, Wilson's of the share and Newcombe's of the paired difference in points.", soft_wrap=True)
    agreement = result["agreement"]
    if agreement:
        auc = auc_text(agreement["auc"], agreement["n"], agreement["n_wrong"])
        console.print(
            f"Agreement as a predictor that a problem is right: AUC {auc}, where 0.5 is chance; {agreement['pairs']:,} pairs of a right and a wrong problem of one cell.",
            soft_wrap=True,
        )


def _table(cells: list[dict[str, Any]], title: str, *headings: str) -> Any:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True, title=title, title_justify="left", title_style="bold")
    for heading in ("family", "policy", "budget"):
        table.add_column(heading, justify="right" if heading == "budget" else "left", no_wrap=True)
    if any(cell["settings_text"] for cell in cells):
        table.add_column("settings")
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    return table


def _heads(cell: dict[str, Any], cells: list[dict[str, Any]]) -> list[str]:
    heads = [cell["family"], cell["policy"], "-" if cell["kv_budget"] is None else f"{cell['kv_budget']:,}"]
    return [*heads, cell["settings_text"]] if any(c["settings_text"] for c in cells) else heads


def _accuracy_table(cells: list[dict[str, Any]]) -> Any:
    table = _table(cells, "Accuracy", "n", "right", "from full", "cut off")
    for cell in cells:
        pair, share = cell["from_full"], cell["out_of_tokens_share"]
        paired = "-" if pair is None or pair["difference"] is None else _with_interval(pair["difference"], pair["interval95"], "+")
        table.add_row(
            *_heads(cell, cells), str(cell["n"]),
            "-" if cell["accuracy"] is None else _with_interval(cell["accuracy"], cell["wilson95"]), paired,
            "-" if share is None else f"{100 * share:.0f} %",
        )  # fmt: skip
    return table


def _cost_table(cells: list[dict[str, Any]]) -> Any:
    from .render import human_bytes, human_seconds

    table = _table(cells, "Cost", "peak", "mean", "peak KV", "page-ins", "tokens/s", "time")
    for cell in cells:
        rate = cell["tokens_per_s"]
        table.add_row(
            *_heads(cell, cells), f"{cell['resident_peak']:,}", f"{cell['resident_mean']:,.0f}",
            human_bytes(cell["resident_peak_bytes"]), f"{cell['page_ins']:,}", "-" if rate is None else f"{rate:,.0f}",
            human_seconds(cell["seconds"]),
        )  # fmt: skip
    return table


def _with_interval(share: float, interval: list[float], sign: str = "") -> str:
    return f"{100 * share:{sign}.1f} ({100 * interval[0]:{sign}.1f}, {100 * interval[1]:{sign}.1f})"
