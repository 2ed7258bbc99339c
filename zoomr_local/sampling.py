"""How the next token is chosen: the user's numbers, handed to llama.cpp's own samplers.

`engine.py` makes a sampler per generation; the chain itself is native (`libllama.LlamaSampler`).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from math import inf
from typing import Any

from .errors import UsageError

MAX_REPEAT_LAST = 2**20
"""Tokens. llama.cpp takes memory for all of them at once, 4 bytes each, also where a reply is short."""


@dataclass(frozen=True)
class SamplingParams:
    """Order of the chain: repetition penalty, top-k, top-p, min-p, temperature, draw.

    ``temperature`` 0 is greedy. ``top_k`` 0, ``top_p`` 1, ``min_p`` 0 and ``repeat_penalty`` 1 switch a step off;
    ``repeat_last_n`` is in tokens. ``stop`` strings end the generation and are not part of the text. ``grammar`` (GBNF,
    its start is ``root``) holds the answer, never the thoughts, to a form.
    Raises UsageError for a value outside its range.
    """

    temperature: float = 0.0
    top_k: int = 40
    top_p: float = 0.95
    min_p: float = 0.05
    repeat_penalty: float = 1.0
    repeat_last_n: int = 64
    seed: int = 0
    stop: tuple[str, ...] = ()
    grammar: str | None = None

    def __post_init__(self) -> None:
        checks = (
            (0 <= self.temperature < inf, "--temp", self.temperature, "0 (greedy) or more, and finite"),
            (0 <= self.top_k < 2**31, "--top-k", self.top_k, "in [0, 2147483647], 0 = off"),
            (0 < self.top_p <= 1, "--top-p", self.top_p, "in (0, 1], 1 = off"),
            (0 <= self.min_p < 1, "--min-p", self.min_p, "in [0, 1), 0 = off"),
            (0 < self.repeat_penalty < inf, "--repeat-penalty", self.repeat_penalty, "above 0 and finite, 1 = off"),
            (0 <= self.repeat_last_n <= MAX_REPEAT_LAST, "--repeat-last-n", self.repeat_last_n, f"in [0, {MAX_REPEAT_LAST}] tokens"),
            (0 <= self.seed < 2**32 - 1, "--seed", self.seed, "in [0, 4294967294]; llama.cpp takes the next for no seed"),
        )
        for ok, flag, value, want in checks:
            if not ok:
                raise UsageError(f"{flag} {value}: must be {want}")
        if any(not s for s in self.stop):
            raise UsageError("--stop: an empty string would stop at once")
        if self.stop and self.grammar is not None:
            raise UsageError("--stop could cut what --schema asks for; leave one of them out")

    def asked(self) -> dict[str, Any]:
        """What a manifest compares: all but the grammar, which is long and is known by its schema's hash."""
        return {name: value for name, value in asdict(self).items() if name != "grammar"}


class StopScanner:
    """Finds stop strings in streamed text; ``held`` is text held back because it may be the beginning of one."""

    def __init__(self, stop: tuple[str, ...]) -> None:
        self._stop = stop
        self.held = ""

    def feed(self, text: str) -> tuple[str, bool]:
        """Returns (text that is safe to show, whether a stop string was met)."""
        if not self._stop:
            return text, False
        text = self.held + text
        hits = [at for at in (text.find(s) for s in self._stop) if at >= 0]
        if hits:
            self.held = ""
            return text[: min(hits)], True
        held = max((n for s in self._stop for n in range(1, len(s)) if text.endswith(s[:n])), default=0)
        self.held = text[len(text) - held :]
        return text[: len(text) - held], False

    def flush(self) -> str:
        """The held-back text, once nothing more will come."""
        held, self.held = self.held, ""
        return held
