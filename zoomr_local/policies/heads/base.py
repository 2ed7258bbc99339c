"""What a per-head policy sees of a layer and what it answers: arrays and sizes in, cells to keep out.

The lower group of policies: every layer and KV head keeps its own tokens. Two columns are apart here: who gets how many
cells (`layer_budgets`, `head_budgets`) and which tokens stay (`scores`, `keep`). Nothing here touches a cell or a model.

Every size is a count of tokens, which in one layer and KV head is a count of cells. m = cells of a KV head in the layer,
g = query heads a KV head. Query heads h*g .. h*g+g-1 read KV head h.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace

import numpy as np

from .allocation import apportion
from .settings import DECIMALS, HeadSettings


@dataclass(frozen=True)
class LayerView:
    """One layer's cells, in any order, and what a policy `needs` of the rest. Rows of ``weights`` and ``queries`` are the
    newest tokens', oldest first."""

    positions: np.ndarray
    """int32 [n_kv_head, m]: logical position of the token in each cell; anything where not valid."""
    valid: np.ndarray
    """bool [n_kv_head, m]: the cell holds a token."""
    pinned: np.ndarray
    """bool [n_kv_head, m]: prompt tokens that are kept for all policies unless ``pin_prompt`` is off."""
    weights: np.ndarray | None = None
    """float32 [w, n_head, m]: soft-maxed attention of the last w tokens over the cells as they are filled now; 0 where
    the cell is not valid or its token was not there for that query."""
    keys: np.ndarray | None = None
    """float32 [n_kv_head, m, d]: keys after RoPE."""
    queries: np.ndarray | None = None
    """float32 [w, n_head, d]: queries after RoPE of the last w tokens."""
    accumulated: np.ndarray | None = None
    """float64 [n_kv_head, m]: all attention each cell's token has had so far (`h2o.Accumulated`)."""
    scale: float | None = None
    """The attention's factor on query x key; None is 1 / sqrt(d)."""
    layer: int = 0
    """The layer's number, for messages."""

    def __post_init__(self) -> None:
        """Raises ValueError if the arrays do not belong together."""
        n_kv_head, m = self.positions.shape
        w, n_head = next((len(a), a.shape[1]) for a in (self.weights, self.queries, np.zeros((0, n_kv_head))) if a is not None)
        d = next((a.shape[-1] for a in (self.keys, self.queries) if a is not None), 0)
        shapes = {
            "valid": (n_kv_head, m), "pinned": (n_kv_head, m), "accumulated": (n_kv_head, m),
            "weights": (w, n_head, m), "keys": (n_kv_head, m, d), "queries": (w, n_head, d),
        }  # fmt: skip
        for name, shape in shapes.items():
            array = getattr(self, name)
            if array is not None and array.shape != shape:
                raise ValueError(f"layer {self.layer}: {name} has shape {array.shape}, must be {shape}")
        if n_head % n_kv_head:
            raise ValueError(f"layer {self.layer}: {n_head} query heads cannot share {n_kv_head} KV heads evenly")

    @property
    def counts(self) -> np.ndarray:
        """int64 [n_kv_head]: tokens that each KV head holds."""
        return self.valid.sum(axis=1)

    def order(self) -> np.ndarray:
        """int64 [n_kv_head, m]: cell numbers by age, the oldest token first, cells without a token last."""
        return np.argsort(np.where(self.valid, self.positions, np.iinfo(np.int32).max), axis=1, kind="stable")

    def taken(self, order: np.ndarray) -> LayerView:
        """The same tokens with cell ``order[h, i]`` at place i; with ``order()``, place is age. O(n_kv_head * m * (d + w * g))."""
        moved = {}
        for name in ("positions", "valid", "pinned", "accumulated"):
            array = getattr(self, name)
            moved[name] = None if array is None else np.take_along_axis(array, order, axis=1)
        if self.weights is not None:
            w, n_head, m = self.weights.shape
            by_group = self.weights.reshape(w, len(order), n_head // len(order), m)
            moved["weights"] = np.take_along_axis(by_group, order[None, :, None, :], axis=-1).reshape(self.weights.shape)
        if self.keys is not None:
            moved["keys"] = np.take_along_axis(self.keys, order[:, :, None], axis=1)
        return replace(self, **moved)

    def newest(self, tokens: np.ndarray | int) -> np.ndarray:
        """bool [n_kv_head, m] of a view by age: the newest ``tokens`` (a number, or one a KV head)."""
        place, counts = np.arange(self.valid.shape[1]), self.counts[:, None]
        return (place < counts) & (place >= counts - np.reshape(tokens, (-1, 1)))


@dataclass
class HeadPolicy:
    """Base of all per-head policies. The attributes that `policies.Policy` has too mean the same."""

    settings: HeadSettings = field(default_factory=HeadSettings)

    name = ""
    headline = ""
    unit = "head"
    uses_votes = False
    drops = True
    recalls = False
    """What leaves the cells waits in a tier and may come back; such a policy `drops` nothing."""
    calibrated = False
    """Made with the model's `Calibration` as a second argument."""
    moves_head_budgets = False
    """`head_budgets` is to be asked every ``head_every_tokens``, not only once."""

    @property
    def pins_prompt(self) -> bool:
        """Whether the prompt stays in every head."""
        return self.settings.pin_prompt

    @property
    def needs(self) -> frozenset[str]:
        """Fields of LayerView that the policy reads beyond positions, valid and pinned."""
        return frozenset()

    def layer_budgets(
        self, n_layer: int, budget_tokens: int, reserved_tokens: int = 0, length_tokens: int | None = None
    ) -> np.ndarray:
        """int64 [n_layer]: cells of each KV head in each layer; they sum to exactly ``n_layer * budget_tokens``.

        ``reserved_tokens`` are kept in every head whatever its score (pinned prompt and newest tokens), so that no layer gets
        less; ``length_tokens`` is the longest text that the run may reach, for policies with layers that keep everything.
        Raises ValueError if the budget does not hold what is reserved.
        """
        free_tokens(budget_tokens, reserved_tokens)
        return np.full(n_layer, budget_tokens, np.int64)

    def head_budgets(self, view: LayerView, layer_tokens: int, most_tokens: int | None = None) -> np.ndarray:
        """int64 [n_kv_head]: how the layer's ``layer_tokens`` cells (over all its KV heads) are shared, to exactly that sum.

        ``most_tokens`` is what a head has cells for, None if that has no limit.
        """
        return apportion(layer_tokens, np.ones(len(view.positions)), most=most_tokens)

    def pins(self, view: LayerView) -> np.ndarray:
        """bool [n_kv_head, m]: the cells that stay because they are pinned."""
        return view.pinned & view.valid if self.settings.pin_prompt else np.zeros_like(view.valid)


class KeepBest(HeadPolicy):
    """A token policy: pinned tokens, the newest ones, and those that score best in the rest of each head's budget."""

    def scores(self, view: LayerView) -> np.ndarray:
        """float64 [n_kv_head, m] for a view by age: the greater, the longer a token stays."""
        raise NotImplementedError

    def recent_tokens(self, room: np.ndarray) -> np.ndarray:
        """int64 [n_kv_head]: how many of the newest tokens that are not pinned stay, of ``room`` cells beside the pinned ones."""
        return np.minimum(self.settings.observation_tokens, room)

    def reserved(self, view: LayerView, tokens: np.ndarray | int) -> np.ndarray:
        """bool [n_kv_head, m] for a view by age: pinned tokens, and the newest ``tokens`` of those that are not pinned."""
        pins = self.pins(view)
        others = view.valid & ~pins
        not_younger = np.cumsum(others[:, ::-1], axis=1)[:, ::-1]
        return pins | (others & (not_younger <= np.reshape(tokens, (-1, 1))))

    def forced(self, view: LayerView, budgets: np.ndarray) -> np.ndarray:
        """bool [n_kv_head, m] for a view by age: the cells that stay whatever their score.

        Raises ValueError if a budget cannot hold the pinned tokens and the newest one, which the engine must keep.
        """
        pins = self.pins(view)
        room = budgets - pins.sum(axis=1)
        need = (pins | view.newest(1)).sum(axis=1)
        short = np.flatnonzero(need > budgets)
        if len(short):
            h = int(short[0])
            raise ValueError(f"layer {view.layer}, KV head {h}: a budget of {budgets[h]} cells cannot hold {need[h]} pinned and newest tokens")
        return self.reserved(view, self.recent_tokens(room))

    def keep(self, view: LayerView, budgets: np.ndarray) -> np.ndarray:
        """bool [n_kv_head, m]: the cells whose tokens stay, at most ``budgets`` (int [n_kv_head]) a head; all if they fit.

        Raises ValueError as `forced` does, and for a view without what the policy `needs`.
        """
        budgets = np.broadcast_to(np.asarray(budgets, np.int64), len(view.positions))
        order = view.order()
        aged = view.taken(order)
        forced = self.forced(aged, budgets)
        if (view.counts <= budgets).all():
            return view.valid.copy()
        kept = np.zeros_like(view.valid)
        np.put_along_axis(kept, order, best(self._scored(aged), forced, aged.valid, budgets), axis=1)
        return kept

    def _scored(self, view: LayerView) -> np.ndarray:
        missing = [f.name for f in fields(view) if f.name in self.needs and getattr(view, f.name) is None]
        if missing:
            raise ValueError(f"policy {self.name}: layer {view.layer} comes without {' and '.join(missing)}")
        return self.scores(view)


def best(scores: np.ndarray, forced: np.ndarray, valid: np.ndarray, budgets: np.ndarray) -> np.ndarray:
    """bool [n_kv_head, m]: ``forced``, and in the rest of each head's budget the valid cells with the greatest scores.

    Scores are rounded to ``DECIMALS`` places; of equal ones the first stays. O(n_kv_head * m log m).
    """
    eligible = valid & ~forced
    order = np.argsort(np.where(eligible, -np.round(scores, DECIMALS), np.inf), axis=1, kind="stable")
    room = (budgets - forced.sum(axis=1))[:, None]
    chosen = np.zeros_like(valid)
    np.put_along_axis(chosen, order, np.arange(valid.shape[1]) < room, axis=1)
    return forced | (chosen & eligible)


def free_tokens(budget_tokens: int, reserved_tokens: int) -> int:
    """What a budget leaves beside reserved tokens. Raises ValueError if it does not hold them."""
    if reserved_tokens > budget_tokens:
        raise ValueError(f"a budget of {budget_tokens} tokens cannot hold the {reserved_tokens} that are pinned or newest")
    return budget_tokens - reserved_tokens
