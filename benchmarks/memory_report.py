"""Claims and tables of `benchmarks.memory` from its result file, and its block in docs/benchmarks.md.

Memory beyond weights and compute buffers is the peak of a process at its depth, less the peak of a process that
holds weights, compute buffers and the same cells and nothing else (`benchmarks.base`), plus those cells.
"""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

from benchmarks.report import INTERVAL, depth_name, interval_text, number, ratio, spread, table, verdict, with_spread

BEGIN, END = "<!-- memory: begin -->", "<!-- memory: end -->"
MIB = 1 << 20
ENDS = 8  # windows at each end of the long run that are compared

Part = dict[str, Any]


def others(part: Part) -> float:
    """The most cores that other processes used in any round or window of a part."""
    windows = [v for w in part.get("windows", []) for v in (w, w.get("beside")) if v]
    return max([part.get("others_cores", 0.0), *(w["others_cores"] or 0.0 for w in windows)])


def page_summary(found: list[dict[str, Any]]) -> dict[str, Any]:
    """Differences of logits over all prompts: how many steps, medians, 99th percentiles and the worst."""
    values = {key: sorted(v for one in found for v in one[key]) for key in ("max_abs", "kl", "top1")}
    counts = {key: sum(one[key] for one in found) for key in ("tokens", "steps", "compared")}
    if not counts["compared"]:
        return {"prompts": len(found), **counts}
    at = lambda v, share: float(f"{v[min(len(v) - 1, int(share * len(v)))]:.4g}")  # noqa: E731
    return {
        "prompts": len(found), **counts, "top1": sum(values["top1"]) / counts["compared"],
        **{key: {"mean": float(f"{statistics.fmean(values[key]):.4g}"), "median": at(values[key], 0.5), "p99": at(values[key], 0.99),
                 "max": at(values[key], 1.0)} for key in ("max_abs", "kl")},
    }  # fmt: skip


# ---------------------------------------------------------------- tiers


def beyond_bytes(part: Part, name: str) -> int:
    """What the process ``name`` holds at its peak beyond weights and compute buffers."""
    base = part["base"]
    return part["memory"][name]["peak_bytes"] - base["peak_bytes"] + base["cells"] * base["token_bytes"]


def names(part: Part) -> dict[str, str]:
    """Configurations by their role."""
    s = part["settings"]
    return {
        "near": f"zoomr, ram + disk @ {s['near']}", "far": f"zoomr, ram + disk @ {s['far']}",
        "farthest": f"zoomr, ram + disk @ {s['farthest']}", "packed": f"zoomr, q8_0 in ram @ {s['far']}",
        "stock near": f"stock, FA off @ {s['near']}", "stock far": f"stock, FA off @ {s['far']}",
    }  # fmt: skip


def tiers_claims(part: Part) -> list[dict[str, Any]]:
    """Items 1 and 2, and the planted half of 3."""
    s, n, ms = part["settings"], names(part), part["ms"]
    full = part["base"]["token_bytes"] * s["far"]
    far, farthest = depth_name(s["far"]), depth_name(s["farthest"])
    one = lambda value: {"median": value, "min": value, "max": value}  # noqa: E731
    share = {key: one(beyond_bytes(part, n[key]) / full) for key in ("far", "farthest", "packed")}
    tiers = f"RAM {s['ram_bytes'] / MIB:g} MiB + disk"
    return [
        {"claim": f"memory beyond weights and compute buffers at {far}, {tiers}, over stock's KV at {far}", **share["far"],
         "sense": "<=", "target": 0.10, "percent": True},
        {"claim": f"the same at {farthest}, still over stock's KV at {far}", **share["farthest"], "sense": "<=", "target": 0.10, "percent": True},
        {"claim": f"the same at {far}, q8_0 pages in RAM and no disk", **share["packed"], "sense": "<=", "target": 0.60, "percent": True},
        {"claim": f"speed at {far} over speed at {depth_name(s['near'])}, disk tier on", **ratio(ms[n["near"]], ms[n["far"]]),
         "sense": ">=", "target": 0.95},
        {"claim": f"speed at {farthest} over speed at {depth_name(s['near'])}, disk tier on", **ratio(ms[n["near"]], ms[n["farthest"]]),
         "sense": ">=", "target": 0.95},
        {"claim": f"speed at {far}, zoomr with its disk tier over stock's best mode (FA off)", **ratio(ms[n["stock far"]], ms[n["far"]]),
         "sense": ">=", "target": None},
    ]  # fmt: skip


def tiers_tables(part: Part) -> list[str]:
    """Memory and speed by configuration, and what each made of its tiers."""
    mib = lambda n_bytes: f"{n_bytes / MIB:,.1f}" if n_bytes else "-"  # noqa: E731
    rows, paging = [], []
    for name, memory in part["memory"].items():
        cache = memory.get("cache", {})
        ours = bool(cache)
        rows.append([
            name, with_spread(spread(part["ms"][name])), mib(memory["peak_bytes"]), mib(beyond_bytes(part, name)) if ours else "-",
            mib(memory.get("cells_bytes")) if ours else mib(part["base"]["token_bytes"] * int(name.rsplit(" ", 1)[1])),
            mib(cache.get("ram_bytes")), mib(cache.get("disk_bytes")),
        ])  # fmt: skip
        if ours:
            t = part["tally"][name]
            paging.append([name, str(t["blocks"]), str(t["rows"]), f"{t['blocks_in'] / max(1, t['refreshes']):.2f}",
                           mib(cache["disk_written_bytes"]), mib(cache["disk_read_bytes"]), str(cache["lost_blocks"]), str(cache["faults"])])
    head = ["", "ms per token", "process peak, MiB", "beyond weights and compute, MiB", "KV in cells, MiB", "RAM tier, MiB", "disk tier, MiB"]
    return [
        table(head, rows),
        table(["", "blocks", "index rows", "blocks in a refresh", "written to disk, MiB", "read, MiB", "blocks lost", "faults"], paging),
    ]


# ---------------------------------------------------------------- the others


def pages_table(part: Part) -> str:
    """How far lossy pages move the logits."""
    rows = []
    for name in ("bundled", "random"):
        for page_type, found in part[name].items():
            if found["compared"]:
                rows.append([
                    part["models"][name].split(",")[0], page_type, f"{found['compared']:,} of {found['steps']:,}", f"{100 * found['top1']:.2f} %",
                    *(f"{found[key]['median']:.2g} / {found[key]['p99']:.2g} / {found[key]['max']:.2g}" for key in ("kl", "max_abs")),
                ])  # fmt: skip
    return table(["model", "pages", "steps compared", "same first choice", "KL in nats: median / p99 / max", "greatest logit difference: median / p99 / max"], rows)


def long_claims(part: Part) -> list[dict[str, Any]]:
    """The decoded half of item 3: speed at the end against a short thought's in turns, memory against the beginning."""
    windows = steady(part)
    first, last = windows[:ENDS], windows[-ENDS:]
    pairs = [w for w in last if w["beside"] and not w["resumed"]]
    near = f"{pairs[0]['beside']['tokens']:,} to {pairs[-1]['beside']['tokens']:,}"
    speed = spread([w["beside"]["ms"] / w["ms"] for w in pairs])
    gained = max(w["peak_bytes"] for w in last) - max(w["peak_bytes"] for w in first)
    tokens = part["windows"][-1]["tokens"]
    full = part["token_bytes"] * (last[-1]["tokens"] - first[-1]["tokens"])
    grown = {"median": gained / full, "min": gained / full, "max": gained / full}
    return [
        {"claim": f"speed of the last {len(pairs)} windows to {tokens:,} tokens, all decoded, over that of a second run at {near} tokens, in turns", **speed, "sense": ">=", "target": 0.95},
        {"claim": "memory that the process gained between them, over what stock's KV gains", **grown, "sense": "<=", "target": None, "percent": True},
    ]  # fmt: skip


def steady(part: Part) -> list[dict[str, Any]]:
    """The windows after the first page went to disk, without those that follow a resumption (they warm up)."""
    found = [w for w in part["windows"] if w["disk_bytes"] and not w["resumed"]]
    return found if len(found) >= 2 * ENDS else part["windows"]


def long_table(part: Part) -> str:
    """A line for every eighth of the run."""
    windows = part["windows"]
    step = max(1, len(windows) // 8)
    rows = [[f"{w['tokens']:,}", f"{statistics.median(v['ms'] for v in windows[max(0, i - step + 1) : i + 1]):.2f}", f"{w['peak_bytes'] / MIB:.1f}",
             f"{w['anonymous_bytes'] / MIB:.1f}", f"{w['ram_bytes'] / MIB:.1f}", f"{w['disk_bytes'] / MIB:.1f}", str(w["rows"]),
             str(w["resident_peak_tokens"]), str(w["lost_blocks"])]
            for i, w in enumerate(windows) if (i + 1) % step == 0]  # fmt: skip
    head = ["tokens", "ms per token (median since the line above)", "process peak, MiB", "anonymous, MiB", "RAM tier, MiB", "disk tier, MiB",
            "index rows", "most cells in use", "blocks lost"]
    return table(head, rows)


# ---------------------------------------------------------------- the page


def claim_table(claims: list[dict[str, Any]]) -> str:
    """What was measured against its target."""
    rows = []
    for claim in claims:
        scale, unit = (100, " %") if claim.get("percent") else (1, "")
        value = with_spread(claim, scale, unit) if claim["min"] != claim["max"] else f"{number(scale * claim['median'])}{unit}"
        sense = {">=": "at least", "<=": "at most"}[claim["sense"]]
        goal = "-" if claim["target"] is None else f"{sense} {number(scale * claim['target'])}{unit}"
        rows.append([claim["claim"], value, interval_text(claim, scale, unit), goal, verdict(claim)])
    return table(["what", "measured", INTERVAL, "target", ""], rows)


def count(number_of: int, what: str) -> str:
    """``1 thread``, ``2 threads``."""
    return f"{number_of} {what}" + ("" if number_of == 1 else "s")


def conditions(part: Part, what: str) -> str:
    """When, where, on what, and whether the machine was idle."""
    m = part["machine"]
    idle = f"idle (other processes used at most {m['others_cores']:.2f} cores in any round)"
    state = f"**busy, the times are not to be trusted**: {m['busy']}" if m["busy"] else idle
    several = f" **rounds of several commits** ({', '.join(part['commits'])}), as the run was interrupted and went on," if "commits" in part else ""
    return (f"{part['date']}, commit {part['commit']},{several} `{part['command']}`. Machine: {m['cpu']}, {m['cores']} cores, {m['memory_gb']:.0f} GB, "
            f"{m['system']}, Python {m['python']}; {state}. {what}")


def render_tiers(part: Part) -> str:
    """The section of the tiers part."""
    s = part["settings"]
    what = (f"{count(s['threads'], 'thread')}. Model: {part['model']}. Budget {s['budget']} tokens, f16 cells, blocks of {s['block']} tokens, a refresh every "
            f"{s['refresh']} tokens that zooms {s['zoomed']} blocks, others every {s['hold']} refreshes; depths by planted pages through the real tiers, then {s['rounds']} turns of "
            f"{s['turn']} decoded tokens each, the configurations in turns. RAM tier of the q8_0 row: {part['packed_ram_bytes'] / MIB:.0f} MiB. "
            f"Weights, compute buffers and cells alone: {part['base']['peak_bytes'] / MIB:.1f} MiB.")
    return "\n\n".join(["### Memory and speed with the tiers on", conditions(part, what), claim_table(tiers_claims(part)), *tiers_tables(part)])


def render_pages(part: Part) -> str:
    """The section of the pages part."""
    cases = part["settings"]["cases"]
    budgets = ", ".join(f"{case['model']} with a budget of {case['budget']} tokens" for case in cases.values())
    what = f"Same tokens and same selections with f16 pages and with lossy ones; {budgets}."
    return "\n\n".join(["### Logits with lossy pages against f16 pages", conditions(part, what), pages_table(part)])


def render_long(part: Part) -> str:
    """The section of the long part."""
    s = part["settings"]
    what = (f"{count(s['threads'], 'thread')}. Model: {part['model']}. Budget {s['budget']} tokens, RAM tier {s['tiers']['kv_ram'] / MIB:g} MiB and disk, blocks of "
            f"{s['block']} tokens; every token decoded, none planted. Saved every {s['saved_every']:,} tokens; windows of {s['window']} tokens.")
    return "\n\n".join(["### A thought of many tokens, all decoded", conditions(part, what), claim_table(long_claims(part)), long_table(part)])


RENDERERS = {"tiers": render_tiers, "pages": render_pages, "long": render_long}


def render(whole: dict[str, Any]) -> str:
    """Every part that the result has, in order."""
    return "\n\n".join(draw(whole["parts"][name]) for name, draw in RENDERERS.items() if name in whole["parts"]) + "\n"


def write_docs(docs: Path, result: Path) -> None:
    """Put the figures of ``result`` between the marks in ``docs``."""
    text = docs.read_text()
    head, rest = text.split(BEGIN, 1)
    tail = rest.split(END, 1)[1]
    docs.write_text(f"{head}{BEGIN}\n\n{render(json.loads(result.read_text()))}\n{END}{tail}")
