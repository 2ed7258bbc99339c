"""Flags that several commands share, and how their text becomes settings.

Spellings follow llama.cpp where it has the flag. Owns no behaviour: `solve.py` and `demo.py` read these.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable
from itertools import product
from pathlib import Path
from typing import Annotated, Any

import typer

from zoomr_local.errors import UsageError
from zoomr_local.sizes import parse_bytes, shortened

_SMALL_MODEL_BYTES = 32 << 20
_MODEL, _CACHE, _TIERS, _SELECT, _SAMPLE = "Model", "KV cache", "Tiers", "What is zoomed", "Sampling"


def policy_names() -> list[str]:
    """The registry's names, for completion in a shell and for messages."""
    from zoomr_local.policies import POLICIES

    return list(POLICIES)


def model_names() -> list[str]:
    """What -m takes by name here and now, for completion in a shell: bundled models, and those in the hub's cache."""
    from zoomr_local import hub_cache

    return [*bundled_models(), *(str(cached.reference) for cached in hub_cache.cached_models())]


def _option(panel: str, *names: str, **more) -> typer.models.OptionInfo:
    return typer.Option(*names, rich_help_panel=panel, **more)


Model = Annotated[
    Path | None,
    _option(
        _MODEL, "-m", "--model", metavar="MODEL", envvar="ZOOMR_MODEL", autocompletion=model_names,
        help="A .gguf file, user/repo[:quant] of the Hugging Face hub, or a bundled name. Default: the bundled zoomr-tiny.",
    ),  # fmt: skip
]
GpuLayers = Annotated[
    int,
    _option(_MODEL, "--n-gpu-layers", "-ngl", metavar="N", min=0, max=2**31 - 1, help="Layers on the GPU, if the engine was built for one."),
]
Threads = Annotated[
    int | None,
    _option(_MODEL, "-t", "--threads", metavar="N", min=1, max=512, help="CPU threads. Default: one a core; 1 for models below 32 MiB."),
]

Policy = Annotated[
    str,
    _option(
        _CACHE, "--policy", metavar="NAME", autocompletion=policy_names,
        help="What stays in the cache; `zoomr policies` lists them.",
    ),  # fmt: skip
]
KvBudget = Annotated[
    str | None,
    _option(
        _CACHE, "--kv-budget", metavar="TOKENS|SIZE|auto",
        help="Cells of KV cache, never exceeded: 512, 4k, 64MiB, or what `zoomr plan` would choose. Default: 512.",
    ),  # fmt: skip
]
KvType = Annotated[str, _option(_CACHE, "--kv-type", metavar="TYPE", help="Type of K and V in cells: f16 or q8_0.")]
FlashAttn = Annotated[bool, _option(_CACHE, "--flash-attn/--no-flash-attn", help="Fused attention kernels.")]

KvRam = Annotated[
    str, _option(_TIERS, "--kv-ram", metavar="SIZE", help="Most RAM for what left the cache: 1GiB, 64MiB, 500MB; 0 is none.")
]
KvDisk = Annotated[
    str, _option(_TIERS, "--kv-disk", metavar="SIZE", help="Most disk for what RAM has no room for; 0 is none.")
]
KvDir = Annotated[
    Path | None, _option(_TIERS, "--kv-dir", metavar="DIR", help="Folder of the disk tier. Default: the user's cache folder.")
]
KvPageType = Annotated[
    str,
    _option(_TIERS, "--kv-page-type", metavar="TYPE", help="How pages are stored: f16 (lossless), or q8_0 or q4_0, which are lossy."),
]
OnFull = Annotated[
    str,
    _option(
        _TIERS, "--on-full", metavar="WHAT",
        help="When both tiers are full: drop the least-voted blocks to their summaries, stop the reply, or error.",
    ),  # fmt: skip
]
WaitForDisk = Annotated[
    bool,
    _option(
        _TIERS, "--wait-for-disk/--no-wait-for-disk",
        help="Take in a chosen block that is on disk at once, not at the next selection.",
    ),  # fmt: skip
]

Refresh = Annotated[int | None, _option(_SELECT, "--refresh", metavar="N", help="Tokens between two selections, at most.")]
VotesPerHead = Annotated[int | None, _option(_SELECT, "--votes-per-head", metavar="N", help="Blocks each head votes for; 0: it shares one vote by its softmax.")]
ZoomedBlocks = Annotated[int | None, _option(_SELECT, "--zoomed-blocks", metavar="N", help="Most blocks zoomed at once.")]
Window = Annotated[
    int | None,
    _option(_SELECT, "--window", metavar="N", help="Tokens of the newest blocks that stay whole."),
]
VoteWindow = Annotated[int | None, _option(_SELECT, "--vote-window", metavar="N", help="Tokens whose votes are summed.")]
VoteLayers = Annotated[
    str | None, _option(_SELECT, "--vote-layers", metavar="LIST", help="Layers that vote: 2,3. Default: all.")
]
SummaryRows = Annotated[
    int | None, _option(_SELECT, "--summary-rows", metavar="N", help="Index rows a summary gets, at most 8; its best one counts.")
]
Summaries = Annotated[
    str,
    _option(
        _SELECT, "--summaries", metavar="MODE",
        help="How thoughts become blocks: learned (the model's markers), prompted, extractive, off; auto is what the model allows.",
    ),  # fmt: skip
]
ThoughtMin = Annotated[
    int | None,
    _option(_SELECT, "--thought-min", metavar="N", help="Least tokens of a thought that prompted and extractive cut. Default: 128."),
]
SummaryMax = Annotated[
    int | None,
    _option(_SELECT, "--summary-max", metavar="N", help="Most tokens the model writes in a prompted summary. Default: 48."),
]
BeaconEvery = Annotated[
    int | None,
    _option(_SELECT, "--beacon-every", metavar="N", help="Tokens that a beacon of breadcrumbs stands for, of those trained. Default: the model's first."),
]
Sinks = Annotated[
    int,
    _option(_SELECT, "--sinks", metavar="N", help="First tokens kept by policies that do not pin the prompt."),
]

MaxTokens = Annotated[
    int,
    _option(_SAMPLE, "-n", "--max-tokens", metavar="N", min=1, max=2**31 - 1, help="Most tokens of a reply, thoughts included."),
]
Temperature = Annotated[float, _option(_SAMPLE, "--temp", metavar="X", help="0 is greedy.")]
TopK = Annotated[int, _option(_SAMPLE, "--top-k", metavar="N", help="0 is off.")]
TopP = Annotated[float, _option(_SAMPLE, "--top-p", metavar="X", help="1 is off.")]
MinP = Annotated[float, _option(_SAMPLE, "--min-p", metavar="X", help="0 is off.")]
RepeatPenalty = Annotated[float, _option(_SAMPLE, "--repeat-penalty", metavar="X", help="1 is off.")]
RepeatLastN = Annotated[
    int,
    _option(_SAMPLE, "--repeat-last-n", metavar="N", help="Tokens the repetition penalty looks back."),
]
Seed = Annotated[int, _option(_SAMPLE, "--seed", metavar="N", help="Seed of sampling and of policy `random`.")]
Stop = Annotated[
    list[str] | None, _option(_SAMPLE, "--stop", metavar="TEXT", help="End the reply here (repeatable).")
]

Json = Annotated[bool, typer.Option("--json", help="Print the result as one JSON object on stdout.")]
Quiet = Annotated[bool, typer.Option("-q", "--quiet", help="No progress and no summary on stderr; errors stay.")]
Trace = Annotated[
    Path | None,
    typer.Option("--trace", metavar="FILE", help="Record what the cache does, texts included, for `zoomr view`; adds to a trace that is there."),
]


def token_count(flag: str, text: str) -> int:
    """A count of tokens: ``512``, ``4k`` (4096), ``1.5k``. Raises UsageError."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kK]?)\s*", text)
    value = float(match.group(1)) * (1024 if match.group(2) else 1) if match else 0.0
    if not 1 <= value < 2**31 or value != int(value):  # in this order: the float of hundreds of digits is infinite
        raise UsageError(f"{flag} {shortened(text)}: give a number of tokens, for example 512 or 4k")
    return int(value)


def is_token_count(text: str) -> bool:
    """True for ``512`` and ``4k``, which are tokens; ``512MiB``, ``64KB`` and ``1g`` are bytes."""
    return re.fullmatch(r"\s*\d+(?:\.\d+)?\s*[kK]?\s*", text) is not None


def budget(policy: str, text: str | None, model: Path, quiet: bool = False, **more) -> dict[str, int]:
    """``kv_budget`` for an EngineConfig, or nothing: ``full`` takes the cells it needs, and says so if told otherwise.

    ``model`` and ``more`` are for `budget_tokens`."""
    if text is None:
        return {}
    if policy == "full":
        if text != "auto" and is_token_count(text):
            token_count("--kv-budget", text)
        print("note: policy full keeps every token, so --kv-budget is not used", file=sys.stderr)
        return {}
    return {"kv_budget": budget_tokens(text, model, policy, quiet, **more)}


def check_policies(
    policies: Iterable[str], budgets: Iterable[int], beacons: Iterable[int | None], model: Path, n_gpu_layers: int = 0
) -> None:
    """Raises what an engine would of a policy that needs a model trained for it, from the metadata alone: before a long run,
    not in the middle of it."""
    from zoomr_local.policies import POLICIES

    if all(POLICIES[name].unit != "beacon" for name in policies):
        return

    from zoomr_local.beacon_generation import check_beacons
    from zoomr_local.libllama import LlamaModel
    from zoomr_local.model import Model

    opened = Model(model, LlamaModel(model, n_gpu_layers=n_gpu_layers, no_alloc=True))
    try:
        for budget, every in product(budgets, beacons):
            check_beacons(opened, every, budget)
    finally:
        opened.close()


def budget_tokens(
    text: str, model: Path, policy: str = "zoomr", quiet: bool = False, *, kv_type: str = "f16", flash_attn: bool = True,
    n_gpu_layers: int = 0, kv_ram_bytes: int = 0, longest_tokens: int | None = None,
) -> int:  # fmt: skip
    """Tokens of ``--kv-budget``: a count, a size in bytes, or ``auto``. Says on stderr what was chosen, and why.

    A count that ``auto`` could choose too is taken as it is; everything else is planned for, which opens the model's
    metadata, and refused if it does not fit beside the weights and a RAM tier of ``kv_ram_bytes`` (that ``longest_tokens``
    fill at most). Raises UsageError for other text, BudgetError with the numbers for what does not fit.
    """
    from zoomr_local.fit import AUTO_MOST_TOKENS
    from zoomr_local.policies import POLICIES

    tokens = budget_count(text)
    if tokens is not None and tokens <= AUTO_MOST_TOKENS:
        return tokens

    from zoomr_local import trial  # loads the native library
    from zoomr_local.plan import Measurer
    from zoomr_local.planner import Machine, budget_for

    trial.check(model)
    with Measurer(model, n_gpu_layers=n_gpu_layers, flash_attn=flash_attn) as measured:
        tier = 0
        kind = POLICIES[policy]
        if measured.refused is None and (kind.unit == "block" or kind.unit == "head" and kind.recalls):
            most = longest_tokens * measured.page_token_bytes("f16", kv_type) if longest_tokens else kv_ram_bytes
            tier = min(kv_ram_bytes, most)
        chosen = budget_for(
            measured, Machine.here(), text, kv_type, tokens=tokens, uses_votes=POLICIES[policy].uses_votes, ram_tier_bytes=tier
        )
        if not quiet and (tokens is None or tokens > measured.trained_tokens):
            print(chosen.why, file=sys.stderr)
    return chosen.tokens


def budget_count(text: str) -> int | None:
    """Tokens of ``--kv-budget`` where they are counted; None for ``auto`` and sizes. Raises UsageError for other text."""
    if is_token_count(text):
        return token_count("--kv-budget", text)
    if text != "auto":
        try:
            parse_bytes(text)
        except UsageError:
            raise UsageError(f"--kv-budget {shortened(text)}: give a number of tokens (512, 4k), a size (512MiB), or auto") from None
    return None


def tiers(
    kv_ram: str, kv_disk: str, kv_dir: Path | None, kv_page_type: str, on_full: str, wait_for_disk: bool
) -> dict[str, Any]:
    """The tiers' fields of an EngineConfig. Raises UsageError for what is not a size."""
    return {
        "kv_ram": parse_bytes(kv_ram, "--kv-ram"), "kv_disk": parse_bytes(kv_disk, "--kv-disk"),
        "kv_dir": kv_dir and folder("--kv-dir", kv_dir), "kv_page_type": kv_page_type, "on_full": on_full,
        "wait_for_disk": wait_for_disk,
    }  # fmt: skip


def folder(flag: str, path: Path) -> Path:
    """``path`` in full. Raises UsageError for the home folder of a user who is not known."""
    try:
        return Path(path).expanduser().absolute()
    except RuntimeError:
        raise UsageError(f"{flag} {path}: there is no such user; write the folder in full") from None


def layer_list(text: str | None) -> tuple[int, ...] | None:
    """``2,3`` as layer numbers; None stays None. Raises UsageError."""
    if text is None:
        return None
    try:
        layers = tuple(int(part) for part in text.split(","))
    except ValueError:
        layers = (-1,)
    if min(layers) < 0:
        raise UsageError(f"--vote-layers {text}: give layer numbers, for example 2,3")
    return layers


def known_policy(name: str) -> str:
    """``name`` if it is in the registry. Raises UsageError with the nearest name and the list."""
    import difflib

    names = policy_names()
    if name in names:
        return name
    near = difflib.get_close_matches(name, names, n=1)
    hint = f" (did you mean {near[0]}?)" if near else ""
    raise UsageError(f"--policy {name}: no such policy{hint}; there are {', '.join(names)}")


def thread_count(given: int | None, model: Path) -> int | None:
    """The user's choice; else one thread for a model so small that sharing its work costs more than the work; else
    None (the engine takes one thread a core). On busy cores the waiting between threads can cost a hundredfold."""
    if given is None and model.is_file() and model.stat().st_size < _SMALL_MODEL_BYTES:
        return 1
    return given


def model_path(given: Path | None) -> Path:
    """The model file to load: the user's, fetched from the hub if that is what was named, or the bundled one.

    Raises ModelError for a name that is nothing, with what it may have meant.
    """
    if given is None:
        return next(iter(bundled_models().values()))
    from zoomr_local import hub

    return hub.resolve(str(given), bundled_models(), tell)


def bundled_models() -> dict[str, Path]:
    """The models that ship with the package, by the name that -m takes; the default one first."""
    from zoomr_models import BUNDLED, bundled_model_path

    return {name: bundled_model_path(name) for name in BUNDLED}


def tell(text: str) -> None:
    """A line on stderr that is said at once."""
    if sys.stderr is not None:  # print would take stdout for it
        print(text, file=sys.stderr, flush=True)
