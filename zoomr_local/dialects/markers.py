"""By which tokens a model's text says where thinking and summaries begin and end: a table, and what of it a vocabulary has.

A marker is one token of the vocabulary; thinking that is marked by several is read by `channels.py`. `model.py` looks a model's markers up; a user adds rows of the table in the
configuration, each a table ``[[markers]]``, which `marker_sets` reads.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any, Callable, Sequence

from .channels import Channels

SUMMARY_OPEN, SUMMARY_CLOSE = "<|begin_of_summary|>", "<|end_of_summary|>"
THINK_OPEN, THINK_CLOSE = "<think>", "</think>"


@dataclass(frozen=True)
class MarkerSet:
    """One model family's markers as text; None for those it does not have. Each kind has both or neither."""

    name: str
    summary_open: str | None = None
    summary_close: str | None = None
    think_open: str | None = None
    think_close: str | None = None


TABLE: tuple[MarkerSet, ...] = (
    MarkerSet("zoomr", SUMMARY_OPEN, SUMMARY_CLOSE, THINK_OPEN, THINK_CLOSE),
    MarkerSet("memento", "<|summary_start|>", "<|summary_end|>", THINK_OPEN, THINK_CLOSE),
    MarkerSet("think", None, None, THINK_OPEN, THINK_CLOSE),
    MarkerSet("mistral", None, None, "[THINK]", "[/THINK]"),
    MarkerSet("seed", None, None, "<seed:think>", "</seed:think>"),
    MarkerSet("cohere", None, None, "<|START_THINKING|>", "<|END_THINKING|>"),
    MarkerSet("minimax", None, None, "<mm:think>", "</mm:think>"),
    MarkerSet("gemma", None, None, "<|channel>", "<channel|>"),
)
"""Known sets, the first that a vocabulary has wins. Memento's own block markers are plain text to us: a block ends where
its summary does. Sources: the chat templates that llama.cpp ships, and Memento's published data format."""


@dataclass(frozen=True)
class Markers:
    """Token ids of a model's four markers; None for those the vocabulary lacks. ``name`` says which set the summaries are
    of, ``summary_texts`` and ``think_close_text`` how they are written. ``channels``: thinking is marked by headers of several
    tokens instead, and there are no single markers of it."""

    summary_open: int | None
    summary_close: int | None
    think_open: int | None
    think_close: int | None
    name: str = ""
    summary_texts: tuple[str, str] = (SUMMARY_OPEN, SUMMARY_CLOSE)
    think_close_text: str = THINK_CLOSE
    channels: Channels | None = None

    @classmethod
    def find(
        cls, token_of: Callable[[str], int | None], table: Sequence[MarkerSet] = TABLE,
        tokenize: Callable[[str], Sequence[int]] | None = None,
    ) -> "Markers":
        """Look the markers up with ``token_of(text)``, which gives the id if the text is exactly one token.

        Summaries are of the first set whose two markers are there. Thinking is of the same set if it is there, else of the
        first that is whole, else, with ``tokenize``, which gives plain text's ids, in channels, else of the first of which one
        marker is there.
        """
        ids = {text: token_of(text) for text in dict.fromkeys(t for row in table for t in _texts(row)) if text is not None}
        with_summary = [row for row in table if None not in (ids.get(row.summary_open), ids.get(row.summary_close))]
        chosen = with_summary[0] if with_summary else None

        def found(row: MarkerSet) -> tuple[int, bool]:
            return sum(ids.get(text) is not None for text in (row.think_open, row.think_close)), row is chosen

        thinking = max(table, key=found, default=None)  # of equal ones the first
        channels = None if tokenize is None or (thinking and found(thinking)[0] == 2) else Channels.find(token_of, tokenize)
        if thinking is None or found(thinking)[0] == 0 or channels is not None:
            thinking = None
        summary = (None, None) if chosen is None else (ids[chosen.summary_open], ids[chosen.summary_close])
        think = (None, None) if thinking is None else (ids.get(thinking.think_open), ids.get(thinking.think_close))
        texts = (SUMMARY_OPEN, SUMMARY_CLOSE) if chosen is None else (chosen.summary_open, chosen.summary_close)
        close = THINK_CLOSE if thinking is None else thinking.think_close
        return cls(*summary, *think, "" if chosen is None else chosen.name, texts, close or THINK_CLOSE, channels)

    @property
    def summaries(self) -> bool:
        """True if the model can mark summaries."""
        return self.summary_open is not None and self.summary_close is not None

    @property
    def thinking(self) -> bool:
        """True if the model marks both ends of its thinking."""
        return self.channels is not None or (self.think_open is not None and self.think_close is not None)

    @property
    def ends_thinking(self) -> bool:
        """True if there is a way to end the model's thinking in its place."""
        return self.channels is not None or self.think_close is not None

    @property
    def ids(self) -> frozenset[int]:
        """Every marker's id: what has no place in the text of an answer."""
        single = (self.summary_open, self.summary_close, self.think_open, self.think_close)
        return frozenset(i for i in single if i is not None) | (frozenset() if self.channels is None else self.channels.ids)

    def is_thinking_end(self, token: int) -> bool:
        """Whether ``token`` ends a message of thinking, wherever in it it stands."""
        return token == self.think_close if self.channels is None else token in self.channels.ids

    @property
    def without_summaries(self) -> "Markers":
        """The thinking markers alone: those of summaries are read as plain tokens then."""
        return replace(self, summary_open=None, summary_close=None, name="", summary_texts=("", ""))


def marker_sets(entries: Sequence[Any]) -> tuple[MarkerSet, ...]:
    """The sets that a configuration's ``[[markers]]`` mean, to be put before `TABLE`.

    Each entry is a mapping of ``name`` and of ``summary_open`` with ``summary_close``, ``think_open`` with
    ``think_close``, or both pairs. Raises ValueError that names the entry and what is wrong with it.
    """
    known = [field.name for field in fields(MarkerSet)]
    found: list[MarkerSet] = []
    for number, entry in enumerate(entries, 1):
        if not isinstance(entry, dict):
            raise ValueError(f"markers {number}: must be a table of {', '.join(known)}")
        name = entry.get("name")
        label = f"markers {name!r}" if isinstance(name, str) and name else f"markers {number}"
        unknown = [key for key in entry if key not in known]
        if unknown:
            raise ValueError(f"{label}: there is no key {unknown[0]!r}; there are {', '.join(known)}")
        if not isinstance(name, str) or not name:
            raise ValueError(f"{label}: needs a name")
        if name in [row.name for row in found]:
            raise ValueError(f"{label}: stands there twice")
        for key, value in entry.items():
            if not isinstance(value, str) or not value:
                raise ValueError(f"{label}: {key} is {value!r}, must be the text of one token")
        for kind in ("summary", "think"):
            if (f"{kind}_open" in entry) != (f"{kind}_close" in entry):
                raise ValueError(f"{label}: {kind}_open and {kind}_close belong together; one of them is missing")
        if len(entry) == 1:
            raise ValueError(f"{label}: names no markers; give summary_open and summary_close, think_open and think_close, or both")
        marks = [value for key, value in entry.items() if key != "name"]
        if len(set(marks)) < len(marks):
            raise ValueError(f"{label}: uses one text for two markers")
        found.append(MarkerSet(**entry))
    return tuple(found)


def _texts(row: MarkerSet) -> tuple[str | None, ...]:
    return row.summary_open, row.summary_close, row.think_open, row.think_close
