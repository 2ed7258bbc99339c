"""The bundled reasoning models, their tasks and their tokenizer.

Owned by models/. Ships in the wheel as `zoomr_models`; what it exports here needs no
third-party package. Training (`train/`) and `export.py` need the extra `train`.
"""

from __future__ import annotations

from pathlib import Path

_HERE = Path(__file__).resolve().parent


BUNDLED = ("zoomr-tiny", "plain-tiny", "breadcrumbs-tiny")
"""Models that ship with the package, the default first; `plain-tiny` was trained on the same tasks and writes no summaries, nor does
`breadcrumbs-tiny`, which was trained to read beacons."""


def bundled_model_path(name: str = BUNDLED[0]) -> Path:
    """The Q8_0 GGUF of a bundled model. Raises ValueError for another name."""
    if name not in BUNDLED:
        raise ValueError(f"{name} is no bundled model; there are {', '.join(BUNDLED)}")
    return _HERE / f"{name}.gguf"


def demo_problems_path() -> Path:
    """Eight test-split problems, one JSON object a line: `id`, `prompt`, `answer`."""
    return _HERE / "demo.jsonl"


__all__ = ["BUNDLED", "bundled_model_path", "demo_problems_path"]
