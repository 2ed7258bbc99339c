"""What a trace says of a per-head cache: who has how many cells, and what every layer and KV head holds over time. Pure.

Owns the lines `heads` and `held`, both ways: `HeldLines` makes them for `trace_record.py`, `HeldReader` understands them for
`trace_view.py`, from files that anybody may have written.

Between two selections of a layer each of its heads gains a token with every token of the text, so that what stands behind
each selection says what was held at every moment. A trace gets at most ``HELD_BYTES_PER_TOKEN`` of these lines for a token of text:
where selections are more frequent than that some are left out, and only counted.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

HELD_BYTES_PER_TOKEN = 32

MOST_HEADS = 1 << 14
"""KV heads of all layers together that a reader believes: far more than models have."""

_MOST = 1 << 40


class HeldLines:
    """Collects selections and hands lines to ``write``, which says how many bytes one took."""

    def __init__(self, cells: Any, recalls: bool, write: Callable[..., int]) -> None:
        """``cells``: the `HeadCells` of the generation. The first line, who has how many cells, is written at once."""
        self._write = write
        self._rows: dict[int, tuple[int, ...]] = {}
        self._budgets: dict[int, tuple[int, ...]] = {}
        self._known: dict[int, tuple[int, ...]] = {}
        self._counts = {"selections": 0, "freed_cells": 0, "recalled_cells": 0}
        self._at = self._free_from = 0
        write(
            "heads", kv_heads=int(cells.store.n_head_kv), layer_cells=[int(n) for n in cells.layer_tokens], shared=bool(cells.shared), recalls=recalls,
        )  # fmt: skip

    def selected(self, position: int, layers: Sequence[int], held: Sequence[Sequence[int]], freed_cells: int,
                 budgets: Sequence[Sequence[int]] | None) -> None:  # fmt: skip
        """``layers`` lost tokens; ``held`` has a row for every layer there is, ``budgets`` one for each of ``layers``."""
        self._counts["selections"] += 1
        self._counts["freed_cells"] += int(freed_cells)
        for i, layer in enumerate(layers):
            self._rows[layer] = (position, *map(int, held[layer]))
            if budgets is not None and self._known.get(layer) != tuple(budgets[i]):
                self._known[layer] = tuple(map(int, budgets[i]))
                self._budgets[layer] = (position, *self._known[layer])
        self._at = position
        if position >= self._free_from:
            self.flush()

    def recalled(self, position: int, layers: Sequence[int], held: Sequence[Sequence[int]], recalled_cells: int) -> None:
        """The same selection filled cells of single heads again from a tier."""
        self._counts["recalled_cells"] += int(recalled_cells)
        self._rows.update((layer, (position, *map(int, held[layer]))) for layer in layers)

    def flush(self) -> None:
        """Write what was collected, whatever it takes."""
        if not any(self._counts.values()):
            return
        more = {name: n for name, n in self._counts.items() if n}
        rows = {name: [[layer, *row] for layer, row in sorted(of.items())] for name, of in (("rows", self._rows), ("budgets", self._budgets)) if of}
        n_bytes = self._write("held", **more, **rows)
        self._free_from = self._at - (-n_bytes // HELD_BYTES_PER_TOKEN)
        self._rows, self._budgets, self._counts = {}, {}, dict.fromkeys(self._counts, 0)


class HeldReader:
    """Gathers the lines of one problem. Each method takes a whole line or, with ValueError, TypeError or LookupError, nothing of it."""

    def __init__(self) -> None:
        self.found: dict[str, Any] | None = None

    def heads(self, line: dict[str, Any]) -> None:
        """Who has how many cells; once a problem."""
        kv_heads, cells = _number(line["kv_heads"]), [_number(n) for n in _list(line["layer_cells"])]
        if self.found is not None or not cells or not kv_heads or kv_heads * len(cells) > MOST_HEADS:
            raise ValueError
        self.found = {
            "kv_heads": kv_heads, "layer_cells": cells, "shared": line.get("shared") is True, "recalls": line.get("recalls") is True,
            "selections": 0, "freed_cells": 0, "recalled_cells": 0, "held": [[] for _ in cells], "budgets": [[] for _ in cells],
        }  # fmt: skip

    def held(self, line: dict[str, Any]) -> int:
        """What layers held after selections; the last position that it speaks of, 0 if of none."""
        if self.found is None:
            raise ValueError
        counts = {name: _number(line.get(name, 0)) for name in ("selections", "freed_cells", "recalled_cells")}
        rows = {into: [self._row(into, row) for row in _list(line.get(name, []))] for name, into in (("rows", "held"), ("budgets", "budgets"))}
        for into, found in rows.items():
            if len({layer for layer, _ in found}) < len(found):
                raise ValueError
            for layer, row in found:
                self.found[into][layer].append(row)
        for name, count in counts.items():
            self.found[name] += count
        return max((row[0] for found in rows.values() for _, row in found), default=0)

    def _row(self, into: str, row: Any) -> tuple[int, list[int]]:
        """(layer, [position, a number a head]) of one row, if no head has more than there were tokens, nor the layer more than its cells."""
        layer, position, *counts = (_number(n) for n in _list(row))
        before = self.found[into][layer]
        most = self.found["kv_heads"] * self.found["layer_cells"][layer]
        if len(counts) != self.found["kv_heads"] or sum(counts) > most or (before and position < before[-1][0]):
            raise ValueError
        if into == "held" and max(counts) > position:
            raise ValueError
        return layer, [position, *counts]


def held_at(heads: dict[str, Any], layer: int, tokens: int) -> list[int]:
    """What each head of ``layer`` held once the text had ``tokens`` tokens. ``heads``: what a `HeldReader` found.

    Exact where every selection was recorded; behind one that was left out no more than fits.
    """
    n, cells = heads["kv_heads"], heads["layer_cells"][layer]
    last = last_row(heads["held"][layer], tokens)
    position, *counts = last or [0] * (n + 1)
    fits = (n * cells - sum(counts)) // n if heads["shared"] else cells - max(counts)
    return [count + max(0, min(tokens - position, fits)) for count in counts]


def last_row(rows: list[list[int]], tokens: int) -> list[int] | None:
    """The newest of ``rows`` that begin with an ascending position, once the text had ``tokens`` tokens."""
    low, high = 0, len(rows)
    while low < high:
        middle = (low + high) // 2
        low, high = (middle + 1, high) if rows[middle][0] <= tokens else (low, middle)
    return rows[low - 1] if low else None


def _list(value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise TypeError
    return value


def _number(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= _MOST:
        raise ValueError
    return value
