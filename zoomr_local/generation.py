"""One prompt from its first token to its last: what every policy shares, and the two simple kinds.

Only `engine.py` makes generations. `FullGeneration` never frees a cell, `TokenGeneration` drops tokens;
`block_generation.py` pages blocks. Subclasses supply ``plan``, ``prefill`` and ``step``.
"""

from __future__ import annotations

import zlib
from abc import ABC, abstractmethod
from collections import deque
from contextlib import AbstractContextManager
from dataclasses import asdict
from typing import Any, Iterator, Sequence

import numpy as np

from .clock import Clock
from .constraint import Constraint
from .dialects import Dialect, Fed, Summaries
from .errors import BudgetError, EngineError
from .events import CacheStats, Event, Finished, PromptProgress, SummaryCut, TokenDecoded, TokenInjected, Warned, event_from_dict
from .kv_cache import KVCache
from .libllama import LlamaContext, LlamaSampler
from .model import Model
from .policies import Policy, TokenView
from .reply import Reply
from .sampling import SamplingParams
from .tiers import PageStore
from .timeline import Range, Timeline


class TiersFull(Exception):
    """Neither tier has room for a block that must leave the cache, and that is to end the generation."""


class Generation(ABC):
    """State and loop of one generation: ``run`` begins it, or ``restore`` and then ``resume`` take up a saved one.

    The loop goes in whole steps: a piece of the prompt, or a token decoded and the next one sampled. Nothing is
    half done while an event is in the consumer's hands, so that is when ``state`` may be taken; events of the
    last step that were not delivered yet belong to it. At every such moment either the prompt is not finished or
    a token is sampled and waits to be decoded, so that no logits need to be kept.
    """

    never_sampled: tuple[int, ...] = ()
    """Ids that the sampler must never draw, however likely."""

    tell_votes = False
    """Whether each selection is preceded by the votes it was taken by (`Voted`); set before the first step."""

    def __init__(
        self, model: Model, context: LlamaContext, store: PageStore, policy: Policy, budget_tokens: int,
        on_full: str = "drop", summaries: Summaries = Summaries(),
    ) -> None:
        """``summaries``: how thoughts become blocks, where the policy makes any."""
        self.model, self.context, self.policy, self.summaries = model, context, policy, summaries
        self.batch_tokens: int = context.n_batch
        self.timeline = Timeline()
        self.cache = self._new_cache(context, store, budget_tokens, on_full)
        self.cancelled = False
        self.refreshes = self.splits = 0
        self.agreements: list[float] = []
        self.injections = {"injected_tokens": 0, "prompted_summaries": 0, "cut_summaries": 0}
        self.prompt: list[int] = []
        self._clock = Clock()
        self._resident_sum = self._steps = 0
        self._pending: deque[Event] = deque()
        self._whole = True
        self._ended: str | None = None
        self.reply: Reply | None = None
        self.saved_pages: Any = None
        """Where this generation's pages are on disk since its last save: `session.py`'s."""

    def _new_cache(self, context: LlamaContext, store: PageStore, budget_tokens: int, on_full: str) -> KVCache:
        wait = self.policy.settings.wait_for_disk
        return KVCache(context, store, budget_tokens, self.timeline, on_full=on_full, wait_for_disk=wait)

    def run(
        self, prompt: list[int], sampling: SamplingParams, max_tokens: int, first: Sequence[Event] = ()
    ) -> Iterator[Event]:
        """Prefill, then decode until the model stops, a stop string is met or ``max_tokens`` are written.

        ``first`` are events to deliver before anything else.
        """
        self._begin(prompt, sampling, max_tokens)
        self._pending.extend(first)
        if len(prompt) > self.model.llama.n_ctx_train:
            self._pending.append(self._beyond_training())
        yield from self.resume()

    def resume(self) -> Iterator[Event]:
        """The events from here to `Finished`."""
        self._clock.start()
        try:
            while True:
                while self._pending:
                    yield self._pending.popleft()
                if self._ended is not None:
                    return
                self._clock.lap()
                self._clock.phase = "prefill" if self._prompt_left else "decode"
                yield from self._whole_step()
        finally:
            self._clock.stop()
            self.reply.close()

    def settle(self) -> None:
        """Wait for page files on their way, so that counters and books are final; what failed is said by the next events."""
        self._pending.extend(self.cache.flush())

    def paused(self) -> AbstractContextManager[None]:
        """While this lasts no time is counted: for a consumer that does something between two events."""
        return self._clock.paused()

    @abstractmethod
    def plan(self) -> None:
        """Work out from the length of ``prompt`` what is pinned; called once, before anything is decoded."""

    @abstractmethod
    def prefill(self) -> Iterator[Event]:
        """Decode the next piece of the prompt; logits of its last token are left for sampling."""

    @abstractmethod
    def step(self, token: int, fed: Fed, text: str) -> Iterator[Event]:
        """Decode one sampled token, making room first if that is needed."""

    def state(self) -> dict[str, Any]:
        """Everything the rest of the run depends on but cells, pages and index rows' bytes: see ``session.py``.

        JSON values and numpy arrays. Raises EngineError if an error ended the generation in the middle of a step.
        """
        if self.reply is None:
            raise EngineError("the generation has not begun, so there is nothing to save yet")
        if not self._whole:
            raise EngineError("the generation failed in the middle of a step, so its state is not whole")
        return {
            "prompt": self.prompt, "sampling": asdict(self.sampling), "max_tokens": self.max_tokens,
            "timeline": self.timeline.state(), "cache": self.cache.state(), "reply": self.reply.state(),
            "refreshes": self.refreshes, "splits": self.splits, "agreements": self.agreements,
            "resident_sum": self._resident_sum, "steps": self._steps, "clock": self._clock.state(),
            "pending": [event.as_dict() for event in self._pending], "injections": dict(self.injections),
            "cancelled": self._ended == "cancelled",
        }  # fmt: skip

    def restore(self, state: dict[str, Any]) -> None:
        """Become what ``state`` was taken from; the cells are the caller's. For a new generation, once."""
        sampling = SamplingParams(**{**state["sampling"], "stop": tuple(state["sampling"]["stop"])})
        self._begin(state["prompt"], sampling, state["max_tokens"])
        self.timeline.restore(state["timeline"])
        self.cache.restore(state["cache"])
        self.reply.restore(state["reply"], self._sampled(state["reply"]))
        self.refreshes, self.splits, self.agreements = state["refreshes"], state["splits"], list(state["agreements"])
        self._resident_sum, self._steps = state["resident_sum"], state["steps"]
        self.injections = dict(state["injections"])
        self._clock.restore(state["clock"])
        self._pending = deque(event_from_dict(data) for data in state["pending"])
        self._ended = next((event.reason for event in self._pending if isinstance(event, Finished)), None)
        self.cancelled = bool(state.get("cancelled"))  # not there before 2026-11-23

    def _sampled(self, reply: dict[str, Any]) -> list[int]:
        """The reply's tokens: those that were decoded, and the one that waits; none does where the model has ended the reply."""
        written = self._written()
        waits = sum(reply["counts"].values()) + reply["injected"] > len(written)
        return [*written, *([reply["token"]] if waits else [])]

    def _written(self) -> list[int]:
        """The tokens of the reply that were decoded."""
        return self.timeline.tokens[len(self.prompt) :]

    def _begin(self, prompt: list[int], sampling: SamplingParams, max_tokens: int) -> None:
        self.prompt, self.sampling, self.max_tokens = list(prompt), sampling, max_tokens
        self.plan()
        sampler = LlamaSampler(
            self.model.llama, temperature=sampling.temperature, top_k=sampling.top_k, top_p=sampling.top_p,
            min_p=sampling.min_p, repeat_penalty=sampling.repeat_penalty, repeat_last_n=sampling.repeat_last_n,
            seed=sampling.seed, never=self.never_sampled,
        )
        constraint = None if sampling.grammar is None else Constraint(self.model, self.prompt, sampling.grammar)
        dialect = self.summaries.dialect(self.model.markers, self.prompt)
        self._pending.extend(self._fit(dialect))
        self.reply = Reply(self.model, self.prompt, sampling, sampler, dialect, constraint)

    def _fit(self, dialect: Dialect) -> Iterator[Event]:
        """Tell ``dialect`` how long a thought and its summary may become; what it cannot do then is said."""
        return iter(())

    def _whole_step(self) -> Iterator[Event]:
        """One step in one go; its events are delivered once it is done, or has failed."""
        self._whole = False
        try:
            self._pending.extend(self._advance())
        except TiersFull:
            pass  # said by the events before it; `_end` ends the generation, or it raises
        except Exception:
            while self._pending:
                yield self._pending.popleft()
            raise
        self._whole = True

    def _advance(self) -> Iterator[Event]:
        reply = self.reply
        reason = self._end()
        if reason:
            yield from self.cache.flush()
            yield self._finish(reason)
        elif self._prompt_left:
            yield from self.prefill()
            if not self._prompt_left:
                yield from self._sample()
        else:
            before = len(self.timeline)
            yield from self.step(reply.token, reply.fed, reply.raw)
            if before <= self.model.llama.n_ctx_train < len(self.timeline):
                yield self._beyond_training()
            self._steps += 1
            self._resident_sum += self.cache.resident_tokens
            yield from self._sample()

    @property
    def _prompt_left(self) -> int:
        return len(self.prompt) - len(self.timeline) if len(self.timeline) < len(self.prompt) else 0

    @property
    def _next_position(self) -> int:
        """Where the token that waits will stand."""
        return len(self.timeline)

    def _sample(self) -> Iterator[Event]:
        text = self.reply.sample(self.context)
        if text is not None:
            reply, fed = self.reply, self.reply.fed
            kind = TokenInjected if fed.injected else TokenDecoded
            yield kind(self._next_position, reply.token, text, fed.role, self.cache.resident_tokens)
            self.injections["injected_tokens"] += fed.injected
            self.injections["prompted_summaries"] += fed.injected and fed.opens_summary
            self.injections["cut_summaries"] += fed.cut_tokens > 0
            if fed.cut_tokens:
                yield SummaryCut(self._next_position, fed.cut_tokens)

    def _end(self) -> str | None:
        if self.reply.stopped:
            return "stop"
        if self.cancelled:
            return "cancelled"
        if self.cache.full:
            return "kv_full"
        return "length" if self.reply.completion_tokens >= self.max_tokens else None

    def _finish(self, reason: str) -> Finished:
        reply, self._ended = self.reply, reason
        reply.finish()
        self._clock.lap()
        return Finished(
            reason, reply.content, reply.reasoning, len(self.prompt), reply.completion_tokens, reply.reasoning_tokens,
            self._clock.seconds["prefill"], self._clock.seconds["decode"], self._stats(),
        )

    def _beyond_training(self) -> Warned:
        trained = self.model.llama.n_ctx_train
        return Warned(f"{self.model.name} was trained on {trained} positions; what it writes beyond them may be worse")

    def _decode_prompt(self, n_tokens: int) -> Event:
        """Decode the next tokens of the prompt."""
        first = len(self.timeline)
        tokens = self.prompt[first : first + n_tokens]
        self.timeline.tokens.extend(tokens)
        self.cache.decode(tokens, first, "none" if self._prompt_left else "last")
        return PromptProgress(len(self.timeline), len(self.prompt))

    def _decode_token(self, token: int) -> int:
        position = self.timeline.append(token)
        self.cache.decode([token], position, "last")
        return position

    def _stats(self) -> CacheStats:
        cache = self.cache
        return CacheStats(
            policy=self.policy.name,
            budget_tokens=cache.budget_tokens,
            allocated_tokens=self.context.n_cells,
            token_bytes=self.context.token_bytes,
            resident_peak_tokens=cache.peak_tokens,
            resident_mean_tokens=round(self._resident_sum / self._steps, 1) if self._steps else cache.resident_tokens,
            blocks=len(self.timeline.blocks),
            paged_out_bytes=cache.store.stored_bytes,
            page_outs=cache.page_outs,
            page_ins=cache.page_ins,
            refreshes=self.refreshes,
            agreement=round(float(np.mean(self.agreements)), 4) if self.agreements else None,
            dropped_tokens=cache.dropped_tokens,
            splits=self.splits,
            ram_bytes=cache.store.ram_peak_bytes,
            disk_bytes=cache.store.disk_peak_bytes,
            disk_written_bytes=cache.store.written_bytes,
            disk_read_bytes=cache.store.read_bytes,
            lost_blocks=cache.lost_blocks,
            faults=cache.store.faults,
            summaries=self.summaries.mode if self.policy.unit == "block" else None,
            **self.injections,
        )


class FullGeneration(Generation):
    """Everything stays resident: the plain runtime."""

    def plan(self) -> None:
        pass

    def prefill(self) -> Iterator[Event]:
        yield self._decode_prompt(min(self.batch_tokens, self._prompt_left))

    def step(self, token: int, fed: Fed, text: str) -> Iterator[Event]:
        self._decode_token(token)
        return iter(())


class TokenGeneration(Generation):
    """Single tokens are dropped for good when the budget is full. Pins: see ``pinned_ranges``."""

    def plan(self) -> None:
        for start, stop in pinned_ranges(len(self.prompt), self.cache.budget_tokens, self.policy):
            self.timeline.pin(start, stop)

    def prefill(self) -> Iterator[Event]:
        batch = min(self.batch_tokens, max(1, (self.cache.budget_tokens - self.timeline.pinned_tokens) // 2))
        n = min(batch, self._prompt_left)
        yield from self._make_room(n)
        yield self._decode_prompt(n)

    def step(self, token: int, fed: Fed, text: str) -> Iterator[Event]:
        yield from self._make_room(1)
        self._decode_token(token)

    def _make_room(self, n_tokens: int) -> Iterator[Event]:
        excess = n_tokens - self.cache.free_tokens
        if excess <= 0:
            return
        candidates = self._droppable()
        if len(candidates) <= excess:
            raise EngineError(f"{excess} cells are needed, {len(candidates)} tokens are not pinned")
        begins = np.array(self.timeline.tokens[: self.cache.budget_tokens // 2], np.int32)  # cells are full, so as much is decoded
        keep = self.policy.select(TokenView(candidates, len(candidates) - excess, zlib.crc32(begins.tobytes())))
        yield from self._dropped(candidates[~keep])
        yield self.cache.drop(candidates[~keep])
        self.refreshes += 1

    def _droppable(self) -> np.ndarray:
        """int32, ascending: the resident positions among which the policy chooses."""
        resident = self.context.resident(self.cache.sequence)
        loose = np.ones(len(resident), bool)
        for start, stop in self.timeline.pinned:
            loose &= (resident < start) | (resident >= stop)
        return resident[loose]

    def _dropped(self, positions: np.ndarray) -> Iterator[Event]:
        """Said besides `Dropped` when ``positions`` (int32) have to go for want of room."""
        return iter(())


def pinned_ranges(prompt_tokens: int, budget_tokens: int, policy: Policy) -> list[Range]:
    """The parts of the prompt that never leave the cache, as position ranges.

    The whole prompt, as long as a third of the budget is left for everything else; of a longer prompt its head
    (an eighth of the budget) and its end, where the question stands (a quarter). A policy that does not pin
    prompts keeps its attention sinks and the same end, at most an eighth of the budget; a per-head policy then pins nothing.
    """
    n, budget = prompt_tokens, budget_tokens
    if policy.unit == "head" and not policy.pins_prompt:
        return []
    if not policy.pins_prompt:
        head, tail = policy.settings.sink_tokens, budget // 8
    elif n <= budget - budget // 3:
        return [(0, n)]
    else:
        head, tail = budget // 8, budget // 4
    if head + tail > budget // 2:
        raise BudgetError(f"{head} sink tokens and a budget of {budget} leave no room to think; lower --sinks")
    return [(0, n)] if head + tail >= n else [(0, head), (n - tail, n)]
