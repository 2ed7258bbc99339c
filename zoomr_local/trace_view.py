"""What a recorded problem looked like over time: lines of a trace in, one JSON-ready picture out. Pure.

`zoomr view` draws the picture in a terminal, puts it into a page, or prints it. Lines come from a file that anybody may
have written: whatever is not understood is counted and left out, and nothing here trusts a number.

A picture's rows are the prompt, the blocks and the loose texts by position. A row's ``states`` and ``summary_states``
are stretches [from, to, state] in tokens of the whole sequence, ascending and without gaps from its first token on:
``written`` (until it was closed), ``cells``, ``zoomed`` (in cells and chosen by votes), ``ram``, ``disk``, ``lost``,
``dropped``, or ``loose``: single tokens of it were dropped, and a trace does not say which. ``heads`` is what a per-head cache
held (`trace_held.HeldReader`), None under other policies.
"""

from __future__ import annotations

from bisect import bisect_right
from itertools import accumulate
from typing import Any

from .trace_file import Recorded
from .trace_held import HeldReader

WRITTEN, CELLS, ZOOMED, RAM, DISK, LOST, DROPPED, LOOSE = "written", "cells", "zoomed", "ram", "disk", "lost", "dropped", "loose"
IN_CACHE = (WRITTEN, CELLS, ZOOMED)
PARTS = ("detail", "summary")

_MOST = 1 << 40  # no position, block or count in a sound trace is larger
_NOTES = {
    "Split": "split", "BlockLost": "lost", "ThinkingCut": "thinking cut", "PrefilledAgain": "read again", "Warned": "warning",
    "ReadAhead": "read ahead", "SummaryCut": "summary cut",
}  # fmt: skip


class _Bad(Exception):
    """A line that does not hold what its kind holds."""


class _Block:
    """One block and what happened to its parts, in the order of the file."""

    def __init__(self, line: dict[str, Any]) -> None:
        self.number, self.kind = _count(line, "block"), _words(line, "kind")
        self.detail = _span(line.get("detail"))
        self.summary = None if line.get("summary") is None else _span(line["summary"])
        self.text, self.summary_text = _words(line, "text"), _words(line, "summary_text")
        self.closed = (self.summary or self.detail)[1]
        there = line.get("resident", [True, True])
        if not isinstance(there, list) or len(there) != 2:
            raise _Bad
        self.changes: dict[str, list[tuple[int, str]]] = {part: [] for part in PARTS}
        self.lost: set[str] = set()
        for part, inside in zip(PARTS, there):
            if not inside:
                self.changes[part].append((self.closed, RAM))
        self.zooms = self.page_outs = self.chosen = 0
        self.votes = 0.0
        self.dropped = False

    def states(self, part: str, choices: list[tuple[int, bool]], end: int) -> list[list[Any]]:
        """The stretches of ``part`` up to ``end``; ``choices`` say from when to when it was chosen."""
        start = (self.detail if part == "detail" else self.summary)[0]
        marks = [(position, 0, state) for position, state in self.changes[part]]
        marks += [(position, 1, chosen) for position, chosen in choices]
        marks.sort(key=lambda mark: mark[0])  # stable: in one position the file's order
        found: list[list[Any]] = []
        since, place, chosen = self.closed, CELLS, False
        _stretch(found, start, min(self.closed, end), WRITTEN)
        for position, is_choice, value in [*marks, (end, 0, place)]:
            position = max(since, min(position, end))
            _stretch(found, since, position, ZOOMED if place == CELLS and chosen else place)
            since = position
            if is_choice:
                chosen = value
            else:
                place = value
        return found


class _Reader:
    """Goes through the lines of one problem once."""

    def __init__(self, problem: Recorded) -> None:
        self.problem = problem
        self.blocks: dict[int, _Block] = {}
        self.texts: list[dict[str, Any]] = []
        self.cells: list[list[int]] = []
        self.votes: list[dict[str, Any]] = []
        self.zoomed: set[int] = set()
        self.choices: dict[int, list[tuple[int, bool]]] = {}
        self.turns: list[list[int]] = []
        self.notes: list[list[Any]] = []
        self.dropped_tokens = 0
        self.held = HeldReader()
        self.loose_from: int | None = None
        self.finished: dict[str, Any] | None = None
        self.result: dict[str, Any] = {}
        self.prompt_tokens = self.end = 0
        self.skipped = 0
        for line in problem.lines:
            do = getattr(self, "on_" + str(line["event"]), None)
            try:
                if line["event"] in _NOTES:
                    self.on_note(line)
                elif do is None:
                    self.skipped += 1
                else:
                    do(line)
            except (_Bad, LookupError, TypeError, ValueError, OverflowError):
                self.skipped += 1
        self.end = min(self.end, _MOST)

    # one method a kind of line

    def on_text(self, line: dict[str, Any]) -> None:
        start, stop = _span(line.get("range"))
        role = _words(line, "role")
        self.texts.append({"role": role, "range": [start, stop], "text": _words(line, "text"), "pinned": bool(line.get("pinned"))})
        if role == "prompt" and not self.turns:
            self.prompt_tokens = max(self.prompt_tokens, stop)
        self.end = max(self.end, stop)

    def on_BlockClosed(self, line: dict[str, Any]) -> None:
        block = _Block(line)
        self.blocks[block.number] = block
        self.end = max(self.end, block.closed)

    def on_cells(self, line: dict[str, Any]) -> None:
        for point in line["points"]:
            x, y = (_number(n) for n in point)
            if self.cells and x < self.cells[-1][0]:
                raise _Bad
            self.cells.append([x, y])
            self.end = max(self.end, x)

    def on_Voted(self, line: dict[str, Any]) -> None:
        votes = [[_number(block), _amount(votes)] for block, votes in line["votes"]]
        others = [_number(line["others"][0]), _amount(line["others"][1])] if "others" in line else [0, 0.0]
        total = sum(v for _, v in votes) + others[1]
        for number, amount in votes:
            if number in self.blocks:
                self.blocks[number].votes += amount
        self.votes.append({
            "position": self._position(line), "reason": _words(line, "reason"), "total": round(total, 1), "votes": votes, "others": others,
        })  # fmt: skip

    def on_Refreshed(self, line: dict[str, Any]) -> None:
        zoomed, position = {_number(block) for block in line["zoomed"]}, self._position(line)
        for number in zoomed ^ self.zoomed:
            self.choices.setdefault(number, []).append((position, number in zoomed))
            if number in self.blocks:
                self.blocks[number].chosen += number in zoomed
        self.zoomed = zoomed

    def on_PagedOut(self, line: dict[str, Any]) -> None:
        self._move(line, RAM)

    def on_PagedIn(self, line: dict[str, Any]) -> None:
        self._move(line, CELLS)

    def on_tier(self, line: dict[str, Any]) -> None:
        self._move(line, DISK if line["where"] == "disk" else RAM)

    def on_Dropped(self, line: dict[str, Any]) -> None:
        self.dropped_tokens += _number(line["tokens"])
        position = self._position(line)
        for number in line.get("forgotten", ()):
            block = self.blocks.get(number)
            if block is not None and not block.dropped:
                block.dropped = True
                for part in PARTS:
                    block.changes[part].append((position, DROPPED))
        if "forgotten" not in line and self.loose_from is None:
            self.loose_from = position

    def on_BeaconDecoded(self, line: dict[str, Any]) -> None:
        if self.loose_from is None:
            self.loose_from = self._position(line)

    def on_heads(self, line: dict[str, Any]) -> None:
        self.held.heads(line)

    def on_held(self, line: dict[str, Any]) -> None:
        position = self.held.held(line)
        self.end = max(self.end, position)
        if self.loose_from is None and position:
            self.loose_from = position

    def on_turn(self, line: dict[str, Any]) -> None:
        self.turns.append([_count(line, "number"), self._position(line)])

    def on_Finished(self, line: dict[str, Any]) -> None:
        names = ("prompt_tokens", "completion_tokens", "reasoning_tokens")
        self.finished = {"reason": _words(line, "reason"), **{name: _count(line, name) for name in names}}
        cache = line.get("cache")
        kept = ("resident_peak_tokens", "resident_mean_tokens", "token_bytes", "page_ins", "page_outs", "paged_out_bytes", "refreshes")
        if isinstance(cache, dict):
            self.finished["cache"] = {name: _amount(cache[name]) for name in kept if name in cache}

    def on_result(self, line: dict[str, Any]) -> None:
        error = line.get("error")
        self.result = {
            "answer": str(line["answer"]) if "answer" in line else None,
            "correct": line["correct"] if isinstance(line.get("correct"), bool) else None,
            "error": str(error.get("message", "")) if isinstance(error, dict) else None,
        }

    def on_note(self, line: dict[str, Any]) -> None:
        kind = line["event"]
        position = self._position(line) if "position" in line else self.end
        if kind == "BlockLost":
            for number in line["blocks"]:
                if number in self.blocks and line["part"] in PARTS:
                    self._lose(self.blocks[number], position, line["part"])
        if kind != "ReadAhead":
            self.notes.append([position, _NOTES[kind], _sentence(line)])

    # helpers

    def _position(self, line: dict[str, Any]) -> int:
        position = _count(line, "position")
        self.end = max(self.end, position)
        return position

    def _move(self, line: dict[str, Any], to: str) -> None:
        part, position, tier = line["part"], self._position(line), line["event"] == "tier"
        if part not in PARTS:
            raise _Bad
        for number in line["blocks"]:
            block = self.blocks.get(_number(number))
            if block is None:
                continue
            changes = block.changes[part]
            place = changes[-1][1] if changes else CELLS
            if tier and place not in (RAM, DISK):
                continue  # a copy of what is in cells
            changes.append((position, LOST if to == RAM and part in block.lost else to))
            if part == "detail" and not tier:
                block.zooms += to == CELLS
                block.page_outs += to != CELLS

    @staticmethod
    def _lose(block: _Block, position: int, part: str) -> None:
        block.lost.add(part)  # what is in cells stays until it leaves
        changes = block.changes[part]
        if changes and changes[-1][1] in (RAM, DISK):
            changes.append((position, LOST))


def picture(problem: Recorded) -> dict[str, Any]:
    """Everything that a drawing of one problem needs, as JSON values. Sizes are tokens unless they say bytes."""
    reader = _Reader(problem)
    header = problem.header
    rows = _rows(reader)
    return {
        "id": str(problem.id), "run": problem.run, "model": _words(header, "model"), "policy": _words(header, "policy"),
        "budget_tokens": header["budget_tokens"] if _is_count(header.get("budget_tokens")) else None,
        "zoomr": _words(header, "zoomr"), "settings": header.get("settings", {}),
        "tokens": reader.end, "prompt_tokens": reader.prompt_tokens, "finished": reader.finished, "result": reader.result,
        "rows": rows, "zooms": sum(row["zooms"] for row in rows), "cells": reader.cells, "votes": reader.votes,
        "heads": reader.held.found, "turns": reader.turns, "notes": reader.notes, "dropped_tokens": reader.dropped_tokens, "skipped_lines": reader.skipped,
    }  # fmt: skip


def cells_at(points: list[list[int]], tokens: int) -> float | None:
    """Tokens in cells once the sequence was ``tokens`` long; None before the first point. The last one of a step counts."""
    found: float | None = None
    for i, (x, y) in enumerate(points):
        if x > tokens:
            if found is None:
                return None
            x0, y0 = points[i - 1]
            return y0 + (y - y0) * (tokens - x0) / (x - x0)
        found = y
    return found


def _rows(reader: _Reader) -> list[dict[str, Any]]:
    rows = []
    for block in reader.blocks.values():
        states = block.states("detail", reader.choices.get(block.number, []), reader.end)
        rows.append({
            "number": block.number, "kind": block.kind, "detail": block.detail, "summary": block.summary, "text": block.text,
            "summary_text": block.summary_text, "states": states,
            "summary_states": block.states("summary", [], reader.end) if block.summary else [],
            "zooms": block.zooms, "page_outs": block.page_outs, "chosen": block.chosen, "votes": round(block.votes, 1),
            "pinned": False,
        })  # fmt: skip
    covered = _Covered([(row["detail"][0], (row["summary"] or row["detail"])[1]) for row in rows])
    for text in _paired([t for t in reader.texts if not covered.holds(*t["range"])]):
        rows.append(_loose_row(reader, text))
    return sorted(rows, key=lambda row: row["detail"][0])


class _Covered:
    """Ranges of positions; says whether one of them holds another range, without looking at all of them."""

    def __init__(self, ranges: list[tuple[int, int]]) -> None:
        ranges = sorted(ranges)
        self._starts = [start for start, _ in ranges]
        self._furthest = list(accumulate((stop for _, stop in ranges), max))

    def holds(self, start: int, stop: int) -> bool:
        begun = bisect_right(self._starts, start)
        return begun > 0 and stop <= self._furthest[begun - 1]


def _paired(texts: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A summary that follows its thought goes with it."""
    found: list[dict[str, Any]] = []
    for text in texts:
        before = found[-1] if found else None
        if text["role"] == "summary" and before and before["role"] == "thought" and before["range"][1] == text["range"][0]:
            if "summary" not in before:
                found[-1] = {**before, "summary": text}
                continue
        found.append(text)
    return found


def _loose_row(reader: _Reader, text: dict[str, Any]) -> dict[str, Any]:
    (start, stop), summary = text["range"], text.get("summary")
    closed = summary["range"][1] if summary else stop
    states: list[list[Any]] = []
    _stretch(states, start, min(closed, reader.end), WRITTEN)
    from_ = reader.end if reader.loose_from is None or text["pinned"] else max(closed, reader.loose_from)
    _stretch(states, closed, min(from_, reader.end), CELLS)
    _stretch(states, from_, reader.end, LOOSE)
    return {
        "number": None, "kind": text["role"], "detail": [start, stop], "summary": summary["range"] if summary else None,
        "text": text["text"], "summary_text": summary["text"] if summary else "", "states": states,
        "summary_states": [list(s) for s in states] if summary else [], "zooms": 0, "page_outs": 0, "chosen": 0, "votes": 0.0,
        "pinned": text["pinned"],
    }  # fmt: skip


def _stretch(stretches: list[list[Any]], start: int, stop: int, state: str) -> None:
    """Add one, joined with the one before it if that has the same state."""
    if start >= stop:
        return
    if stretches and stretches[-1][2] == state and stretches[-1][1] == start:
        stretches[-1][1] = stop
    else:
        stretches.append([start, stop, state])


def _sentence(line: dict[str, Any]) -> str:
    if "message" in line:
        return _words(line, "message")
    said = [f"{name.replace('_', ' ')} {value}" for name, value in line.items() if name not in ("event", "position")]
    return ", ".join(said)[:500]


def _span(value: Any) -> list[int]:
    start, stop = (_number(n) for n in value)
    if start >= stop:
        raise _Bad
    return [start, stop]


def _count(line: dict[str, Any], name: str) -> int:
    return _number(line[name])


def _number(value: Any) -> int:
    if not _is_count(value):
        raise _Bad
    return value


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= _MOST


def _amount(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= _MOST:
        raise _Bad
    return value


def _words(line: dict[str, Any], name: str) -> str:
    value = line.get(name)
    return value if isinstance(value, str) else ""
