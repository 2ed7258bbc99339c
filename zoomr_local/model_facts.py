"""What a model file is, for people and programs: shape, cost of its cache, template, dialect, support. No weights are read.

`zoomr models` prints it. A file should have passed `trial.check` first.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Sequence

from .dialects import MarkerSet, resolve
from .errors import ZoomrError
from .gguf_file import printable, read_header
from .hub_names import quant_of
from .model import Model
from .plan import Measurer


def facts(path: Path, marker_sets: Sequence[MarkerSet] = ()) -> dict[str, Any]:
    """The fields of `zoomr models show --json` (docs/models.md). ``marker_sets`` are the user's. Raises ModelError."""
    with Measurer(path) as measured:
        model = Model(path, measured.llama, marker_sets)
        template = measured.llama.chat_template()
        dialect, why = resolve("auto", model.markers)
        return {
            "name": measured.name, "file": str(path), "architecture": measured.arch, "description": measured.desc,
            "quant": file_quant(path), "parameters": measured.n_params, "size_bytes": measured.size_bytes,
            "layers": measured.n_layer, "heads": measured.n_head, "kv_heads": measured.n_head_kv, "head_dim": _head_dim(measured),
            "kv_token_bytes": measured.token_bytes(), "trained_tokens": measured.trained_tokens, "window_tokens": measured.n_swa,
            "vocabulary": measured.llama.n_vocab, "template": None if template is None else printable(template, 4000),
            "thinking": thinking_text(model), "dialect": dialect, "dialect_why": why, "pageable": measured.refused is None, "refused": measured.refused,
        }  # fmt: skip


def thinking_text(model: Model) -> str | None:
    """How the model marks its thinking, as it stands in a reply; None if it does not."""
    markers = model.markers
    if not markers.thinking:
        return None
    if markers.channels is None:
        opening, closing = (markers.think_open,), (markers.think_close,)
    else:
        c = markers.channels
        opening, closing = (c.channel, *c.thinking, c.message), c.closing
    ends = (b"".join(model.llama.piece(token, special=True) for token in tokens).decode("utf-8", "replace") for tokens in (opening, closing))
    return printable(" ... ".join(ends))


def file_quant(path: Path) -> str | None:
    """The quantisation that the metadata states, else the one in the file's name; None if neither does or can be read."""
    from gguf.constants import LlamaFileType

    try:
        number = read_header(path).metadata.get("general.file_type")
        return LlamaFileType(number).name.removeprefix("MOSTLY_").removeprefix("ALL_")
    except (ZoomrError, ValueError):
        return quant_of(path.name)


def _head_dim(measured: Measurer) -> int | None:
    """Elements of a key of one head; None for a model without heads."""
    stated = measured.llama.meta(f"{measured.llama.arch}.attention.key_length")
    if stated is not None and stated.isdigit():
        return int(stated)
    return measured.llama.n_embd // measured.n_head if measured.n_head else None
