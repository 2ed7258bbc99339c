"""Sums over the records of `solve`: what a progress line shows and a summary says; and what is said of records that cannot be summed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .errors import UsageError
from .grading import wilson_interval


def has_failed(record: dict[str, Any]) -> bool:
    """Whether a record is one of those that ``--retry-failed`` solves again."""
    return "error" in record or record["finish_reason"] == "timeout"


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """Raises UsageError for a record in ``path`` that lacks what every record has: somebody edited the file."""
    try:
        yield
    except KeyError as missing:
        raise UsageError(
            f"{path} has a record without {missing}, which zoomr wrote in it; choose another output with -o, or start again with --overwrite"
        ) from None


_LATER = ("lost_blocks", "faults", "disk_written_bytes", "prompted_summaries", "cut_summaries", "injected_tokens", "recalled_tokens")


@dataclass
class Tally:
    """Sums over records: what the progress shows and the summary says. Seconds, tokens, bytes.

    ``failed`` ended in an error or out of time; the latter have a text, so that they are graded all the same.
    """

    done: int = 0
    failed: int = 0
    graded: int = 0
    right: int = 0
    out_of_tokens: int = 0
    timeouts: int = 0
    completion_tokens: int = 0
    decode_seconds: float = 0.0
    prefill_seconds: float = 0.0
    resident_peak: int = 0
    token_bytes: int = 0
    page_ins: int = 0
    paged_out_bytes: int = 0
    dropped_tokens: int = 0
    splits: int = 0
    kv_full: int = 0
    lost_blocks: int = 0
    faults: int = 0
    disk_written_bytes: int = 0
    prompted_summaries: int = 0
    cut_summaries: int = 0
    injected_tokens: int = 0
    recalled_tokens: int = 0
    warnings: list[str] = field(default_factory=list)

    def add(self, record: dict[str, Any]) -> None:
        """Count one record; those that ended in an error count as done, never as wrong answers."""
        self.done += 1
        self.failed += has_failed(record)
        if "error" in record:
            return
        if "correct" in record:
            self.graded += 1
            self.right += bool(record["correct"])
        self.timeouts += record["finish_reason"] == "timeout"
        self.out_of_tokens += record["finish_reason"] == "length"
        self.kv_full += record["finish_reason"] == "kv_full"
        self.completion_tokens += record["usage"]["completion_tokens"]
        self.decode_seconds += record["timing"]["decode_s"]
        self.prefill_seconds += record["timing"]["prefill_s"]
        kv = record["kv"]
        self.resident_peak = max(self.resident_peak, kv["resident_peak"])
        self.token_bytes = kv["token_bytes"]
        for name in ("page_ins", "paged_out_bytes", "dropped_tokens", "splits"):
            setattr(self, name, getattr(self, name) + kv[name])
        for name in _LATER:  # not in records of earlier versions
            setattr(self, name, getattr(self, name) + kv.get(name, 0))
        for message in record.get("warnings", ()):
            if message not in self.warnings:
                self.warnings.append(message)

    @property
    def tokens_per_s(self) -> float | None:
        """Decoded tokens a second over all records, prefill not counted; None before the first."""
        return self.completion_tokens / self.decode_seconds if self.decode_seconds > 0 else None

    def summary(self) -> dict[str, Any]:
        """The tally as JSON, with the share of right answers and its Wilson 95 % interval."""
        low, high = wilson_interval(self.right, self.graded)
        accuracy = {
            "right": self.right, "graded": self.graded,
            "share": round(self.right / self.graded, 6),
            "wilson95": [round(low, 6), round(high, 6)],
        } if self.graded else None  # fmt: skip
        return {
            "done": self.done,
            "failed": self.failed,
            "accuracy": accuracy,
            "out_of_tokens": self.out_of_tokens,
            "timeouts": self.timeouts,
            "completion_tokens": self.completion_tokens,
            "tokens_per_s": None if self.tokens_per_s is None else round(self.tokens_per_s, 2),
            "decode_s": round(self.decode_seconds, 3),
            "prefill_s": round(self.prefill_seconds, 3),
            "resident_peak": self.resident_peak,
            "resident_peak_bytes": self.resident_peak * self.token_bytes,
            "page_ins": self.page_ins,
            "paged_out_bytes": self.paged_out_bytes,
            "dropped_tokens": self.dropped_tokens,
            "splits": self.splits,
            "kv_full": self.kv_full,
            "lost_blocks": self.lost_blocks,
            "faults": self.faults,
            "disk_written_bytes": self.disk_written_bytes,
            "prompted_summaries": self.prompted_summaries,
            "cut_summaries": self.cut_summaries,
            "injected_tokens": self.injected_tokens,
            "recalled_tokens": self.recalled_tokens,
        }
