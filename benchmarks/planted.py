"""A generation that is already deep in its thought, without having decoded its way there.

Only what the model would have computed is replaced: the keys and values of planted blocks are real ones of a short
prefill, copied to later positions. Closing, indexing, page-outs, selections and everything after them go through
the engine's own code. From the planted depth on, the engine runs unchanged but for three things: the policy always
zooms the blocks that were used longest ago, so that every refresh moves as many blocks as it may (the votes are
counted as usual, then overruled); a script opens and closes a summary where a trained model would; and the sampled
token is otherwise the model's own.
"""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any, Iterator

import numpy as np

from zoomr_local import generation, libllama
from zoomr_local.engine import Engine
from zoomr_local.events import PagedIn, TokenDecoded
from zoomr_local.policies import BlockView, Selection
from zoomr_local.policies.zoomr import Zoomr
from zoomr_local.sampling import SamplingParams

SUMMARY_TOKENS = 14  # of a block, both markers included
HEADER_BYTES = 64  # of a page; positions follow, 4 bytes a token


class Busiest(Zoomr):
    """zoomr's selection with its votes overruled: the blocks used longest ago win, so that all of them must move."""

    def select(self, view: BlockView) -> Selection:
        age = np.argsort(np.argsort(-view.last_used, kind="stable"), kind="stable")
        return super().select(replace(view, votes=(age + 1).astype(np.float32)))


class Script:
    """Says which of the sampled tokens become markers, so that a block closes every ``block_tokens``."""

    def __init__(self, markers: Any, block_tokens: int) -> None:
        self.markers, self.block_tokens, self.written = markers, block_tokens, 0

    def rewrite(self, token: int) -> int:
        """The token to use in place of ``token``, and one step on."""
        self.written += 1
        phase = self.written % self.block_tokens
        if phase == self.block_tokens - SUMMARY_TOKENS:
            return self.markers.summary_open
        return self.markers.summary_close if phase == self.block_tokens - 1 else token


def scripted(script: Script) -> type:
    """A sampler class for `generation` whose tokens pass through ``script``; the sampling itself is unchanged."""

    class Scripted(generation.LlamaSampler):
        def sample(self, context: Any) -> int:
            return script.rewrite(super().sample(context))

    return Scripted


class DeepGeneration:
    """One engine, its generation at ``depth`` logical tokens, pulled a turn at a time."""

    def __init__(self, engine: Engine, depth: int, block_tokens: int, rows: int, reply_tokens: int) -> None:
        """The probe scores at least ``rows`` index rows; ``reply_tokens`` bounds what all turns together may decode."""
        self.engine, self.depth, self.block_tokens, self.rows = engine, depth, block_tokens, rows
        engine.policy = Busiest(engine.policy.settings)
        script = Script(engine.model.markers, block_tokens)
        plain, generation.LlamaSampler = generation.LlamaSampler, scripted(script)
        try:
            prompt = engine.model.tokenize(engine.model.render([{"role": "user", "content": "How deep?"}]) + "<think>")
            sampling = SamplingParams(temperature=0.8)
            self.events = engine.generate(prompt, sampling, reply_tokens)
            next(e for e in self.events if isinstance(e, TokenDecoded))
        finally:
            generation.LlamaSampler = plain
        self.running = engine._running
        self.counted = {"tokens": 0, "refreshes": 0, "blocks_in": 0, "tokens_in": 0}
        self._pages: dict[int, np.ndarray] = {}
        self._plant()
        script.written = min(self.running.timeline.open_tokens, block_tokens - SUMMARY_TOKENS - 2)

    def turn(self, tokens: int) -> list[float]:
        """Seconds of each of the next ``tokens`` steps, from one sampled token to the next."""
        count, refreshes = self.counted, self.running.refreshes
        self._widen()
        marks = [time.perf_counter()]
        for event in self.events:
            if isinstance(event, TokenDecoded):
                marks.append(time.perf_counter())
                if len(marks) > tokens:
                    count["tokens"] += tokens
                    count["refreshes"] += self.running.refreshes - refreshes
                    return list(np.diff(marks))
            elif isinstance(event, PagedIn) and event.part == "detail":
                count["blocks_in"] += len(event.blocks)
                count["tokens_in"] += event.tokens
        raise RuntimeError("the reply ended within a turn; raise its length")

    def tally(self) -> dict[str, Any]:
        """What the turns so far did, and how full the cells and the index are now."""
        run = self.running
        return {**self.counted, "resident_tokens": run.cache.resident_tokens, "peak_tokens": run.cache.peak_tokens,
                "blocks": len(run.timeline.blocks), "rows": run.index.n_rows, "logical_tokens": len(run.timeline)}

    def decode_only(self, tokens: int, rows: int) -> list[float]:
        """Seconds of each of ``tokens`` bare decodes, ``rows`` index rows scored; the cells are as before afterwards."""
        run = self.running
        context, sequence, start = run.context, run.cache.sequence, len(run.timeline)
        drain(run._make_room(tokens, tokens))
        before, context.n_rows = context.n_rows, rows
        seconds = []
        for position in range(start, start + tokens):
            mark = time.perf_counter()
            context.decode([98], range(position, position + 1), seq=sequence, logits="last")
            seconds.append(time.perf_counter() - mark)
        context.page_free(sequence, start, start + tokens)
        context.n_rows = before
        return seconds

    def _plant(self) -> None:
        run, size = self.running, self.block_tokens
        while len(run.timeline) + size < self.depth:
            start = self._fill(size, True)
            cut = start + size - SUMMARY_TOKENS
            drain(run._close("thought", (start, cut), (cut, start + size)))
        self._fill(self.depth - len(run.timeline), False)

    def _widen(self) -> None:
        """Let the probe score ``rows`` rows where the text has fewer of its own; the votes see only those."""
        context = self.running.context
        if context.n_rows < self.rows:
            libllama.library.zoomr.rows_set_n(context._pager, self.rows)

    def _fill(self, tokens: int, summary: bool) -> int:
        """Put ``tokens`` copied tokens at the end of the timeline and into cells; their first position."""
        run, markers = self.running, self.engine.model.markers
        drain(run._make_room(tokens, tokens))
        if tokens not in self._pages:
            self._pages[tokens] = self._real_page(tokens)
        start = len(run.timeline)
        run.context.page_in(run.cache.sequence, moved(self._pages[tokens], start))
        run.cache._count(tokens)
        text = [97 + i % 26 for i in range(tokens)]
        if summary:
            text[-SUMMARY_TOKENS], text[-1] = markers.summary_open, markers.summary_close
        run.timeline.tokens.extend(text)
        return start

    def _real_page(self, tokens: int) -> np.ndarray:
        """The page of ``tokens`` tokens that were really decoded; their cells are free again afterwards."""
        run, context, sequence = self.running, self.running.context, self.running.cache.sequence
        start = len(run.timeline)
        for at in range(start, start + tokens, 64):
            run.cache.decode([97 + i % 26 for i in range(min(64, start + tokens - at))], at, "none")
        page = np.empty(context.page_bytes(sequence, start, start + tokens), np.uint8)
        context.page_write(sequence, start, start + tokens, page)
        run.cache._count(-context.page_free(sequence, start, start + tokens))
        return page


def drain(events: Iterator[Any]) -> None:
    """Let a step of the engine run to its end."""
    for _ in events:
        pass


def moved(page: np.ndarray, start: int) -> np.ndarray:
    """A copy of ``page`` (of consecutive tokens) whose positions begin at ``start``; its format: native/zoomr-page.cpp."""
    count = int(page[24:28].view("<u4")[0])
    out = page.copy()
    positions = out[HEADER_BYTES:HEADER_BYTES + 4 * count].view("<i4")
    if not (np.diff(positions) == 1).all():
        raise ValueError("the page's positions are not where the page format puts them")
    positions[:] = start + np.arange(count)
    return out
