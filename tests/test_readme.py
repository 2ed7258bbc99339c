"""The README's figures are those of the result files: nobody types a figure twice."""

import json
import re
import statistics
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT))  # benchmarks are not installed

from benchmarks import memory_report  # noqa: E402

README = (ROOT / "README.md").read_text(encoding="utf-8")
RESULTS = ROOT / "benchmarks" / "results"


def row(start: str) -> list[str]:
    """The cells of the one table row that begins with ``start``."""
    (line,) = [line for line in README.splitlines() if line.startswith(f"| {start}")]
    return [cell.strip() for cell in line.strip("|").split("|")]


@pytest.mark.parametrize("start, name", [
    ("stock llama.cpp, default", "stock, FA on"), ("stock llama.cpp, its best mode", "stock, FA off"), ("zoomr |", "zoomr"),
])
def test_speed_is_the_measured_median(start, name):
    medians = {int(at): ms for at, ms in measured_medians(name).items()}
    assert row(start)[1:] == [f"{medians[depth]:.3g}" for depth in (1024, 8192, 32768)]


def measured_medians(name: str) -> dict[str, float]:
    figures = json.loads((RESULTS / "speed-1.5b.json").read_text())["ms_per_token"]
    return {key.rsplit("@", 1)[1].strip(): value["median"] for key, value in figures.items() if key.rsplit("@", 1)[0].strip() == name}


def test_memory_is_the_measured_peak():
    part = json.loads((RESULTS / "memory.json").read_text())["parts"]["tiers"]
    name, settings = memory_report.names(part), part["settings"]
    full = part["base"]["token_bytes"] * settings["far"]
    mib = lambda n_bytes, digits: f"{n_bytes / (1 << 20):,.{digits}f}"  # noqa: E731
    assert row("stock llama.cpp, KV cache")[1:] == [mib(full, 0), mib(full // settings["far"] * settings["farthest"], 0)]
    paged = [mib(memory_report.beyond_bytes(part, name[key]), 1) for key in ("far", "farthest")]
    assert row("zoomr, 64 MiB of RAM")[1:] == paged
    assert row("zoomr, q8_0 pages in RAM")[1:] == [mib(memory_report.beyond_bytes(part, name["packed"]), 0), "-"]


def test_the_tiers_cost_is_the_measured_median():
    part = json.loads((RESULTS / "memory.json").read_text())["parts"]["tiers"]
    name = memory_report.names(part)
    near, farthest, packed = (f"{statistics.median(part['ms'][name[key]]):.0f}" for key in ("near", "farthest", "packed"))
    assert f"as long at 128k as at 1k ({farthest} and {near} ms),\nwith q8_0 pages {packed} ms at 32k" in README


def right(file: str, policy: str, settings: str = "") -> tuple[int, int]:
    """Right answers and problems of a policy in a quarter of the trace, or of `full`, over all families."""
    cells = json.loads((RESULTS / file).read_text())["cells"]
    mine = [c for c in cells if (c["policy"], c["settings_text"]) == (policy, settings) and c["kv_budget"] in (652, None)]
    assert len({c["family"] for c in mine}) == len(mine) == 4
    return sum(c["right"] for c in mine), sum(c["n"] for c in mine)


def test_what_models_without_summaries_keep_is_what_was_measured():
    tiny, plain = "heads-zoomr-tiny-clusterkv.json", "heads-plain-tiny.json"
    (kept, n), (whole, _) = (right(tiny, policy) for policy in ("clusterkv", "full"))
    assert right(plain, "clusterkv") == (kept, n) and right(plain, "full") == (whole, n)
    assert f"`clusterkv` answered {kept} of {n} with zoomr-tiny and as many with plain-tiny, which writes no summaries (`full` {whole} of {n} with either)" in README
    modes = "summaries-plain-tiny.json"
    (solved, n), (control, _), (full, _) = right(modes, "zoomr", "summaries=extractive"), right(modes, "recency"), right(modes, "full")
    assert solved == control and f"this solved {solved} of {n} problems of our small test model, as many as `recency`; the full cache {full}" in README


def test_accuracy_is_the_measured_share():
    cells = {}
    for result in sorted(RESULTS.glob("accuracy*.json")):  # of cells measured twice the one of more problems stands, as on the accuracy page
        for cell in json.loads(result.read_text())["cells"]:
            place = (cell["family"], cell["policy"], cell["kv_budget"])
            if place not in cells or cell["n"] > cells[place]["n"]:
                cells[place] = cell
    (heading,) = [line for line in README.splitlines() if line.startswith("| policy | `dag`")]
    columns = re.findall(r"`(\w+)`, (\d+) cells", heading)
    assert {family for family, _ in columns} == {"dag", "ledger", "linsys", "series"}
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in README.split(heading)[1].split("\n\n")[0].split("\n")[2:]]
    shown = {(family, name.strip("`"), None if name == "`full`" else int(budget)) for name, *_ in rows for family, budget in columns}
    assert {key for key in cells if key[1] != "breadcrumbs"} <= shown, "every measured cell is in the table"
    for policy, *texts in rows:
        policy = policy.strip("`")
        for (family, budget), text in zip(columns, texts, strict=True):
            cell = cells.get((family, policy, None if policy == "full" else int(budget)))
            if cell is None:
                assert text == "-"
                continue
            share = f"{100 * cell['accuracy']:.1f}".removesuffix(".0")  # 199 of 200 is not 100 %
            low, high = (f"{100 * x:.0f}" for x in cell["wilson95"])
            assert text == f"{share} % ({low} to {high})", (policy, family)
