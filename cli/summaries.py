"""`--summaries`: its values checked before a long run, the user's markers, and the line that says what auto chose.

`solve.py`, `chat.py`, `eval.py` and `models.py` call it; which mode a model gets is decided in `zoomr_local.dialects`.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zoomr_local.errors import UsageError

if TYPE_CHECKING:
    from zoomr_local.dialects import MarkerSet

_SMALL = "; in a small budget this loses answers, so take all that memory allows (--kv-budget auto)"

def user_markers() -> tuple[MarkerSet, ...]:
    """The marker sets of the user's file. Raises UsageError that names the file and what is wrong."""
    from zoomr_local.config import USER, load
    from zoomr_local.dialects import marker_sets

    config = load()
    try:
        return marker_sets(config.markers)
    except ValueError as error:
        path = next(source.path for source in config.sources if source.kind == USER)
        raise UsageError(f"{path}: {error}") from None


def say(engine: Any, quiet: bool) -> None:
    """On stderr, unless ``quiet``: which way of summarising auto chose in place of the model's own markers, or that a chosen one, or
    the user's markers, are of no use."""
    from zoomr_local.policies import POLICIES

    config, chosen = engine.config, engine.summaries
    if quiet:
        return
    for line in _of_no_use(engine.model, chosen.mode):
        print(line, file=sys.stderr)
    if POLICIES[config.policy].unit != "block":
        if config.summaries != "auto":
            print(f"note: policy {config.policy} makes no blocks, so --summaries is not used", file=sys.stderr)
        return
    if config.summaries == "auto" and chosen.mode != "learned":
        print(f"summaries: {chosen.mode}; {chosen.why} (--summaries takes another way){_SMALL}", file=sys.stderr)
    used = chosen.as_dict()
    for name in ("thought_min", "summary_max"):
        if getattr(config, name) is not None and name not in used:
            print(f"note: --summaries is {chosen.mode} here, so --{name.replace('_', '-')} is not used", file=sys.stderr)


def _of_no_use(model: Any, mode: str) -> Iterator[str]:
    """Of the user's marker sets those that the vocabulary lacks, where ``model`` has no others in their place."""
    for row in model.marker_sets:
        for kind, found in (("summary", mode == "learned"), ("think", model.markers.thinking)):
            texts = (getattr(row, f"{kind}_open"), getattr(row, f"{kind}_close"))
            lacking = [text for text in texts if text is not None and model.llama.token_of(text) is None]
            if lacking and not found:
                yield f"note: markers {row.name!r} of your configuration are not used: {lacking[0]} is no token of {model.name}"


def check(modes: Iterable[str], policies: Iterable[str], model: Path, quiet: bool) -> None:
    """Raises what an engine would of a mode that ``model`` cannot be served in, from its vocabulary alone; says what auto is."""
    from zoomr_local.policies import POLICIES

    modes = list(modes)
    if all(POLICIES[name].unit != "block" for name in policies) or not model.is_file():
        return

    from zoomr_local.dialects import MODES, resolve
    from zoomr_local.libllama import LlamaModel
    from zoomr_local.model import Model

    for mode in modes:
        if mode not in MODES:
            raise UsageError(f"--summaries {mode}: choose one of {', '.join(MODES)}")
    opened = Model(model, LlamaModel(model, no_alloc=True), user_markers())
    try:
        for mode in modes:
            chosen, why = resolve(mode, opened.markers, opened.name)
            if mode == "auto" and chosen != "learned" and not quiet:
                print(f"summaries: {chosen}; {why} (--summaries takes another way){_SMALL}", file=sys.stderr)
    finally:
        opened.close()
