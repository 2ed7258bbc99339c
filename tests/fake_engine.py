"""A model and an engine that answer from a table, in the real ones' event language; for the tests of solve and its command.

The reply to a prompt is found by its text; an Exception as reply is raised, and of a list each reply is given once. Tests only.
"""

from __future__ import annotations

from contextlib import contextmanager

from zoomr_local.dialects import Summaries
from zoomr_local.events import (
    BlockClosed,
    CacheStats,
    Finished,
    PagedIn,
    PagedOut,
    PromptProgress,
    Refreshed,
    TokenDecoded,
)


class FakeModel:
    name = "fake"
    marker_sets = ()

    def render(self, messages):
        return messages[-1]["content"]

    def tokenize(self, text):
        return [ord(c) for c in text]


class FakeEngine:
    """``replies`` maps a prompt to its content; other prompts are answered with "The answer is 4."."""

    def __init__(self, replies=None, tokens=8, on_token=lambda: None):
        self.replies, self.tokens, self.on_token = replies or {}, tokens, on_token
        self.prompts: list[str] = []
        self.model, self.summaries = FakeModel(), Summaries()
        self.samplings: list = []
        self.decoded = 0
        self.cancelled = False

    def resolved(self):
        return {"window_tokens": 128}

    def cancel(self):
        self.cancelled = True

    def generate(self, prompt, sampling, max_tokens):
        text = "".join(map(chr, prompt))
        self.prompts.append(text)
        self.samplings.append(sampling)
        self.cancelled = False
        reply = self.replies.get(text, "The answer is 4.")
        if isinstance(reply, list):  # one after the other, the last for good
            reply = reply.pop(0) if len(reply) > 1 else reply[0]
        yield PromptProgress(len(prompt), len(prompt))
        if isinstance(reply, Exception):
            raise reply
        n = min(self.tokens, max_tokens)
        for i in range(n):
            if self.cancelled:
                break
            self.on_token()
            self.decoded += 1
            yield TokenDecoded(len(prompt) + i, 7, "x", "thought", 100 + i)
        reason = "cancelled" if self.cancelled else "stop" if n == self.tokens else "length"
        yield BlockClosed(0, "thought", (len(prompt), len(prompt) + 4), (len(prompt) + 4, len(prompt) + 6), "noted")
        yield PagedOut(len(prompt) + 6, (0,), "detail", 4, 64)
        yield Refreshed(len(prompt) + 7, (0,), 0.5, "interval")
        yield PagedIn(len(prompt) + 7, (0,), "detail", 4, 64)
        stats = CacheStats("zoomr", 500, 512, 16, 100 + n, 100.0, 1, 64, 1, 1, 1, 0.5, 0, 0, ram_bytes=64)
        written = reply if reason == "stop" else reply[:5] if reason == "cancelled" else ""
        yield Finished(reason, written, "thinking", len(prompt), n, n, 0.25, 0.5, stats)


def opener(engine: FakeEngine):
    """A stand-in for ``zoomr_cli.solve.open_engine`` that always gives ``engine``."""

    @contextmanager
    def open_engine(model_file, config, n_gpu_layers):
        engine.config = config
        yield FakeModel(), engine

    return open_engine
