"""The commands of a chat that look into the cache, or say what stays in it: /kv, /notes, /zoom, /pin and /unpin."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING, Any

from zoomr_local.cache_view import CELLS, CacheRow, block_text, cache_state
from zoomr_local.errors import StorageError, UsageError
from zoomr_local.events import BlockLost, Event, PagedIn, PagedOut, Warned

from . import chat_view
from .chat_view import visible

if TYPE_CHECKING:
    from .chat_loop import ChatLoop

_INDEXED = {"extractive": "the mean keys of its sentences", "off": "the mean keys of 32 tokens each"}
"""Ways of summarising that write no text, and what stands for a block then."""


class CacheCommands:
    """What `chat_commands.py` has of this kind."""

    chat: ChatLoop

    def do_kv(self, rest: str) -> None:
        """/kv [all]: draw the cache: every block in order, where it is, what is zoomed or pinned, and the budget."""
        state = cache_state(self.chat.engine)
        if state is None:
            raise UsageError(self._nothing("nothing is in the cache"))
        blocks = self.chat.engine.generation.timeline.blocks
        width = shutil.get_terminal_size().columns
        self._print(chat_view.kv_lines(state, lambda row: self._label(row, blocks), width, rest == "all"))
        self._print([chat_view.legend()])

    def do_notes(self, rest: str) -> None:
        """/notes: the summaries that the model wrote of its thoughts."""
        generation = self.chat.engine.generation
        found = [b for b in generation.timeline.blocks if b.summary] if generation else []
        if not found:
            raise UsageError(self._no_notes())
        for block in found:
            gone = " (dropped)" if generation.cache.forgotten()[block.number] else ""
            text = " ".join(visible(block_text(self.chat.engine, block)[1]).split())
            self._print([f"{block.number:>6}  {block.detail_tokens:>5} tokens{gone}  {text}"])

    def do_zoom(self, rest: str) -> None:
        """/zoom ID: show the text of a block, and bring it into the cache for the next reply."""
        number = self._number(rest, "/zoom ID")
        detail, summary = block_text(self.chat.engine, self.chat.engine.generation.timeline.blocks[number])
        self._print([visible(detail).strip(), *([f"summary: {visible(summary).strip()}"] if summary else [])])
        try:
            events = self.chat.talk.zoom(number)
        except (UsageError, StorageError) as error:
            self._say(f"not brought in: {error}")
            return
        self._moved(number, events, "it stays for the next reply")

    def do_pin(self, rest: str) -> None:
        """/pin [ID]: keep a block in the cache until /unpin ID, whatever the heads choose; without ID, list those."""
        if not rest:
            pinned, again = self.chat.talk.pinned, self.chat.talk.again
            until = "" if again is None else f", until your next message reads the conversation again ({again})"
            self._say(f"pinned: {', '.join(map(str, pinned))}{until}" if pinned else "no block is pinned")
            return
        number = self._number(rest, "/pin ID")
        self._moved(number, self.chat.talk.pin(number), f"it stays until /unpin {number}")

    def do_unpin(self, rest: str) -> None:
        """/unpin ID: leave a block to the heads again."""
        number = self._number(rest, "/unpin ID")
        self.chat.talk.unpin(number)
        self._say(f"block {number} is pinned no more; it leaves the cache when the heads choose others")
        self.chat.autosave()

    def _number(self, rest: str, usage: str) -> int:
        policy = self.chat.engine.policy
        if policy.unit != "block":
            raise UsageError(f"policy {policy.name} has no blocks that could be zoomed or pinned")
        generation = self.chat.engine.generation
        n = len(generation.timeline.blocks) if generation else 0
        if not rest.isdecimal() or len(rest) > 9 or int(rest) >= n:
            raise UsageError(f"{usage}: a block's number, 0 to {n - 1}" if n else self._nothing("there are no blocks"))
        return int(rest)

    def _nothing(self, what: str) -> str:
        again = self.chat.talk.again if self.chat.talk.turns else None
        return f"{what} yet" if again is None else f"{what}: the next message reads the conversation again ({again})"

    def _no_notes(self) -> str:
        engine = self.chat.engine
        if engine.policy.unit != "block":
            return f"there are no summaries: policy {engine.policy.name} makes no blocks"
        if engine.summaries.mode in _INDEXED:
            found = _INDEXED[engine.summaries.mode]
            return f"there are no summaries: --summaries is {engine.summaries.mode} here, and a block is found by {found}; /kv lists the blocks"
        return self._nothing("there are no summaries")

    def _moved(self, number: int, events: list[Event], until: str) -> None:
        """Say where block ``number`` is now, and what moved for it."""
        self.chat.happened([e for e in events if isinstance(e, BlockLost | Warned)], events)
        state = cache_state(self.chat.engine)
        row = next(row for row in state.rows if row.number == number)
        name = f"block {number} ({row.tokens + row.summary_tokens:,} tokens)"
        came = sorted({b for e in events if isinstance(e, PagedIn) for b in e.blocks})
        if row.where != CELLS:
            self._say(f"{name} comes in with your next message, when the last question gives up its place; {until}")
        elif number not in came:
            self._say(f"{name} is in the cache; {until}")
        else:
            left = [e for e in events if isinstance(e, PagedOut)]
            blocks = ", ".join(str(b) for b in sorted({b for e in left for b in e.blocks}))
            went = f"; for it {sum(e.tokens for e in left):,} tokens left the cache: of blocks {blocks}" if left else "; nothing had to leave for it"
            also = ", ".join(str(b) for b in came if b != number)
            self._say(f"{name} was brought in; {until}{went}" + (f"; also brought in: {also}" if also else ""))
        self.chat.autosave()

    def _label(self, row: CacheRow, blocks: list[Any]) -> str:
        engine = self.chat.engine
        if row.number is not None:
            detail, summary = block_text(engine, blocks[row.number])
            return summary or detail[:200]
        pieces = (engine.model.llama.piece(t) for t in engine.sequence[row.start : row.start + min(row.tokens, 40)])
        return b"".join(pieces).decode("utf-8", "replace") if row.kind != "tokens" else ""

    def _say(self, text: str) -> None:
        self.chat.screen.say(text)

    def _print(self, lines: list[Any]) -> None:
        chat_view.print_text(self.chat.screen, lines)
