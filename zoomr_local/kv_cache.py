"""Which positions are in cells, and the only place that moves them.

`engine.py` says what should be resident (a `Selection`, or positions to drop); this file plans the difference,
pages losers out, then pages winners in, and answers with what it did as events. A winner that is on disk only is
read while decoding goes on and comes in with the next selection that still wants it. Cells and their numbers stay
in the native code; here there are positions and counts.

Budget invariant: `resident_tokens` never exceeds `budget_tokens`; a caller that would break it gets EngineError
before anything is decoded.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Iterator

import numpy as np

from .errors import EngineError
from .events import BlockLost, Dropped, Event, PagedIn, PagedOut, ReadAhead, Warned
from .libllama import LlamaContext
from .policies import Selection
from .tiers import Fault, Key, PageStore
from .timeline import Block, Timeline

PARTS = ("detail", "summary")

COUNTERS = ("ram_peak_bytes", "disk_peak_bytes", "largest_bytes", "stored_bytes", "written_bytes", "read_bytes", "faults")
"""What a store counts over a generation, however many processes worked on it."""


class KVCache:
    """The cells of one sequence under a budget, and the pages of what left them."""

    def __init__(
        self, context: LlamaContext, store: PageStore, budget_tokens: int, timeline: Timeline, sequence: int = 0,
        on_full: str = "drop", wait_for_disk: bool = False,
    ) -> None:
        """Empties every cell and starts on ``timeline`` with a store that was begun for it.

        ``on_full`` is what happens when neither tier has room for a block: "drop" forgets the least-voted stored
        ones; otherwise ``full`` becomes true and nothing more is moved. With ``wait_for_disk`` a selection is made
        true at once, however long the disk takes.
        """
        self.context, self.store, self.budget_tokens, self.sequence = context, store, budget_tokens, sequence
        self.timeline, self.on_full, self.wait_for_disk = timeline, on_full, wait_for_disk
        self.context.clear()
        self.full = False
        self.resident_tokens = self.peak_tokens = 0
        self.page_ins = self.page_outs = self.dropped_tokens = 0
        self._warned: set[str] = set()
        self._lost = {part: np.zeros(64, bool) for part in PARTS}
        self._in = {part: np.zeros(64, bool) for part in PARTS}
        self._last_used = np.zeros(64, np.int64)
        self._forgotten = np.zeros(64, bool)
        self._away = 0

    @property
    def free_tokens(self) -> int:
        """How many more tokens fit the budget now."""
        return self.budget_tokens - self.resident_tokens

    @property
    def everything_resident(self) -> bool:
        """True while no block is paged out, so that a new selection could change nothing."""
        return self._away == 0

    def resident(self, part: str) -> np.ndarray:
        """bool [n_blocks] view: which blocks' ``part`` ("detail" or "summary") is in cells."""
        return self._in[part][: len(self.timeline.blocks)]

    def available(self) -> np.ndarray:
        """bool [n_blocks]: which blocks' detail is in cells or can be."""
        n = len(self.timeline.blocks)
        return self._in["detail"][:n] | ~self._lost["detail"][:n]

    def summary_lost(self) -> np.ndarray:
        """bool [n_blocks]: which blocks' summary is neither in cells nor can be; they live on as index rows."""
        n = len(self.timeline.blocks)
        return self._lost["summary"][:n] & ~self._in["summary"][:n]

    def lost(self, part: str) -> np.ndarray:
        """bool [n_blocks] view: which blocks' ``part`` can never come back once it is out of the cache."""
        return self._lost[part][: len(self.timeline.blocks)]

    @property
    def lost_blocks(self) -> int:
        """Blocks of which the detail or the summary can never come back once it is out of the cache, forgotten ones aside."""
        return int(((self._lost["detail"] | self._lost["summary"]) & ~self._forgotten).sum())

    def forgotten(self) -> np.ndarray:
        """bool [n_blocks] view: which blocks were given up with ``forget``."""
        return self._forgotten[: len(self.timeline.blocks)]

    @property
    def last_used(self) -> np.ndarray:
        """int64 [n_blocks] view: the position at which each block was closed or last touched."""
        return self._last_used[: len(self.timeline.blocks)]

    def touch(self, blocks: tuple[int, ...]) -> None:
        """Note that ``blocks`` are in use now."""
        self._last_used[list(blocks)] = len(self.timeline)

    def decode(self, tokens: list[int], first_position: int, logits: str) -> None:
        """Decode ``tokens`` at consecutive positions into free cells. Raises EngineError past the budget."""
        n = len(tokens)
        if n > self.free_tokens:
            raise EngineError(f"{n} tokens do not fit: {self.resident_tokens} of {self.budget_tokens} cells in use")
        self.context.decode(tokens, range(first_position, first_position + n), seq=self.sequence, logits=logits)
        self._count(n)

    def adopt(self, block: Block) -> None:
        """Take over a block that was just closed; both its parts are in cells."""
        if block.number == len(self._in["detail"]):
            self._in, self._lost = (
                {part: np.concatenate([flags, np.zeros_like(flags)]) for part, flags in both.items()}
                for both in (self._in, self._lost)
            )
            self._last_used = np.concatenate([self._last_used, np.zeros_like(self._last_used)])
            self._forgotten = np.concatenate([self._forgotten, np.zeros_like(self._forgotten)])
        for part in PARTS:
            self._in[part][block.number] = True
        self.touch((block.number,))

    def apply(self, selection: Selection, worth: np.ndarray | None = None) -> Iterator[Event]:
        """Make ``selection`` true for the first n blocks: all page-outs first, then all page-ins.

        Winners that must be read from disk first stay out this time, unless ``wait_for_disk``. ``worth`` (float [n],
        None: the age) says which stored blocks to forget first when the tiers are full. Raises EngineError, before
        anything has moved, if the selection does not fit the budget or wants what was lost.
        """
        n = len(selection.details)
        wanted = {"detail": selection.details, "summary": selection.summaries & ~self.summary_lost()[:n]}
        some = {"detail": True, "summary": self.timeline.summary_tokens[:n] > 0}
        out = {p: np.flatnonzero(self._in[p][:n] & ~wanted[p] & some[p]) for p in PARTS}
        back = {p: np.flatnonzero(wanted[p] & ~self._in[p][:n]) for p in PARTS}
        after = self.resident_tokens + self._sum(back) - self._sum(out)
        if after > self.budget_tokens:
            raise EngineError(f"the selection needs {after} cells, the budget is {self.budget_tokens}")
        gone = np.flatnonzero(selection.details & ~self.available()[:n])
        if len(gone):
            raise EngineError(f"the selection wants blocks that were lost: {gone.tolist()}")
        self._worth = np.arange(n, dtype=float) if worth is None else worth
        self._coming = {(block, part) for part in PARTS for block in back[part].tolist()}
        self.store.pin(self._coming)
        for part in PARTS:
            if len(out[part]) and not self.full:
                yield from self._page_out(part, out[part])
        yield from self._faults()
        if self.full:
            return
        back = {part: self._not_lost(part, back[part]) for part in PARTS}
        yield from self._read_ahead(back)
        for part in PARTS:
            if len(back[part]):
                yield from self._page_in(part, back[part])
        yield from self._faults()

    def flush(self) -> Iterator[Event]:
        """Wait until every page is where it belongs, and say what failed."""
        self.store.settle(wait=True)
        yield from self._faults()

    def drop(self, positions: np.ndarray) -> Event:
        """Free the cells of ``positions`` (ascending int32) for good."""
        breaks = np.flatnonzero(np.diff(positions) != 1) + 1
        freed = 0
        for run in np.split(positions, breaks):
            freed += self.context.page_free(self.sequence, int(run[0]), int(run[-1]) + 1)
        if freed != len(positions):
            raise EngineError(f"{len(positions)} tokens were to be dropped, {freed} were in cells")
        self._count(-freed)
        self.dropped_tokens += freed
        return Dropped(len(self.timeline), freed)

    def forget(self, blocks: list[int]) -> Event:
        """Give up ``blocks`` for good, in cells and tiers: they are no part of the text any more.

        The newest token must not be in one of them, nor a block that was forgotten before.
        """
        freed = 0
        for block in blocks:
            for part in PARTS:
                span = getattr(self.timeline.blocks[block], part)
                if (block, part) in self.store:
                    self.store.drop((block, part))
                if self._in[part][block] and span:
                    freed += self.context.page_free(self.sequence, *span)
                elif span:
                    self._away -= 1
                self._in[part][block], self._lost[part][block] = False, True
            self._forgotten[block] = True
        self._count(-freed)
        self.dropped_tokens += freed
        return Dropped(len(self.timeline), freed)

    def truncate(self, n_tokens: int) -> None:
        """Keep the first ``n_tokens`` of the sequence only, of a cache that never paged. Raises EngineError if it cannot."""
        more = len(self.timeline) - n_tokens
        if more <= 0:
            return
        if not self.context.seq_rm(self.sequence, n_tokens, -1):
            raise EngineError("this model's memory cannot go back to an earlier token")
        del self.timeline.tokens[n_tokens:]
        self._count(-more)

    def state(self) -> dict[str, Any]:
        """Counters, and what is in cells block by block, as arrays; cells and pages have their own bytes."""
        n = len(self.timeline.blocks)
        names = ("resident_tokens", "peak_tokens", "page_ins", "page_outs", "dropped_tokens")
        return {
            **{name: getattr(self, name) for name in names}, "away": self._away,
            "last_used": self.last_used[:n], "forgotten": self._forgotten[:n], **{part: self.resident(part)[:n] for part in PARTS},
            **{f"lost_{part}": self._lost[part][:n] for part in PARTS}, "warned": sorted(self._warned),
            "full": self.full, "store": {name: getattr(self.store, name) for name in COUNTERS},
        }  # fmt: skip

    def restore(self, state: dict[str, Any]) -> None:
        """Become what ``state`` was taken from; its timeline, cells and pages are there already."""
        n = len(self.timeline.blocks)
        for block in self.timeline.blocks:
            self.adopt(block)
        self._last_used[:n], self._forgotten[:n] = state["last_used"], state["forgotten"]
        for part in PARTS:
            self._in[part][:n] = state[part]
            self._lost[part][:n] = state[f"lost_{part}"]
        self._warned, self.full = set(state["warned"]), state["full"]
        failed = self.store.faults
        for name in COUNTERS:  # putting the pages back counted too
            setattr(self.store, name, int(state["store"][name]))
        self.store.faults += failed
        for name in ("resident_tokens", "peak_tokens", "page_ins", "page_outs", "dropped_tokens"):
            setattr(self, name, int(state[name]))
        self._away = int(state["away"])

    def _sum(self, chosen: dict[str, np.ndarray]) -> int:
        lengths = {"detail": self.timeline.detail_tokens, "summary": self.timeline.summary_tokens}
        return sum(int(lengths[part][blocks].sum()) for part, blocks in chosen.items())

    def _count(self, change_tokens: int) -> None:
        self.resident_tokens += change_tokens
        self.peak_tokens = max(self.peak_tokens, self.resident_tokens)

    def _page_out(self, part: str, blocks: np.ndarray) -> list[Event]:
        """Blocks leave the cache; those that were never stored are stored. Stops short where ``full`` becomes true."""
        written = tokens = 0
        gone: list[int] = []
        lost: list[Event] = []
        for block in blocks.tolist():
            start, stop = getattr(self.timeline.blocks[block], part)
            if (block, part) in self.store:
                self.store.touch((block, part))
            elif not self._lost[part][block]:
                stored = self._put((block, part), start, stop, lost)
                if self.full:
                    break
                written += stored
            self._in[part][block] = False
            freed = self.context.page_free(self.sequence, start, stop)
            if freed != stop - start:
                raise EngineError(f"block {block} {part}: {freed} of {stop - start} tokens were in cells")
            tokens += freed
            gone.append(block)
        self._count(-tokens)
        self._away += len(gone)
        self.page_outs += len(gone) * (part == "detail")
        return [PagedOut(len(self.timeline), tuple(gone), part, tokens, written), *lost] if gone else lost

    def _page_in(self, part: str, blocks: np.ndarray) -> list[Event]:
        """Blocks come back; those whose page turns out unreadable stay out and are lost."""
        read = tokens = 0
        came: list[int] = []
        for block in blocks.tolist():
            key = (block, part)
            page = self.store.get(key) if key in self.store else None  # its writing may have failed since it was chosen
            if page is None:
                continue
            self._in[part][block] = True
            tokens += self.context.page_in(self.sequence, page)
            read += page.nbytes
            came.append(block)
        self._count(tokens)
        self._away -= len(came)
        self.page_ins += len(came) * (part == "detail")
        return [PagedIn(len(self.timeline), tuple(came), part, tokens, read)] if came else []

    def _put(self, key: Key, start: int, stop: int, lost: list[Event]) -> int:
        """Store a block's part, making room as ``on_full`` says; what that cost is added to ``lost``. Bytes stored."""
        size = self.context.page_bytes(self.sequence, start, stop)
        while True:
            stored = self.store.put(
                key, start, stop - start, size, lambda out: self.context.page_write(self.sequence, start, stop, out)
            )
            if stored is not None:
                return stored
            if self.on_full != "drop":
                self.full = True
                return 0
            # what fits in no case must not cost others their room
            victim = self._least(key) if self.store.could_hold(size, stop - start) else key
            if victim != key:
                self.store.drop(victim)
            lost.append(self._lose(victim, "both tiers are full", None))
            if victim == key:
                return 0

    def _least(self, key: Key) -> Key:
        """Which page to forget so that ``key`` may be stored: details before summaries, those in cells or about to be
        last among them, then the least worth, then the oldest. ``key`` itself takes part."""
        n = len(self._worth)

        def rank(page: Key) -> tuple[int, bool, float, int]:
            block, part = page
            in_use = page != key and (page in self._coming or bool(self._in[part][block]))
            return PARTS.index(part), in_use, self._worth[block] if block < n else np.inf, block

        return min([*self.store.keys(), key], key=rank)

    def _read_ahead(self, back: dict[str, np.ndarray]) -> Iterator[Event]:
        """Begin to read winners that are on disk only. Unless they are waited for they leave ``back``."""
        late = {p: [b for b in back[p].tolist() if not self.store.at_hand((b, p))] for p in PARTS}
        for part in PARTS:
            if late[part]:
                n_bytes = sum(self.store.read_ahead((block, part)) for block in late[part])
                yield ReadAhead(len(self.timeline), tuple(late[part]), part, n_bytes)
                if not self.wait_for_disk:
                    back[part] = np.array([b for b in back[part].tolist() if b not in late[part]], int)

    def _not_lost(self, part: str, blocks: np.ndarray) -> np.ndarray:
        return blocks[~self._lost[part][blocks]]

    def _lose(self, key: Key, reason: str, path: str | None) -> Event:
        block, part = key
        self._lost[part][block] = True
        return BlockLost(len(self.timeline), (block,), part, reason, path)

    def _faults(self) -> Iterator[Event]:
        for fault in self.store.take_faults():
            block, part = fault.key
            if fault.key in self.store or self._in[part][block]:  # stored anew from its cells, or it will be when it leaves them
                fault = replace(fault, lost=False)
            if fault.operation not in self._warned:
                self._warned.add(fault.operation)
                yield Warned(_fault_sentence(fault))
            if fault.lost:
                yield self._lose(fault.key, fault.reason, str(fault.path))


def _fault_sentence(fault: Fault) -> str:
    what = f"{fault.path} could not be {'written' if fault.operation == 'write' else 'read back'}: {fault.reason}"
    left = "its block goes on as its summary only" if fault.lost else "its block stays in RAM while there is room"
    return f"{what}; {left}, and what else fails so is counted and not said again"
