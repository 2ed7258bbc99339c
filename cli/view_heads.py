"""Draws what a per-head cache held over time, as text: a row a layer, a row a KV head, time to the right.

Pure; `view.py` prints it. ``heads`` is what `zoomr_local.trace_held` found in a trace. The page draws the same in `view_page_heads.js`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from zoomr_local.trace_held import last_row

from .blocks import AWAY, KEPT, WRITTEN, Glyphs

SHADES = "·░▒▓█"
ASCII_SHADES = ".-+*#"
MOST_LAYER_ROWS = 32
MOST_HEAD_ROWS = 64
_WIDE_COLUMNS = 60  # room for words before each row

Numbers = Callable[[int, int], "list[int]"]
"""(layer, tokens of the text) -> a number a KV head."""


@dataclass(frozen=True)
class Scale:
    """From ``low`` to ``high`` tokens in as many equal steps as there are ``shades``; blank is less than ``low``."""

    low: int
    high: int
    shades: str

    def shade(self, tokens: float) -> str:
        """The character of ``tokens``."""
        if tokens < self.low:
            return " "
        steps = len(self.shades)
        return self.shades[min(steps - 1, int((tokens - self.low) * steps / (self.high - self.low)))] if self.high > self.low else self.shades[-1]

    def legend(self) -> list[str]:
        """Every character with its tokens."""
        if self.low == self.high:
            return [f"{self.shades[-1]} {self.low:,} tokens"]
        steps = len(self.shades)
        first = [self.low + -(-(self.high - self.low) * i // steps) for i in range(steps)]
        last = [*(n - 1 for n in first[1:]), self.high]
        named = [f"{c} {a:,}" + (f" to {b:,}" if b > a else "") for c, a, b in zip(self.shades, first, last) if a <= b]
        return [*named[:-1], named[-1] + " tokens"]


def after_selection(heads: dict[str, Any], layer: int, tokens: int) -> list[int]:
    """What each head kept at the layer's last selection before the text had ``tokens`` tokens; before the first, all of them."""
    row = last_row(heads["held"][layer], tokens)
    n = min(tokens, heads["layer_cells"][layer])
    return [n] * heads["kv_heads"] if row is None else row[1:]


def budget_at(heads: dict[str, Any], layer: int, tokens: int) -> list[int]:
    """What each head might keep at the layer's last selection; before the first, its share of the layer's cells."""
    row = last_row(heads["budgets"][layer], tokens)
    return [heads["layer_cells"][layer]] * heads["kv_heads"] if row is None else row[1:]


def scale_of(heads: dict[str, Any], shades: str) -> Scale:
    """From the least to the most that a head kept at a selection or might have; of a text without a selection, its layers' cells.

    It spans a fifth of the most at least, so that next to equal numbers look so.
    """
    rows = [row[1:] for of in (heads["held"], heads["budgets"]) for layer in of for row in layer]
    every = [n for row in rows for n in row] or heads["layer_cells"]
    return Scale(min(min(every), max(every) * 4 // 5), max(every), shades)


def row_legend(width: int, glyphs: Glyphs) -> str:
    """What the characters of the rows of texts mean, which `blocks.py` draws."""
    meanings = ((WRITTEN, "being written"), (KEPT, "in the cache"), (AWAY, "each layer and head has its own part of it"))
    return "\n".join(_joined([f"{glyphs.states[state]} {text}" for state, text in meanings], width))


def maps(picture: dict[str, Any], width: int, unicode: bool) -> list[str]:
    """The heat maps, at most ``width`` columns wide, as lines; none where the trace is of no per-head cache."""
    heads = picture["heads"]
    if heads is None:
        return []
    scale = scale_of(heads, SHADES if unicode else ASCII_SHADES)
    kept: Numbers = lambda layer, tokens: after_selection(heads, layer, tokens)  # noqa: E731
    budget: Numbers = lambda layer, tokens: budget_at(heads, layer, tokens)  # noqa: E731
    cells: Numbers = lambda layer, tokens: [heads["layer_cells"][layer]] * heads["kv_heads"]  # noqa: E731
    end, n = max(1, picture["tokens"]), heads["kv_heads"]
    of = "in its one KV head" if n == 1 else f"the mean of its {n} KV heads"
    lines = ["", *_wrapped(f"Tokens that each layer kept, {of}; at the right at the end, and its cells", width)]
    lines += _map(_layer_rows(heads), (kept, kept, cells), scale, end, width)
    rows, group = _head_rows(heads, width)
    grouped = f"; a row is the mean of {group}" if group > 1 else ""
    if rows and any(heads["budgets"]):
        lines += ["", *_wrapped(f"Budget of each KV head in tokens; at the right what it kept at the end, and its budget{grouped}", width)]
        lines += _map(rows, (budget, kept, budget), scale, end, width)
    elif rows:
        lines += ["", *_wrapped(f"Tokens that each KV head kept; at the right at the end{grouped}", width)]
        lines += _map(rows, (kept, kept, None), scale, end, width)
    elif n > 1:
        lines += _wrapped(f"{n} KV heads in each of {len(heads['layer_cells'])} layers are too many rows for a terminal; --html draws each", width)
    lines += ["", *_joined([*scale.legend(), *(["blank: fewer, still filling"] if scale.low > 0 else [])], width)]
    return lines + _wrapped(_said(heads), width)


@dataclass(frozen=True)
class _Row:
    """One row of a map: the mean of ``heads`` (all: None) of ``layers``."""

    label: str
    layers: range
    heads: range | None = None


def _layer_rows(heads: dict[str, Any]) -> list[_Row]:
    n = len(heads["layer_cells"])
    step = -(-n // MOST_LAYER_ROWS)
    found = [range(first, min(n, first + step)) for first in range(0, n, step)]
    return [_Row(_span("layer", layers), layers) for layers in found]


def _head_rows(heads: dict[str, Any], width: int) -> tuple[list[_Row], int]:
    """A row a head, or the fewest neighbours of a layer in one that make no more rows than a terminal has room for; and how many."""
    layers, n = len(heads["layer_cells"]), heads["kv_heads"]
    group = next((g for g in range(1, n) if n % g == 0 and layers * (n // g) <= MOST_HEAD_ROWS), None)
    if group is None:
        return [], 0
    parts = [range(first, first + group) for first in range(0, n, group)]
    layer_word, head_word = ("layer ", "head") if width >= _WIDE_COLUMNS else ("", "")
    rows = []
    for layer in range(layers):
        for part in parts:
            first = f"{layer_word}{layer}{'' if layer_word else ':'} " if part[0] == 0 else ""
            rows.append(_Row(first + _span(head_word, part).strip(), range(layer, layer + 1), part))
    return rows, group


def _span(word: str, numbers: range) -> str:
    return f"{word} {numbers[0]}" if len(numbers) == 1 else f"{word}s {numbers[0]}-{numbers[-1]}"


def _map(rows: list[_Row], drawn: tuple[Numbers, Numbers, Numbers | None], scale: Scale, end: int, width: int) -> list[str]:
    """A line a row, and one with the first and last token. ``drawn``: what is shaded, and one or two numbers for the right."""
    shaded, first, second = drawn
    labels = max(len(row.label) for row in rows)
    tails = ["/".join(f"{_value(row, of, end):,.0f}" for of in (first, second) if of) for row in rows]
    widest = max(map(len, tails))
    columns = max(8, min(end, width - labels - widest - 2))
    stops = [max(1, end * (i + 1) // columns) for i in range(columns)]
    lines = [f"{row.label:>{labels}} {''.join(scale.shade(_value(row, shaded, at)) for at in stops)} {tail:>{widest}}" for row, tail in zip(rows, tails)]
    last = f"{end:,}"
    axis = [f"{'':>{labels}} 0{last:>{columns - 1}}"] if columns > len(last) + 1 else []
    return [*lines, *axis]


def _value(row: _Row, numbers: Numbers, tokens: int) -> float:
    found = [numbers(layer, tokens) for layer in row.layers]
    return _mean(n for one in found for n in (one if row.heads is None else one[row.heads[0] : row.heads[-1] + 1]))


def _mean(numbers: Any) -> float:
    every = list(numbers)
    return sum(every) / len(every)


def _said(heads: dict[str, Any]) -> str:
    back = f", {heads['recalled_cells']:,} filled again" if heads["recalls"] else ""
    return (
        f"{heads['selections']:,} selections; {heads['freed_cells']:,} cells of single heads freed{back}. Drawn is what stayed at each; until the next"
        " one a head gains a token with every token of the text. Layers and heads count from 0."
    )


def _wrapped(text: str, width: int) -> list[str]:
    import textwrap

    return textwrap.wrap(text, width, break_long_words=False)


def _joined(entries: list[str], width: int) -> list[str]:
    """``entries`` three spaces apart, in as few lines as fit."""
    lines = [""]
    for entry in entries:
        more = f"{lines[-1]}   {entry}" if lines[-1] else entry
        if len(more) > width and lines[-1]:
            lines.append(entry)
        else:
            lines[-1] = more
    return lines
