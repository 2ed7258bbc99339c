"""What a user may choose for an engine, checked, and the settings of a policy that it comes to.

`engine.py` takes it; the command line and Python programs make it. Sizes are tokens or bytes.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from .dialects import LEAST_SUMMARY_MAX, LEAST_THOUGHT_TOKENS, MODES
from .errors import BudgetError, UsageError
from .plan import MIN_BUDGET_TOKENS
from .policies import MAX_ROWS, POLICIES, Settings
from .policies.heads import CLUSTER_CHOICES, CLUSTER_QUERIES
from .tiers import PAGE_TYPES

FLAG_LEAST = {"refresh": 1, "votes_per_head": 0, "zoomed_blocks": 0, "window": 0, "vote_window": 1, "summary_rows": 1,
              "beacon_every": 1, "batch": 1, "sinks": 0, "dense_layers": 0, "clusters_added": 1, "threads": 1, "kv_ram": 0, "kv_disk": 0,
              "thought_min": LEAST_THOUGHT_TOKENS, "summary_max": LEAST_SUMMARY_MAX}

MAX_THREADS = 512
"""ggml's GGML_MAX_N_THREADS. More are no error there: the process ends when the system makes no more of them."""

ON_FULL = ("drop", "stop", "error")

SUMMARY_SHARE = 3
"""By default the resident summaries may take a third of the budget, and so may the window. Of a half, a third and a
quarter, a third lost nothing against a half on `series` dev problems at 256 cells and a quarter lost most (n = 6 to 8)."""


@dataclass(frozen=True)
class EngineConfig:
    """What a user may choose. Sizes are tokens; None means the model's own metadata, else the policy's default.

    ``kv_budget`` is the number of cells in use that is never exceeded; policy ``full`` ignores it and takes as
    many cells as prompt and reply need. ``kv_type`` is the type of K and V in cells: f16 or q8_0.

    ``kv_ram`` and ``kv_disk`` (bytes, 0: none) bound what is stored of blocks that left the cache, ``kv_dir`` is where
    page files go (None: the user's cache folder). ``kv_page_type`` is how they are stored: f16, the cache's own bytes,
    or q8_0 or q4_0, which are lossy. ``on_full``: what happens when neither has room: "drop" forgets the least-voted
    blocks, "stop" ends the reply as ``kv_full``, "error" raises StorageError. ``wait_for_disk``: a block that is on
    disk comes in with the selection that chose it, not with the next.

    ``summaries`` is how thoughts become blocks under a block policy: "learned" by the model's own markers, "prompted" by the
    runtime, "extractive" without summaries, "off"; "auto" takes what the model allows. ``thought_min`` is the least length of
    a thought that is cut in the modes prompted and extractive, ``summary_max`` the most that a model writes in a prompted summary.

    ``pin_prompt`` off: per-head policies may evict the prompt too, as their papers do; the others have no such choice.
    ``dense_layers``: so many first layers hold everything under ``clusterkv``, paid for by the others. ``cluster_query``: what selects
    there for a token, its "own" query or that of the "last" one; ``clusters_added``: clusters for 320 generated tokens.
    """

    policy: str = "zoomr"
    kv_budget: int = 512
    kv_type: str = "f16"
    flash_attn: bool = True
    threads: int | None = None
    batch: int = 512
    refresh: int | None = None
    votes_per_head: int | None = None
    zoomed_blocks: int | None = None
    window: int | None = None
    vote_window: int | None = None
    vote_layers: tuple[int, ...] | None = None
    summary_rows: int | None = None
    beacon_every: int | None = None
    sinks: int = 4
    seed: int = 0
    kv_ram: int = 1 << 30
    kv_disk: int = 8 << 30
    kv_dir: Path | None = None
    kv_page_type: str = "f16"
    on_full: str = "drop"
    wait_for_disk: bool = False
    summaries: str = "auto"
    thought_min: int | None = None
    summary_max: int | None = None
    pin_prompt: bool = True
    dense_layers: int = 0
    cluster_query: str = "own"
    clusters_added: int = 32

    def __post_init__(self) -> None:
        if self.policy not in POLICIES:
            raise UsageError(f"--policy {self.policy}: choose one of {', '.join(POLICIES)}")
        if self.kv_type not in ("f16", "q8_0"):
            raise UsageError(f"--kv-type {self.kv_type}: choose f16 or q8_0")
        if self.kv_type != "f16" and not self.flash_attn:
            raise UsageError(f"--kv-type {self.kv_type} needs flash attention; leave out --no-flash-attn or take f16")
        if POLICIES[self.policy].unit == "head" and self.kv_type != "f16":
            raise UsageError(f"--kv-type {self.kv_type}: policy {self.policy} has f16 cells only; leave it out")
        if not self.pin_prompt and POLICIES[self.policy].unit != "head":
            heads = ", ".join(name for name, policy in POLICIES.items() if policy.unit == "head")
            raise UsageError(f"--pin-prompt off means nothing to policy {self.policy}; it is for {heads}")
        for name in CLUSTER_CHOICES if self.policy != "clusterkv" else ():
            value = getattr(self, name)
            if value != getattr(EngineConfig, name):
                raise UsageError(f"--{name.replace('_', '-')} {value} means nothing to policy {self.policy}; it is for clusterkv")
        if self.cluster_query not in CLUSTER_QUERIES:
            raise UsageError(f"--cluster-query {self.cluster_query}: choose one of {', '.join(CLUSTER_QUERIES)}")
        if self.policy != "full" and self.kv_budget < MIN_BUDGET_TOKENS:
            raise BudgetError(f"--kv-budget {self.kv_budget}: at least {MIN_BUDGET_TOKENS} tokens are needed")
        if self.kv_page_type not in PAGE_TYPES:
            raise UsageError(f"--kv-page-type {self.kv_page_type}: choose one of {', '.join(PAGE_TYPES)}")
        if self.kv_page_type != "f16" and self.kv_type != "f16":
            raise UsageError(f"--kv-page-type {self.kv_page_type} needs --kv-type f16: pages of a {self.kv_type} cache are"
                             f" {self.kv_type} already; leave it out")
        if self.on_full not in ON_FULL:
            raise UsageError(f"--on-full {self.on_full}: choose one of {', '.join(ON_FULL)}")
        if self.summaries not in MODES:
            raise UsageError(f"--summaries {self.summaries}: choose one of {', '.join(MODES)}")
        for name, least in FLAG_LEAST.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise UsageError(f"--{name.replace('_', '-')} {value}: must be at least {least}")
        if self.threads is not None and self.threads > MAX_THREADS:
            raise UsageError(f"--threads {self.threads}: must be at most {MAX_THREADS}")
        if self.kv_budget >= 2**31:
            raise BudgetError(f"--kv-budget {self.kv_budget}: must be below {2**31} tokens")
        if self.summary_rows is not None and self.summary_rows > MAX_ROWS:
            raise UsageError(f"--summary-rows {self.summary_rows}: must be at most {MAX_ROWS}")

    def asked(self) -> dict[str, Any]:
        """What changes results, for a manifest: threads and folders are left out. So is what versions without a choice did (how thoughts
        become blocks, whether the prompt is pinned, what clusterkv has), so that their records are still known."""
        found = asdict(self)
        for name in ("threads", "kv_dir"):
            del found[name]
        before = {"summaries": "auto", "thought_min": None, "summary_max": None, "pin_prompt": True, "dense_layers": 0, "cluster_query": "last", "clusters_added": 8}
        for name, unchosen in before.items():
            if found[name] == unchosen or name in CLUSTER_CHOICES and self.policy != "clusterkv":
                del found[name]
        return found


def resolve_settings(config: EngineConfig, model_settings: dict[str, Any]) -> Settings:
    """The settings in force: the user's choice, else the model's metadata, else the default for the budget."""
    share = config.kv_budget // SUMMARY_SHARE
    settings = replace(Settings(summary_tokens=share, window_tokens=min(Settings.window_tokens, share)), **model_settings)
    chosen = {
        "refresh_tokens": config.refresh,
        "votes_per_head": config.votes_per_head,
        "zoomed_blocks": config.zoomed_blocks,
        "window_tokens": config.window,
        "vote_window_tokens": config.vote_window,
        "vote_layers": config.vote_layers,
        "summary_rows": config.summary_rows,
        "sink_tokens": config.sinks,
        "seed": config.seed,
        "wait_for_disk": config.wait_for_disk,
    }
    return replace(settings, **{name: value for name, value in chosen.items() if value is not None})
