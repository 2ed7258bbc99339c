"""A reply whose answer must follow a grammar, while its thoughts are free.

`reply.py` makes one per generation that has a grammar and asks it for every token of the answer. Which tokens are the
answer's is the dialect's to say; a model that opens its thinking itself may do so before the answer begins, once.
"""

from __future__ import annotations

from typing import Any, Sequence

from .libllama import LlamaContext, LlamaGrammar, LlamaSampler
from .model import Model


class Constraint:
    """How far one reply's answer has followed its grammar. Can be saved between two tokens, as counts."""

    def __init__(self, model: Model, prompt: Sequence[int], grammar: str) -> None:
        """Raises UsageError if llama.cpp cannot use ``grammar`` (GBNF)."""
        markers = model.markers
        self._grammar = LlamaGrammar(model.llama, grammar, forbidden=tuple(sorted(markers.ids)))
        self._opens = markers.think_open
        self._may_think = self._opens is not None and not self._settled(model, prompt)
        self._held = 0
        self._is_eog = model.llama.is_eog

    def _settled(self, model: Model, prompt: Sequence[int]) -> bool:
        """Whether the prompt opens thinking, or ends in thinking that it opened and closed itself."""
        markers = model.markers
        for token in reversed(prompt):
            if token in (markers.think_open, markers.think_close):
                return True
            if model.llama.piece(token).strip():
                break
        opened = [token for token in prompt if token in (markers.think_open, markers.think_close)]
        return opened[-1:] == [markers.think_open]

    def sample(self, sampler: LlamaSampler, context: LlamaContext) -> int | None:
        """The next token of the answer, None if the grammar is at its end and the model has no token that ends a reply."""
        free = (self._opens,) if self._may_think and not self._held else ()
        token = sampler.sample_within(context, self._grammar, free)
        if token in free:
            self._may_think = False
        elif token is not None and not self._is_eog(token):  # what ends a reply is no part of it
            self._grammar.accept(token)
            self._held += 1
        return token

    def state(self) -> dict[str, Any]:
        """How many tokens were held to the grammar, and whether thinking may still begin."""
        return {"held": self._held, "may_think": self._may_think}

    def restore(self, state: dict[str, Any], sampled: Sequence[int]) -> None:
        """Go on from ``state``; ``sampled`` are the reply's tokens so far, of which the held ones are the last."""
        self._held, self._may_think = state["held"], state["may_think"]
        for token in sampled[len(sampled) - self._held :]:
            self._grammar.accept(token)

    def close(self) -> None:
        """Free the grammar."""
        self._grammar.close()
