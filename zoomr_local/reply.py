"""What the model writes: the next token, what it is, and the text so far. One reply, from the end of its prompt.

`generation.py` makes one per generation, asks it for a token after each decode, and reads from it how the reply
ended. It knows nothing of cells. Everything in it can be saved between two tokens and taken up again.
"""

from __future__ import annotations

import codecs
import io
from typing import Any, Sequence

from .constraint import Constraint
from .dialects import Dialect, Fed
from .libllama import LlamaContext, LlamaSampler
from .model import Model
from .sampling import SamplingParams, StopScanner


class Reply:
    """The sampled tokens of one generation as text, role by role.

    ``token`` is the one that was sampled last and has not been decoded yet (None before the first), ``fed`` what
    it is and ``raw`` its text, whether or not a stop string holds it back. ``stopped`` is true once the model or
    a stop string ended the reply. ``injected_tokens`` are those that the dialect wrote in the model's place.
    """

    def __init__(
        self, model: Model, prompt: list[int], sampling: SamplingParams, sampler: LlamaSampler, dialect: Dialect,
        constraint: Constraint | None = None,
    ) -> None:
        """``dialect`` reads this reply and no other."""
        self._llama, self._sampler, self._sampling, self._constraint = model.llama, sampler, sampling, constraint
        self.dialect = dialect
        self._role = dialect.role
        self.injected_tokens = 0
        self._stop = StopScanner(sampling.stop)
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._text = {"reasoning": io.StringIO(), "content": io.StringIO()}  # adding to a long str copies it
        self._counts = {"thought": 0, "summary": 0, "answer": 0, "marker": 0}
        self._forced: list[int] = []
        self.token: int | None = None
        self.fed: Fed | None = None
        self.raw = ""
        self.stopped = False
        self._accept(prompt)

    @property
    def role(self) -> str:
        """The segment that the next token belongs to, if it is no marker: thought, summary or answer."""
        return self.dialect.role

    @property
    def thinking(self) -> bool:
        """True while a marker that would end thinking is still to come."""
        return self.role != "answer" and self.dialect.markers.ends_thinking

    @property
    def content(self) -> str:
        """The text of the answer so far."""
        return self._text["content"].getvalue()

    @property
    def reasoning(self) -> str:
        """The text of thoughts and summaries so far."""
        return self._text["reasoning"].getvalue()

    @property
    def completion_tokens(self) -> int:
        """Tokens sampled, the one that ended the reply not counted, nor those that were injected."""
        return sum(self._counts.values())

    @property
    def reasoning_tokens(self) -> int:
        """Of those, the ones inside thoughts and summaries."""
        return self._counts["thought"] + self._counts["summary"]

    def force(self, tokens: Sequence[int]) -> None:
        """Go on with ``tokens``, whatever the model would write, before anything is sampled again."""
        self._forced.extend(tokens)
        self.stopped = False

    def sample(self, context: LlamaContext) -> str | None:
        """Draw the next token from the logits of the last decode, or take the next one that is forced, or the dialect's.

        Returns the text that can be shown with it (perhaps empty), or None if the model ended the reply instead.
        """
        forced = bool(self._forced)
        token, injected = self._next(context)
        if token is None or (self._llama.is_eog(token) and not injected and not forced) or self.dialect.ends(token):
            self.stopped = True
            return None
        piece = self._llama.piece(token)
        fed = self.dialect.feed(token, piece, injected)
        self._count(fed)
        if fed.role == "marker" or injected or forced:  # ends what was held back: no stop string reaches over it, nor into what the runtime writes
            raw = piece.decode("utf-8", "replace") if injected or (forced and fed.role != "marker") else ""
            text = self._held() + raw
        else:
            raw = self._utf8.decode(piece)
            text, self.stopped = self._stop.feed(raw)
            if self.stopped:
                self._utf8.reset()  # half a character behind the stop string is not part of the text
        self.token, self.fed, self.raw = token, fed, raw
        self._write(text)
        if fed.role == "marker":
            opens, closes = self.dialect.markers.summary_texts
            self._write(opens if fed.opens_summary else closes if fed.closes_summary else "")
            self._role = self.dialect.role
        return text

    def finish(self) -> None:
        """Write what was held back for a stop string or for the rest of a character: nothing more will come."""
        self._write(self._held())

    def close(self) -> None:
        """Free the sampler and the grammar. Text and state stay."""
        self._sampler.close()
        if self._constraint is not None:
            self._constraint.close()

    def state(self) -> dict[str, Any]:
        """Everything that the next token depends on, JSON-ready; the tokens themselves are the timeline's."""
        partial, flag = self._utf8.getstate()
        return {
            "token": self.token, "raw": self.raw, "fed": None if self.fed is None else vars(self.fed).copy(),
            "stopped": self.stopped, "role": self._role, "dialect": self.dialect.state(), "held": self._stop.held,
            "utf8": [partial.hex(), flag], "text": {"reasoning": self.reasoning, "content": self.content}, "counts": dict(self._counts),
            "draws": self._sampler.draws, "forced": list(self._forced), "injected": self.injected_tokens,
            "constraint": None if self._constraint is None else self._constraint.state(),
        }  # fmt: skip

    def restore(self, state: dict[str, Any], sampled: list[int]) -> None:
        """Go on from ``state``; ``sampled`` are the tokens sampled so far. For a new reply to the same prompt."""
        self.token, self.raw, self.stopped, self._role = (state[name] for name in ("token", "raw", "stopped", "role"))
        self.fed = None if state["fed"] is None else Fed(**state["fed"])
        self.dialect.restore(state["dialect"])
        self._stop.held = state["held"]
        self._utf8.setstate((bytes.fromhex(state["utf8"][0]), state["utf8"][1]))
        for name, text in state["text"].items():
            self._text[name].write(text)
        self._counts, self._forced = dict(state["counts"]), list(state["forced"])
        self.injected_tokens = int(state["injected"])
        self._accept(sampled)
        self._sampler.skip(state["draws"])
        if self._constraint is not None:
            self._constraint.restore(state["constraint"], sampled)

    def _next(self, context: LlamaContext) -> tuple[int | None, bool]:
        """The next token, None where a grammar is at its end, and whether it is the dialect's."""
        token = None if self._forced else self.dialect.take()
        injected = token is not None
        if self._forced:
            token = self._forced.pop(0)
        if token is not None:
            self._sampler.accept(token)
        elif self._constraint is not None and self.role == "answer" and self.dialect.header is None:
            token = self._constraint.sample(self._sampler, context)
        else:
            token = self._sampler.sample(context)
        return token, injected

    def _count(self, fed: Fed) -> None:
        if fed.injected:
            self.injected_tokens += 1
        else:
            self._counts[fed.role] += 1

    def _accept(self, tokens: list[int]) -> None:
        s = self._sampling
        if s.repeat_penalty != 1.0 and s.repeat_last_n:
            for token in tokens[-s.repeat_last_n :]:
                self._sampler.accept(token)

    def _held(self) -> str:
        return self._stop.flush() + self._utf8.decode(b"", True)

    def _write(self, text: str) -> None:
        self._text["content" if self._role == "answer" else "reasoning"].write(text)
