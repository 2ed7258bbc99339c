"""When thinking has to end: a budget, a loop, a wish; and with which tokens the model is handed over to its answer.

Pure: tokens and counts in, decisions out. `generation.py` asks after every sampled token and writes what is
answered here into the reply; the command line makes the limits. Counts are tokens.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Sequence

from .dialects import THINK_CLOSE, Markers
from .errors import UsageError

CLOSING = "\n\nI have thought about this for long enough and give the answer now.\n"
"""What closes thoughts that are cut. A sentence, as a cut in mid-thought without one costs accuracy (users.md finding 3,
second-hand: 78 % without, 89 % with a message, 94 % uncut, on one model and one task)."""

REPEATS, LEAST_TOKENS, MOST_PERIOD = 4, 96, 256
"""A loop: the same tokens at least so many times in a row, over at least so many tokens, of at most this period."""

CHECK_TOKENS = 16
"""How often a loop is looked for."""

_ROOM_SHARE, _ROOM_LEAST, _ROOM_MOST = 4, 96, 1024
_MOST_DIGITS = 18


@dataclass(frozen=True)
class ThinkingLimits:
    """``budget_tokens``: the most tokens of thoughts and summaries in one reply, None for no limit. ``loops``: end
    thoughts that repeat themselves. Thoughts that the model ends its reply in are always handed over to an answer."""

    budget_tokens: int | None = None
    loops: bool = True

    def __post_init__(self) -> None:
        if self.budget_tokens is not None and self.budget_tokens < 0:
            raise UsageError(f"--think-budget {self.budget_tokens}: must be 0 or more tokens, auto or off")

    def reason(self, reasoning_tokens: int, recent: Sequence[int]) -> str | None:
        """Why thinking ends here ("budget" or "loop"), or None. ``recent``: the reply's tokens, the newest last."""
        if self.budget_tokens is not None and reasoning_tokens >= self.budget_tokens:
            return "budget"
        if self.loops and reasoning_tokens % CHECK_TOKENS == 0 and repeated_period(recent) is not None:
            return "loop"
        return None


def automatic_budget(max_tokens: int) -> int:
    """Tokens of thoughts that leave room for ``CLOSING`` and the answer in a reply of ``max_tokens``: a quarter, at most 1,024.

    In a short reply 96, or half of it: the closing alone takes 15 to 41 tokens, by vocabulary, and an answer has to come after it.
    """
    return max_tokens - min(max(max_tokens // _ROOM_SHARE, min(_ROOM_LEAST, max_tokens // 2)), _ROOM_MOST)


def budget_of(text: str, max_tokens: int) -> ThinkingLimits:
    """The limits that ``--think-budget`` means in a reply of ``max_tokens``: a number of tokens, auto or off. Raises UsageError."""
    if text == "off":
        return ThinkingLimits(None)
    if text == "auto":
        return ThinkingLimits(automatic_budget(max_tokens))
    if not text.isdecimal() or len(text) > _MOST_DIGITS:
        raise UsageError(f"--think-budget {text}: give a number of tokens, auto or off")
    return ThinkingLimits(int(text))


def repeated_period(tokens: Sequence[int]) -> int | None:
    """The length of what ``tokens`` ends in repeating (``REPEATS`` times, ``LEAST_TOKENS`` at least), None without one.

    The shortest such length. Looks at no more than the last ``REPEATS`` x ``MOST_PERIOD`` tokens.
    """
    tail = list(tokens[-REPEATS * MOST_PERIOD :])
    n = len(tail)
    for period in range(1, min(MOST_PERIOD, n // REPEATS) + 1):
        length = max(REPEATS * period, LEAST_TOKENS)
        if length <= n and tail[-1] == tail[-1 - period] and tail[n - length + period :] == tail[n - length : n - period]:
            return period
    return None


def hand_over(
    markers: Markers, role: str, message: Sequence[int], after: Sequence[int], header: Sequence[int] | None = None
) -> list[int]:
    """The tokens that end thinking: the open summary's close, ``message``, the marker, and what stands ``after`` it.

    ``header``: of a reply in channels the header that it broke off in, if it did: what is missing of the answer's header then.
    Raises ValueError for a model that has no marker of the end of thinking.
    """
    if not markers.ends_thinking:
        raise ValueError("the model has no marker that ends thinking")
    if markers.channels is not None and header is not None:
        return markers.channels.rest_of_header(header)
    closing = [markers.summary_close] if role == "summary" and markers.summary_close is not None else []
    if markers.channels is not None:
        return [*closing, *message, *markers.channels.closing]
    return [*closing, *message, markers.think_close, *after]


def text_after(template: str | None, close: str = THINK_CLOSE) -> str:
    """What a chat template (Jinja source) writes between the end of thinking, which is ``close``, and the answer."""
    written = (template or "").replace("\\n", "\n")
    return "\n\n" if re.search(re.escape(close) + r"""(?:['"]\s*[~+]\s*['"])?\n\n""", written) else ""
