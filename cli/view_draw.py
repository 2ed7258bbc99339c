"""Draws a recorded problem in the terminal: a row a block over time, the cells in use, and the list of thoughts.

Pure text; `view.py` prints it. The rows are drawn by `blocks.py`, as in `zoomr demo`. What models and files say is shown
without the characters that a terminal would obey.
"""

from __future__ import annotations

from typing import Any

from rich.text import Text

from zoomr_local.events import BlockClosed
from zoomr_local.trace_view import CELLS, DISK, LOOSE, LOST, RAM, WRITTEN, ZOOMED, cells_at

from . import blocks
from .blocks import shown

_STATE = {WRITTEN: blocks.WRITTEN, CELLS: blocks.KEPT, ZOOMED: blocks.ZOOMED, LOOSE: blocks.AWAY}
_PLACE = {WRITTEN: "cache", CELLS: "cache", ZOOMED: "zoomed", RAM: "ram", DISK: "disk", LOST: "lost", LOOSE: "singly dropped"}
_POINTS = 400  # of the line of cells: more than a terminal has columns


class PictureTrace(blocks.Trace):
    """A picture in the form that `blocks.draw` draws; positions of hostile files cost nothing, however large."""

    def __init__(self, picture: dict[str, Any]) -> None:
        self._rows = {i: row for i, row in enumerate(picture["rows"]) if row["number"] is not None or row["kind"] in ("thought", "answer")}
        self._tokens = max(1, picture["tokens"])
        closed = [
            BlockClosed(i, row["kind"], tuple(row["detail"]), None if row["summary"] is None else tuple(row["summary"]), label(row))
            for i, row in self._rows.items()
        ]
        step = max(1, self._tokens // _POINTS)
        known = {x: cells_at(picture["cells"], x) for x in range(0, self._tokens + 1, step)}
        known.update((x, y) for x, y in picture["cells"])
        super().__init__(closed, resident=[(x, round(v)) for x, v in sorted(known.items()) if v is not None])

    def spans(self, block: BlockClosed) -> list[tuple[int, int, int]]:
        """As recorded; RAM, disk and what is lost are all away."""
        return [(first, last, _STATE.get(state, blocks.AWAY)) for first, last, state in self._rows[block.block]["states"]]

    @property
    def begin(self) -> int:
        """The whole sequence is drawn, from its first token."""
        return 0

    @property
    def end(self) -> int:
        """One past the last position."""
        return self._tokens


def label(row: dict[str, Any]) -> str:
    """The summary, or how the text begins, on one line."""
    return " ".join(shown(row["summary_text"].strip() or row["text"][:400]).split())


def heading(picture: dict[str, Any]) -> list[str]:
    """What it is, how it ended and what it took, a line each."""
    budget, done, result = picture["budget_tokens"], picture["finished"], picture["result"]
    limit = f"{budget:,} cells" if budget else "everything in cells"
    lines = [shown(f"{picture['id']}: {picture['model']}, policy {picture['policy']}, {limit}")]
    cache = (done or {}).get("cache", {})
    peak = cache.get("resident_peak_tokens") or max((y for _, y in picture["cells"]), default=0)
    thoughts = sum(row["kind"] == "thought" for row in picture["rows"])
    lines.append(f"{picture['tokens']:,} tokens, {picture['prompt_tokens']:,} of them the prompt; at most {peak:,} in the cache")
    lines.append(f"{thoughts:,} thoughts, {picture['zooms']:,} zooms")
    if result.get("error"):
        lines.append(shown(f"failed: {result['error']}"))
    elif done is None:
        lines.append("the recording ends before the text does")
    else:
        verdict = {True: ", right", False: ", wrong"}.get(result.get("correct"), "")
        answer = " ".join(shown(result.get("answer") or "").split())
        lines.append(f"ended: {shown(done['reason'])}" + (f"; answer: {answer[:200]}{verdict}" if answer else ""))
    return lines


def drawing(picture: dict[str, Any], width: int, glyphs: blocks.Glyphs) -> Text:
    """Rows and graphs, at most ``width`` columns wide; every block has its row."""
    trace = PictureTrace(picture)
    return blocks.draw(trace, width, glyphs, most_rows=len(trace.blocks))


def thoughts(picture: dict[str, Any], width: int) -> list[str]:
    """A line a block: its number, length, zooms, where it was at the end, and its summary."""
    rows = [row for row in picture["rows"] if row["number"] is not None]
    if not rows:
        return []
    lines = [f"{'':>3} {'tokens':>7} {'zooms':>6} {'chosen':>6}  {'at the end':<11} text"]
    for i, row in enumerate(rows, start=1):
        place = _PLACE.get(row["states"][-1][2], "dropped") if row["states"] else "-"
        kind = "" if row["kind"] == "thought" else f"({shown(row['kind'])}) "
        size = row["detail"][1] - row["detail"][0]
        line = f"{i:>3} {size:>7,} {row['zooms']:>6,} {row['chosen']:>6,}  {place:<11} {kind}{label(row)}"
        lines.append(line if len(line) <= width else line[: width - 2] + "..")
    return lines


def notes(picture: dict[str, Any]) -> list[str]:
    """What else happened, a line each, the same only once and counted."""
    counted: dict[str, int] = {}
    for _, what, text in picture["notes"]:
        said = shown(f"{what}: {text}")
        counted[said] = counted.get(said, 0) + 1
    lines = [said if n == 1 else f"{said} ({n} times)" for said, n in counted.items()]
    if picture["dropped_tokens"]:
        lines.append(f"dropped: {picture['dropped_tokens']:,} tokens left the cache for good")
    if picture["skipped_lines"]:
        n = picture["skipped_lines"]
        lines.append(f"{n:,} line{'s' * (n != 1)} of the trace {'were' if n != 1 else 'was'} not understood and left out")
    return lines
