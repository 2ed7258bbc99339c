"""One answer out of several replies to the same problem. Pure: results in, a record's fields out. `solve.py` calls it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

BY = ("majority", "agreement")

_PEAKS = {"resident_peak", "allocated", "budget", "token_bytes", "ram_bytes", "disk_bytes"}
_KEPT = ("seed", "answer", "content", "reasoning", "finish_reason", "thinking_cut", "valid", "correct", "grader", "usage", "tries", "error", "resumed")


def decide(answers: Sequence[str], weights: Sequence[float], same: Callable[[str, str], bool]) -> tuple[int | None, list[int | None]]:
    """The first vote of the group that won, and each vote's group (the index of its first vote).

    An empty answer is no vote: its group is None. A vote joins the first group whose first answer ``same`` calls equal.
    The heaviest group wins, the earliest of equally heavy ones. None if nobody voted.
    """
    groups: list[int | None] = []
    for i, answer in enumerate(answers):
        if not answer:
            groups.append(None)
            continue
        known = [g for j, g in enumerate(groups) if g == j]
        groups.append(next((g for g in known if same(answer, answers[g])), i))
    totals: dict[int, float] = {}
    for group, weight in zip(groups, weights):
        if group is not None:
            totals[group] = totals.get(group, 0.0) + weight
    winner = max(totals, key=lambda g: (round(totals[g], 9), -g), default=None)
    return winner, groups


def weights_of(results: Sequence[dict[str, Any]], by: str) -> list[float]:
    """1 each by majority. By agreement: the mean share of the heads' votes that fell on what was zoomed.

    A reply so short that nothing was ever selected has none; it weighs what the others weigh on average, or 1.
    """
    if by == "majority":
        return [1.0] * len(results)
    known = [r.get("kv", {}).get("agreement") for r in results]
    measured = [a for a in known if a is not None]
    mean = sum(measured) / len(measured) if measured else 1.0
    return [mean if a is None else a for a in known]


def elected(results: Sequence[dict[str, Any]], by: str, asked: int, same: Callable[[str, str], bool]) -> dict[str, Any]:
    """The result of the vote over ``results``, which are those of single replies, at least one.

    Replies that ended by themselves vote; if none did, all do that have an answer. Text and verdict are those of the
    first reply of the group that won (of the first reply, if none has an answer), usage and times are sums, ``votes``
    lists every reply.
    """
    weights = weights_of(results, by)
    voting = [r["finish_reason"] == "stop" for r in results]
    if not any(v and r["answer"] for v, r in zip(voting, results)):
        voting = [r["finish_reason"] != "error" for r in results]
    winner, groups = decide([r["answer"] if v else "" for v, r in zip(voting, results)], weights, same)
    fallback = next((i for i, r in enumerate(results) if "error" not in r), 0)
    chosen = dict(results[fallback if winner is None else winner])
    total = sum(w for w, g in zip(weights, groups) if g is not None)
    won = sum(w for w, g in zip(weights, groups) if g is not None and g == winner)
    lists = [
        {**{name: r[name] for name in _KEPT if name in r}, "agreement": r.get("kv", {}).get("agreement"), "weight": round(w, 6), "group": g}
        for r, w, g in zip(results, weights, groups)
    ]
    for name in ("seed", "tries", "resumed", "warnings"):
        chosen.pop(name, None)
    solved = [r for r in results if "error" not in r]
    if solved:
        chosen.update(_summed(solved))
    chosen["vote"] = {"by": by, "asked": asked, "share": round(won / total, 6) if total else None, "groups": len({g for g in groups if g is not None})}
    chosen["votes"] = lists
    warnings = [text for r in results for text in r.get("warnings", ())]
    return {**chosen, **({"warnings": list(dict.fromkeys(warnings))} if warnings else {})}


def _summed(results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    usage = {name: sum(r["usage"][name] for r in results) for name in results[0]["usage"]}
    prefill, decode = (sum(r["timing"][name] for r in results) for name in ("prefill_s", "decode_s"))
    rate = round(usage["completion_tokens"] / decode, 2) if decode > 0 else None
    kvs = [r["kv"] for r in results]
    kv: dict[str, Any] = {}
    for name, value in kvs[0].items():
        every = [k[name] for k in kvs if k[name] is not None]
        if not every or isinstance(every[0], str | tuple | list):  # a list once it was in the log of replies
            kv[name] = value
        elif name in _PEAKS:
            kv[name] = max(every)
        elif name in ("agreement", "cluster_hit_rate", "resident_mean"):
            kv[name] = round(sum(every) / len(every), 4) if every else None
        else:
            kv[name] = sum(every)
    kv["resident_mean"] = round(kv["resident_mean"], 1)
    return {
        "usage": usage, "kv": kv,
        "timing": {"prefill_s": round(prefill, 6), "decode_s": round(decode, 6), "tokens_per_s": rate},
    }  # fmt: skip
