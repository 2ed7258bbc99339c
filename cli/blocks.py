"""Draws what happened inside one problem: which thoughts were written, paged out and zoomed, and when.

`Trace` keeps the few numbers a drawing needs from an event stream; `draw` makes the text. Time runs to the
right, a thought is a row. Pure: no terminal, no model. `demo.py` calls it, and `view_draw.py` for recorded traces.
What models say is shown without the characters that a terminal would obey.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.text import Text

from zoomr_local.events import BlockClosed, Event, PagedIn, PagedOut, Refreshed, TokenDecoded, TokenInjected

from .chat_view import visible

AWAY, KEPT, WRITTEN, ZOOMED = range(4)  # in ascending order of what wins when a column covers several
_LABEL_COLUMNS = 26
_MOST_ROWS = 24
_TURNING = dict.fromkeys([*range(0x202A, 0x202F), *range(0x2066, 0x206A), 0x200E, 0x200F, 0x061C])


@dataclass(frozen=True)
class Glyphs:
    """One character a state, and the steps of a small graph, lowest first."""

    states: tuple[str, str, str, str]
    bars: str


UNICODE = Glyphs(("·", "░", "█", "▲"), "▁▂▃▄▅▆▇█")
ASCII = Glyphs((".", "-", "#", "^"), "_.-=oO#@")
_STYLES = ("dim", "dim cyan", "bold", "bold yellow")
_MEANINGS = ("paged out", "in the cache", "being written", "zoomed: the heads vote for it")


@dataclass
class Trace:
    """Feed it every event of one generation. Positions are tokens since the start of the prompt."""

    blocks: list[BlockClosed] = field(default_factory=list)
    moves: list[tuple[int, tuple[int, ...], bool]] = field(default_factory=list)
    choices: list[tuple[int, tuple[int, ...]]] = field(default_factory=list)
    resident: list[tuple[int, int]] = field(default_factory=list)

    def feed(self, event: Event) -> None:
        """Keep what the drawing needs of ``event``."""
        if isinstance(event, TokenDecoded | TokenInjected):
            self.resident.append((event.position, event.resident_tokens))
        elif isinstance(event, BlockClosed):
            self.blocks.append(event)
        elif isinstance(event, Refreshed):
            self.choices.append((event.position, event.zoomed))
        elif isinstance(event, PagedOut | PagedIn) and event.part == "detail":
            self.moves.append((event.position, event.blocks, isinstance(event, PagedIn)))

    @property
    def zooms(self) -> int:
        """How many times a thought came back into the cache."""
        return sum(len(blocks) for _, blocks, came_in in self.moves if came_in)

    def as_dict(self) -> dict[str, Any]:
        """The trace as JSON: blocks with their ranges, moves and the cells in use, all by position."""
        return {
            "blocks": [b.as_dict() for b in self.blocks],
            "moves": [{"position": p, "blocks": list(b), "to": "cache" if i else "tier"} for p, b, i in self.moves],
            "choices": [{"position": p, "zoomed": list(b)} for p, b in self.choices],
            "resident": [list(pair) for pair in self.resident],
        }

    def spans(self, block: BlockClosed) -> list[tuple[int, int, int]]:
        """(first position, end position, state) of ``block`` from its first token to the end, in order.

        A block is shown as zoomed while it is chosen by votes and in the cache, also if it had not left yet.
        """
        closed = block.summary[1] if block.summary else block.detail[1]
        changes = [(p, 0, came_in) for p, blocks, came_in in self.moves if block.block in blocks]
        changes += [(p, 1, block.block in zoomed) for p, zoomed in self.choices]
        spans, since, inside, chosen = [(block.detail[0], closed, WRITTEN)], closed, True, False
        for position, is_choice, value in sorted(changes) + [(self.end, 0, False)]:
            spans.append((since, position, (ZOOMED if chosen else KEPT) if inside else AWAY))
            since = max(since, position)
            inside, chosen = (inside, value) if is_choice else (value, chosen)
        return _joined([span for span in spans if span[0] < span[1]])

    @property
    def begin(self) -> int:
        """Position of the first token written by the model."""
        return self.resident[0][0] if self.resident else 0

    @property
    def end(self) -> int:
        """One past the last position."""
        return self.resident[-1][0] + 1 if self.resident else 0


def shown(text: str) -> str:
    """``text`` without what a terminal would obey, nor what would turn the order of its characters around."""
    return visible(text).translate(_TURNING)


def draw(trace: Trace, width: int, glyphs: Glyphs = UNICODE, most_rows: int = _MOST_ROWS) -> Text:
    """The drawing, at most ``width`` columns wide: a row a block (the first ``most_rows``), then the cells in use."""
    columns = max(10, width - _LABEL_COLUMNS - 8)
    edges = _edges(trace, columns)
    text = Text(no_wrap=True)
    shown, hidden = trace.blocks[:most_rows], len(trace.blocks) - most_rows
    for number, block in enumerate(shown, start=1):
        text.append(_label(number, block))
        for state in _row(trace, block, edges):
            text.append(" " if state is None else glyphs.states[state], "" if state is None else _STYLES[state])
        text.append("\n")
    if hidden > 0:
        text.append(f"   ... and {hidden} more\n", "dim")
    _append_cells(text, trace, edges, glyphs)
    return text


def legend(width: int, glyphs: Glyphs = UNICODE) -> Text:
    """What the characters mean, in as few lines as fit."""
    text, used = Text(no_wrap=True), 0
    for state in (WRITTEN, KEPT, AWAY, ZOOMED):
        entry = f"{glyphs.states[state]} {_MEANINGS[state]}"
        if used and used + 3 + len(entry) > width:
            text.append("\n")
            used = 0
        elif used:
            text.append("   ")
            used += 3
        text.append(glyphs.states[state], _STYLES[state])
        text.append(entry[1:])
        used += len(entry)
    return text


def _joined(spans: list[tuple[int, int, int]]) -> list[tuple[int, int, int]]:
    """``spans`` with neighbours of one state made one."""
    joined = spans[:1]
    for first, end, state in spans[1:]:
        if joined[-1][2] == state:
            joined[-1] = (joined[-1][0], end, state)
        else:
            joined.append((first, end, state))
    return joined


def _edges(trace: Trace, columns: int) -> list[int]:
    length = max(1, trace.end - trace.begin)
    columns = min(columns, length)
    return [trace.begin + length * i // columns for i in range(columns + 1)]


def _label(number: int, block: BlockClosed) -> str:
    words = " ".join(shown(block.label).split())
    if block.kind != "thought":
        words = f"({block.kind}) {words}"
    room = _LABEL_COLUMNS - 5
    words = words if len(words) <= room else words[: room - 2] + ".."
    return f"{number:>3} {words:<{room}} "


def _row(trace: Trace, block: BlockClosed, edges: Sequence[int]) -> list[int | None]:
    """The state of one block in every column; None before it exists."""
    row: list[int | None] = [None] * (len(edges) - 1)
    for first, last, state in trace.spans(block):
        for i in range(len(row)):
            if first < edges[i + 1] and last > edges[i]:
                row[i] = state if row[i] is None else max(row[i], state)
    return row


def _append_cells(text: Text, trace: Trace, edges: Sequence[int], glyphs: Glyphs) -> None:
    """Two graphs on one scale: every token so far, and the tokens that are in cells."""
    most = max(trace.end, 1)
    in_cells = [
        max((cells for position, cells in trace.resident if low <= position < high), default=0)
        for low, high in zip(edges, edges[1:], strict=False)
    ]
    for label, values, style in (("tokens so far", edges[1:], "dim"), ("tokens in the KV cache", in_cells, "bold")):
        text.append(f"{label:>{_LABEL_COLUMNS - 1}} ")
        for value in values:
            step = (len(glyphs.bars) - 1) * value // most
            text.append(glyphs.bars[min(step, len(glyphs.bars) - 1)], style)
        text.append(f" {max(values, default=0):,}\n")
