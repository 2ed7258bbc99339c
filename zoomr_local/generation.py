"""One prompt from its first token to its last: what every policy shares, and the two simple kinds.

Only `engine.py` makes generations. `FullGeneration` never frees a cell, `TokenGeneration` drops tokens;
`block_generation.py` pages blocks. Subclasses supply ``prefill`` and ``step``.
"""

from __future__ import annotations

import codecs
import time
from abc import ABC, abstractmethod
from typing import Iterator

import numpy as np

from .dialects import SUMMARY_CLOSE, SUMMARY_OPEN, Fed, LearnedDialect
from .errors import BudgetError, EngineError
from .events import CacheStats, Event, Finished, PromptProgress, TokenDecoded, Warned
from .kv_cache import KVCache
from .libllama import LlamaContext, LlamaSampler
from .model import Model
from .policies import Policy, TokenView
from .sampling import SamplingParams, StopScanner
from .tiers import RamTier
from .timeline import Range, Timeline


class Generation(ABC):
    """State and loop of one generation; ``run`` is used once."""

    def __init__(
        self, model: Model, context: LlamaContext, tier: RamTier, policy: Policy, budget_tokens: int
    ) -> None:
        self.model, self.context, self.policy = model, context, policy
        self.batch_tokens: int = context.n_batch
        self.timeline = Timeline()
        self.cache = KVCache(context, tier, budget_tokens, self.timeline)
        self.cancelled = False
        self.refreshes = self.splits = 0
        self.agreements: list[float] = []
        self._resident_sum = self._steps = 0
        self._text = {"reasoning": "", "content": ""}
        self._role = "answer"

    def run(self, prompt: list[int], sampling: SamplingParams, max_tokens: int) -> Iterator[Event]:
        """Prefill, then decode until the model stops, a stop string is met or ``max_tokens`` are written."""
        sampler = LlamaSampler(
            self.model.llama, temperature=sampling.temperature, top_k=sampling.top_k, top_p=sampling.top_p,
            min_p=sampling.min_p, repeat_penalty=sampling.repeat_penalty, repeat_last_n=sampling.repeat_last_n,
            seed=sampling.seed,
        )
        try:
            started = prefilled = time.perf_counter()
            self._dialect = LearnedDialect(self.model.markers, prompt)
            self._role = self._dialect.role
            counts = {"thought": 0, "summary": 0, "answer": 0, "marker": 0}
            if len(prompt) > self.model.llama.n_ctx_train:
                yield self._beyond_training()
            for event in self.prefill(prompt):
                yield event
                prefilled = time.perf_counter()
                if self.cancelled:
                    break
            if sampling.repeat_penalty != 1.0 and sampling.repeat_last_n:
                for token in prompt[-sampling.repeat_last_n :]:
                    sampler.accept(token)
            reason = yield from self._decode(sampler, StopScanner(sampling.stop), max_tokens, counts)
            ended = time.perf_counter()
        finally:
            sampler.close()
        yield Finished(
            reason, self._text["content"], self._text["reasoning"], len(prompt), sum(counts.values()),
            counts["thought"] + counts["summary"], prefilled - started, ended - prefilled, self._stats(),
        )

    @abstractmethod
    def prefill(self, prompt: list[int]) -> Iterator[Event]:
        """Decode the prompt and pin what the policy pins of it; logits of the last token are left for sampling."""

    @abstractmethod
    def step(self, token: int, fed: Fed, text: str) -> Iterator[Event]:
        """Decode one sampled token, making room first if that is needed."""

    def _decode(
        self, sampler: LlamaSampler, stop: StopScanner, max_tokens: int, counts: dict[str, int]
    ) -> Iterator[Event]:
        utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        llama = self.model.llama
        for left in reversed(range(0 if self.cancelled else max_tokens)):
            token = sampler.sample(self.context)
            if llama.is_eog(token):
                self._write(stop.flush() + utf8.decode(b"", True))
                return "stop"
            fed = self._dialect.feed(token)
            counts[fed.role] += 1
            if fed.role == "marker":  # ends what was held back: no stop string reaches over it
                raw, text, met = "", stop.flush() + utf8.decode(b"", True), False
            else:
                raw = utf8.decode(llama.piece(token))
                text, met = stop.feed(raw)
            self._note(fed, text)
            yield TokenDecoded(len(self.timeline), token, text, fed.role, self.cache.resident_tokens)
            if met:
                return "stop"
            if self.cancelled or not left:
                break
            yield from self.step(token, fed, raw)
            if len(self.timeline) == llama.n_ctx_train + 1:
                yield self._beyond_training()
            self._steps += 1
            self._resident_sum += self.cache.resident_tokens
        self._write(stop.flush() + utf8.decode(b"", True))
        return "cancelled" if self.cancelled else "length"

    def _beyond_training(self) -> Warned:
        trained = self.model.llama.n_ctx_train
        return Warned(f"{self.model.name} was trained on {trained} positions; what it writes beyond them may be worse")

    def _note(self, fed: Fed, text: str) -> None:
        self._write(text)
        if fed.role == "marker":
            self._write(SUMMARY_OPEN if fed.opens_summary else SUMMARY_CLOSE if fed.closes_summary else "")
            self._role = self._dialect.role

    def _write(self, text: str) -> None:
        self._text["content" if self._role == "answer" else "reasoning"] += text

    def _decode_prompt(self, tokens: list[int], last: bool) -> None:
        first = len(self.timeline)
        self.timeline.tokens.extend(tokens)
        self.cache.decode(tokens, first, "last" if last else "none")

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
            paged_out_bytes=cache.tier.stored_bytes,
            page_outs=cache.page_outs,
            page_ins=cache.page_ins,
            refreshes=self.refreshes,
            agreement=round(float(np.mean(self.agreements)), 4) if self.agreements else None,
            dropped_tokens=cache.dropped_tokens,
            splits=self.splits,
        )


class FullGeneration(Generation):
    """Everything stays resident: the plain runtime."""

    def prefill(self, prompt: list[int]) -> Iterator[Event]:
        for start in range(0, len(prompt), self.batch_tokens):
            piece = prompt[start : start + self.batch_tokens]
            self._decode_prompt(piece, start + len(piece) == len(prompt))
            yield PromptProgress(len(self.timeline), len(prompt))

    def step(self, token: int, fed: Fed, text: str) -> Iterator[Event]:
        self._decode_token(token)
        return iter(())


class TokenGeneration(Generation):
    """Single tokens are dropped for good when the budget is full. Pins: see ``pinned_ranges``."""

    def prefill(self, prompt: list[int]) -> Iterator[Event]:
        budget = self.cache.budget_tokens
        for start, stop in pinned_ranges(len(prompt), budget, self.policy):
            self.timeline.pin(start, stop)
        batch = min(self.batch_tokens, max(1, (budget - self.timeline.pinned_tokens) // 2))
        for start in range(0, len(prompt), batch):
            piece = prompt[start : start + batch]
            yield from self._make_room(len(piece))
            self._decode_prompt(piece, start + len(piece) == len(prompt))
            yield PromptProgress(len(self.timeline), len(prompt))

    def step(self, token: int, fed: Fed, text: str) -> Iterator[Event]:
        yield from self._make_room(1)
        self._decode_token(token)

    def _make_room(self, n_tokens: int) -> Iterator[Event]:
        excess = n_tokens - self.cache.free_tokens
        if excess <= 0:
            return
        resident = self.context.resident(self.cache.sequence)
        loose = np.ones(len(resident), bool)
        for start, stop in self.timeline.pinned:
            loose &= (resident < start) | (resident >= stop)
        candidates = resident[loose]
        if len(candidates) <= excess:
            raise EngineError(f"{excess} cells are needed, {len(candidates)} tokens are not pinned")
        keep = self.policy.select(TokenView(candidates, len(candidates) - excess))
        yield self.cache.drop(candidates[~keep])
        self.refreshes += 1


def pinned_ranges(prompt_tokens: int, budget_tokens: int, policy: Policy) -> list[Range]:
    """The parts of the prompt that never leave the cache, as position ranges.

    The whole prompt, as long as a third of the budget is left for everything else; of a longer prompt its head
    (an eighth of the budget) and its end, where the question stands (a quarter). A policy that does not pin
    prompts keeps its attention sinks and the same end, at most an eighth of the budget.
    """
    n, budget = prompt_tokens, budget_tokens
    if not policy.pins_prompt:
        head, tail = policy.settings.sink_tokens, budget // 8
    elif n <= budget - budget // 3:
        return [(0, n)]
    else:
        head, tail = budget // 8, budget // 4
    if head + tail > budget // 2:
        raise BudgetError(f"{head} sink tokens and a budget of {budget} leave no room to think; lower --sinks")
    return [(0, n)] if head + tail >= n else [(0, head), (n - tail, n)]
