"""Figures from turns: medians and spreads, ratios, tables, and the figures in docs/benchmarks.md."""

from __future__ import annotations

import json
import math
import statistics
from pathlib import Path
from typing import Any

BEGIN, END = "<!-- figures: begin -->", "<!-- figures: end -->"
STOCK = ("stock, FA on", "stock, FA off")
OURS = "zoomr"
INTERVAL = "95 % of the median"
"""The heading over `interval_text`."""


def spread(values: list[float]) -> dict[str, Any]:
    """Median, least and greatest of ``values``, and the values themselves, rounded to 5 digits."""
    keep = [float(f"{v:.5g}") for v in values]
    return {"median": float(f"{statistics.median(values):.5g}"), "min": min(keep), "max": max(keep), "values": keep}


def ratio(over: list[float], under: list[float]) -> dict[str, Any]:
    """The spread of ``over`` / ``under``, paired by round, so that a drift of the machine cancels."""
    return spread([a / b for a, b in zip(over, under, strict=True)])


def claims(ms: dict[str, dict[str, Any]], depths: list[int]) -> list[dict[str, Any]]:
    """The issue's ratios between the deepest and the shallowest depth, from ms per token by "name @ depth"."""
    long, short = max(depths), min(depths)

    def at(name: str, depth: int) -> list[float]:
        return ms[f"{name} @ {depth}"]["values"]

    best = min(STOCK, key=lambda name: ms[f"{name} @ {long}"]["median"])
    far, near = depth_name(long), depth_name(short)
    found = [
        (f"speed at {far} over speed at {near}, zoomr", ratio(at(OURS, short), at(OURS, long)), 0.99),
        (f"speed at {far}, zoomr over stock with FA on", ratio(at(STOCK[0], long), at(OURS, long)), 7.2),
        (f"speed at {far}, zoomr over stock's best mode ({best})", ratio(at(best, long), at(OURS, long)), 5.2),
        (f"speed of zoomr at {far} over stock with FA on at {near}", ratio(at(STOCK[0], short), at(OURS, long)), None),
    ]
    return [{"claim": name, **value, "sense": ">=", "target": target} for name, value, target in found]


def own_claims(probe: dict[str, Any], share: dict[str, Any]) -> list[dict[str, Any]]:
    """The issue's shares: of the probe, and of everything outside `llama_decode`."""
    found = [
        (f"cost of the probe, {probe['rows']} index rows", probe["overhead"], 0.03),
        ("time outside `llama_decode`, share of a step", share["outside"], 0.01),
        ("Python alone (without native sampling and copies), share of a step", share["python"], 0.01),
    ]
    return [{"claim": name, **value, "sense": "<=", "target": target, "percent": True} for name, value, target in found]


def met(claim: dict[str, Any]) -> bool:
    """Whether the median reaches the target; true without one."""
    if claim["target"] is None:
        return True
    return claim["median"] >= claim["target"] if claim["sense"] == ">=" else claim["median"] <= claim["target"]


def median_interval(values: list[float]) -> tuple[float, float] | None:
    """The narrowest pair of order statistics, as far from either end, that holds the median of what ``values`` are drawn from
    in at least 95 % of all samples; None for fewer than 6 values, whose least and greatest hold it less often."""
    n, k, below = len(values), 0, 0.5 ** len(values)  # below: the chance that at most k of them are under the median
    while below <= 0.025 and k < n:
        k += 1
        below += math.comb(n, k) / 2**n
    ordered = sorted(values)
    return (ordered[k - 1], ordered[n - k]) if k else None


def verdict(claim: dict[str, Any]) -> str:
    """``met`` or not if the whole interval of the median lies on one side of the target, else ``not shown``; of a figure that has no rounds, by itself.
    Empty without a target."""
    if claim["target"] is None:
        return ""
    if "values" not in claim:
        return "met" if met(claim) else "**not met**"
    interval = median_interval(claim["values"])
    if interval is None:
        return f"**not shown**: {len(claim['values'])} rounds have no 95 % interval"
    ends = [met({**claim, "median": end}) for end in interval]
    return "met" if all(ends) else "**not shown**" if any(ends) else "**not met**"


def interval_text(claim: dict[str, Any], scale: float = 1.0, unit: str = "") -> str:
    """``low to high``, of the median; a dash where it has no interval."""
    interval = median_interval(claim.get("values", []))
    return "-" if interval is None else " to ".join(number(scale * end) for end in interval) + unit


def number(value: float) -> str:
    """Three significant digits without an exponent."""
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def with_spread(value: dict[str, Any], scale: float = 1.0, unit: str = "") -> str:
    """``median (least to greatest)``."""
    low, mid, high = (number(scale * value[k]) for k in ("min", "median", "max"))
    return f"{mid}{unit} ({low} to {high})"


def table(head: list[str], rows: list[list[str]]) -> str:
    """A markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def depth_name(tokens: int) -> str:
    """1024 as ``1k``; other counts as they are."""
    return f"{tokens // 1024}k" if tokens % 1024 == 0 else str(tokens)


def speed_table(result: dict[str, Any]) -> str:
    """Milliseconds per token: a line a configuration, a column a depth."""
    ms = result["ms_per_token"]
    depths = sorted({int(key.rsplit(" @ ", 1)[1]) for key in ms})
    names = list(dict.fromkeys(key.rsplit(" @ ", 1)[0] for key in ms))
    cells = [[with_spread(ms[f"{n} @ {d}"]) if f"{n} @ {d}" in ms else "-" for d in depths] for n in names]
    return table(["ms per token", *map(depth_name, depths)], [[n, *c] for n, c in zip(names, cells)])


def claim_table(result: dict[str, Any]) -> str:
    """Measured ratios and shares against their targets."""
    rows = []
    for claim in result["claims"]:
        scale, unit = (100, " %") if claim.get("percent") else (1, "")
        sense = {">=": "at least", "<=": "at most"}[claim["sense"]]
        goal = "-" if claim["target"] is None else f"{sense} {number(scale * claim['target'])}{unit}"
        rows.append([claim["claim"], with_spread(claim, scale, unit), interval_text(claim, scale, unit), goal, verdict(claim)])
    return table(["what", "median (least to greatest round)", INTERVAL, "target", ""], rows)


def share_table(result: dict[str, Any]) -> str:
    """Where the time outside `llama_decode` goes, a line a part."""
    share = result["python_share"]
    step = share["step_us"]["median"]
    rows = [[part, with_spread(value), f"{100 * value['median'] / step:.2f} %"] for part, value in share["parts_us"].items()]
    return table([f"zoomr @ {depth_name(share['depth'])}", "us per token", "of a step"], rows)


def conditions(result: dict[str, Any]) -> str:
    """One paragraph: machine, threads, model, commit, command, and whether the machine was idle."""
    m, s = result["machine"], result["settings"]
    idle = (f"idle (load average {m['load_before']:.2f} before the start; other processes used {m['others_cores']:.2f} "
            "cores while it ran)")
    state = f"**busy, the figures are not to be trusted**: {m['busy']}" if m["busy"] else idle
    return (
        f"{result['date']}, commit {result['commit']}, `{result['command']}`. Machine: {m['cpu']}, {m['cores']} cores, "
        f"{m['memory_gb']:.0f} GB, {m['system']}, Python {m['python']}; {state}. {result['threads']} threads. "
        f"Model: random weights, {result['model']}. {s['rounds']} rounds of {s['turn_tokens']} tokens a configuration "
        f"in turn, the first {s['warm_tokens']} tokens of a turn not counted; f16 KV. zoomr: FA "
        f"{'on' if s['zoomr_fa'] else 'off'}, budget {s['budget_tokens']} tokens, {s['index_rows']} index rows scored, blocks of "
        f"{s['block_tokens']} tokens, a refresh every {s['refresh_tokens']} tokens that zooms {s['zoomed_blocks']} blocks. "
        f"Counted during the turns, per refresh: {traffic(result)}."
    )


def traffic(result: dict[str, Any]) -> str:
    """Blocks and tokens that a refresh paged in at each depth, and the cells in use at the end."""
    def one(depth: str, t: dict[str, Any]) -> str:
        n = max(1, t["refreshes"])
        return (f"at {depth_name(int(depth))} {t['blocks_in'] / n:.1f} blocks ({t['tokens_in'] / n:.0f} tokens) paged in, "
                f"{t['rows']} index rows of its own, {t['resident_tokens']} cells in use (at most {t['peak_tokens']})")
    return "; ".join(one(depth, t) for depth, t in result["tally"].items())


def render(result: dict[str, Any]) -> str:
    """The whole report in markdown."""
    parts = [conditions(result), speed_table(result), claim_table(result)]
    if "python_share" in result:
        parts.append(share_table(result))
    return "\n\n".join(parts) + "\n"


def write_docs(docs: Path, results: list[Path]) -> None:
    """Put the figures of ``results`` (JSON files) between the marks in ``docs``, each under its model's name."""
    text = docs.read_text()
    head, rest = text.split(BEGIN, 1)
    tail = rest.split(END, 1)[1]
    loaded = [json.loads(path.read_text()) for path in results]
    body = "\n".join(f"### {r['model']}\n\n{render(r)}" for r in loaded)
    docs.write_text(f"{head}{BEGIN}\n\n{body}\n{END}{tail}")
