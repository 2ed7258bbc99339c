"""Replies that are messages with headers: which channel a message is in says whether it is thinking or the answer.

gpt-oss writes so (its makers call the format harmony). The prompt ends in `<|start|>assistant`, and a reply is

    <|channel|>analysis<|message|> thinking <|end|><|start|>assistant<|channel|>final<|message|> answer <|return|>

Here is how such headers are read, token by token, and how thinking is ended in the model's place. `base.py` asks for it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Callable, Sequence

START, CHANNEL, MESSAGE, END = "<|start|>", "<|channel|>", "<|message|>", "<|end|>"
ROLE, THINKING, ANSWER = "assistant", "analysis", "final"
NAME = "harmony"


@dataclass(frozen=True)
class Channels:
    """The ids of the four special tokens, and of the words that stand between them."""

    start: int
    channel: int
    message: int
    end: int
    role: tuple[int, ...]
    thinking: tuple[int, ...]
    answer: tuple[int, ...]

    @classmethod
    def find(cls, token_of: Callable[[str], int | None], tokenize: Callable[[str], Sequence[int]]) -> "Channels | None":
        """None for a vocabulary that lacks one of the special tokens. ``tokenize`` gives plain text's ids."""
        special = [token_of(text) for text in (START, CHANNEL, MESSAGE, END)]
        if None in special:
            return None
        return cls(*special, *(tuple(tokenize(word)) for word in (ROLE, THINKING, ANSWER)))

    @property
    def ids(self) -> frozenset[int]:
        """The special tokens, which are never text."""
        return frozenset((self.start, self.channel, self.message, self.end))

    @property
    def answer_header(self) -> tuple[int, ...]:
        """The whole header of the answer."""
        return (self.start, *self.role, self.channel, *self.answer, self.message)

    @property
    def closing(self) -> tuple[int, ...]:
        """What ends a message of thinking and opens the answer."""
        return (self.end, *self.answer_header)

    def rest_of_header(self, header: Sequence[int]) -> list[int]:
        """What is missing for the answer to begin, behind a ``header`` that broke off; all of it behind another's."""
        whole, written = list(self.answer_header), list(header)
        return whole[len(written) :] if whole[: len(written)] == written else whole


class ChannelReader:
    """Where a reply is: in a header, whose tokens so far ``header`` holds, or (None) in a message, and in which.

    ``first`` and ``stop`` are the range of the reply's tokens (counted from its first) that a chat template leaves out
    of a finished turn: thinking with its headers, up to the header of the answer. ``stop`` is None until that begins.
    """

    def __init__(self, channels: Channels, prompt: Sequence[int]) -> None:
        self.channels = channels
        self.header: list[int] | None = None
        self.name: str | None = None
        self.thinks = False
        self.count = self._own = 0
        self.first: int | None = None
        self.stop: int | None = None
        self._read_prompt(list(prompt))

    def _read_prompt(self, prompt: list[int]) -> None:
        c = self.channels
        last = next((i for i in range(len(prompt) - 1, -1, -1) if prompt[i] in c.ids), None)
        if last is None:
            return
        start = next((i for i in range(last, -1, -1) if prompt[i] == c.start), last)
        at = next((i for i in range(last, start - 1, -1) if prompt[i] == c.channel), None)
        if at is not None:
            words = tuple(prompt[at + 1 :])
            self.name = "" if not words else ANSWER if words[: len(c.answer)] == c.answer else THINKING
        if prompt[last] == c.message:
            self.thinks, self.name = self.name == THINKING, None
            self.first = 0 if self.thinks else None
        else:
            self.header = prompt[last + 1 :] if prompt[last] == c.end else prompt[start:]

    def feed(self, token: int, piece: bytes) -> bool:
        """Read one more token; True if it belongs to a header, or ends a message, and is no text."""
        c, self.count = self.channels, self.count + 1
        if self.header is None and token not in c.ids:
            return False
        if token == c.message:
            self._message()
        elif token == c.end:
            self.header, self.name = [], None
        else:
            self.header = [*(self.header or ()), token]
            if token == c.channel:
                self.name, self._own = "", 0
            elif self.name is not None:
                self.name += piece.decode("utf-8", "replace")
        self._own += 1
        return True

    def _message(self) -> None:
        """A message's text begins."""
        if self.header is None:
            return
        self.thinks = self.name is not None and not self.name.strip().startswith(ANSWER)
        own = self._own + 1 if self.name is not None else 1
        if self.thinks and self.first is None:
            self.first = max(0, self.count - own)
        self.stop = None if self.thinks or self.first is None else self.count - own
        self.header = self.name = None

    @property
    def opening_tokens(self) -> int:
        """How many tokens up to the last one that was read are the channel of the answer, which has just begun."""
        return 0 if self.stop is None else self.count - self.stop

    def state(self) -> list[Any]:
        """JSON-ready."""
        return [self.header, self.name, self.thinks, self.count, self._own, self.first, self.stop]

    def restore(self, state: list[Any]) -> None:
        """Go on from ``state``. Raises ValueError if it is none."""
        if not isinstance(state, list) or len(state) != 7:
            raise ValueError(f"{state!r} is no state of a reader of channels")
        self.header, self.name, self.thinks, self.count, self._own, self.first, self.stop = state
