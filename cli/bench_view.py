"""The tables and bars of `zoomr bench` on a terminal. Draws rows of `zoomr_local.bench_report`; decides nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from zoomr_local.bench_report import bytes_text, depth_text, held_bytes, lines, notes, params_text, pause_text, speed_text, threads_text

_FULL, _EIGHTHS = "█", " ▏▎▍▌▋▊▉"
_LEAST_BAR = 12
_COLOURS = ("cyan", "green", "yellow", "magenta", "blue", "red")


def show(rows: Sequence[Mapping[str, Any]], repetitions: int, console: Console | None = None) -> None:
    """What was measured, on what, two tables, bars, and the notes."""
    console = console or Console(markup=False, highlight=False, emoji=False)
    console.print(_what(rows[0]))
    console.print()
    console.print(_speeds(rows))
    if any(row["kv_bytes"] is not None for row in rows):
        console.print()
        console.print(_memory(rows))
        paging = _paging(rows)
        if paging.row_count:
            console.print()
            console.print(paging)
        console.print(_bars(rows, console.width))
        console.print()
    for line in notes(rows, repetitions):
        console.print(line)


def _what(row: Mapping[str, Any]) -> str:
    if row["model_size_bytes"] is None:
        return row["model"]
    return (f"{row['model']}, {row['model_type']}, {bytes_text(row['model_size_bytes'])}, {params_text(row['model_params'])} params, "
            f"{row['backend']}, {threads_text(row['threads'])}, K and V {row['type_k']}")


def _table(*columns: str, left: int) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for number, name in enumerate(columns):
        table.add_column(name, justify="left" if number < left else "right", overflow="fold")
    return table


def _speeds(rows: Sequence[Mapping[str, Any]]) -> Table:
    table = _table("policy", "test", "t/s", "least", "greatest", left=2)
    for row in rows:
        if row["tokens_per_second"] is None:
            table.add_row(row["policy"], row["test"], row["status"], "", "")
            continue
        mark = "*" if row["busy"] else ""
        table.add_row(row["policy"], row["test"], *(f"{row[key]:.4g}{mark}" for key in
                      ("tokens_per_second", "tokens_per_second_min", "tokens_per_second_max")))
    return table


def _cases(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """A row a case, of those that were measured: memory is the same in both of its tests, and the pauses are those of the last, which decodes."""
    cases = {(row["depth_tokens"], row["policy"]): row for row in rows if row["kv_bytes"] is not None}
    return list(cases.values())


def _memory(rows: Sequence[Mapping[str, Any]]) -> Table:
    table = _table("depth", "policy", "KV cells", "index", "RAM tier", "disk tier", "RSS peak", left=2)
    for row in _cases(rows):
        sizes = (bytes_text(row[f"{name}_bytes"]) for name in ("kv", "index", "ram", "disk", "rss_peak"))
        table.add_row(depth_text(row["depth_tokens"]), row["policy"], *sizes)
    return table


def _paging(rows: Sequence[Mapping[str, Any]]) -> Table:
    table = _table("depth", "policy", "page-in ms", "page-out ms", "pauses", "to disk per 1k tokens", left=2)
    for row in _cases(rows):
        if row["page_out_count"] or row["page_in_count"]:
            table.add_row(depth_text(row["depth_tokens"]), row["policy"], pause_text(row, "in"), pause_text(row, "out"),
                          str(row["page_in_count"] + row["page_out_count"]), bytes_text(row["disk_written_bytes_per_1000_tokens"]))
    return table


def _bars(rows: Sequence[Mapping[str, Any]], width: int) -> Group:
    """Decoding speed and what the length costs in memory, a bar a policy and depth."""
    parts: list[Text] = []
    by_policy = lines(rows, "tg")
    speeds = [row["tokens_per_second"] or 0 for points in by_policy.values() for row in points]
    sizes = [held_bytes(row) for points in by_policy.values() for row in points]
    for title, most, value, text in (
        ("decode, tokens/s", max(speeds), lambda row: row["tokens_per_second"] or 0, lambda row: speed_text(row).split(" (")[0]),
        ("memory that the length costs (cells, index, RAM tier)", max(sizes), held_bytes, lambda row: bytes_text(held_bytes(row))),
    ):
        parts.append(Text(f"\n{title}"))
        for number, (policy, points) in enumerate(by_policy.items()):
            colour = _COLOURS[number % len(_COLOURS)]
            for row in points:
                head = f"{policy:>9} @ {depth_text(row['depth_tokens']):<6} "
                room = max(_LEAST_BAR, width - len(head) - 14)
                parts.append(Text.assemble(head, (_bar(value(row), most, room), colour), f" {text(row)}"))
    return Group(*parts)


def _bar(value: float, most: float, width: int) -> str:
    eighths = round(8 * width * value / most) if most else 0
    return _FULL * (eighths // 8) + (_EIGHTHS[eighths % 8].strip() or ("" if eighths >= 8 else "▏"))
