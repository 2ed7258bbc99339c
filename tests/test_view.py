"""`zoomr view`: the terminal, the page as a file, and `--trace` on the commands. In a real browser: test_view_browser.py."""

from __future__ import annotations

import json
import os
import re
import stat
import sys
from contextlib import contextmanager
from html.parser import HTMLParser
from importlib.resources import files
from io import BytesIO, TextIOWrapper
from pathlib import Path

import pytest
from scripted import ScriptedSampler
from traced import engine_of, pictures, record, thoughts

from zoomr_cli.main import main
from zoomr_cli.view_page import MARK, page
from zoomr_local.trace_file import FORMAT, read_trace
from zoomr_local.trace_view import picture

HOSTILE = (
    "</script><script>alert(1)</script><!-- <script> __DATA__ __CSP__ ]]> <img src=x onerror=alert(2)> &lt; \u2028 \u2029"
    " \x1b[2J\x1b]0;owned\x07 \ud800 \u202egpj.exe \x00 \"'`${1}"
)


class Reader(HTMLParser):
    """What a browser's parser would find: tags with attributes, and the text of each element."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict]] = []
        self.content: list[str] = []
        self._open: list[tuple[str, int]] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self.content.append("")
        if tag not in ("meta", "input"):
            self._open.append((tag, len(self.tags) - 1))

    def handle_endtag(self, tag):
        assert self._open.pop()[0] == tag, f"</{tag}> closes another element"

    def handle_data(self, data):
        if self._open:
            self.content[self._open[-1][1]] += data

    def close(self):
        super().close()
        assert not self._open, f"never closed: {self._open}"


def hostile_trace(path: Path) -> Path:
    """A sound trace in which every text is hostile."""
    def change(value):
        if isinstance(value, dict):
            return {k: v if k in ("event", "part", "reason", "where", "role", "kind") else change(v) for k, v in value.items()}
        return HOSTILE if isinstance(value, str) else [change(v) for v in value] if isinstance(value, list) else value

    record(path)
    rows = [change(json.loads(row)) for row in path.read_text().splitlines()]
    rows.insert(-2, {"event": "Warned", "message": HOSTILE})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def trace(tmp_path_factory):
    path = tmp_path_factory.mktemp("trace") / "t.jsonl"
    record(path)
    record(path, "full")
    return path


@pytest.fixture
def opened(monkeypatch):
    """The commands get the scripted engine; the reply is six thoughts and an answer."""
    ScriptedSampler.script = thoughts(6)
    made = []

    @contextmanager
    def open_engine(model_file, config, n_gpu_layers):
        with engine_of(config.policy, config.kv_budget if config.policy != "full" else 512) as engine:
            made.append(engine)
            yield engine.model, engine

    monkeypatch.setattr("zoomr_cli.solve.open_engine", open_engine)
    return made


# ---------------------------------------------------------------- the page as a file


def test_the_page_holds_what_the_trace_holds(trace, tmp_path, capsys):
    out = tmp_path / "v.html"
    assert main(["view", str(trace), "--html", str(out)]) == 0
    said = capsys.readouterr()
    assert said.out == "" and f"page: {out}" in said.err and "2 problems" in said.err
    reader = Reader(out.read_text())
    (data,) = [text for (tag, attributes), text in zip(reader.tags, reader.content) if attributes.get("type") == "application/json"]
    assert json.loads(data) == {"problems": json.loads(json.dumps(pictures(trace))), "first": 0}
    assert stat.S_IMODE(out.stat().st_mode) == 0o600


def test_the_page_needs_and_loads_nothing(trace):
    text = page(pictures(trace), 0)
    reader = Reader(text)
    tags = [tag for tag, _ in reader.tags]
    assert tags.count("script") == 2 and tags.count("style") == 1 and not {"link", "img", "iframe", "object", "base"} & set(tags)
    for tag, attributes in reader.tags:
        assert not {"src", "href", "srcset", "action", "style"} & set(attributes), (tag, attributes)
        assert not any(name.startswith("on") for name in attributes)
    template = text.replace(json.dumps(pictures(trace)), "")
    assert re.findall(r"https?://[^\"'\s]+", template) == ["http://www.w3.org/2000/svg"], "the name of a namespace, which nobody loads"
    assert "url(" not in text and "@import" not in text
    for way in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "new Function", "fetch(", "XMLHttpRequest"):
        assert way not in text, way


def test_only_its_own_script_and_style_may_run(trace):
    import base64
    import hashlib

    reader = Reader(page(pictures(trace), 0))
    (policy,) = [a["content"] for tag, a in reader.tags if a.get("http-equiv") == "Content-Security-Policy"]
    parts = dict(part.strip().split(" ", 1) for part in policy.split(";"))
    assert parts["default-src"] == "'none'" and "unsafe" not in policy and "*" not in policy
    for tag, name in (("style", "style-src"), ("script", "script-src")):
        (text,) = [t for (found, a), t in zip(reader.tags, reader.content) if found == tag and "type" not in a]
        assert parts[name] == f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def test_hostile_text_is_data_and_nothing_else(tmp_path):
    found = pictures(hostile_trace(tmp_path / "t.jsonl"))
    assert HOSTILE in found[0]["rows"][3]["text"] and found[0]["model"] == HOSTILE
    text = page(found, 0)
    reader, plain = Reader(text), Reader(page([], 0))
    assert reader.tags == plain.tags, "no element more than in a page of no problems"
    data = reader.content[[a.get("type") for _, a in reader.tags].index("application/json")]
    assert json.loads(data)["problems"] == json.loads(json.dumps(found))
    assert "<" not in data and text.count("</script") == 2 and text.isprintable() is False and "\x1b" not in text and "\u2028" not in text


def test_a_file_that_is_no_page_is_never_replaced(trace, tmp_path, capsys):
    (tmp_path / "notes.html").write_text("mine")
    assert main(["view", str(trace), "--html", str(tmp_path / "notes.html")]) == 2
    assert "it is no page of zoomr view" in capsys.readouterr().err and (tmp_path / "notes.html").read_text() == "mine"
    page_file = tmp_path / "page.html"
    assert main(["view", str(trace), "--html", str(page_file), "--problem", "2:p"]) == 0
    one = page_file.read_text()
    assert MARK in one and main(["view", str(trace), "--html", str(page_file)]) == 0 and page_file.read_text() != one
    assert main(["view", str(trace), "--html", str(tmp_path / "no" / "page.html")]) == 2
    assert "No such file" in capsys.readouterr().err and sorted(p.name for p in tmp_path.iterdir()) == ["notes.html", "page.html"]


def test_open_without_html_makes_a_private_page(trace, tmp_path, monkeypatch, capsys):
    import webbrowser

    opened = []
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(webbrowser, "open", lambda address: opened.append(address) or True)
    assert main(["view", str(trace), "--open"]) == 0
    (made,) = tmp_path.iterdir()
    assert opened == [made.as_uri()] and stat.S_IMODE(made.stat().st_mode) == 0o600
    monkeypatch.setattr(webbrowser, "open", lambda address: False)
    assert main(["view", str(trace), "--open"]) == 2 and "no browser was found; open" in capsys.readouterr().err


def test_the_template_ships_and_is_read_from_where_it_is_installed():
    for name in ("view_page.html", "view_page_heads.js"):
        template = files("zoomr_cli") / name
        assert template.is_file() and len(template.read_text().splitlines()) < 400
    project = (Path(__file__).parent.parent / "pyproject.toml").read_text()
    shipped = project.split("[tool.scikit-build.wheel.force-include]")[1].split("[")[0]
    assert 'cli = "zoomr_cli"' in shipped, "the whole folder, the template in it"
    excluded = re.findall(r"^(?:wheel|sdist)\.exclude = (.*)$", project, re.M)
    assert excluded and not any("html" in each or "js" in each for each in excluded)


# ---------------------------------------------------------------- in the terminal


def test_the_terminal_shows_rows_graph_and_list(trace, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "100")
    assert main(["view", str(trace)]) == 0
    out, err = capsys.readouterr()
    (drawn, _) = pictures(trace)
    lines = out.splitlines()
    assert lines[0] == "p: scripted, policy zoomr, 192 cells" and err == ""
    assert f"{drawn['tokens']:,} tokens, 30 of them the prompt; at most 192 in the cache\n20 thoughts, {drawn['zooms']} zooms\n" in out
    rows = [line for line in lines if re.match(r" *\d+ .*[█▲·░]", line)]
    assert len(rows) == 21 and all("█" in row for row in rows) and sum("▲" in row for row in rows) > 5
    assert any(line.strip().startswith("tokens in the KV cache") and line.endswith(" 192") for line in lines)
    listed = [line.split() for line in lines if re.match(r" *\d+ +26 +\d+ +\d+ ", line)]
    assert [int(cells[2]) for cells in listed] == [row["zooms"] for row in drawn["rows"] if row["number"] is not None]
    assert max(map(len, lines)) <= 100 and "1 of 2" not in out and "2:p  full" in out


def test_a_problem_is_chosen_by_name_and_run(trace, capsys):
    assert main(["view", str(trace), "--problem", "p"]) == 0
    assert "policy full, everything in cells" in capsys.readouterr().out, "the newest of that name"
    assert main(["view", str(trace), "--problem", "1:p"]) == 0
    assert "policy zoomr" in capsys.readouterr().out
    assert main(["view", str(trace), "--problem", "q"]) == 2
    assert "has no problem q; it has p" in capsys.readouterr().err


def test_json_is_the_picture(trace, capsys):
    assert main(["view", str(trace), "--json", "--problem", "1:p"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out) == {"torn_bytes": 0, "problems": json.loads(json.dumps(pictures(trace)[:1]))} and err == ""


def test_a_torn_end_is_said_and_the_rest_is_shown(trace, tmp_path, capsys):
    torn = tmp_path / "t.jsonl"
    torn.write_bytes(trace.read_bytes()[:-700])
    assert main(["view", str(torn)]) == 0
    assert "the last line is torn (" in capsys.readouterr().err
    assert main(["view", str(torn), "--quiet"]) == 0 and capsys.readouterr().err == ""


def test_a_terminal_obeys_nothing_of_a_trace(tmp_path, capsys):
    assert main(["view", str(hostile_trace(tmp_path / "t.jsonl"))]) == 0
    out = capsys.readouterr().out
    assert "alert(1)" in out and not {"\x1b", "\x07", "\x00", "\u202e"} & set(out)


def test_a_position_beyond_all_bounds_costs_nothing(tmp_path, capsys):
    path = tmp_path / "t.jsonl"
    rows = [
        {"event": "trace", "format": FORMAT, "model": "m", "policy": "zoomr", "budget_tokens": 64}, {"event": "problem", "id": "p"},
        {"event": "BlockClosed", "block": 1 << 39, "kind": "thought", "detail": [5, 1 << 38], "summary": None, "text": "x"},
        {"event": "cells", "points": [[0, 0], [1 << 39, 64]]}, {"event": "PagedOut", "position": 1 << 39, "blocks": [1 << 39], "part": "detail"},
    ]  # fmt: skip
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main(["view", str(path)]) == 0 and "549,755,813,888" in capsys.readouterr().out


@pytest.mark.parametrize("content, why", [(None, "cannot read"), (b"x\n", "is not a line of a trace"), (b"", "holds no trace")])
def test_what_is_no_trace_is_one_line(content, why, tmp_path, capsys):
    path = tmp_path / "t.jsonl"
    if content is not None:
        path.write_bytes(content)
    assert main(["view", str(path)]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and why in err and err.count("\n") == 1


# ---------------------------------------------------------------- --trace


def test_solve_records_and_the_records_are_the_same(opened, tmp_path, monkeypatch):
    (tmp_path / "in.jsonl").write_text('{"id": "a", "prompt": "w20 w21", "answer": "1"}\n{"id": "b", "prompt": "w22"}\n')
    monkeypatch.chdir(tmp_path)
    common = ["solve", "in.jsonl", "--kv-budget", "192", "--quiet"]
    assert main([*common, "-o", "plain.jsonl"]) == 0
    assert main([*common, "-o", "traced.jsonl", "--trace", "t.jsonl"]) == 0
    read = [[{**json.loads(row), "timing": None} for row in Path(name).read_text().splitlines()] for name in ("plain.jsonl", "traced.jsonl")]
    assert read[0] == read[1] and len(read[0]) == 2
    found = pictures(Path("t.jsonl"))
    assert [p["id"] for p in found] == ["a", "b"] and all(p["finished"]["reason"] == "stop" for p in found)
    assert found[0]["result"] == {"answer": read[0][0]["answer"], "correct": False, "error": None} and found[0]["settings"]["kv_budget"] == 192
    assert stat.S_IMODE(os.stat("t.jsonl").st_mode) == 0o600
    assert not opened[0].tell_votes and not opened[1].tell_votes


def test_the_trace_is_no_other_file_of_the_command(opened, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("in.jsonl").write_text('{"id": "a", "prompt": "w20"}\n')
    for name in ("in.jsonl", "out.jsonl", "./out.jsonl"):
        assert main(["solve", "in.jsonl", "-o", "out.jsonl", "--trace", name]) == 2
        assert "name another file" in capsys.readouterr().err
    Path("notes").write_text("mine\n")
    assert main(["solve", "in.jsonl", "-o", "out.jsonl", "--trace", "notes"]) == 2
    assert "it is no trace" in capsys.readouterr().err and Path("notes").read_text() == "mine\n"


def test_demo_records_every_policy(opened, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("zoomr_models.demo_problems_path", lambda: tmp_path / "in.jsonl")
    (tmp_path / "in.jsonl").write_text('{"id": "a", "prompt": "w20 w21", "answer": "1"}\n')
    assert main(["demo", "--kv-budget", "192", "--trace", str(tmp_path / "t.jsonl")]) == 0
    assert f"zoomr view {tmp_path / 't.jsonl'}" in capsys.readouterr().err
    assert [(p["run"], p["policy"], p["id"]) for p in pictures(tmp_path / "t.jsonl")] == [(1, "full", "a"), (2, "zoomr", "a")]


def test_chat_records_its_turns(opened, tmp_path, monkeypatch, capsys):
    ScriptedSampler.script = thoughts(2)  # more of the same would be taken for a loop
    monkeypatch.setattr(sys, "stdin", TextIOWrapper(BytesIO(b"hello w20")))
    assert main(["chat", "--no-save", "--kv-budget", "192", "--max-tokens", "300", "--trace", str(tmp_path / "t.jsonl"), "--quiet"]) == 0
    (drawn,) = pictures(tmp_path / "t.jsonl")
    assert drawn["id"] == "turn 1" and [row["kind"] for row in drawn["rows"]] == ["prompt", "thought", "thought", "answer"]
    content = read_trace(tmp_path / "t.jsonl")
    assert picture(content.problems[0])["finished"]["completion_tokens"] == len(thoughts(2))
