"""Generations that go on after their reply: another turn is read behind what is in the cache, and is answered.

Only `engine.py` makes these; without a second turn they are the plain kinds. Positions go on. What the last turn
left is put in order first: its pinned question and its answer become blocks that can be paged, and its thinking,
which chat templates leave out of earlier turns, goes for good unless it is to be kept. The answer's keys were
computed with that thinking in view and stay as they are.

Here is also what ends thinking before the model does (`thinking.py` decides).
"""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any, Iterator, Sequence

import numpy as np

from .block_generation import LEAST_PIECE_TOKENS
from .dialects import Fed
from .errors import EngineError
from .events import Event, Finished, Split, ThinkingCut
from .generation import Clock, FullGeneration, Generation, TokenGeneration
from .held_blocks import HeldBlocks
from .policies import Policy
from .sampling import SamplingParams
from .thinking import CLOSING, MOST_PERIOD, REPEATS, ThinkingLimits, hand_over, text_after
from .timeline import Range

THINKING = ("thought", "summary")
LEAST_CLOSING_SHARE = 2
"""The closing sentence is left out where it would take more than half of what a reply may still write."""


def head_tokens(budget_tokens: int, policy: Policy) -> int:
    """How much of the beginning stays pinned once there is a second turn: system prompt and attention sinks."""
    return budget_tokens // 8 if policy.pins_prompt else policy.settings.sink_tokens


def question_range(start: int, n_tokens: int, other_pins: int, budget_tokens: int, policy: Policy) -> Range:
    """The part of a turn of ``n_tokens`` from position ``start`` on that is pinned while it is answered.

    All of it if a third of the budget is left for everything else, as for a first prompt; else its end.
    """
    if not policy.pins_prompt:
        n = min(n_tokens, budget_tokens // 8)
    elif other_pins + n_tokens <= budget_tokens - budget_tokens // 3:
        n = n_tokens
    else:
        n = budget_tokens // 4
    return start + n_tokens - n, start + n_tokens


def most_held_tokens(budget_tokens: int, policy: Policy) -> int:
    """How much of the budget blocks that a user holds may take: beside the least that is pinned of beginning and question
    a third is left for everything else, as beside a first prompt."""
    least_pinned = head_tokens(budget_tokens, policy) + 1 + budget_tokens // 4
    return budget_tokens - budget_tokens // 3 - least_pinned


class Turns(Generation):
    """What the kinds share. ``room_tokens`` is the length that the tiers were sized for, 0 without further turns.

    ``thinking_cut`` says why thinking was ended in this reply (see ThinkingCut), None if it was not.
    """

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.room_tokens = 0
        self.keep_thinking = False
        self.limits: ThinkingLimits | None = None
        self.answer_now = False
        self.thinking_cut: str | None = None
        self._began_thinking = False

    @property
    def prompt_is_read(self) -> bool:
        """True once the whole prompt is in the sequence, so that another turn can follow."""
        return not self._prompt_left

    def extend(
        self, tokens: Sequence[int], sampling: SamplingParams, max_tokens: int, keep_tokens: int | None = None
    ) -> Iterator[Event]:
        """Read ``tokens`` behind the reply that has ended, and answer them; the events of that, as of ``run``.

        A token that was sampled last but not decoded yet comes first, and the end of thinking if the reply was
        stopped in it. With ``keep_tokens`` only so many tokens of the sequence stay (a kind that never paged).
        Raises EngineError if the last prompt was not read to its end.
        """
        if not self.prompt_is_read or not self._whole:
            raise EngineError("the last turn was not read to its end; prefill the conversation again")
        self._whole = False
        before = self._left_over() if keep_tokens is None else []
        if keep_tokens is not None:
            self.cache.truncate(keep_tokens)
        self._ended, self.cancelled, self._clock = None, False, Clock()
        self.cache.full = False
        self._begin([*self.timeline.tokens, *before, *tokens], sampling, max_tokens)
        trained = self.model.llama.n_ctx_train
        if len(self.timeline) <= trained < len(self.prompt):
            self._pending.append(self._beyond_training())
        self._whole = True
        return self.resume()

    def state(self) -> dict[str, Any]:
        limits = None if self.limits is None else asdict(self.limits)
        return {**super().state(), "turns": {
            "room_tokens": self.room_tokens, "keep_thinking": self.keep_thinking, "limits": limits,
            "answer_now": self.answer_now, "thinking_cut": self.thinking_cut,
        }}  # fmt: skip

    def restore(self, state: dict[str, Any]) -> None:
        super().restore(state)
        turns = state["turns"]
        self.room_tokens, self.keep_thinking = int(turns["room_tokens"]), bool(turns["keep_thinking"])
        self.limits = None if turns["limits"] is None else ThinkingLimits(**turns["limits"])
        self.answer_now, self.thinking_cut = bool(turns["answer_now"]), turns["thinking_cut"]

    def _begin(self, prompt: list[int], sampling: SamplingParams, max_tokens: int) -> None:
        super()._begin(prompt, sampling, max_tokens)
        self._began_thinking = self.reply.thinking
        self.answer_now, self.thinking_cut = False, None

    def _waiting(self) -> bool:
        """Whether a sampled token is not decoded yet."""
        written = self.reply.completion_tokens + self.reply.injected_tokens
        return written > len(self.timeline) - len(self.prompt)

    def _left_over(self) -> list[int]:
        reply = self.reply
        tokens = [reply.token] if self._waiting() else []
        header = reply.dialect.header
        if reply.thinking or header is not None:
            tokens += hand_over(reply.dialect.markers, reply.role, (), self._after(), header)
        return tokens

    def _after(self) -> list[int]:
        llama = self.model.llama
        text = text_after(llama.chat_template(), self.model.markers.think_close_text)
        return llama.tokenize(text, add_special=False, parse_special=False)

    def _sample(self) -> Iterator[Event]:
        if self.limits is not None and self.limits.budget_tokens == 0 and self.reply.token is None:
            yield from self._answers_now(self._why_to_answer())  # the prompt has opened thinking, and not one token of it is to be written
        yield from super()._sample()
        ended = self.reply.stopped
        reason = self._why_to_answer()
        yield from self._answers_now(reason)
        if reason is not None and ended:
            yield from super()._sample()

    def _answers_now(self, reason: str | None) -> Iterator[Event]:
        """Have the tokens follow that end thinking, if there is a reason to."""
        if reason is None:
            return
        reply = self.reply
        message = self.model.llama.tokenize(CLOSING, add_special=False, parse_special=False)
        if len(message) > (self.max_tokens - reply.completion_tokens) // LEAST_CLOSING_SHARE:
            message = []
        reply.force(hand_over(reply.dialect.markers, reply.role, message, self._after(), reply.dialect.header))
        self.thinking_cut = reason
        yield ThinkingCut(len(self.timeline), reason, reply.reasoning_tokens)

    def _why_to_answer(self) -> str | None:
        reply = self.reply
        if self.thinking_cut is not None or not reply.thinking:
            return None
        if reply.stopped:  # by a stop string: then that token waits
            return None if self.limits is None or self._waiting() else "ended"
        if reply.dialect.header is not None:  # what follows it is not known yet
            return None
        if self.answer_now:
            return "asked"
        if self.limits is None:
            return None
        first = max(len(self.prompt), len(self.timeline) - REPEATS * MOST_PERIOD)
        newest = [] if reply.token is None else [reply.token]
        return self.limits.reason(reply.reasoning_tokens, [*self.timeline.tokens[first:], *newest])

    def _finish(self, reason: str) -> Finished:
        return replace(super()._finish(reason), thinking_cut=self.thinking_cut)


class FullTurns(Turns, FullGeneration):
    """Everything stays resident."""


class TokenTurns(Turns, TokenGeneration):
    """The last question is pinned no more; its thinking is dropped."""

    def plan(self) -> None:
        line, budget = self.timeline, self.cache.budget_tokens
        if not len(line):
            super().plan()
            return
        if not self.keep_thinking:
            self._drop_thinking()
        first = line.pinned[0] if line.pinned and line.pinned[0][0] == 0 else (0, 0)
        head = min(first[1], head_tokens(budget, self.policy))
        line.unpin(head)
        start = len(line)
        line.pin(*question_range(start, len(self.prompt) - start, head, budget, self.policy))

    def _drop_thinking(self) -> None:
        first, stop = self._thinking_range()
        resident = self.context.resident(self.cache.sequence)
        gone = resident[(resident >= first) & (resident < stop)]
        if len(gone):
            self._pending.append(self.cache.drop(np.ascontiguousarray(gone)))

    def _thinking_range(self) -> Range:
        """Of the last reply. Where the prompt opens thinking its close stays; the newest token always does."""
        line, close = self.timeline.tokens, self.model.markers.think_close
        start, channels = self._reply_start, self.reply.dialect.channels
        if channels is not None:
            first, stop = channels.first, channels.stop
            return (start, start) if first is None else (start + first, min(len(line) - 1, len(line) if stop is None else start + stop))
        opens = [p for p in range(start, len(line)) if line[p] == self.model.markers.think_open]
        if not self._began_thinking and not opens:
            return start, start
        closes = [p for p in range(start, len(line)) if line[p] == close]
        end = closes[-1] + (not self._began_thinking) if closes else len(line)
        return (start if self._began_thinking else opens[0]), min(end, len(line) - 1)

    def _begin(self, prompt: list[int], sampling: SamplingParams, max_tokens: int) -> None:
        self._reply_start = len(self.prompt)
        super()._begin(prompt, sampling, max_tokens)


class BlockTurns(Turns, HeldBlocks):
    """Question and answer of the last turn become blocks, in order of closing; blocks of thinking are forgotten.

    The newest token has to stay in cells, so it is taken out of the last block and pinned with the new question.
    """

    def plan(self) -> None:
        line, budget = self.timeline, self.cache.budget_tokens
        if not len(line):
            super().plan()
            return
        start = len(line)
        beginning = self._pins[0][1]
        head = min(beginning, head_tokens(budget, self.policy))
        if 0 < beginning - head < LEAST_PIECE_TOKENS:
            head = beginning - LEAST_PIECE_TOKENS
        newest = max(start - line.give_back_newest(), head)
        newest = line.open_start if self._is_crumb(newest) else newest
        self._turn_begins()
        for first, stop in line.unpin(head):
            self._pending.extend(self._close_released((first, min(stop, newest))))
        self._pending.extend(self._close_open(newest))
        if not self.keep_thinking:
            self._forget_thinking()
        question = question_range(start, len(self.prompt) - start, head + start - newest + self._held_tokens, budget, self.policy)
        whole = question[0] == start
        if whole:
            line.pin(newest, start)
        else:  # it stays open, and goes with the first piece of the question
            line.open_start = newest
        self._pins = [(0, head), *([(newest, start)] if whole else []), question]
        self._share_out()
        if not whole:
            self.splits += 1
            self._pending.append(Split("prompt", start, self._piece_tokens, budget))

    @property
    def most_held_tokens(self) -> int:
        """How much of the budget held blocks may take."""
        return most_held_tokens(self.cache.budget_tokens, self.policy)

    def state(self) -> dict[str, Any]:
        return {**super().state(), "pins": self._pins}

    def restore(self, state: dict[str, Any]) -> None:
        super().restore(state)
        self._pins = [(start, stop) for start, stop in state["pins"]]
        self._share_out()

    def _close_released(self, released: Range) -> Iterator[Event]:
        start, stop = released
        while start < stop:
            end = self._piece_end(start, stop)
            with self.timeline.reopened(start):
                yield from self._close("turn", (start, end))
            start = end

    def _is_crumb(self, newest: int) -> bool:
        """Whether what the reply left open up to ``newest`` is a rest of an answer too short for a block of its own."""
        line = self.timeline
        rest = bool(line.blocks) and line.blocks[-1].kind == "answer" and line.blocks[-1].stop == line.open_start
        return rest and 0 < newest - line.open_start < LEAST_PIECE_TOKENS

    def _close_open(self, stop: int) -> Iterator[Event]:
        """Close what the last reply left open, up to ``stop``."""
        start, summary = self.timeline.open_start, self._summary_start
        self._summary_start = None
        if stop <= start:
            return
        if summary is not None and start < summary < stop:
            yield from self._close("thought", (start, summary), (summary, stop))
        else:
            yield from self._close("thought" if self.reply.thinking else "answer", (start, stop))

    def _forget_thinking(self) -> None:
        known, line, held = self.cache.forgotten(), self.timeline, self.held_blocks
        old = [b.number for b in line.blocks if b.kind in THINKING and not known[b.number] and b.stop < len(line) and b.number not in held]
        if old:
            self._pending.append(self.cache.forget(old))
            if self.index is not None:
                self.index.forget(old)

    def _boundaries(self, position: int, fed: Fed, text: str) -> Iterator[Event]:
        """In a conversation thoughts and answer are never in one block, as they part ways at the next turn.

        The marker that closes thinking goes with the one that opened it: into the answer's block, if the prompt did.
        So does a header that opens the answer.
        """
        if self.room_tokens and fed.ends_thinking and not fed.closes_summary:
            start, stop = self.timeline.open_start, position + 1 - (fed.opening_tokens or self._began_thinking)
            if start < stop:
                yield from self._close("thought", (start, stop))
                return True
        return (yield from super()._boundaries(position, fed, text))
