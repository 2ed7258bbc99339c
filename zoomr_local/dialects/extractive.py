"""The extractive dialect: nothing is added to the text; it is cut into blocks where a paragraph ends.

For models that were never trained to summarise. A block is indexed by its own keys, sentence by sentence
(`block_index.py`), and nothing of it stays in cells once it is paged out.
"""

from __future__ import annotations

from typing import Any

from .base import Dialect, Fed, ends_sentence


class Cuts:
    """Where a text may be cut: at a paragraph's end after ``least`` tokens, at a sentence's after ``sentence_from``.

    A paragraph ends with an empty line, in one token or in several. A token's own text decides whether a sentence ends.
    """

    def __init__(self, thought_min: int) -> None:
        self.thought_min = self.least = thought_min
        self.sentence_from = 2 * thought_min
        self.tokens = self.newlines = 0

    def fit(self, thought_tokens: int, cut_tokens: int) -> None:
        """Stay below the length at which a text is split: in a small budget cuts come earlier than ``thought_min``."""
        self.least = max(1, min(self.thought_min, thought_tokens // 2))
        self.sentence_from = max(self.least, min(2 * self.least, (self.least + cut_tokens) // 2))

    def feed(self, piece: bytes) -> bool:
        """Count a token; True if the text may be cut behind it."""
        self.tokens += 1
        body = piece.rstrip(b" \t\r\n")
        line_ends = piece[len(body) :].count(b"\n")
        self.newlines = line_ends if body else self.newlines + line_ends
        if self.tokens < self.least or not piece:
            return False
        if self.newlines >= 2 and line_ends:
            return True
        return self.tokens >= self.sentence_from and ends_sentence(piece.decode("utf-8", "replace"))

    def ended(self) -> None:
        """Count from here."""
        self.tokens = 0

    def state(self) -> list[int]:
        """JSON-ready."""
        return [self.least, self.sentence_from, self.tokens, self.newlines]

    def restore(self, state: list[int]) -> None:
        """Go on from ``state``. Raises ValueError if it is none."""
        if not isinstance(state, list) or len(state) != 4 or not all(isinstance(n, int) and n >= 0 for n in state):
            raise ValueError(f"{state!r} are no four counts of tokens")
        self.least, self.sentence_from, self.tokens, self.newlines = state


class ExtractiveDialect(Dialect):
    """Thoughts and answers alike are cut. A model without thinking markers writes answers only."""

    def __init__(self, markers: Any, prompt: Any, thought_min: int) -> None:
        super().__init__(markers.without_summaries, prompt)
        self.cuts = Cuts(thought_min)

    def feed(self, token: int, piece: bytes = b"", injected: bool = False) -> Fed:
        fed = self._thinking(token, piece)
        may_cut = self.cuts.feed(b"" if fed else piece)
        return fed or Fed(self.role, ends_block=may_cut)

    def fit(self, thought_tokens: int, cut_tokens: int, summary_tokens: int) -> str | None:
        self.cuts.fit(thought_tokens, cut_tokens)
        return None

    def block_ended(self) -> None:
        self.cuts.ended()

    def state(self) -> dict[str, Any]:
        return {"role": super().state(), "cuts": self.cuts.state()}

    def restore(self, state: Any) -> None:
        if not isinstance(state, dict) or state.keys() != {"role", "cuts"}:
            raise ValueError(f"{state!r} is no state of the extractive dialect")
        super().restore(state["role"])
        self.cuts.restore(state["cuts"])
