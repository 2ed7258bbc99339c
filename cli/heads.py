"""Flags of the per-head policies, and which other flags they have no use for. `solve.py` and `eval.py` read these."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import typer

from zoomr_local.errors import UsageError

PinPrompt = Annotated[
    str,
    typer.Option(
        "--pin-prompt", metavar="on|off", rich_help_panel="KV cache",
        help="Per-head policies: the prompt stays in every head (on), or is evicted as the rest is, as in the papers (off).",
    ),  # fmt: skip
]

DenseLayers = Annotated[
    int,
    typer.Option(
        "--dense-layers", metavar="N", rich_help_panel="KV cache",
        help="Policy clusterkv: so many first layers keep every token, paid for by the others. The paper has 2.",
    ),  # fmt: skip
]

ClusterQuery = Annotated[
    str,
    typer.Option(
        "--cluster-query", metavar="own|last", rich_help_panel="KV cache",
        help="Policy clusterkv: a token's own query selects for it, which decodes it twice (own), or that of the token before (last).",
    ),  # fmt: skip
]

ClustersAdded = Annotated[
    int,
    typer.Option("--clusters-added", metavar="N", rich_help_panel="KV cache", help="Policy clusterkv: clusters for 320 generated tokens. The paper's code has 8."),
]


def pinned(text: str) -> bool:
    """``on`` or ``off``. Raises UsageError for other text."""
    if text not in ("on", "off"):
        raise UsageError(f"--pin-prompt {text}: choose on or off")
    return text == "on"


def cluster_query(text: str) -> str:
    """One of the engine's words. Raises UsageError for other text, also where no policy of the run would look at it."""
    from zoomr_local.policies.heads import CLUSTER_QUERIES

    if text not in CLUSTER_QUERIES:
        raise UsageError(f"--cluster-query {text}: choose one of {', '.join(CLUSTER_QUERIES)}")
    return text


def check_calibrated(policies: Iterable[str], model: Path) -> None:
    """Raises what an engine would of a policy that needs a calibration of ``model``: before a long run, not in the middle of it."""
    from zoomr_local.policies import POLICIES

    if any(POLICIES[name].unit == "head" and POLICIES[name].calibrated for name in policies) and model.is_file():
        from zoomr_local import calibrations

        calibrations.find(model)


def refuse(policy: str, **flags: Any) -> None:
    """Raises UsageError that names each of ``flags`` (written with _, off or None where it was not given) which ``policy``, if it
    is a per-head one, has no use for."""
    from zoomr_local.policies import POLICIES

    kind = POLICIES[policy]
    if kind.unit != "head":
        return
    given = [f"--{name.replace('_', '-')}" for name, value in flags.items() if value and not (kind.recalls and name == "kv_ram")]
    if given:
        several = "have" if len(given) > 1 else "has"
        stored = "it stores in RAM alone what leaves its cells" if kind.recalls else "nothing is stored outside its cells"
        raise UsageError(f"{' and '.join(given)} {several} no meaning for policy {policy}: {stored}, and"
                         " its replies cannot be taken up again; leave it out or choose another policy")
