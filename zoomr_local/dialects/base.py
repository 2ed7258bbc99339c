"""What a dialect is: a reader of the tokens of a reply that says what each of them is, and where segments and blocks end.

The engine feeds it every token of a reply, and asks it for tokens that the runtime is to write in the model's place.
A dialect knows texts and counts only; its whole state can be saved between two tokens.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, Sequence

from .channels import ChannelReader
from .markers import Markers

_SENTENCE_END = re.compile(r"(?:[.!?:;][\"')\]]*\s?|\n)$")


def ends_sentence(text: str) -> bool:
    """True if ``text`` ends where a reader would pause: after . ! ? : ; or a line break."""
    return bool(_SENTENCE_END.search(text))


@dataclass(frozen=True)
class Fed:
    """What one token is: its ``role`` (thought, summary, answer or marker), and what it opens or closes.

    ``ends_block``: what was written so far is a block without a summary. ``injected``: the runtime wrote it, not the
    model. ``cut_tokens``: how long the summary is, if it ends here because that is its longest. ``ends_thinking``: the answer
    begins behind this token; with the last ``opening_tokens`` of what was written, if its beginning is marked by several.
    """

    role: str
    opens_summary: bool = False
    closes_summary: bool = False
    ends_block: bool = False
    injected: bool = False
    cut_tokens: int = 0
    ends_thinking: bool = False
    opening_tokens: int = 0


class Dialect(ABC):
    """``markers`` are those that this dialect acts on, ``role`` the segment that the next token belongs to."""

    roles = ("thought", "answer")

    def __init__(self, markers: Markers, prompt: Sequence[int]) -> None:
        self.markers = markers
        self.channels = None if markers.channels is None else ChannelReader(markers.channels, prompt)
        self.role = "thought" if self._starts_thinking(prompt) else "answer"

    def _starts_thinking(self, prompt: Sequence[int]) -> bool:
        m = self.markers
        if self.channels is not None:
            return self.channels.thinks
        for token in reversed(prompt):
            if token == m.think_close:
                return False
            if token == m.think_open:
                return True
        return m.think_open is None and m.summaries

    @property
    def header(self) -> list[int] | None:
        """The tokens so far of a header that is being written, before it says what follows; None outside of one."""
        return None if self.channels is None else self.channels.header

    def ends(self, token: int) -> bool:
        """Whether ``token`` ends the reply, which a message's end does behind the answer."""
        return self.channels is not None and self.header is None and self.role == "answer" and token == self.channels.channels.end

    @abstractmethod
    def feed(self, token: int, piece: bytes = b"", injected: bool = False) -> Fed:
        """Classify ``token``, whose text is ``piece``, and move on. ``injected``: it is what `take` gave last."""

    def take(self) -> int | None:
        """The token that the runtime writes next in the model's place; None if the model is to write it.

        If other tokens are fed first, because thinking is being ended, the end of thinking gives up what is left.
        """
        return None

    def fit(self, thought_tokens: int, cut_tokens: int, summary_tokens: int) -> str | None:
        """Work within these limits: a thought is split at ``thought_tokens`` at the latest and from ``cut_tokens`` on where a
        sentence ends, a summary at ``summary_tokens``. Returns what cannot be done in them, None if nothing."""
        return None

    def block_ended(self) -> None:
        """A block ended with the last token that was fed, here or for reasons of room."""

    def written(self, summary: Sequence[int]) -> tuple[int, int]:
        """The part of a summary's tokens that the model wrote as its text, as a half-open range of indices."""
        return 0, len(summary)

    def state(self) -> Any:
        """All that a later token's class depends on, JSON-ready."""
        return self.role if self.channels is None else [self.role, self.channels.state()]

    def restore(self, state: Any) -> None:
        """Go on from ``state``. Raises ValueError for what is no state of this dialect."""
        if self.channels is not None:
            if not isinstance(state, list) or len(state) != 2:
                raise ValueError(f"{state!r} is no state of a reply in channels")
            state, read = state
            self.channels.restore(read)
        if state not in self.roles:
            raise ValueError(f"{state!r} is no segment")
        self.role = state

    def _thinking(self, token: int, piece: bytes) -> Fed | None:
        """Classify a thinking marker that stands where it can; None for every other token."""
        if self.channels is not None:
            return self._header(token, piece)
        if token == self.markers.think_open and self.role == "answer":
            self.role = "thought"
            return Fed("marker")
        if token == self.markers.think_close and self.role in ("thought", "summary"):
            was, self.role = self.role, "answer"
            return Fed("marker", closes_summary=was == "summary", ends_thinking=True)
        return None

    def _header(self, token: int, piece: bytes) -> Fed | None:
        """As ``_thinking``, for replies in channels. A header is not text; while it is written the role stays what it was."""
        if not self.channels.feed(token, piece):
            return None
        was = self.role
        if self.channels.header is not None:
            self.role = "thought" if was == "summary" else was
            return Fed("marker", closes_summary=was == "summary")
        self.role = "thought" if self.channels.thinks else "answer"
        ends = was != "answer" and self.role == "answer"
        return Fed("marker", ends_thinking=ends, opening_tokens=self.channels.opening_tokens if ends else 0)
