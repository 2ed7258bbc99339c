"""A generation whose finished thoughts are blocks that can be paged: policies `zoomr` and `sumr`.

Only `engine.py` makes these. A dialect says where blocks end (`dialects/`); here is what room makes of it. What is open (the thought and summary being written) is always resident, so its
length is limited: past its share a thought is cut at a sentence end and indexed by its own keys, and a summary is
closed. Both are said in a `Split` event; no text is lost.
"""

from __future__ import annotations

from typing import Any, Iterator, NoReturn

import numpy as np

from .block_index import BlockIndex, sentence_edges
from .dialects import Dialect, Fed, ends_sentence
from .errors import EngineError, StorageError
from .events import BlockClosed, Event, Refreshed, Split, Voted, Warned
from .generation import Generation, TiersFull, pinned_ranges
from .policies import BlockView, Selection
from .sizes import format_bytes
from .timeline import Block, Range

ROOM_TOKENS = 8
"""Cells a selection leaves free for the tokens until the next one, so that not every token needs a selection."""

PIECE_TOKENS = 128
"""Length of the pieces into which an over-long prompt is cut, where the budget allows it."""

LEAST_PIECE_TOKENS = 8
"""No piece of a prompt is shorter than this if the prompt is not: fewer tokens are not worth a page and an index row."""

CUT_TOKENS = 32
"""How long before its limit a thought is cut if a sentence ends there."""


class BlockGeneration(Generation):
    """Pages blocks under a block policy.

    ``thought_limit`` and ``summary_limit`` (tokens) bound the open segment; they are known once the prompt is.
    """

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.index = BlockIndex(self.context, self.policy.settings) if self.policy.uses_votes else None
        self.thought_limit = self.summary_limit = self._pinned_tokens = 0
        self._held_tokens = 0  # set aside in this turn for blocks that a user holds: `held_blocks.py`
        self._summary_start: int | None = None
        self._since_refresh = 0
        self._last_zoomed: tuple[int, ...] = ()
        self._warned = False
        self._pins: list[Range] = []
        self._piece_tokens = 0

    def plan(self) -> None:
        self._pins = pinned_ranges(len(self.prompt), self.cache.budget_tokens, self.policy)
        self._share_out()

    def _share_out(self) -> None:
        """Work out from the pins what a piece, a thought and a summary may take."""
        budget = self.cache.budget_tokens
        self._pinned_tokens = sum(stop - start for start, stop in self._pins)
        share = budget - ROOM_TOKENS - self._pinned_tokens - self._held_tokens
        self.summary_limit = share // 4
        self.thought_limit = share - self.summary_limit
        self._piece_tokens = min(PIECE_TOKENS, share // 4, self.batch_tokens)

    def _fit(self, dialect: Dialect) -> Iterator[Event]:
        refused = dialect.fit(self.thought_limit, self._cut_from, self.summary_limit)
        if refused is not None:
            yield Warned(refused)

    def prefill(self) -> Iterator[Event]:
        head, tail = self._pins[0], self._pins[-1]
        at = len(self.timeline)
        if head[1] <= at < tail[0]:
            yield from self._prefill_middle(at, tail[0])
            return
        yield from self._prefill_pinned(at, head[1] if at < head[1] else tail[1])
        if head != tail and not self._prompt_left and self.index is not None and not self.cache.everything_resident:
            self.index.vote(self.index.n_rows, len(self.timeline.blocks))
            yield from self._refresh("question", ROOM_TOKENS)

    def step(self, token: int, fed: Fed, text: str) -> Iterator[Event]:
        yield from self._make_room(1)
        rows, blocks = self.index.n_rows if self.index is not None else 0, len(self.timeline.blocks)
        position = self._decode_token(token)
        # votes count from shortly before the first page-out, so that it is not made blindly
        voting = rows and (not self.cache.everything_resident or self.cache.free_tokens < 2 * ROOM_TOKENS)
        if voting:
            self.index.vote(rows, blocks)
        closed = yield from self._boundaries(position, fed, text)
        self._since_refresh += 1
        if voting and not self.cache.everything_resident:
            reason = self._due(closed or fed.opens_summary, text)
            if reason:
                yield from self._refresh(reason, ROOM_TOKENS)

    def state(self) -> dict[str, Any]:
        return {
            **super().state(), "index": None if self.index is None else self.index.state(),
            "summary_start": self._summary_start, "since_refresh": self._since_refresh,
            "last_zoomed": self._last_zoomed, "warned": self._warned,
        }  # fmt: skip

    def restore(self, state: dict[str, Any]) -> None:
        super().restore(state)
        if self.index is not None:
            self.index.restore(state["index"])
        self._summary_start, self._since_refresh = state["summary_start"], state["since_refresh"]
        self._last_zoomed, self._warned = tuple(state["last_zoomed"]), state["warned"]

    def _prefill_pinned(self, start: int, stop: int) -> Iterator[Event]:
        n = min(self.batch_tokens, stop - start)
        yield from self._make_room(n)
        progress = self._decode_prompt(n)
        self.timeline.pin(start, start + n)
        yield progress

    def _prefill_middle(self, start: int, stop: int) -> Iterator[Event]:
        if start == self._pins[0][1]:
            self.splits += 1
            yield Split("prompt", start, self._piece_tokens, self.cache.budget_tokens)
        end = self._piece_end(start, stop)
        yield from self._make_room(end - start, end - start)
        progress = self._decode_prompt(end - start)
        yield from self._close("prompt", (self.timeline.open_start, end))
        yield progress

    def _piece_end(self, start: int, stop: int) -> int:
        """Where a piece of the prompt's [start, stop) ends that begins with it: at a sentence's end in its second half if there is
        one, and so that neither it nor what is left behind it is a crumb."""
        most = max(1, self._piece_tokens)
        if stop - start <= most:
            return stop
        end = max(start + 1, min(start + most, stop - LEAST_PIECE_TOKENS))
        for at in range(end, start + max((end - start) // 2, LEAST_PIECE_TOKENS - 1), -1):
            if ends_sentence(self.model.llama.piece(self.prompt[at - 1]).decode("utf-8", "replace")):
                return at
        return end

    def _boundaries(self, position: int, fed: Fed, text: str) -> Iterator[Event]:
        """Close what this token ended or made too long. Returns True if a block was closed."""
        after, start = position + 1, self.timeline.open_start
        if fed.opens_summary:
            self._summary_start = position
        elif fed.closes_summary:
            summary, self._summary_start = self._summary_start, None
            if summary is None:
                yield from self._close("summary", (start, after))
                return True
            if summary > start:
                yield from self._close("thought", (start, summary), (summary, after))
                return True
        elif self._summary_start is not None and after - self._summary_start >= self.summary_limit:
            yield from self._split_summary(after)
            return True
        elif fed.ends_block and self._summary_start is None:
            yield from self._close(fed.role, (start, after))
            return True
        elif fed.role != "marker" and self._summary_start is None and self._too_long(after - start, text):
            self.splits += 1
            yield Split(fed.role, position, after - start, self.thought_limit)
            yield from self._close(fed.role, (start, after))
            return True
        return False

    @property
    def _cut_from(self) -> int:
        """From which length on a thought is split where a sentence ends."""
        return max(self.thought_limit - CUT_TOKENS, self.thought_limit // 2)

    def _too_long(self, open_tokens: int, text: str) -> bool:
        # A summary may still follow, but one that opened just below the limit fits beside the thought.
        return open_tokens >= self.thought_limit or (open_tokens >= self._cut_from and ends_sentence(text))

    def _split_summary(self, after: int) -> Iterator[Event]:
        start, summary = self.timeline.open_start, self._summary_start
        self._summary_start = None
        self.splits += 1
        yield Split("summary", after - 1, after - summary, self.summary_limit)
        if summary > start:
            yield from self._close("thought", (start, summary), (summary, after))
        else:
            yield from self._close("summary", (start, after))

    def _close(self, kind: str, detail: Range, summary: Range | None = None) -> Iterator[Event]:
        block = self.timeline.close(kind, detail, summary)
        self.cache.adopt(block)
        self.reply.dialect.block_ended()
        if self.index is not None:
            self.index.add(block, self._summary_text(block), self._row_edges(block))
            if self.index.unindexed_blocks and not self._warned:
                self._warned = True
                yield Warned(f"the index is full at {self.index.capacity_rows} rows; newer blocks cannot be recalled")
        yield BlockClosed(block.number, kind, detail, summary, self._label(block))

    def _summary_text(self, block: Block) -> Range | None:
        """Where the model wrote the summary's text: without markers and without what the runtime wrote."""
        if block.summary is None:
            return None
        start, stop = block.summary
        first, last = self.reply.dialect.written(self.timeline.tokens[start:stop])
        return start + first, start + last

    def _row_edges(self, block: Block) -> list[int] | None:
        """Between which positions a block without a summary is averaged; None: where nothing but its length says."""
        if block.summary is not None or not self.summaries.by_sentence:
            return None
        start, stop = block.detail
        pieces = (self.model.llama.piece(token).decode("utf-8", "replace") for token in self.timeline.tokens[start:stop])
        return sentence_edges([at for at, text in enumerate(pieces, start + 1) if ends_sentence(text)], start, stop)

    def _label(self, block: Block) -> str:
        start, stop = self._summary_text(block) or (block.detail[0], min(block.detail[1], block.detail[0] + 12))
        pieces = (self.model.llama.piece(token) for token in self.timeline.tokens[start:stop])
        return " ".join(b"".join(pieces).decode("utf-8", "replace").split())

    def _due(self, boundary: bool, text: str) -> str | None:
        if boundary:
            return "segment"
        if self._since_refresh >= self.policy.settings.refresh_tokens:
            return "interval"
        return "sentence" if ends_sentence(text) else None

    def _make_room(self, n_tokens: int, reserve_tokens: int = ROOM_TOKENS) -> Iterator[Event]:
        if self.cache.free_tokens < n_tokens:
            yield from self._refresh("room", reserve_tokens)
        if self.cache.free_tokens < n_tokens:
            raise EngineError(
                f"{n_tokens} cells are needed at position {len(self.timeline)}, {self.cache.free_tokens} of "
                f"{self.cache.budget_tokens} are free; raise --kv-budget"
            )

    def _refresh(self, reason: str, reserve_tokens: int) -> Iterator[Event]:
        view = self._view(reserve_tokens)
        if self.tell_votes and self.index is not None:
            yield Voted(len(self.timeline), tuple(view.votes.tolist()), reason)
        selection = self._select(view)
        self.refreshes += 1
        self._since_refresh = 0
        if selection.agreement is not None:
            self.agreements.append(selection.agreement)
        self.cache.touch(selection.zoomed)
        moved = list(self.cache.apply(selection, view.lifetime_votes if self.index is not None else None))
        if moved or selection.zoomed != self._last_zoomed:
            yield Refreshed(len(self.timeline), selection.zoomed, selection.agreement, reason)
            yield from moved
        self._last_zoomed = selection.zoomed
        if self.cache.full:
            self._tiers_are_full()

    def _select(self, view: BlockView) -> Selection:
        return self.policy.select(view)

    def _tiers_are_full(self) -> NoReturn:
        limits = self.cache.store.limits
        if self.cache.on_full == "stop":
            raise TiersFull
        raise StorageError(
            f"no room for paged-out blocks at position {len(self.timeline)}: --kv-ram {format_bytes(limits.ram_bytes)} and"
            f" --kv-disk {format_bytes(limits.disk_bytes)} are full; raise one of them, or choose --on-full drop or stop"
        )

    def _view(self, reserve_tokens: int) -> BlockView:
        """The blocks that may be paged now, and the room they share.

        The newest token stays resident (llama.cpp demands that positions follow on), so a block that ends with
        it can be paged only once another token stands behind it. Pinned tokens still to be prefilled count.
        """
        line, n = self.timeline, len(self.timeline.blocks)
        held = line.open_tokens
        if n and line.blocks[-1].stop == len(line):
            n -= 1
            held += line.blocks[n].detail_tokens + line.blocks[n].summary_tokens
        votes = (self.index.recent_votes(n), self.index.lifetime_votes(n)) if self.index is not None else (np.zeros(n), np.zeros(n))
        return BlockView(
            free_tokens=self.cache.budget_tokens - reserve_tokens - self._pinned_tokens - held,
            detail_tokens=line.detail_tokens[:n],
            summary_tokens=np.where(self.cache.summary_lost()[:n], 0, line.summary_tokens[:n]),
            votes=votes[0],
            lifetime_votes=votes[1],
            last_used=self.cache.last_used[:n],
            available=self.cache.available()[:n],
        )
