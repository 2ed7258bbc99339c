"""The learned dialect: the model writes markers of its own around its summaries.

Without summary markers (``Markers.without_summaries``) it is the mode ``off``: nothing is made a block for what it says, and
what leaves the cache is cut where its share ends.
"""

from __future__ import annotations

from typing import Sequence

from .base import Dialect, Fed


class LearnedDialect(Dialect):
    """A three-state reader: thought, summary, answer. Markers out of place are read as plain tokens."""

    roles = ("thought", "summary", "answer")

    def feed(self, token: int, piece: bytes = b"", injected: bool = False) -> Fed:
        m = self.markers
        if self.header is not None:
            return self._thinking(token, piece)
        if token == m.summary_open and self.role == "thought":
            self.role = "summary"
            return Fed("marker", opens_summary=True)
        if token == m.summary_close and self.role == "summary":
            self.role = "thought"
            return Fed("marker", closes_summary=True)
        return self._thinking(token, piece) or Fed(self.role)

    def written(self, summary: Sequence[int]) -> tuple[int, int]:
        """Without its markers; a summary that was cut has no closing one."""
        last = summary[-1]
        return 1, len(summary) - (last == self.markers.summary_close or self.markers.is_thinking_end(last))
