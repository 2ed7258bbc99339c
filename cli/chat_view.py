"""Draws a chat: a reply while it is written, and the tables of /kv, /notes and /stats. Decides nothing.

Answers go to stdout as they are; everything else goes to stderr: thoughts (dimmed, or folded into one live line),
what happened to the cache, and errors. On a terminal control characters in the model's text are left out, as they
could be commands to it.
"""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Callable, Iterable
from typing import Any, TextIO

from rich.cells import cell_len, set_cell_size
from rich.text import Text

from zoomr_local.cache_view import CELLS, DISK, DROPPED, CacheRow, CacheState
from zoomr_local.conversation import Turn
from zoomr_local.events import (
    BlockClosed, BlockLost, Event, Finished, PagedIn, PagedOut, PrefilledAgain, PromptProgress, Split, ThinkingCut,
    TokenDecoded, TokenInjected, Warned,
)  # fmt: skip

from .render import human_bytes, human_seconds

FOLD, SHOW, HIDE = "fold", "show", "hide"
_DRAW_SECONDS = 0.1
_MOST_ROWS = 40
_NARROW, _LEAST_LABEL = 72, 6  # columns: below, a row of /kv has fewer of them; and what is worth a label
_UNREAD = "the message was not read to its end, and the conversation is as it was before it"
_CUTS = {
    "budget": "it reached --think-budget, or the share of --max-tokens that auto leaves for thinking", "loop": "it repeated itself", "asked": "you asked for the answer",
    "ended": "the model stopped without an answer",
}  # fmt: skip
_CONTROLS = dict.fromkeys([*range(0x09), 0x0B, 0x0C, *range(0x0E, 0x20), 0x7F, *range(0x80, 0xA0)])


def visible(text: str) -> str:
    """``text`` without the characters that a terminal would obey; lines and tabs stay."""
    return text.replace("\r", "").translate(_CONTROLS)


class Screen:
    """stdout for answers and stderr for the rest, with one live line at the bottom while there is something to tell.

    ``live``: stderr is a terminal that can redraw a line. ``styled``: and colours are wanted.
    """

    def __init__(self, quiet: bool = False, out: TextIO | None = None, err: TextIO | None = None, styled: bool | None = None) -> None:
        self.out, self.quiet = out or sys.stdout, quiet
        self.err = err or sys.stderr or open(os.devnull, "w")  # closed by whoever started us
        self.live = self.err.isatty() and os.environ.get("TERM") != "dumb" and not quiet
        self.styled = self.live and not os.environ.get("NO_COLOR") if styled is None else styled
        self.on_terminal = self.out.isatty()
        self._line = ""
        self._open: TextIO | None = None  # stderr, or a terminal, whose last line is not ended
        self._drawn = 0.0

    def answer(self, text: str) -> None:
        """Text of the answer, as it comes."""
        self._clear()
        self.out.write(visible(text) if self.on_terminal else text)
        self.out.flush()
        self._opened(self.out, text)

    def thought(self, text: str) -> None:
        """Text of thinking, dimmed."""
        self._clear()
        self.err.write(self._dim(visible(text)))
        self.err.flush()
        self._opened(self.err, text)

    def note(self, text: str) -> None:
        """A line about what happened; not with --quiet."""
        if not self.quiet:
            self.say(self._dim(text))

    def say(self, text: str) -> None:
        """A line on stderr, always."""
        self.end_line()
        self._clear()
        self.err.write(text + "\n")
        self.err.flush()

    def end_line(self) -> None:
        """Begin a new line on the terminal if the last text did not end one."""
        if self._open is not None:
            self._open.write("\n")
            self._open.flush()
            self._open = None

    def status(self, text: str | None, force: bool = False) -> None:
        """Show ``text`` in the live line, at most ten times a second; None takes it away."""
        if text is None:
            self._clear()
            return
        now = time.monotonic()
        if not self.live or self._open is not None or (now - self._drawn < _DRAW_SECONDS and not force):
            return
        self._drawn = now
        width = shutil.get_terminal_size().columns - 1
        self._clear()
        self._line = text[:width]
        self.err.write(self._dim(self._line))
        self.err.flush()

    def _opened(self, stream: TextIO, text: str) -> None:
        if text:
            ours = stream is self.err or stream.isatty()  # an answer in a pipe is the model's to the last byte
            self._open = stream if ours and not text.endswith("\n") else None

    def _dim(self, text: str) -> str:
        return f"\x1b[2m{text}\x1b[22m" if self.styled and text else text

    def _clear(self) -> None:
        if self._line:
            self.err.write("\r\x1b[K")
            self.err.flush()
            self._line = ""


class ReplyView:
    """Draws the events of one turn. ``thinking`` is FOLD, SHOW or HIDE; ``keys``: somebody listens for Ctrl-T."""

    def __init__(self, screen: Screen, budget_tokens: int | None, thinking: str = FOLD, keys: bool = True) -> None:
        self.screen, self.budget_tokens, self.thinking = screen, budget_tokens, thinking
        self._hint = " · Ctrl-T answers now" if keys else ""
        self._thought_tokens = self._blocks = self._zooms = self._paged_bytes = self._resident = 0
        self._began = time.monotonic()
        self._in_thought = self._answered = self._read = False
        self._parted = False  # a marker stood between what is shown and what comes
        self._told: list[str] = []  # of the answer, as it came

    def feed(self, event: Event) -> None:
        """One event; tokens are by far the most."""
        if isinstance(event, TokenDecoded):
            self._token(event)
        elif isinstance(event, TokenInjected):
            if self.thinking == SHOW:
                self.screen.thought(event.text)
        elif isinstance(event, PromptProgress):
            self._read = event.done_tokens == event.total_tokens
            self.screen.status(f"reading {event.done_tokens:,}/{event.total_tokens:,} tokens")
        elif isinstance(event, BlockClosed):
            self._blocks += 1
        elif isinstance(event, PagedOut):
            self._paged_bytes += event.written_bytes
        elif isinstance(event, PagedIn):
            self._zooms += len(event.blocks) * (event.part == "detail")
        elif isinstance(event, Finished):
            self._finished(event)
        else:
            self._said(event)

    def _said(self, event: Event) -> None:
        if isinstance(event, PrefilledAgain):
            self.screen.note(f"reading all {event.tokens:,} tokens of the conversation again: {event.reason}")
        elif isinstance(event, ThinkingCut):
            self.screen.note(f"thinking ended after {event.thinking_tokens:,} tokens: {_CUTS[event.reason]}")
        elif isinstance(event, Split) and event.what == "prompt":
            self.screen.note(f"the message is longer than its share: it is read in pieces of {event.piece_tokens} tokens or so, all of them pageable")
        elif isinstance(event, Warned):
            self.screen.note(f"warning: {event.message}")
        elif isinstance(event, BlockLost):
            self.screen.note(f"lost for good: the {event.part} of {len(event.blocks)} blocks ({event.reason})")

    def _token(self, event: TokenDecoded) -> None:
        self._resident = event.resident_tokens
        if event.role == "answer":
            self._close_thought()
            self._answer(event.text)
            return
        self._thought_tokens += event.role in ("thought", "summary")
        first, self._in_thought = not self._in_thought, True
        if self.thinking == SHOW and (event.text or event.role == "marker"):
            self._show(event)
        elif self.thinking != HIDE:
            self.screen.status(f"thinking {self._facts()}{self._hint}", force=first)

    def _answer(self, told: str) -> None:
        self._told.append(told)
        text = told if self._answered else told.lstrip("\n")
        if text:
            self._answered = True
            self.screen.answer(text)

    def _show(self, event: TokenDecoded) -> None:
        """Thoughts and summaries begin lines of their own: their markers, which part them, have no text."""
        text = event.text.lstrip() if self._parted else event.text
        if text and self._parted:
            self.screen.end_line()
            text = f"summary: {text}" if event.role == "summary" else text
            self._parted = False
        if text:
            self.screen.thought(text)
        self._parted |= event.role == "marker"

    def _facts(self) -> str:
        parts = [f"{self._thought_tokens:,} tokens", human_seconds(time.monotonic() - self._began)]
        parts.append(f"KV {self._resident:,}" + (f"/{self.budget_tokens:,}" if self.budget_tokens else ""))
        for count, word in ((self._blocks, "block"), (self._zooms, "zoom")):
            if count:
                parts.append(f"{count:,} {word}{'s' * (count != 1)}")
        if self._paged_bytes:
            parts.append(f"{human_bytes(self._paged_bytes)} paged")
        return " · ".join(parts)

    def _close_thought(self) -> None:
        if self._in_thought:
            self._in_thought = False
            if self._thought_tokens and self.thinking != HIDE:
                self.screen.note(f"thought {self._facts()}")
            self.screen.status(None)

    def _finished(self, done: Finished) -> None:
        self._close_thought()
        self.screen.status(None)
        told = "".join(self._told)
        if done.content.startswith(told):  # what was held back as it might have begun a stop string is told by no token
            self._answer(done.content[len(told) :])
        self.screen.end_line()
        if done.reason == "length":
            self.screen.note("cut off: --max-tokens was reached; raise it (in a chat: /set max_tokens N)")
        elif done.reason == "kv_full":
            self.screen.note("stopped: --kv-ram and --kv-disk are full" + ("" if self._read else f"; {_UNREAD}"))
        elif done.reason == "cancelled":
            kept = "what was written is kept" if done.completion_tokens else "there is no answer yet"
            self.screen.note(f"stopped; {kept if self._read else _UNREAD}")
        if not done.content.strip() and done.reason != "cancelled":
            self.screen.say("the model gave no answer" + (f" ({done.reasoning_tokens:,} tokens of thinking)" if done.reasoning_tokens else ""))


# ---------------------------------------------------------------- tables


def kv_lines(state: CacheState, label: Callable[[CacheRow], str], width: int, everything: bool = False) -> list[Text]:
    """The cache as a bar of its budget and a row for every block in order; without ``everything`` the newest rows."""
    lines = [_budget_line(state), _bar(state, width)]
    rows = list(state.rows)
    hidden = 0 if everything else max(0, len(rows) - _MOST_ROWS)
    if hidden:
        lines.append(Text(f"  ... {hidden} older rows; /kv all shows them", "dim"))
    lines.append(Text(f"{'block':>5} {'tokens':>7}  where, what" if width < _NARROW else f"{'block':>6} {'from':>7} {'tokens':>10}  {'where':<16} what", "dim"))
    for row in rows[hidden:]:
        lines.append(_row(row, label(row), width))
    return lines


def _budget_line(state: CacheState) -> Text:
    used, budget = state.resident_tokens, state.budget_tokens
    text = f"KV cache: {used:,} of {budget:,} cells in use, {human_bytes(used * state.token_bytes)} of {human_bytes(budget * state.token_bytes)};"
    text += f" {state.sequence_tokens:,} tokens so far"
    if state.ram_bytes or state.disk_bytes:
        text += f"; paged out: {human_bytes(state.ram_bytes)} in RAM, {human_bytes(state.disk_bytes)} on disk"
    return Text(text)


_PARTS = (("pinned", "P", "bold"), ("open", "o", "cyan"), ("block", "#", ""), ("zoomed", "^", "bold yellow"))


def _bar(state: CacheState, width: int) -> Text:
    """The budget as one line: pinned, open, blocks, zoomed blocks, and what is free."""
    columns = max(10, min(width, 100) - 2)
    cells = dict.fromkeys((name for name, *_ in _PARTS), 0)
    for row in state.rows:
        kind = row.kind if row.kind in ("pinned", "open") else "pinned" if row.pinned else "zoomed" if row.zoomed else "block"
        cells[kind] += row.resident_tokens
    bar, done, drawn = Text("[", "dim"), 0, 0
    for name, glyph, style in _PARTS:
        done += cells[name]
        end = round(columns * done / state.budget_tokens)
        bar.append(glyph * (end - drawn), style)
        drawn = end
    bar.append("." * (columns - drawn), "dim")
    bar.append("]", "dim")
    return bar


def legend() -> Text:
    """What the bar's characters mean."""
    return Text("P pinned  o being written  # blocks  ^ zoomed: by the heads' votes, or by /zoom  . free", "dim")


def _row(row: CacheRow, label: str, width: int) -> Text:
    number = "" if row.number is None else str(row.number)
    tokens = f"{row.tokens:,}" + (f"+{row.summary_tokens:,}" if row.summary_tokens else "")
    where = row.where
    if row.summary_where is not None and row.summary_where != row.where:
        where += f", sum. {row.summary_where}"
    mark = "P" if row.pinned else "^" if row.zoomed else " "
    head = f"{number:>5} {tokens:>7} {mark}{where}  " if width < _NARROW else f"{number:>6} {row.start:>7} {tokens:>10} {mark}{where:<16} "
    room = width - len(head) - len(row.kind) - 2
    label = " ".join(visible(label).split())
    styles = {DROPPED: "dim", CELLS: "bold yellow" if row.zoomed else "", DISK: "dim cyan"}
    if cell_len(label) > room:
        label = set_cell_size(label, room - 2).rstrip() + ".." if room >= _LEAST_LABEL else ""
    return Text(f"{head}{row.kind}  {label}".rstrip(), styles.get(row.where, "cyan"))


def stats_lines(turns: Iterable[Turn], done: Finished | None, budget_tokens: int | None) -> list[str]:
    """What the conversation came to: the last turn, all turns, and the cache's counters."""
    turns = list(turns)
    lines = []
    if turns:
        t = turns[-1]
        rate = t.completion_tokens / t.decode_seconds if t.decode_seconds else 0.0
        lines.append(
            f"last turn  {t.prompt_tokens:,} tokens read in {human_seconds(t.prefill_seconds)}, {t.completion_tokens:,} written in"
            f" {human_seconds(t.decode_seconds)} ({rate:,.1f} tokens/s), {t.reasoning_tokens:,} of them thinking"
            + (f", cut: {_CUTS[t.thinking_cut]}" if t.thinking_cut else "")
        )
        written, thought = sum(t.completion_tokens for t in turns), sum(t.reasoning_tokens for t in turns)
        read = sum(t.prompt_tokens for t in turns)
        lines.append(f"all turns  {len(turns)}: {read:,} tokens read, {written:,} written, {thought:,} of them thinking")
    if done is not None:
        c = done.cache
        of = f" of {budget_tokens:,}" if budget_tokens else ""
        lines.append(f"KV cache   {c.resident_peak_tokens:,}{of} cells at the peak, {human_bytes(c.resident_peak_tokens * c.token_bytes)}; policy {c.policy}")
        lines.append(f"paging     {human_bytes(c.paged_out_bytes)} stored, {c.page_outs:,} times out, {c.page_ins:,} times back in, {c.refreshes:,} selections")
        if c.dropped_tokens:
            lines.append(f"dropped    {c.dropped_tokens:,} tokens for good: old thinking, or the policy's rule")
        if c.lost_blocks or c.faults:
            lines.append(f"lost       {c.lost_blocks:,} blocks; {c.faults:,} page files failed")
    return lines or ["nothing was said yet"]


def print_text(screen: Screen, lines: Iterable[Any]) -> None:
    """Lines on stderr, styled where the screen is."""
    from rich.console import Console

    console = Console(file=screen.err, markup=False, highlight=False, emoji=False, soft_wrap=True, force_terminal=screen.styled)
    for line in lines:
        console.print(line)
