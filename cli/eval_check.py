"""Whether an engine would take every cell of a grid, found out before the first problem is solved. `eval.py` calls it.

The model is opened without its weights, and an engine is made on it for each configuration: what it refuses then, after the cells
before it have run for hours, it refuses now.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zoomr_local.errors import BudgetError, ZoomrError

from . import summaries

if TYPE_CHECKING:
    from zoomr_local.evaluate import Cell, Suite
    from zoomr_local.problems import Problem


def check(cells: Iterable[Cell], suite: Suite, model_file: Path, n_gpu_layers: int = 0) -> None:
    """Raises what an engine would of a cell's configuration, and BudgetError for cells that layers cannot share out for any problem."""
    from zoomr_local import trial
    from zoomr_local.engine import Engine
    from zoomr_local.libllama import LlamaModel
    from zoomr_local.model import Model

    llama = LlamaModel(trial.check(model_file), n_gpu_layers=n_gpu_layers, no_alloc=True)
    with closing(Model(model_file, llama, summaries.user_markers())) as model:
        seen = set()
        for cell in cells:
            if cell.config not in seen:
                Engine(model, cell.config).close()
                seen.add(cell.config)
            _check_layers(model, cell, suite.problems[cell.family], suite.max_tokens[cell.family])


def _check_layers(model: Any, cell: Cell, problems: Iterable[Problem], max_tokens: int) -> None:
    """Raises BudgetError if layers have too few cells for every problem: one that finds them is enough, as the others fail alone."""
    from zoomr_local.heads_setup import head_policy, layer_tokens
    from zoomr_local.policies import POLICIES

    if POLICIES[cell.policy].unit != "head":
        return
    policy, refused = head_policy(model, cell.config), None
    for problem in problems:
        try:
            n = len(model.tokenize(model.render(list(problem.messages))))
            layer_tokens(policy, model.llama.n_layer, cell.config.kv_budget, n, n + max_tokens)
            return
        except BudgetError as error:
            refused = refused or error
        except ZoomrError:  # a prompt that cannot be made is its record's matter
            return
    if refused is not None:
        raise type(refused)(str(refused).replace("a smaller -n", "a smaller --max-tokens"))  # here -n counts problems
