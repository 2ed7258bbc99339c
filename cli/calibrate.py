"""`zoomr calibrate`: measures once how many tokens each layer of a model attends to, for `--policy reasonalloc`."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from zoomr_local.errors import UsageError

from . import options

_PLOT_BUDGET_TOKENS = 512


def calibrate(
    output: Annotated[Path | None, typer.Option("-o", "--output", metavar="FILE", help="Where to write it. Default: beside the model, or in the user's data folder.", show_default=False)] = None,
    plot: Annotated[Path | None, typer.Option("--plot", metavar="PNG", help="Draw the layers' demand (extra `bench`).", show_default=False)] = None,
    max_tokens: Annotated[int, typer.Option("-n", "--max-tokens", metavar="N", min=1, help="Most tokens of the reply to each probe.")] = 256,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
    model: options.Model = None,
    n_gpu_layers: options.GpuLayers = 0,
    threads: options.Threads = None,
    flash_attn: options.FlashAttn = True,
) -> None:  # fmt: skip
    """Measure how many tokens each layer of a model attends to; `--policy reasonalloc` shares cells out by it."""
    if plot is not None:
        from zoomr_local.evaluate_report import require_matplotlib

        require_matplotlib()
        if plot.is_dir():
            raise UsageError(f"--plot {plot} is a folder; name a PNG file in it")
    from zoomr_local import calibrate as measuring
    from zoomr_local import calibrations
    from zoomr_local.model import Model

    if output is not None:
        calibrations.check_target(output)
    path = options.model_path(model)
    opened = Model.open(path, n_gpu_layers=n_gpu_layers)
    try:
        prompts = measuring.probe_prompts(opened)
        tell = (lambda done: None) if quiet else (lambda done: print(f"{done} of {len(prompts)} probes", file=sys.stderr, flush=True))
        found = measuring.calibrate(opened, prompts, max_tokens, options.thread_count(threads, path), flash_attn, tell)
        name = opened.name
    finally:
        opened.close()
    written = calibrations.write(found, path, output)
    if as_json:  # before the plot: a folder that cannot be written must not cost the figures
        print(json.dumps({"output": str(written), **asdict(found)}), flush=True)
    else:
        print(f"{name}: tokens that hold {found.mass:g} of the attention, mean over {found.queries} queries of {found.prompts} replies")
        print("\n".join(measuring.wave_lines(found)), flush=True)
    if not quiet and not as_json:
        print(f"in {written}", file=sys.stderr)
        if output is not None and output not in calibrations.places(path):
            print(f"note: --policy reasonalloc looks for {calibrations.places(path)[0]}", file=sys.stderr)
    if plot is not None:
        from zoomr_local.policies.heads import ReasonAlloc

        cells = ReasonAlloc(calibration=found).layer_budgets(len(found.demand), _PLOT_BUDGET_TOKENS)
        measuring.plot(plot, found, name, cells, _PLOT_BUDGET_TOKENS)
        if not quiet:
            print(f"drawn: {plot}", file=sys.stderr)
