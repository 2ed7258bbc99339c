"""What an engine needs for a per-head policy before a text begins: the policy itself, its layer budgets, its store.

`engine.py` calls it; what runs then is `heads_generation.py`. Calibrations are looked for by `calibrations.py`.
"""

from __future__ import annotations

import numpy as np

from . import calibrations
from .engine_config import EngineConfig
from .errors import BudgetError
from .generation import pinned_ranges
from .heads_cache import HeadCells
from .libllama import LlamaContext
from .libllama.heads import HeadStore
from .model import Model
from .policies import POLICIES
from .policies.heads import HeadPolicy, HeadSettings

OBSERVED_TOKENS = 32
"""Tokens of a prompt that are decoded at once where the attention of every one of them is wanted: their weights over all
cells of all heads are in memory together."""


def head_policy(model: Model, config: EngineConfig) -> HeadPolicy:
    """The policy that ``config`` names, with the model's calibration if it wants one.

    Raises UsageError, with the command to type, if there is none or only one of another model.
    """
    kind = POLICIES[config.policy]
    settings = HeadSettings(
        pin_prompt=config.pin_prompt, seed=config.seed, dense_layers=config.dense_layers, select_every_tokens=config.refresh or 1,
        cluster_query=config.cluster_query, clusters_added=config.clusters_added,
    )  # fmt: skip
    return kind(settings, calibrations.find(model.path)) if kind.calibrated else kind(settings)


def reserved_tokens(prompt_tokens: int, budget_tokens: int, policy: HeadPolicy) -> int:
    """What every layer must hold: what is pinned of a prompt and the tokens whose queries vote, or beside what is kept under a
    policy that recalls, a token and a selected one, and one that is tried."""
    pinned = pinned_ranges(prompt_tokens, budget_tokens, policy)
    if policy.recalls:
        return policy.kept_tokens(prompt_tokens, pinned) + 2 + (policy.settings.cluster_query == "own")
    return sum(stop - start for start, stop in pinned) + policy.settings.observation_tokens


def layer_tokens(policy: HeadPolicy, n_layers: int, budget_tokens: int, prompt_tokens: int, length_tokens: int) -> np.ndarray:
    """int64 [n_layers]: cells of each KV head in each layer, ``n_layers * budget_tokens`` in all.

    ``length_tokens`` is the longest that prompt and reply can become. Every layer holds what is reserved. Raises BudgetError if it cannot.
    """
    reserved = reserved_tokens(prompt_tokens, budget_tokens, policy)
    try:
        return policy.layer_budgets(n_layers, budget_tokens, reserved, length_tokens)
    except ValueError as error:
        if policy.recalls and policy.settings.dense_layers:
            raise BudgetError(_dense_layers_refused(policy, n_layers, budget_tokens, reserved, length_tokens)) from None
        raise BudgetError(f"--kv-budget {budget_tokens}: {error}; take a larger budget") from None


def _dense_layers_refused(policy: HeadPolicy, n_layers: int, budget_tokens: int, reserved: int, length_tokens: int) -> str:
    dense = min(policy.settings.dense_layers, n_layers)
    total, needed = n_layers * budget_tokens, dense * length_tokens + (n_layers - dense) * reserved
    return (
        f"--dense-layers {dense}: {dense} of {n_layers} layers with all {length_tokens} tokens and {reserved} in each of the others are {needed}"
        f" cells a KV head, --kv-budget {budget_tokens} has {total}; take --kv-budget {min(length_tokens, -(-needed // n_layers))}, a smaller -n"
        " or --dense-layers 0"
    )


def head_cells(context: LlamaContext, policy: HeadPolicy, tokens: np.ndarray) -> HeadCells:
    """A store of ``tokens`` (`layer_tokens`) in place of the cells of ``context``, which must be new.

    Its heads share a layer's cells if the policy moves their budgets. Raises UnsupportedModel, with the reason.
    """
    summed = "accumulated" in policy.needs
    shared = policy.moves_head_budgets
    observe = OBSERVED_TOKENS if summed else 1 if policy.recalls else policy.settings.observation_tokens
    store = HeadStore(context, tokens.tolist(), share=shared, observe=observe, weights=summed, queries="queries" in policy.needs)
    return HeadCells(store, tokens, shared)
