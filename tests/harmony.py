"""A scripted model that writes in channels, as gpt-oss does: its vocabulary, pieces and template. Tests only."""

from __future__ import annotations

from scripted import EOS, WORD
from talk import TalkModel

from zoomr_local.dialects import Markers

RETURN = EOS
START, CHANNEL, MESSAGE, END = range(1, 5)
ANALYSIS, FINAL, ASSISTANT, COMMENTARY, ROLE_USER, CONSTRAIN, JSON = range(90, 97)
SPECIAL = {"<|start|>": START, "<|channel|>": CHANNEL, "<|message|>": MESSAGE, "<|end|>": END}
TEXTS = {"analysis": ANALYSIS, "final": FINAL, "assistant": ASSISTANT, "commentary": COMMENTARY, "user": ROLE_USER, "<|constrain|>": CONSTRAIN, "json": JSON}

THINK = [CHANNEL, ANALYSIS, MESSAGE]
OWN = [CHANNEL, FINAL, MESSAGE]
CLOSING = [END, START, ASSISTANT, *OWN]
PROMPT = [START, ROLE_USER, MESSAGE, WORD, END, START, ASSISTANT]

TEMPLATE = (
    "{% for m in messages %}<|start|>{{ m.role }}{% if m.role == 'assistant' %}<|channel|>final{% endif %}<|message|>"
    "{{ m.content }}<|end|>{% endfor %}{% if add_generation_prompt %}<|start|>assistant{% endif %}"
)


class HarmonyModel(TalkModel):
    """Ids 1 to 4 are the special tokens, 90 to 96 the words of headers; the rest as in `TalkModel`."""

    def __init__(self, template: str = TEMPLATE) -> None:
        super().__init__(template)
        self.markers = Markers.find(SPECIAL.get, tokenize=self.tokenize)

    def token_of(self, text):
        return SPECIAL.get(text)

    def piece(self, token, special=False):
        named = {number: text.encode() for text, number in {**TEXTS, **SPECIAL}.items()}  # special ones have a text as gpt-oss' have in llama.cpp
        return named.get(token) or super().piece(token, special)

    def _id(self, word):
        return {**SPECIAL, **TEXTS}.get(word) or super()._id(word)
