"""Which settings of files and variables a command has no use for beside its other flags. `settings.py` asks, before they become defaults.

A flag that is typed and means nothing is refused by its command. A setting stands for many runs: it is left out of those that it
does not apply to, and that is said where something would have been another with it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

Get = Callable[[str], Any]
"""The value of a setting by its name: as typed, else as set, else the default; None where the command has no such flag."""

CLUSTER_KEYS = ("dense-layers", "cluster-query", "clusters-added")
KEYS = frozenset({
    "vote-by", "checkpoint-every", "stop", "pin-prompt", *CLUSTER_KEYS, "think-budget", "kv-type", "kv-ram", "kv-disk", "kv-dir", "kv-page-type", "on-full", "wait-for-disk",
    "thoughts", "split",
})  # fmt: skip
_TIERS = ("kv-ram", "kv-disk", "kv-dir", "kv-page-type", "on-full", "wait-for-disk")


def unused(keys: Collection[str], get: Get) -> dict[str, str]:
    """Of the settings ``keys`` those without a use, each with the reason, empty where nothing is lost by leaving it out."""
    found: dict[str, str] = {}
    if not KEYS & set(keys):
        return found  # most runs: the policies are not even imported
    if _count(get("votes")) < 2:
        found["vote-by"] = ""
    elif get("vote-by") == "agreement" and _is_one_policy(get("policy")) and not _any_policy(get("policy"), lambda kind: kind.uses_votes):
        found["vote-by"] = f"policy {get('policy')} counts no votes of heads"
    if get("checkpoint") is None:
        found["checkpoint-every"] = ""
    if get("schema") is not None:
        found["stop"] = "it could cut what --schema asks for"
    if not _any_policy(get("policy"), lambda kind: kind.unit == "head"):
        found["pin-prompt"] = ""
    elif _is_one_policy(get("policy")):
        found |= dict.fromkeys(_TIERS, "") | dict.fromkeys(("think-budget", "kv-type"), f"policy {get('policy')} has no use for it")
    if not _any_policy(get("policy"), lambda kind: kind.unit == "head" and kind.recalls):
        found |= dict.fromkeys(CLUSTER_KEYS, "")
    else:
        found.pop("kv-ram", None)
    if get("suite") not in (None, "bundled"):
        found |= dict.fromkeys(("thoughts", "split"), "")
    if get("kv-type") not in (None, "f16") and "kv-type" not in found:
        found["kv-page-type"] = f"pages of a {get('kv-type')} cache are {get('kv-type')}"
    return {key: why for key, why in found.items() if key in keys}


def _count(value: Any) -> int:
    try:
        return int(value)
    except (TypeError, ValueError):  # the flag itself says what is wrong with it
        return 1


def _is_one_policy(value: Any) -> bool:
    from zoomr_local.policies import POLICIES

    return isinstance(value, str) and value in POLICIES


def _any_policy(value: Any, fits: Callable[[Any], bool]) -> bool:
    """Whether one of the policies of ``--policy`` fits; names that are none do not."""
    from zoomr_local.policies import POLICIES

    names = value if isinstance(value, list | tuple) else [value]
    return any(fits(POLICIES[name]) for text in names for name in map(str.strip, str(text).split(",")) if name in POLICIES)
