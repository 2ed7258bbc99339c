"""A loaded GGUF with what the runtime reads off it: template, markers, and the model's own policy defaults."""

from __future__ import annotations

from functools import cached_property, partial
from pathlib import Path
from typing import Any, Sequence

from . import chat_template
from .dialects import TABLE, Markers, MarkerSet
from .errors import ModelError, UsageError
from .gguf_file import printable
from .libllama import LlamaModel

METADATA_SETTINGS = {
    "zoomr.window": "window_tokens",
    "zoomr.votes_per_head": "votes_per_head",
    "zoomr.zoomed_blocks": "zoomed_blocks",
    "zoomr.vote_window": "vote_window_tokens",
    "zoomr.refresh": "refresh_tokens",
    "zoomr.summary_rows": "summary_rows",
    "zoomr.vote_layers": "vote_layers",
}
"""GGUF metadata keys by which a model states its own policy settings, and the fields of `policies.Settings`."""


class Model:
    """One GGUF file, its vocabulary and its weights."""

    def __init__(self, path: Path, llama: LlamaModel, marker_sets: Sequence[MarkerSet] = ()) -> None:
        """``marker_sets`` are looked for in the vocabulary before the known ones."""
        self.path, self.llama, self.marker_sets = path, llama, tuple(marker_sets)

    @classmethod
    def open(cls, path: str | Path, *, n_gpu_layers: int = 0, marker_sets: Sequence[MarkerSet] = ()) -> "Model":
        """Load a file. Raises ModelError if it is missing or not a sound GGUF, which is tried in another process the
        first time (`trial.py`)."""
        from . import trial

        path = trial.check(path)
        return cls(path, LlamaModel(str(path), n_gpu_layers=n_gpu_layers), marker_sets)

    @property
    def name(self) -> str:
        """The model's own name, or its file name."""
        return printable(self.llama.meta("general.name") or self.path.stem)

    @property
    def arch(self) -> str:
        """llama.cpp's name of the architecture."""
        return self.llama.arch

    @property
    def size_bytes(self) -> int:
        """Bytes of the weights."""
        return self.llama.size_bytes

    @cached_property
    def markers(self) -> Markers:
        """The ids of the thought and summary markers that the vocabulary has."""
        tokenize = partial(self.llama.tokenize, add_special=False, parse_special=False)
        return Markers.find(self.llama.token_of, (*self.marker_sets, *TABLE), tokenize)

    @cached_property
    def settings(self) -> dict[str, Any]:
        """Policy settings the model's metadata states (fields of `policies.Settings`)."""
        found: dict[str, Any] = {}
        for key, field in METADATA_SETTINGS.items():
            text = self.llama.meta(key)
            if text is None:
                continue
            try:
                numbers = tuple(int(part) for part in text.strip("[] ").split(",") if part.strip())
                found[field] = numbers if field == "vote_layers" else numbers[0]
            except (ValueError, IndexError):
                raise ModelError(f"{self.path}: metadata {key} is {text!r}, not a whole number") from None
        return found

    def tokenize(self, text: str) -> list[int]:
        """Token ids of a rendered prompt: markers in it become special tokens, BOS is added if the model asks."""
        return self.llama.tokenize(text, add_special=True, parse_special=True)

    def render(self, messages: Sequence[dict[str, str]]) -> str:
        """The prompt text of a conversation, by the model's own chat template, open for the reply.

        A model without a template gets a single message as it is. Raises UsageError if the template refuses the
        messages, ModelError if there is no template for a conversation.
        """
        template = self.llama.chat_template()
        if template is None and len(messages) == 1:
            return messages[0]["content"]
        if template is None:
            raise ModelError(f"{self.path} has no chat template, so {len(messages)} messages cannot be put to it; "
                             "send one message, or use a model with a template")
        special = {"bos_token": self._special(self.llama.bos_token), "eos_token": self._special(self.llama.eos_token)}
        try:
            text = chat_template.render(template, messages, **special)
        except MemoryError:
            raise ModelError(f"the chat template of {self.path} makes more text than there is memory; the file is damaged") from None
        except Exception as error:  # a template is a program: it can fail in any way Python can
            raise UsageError(f"the chat template of {self.name} refused the messages: {printable(str(error) or type(error).__name__)}") from None
        return text.removeprefix(special["bos_token"]) if self.llama.add_bos else text

    def _special(self, token: int | None) -> str:
        return "" if token is None else self.llama.piece(token, special=True).decode("utf-8", "replace")

    def close(self) -> None:
        """Free the weights."""
        self.llama.close()
