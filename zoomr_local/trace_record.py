"""What a trace records of a generation: events in, lines out, with the texts and the sizes that events leave out.

`solve`, `demo` and `chat` hold a `Recorder` while `--trace` is given; it only reads the engine, so that tokens are the
same with and without it. Whatever goes wrong in recording is said once and ends the recording, never the run.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .events import (
    BlockClosed, Dropped, Event, Finished, HeadsEvicted, HeadsRecalled, PagedIn, PagedOut, PromptProgress, TokenDecoded, TokenInjected, Voted,
)  # fmt: skip
from .timeline import Block, Range
from .trace_file import FORMAT, HEADER, TraceWriter
from .trace_held import HeldLines

MOST_VOTED = 64
"""Blocks of a selection whose votes are recorded one by one, the most voted ones; of the others the sum is."""

_POINTS = 32  # corners of the line of cells in one line of the file
_DROPPED_TOKENS = 64  # single tokens that are dropped are counted together up to so many


class Corners:
    """A line through points with ascending x, kept as the points in which it bends; what is between them follows exactly."""

    def __init__(self) -> None:
        self.points: list[tuple[int, int]] = []
        self._last: tuple[int, int] | None = None
        self._kept = False
        self._slope: float | None = None

    def add(self, x: int, y: int) -> None:
        """The line goes on to (x, y); the same x again is a step up or down."""
        if self._last is None:
            self._keep((x, y))
            return
        x0, y0 = self._last
        if x == x0:
            if y != y0:
                self._bend()
                self._keep((x, y))
            return
        slope = (y - y0) / (x - x0)
        if slope != self._slope:
            self._bend()
        self._last, self._kept, self._slope = (x, y), False, slope

    def take(self, whole: bool = False) -> list[tuple[int, int]]:
        """The bends since the last call; with ``whole`` also the point in which the line ends for now."""
        if whole:
            self._bend()
        taken, self.points = self.points, []
        return taken

    def _keep(self, point: tuple[int, int]) -> None:
        self.points.append(point)
        self._last, self._kept, self._slope = point, True, None

    def _bend(self) -> None:
        if self._last is not None and not self._kept:
            self.points.append(self._last)
            self._kept = True


class Recorder:
    """Writes the lines of one run on ``engine``, whose votes it asks for. ``say`` hears why nothing more is recorded."""

    def __init__(self, writer: TraceWriter, engine: Any, about: dict[str, Any], say: Callable[[str], None]) -> None:
        """``about``: what the run's header tells besides model, policy and budget (settings, versions)."""
        self._writer, self._engine, self._say = writer, engine, say
        self._failed = False
        self._open = False
        self._turns = 0
        self._turn_began = False
        self._generation: Any = None
        engine.tell_votes = True
        budget = None if engine.policy.unit == "all" else engine.budget_tokens
        self._line(HEADER, format=FORMAT, **about, model=engine.model.name, policy=engine.config.policy, budget_tokens=budget)
        self._guarded(writer.flush)

    def begin(self, name: str | int) -> None:
        """A problem begins; the next event is its first."""
        self._guarded(lambda: self._begin(name))

    def turn(self) -> None:
        """A turn of a conversation begins: behind the one before it if the cache goes on, else as a problem of its own."""
        self._turns += 1
        self._turn_began = True

    def feed(self, event: Event) -> None:
        """Record ``event``; to be called while the engine stands where it was when it said it."""
        if not self._failed:
            self._guarded(lambda: self._feed(event))

    def end(self, result: dict[str, Any] | None = None) -> None:
        """The problem has ended; ``result`` is what became of it (answer, correct, error), None if it was given up."""
        self._guarded(lambda: self._end(result))

    def close(self) -> None:
        """Write what is left and close the file."""
        self._guarded(lambda: self._end(None))
        self._writer.close()
        self._engine.tell_votes = False

    def _guarded(self, do: Callable[[], None]) -> None:
        if self._failed:
            return
        try:
            do()
        except Exception as error:  # whatever it is, no result may be lost for a picture of it
            self._failed = True
            reason = error.strerror if isinstance(error, OSError) else f"{type(error).__name__}: {error}"
            self._say(f"warning: nothing more is written to the trace {self._writer.path}: {reason}; the run goes on")

    # lines

    def _line(self, event: str, **fields: Any) -> int:
        return self._writer.write({"event": event, **fields})

    def _begin(self, name: str | int, reply: int = 1) -> None:
        self._end(None)
        self._open = True
        self._name, self._replies = name, reply
        self._blocks = 0  # known ones
        self._corners = Corners()
        self._roles: list[tuple[int, int, str]] = []
        self._token: tuple[int, int] | None = None
        self._dropped = [0, 0]  # position, tokens
        self._held: HeldLines | None = None
        self._on_disk: set[tuple[int, str]] = set()
        self._forgotten = 0
        self._prompt = (0, 0)
        self._prompt_done = self._first_seen = False
        self._written = 0
        self._line("problem", id=name if reply == 1 else f"{name}#{reply}")

    def _end(self, result: dict[str, Any] | None) -> None:
        if self._open:
            if self._first_seen:
                self._texts(self._stop, whole=True)
                self._flush_counts()
            if result is not None:
                self._line("result", **result)
            self._open = False
        self._writer.flush()

    def _feed(self, event: Event) -> None:
        if self._turn_began:
            self._next_turn()
        g = self._engine.generation
        if self._first_seen and g is not self._generation:  # another reply to the same problem
            self._begin(self._name, self._replies + 1)
        self._generation = g
        if not self._first_seen:
            self._first_seen = True
            self._found(g)
        if isinstance(event, TokenDecoded | TokenInjected):
            self._decoded(event)
        elif isinstance(event, PromptProgress):
            self._prompt = (self._prompt[0], event.total_tokens)
            self._corners.add(event.done_tokens, g.cache.resident_tokens)
        elif isinstance(event, Voted):
            self._votes(event)
        elif isinstance(event, BlockClosed):
            if event.block >= self._blocks:
                self._block(g.timeline.blocks[event.block], None)
        elif isinstance(event, Dropped):
            self._drop(event, g)
        elif isinstance(event, HeadsEvicted):
            self._held.selected(event.position, event.layers, event.held_tokens, sum(event.freed_cells), event.budget_tokens)
        elif isinstance(event, HeadsRecalled):
            self._held.recalled(event.position, event.layers, event.held_tokens, sum(event.recalled_cells))
        elif isinstance(event, Finished):
            self._finished(event)
        else:
            self._line(**event.as_dict())
            if isinstance(event, PagedOut):  # what had a page on disk already is there again, and that is to be said
                self._on_disk -= {(block, event.part) for block in event.blocks}
            if isinstance(event, PagedOut | PagedIn):
                self._places(event.position, g)
        if len(self._corners.points) >= _POINTS:
            self._flush_points()

    def _next_turn(self) -> None:
        self._turn_began = False
        goes_on = self._open and self._engine.generation is self._generation and self._engine.policy.unit != "all"
        if not goes_on:
            self._begin(f"turn {self._turns}")
        else:
            start = len(self._engine.sequence)
            self._line("turn", number=self._turns, position=start)
            self._roles, self._prompt, self._prompt_done, self._token = [], (start, start), False, None

    def _found(self, g: Any) -> None:
        """Blocks that were there before this trace, as a session brought them."""
        for block in g.timeline.blocks:
            resident = [bool(g.cache.resident(part)[block.number]) for part in ("detail", "summary")]
            self._block(block, resident)
        self._forgotten = int(g.cache.forgotten().sum())
        self._corners.add(len(g.timeline), g.cache.resident_tokens)
        if self._engine.policy.unit == "head":
            self._held = HeldLines(g.cells, self._engine.policy.recalls, self._line)

    def _decoded(self, event: TokenDecoded | TokenInjected) -> None:
        if not self._prompt_done:
            self._prompt_done = True
            self._prompt_texts()
        self._corners.add(event.position, event.resident_tokens)
        runs, position = self._roles, event.position
        if runs and runs[-1][2] == event.role:
            runs[-1] = (runs[-1][0], position + 1, event.role)
        else:
            start = runs[-1][1] if runs else position  # a beacon in between goes with what follows
            if event.role in ("thought", "answer") and self._engine.policy.unit != "block":
                self._texts(start)
            self._roles.append((start, position + 1, event.role))
        self._token = (position, event.token)

    def _block(self, block: Block, resident: list[bool] | None) -> None:
        more = {} if resident is None else {"resident": resident}
        self._line(
            "BlockClosed", block=block.number, kind=block.kind, detail=block.detail, summary=block.summary,
            text=self._text(block.detail), summary_text=self._text(block.summary) if block.summary else None, **more,
        )  # fmt: skip
        self._blocks = block.number + 1
        self._writer.flush()

    def _votes(self, event: Voted) -> None:
        votes = [(block, _short(v)) for block, v in enumerate(event.votes) if round(v, 1) > 0]
        votes.sort(key=lambda pair: -pair[1])
        rest = votes[MOST_VOTED:]
        more = {"others": [len(rest), _short(sum(v for _, v in rest))]} if rest else {}
        self._line("Voted", position=event.position, reason=event.reason, votes=votes[:MOST_VOTED], **more)

    def _drop(self, event: Dropped, g: Any) -> None:
        gone = g.cache.forgotten() if hasattr(g.cache, "forgotten") else ()
        if sum(gone) > self._forgotten:
            self._forgotten = int(sum(gone))
            self._line("Dropped", position=event.position, tokens=event.tokens, forgotten=[int(n) for n in gone.nonzero()[0]])
            return
        self._dropped = [event.position, self._dropped[1] + event.tokens]
        if self._dropped[1] >= _DROPPED_TOKENS:
            self._flush_dropped()

    def _places(self, position: int, g: Any) -> None:
        """Pages that went from RAM to disk, or came back, since the last time; nothing while the disk is not used."""
        store = g.cache.store
        if not store.disk_peak_bytes:
            return
        on_disk = {p.info.key for p in store.placements() if p.offset is None}
        for where, keys in (("disk", on_disk - self._on_disk), ("ram", self._on_disk & set(store.keys()) - on_disk)):
            for part in ("detail", "summary"):
                blocks = sorted(block for block, which in keys if which == part)
                if blocks:
                    self._line("tier", position=position, part=part, blocks=blocks, where=where)
        self._on_disk = on_disk

    def _finished(self, event: Finished) -> None:
        self._texts(self._stop, whole=True)
        self._flush_counts()
        self._places(len(self._generation.timeline), self._generation)
        told = event.as_dict()
        for text in ("content", "reasoning"):  # in the texts already
            del told[text]
        self._line(**told)
        self._writer.flush()

    def _flush_counts(self) -> None:
        self._flush_points(whole=True)
        self._flush_dropped()
        if self._held is not None:
            self._held.flush()

    def _flush_points(self, whole: bool = False) -> None:
        points = self._corners.take(whole)
        if points:
            self._line("cells", points=points)

    def _flush_dropped(self) -> None:
        if self._dropped[1]:
            self._line("Dropped", position=self._dropped[0], tokens=self._dropped[1])
        self._dropped = [0, 0]

    # texts

    @property
    def _stop(self) -> int:
        """The position behind the last token, decoded or only sampled."""
        known = len(self._generation.timeline)
        return max(known, self._token[0] + 1) if self._token else known

    def _prompt_texts(self) -> None:
        """The parts of the prompt that are in no block."""
        pinned = self._generation.timeline.pinned
        edges = {self._prompt[0], self._prompt[1], *(edge for span in pinned for edge in span)}
        inside = sorted(edge for edge in edges if self._prompt[0] <= edge <= self._prompt[1])
        for start, stop in zip(inside, inside[1:]):
            pin = any(a <= start and stop <= b for a, b in pinned)
            self._loose((start, stop), "prompt", {"pinned": pin or self._engine.policy.unit == "all"})
        self._written = self._prompt[1]

    def _texts(self, until: int, whole: bool = False) -> None:
        """What was written up to ``until`` and is in no block, role by role. Markers go with what follows, which is still
        to come unless it is the ``whole`` reply; the one that closes a summary goes with the summary."""
        runs: list[tuple[int, int, str]] = []
        for start, stop, role in self._roles:
            if role == "marker" and runs and runs[-1][2] == "summary":
                runs[-1] = (runs[-1][0], start + 1, "summary")
                start += 1
            elif runs and runs[-1][2] == "marker":
                start = runs.pop()[0]
            if start < stop:
                runs.append((start, stop, role))
        if runs and runs[-1][2] == "marker" and not whole:
            until = min(until, runs[-1][0])
        for start, stop, role in runs:
            if self._written < stop and start < until:
                self._loose((max(start, self._written), min(stop, until)), role, {})
        self._written = max(self._written, until)
        self._roles = [run for run in self._roles if run[1] > self._written]

    def _loose(self, span: Range, role: str, more: dict[str, Any]) -> None:
        """The parts of ``span`` that no block covers, a line each."""
        start, stop = span
        blocks = self._generation.timeline.blocks
        for first, last in sorted((b.detail[0], b.stop) for b in blocks if b.detail[0] < stop and start < b.stop):
            if start < first:
                self._line("text", role=role, range=(start, first), text=self._text((start, first)), **more)
            start = max(start, last)
        if start < stop:
            self._line("text", role=role, range=(start, stop), text=self._text((start, stop)), **more)

    def _text(self, span: Range) -> str:
        llama, tokens = self._engine.model.llama, self._generation.timeline.tokens[slice(*span)]
        if self._token is not None and self._token[0] + 1 == span[1] and len(tokens) < span[1] - span[0]:
            tokens.append(self._token[1])
        return b"".join(llama.piece(token) for token in tokens).decode("utf-8", "replace")


class Recording:
    """A `Listener` that passes everything on to another one and has it recorded on the way."""

    def __init__(self, listener: Any, recorder: Recorder) -> None:
        self._listener, self._recorder = listener, recorder

    def started(self, problem: Any) -> None:
        """A problem begins."""
        self._recorder.begin(problem.id)
        self._listener.started(problem)

    def event(self, event: Event) -> None:
        """One event of the engine."""
        self._recorder.feed(event)
        self._listener.event(event)

    def finished(self, record: dict[str, Any]) -> None:
        """A record is on the disk."""
        self._recorder.end(result_of(record))
        self._listener.finished(record)


def result_of(record: dict[str, Any]) -> dict[str, Any]:
    """What a trace says of a record, behind the reply that was recorded last."""
    names = ("answer", "correct", "error", "finish_reason", "resumed")
    last = record["votes"][-1] if record.get("votes") else record  # that reply's own, not the vote's winner
    return {name: last[name] for name in names if name in last}


def _short(number: float) -> float:
    """With one decimal, and none where it is 0: half the bytes."""
    rounded = round(float(number), 1)
    return int(rounded) if rounded.is_integer() else rounded
