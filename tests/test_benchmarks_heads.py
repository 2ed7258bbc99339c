"""The per-head benchmark runs, on a tiny shape. Nothing here asserts a time."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parent.parent))  # benchmarks are not installed

from benchmarks import heads, heads_report, make_model, report  # noqa: E402


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("heads") / "tiny.gguf"
    make_model.write_model(path, "tiny", make_model.SHAPES["tiny"])
    return path


@pytest.mark.parametrize("flash", [True, False])
def test_every_configuration_is_measured_against_the_uniform_cache(flash: bool, model: Path, tmp_path: Path, capsys) -> None:
    out = tmp_path / "result.json"
    words = ["--model", str(model), "--budget", "256", "--rounds", "2", "--turn", "3", "--threads", "1", "--json", str(out)]
    assert heads.main(words + ["--fa-off"] * (not flash)) == 0
    result = json.loads(out.read_text())
    assert set(result["ms_per_token"]) == {"uniform", *heads.STORES} and result["settings"]["flash"] is flash
    for name in heads.STORES:
        figures, base = result["ms_per_token"][name]["values"], result["ms_per_token"]["uniform"]["values"]
        assert len(figures) == 2
        assert result["over_uniform"][name]["values"] == pytest.approx([a / b for a, b in zip(figures, base)], rel=1e-3)
    assert len(set(result["kv_bytes"].values())) == 1, "the same budget is the same bytes"
    assert "heads, one pool a layer" in capsys.readouterr().out


def test_stock_at_depth_takes_its_turns_in_the_same_rounds(model: Path, tmp_path: Path, capsys) -> None:
    stock = heads.speed.find_stock()
    assert stock is not None, "no stock library to compare with: python native/build.py --stock"
    out = tmp_path / "result.json"
    words = ["--model", str(model), "--budget", "64", "--rounds", "2", "--turn", "3", "--threads", "1", "--json", str(out)]
    assert heads.main([*words, "--deep", "400", "--stock", str(stock)]) == 0
    result = json.loads(out.read_text())
    best, ms = result["stock_best"], result["ms_per_token"]
    assert best in {"stock at 400, FA on", "stock at 400, FA off"} <= set(ms) and len(ms[best]["values"]) == 2
    assert ms[best]["median"] == min(ms[name]["median"] for name in ms if name.startswith("stock"))
    for name in heads.STORES:
        assert result["stock_over"][name]["values"] == pytest.approx([a / b for a, b in zip(ms[best]["values"], ms[name]["values"])], rel=1e-3)
    assert f"{best} " in capsys.readouterr().out


def test_the_page_has_the_results_and_bars_that_are_missed_say_so(tmp_path: Path) -> None:
    held = sorted((heads.ROOT / "benchmarks" / "results").glob("stores-*.json"))
    text = (heads.ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    assert held and all(heads_report.render(json.loads(path.read_text())) in text for path in held), "run --write-docs again"
    result = json.loads(held[0].read_text())
    slow, even, doubtful = (report.spread(values) for values in ([1.051] * 6, [1.05] * 6, [1.0] * 5 + [1.051]))
    result["over_uniform"] = dict.fromkeys(heads.STORES, even) | {"heads": slow, "heads, queries": doubtful}
    assert heads_report.render(result).count("**not met**") == 1 == heads_report.render(result).count("**not shown**")
    page = tmp_path / "page.md"
    page.write_text(f"before\n{heads_report.BEGIN}\nold\n{heads_report.END}\nafter\n")
    heads_report.write_docs(page, held)
    assert "old" not in page.read_text() and page.read_text().startswith("before\n") and page.read_text().endswith("after\n")
    assert set(heads.STORES) == set(heads_report.USERS)


def test_depth_without_the_stock_library_is_refused(monkeypatch, capsys) -> None:
    monkeypatch.setattr(heads.speed, "find_stock", lambda: None)
    with pytest.raises(SystemExit) as stop:
        heads.options(["--deep", "400"])
    assert stop.value.code == 2 and "native/build.py --stock" in capsys.readouterr().err


def test_every_turn_runs_over_a_full_budget(model: Path) -> None:
    args = heads.options(["--model", str(model), "--budget", "64", "--turn", "5", "--threads", "1"])
    with heads.LlamaModel(model) as loaded:
        for store in (None, {}, {"share": True}):
            filled = heads.Filled(loaded, store, args)
            for _ in range(3):
                filled.turn()
                if store is None:
                    assert filled.context.n_used() == 64  # of 256 cells: llama.cpp rounds up
                else:
                    assert all(filled.store.n_free(layer, 0) == 0 for layer in range(filled.store.n_layers))


def test_a_turn_that_does_not_fit_is_refused(capsys) -> None:
    with pytest.raises(SystemExit) as stop:
        heads.options(["--budget", "8"])
    assert stop.value.code == 2 and "does not fit" in capsys.readouterr().err
