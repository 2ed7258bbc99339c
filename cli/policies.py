"""`zoomr policies`: the registry, one line each. The registry itself is `zoomr_local/policies`."""

from __future__ import annotations

import json

from . import options


def policies(as_json: options.Json = False) -> None:
    """List the policies that --policy takes."""
    from zoomr_local.policies import POLICIES

    if as_json:
        print(json.dumps({name: policy.headline for name, policy in POLICIES.items()}))
        return
    width = max(map(len, POLICIES))
    for name, policy in POLICIES.items():
        print(f"{name:<{width}}  {policy.headline}")
