"""The words and tables of the per-head section of docs/accuracy.md, all made from figures. `accuracy_heads.py` calls it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations
from typing import Any

from benchmarks.accuracy import conditions
from benchmarks.report import table
from benchmarks.runs import several_text
from zoomr_local.errors import UsageError
from zoomr_local.evaluate_report import paired_difference
from zoomr_local.grading import wilson_interval

BEGIN, END = "<!-- heads: begin -->", "<!-- heads: end -->"
FULL, BASELINES = "full", ("rkv", "recency")
TIERED = "clusterkv"
"""Keeps in RAM what its cells do not hold, while all others let it go."""
MINE, OTHERS = "reasonalloc", ("rkv", "snapkv", "pyramid")

PAPERS: dict[str, dict[str, float]] = {
    "ReasonAlloc (R1-Llama-8B, MATH-500, budget 512, read second-hand)": {"reasonalloc": 82.50, "pyramid": 79.40, "rkv": 76.48, "snapkv": 63.62},
    "ReasonAlloc (R1-Llama-8B, AIME 2024, budget 256, read second-hand)": {"reasonalloc": 20.00, "rkv": 10.42, "pyramid": 9.17, "snapkv": 1.25},
    "Random Attention (Qwen3-4B, MATH-500, budget 1024, read second-hand)": {"random": 87.4, "rkv": 81.0, "snapkv": 70.3},
}
"""Right answers in percent; greatest first."""

Cell = Mapping[str, Any]
Result = Mapping[str, Any]
Place = tuple[str, int | None, str]


def sets(result: Result) -> list[tuple[str, int]]:
    """The (settings, budget) under which policies are compared, smallest budget first; settings are empty, or ``pin_prompt=off``."""
    found = {(_setting(cell), cell["kv_budget"]) for cell in result["cells"] if cell["policy"] != FULL}
    named = {setting for setting, _ in found if setting}
    return sorted((setting, budget) for setting, budget in found if setting or not named)


def _setting(cell: Cell) -> str:
    return cell["settings_text"]


def beside(result: Result, setting: str, budget: int) -> dict[str, list[Cell]]:
    """The cells that stand side by side, by policy: those of ``setting``, and those of policies that it means nothing to; `full` first."""
    named = {cell["policy"] for cell in result["cells"] if cell["settings_text"]}
    found: dict[str, list[Cell]] = {}
    for cell in sorted(result["cells"], key=lambda cell: cell["policy"] != FULL):
        wanted = setting if cell["policy"] in named else ""
        if cell["kv_budget"] in (budget, None) and cell["settings_text"] == wanted:
            found.setdefault(cell["policy"], []).append(cell)
    return found


def pair(one: Iterable[Cell], other: Iterable[Cell]) -> dict[str, Any]:
    """``one`` less ``other`` over the problems that both have graded, cells of the same families together (`paired_difference`)."""
    others = {cell["family"]: cell["answers"] for cell in other}
    sides = [(a, b) for cell in one if cell["family"] in others for a, b in zip(cell["answers"], others[cell["family"]], strict=True)]
    graded = [(a == "1", b == "1") for a, b in sides if "-" not in (a, b)]
    return paired_difference([a for a, _ in graded], [b for _, b in graded])


def points(found: Mapping[str, Any]) -> str:
    """A paired difference in points with its 95 % interval."""
    if found["difference"] is None:
        return "-"
    low, high = found["interval95"]
    return f"{100 * found['difference']:+.1f} ({100 * low:+.1f}, {100 * high:+.1f})"


def share(right: int, n: int) -> str:
    """Right answers in percent with their 95 % interval."""
    if not n:
        return "-"
    low, high = wilson_interval(right, n)
    return f"{100 * right / n:.1f} ({100 * low:.1f}, {100 * high:.1f})"


# ---------------------------------------------------------------- tables


def figures(result: Result) -> str:
    """A line a family, budget and policy; and for each policy one of the families that all policies beside it have."""
    head = ["family", "budget", "policy", "n", "right %", *(f"from {name}" for name in BASELINES), "from full", "cut off", "peak cells", "their KiB", "mean cells", "tokens/s"]
    rows, shown = [], set()
    families = list(dict.fromkeys(cell["family"] for cell in result["cells"]))
    for family in families:
        for setting, budget in sets(result):
            others = {policy: [c for c in cells if c["family"] == family] for policy, cells in beside(result, setting, budget).items()}
            for cell in (cell for cells in others.values() for cell in cells):
                if (place := (family, cell["policy"], cell["kv_budget"], cell["settings_text"])) in shown:
                    continue
                shown.add(place)
                rows.append([*_measured(family, [cell], others), *_cost(cell)])
    for setting, budget in sets(result) if len(families) > 1 else ():
        common, have = _common(beside(result, setting, budget))
        name = "all" if len(common) == len(families) else ", ".join(common)
        more = [[*_measured(name, cells, have), *["-"] * len(_cost(cells[0]))] for cells in have.values() if len(cells) > 1]
        rows += [row for row in more if row not in rows]  # `full` stands beside every budget
    return table(head, rows)


def _measured(family: str, cells: Sequence[Cell], others: Mapping[str, Sequence[Cell]]) -> list[str]:
    """The columns that are of a policy's answers: ``cells`` of one policy, those of ``others`` beside it."""
    policy, right, n = cells[0]["policy"], sum(cell["right"] for cell in cells), sum(cell["n"] for cell in cells)
    apart = ["-" if name == policy or policy == FULL else points(pair(cells, others.get(name, ()))) for name in (*BASELINES, FULL)]
    return [family, str(cells[0]["kv_budget"] or "-"), f"{policy} {cells[0]['settings_text']}".strip(), str(n), share(right, n), *apart]


def _cost(cell: Cell) -> list[str]:
    return [
        str(cell["out_of_tokens"]), str(cell["resident_peak"]), f"{cell['resident_peak_bytes'] / 1024:.0f}", f"{cell['resident_mean']:.0f}",
        f"{cell['tokens_per_s'] or 0:.0f}",
    ]  # fmt: skip


def _common(have: Mapping[str, Sequence[Cell]]) -> tuple[list[str], dict[str, list[Cell]]]:
    """The families that all policies have, and the cells of those."""
    families = [{cell["family"] for cell in cells} for cells in have.values()]
    common = sorted(set.intersection(*families)) if families else []
    return common, {policy: [cell for cell in cells if cell["family"] in common] for policy, cells in have.items()}


def allocation(result: Result) -> str:
    """ReasonAlloc less each of the policies that its tables have, a line a family and budget and one for all families."""
    rows = []
    for setting, budget in sets(result):
        have = beside(result, setting, budget)
        if MINE not in have:
            continue
        families = [cell["family"] for cell in have[MINE]]
        for family in [*families, *([None] if len(families) > 1 else [])]:
            one = [cell for cell in have[MINE] if family in (None, cell["family"])]
            found = [pair(one, [c for c in have.get(name, ()) if family in (None, c["family"])]) for name in OTHERS]
            rows.append([f"{budget} {setting}".strip(), family or "all", str(max(f["n"] for f in found)), *map(points, found)])
    return table(["budget", "family", "n", *(f"{MINE} less {name}, points" for name in OTHERS)], rows) if rows else ""


# ---------------------------------------------------------------- sentences


def peaks(result: Result) -> str:
    """Whether all have had the same cells, and what a policy held beside them."""
    cells = [cell for cell in result["cells"] if cell["kv_budget"] is not None and cell["n"]]
    over = [cell for cell in cells if cell["resident_peak"] > cell["kv_budget"]]
    if over:
        return f"**{len(over)} of {len(cells)} cells of this grid were above their budget.**"
    least = min((cell["resident_peak"] / cell["kv_budget"] for cell in cells), default=0)
    per_cell = {cell["resident_peak_bytes"] / cell["resident_peak"] for cell in cells if cell["resident_peak"]}
    size = f"{per_cell.pop():.0f} bytes a cell under every policy" if len(per_cell) == 1 else "**bytes a cell differ**"
    equal = "every policy had exactly its budget in use at peak" if least == 1 else f"peaks are {100 * least:.1f} to 100 % of the budget"
    return " ".join([f"Equal cells: {equal}, {size}.", *outside(result)])


def outside(result: Result) -> list[str]:
    """A sentence for each policy that has more memory than its cells: RAM where the result has it, else that it has it not."""
    said = []
    for policy in dict.fromkeys(cell["policy"] for cell in result["cells"] if cell["n"]):
        ram = [cell.get("ram_bytes") for cell in result["cells"] if cell["policy"] == policy and cell["n"]]
        known = [size for size in ram if size is not None]
        if policy == TIERED and len(known) < len(ram):
            whole = max((cell["resident_peak_bytes"] for cell in result["cells"] if cell["policy"] == FULL and cell["n"]), default=0)
            least = f", which is up to {whole / 1024:,.0f} KiB under `{FULL}`" if whole else ""
            said.append(f"That is not equal memory: beside its cells `{policy}` keeps in RAM whatever has left them, and both together are no less than the whole text{least}; how much RAM it was, this result did not keep.")
        elif max(known, default=0) > 0:
            said.append(f"That is not equal memory: beside its cells `{policy}` had up to {max(known) / 1024:,.0f} KiB in RAM.")
    return said


def failures(result: Result) -> list[str]:
    """A line a cell that could not answer some problems, with the reason as the program gave it."""
    found = []
    for cell in result["cells"]:
        for message, count in cell["errors"].items():
            where = f"{cell['family']} {cell['policy']} {cell['kv_budget'] or ''} {cell['settings_text']}".split()
            found.append(f"- {' '.join(where)}: {count} of {cell['n'] + cell['failed']} problems failed: {message}")
    return found


def order(result: Result, setting: str, budget: int) -> str:
    """Which policy answered how much, over all families, and what of the papers' orders is seen."""
    common, have = _common(beside(result, setting, budget))
    sums = {policy: (sum(c["right"] for c in cells), sum(c["n"] for c in cells)) for policy, cells in have.items()}
    ranked = sorted((policy for policy, (_, n) in sums.items() if n), key=lambda policy: -sums[policy][0] / sums[policy][1])
    if not ranked:
        return ""
    shares = {policy: f"{100 * sums[policy][0] / sums[policy][1]:.1f}" for policy in ranked}
    text = f"`{ranked[0]}` {shares[ranked[0]]}"
    for before, policy in zip(ranked, ranked[1:]):
        text += f" {'=' if shares[before] == shares[policy] else '>'} `{policy}` {shares[policy]}"
    where = f"At {budget} cells{f' ({setting})' if setting else ''}, {', '.join(common)}{' together' if len(common) > 1 else ''}"
    lines = [f"- {where}, right in percent: {text}."]
    for name, paper in PAPERS.items():
        known = [policy for policy in paper if policy in ranked]
        if len(known) > 1:
            lines.append(f"  - {name}: {' > '.join(known)}. {_compared(have, known)}")
    return "\n".join(lines)


def _compared(have: Mapping[str, Sequence[Cell]], known: Sequence[str]) -> str:
    """Of every pair in a paper's order: seen, seen the other way round, or neither, by the whole interval of its difference."""
    verdicts: dict[str, list[str]] = {"shown here": [], "the other way round": [], "not shown": []}
    for one, other in combinations(known, 2):
        found = pair(have[one], have[other])
        low, high = found["interval95"] or (-1, 1)
        verdict = "shown here" if low > 0 else "the other way round" if high < 0 else "not shown"
        verdicts[verdict].append(f"{one} over {other} {points(found)}")
    counts = [f"{len(pairs)} {verdict}" + (f" ({'; '.join(pairs)})" if verdict != "not shown" and pairs else "") for verdict, pairs in verdicts.items()]
    return f"Of {sum(map(len, verdicts.values()))} pairs {', '.join(counts)}."


# ---------------------------------------------------------------- page


def text(results: Sequence[Result]) -> str:
    """The block of the page."""
    if not results:
        return "No per-head policy was measured yet."
    parts = []
    for result in results:
        parts += [f"### {result['model']['file'].removesuffix('.gguf')}: `{result['command']}`", conditions(result) + several_text(result), peaks(result)]
        if failed := failures(result):
            parts += ["**Problems that failed** count neither right nor wrong:", "\n".join(failed)]
        orders = [line for place in sets(result) if (line := order(result, *place))]
        if orders:
            parts += ["The order that comes out, and the papers'; a pair is shown if the whole interval of its paired difference lies on one side of 0:", "\n".join(orders)]
        if compared := allocation(result):
            parts.append(compared)
        parts.append(figures(result))
    return "\n\n".join(parts)


def filled(page: str, results: Sequence[Result]) -> str:
    """The page with its block written anew. Raises UsageError if it has none."""
    head, begin, rest = page.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not begin or not end:
        raise UsageError(f"the page has no block {BEGIN} ... {END}; give docs/accuracy.md")
    return f"{head}{BEGIN}\n\n{text(results)}\n\n{END}{tail}"
