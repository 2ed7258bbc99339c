"""`zoomr view` of per-head caches: the maps in the terminal, and in a real browser where one is found."""

from __future__ import annotations

import json
import re
from contextlib import contextmanager
from io import BytesIO, TextIOWrapper

import book_heads
import browser
import pytest
from scripted import ScriptedSampler
from talk import UNTHINK, words
from test_trace_heads import record
from traced import pictures
from traced import record as record_blocks

from zoomr_cli import view_heads
from zoomr_cli.main import main
from zoomr_cli.view_page import page
from zoomr_local.trace_held import held_at, last_row

in_browser = pytest.mark.skipif(browser.find() is None, reason=browser.WHY_NOT)


def heads_of(layers, kv_heads, held=(), budgets=(), cells=100):
    return {
        "kv_heads": kv_heads, "layer_cells": [cells] * layers, "shared": False, "recalls": False, "selections": 1, "freed_cells": 2,
        "recalled_cells": 0, "held": list(held) or [[] for _ in range(layers)], "budgets": list(budgets) or [[] for _ in range(layers)],
    }  # fmt: skip


@pytest.fixture(scope="module")
def trace(tmp_path_factory):
    path = tmp_path_factory.mktemp("heads") / "t.jsonl"
    record(path, "reasonalloc")
    return path


# ---------------------------------------------------------------- in the terminal


def shades_of(line):
    return re.search(r"[ ·░▒▓█]{20,}", line.replace("layer", "").replace("head", "")).group().strip()


def test_the_maps_are_what_was_recorded(trace, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    assert main(["view", str(trace)]) == 0
    lines = capsys.readouterr().out.splitlines()
    (drawn,) = pictures(trace)
    heads, end = drawn["heads"], drawn["tokens"]
    assert max(map(len, lines)) <= 80
    at_end = [last_row(rows, end)[1:] for rows in heads["held"]]
    budgets = [last_row(rows, end)[1:] for rows in heads["budgets"]]
    layers = [line for line in lines if re.match(r" *layer \d [ ·░▒▓█]", line)]
    assert [line.split()[-1] for line in layers] == [f"{sum(kept) / 2:.0f}/{cells}" for kept, cells in zip(at_end, heads["layer_cells"])]
    rows = [line for line in lines if re.search(r"head \d ", line)]
    assert [line.split()[-1] for line in rows] == [f"{kept}/{budget}" for layer, of in zip(at_end, budgets) for kept, budget in zip(layer, of)]
    scale = view_heads.scale_of(heads, view_heads.SHADES)
    assert [shades_of(row)[-1] for row in rows] == [scale.shade(budget) for layer in budgets for budget in layer]
    assert len(set("".join(shades_of(row) for row in rows))) >= 4, "a head of the last layer has twice the tokens of one of the first"
    said = " ".join(" ".join(lines).split())
    assert f"{heads['selections']:,} selections; {heads['freed_cells']:,} cells of single heads freed." in said and "Budget of each KV head" in said
    assert "each layer and head has its own part of it" in said and "zoomed" not in said


@pytest.mark.parametrize("columns", [20, 40, 59, 80, 200])
def test_it_fits_every_width_also_in_ascii(trace, columns, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setenv("NO_COLOR", "1")
    (drawn,) = pictures(trace)
    for unicode in (True, False):
        lines = view_heads.maps(drawn, columns, unicode)
        assert columns < 40 or max(map(len, lines)) <= columns
        assert unicode or "\n".join(lines).isascii()
    out = TextIOWrapper(BytesIO(), encoding="ascii")
    monkeypatch.setattr("sys.stdout", out)
    assert main(["view", str(trace)]) == 0
    out.flush()
    assert max(map(len, out.buffer.getvalue().decode("ascii").splitlines())) <= columns


def test_shades_and_their_legend_mean_the_same():
    for low, high in ((0, 4), (3, 3), (7, 8), (228, 577), (0, 1000), (5, 7)):
        scale = view_heads.Scale(low, high, view_heads.SHADES)
        named = {}
        for entry in scale.legend():
            shade, first, last = re.fullmatch(r"(.) ([\d,]+)(?: to ([\d,]+))?(?: tokens)?", entry).groups()
            first = int(first.replace(",", ""))
            named.update(dict.fromkeys(range(first, int((last or str(first)).replace(",", "")) + 1), shade))
        assert named == {n: scale.shade(n) for n in range(low, high + 1)}, (low, high)
        assert scale.shade(low - 1) == " "


def test_next_to_equal_numbers_look_so():
    held = [[[50, 383, 384]], [[50, 384, 384]]]
    scale = view_heads.scale_of(heads_of(2, 2, held, cells=400), view_heads.SHADES)
    assert (scale.low, scale.high, scale.shade(383)) == (307, 384, scale.shade(384))
    assert view_heads.scale_of(heads_of(1, 1, [[[9, 2], [12, 9]]]), view_heads.SHADES).low == 2


def test_many_layers_and_heads_are_grouped_and_that_is_said():
    def drawn(layers, kv_heads):
        held = [[[50, *(layer + head for head in range(kv_heads))]] for layer in range(layers)]
        text = view_heads.maps({"heads": heads_of(layers, kv_heads, held, cells=1000), "tokens": 500}, 80, True)
        assert max(map(len, text)) <= 80
        return text, [line for line in text if re.search(r"heads? \d", line) and "KV" not in line]

    text, rows = drawn(28, 8)
    assert len(rows) == 56 and "a row is the mean of 4" in " ".join(text)
    assert [line.split()[-1] for line in rows[:3]] == ["2", "6", "2"], "1.5, 5.5 and 2.5"
    text, rows = drawn(80, 8)
    assert not rows and "too many rows for a terminal; --html draws each" in " ".join(" ".join(text).split())
    layers = [line for line in text if line.lstrip().startswith("layer")]
    assert len(layers) == 27 and layers[0].lstrip().startswith("layers 0-2") and layers[0].endswith(" 4/1,000"), "the mean of 3.5, 4.5 and 5.5"
    text, rows = drawn(4, 1)
    assert not rows and "too many" not in " ".join(text) and "in its one KV head" in " ".join(text)


def test_before_a_selection_everything_is_kept():
    lines = view_heads.maps({"heads": heads_of(2, 2), "tokens": 60}, 80, True)
    assert [line.split()[-1] for line in lines if line.startswith("layer")][:2] == ["60/100", "60/100"]


def test_a_trace_of_blocks_has_no_maps(tmp_path, capsys):
    record_blocks(tmp_path / "t.jsonl")
    assert main(["view", str(tmp_path / "t.jsonl")]) == 0
    out = capsys.readouterr().out
    assert "KV head" not in out and "zoomed: the heads vote for it" in out and pictures(tmp_path / "t.jsonl")[0]["heads"] is None


# ---------------------------------------------------------------- --trace on the commands


@pytest.mark.parametrize("policy", ["rkv", "reasonalloc"])
def test_solve_records_them_and_the_records_are_the_same(policy, tmp_path, monkeypatch):
    @contextmanager
    def open_engine(model_file, config, n_gpu_layers):
        with book_heads.engine_of(config.policy, config.kv_budget) as engine:
            yield engine.model, engine

    ScriptedSampler.script = [*words(300), UNTHINK, *words(20)]
    monkeypatch.setattr("zoomr_cli.solve.open_engine", open_engine)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in.jsonl").write_text('{"id": "a", "prompt": "w20 w21", "answer": "1"}\n{"id": "b", "prompt": "w22"}\n')
    common = ["solve", "in.jsonl", "--policy", policy, "--kv-budget", "128", "--quiet"]
    assert main([*common, "-o", "plain.jsonl"]) == 0
    assert main([*common, "-o", "traced.jsonl", "--trace", "t.jsonl"]) == 0
    read = [[{**json.loads(row), "timing": None} for row in (tmp_path / name).read_text().splitlines()] for name in ("plain.jsonl", "traced.jsonl")]
    assert read[0] == read[1] and len(read[0]) == 2
    found = pictures(tmp_path / "t.jsonl")
    assert [p["id"] for p in found] == ["a", "b"] and all(p["heads"]["selections"] > 5 and p["finished"]["reason"] == "stop" for p in found)
    assert [p["heads"]["layer_cells"] for p in found] == [record["kv"]["layer_cells"] for record in read[1]]


# ---------------------------------------------------------------- in a browser


@pytest.fixture(scope="module")
def made(trace, tmp_path_factory):
    """A page of a per-head cache and, second, one of blocks."""
    folder = tmp_path_factory.mktemp("page")
    record_blocks(folder / "b.jsonl")
    found = [*pictures(trace), *pictures(folder / "b.jsonl")]
    (folder / "v.html").write_text(page(found, 0))
    return folder / "v.html", found


def stretches(shown, map_number):
    """[from, to, y, level] of every box in a map."""
    paths = shown.run(f"[...document.querySelectorAll('.map')[{map_number}].querySelectorAll('svg path')].map(p => [p.getAttribute('class'), p.getAttribute('d')])")
    found = []
    for name, d in paths:
        for part in d.split("M")[1:]:
            x, y, to = re.match(r"([\d.]+) ([\d.]+)H([\d.]+)V", part).groups()
            found.append((int(x), int(to), int(y), int(name[1:])))
    return sorted(found, key=lambda box: (box[2], box[0]))


@in_browser
def test_the_page_draws_what_was_recorded(made, shown):
    path, (drawn, _) = made
    shown.load(path)
    heads, end = drawn["heads"], drawn["tokens"]
    scale = view_heads.scale_of(heads, "123456789")
    for number, (each, of) in enumerate(((False, "held"), (True, "held"))):
        boxes = stretches(shown, number)
        ys = sorted({y for _, _, y, _ in boxes})
        wanted = [(layer, head) for layer in range(3) for head in ((0, 1) if each else (None,))]
        assert len(ys) == len(wanted)
        for y, (layer, head) in zip(ys, wanted):
            row = [(a, b, level) for a, b, at, level in boxes if at == y]
            assert row[0][0] == 0 and row[-1][1] == end and all(x[1] == z[0] for x, z in zip(row, row[1:])), "no gaps"
            for a, b, level in row:
                for at in (a, (a + b) // 2, b - 1):
                    kept = view_heads.after_selection(heads, layer, at)
                    expected = scale.shade(sum(kept) / 2 if head is None else kept[head])
                    assert str(level) == (expected if expected != " " else "0"), (layer, head, at)
    assert shown.said == []


@in_browser
def test_pointing_at_a_head_says_its_tokens_and_its_budget(made, shown):
    path, (drawn, _) = made
    shown.load(path)
    heads = drawn["heads"]
    shown.run("document.querySelectorAll('.map .area')[1].scrollIntoView({block: 'center'})")
    left, top, width, height = shown.run("(r => [r.x, r.y, r.width, r.height])(document.querySelectorAll('.map .area')[1].getBoundingClientRect())")
    shown.call("Input.dispatchMouseEvent", type="mouseMoved", x=left + width * 0.7, y=top + height - 4)
    at = shown.run("shown.at")
    assert abs(at - 0.7 * drawn["tokens"]) < 3
    said = shown.run("[...document.querySelectorAll('.readout')].at(-1).textContent")
    budget = last_row(heads["budgets"][2], at)[2]
    assert said.startswith(f"After {at} tokens, layer 2, head 1: {held_at(heads, 2, at)[1]} tokens; at a selection it may keep {budget}.")
    assert shown.run("[...document.querySelectorAll('.map .mark')].map(m => m.hidden)") == [True, False]
    shown.run("document.querySelectorAll('.map .area')[1].focus()")
    shown.press("ArrowUp")
    shown.press("ArrowLeft")
    said = shown.run("[...document.querySelectorAll('.readout')].at(-1).textContent")
    assert ", layer 2, head 0: " in said and shown.run("shown.at") < at
    shown.run("(s => { s.value = '1'; s.dispatchEvent(new Event('change')) })(document.querySelector('h3 select'))")
    assert stretches(shown, 1)[-1][3] == int(view_heads.scale_of(heads, "123456789").shade(last_row(heads["budgets"][2], 10**6)[2]))
    shown.click("section[aria-label='Layers and heads'] details summary")
    shown.met(".scroll tr")
    cells = shown.run("[...document.querySelectorAll('.scroll tr')].map(r => [...r.children].map(c => c.textContent))")
    now = shown.run("shown.at")
    assert cells[0] == ["layer", "cells a head", "head 0", "head 1"] and len(cells) == 4
    assert cells[1][2].startswith(f"{held_at(heads, 0, now)[0]} of ") and shown.said == []


@in_browser
@pytest.mark.parametrize("width, dark", [(1200, True), (360, False)])
def test_the_maps_fit_a_phone_and_both_schemes(made, shown, width, dark):
    path, _ = made
    shown.look(width, 800, dark)
    shown.load(path)
    assert shown.run("document.documentElement.scrollWidth") <= width
    assert shown.run("[...document.querySelectorAll('.map .area')].every(s => s.getBoundingClientRect().width > 200)")
    boxes = "[...document.querySelectorAll('.map .tick')].map(t => t.getBoundingClientRect()).filter(r => r.width)"
    assert shown.run(f"{boxes}.every(r => r.left >= 0 && r.right <= {width})"), "no label is cut off"
    assert shown.run("[...document.querySelectorAll('.bar span')].length") == 10
    shades = shown.run("[...document.querySelectorAll('.bar path')].map(p => getComputedStyle(p).fill)")
    assert len(set(shades)) == 10 and shown.said == []


@in_browser
def test_another_problem_of_the_page_has_its_own_words(made, shown):
    path, _ = made
    shown.load(path)
    assert shown.run("document.getElementById('how-blocks').hidden") and "KV heads" in shown.run("document.body.innerText")
    shown.run("(s => { s.value = 1; s.dispatchEvent(new Event('change')) })(document.getElementById('problem'))")
    assert shown.run("document.getElementById('how-heads').hidden") and "KV heads" not in shown.run("document.body.innerText")
    assert not shown.run("document.getElementById('how-blocks').hidden") and shown.said == []
