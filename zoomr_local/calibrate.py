"""Measures a model's calibration: how many tokens each layer attends to while the model answers a few probe prompts.

The command line calls it; what the numbers mean and their file: `policies/heads/calibration.py`, where that is: `calibrations.py`.
A store with cells for everything observes the attention of every token of the replies, which are greedy. Queries of the
prompts are not counted: budgets are for what is decoded. The probes are dev problems of the bundled tasks, two of each family.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from . import machine
from .calibrations import fingerprint
from .errors import EngineError, UsageError
from .libllama import LlamaContext
from .libllama.heads import HeadStore
from .model import Model
from .policies.heads import Calibration, HeadSettings
from .policies.heads.calibration import Demand
from .sizes import counted, format_bytes

PROBES_A_FAMILY = 2
REPLY_TOKENS = 256
_BATCH_TOKENS = 512
_PROBE_CELLS = 256  # of a context that is only asked what a cell takes
_SEED = 7


def probe_prompts(model: Model) -> list[list[int]]:
    """The probes as the model's own template puts them, as tokens."""
    from zoomr_models.tasks import FAMILIES, LONG_THOUGHTS, generate

    problems = [p for family in FAMILIES for p in generate(family, PROBES_A_FAMILY, _SEED, LONG_THOUGHTS[family], "dev")]
    return [model.tokenize(model.render([{"role": "user", "content": p.prompt}])) for p in problems]


def calibrate(
    model: Model, prompts: Sequence[Sequence[int]], reply_tokens: int = REPLY_TOKENS, threads: int | None = None,
    flash_attn: bool = True, tell: Callable[[int], None] = lambda done: None,
) -> Calibration:  # fmt: skip
    """Answer ``prompts`` (tokens) with at most ``reply_tokens`` each and measure. ``tell`` hears how many are done.

    Raises UnsupportedModel, with the reason, for a model that cannot have a per-head store, UsageError for replies that are longer
    than the model was trained for or its cells than memory, and if no token of a reply was decoded.
    """
    n = _cells(model, max(map(len, prompts)), reply_tokens)
    mass = HeadSettings().demand_mass
    with LlamaContext(model.llama, n_cells=n, n_batch=_BATCH_TOKENS, n_ubatch=_BATCH_TOKENS, n_threads=threads, flash_attn=flash_attn,
                      paging=False, n_outputs=1) as context:  # fmt: skip
        store = HeadStore(context, n, observe=1, queries=False)
        demand = Demand(store.n_layers, mass)
        for prompt in prompts:
            context.clear()
            _answer(model, context, store, list(prompt), reply_tokens, demand)
            demand.end_prompt()
            tell(demand.prompts)
    try:
        return demand.result(fingerprint(model.path))
    except ValueError as error:
        raise UsageError(f"{model.name} ended every reply with its first token, so {error}") from None


def _cells(model: Model, prompt_tokens: int, reply_tokens: int) -> int:
    """Cells of each head for the longest probe with its reply; they are allocated at once, so they must fit. Raises UsageError."""
    n, trained = prompt_tokens + reply_tokens, model.llama.n_ctx_train
    if n > trained:
        left = trained - prompt_tokens
        further = f"give -n {left} or less" if left > 0 else "so no reply can be measured"
        raise UsageError(f"-n {reply_tokens}: the longest probe has {counted(prompt_tokens, 'token')}, with that reply {n:,}, and {model.name} was trained on {trained:,}; {further}")
    with LlamaContext(model.llama, n_cells=_PROBE_CELLS, n_batch=16, n_ubatch=16, n_threads=1, paging=False) as context:
        needed = 2 * n * context.token_bytes  # the context's own cells are there until the store has taken their place
    try:
        free = machine.memory().free_bytes
    except EngineError:  # a system that does not say
        return n
    if needed > free:
        most = n * free // needed - prompt_tokens
        further = f"give -n {most} or less" if most > 0 else "close other programs"
        raise UsageError(f"-n {reply_tokens}: {counted(n, 'cell')} a head take {format_bytes(needed)} while they are made, {format_bytes(free)} are free; {further}")
    return n


def _answer(model: Model, context: LlamaContext, store: HeadStore, prompt: list[int], reply_tokens: int, demand: Demand) -> None:
    store.observe(False)
    for start in range(0, len(prompt), _BATCH_TOKENS):
        piece = prompt[start : start + _BATCH_TOKENS]
        context.decode(piece, range(start, start + len(piece)))
    store.observe(True)
    for position in range(len(prompt), len(prompt) + reply_tokens):
        token = int(context.logits().argmax())
        if model.llama.is_eog(token):
            return
        context.decode([token], [position])
        for layer in range(store.n_layers):
            held = store.positions(layer)[0] >= 0  # all heads hold the same tokens, in the same cells
            demand.add(layer, store.weights(layer)[:, :, held])


def wave_lines(calibration: Calibration, width: int = 40) -> list[str]:
    """The demand of each layer as bars of text."""
    most = max(calibration.demand)
    bars = [max(1, round(width * d / most)) for d in calibration.demand]
    return [f"layer {i:>3}  {d:>8.1f} tokens  {'#' * bar}" for i, (d, bar) in enumerate(zip(calibration.demand, bars, strict=True))]


def plot(path: Path, calibration: Calibration, name: str, layer_tokens: np.ndarray, budget_tokens: int) -> None:
    """Draw the demand, and the cells a head that it comes to at a budget, as a PNG, whose folder is made. Raises UsageError without matplotlib."""
    from .evaluate_report import require_matplotlib

    require_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4.8), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(2, 1, sharex=True)
    rows = (calibration.demand, layer_tokens), (f"tokens for {calibration.mass:g} of it", f"cells of {budget_tokens} a head")
    for axes, values, label, colour in zip(panels, *rows, ("C0", "C1"), strict=True):
        axes.plot(range(len(calibration.demand)), values, marker="o", color=colour)
        axes.set(ylabel=label, ylim=(0, None))
    panels[0].set_title(f"{name}: attention of each layer, and the cells it gets")
    panels[1].set_xlabel("layer")
    panels[1].xaxis.get_major_locator().set_params(integer=True)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, format="png", dpi=120)
    except (OSError, ValueError) as error:
        raise UsageError(f"--plot {path}: {error}") from None
