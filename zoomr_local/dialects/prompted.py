"""The prompted dialect: the runtime opens a summary in the model's thinking, and the model writes it.

For models that mark their thinking and were never trained to summarise it. At a paragraph's end the runtime writes
`OPENING` in the model's place; the model goes on, and the summary ends with its bracket, with its line, or at its
longest, when the runtime closes it. Its keys are computed with the thought in view, as a trained summary's are. Nothing
is ever written into an answer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Callable, Sequence

from .base import Fed
from .extractive import ExtractiveDialect

OPENING = "[Summary of this step:"
"""No space behind the colon, as most vocabularies begin words with one."""
PARAGRAPH = "\n\n"
"""Stands before the opening where a sentence ended and no paragraph did, and behind the bracket that the model closes."""
CUT = "...]\n\n"
"""Closes a summary that reached its longest."""

LEAST_SUMMARY_TOKENS, LEAST_STEP_TOKENS = 16, 32
"""Where a budget leaves less than these for a summary's text and for the thought that it sums up (and less than was asked for),
summaries are not worth their cells, and none is prompted."""


@dataclass(frozen=True)
class Phrases:
    """The runtime's own text as tokens: ``opening`` behind a paragraph's end and ``apart`` behind a sentence's,
    ``closing`` behind the model's bracket and ``cut`` instead of it."""

    opening: tuple[int, ...]
    apart: tuple[int, ...]
    closing: tuple[int, ...]
    cut: tuple[int, ...]

    @classmethod
    def of(cls, tokenize: Callable[[str], Sequence[int]]) -> "Phrases":
        """As this vocabulary has them; ``tokenize`` gives plain text's ids without special tokens."""
        return cls(*(tuple(tokenize(text)) for text in (OPENING, PARAGRAPH + OPENING, PARAGRAPH, CUT)))

    @property
    def most_tokens(self) -> int:
        """The most that the runtime writes for one summary."""
        return max(len(self.opening), len(self.apart)) + max(len(self.closing), len(self.cut))


class PromptedDialect(ExtractiveDialect):
    """``summary_max`` is the most tokens of a summary that the model writes, what the runtime writes not counted.

    Where the budget has no room for summaries the text is cut as the extractive dialect cuts it.
    """

    roles = ("thought", "summary", "answer")

    def __init__(self, markers: Any, prompt: Any, thought_min: int, summary_max: int, phrases: Phrases) -> None:
        super().__init__(markers, prompt, thought_min)
        self.summary_max = self.most = summary_max
        self.phrases = phrases
        self._queue: list[int] = []
        self._closing = False
        self._written = self._depth = 0
        self._blank = True
        self._summarises = True

    def fit(self, thought_tokens: int, cut_tokens: int, summary_tokens: int) -> str | None:
        super().fit(thought_tokens, cut_tokens, summary_tokens)
        self.most = min(self.summary_max, summary_tokens - self.phrases.most_tokens - 1)
        long_enough = self.cuts.least >= min(self.cuts.thought_min, LEAST_STEP_TOKENS)
        self._summarises = long_enough and self.most >= min(self.summary_max, LEAST_SUMMARY_TOKENS)
        if self._summarises:
            return None
        return (
            f"beside the prompt a thought may take {thought_tokens} tokens of this budget and its summary {summary_tokens}, which is"
            " too few to prompt summaries: thoughts are indexed by their own keys instead; raise --kv-budget"
        )

    def take(self) -> int | None:
        return self._queue.pop(0) if self._queue else None

    def feed(self, token: int, piece: bytes = b"", injected: bool = False) -> Fed:
        if injected:
            return self._own()
        if self.role == "summary" and not self.markers.is_thinking_end(token):
            return self._summary(piece)
        fed = super().feed(token, piece)
        if fed.role == "marker":
            self._queue, self._closing = [], False
            if fed.closes_summary:
                self.cuts.ended()
        elif fed.ends_block and self._summarises:
            if self.role == "thought":
                self._queue = list(self.phrases.opening if self.cuts.newlines >= 2 else self.phrases.apart)
            return Fed(fed.role)
        return fed

    def _own(self) -> Fed:
        """A token of the runtime's: the first of an opening, the last of a closing, or one in between."""
        opens, closes = self.role == "thought", self._closing and not self._queue
        if opens:
            self.role, self._written, self._depth, self._blank = "summary", 0, 1, True
        if closes:
            self._end()
        return Fed("summary", opens_summary=opens, closes_summary=closes, injected=True)

    def _summary(self, piece: bytes) -> Fed:
        """A token of the model's inside a summary."""
        self._written += 1
        for character in piece.decode("utf-8", "replace"):
            if character == "\n" and not self._blank:
                self._end()
                self.cuts.feed(piece)
                self.cuts.ended()
                return Fed("summary", closes_summary=True)
            self._depth += {"[": 1, "]": -1}.get(character, 0)
            if self._depth == 0:
                break
            self._blank = self._blank and character.isspace()
        else:
            if self._written < self.most:
                return Fed("summary")
            self._queue, self._closing = list(self.phrases.cut), True
            return Fed("summary", cut_tokens=self._written)
        if b"\n" in piece.rpartition(b"]")[2]:
            self._end()
            return Fed("summary", closes_summary=True)
        self._queue, self._closing = list(self.phrases.closing), True
        return Fed("summary")

    def _end(self) -> None:
        self.role, self._closing = "thought", False
        self.cuts.ended()

    def written(self, summary: Sequence[int]) -> tuple[int, int]:
        tokens, p = tuple(summary), self.phrases
        start = next((len(o) for o in (p.apart, p.opening) if tokens[: len(o)] == o), 0)
        stop = next((len(tokens) - len(c) for c in (p.cut, p.closing) if c and tokens[-len(c) :] == c), len(tokens))
        return start, max(start, stop - self.markers.is_thinking_end(tokens[-1]))

    def state(self) -> dict[str, Any]:
        return {
            **super().state(), "queue": list(self._queue), "closing": self._closing, "written": self._written, "depth": self._depth,
            "blank": self._blank, "most": self.most, "summarises": self._summarises,
        }  # fmt: skip

    def restore(self, state: Any) -> None:
        if not isinstance(state, dict) or state.keys() != self.state().keys():
            raise ValueError(f"{state!r} is no state of the prompted dialect")
        super().restore({"role": state["role"], "cuts": state["cuts"]})
        self._queue, self._closing, self._written = list(state["queue"]), bool(state["closing"]), int(state["written"])
        self._depth, self._blank, self.most = int(state["depth"]), bool(state["blank"]), int(state["most"])
        self._summarises = bool(state["summarises"])
