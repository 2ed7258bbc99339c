"""Draws events on stderr: the progress of a run and its summary. Decides nothing and writes no result.

`solve.py` and `demo.py` call it. Three faces of one `Listener`: a bar on a terminal, a plain line every few
seconds elsewhere, nothing with --quiet. `blocks.py` draws what happened inside one problem.
"""

from __future__ import annotations

import sys
import time
from collections import deque
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from zoomr_local.events import Event, PromptProgress, Split, TokenDecoded, Warned
from zoomr_local.gguf_file import printable
from zoomr_local.sizes import counted
from zoomr_local.solve import Problem, Tally

_PLAIN_SECONDS = 5.0  # between two plain lines: readable in a log, alive to whoever watches
_DRAW_SECONDS = 0.15  # between two redraws of the bar: drawing costs about as much as a token of a small model
_BAR_COLUMNS = 10
_RATE_SECONDS = 3.0  # over which the token rate is averaged


def stderr_console() -> Console:
    """Where everything but results goes. Honours NO_COLOR; no markup, so that users' text prints as it is."""
    return Console(stderr=True, markup=False, highlight=False, emoji=False, soft_wrap=True)


def human_bytes(n: float) -> str:
    """``n`` bytes in the largest binary unit that leaves at least 1."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if n < 1024 or unit == "GiB":
            return f"{n:.0f} {unit}" if unit == "B" else f"{n:.1f} {unit}"
        n /= 1024
    raise AssertionError("unreachable")


def human_seconds(seconds: float) -> str:
    """``seconds`` as 41 s, 3 min 20 s or 2 h 05 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


class Quiet:
    """A listener that only counts; base of the two that draw. Use as a context manager."""

    def __init__(
        self, total: int, tally: Tally, budget_tokens: int | None, label: str = "zoomr", console: Console | None = None
    ):
        self.label = label
        self.total, self.tally, self.budget_tokens = total, tally, budget_tokens
        self.console = console or stderr_console()
        self.resident_tokens = 0
        self._tokens = 0
        self._hears = False  # events; of problems solved side by side there are records only
        self._rate_marks: deque[tuple[float, int]] = deque()
        self._first_done = tally.done
        self._began = time.monotonic()
        self._said: set[str] = set()
        self._split: set[str] = set()

    def __enter__(self) -> Quiet:
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing to put away."""

    def started(self, problem: Problem) -> None:
        """A problem begins."""

    def event(self, event: Event) -> None:
        """One event of the engine; tokens are by far the most, so they are told apart first."""
        if isinstance(event, TokenDecoded):
            self._hears = True
            self._tokens += 1
            self.resident_tokens = event.resident_tokens
            self.tick()
        elif isinstance(event, PromptProgress):
            self.tick()
        elif isinstance(event, Warned):
            self._say_once(f"warning: {event.message}")
        elif isinstance(event, Split):
            self.say_split(event)

    def finished(self, record: dict[str, Any]) -> None:
        """A record is on the disk."""
        self.tally.add(record)
        if not self._hears and "kv" in record:
            self._tokens += sum(record["usage"][name] for name in ("prompt_tokens", "completion_tokens"))
            self.resident_tokens = record["kv"]["resident_peak"]
        if "error" in record:
            error = record["error"]
            said = f"problem {record['id']} failed: {error['type']}: {error['message']}"
            self.console.print(printable(said, 2000))
        self.tick(force=True)

    def tick(self, force: bool = False) -> None:
        """Draw, if it is time."""

    def say_split(self, event: Split) -> None:
        """Once a kind: later ones are counted in the records and the summary."""

    def rate(self, now: float) -> float | None:
        """Tokens a second over the last few seconds, prefill included; None in the first half second. Without events: since the start."""
        if not self._hears:
            return self._tokens / (now - self._began) if self._tokens else None
        marks = self._rate_marks
        marks.append((now, self._tokens))
        while len(marks) > 2 and marks[0][0] < now - _RATE_SECONDS:
            marks.popleft()
        seconds = now - marks[0][0]
        return (self._tokens - marks[0][1]) / seconds if seconds >= 0.5 else None

    def eta_seconds(self, now: float) -> float | None:
        """Time left if the remaining problems take as long as those of this run; None before the first."""
        done = self.tally.done - self._first_done
        return (now - self._began) / done * (self.total - self.tally.done) if done else None

    def _say_once(self, text: str) -> None:
        if text not in self._said:
            self._said.add(text)
            self.console.print(text)


class _Speaking(Quiet):
    def say_split(self, event: Split) -> None:
        if event.what not in self._split:
            self._split.add(event.what)
            self.console.print(
                f"the {event.what} was longer than its share and was cut into pieces of {event.piece_tokens} tokens or so,"
                " each of them pageable; no text is lost"
            )


class PlainProgress(_Speaking):
    """One line every few seconds, for logs and pipes."""

    _next = 0.0

    def tick(self, force: bool = False) -> None:
        now = time.monotonic()
        if now < self._next and not (force and self.tally.done == self.total):
            return
        if self._next:  # nothing worth a line at the very start
            print(self._line(now), file=sys.stderr, flush=True)
        else:
            self.rate(now)
        self._next = now + _PLAIN_SECONDS

    def _line(self, now: float) -> str:
        tally, rate, eta = self.tally, self.rate(now), self.eta_seconds(now)
        parts = [f"{tally.done} of {self.total} done"]
        if tally.graded:
            parts.append(f"{tally.right} of {tally.graded} right")
        if tally.failed:
            parts.append(f"{tally.failed} failed")
        if rate is not None:
            parts.append(f"{rate:.0f} tokens/s")
        parts.append(f"{self.resident_tokens}{f' of {self.budget_tokens}' if self.budget_tokens else ''} cells")
        if eta and tally.done < self.total:
            parts.append(f"about {human_seconds(eta)} left")
        return f"{self.label}: " + ", ".join(parts)


class BarProgress(_Speaking):
    """A bar on a terminal; fits 80 columns. Drawn on the decoding thread, never by a timer of its own."""

    def __init__(self, *args: Any, **more: Any):
        super().__init__(*args, **more)
        self._bar = Progress(
            TextColumn(self.label), TextColumn("{task.completed:.0f}/{task.total:.0f}"),
            BarColumn(bar_width=_BAR_COLUMNS), TextColumn("{task.fields[facts]}"),
            console=self.console, auto_refresh=False, transient=True,
        )  # fmt: skip
        self._task = self._bar.add_task("", total=self.total, completed=self.tally.done, facts="")
        self._next = 0.0

    def __enter__(self) -> BarProgress:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def tick(self, force: bool = False) -> None:
        now = time.monotonic()
        if now < self._next and not force:
            return
        self._next = now + _DRAW_SECONDS
        self._bar.update(self._task, completed=self.tally.done, facts=self._facts(now))
        self._bar.refresh()

    def _facts(self, now: float) -> str:
        tally, rate, eta = self.tally, self.rate(now), self.eta_seconds(now)
        cells = f"{self.resident_tokens}/{self.budget_tokens}" if self.budget_tokens else f"{self.resident_tokens}"
        parts = ["- tok/s" if rate is None else f"{rate:.0f} tok/s", f"KV {cells}"]
        if tally.graded:
            parts.append(f"{tally.right}/{tally.graded} right")
        if tally.failed:
            parts.append(f"{tally.failed} failed")
        if eta is not None:
            parts.append(f"ETA {human_seconds(eta)}")
        room = self.console.width - len(f"{self.label} {self.total}/{self.total} ") - _BAR_COLUMNS - 1
        while len(parts) > 1 and len("  ".join(parts)) > room:
            parts.pop()  # the last ones are missed least
        return "  ".join(parts)


def make_progress(total: int, tally: Tally, budget_tokens: int | None, quiet: bool, label: str = "zoomr") -> Quiet:
    """The face that fits where stderr goes. ``label`` starts every line."""
    console = stderr_console()
    face = Quiet if quiet else BarProgress if console.is_terminal and not console.is_dumb_terminal else PlainProgress
    return face(total, tally, budget_tokens, label, console)


def summary_lines(tally: Tally, budget_tokens: int | None) -> list[str]:
    """What a run came to, a fact a line; every share with its n and interval."""
    s = tally.summary()
    lines = []
    if s["accuracy"]:
        a = s["accuracy"]
        lines.append(
            f"accuracy  {a['share']:.3f}  ({a['right']} of {a['graded']} right;"
            f" 95 % interval {a['wilson95'][0]:.3f} to {a['wilson95'][1]:.3f})"
        )
    if s["tokens_per_s"] is not None:
        lines.append(f"speed     {s['tokens_per_s']:,.1f} tokens/s, {counted(s['completion_tokens'], 'token')} decoded")
        of = f" of {budget_tokens:,}" if budget_tokens else ""
        lines.append(f"KV cache  {s['resident_peak']:,}{of} cells at the peak, {human_bytes(s['resident_peak_bytes'])}")
    if s["page_ins"] or s["paged_out_bytes"]:
        back = f"{counted(s['recalled_tokens'], 'token')} came back" if s["recalled_tokens"] else f"{counted(s['page_ins'], 'time')} something came back"
        lines.append(f"paging    {human_bytes(s['paged_out_bytes'])} paged out; {back}")
    if s["disk_written_bytes"]:
        lines.append(f"disk      {human_bytes(s['disk_written_bytes'])} of pages written")
    if s["lost_blocks"]:
        lives = "block lives on as its summary" if s["lost_blocks"] == 1 else "blocks live on as their summaries"
        lines.append(f"lost      {s['lost_blocks']:,} {lives}: the tiers were full or a page file failed")
    if s["faults"]:
        lines.append(f"faults    {counted(s['faults'], 'page file')} could not be written or read")
    if s["kv_full"]:
        lines.append(f"kv full   {s['kv_full']} stopped because --kv-ram and --kv-disk were full")
    if s["dropped_tokens"]:
        lines.append(f"dropped   {counted(s['dropped_tokens'], 'token')}, for good (the policy's rule)")
    if s["prompted_summaries"]:
        lines.append(
            f"prompted  {counted(s['prompted_summaries'], 'summary', 'summaries')}, {s['cut_summaries']:,} of them cut at their longest;"
            f" {counted(s['injected_tokens'], 'token')} written for the model"
        )
    if s["splits"]:
        lines.append(f"split     {counted(s['splits'], 'time')} a prompt or a thought was longer than its share")
    if s["out_of_tokens"]:
        lines.append(f"cut off   {s['out_of_tokens']} reached --max-tokens before the end of the answer")
    if s["timeouts"]:
        lines.append(f"out of time  {s['timeouts']} reached --timeout; what was written is kept")
    if s["failed"] > s["timeouts"]:
        lines.append(f"failed    {s['failed'] - s['timeouts']}, counted neither right nor wrong")
    return lines
