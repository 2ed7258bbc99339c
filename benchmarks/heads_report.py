"""The section of docs/benchmarks.md on per-head stores, from the result file of `benchmarks.heads`, which calls this."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.report import claim_table, table, with_spread

BEGIN, END = "<!-- heads: begin -->", "<!-- heads: end -->"
MOST_OVER_UNIFORM, LEAST_UNDER_STOCK = 1.05, 3.0
USERS = {
    "heads": "the cells alone",
    "heads, queries": "`snapkv`, `rkv`, `pyramid`, `clusterkv`",
    "heads, weights and queries": "`h2o`, which needs the weights",
    "heads, one pool a layer": "as `reasonalloc`, without its queries",
}
"""What each store is there for."""


def claims(result: dict[str, Any]) -> list[dict[str, Any]]:
    """Every store's ratios against their bars."""
    found = []
    for name, ratio in result["over_uniform"].items():
        found.append({**ratio, "claim": f"{name}: over the uniform cache", "target": MOST_OVER_UNIFORM, "sense": "<="})
    for name, ratio in result["stock_over"].items():
        found.append({**ratio, "claim": f"{name}: {result['stock_best']}, over it", "target": LEAST_UNDER_STOCK, "sense": ">="})
    return found


def render(result: dict[str, Any]) -> str:
    """The section in markdown."""
    m, s = result["machine"], result["settings"]
    idle = f"other processes used {m['others_cores']:.2f} cores while it ran" if not m["busy"] else f"**busy, the figures are not to be trusted**: {m['busy']}"
    conditions = (
        f"{result['date']}, commit {result['commit']}, `{result['command']}`. Machine: {m['cpu']}, {m['cores']} cores, {m['memory_gb']:.0f} GB,"
        f" {m['system']}, Python {m['python']}; {idle}. {result['threads']} threads. Model: random weights, {result['model']}. Budget {s['budget_tokens']}"
        f" cells, all taken; {s['rounds']} rounds of {s['turn_tokens']} tokens in turn; FA {'on' if s['flash'] else 'off'}, f16 KV."
        " Decoding alone: no sampling and no policy's selection."
    )
    rows = [[name, with_spread(ms), USERS.get(name, "")] for name, ms in result["ms_per_token"].items()]
    return "\n\n".join([conditions, table(["ms per token", "median (least to greatest round)", "for"], rows), claim_table({"claims": claims(result)})])


def write_docs(docs: Path, results: list[Path]) -> None:
    """Put the sections of ``results`` (JSON files) between the marks in ``docs``."""
    text = docs.read_text(encoding="utf-8")
    head, rest = text.split(BEGIN, 1)
    tail = rest.split(END, 1)[1]
    body = "\n\n".join(render(json.loads(path.read_text(encoding="utf-8"))) for path in results)
    docs.write_text(f"{head}{BEGIN}\n\n{body}\n\n{END}{tail}", encoding="utf-8")
