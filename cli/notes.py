"""What is said before and after a run: where a user may expect something else of it, and what to type to go on. The commands that open a
model call it."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Sequence
from pathlib import Path

from . import options


def without_gpu(n_gpu_layers: int) -> None:
    """On stderr: that layers are to run on a GPU, and there is none."""
    if n_gpu_layers:
        from zoomr_local.libllama import devices

        if not devices.gpus():
            options.tell(
                f"warning: -ngl {n_gpu_layers}: llama.cpp finds no GPU here, or was built for none, so everything runs on the CPU; zoomr doctor shows what it was built for"
            )


def bundled(model: Path, questions: Iterable[str] | None, quiet: bool) -> None:
    """On stderr, unless ``quiet``: that a bundled model is asked what it was not trained on. None for questions that are not known yet."""
    if quiet or model not in options.bundled_models().values():
        return
    from zoomr_models.tasks import is_worded

    if questions is None or not all(map(is_worded, questions)):
        options.tell(f"note: {model.stem} is a test piece that answers the puzzles of `zoomr problems` and nothing else; -m takes another model")


def typed_again(arguments: Sequence[str], *flags: str, without: tuple[str, ...] = ()) -> str:
    """The command line with ``arguments`` as it can be typed again, with ``flags`` and without others. Behind ``--`` nothing is a flag."""
    end = arguments.index("--") if "--" in arguments else len(arguments)
    kept = [a for a in arguments[:end] if a not in without + flags]
    return shlex.join(["zoomr", *kept, *flags, *arguments[end:]])
