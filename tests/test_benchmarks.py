"""The benchmarks run, end to end, on a tiny shape. Nothing here asserts a time."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT))  # benchmarks are not installed

from benchmarks import make_model, report, speed  # noqa: E402
from benchmarks.stopwatch import watching  # noqa: E402
from zoomr_local.bench_state import repeat_cells  # noqa: E402


def plain_state(cells: int, transposed: bool) -> tuple[np.ndarray, list[np.ndarray]]:
    """A sequence state as llama.cpp writes it (two layers, 4-byte K rows, two 2-byte V elements), and its K and V."""
    rng = np.random.default_rng(cells)
    keys = [rng.integers(0, 256, (cells, 4), np.uint8) for _ in range(2)]
    values = [rng.integers(0, 256, (cells, 4), np.uint8) for _ in range(2)]
    meta = np.stack([np.arange(cells), np.ones(cells), np.zeros(cells)], 1)
    out = [np.array([77, 0, 1, cells], "<u4"), meta.astype("<i4"), np.array([transposed, 2], "<u4")]
    for key in keys:
        out += [np.array([1], "<i4"), np.array([4], "<u8"), key]
    for value in values:
        columns = value.view("<u2").T.copy()
        head = np.array([2, 2], "<u4") if transposed else np.array([4], "<u8")
        out += [np.array([1], "<i4"), head, columns if transposed else value]
    return np.concatenate([np.ascontiguousarray(a).view(np.uint8).ravel() for a in out]), keys


@pytest.mark.parametrize("transposed", [False, True])
def test_repeated_state_of_the_same_length_is_the_same_state(transposed: bool) -> None:
    state, _ = plain_state(5, transposed)
    assert np.array_equal(repeat_cells(state, 5), state)


@pytest.mark.parametrize("transposed", [False, True])
def test_a_repeated_state_repeats_rows_at_new_positions(transposed: bool) -> None:
    state, keys = plain_state(3, transposed)
    deep = repeat_cells(state, 8)
    assert deep[16:16 + 96].view("<i4").reshape(8, 3)[:, 0].tolist() == list(range(8))
    at = 16 + 96 + 8 + 12
    assert np.array_equal(deep[at:at + 32].reshape(8, 4), keys[0][np.arange(8) % 3])
    whole, _ = plain_state(8, transposed)
    assert deep.nbytes == whole.nbytes


def test_a_state_of_another_cache_is_refused() -> None:
    state, _ = plain_state(3, False)
    with pytest.raises(ValueError, match="not understood"):
        repeat_cells(np.concatenate([state, np.zeros(4, np.uint8)]), 4)


@pytest.mark.parametrize("quant", ["Q4_0", "Q8_0"])
def test_random_blocks_have_zero_mean_and_unit_output_variance(quant: str) -> None:
    import gguf

    rng = np.random.default_rng(0)
    blocks = make_model.random_matrix(rng, 256, 512, quant, range(3, 5))
    weights = gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType[quant])
    assert not weights[3:5].any()
    rest = np.delete(weights, [3, 4], axis=0)
    assert abs(rest.mean()) < 0.001
    assert rest.std() * np.sqrt(512) == pytest.approx(1, rel=0.05)


def test_time_is_charged_to_the_innermost_part_and_functions_come_back() -> None:
    class Work:
        def outer(self) -> int:
            return self.inner() + 1

        def inner(self) -> int:
            return 1

    plain = Work.outer
    with watching([(Work, "outer", "out"), (Work, "inner", "in")]) as watch:
        assert Work().outer() == 2
    assert set(watch.seconds) == {"out", "in"} and min(watch.seconds.values()) > 0
    assert Work.outer is plain


def test_claims_are_paired_by_round() -> None:
    ms = {}
    for name, short, long in ((report.STOCK[0], 10.0, 100.0), (report.STOCK[1], 12.0, 60.0), (report.OURS, 10.0, 10.0)):
        ms[f"{name} @ 1024"] = report.spread([short, 2 * short])
        ms[f"{name} @ 32768"] = report.spread([long, 2 * long])
    flat, on, best, *_ = report.claims(ms, [1024, 32768])
    assert (flat["median"], on["median"], best["median"]) == (1, 10, 6)
    assert "FA off" in best["claim"] and all(report.met(c) for c in (flat, on, best))


@pytest.mark.parametrize(("n", "ends"), [(0, None), (5, None), (6, (1, 6)), (8, (1, 8)), (9, (2, 8)), (15, (4, 12)), (20, (6, 15))])
def test_the_interval_of_a_median_is_that_of_the_tables(n: int, ends: tuple[int, int] | None) -> None:
    """Ranks of the two-sided sign test at 5 %; 15 rounds: 96.5 %."""
    assert report.median_interval([float(v) for v in range(n, 0, -1)]) == ends


@pytest.mark.parametrize(("sense", "target", "said"), [
    ("<=", 1.05, "**not shown**"), ("<=", 12.0, "met"), ("<=", 11.9, "**not shown**"), ("<=", 3.9, "**not met**"), ("<=", 4.0, "**not shown**"),
    (">=", 4.0, "met"), (">=", 4.1, "**not shown**"), (">=", 12.1, "**not met**"), (">=", None, ""),
])  # fmt: skip
def test_a_bar_inside_the_interval_is_neither_met_nor_missed(sense: str, target: float | None, said: str) -> None:
    """1 to 15: the median is 8, its interval 4 to 12."""
    values = [0.95 + 0.02 * v for v in range(15)] if target == 1.05 else [float(v) for v in range(1, 16)]
    claim = {**report.spread(values), "claim": "x", "sense": sense, "target": target}
    assert report.verdict(claim) == said
    assert report.claim_table({"claims": [claim]}).endswith(f"| {said} |")
    if target == 4.0:
        assert "| x | 8 (1 to 15) | 4 to 12 |" in report.claim_table({"claims": [claim]})


def test_few_rounds_show_nothing_and_a_figure_without_rounds_stands_for_itself() -> None:
    few = {**report.spread([1.0] * 5), "claim": "x", "sense": "<=", "target": 2.0}
    assert report.verdict(few) == "**not shown**: 5 rounds have no 95 % interval"
    assert report.verdict({"claim": "x", "median": 1.0, "sense": "<=", "target": 2.0}) == "met"


def test_figures_in_the_docs_are_those_of_the_results() -> None:
    results = sorted((ROOT / "benchmarks" / "results").glob("speed-*.json"))
    text = (ROOT / "docs" / "benchmarks.md").read_text()
    for path in results:
        assert report.render(json.loads(path.read_text())) in text, f"{path.name}: run --write-docs again"


def test_speed_runs_end_to_end_on_a_tiny_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stock = speed.find_stock()
    assert stock is not None, "no stock library to compare with: python native/build.py --stock"
    model = make_model.write_model(tmp_path / "tiny.gguf", "tiny", make_model.SHAPES["tiny"])
    out = tmp_path / "speed.json"
    code = speed.main([
        "--model", str(model), "--stock", str(stock), "--threads", "1", "--depths", "512", "1024", "--rounds", "2", "--turn", "8",
        "--budget", "384", "--rows", "32", "--block", "64", "--share-tokens", "16", "--json", str(out), "--verbose",
    ])
    assert code == 0
    result = json.loads(out.read_text())
    assert set(result["ms_per_token"]) == {f"{n} @ {d}" for n in (*report.STOCK, report.OURS) for d in (512, 1024)}
    for tally in result["tally"].values():
        assert tally["blocks_in"] > 0 and tally["peak_tokens"] <= 384
    assert str(tmp_path) not in out.read_text()
    assert "ms per token" in capsys.readouterr().out
