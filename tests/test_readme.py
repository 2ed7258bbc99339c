"""The README's figures are those of the result files: nobody types a figure twice."""

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
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


def test_accuracy_is_the_measured_share():
    cells = {}
    for family in ("dag", "series"):
        for cell in json.loads((RESULTS / f"accuracy-{family}.json").read_text())["cells"]:
            cells[family, cell["policy"], cell["kv_budget"]] = cell
    rows = re.findall(r"^\| `(\w+)` \| (-|\d+) \| (\d+) % \((\d+) to (\d+)\) \| (\d+) % \((\d+) to (\d+)\) \| ([\d,]+) ", README, re.M)
    assert len(rows) == 9
    for policy, budget, *figures, peak in rows:
        both = [cells[family, policy, None if budget == "-" else int(budget)] for family in ("dag", "series")]
        expected = [f"{100 * x:.0f}" for cell in both for x in (cell["accuracy"], *cell["wilson95"])]
        assert figures == expected and int(peak.replace(",", "")) == max(cell["resident_peak"] for cell in both)
