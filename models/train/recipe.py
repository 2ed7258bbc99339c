"""Recipes: everything a training run depends on, read from one TOML file.

Owned by models/train; called by the training loop.
"""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from pathlib import Path

from ..tasks import FAMILIES
from ..tokenizer import TOKENS
from .network import Shape


@dataclass(frozen=True)
class Stage:
    """A stretch of the run, until `until` (a share of the whole).

    thoughts: family to (fewest, most); masked: share of steps under the ZoomR mask;
    recall_tokens: size of the recall drill in each step (0: none); recall_pairs: most keys; reading_tokens: size of the
    drill in reading prompts, of the families with long ones in turn; echo_tokens: of the drill, under beacons, in what thoughts say again.
    """

    until: float
    thoughts: dict[str, tuple[int, int]]
    masked: float
    recall_tokens: int
    recall_pairs: int
    index_weight: float
    reading_tokens: int = 0
    echo_tokens: int = 0


MODES = ("joint", "distill")


@dataclass(frozen=True)
class Breadcrumbs:
    """What a run of `breadcrumbs.py` is besides (the reasons are there).

    mode: `joint`, or `distill`, in which the policy stays as it began; warm_up: supervised steps before the first rollout;
    problems and samples: of a step with rollouts, all of one family and length; slack: most tokens of a reply, in reference traces;
    clip: furthest an importance ratio may move; policy_lr: AdamW, of the policy; only_right: distill no wrong reply;
    thoughts: lengths of the problems that are rolled out, if not the stage's; references: supervised steps beside each rollout step,
    in one process all of one family; layers: how many the beacon network has more than the policy, after its first (`gathering.py`), and
    look_weight: of the loss on their attention in the recall drill and in reference traces; repair_weight: of the loss on what they leave to the old layers;
    held_weight: of the loss on what a beacon holds (`held.py`); fall: step from which the beacon network's rates fall to 0 at the end,
    if not the end of the warm-up, as the policy's do; noise: put on the weights that both networks begin with, in standard deviations of each matrix.
    """

    mode: str
    warm_up: int
    problems: int
    samples: int
    temperature: float
    slack: float
    clip: float
    policy_lr: float
    only_right: bool = False
    thoughts: dict[str, tuple[int, int]] | None = None
    references: int = 0
    layers: int = 0
    look_weight: float = 0.0
    repair_weight: float = 0.0
    held_weight: float = 0.0
    fall: int | None = None
    noise: float = 0.0

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ValueError(f"mode is {self.mode!r}; there are {' and '.join(MODES)}")
        if self.references < 0 or self.noise < 0:
            raise ValueError(f"references is {self.references} and noise {self.noise}, must be at least 0")
        if self.layers < 0 or self.layers == 1:
            raise ValueError(f"layers is {self.layers}, must be 0 or at least 2: one for what a beacon parts, the others to gather")
        if self.samples < 2:
            raise ValueError(f"samples is {self.samples}: replies to one problem are compared, so there must be at least 2")


@dataclass(frozen=True)
class Recipe:
    """A run: sizes, rates and stages. `minutes` of training time, or `steps` if that is set.

    processes: how many train side by side, each with `threads` threads and `tokens` tokens a step. decay: whether the rates fall linearly to 0. extra_zooms: whether masks show thoughts that nobody asked for.
    summary_rows: index rows a summary gets. style: `zoomr`, `plain` or `beacons`, with a beacon every c tokens in masked steps, c drawn from
    `beacon_every` (see `batches.task_batch`).
    """

    name: str
    seed: int
    minutes: float
    steps: int
    threads: int
    tokens: int
    lr: float
    embedding_lr: float
    warmup: int
    recall_weight: float
    index_layers: tuple[int, ...]
    average: float
    shape: Shape
    stages: tuple[Stage, ...]
    style: str = "zoomr"
    beacon_every: tuple[int, ...] = ()
    summary_rows: int = 1
    processes: int = 1
    decay: bool = True
    extra_zooms: bool = True
    breadcrumbs: Breadcrumbs | None = None

    def stage(self, progress: float) -> Stage:
        """The stage that `progress`, 0 to 1, falls in."""
        return next((s for s in self.stages if progress < s.until), self.stages[-1])


def _read(path: Path) -> dict:
    """A recipe file's keys, over those of the file beside it that it `extends`, if it does; tables likewise."""
    raw = tomllib.loads(path.read_text())
    base = _read(path.parent / raw.pop("extends")) if "extends" in raw else {}
    tables = {key: {**base[key], **value} for key, value in raw.items() if isinstance(value, dict) and key in base}
    return {**base, **raw, **tables}


def _spans(thoughts: dict[str, list[int]]) -> dict[str, tuple[int, int]]:
    unknown = set(thoughts) - set(FAMILIES)
    if unknown:
        raise ValueError(f"there is no family {' or '.join(sorted(unknown))}; there are {', '.join(FAMILIES)}")
    return {family: (least, most) for family, (least, most) in thoughts.items()}


def load_recipe(path: Path) -> Recipe:
    """Read a recipe file. Raises ValueError, which names it, for one that is no recipe, and OSError for one it extends that is not there."""
    try:
        return _recipe(_read(path))
    except (KeyError, TypeError, ValueError) as error:
        said = f"{error} is missing" if isinstance(error, KeyError) else str(error).replace("__init__() got an unexpected keyword argument", "has no setting")
        raise ValueError(f"{path} is no recipe: {said}") from error


def _recipe(raw: dict) -> Recipe:
    stages = [Stage(**{**stage, "thoughts": _spans(stage["thoughts"])}) for stage in raw.pop("stage")]
    shape = Shape(vocab=len(TOKENS) + (raw.get("style") == "beacons"), **raw.pop("shape"))
    raw["index_layers"], raw["beacon_every"] = tuple(raw["index_layers"]), tuple(raw.get("beacon_every", ()))
    if "breadcrumbs" in raw:
        crumbs = raw["breadcrumbs"]
        raw["breadcrumbs"] = Breadcrumbs(**{**crumbs, "thoughts": _spans(crumbs["thoughts"])} if "thoughts" in crumbs else crumbs)
    return Recipe(shape=shape, stages=tuple(stages), **raw)
