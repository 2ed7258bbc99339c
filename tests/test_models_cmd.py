"""`zoomr models` as a user meets it, and -m with a name of the hub in other commands. The hub is a server on this machine."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest
import typer
from hub_case import server  # noqa: F401  a fixture

from zoomr_cli.main import main
from zoomr_local import doctor, hub_cache, hub_names
from zoomr_models import BUNDLED, bundled_model_path

sys.path.append(str(Path(__file__).resolve().parent / "native"))
import tiny_models  # noqa: E402

TINY = bundled_model_path().read_bytes()
ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def hub(server):  # noqa: F811
    server.repos["user/tiny"] = {"tiny-Q8_0.gguf": TINY, "config.json": b"{}"}
    return server


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return tiny_models.write_all(tmp_path_factory.mktemp("models"))


def run(capsys, *words: object, code: int = 0) -> tuple[str, str]:
    assert main(["models", *map(str, words)]) == code
    return tuple(capsys.readouterr())


def as_json(capsys, *words: object) -> dict:
    return json.loads(run(capsys, *words, "--json")[0])


def test_pull_then_ls_then_show_then_rm(hub, capsys):
    out, err = run(capsys, "pull", "user/tiny")
    path = Path(out.strip())
    assert path.read_bytes() == TINY and err.splitlines()[0].startswith("fetching user/tiny:Q8_0 from http://127.0.0.1")
    assert err.splitlines()[-1] == "user/tiny:Q8_0 is here; to use it: -m user/tiny:Q8_0"
    rows = as_json(capsys, "ls")["models"]
    assert rows[0]["name"] == "zoomr-tiny" and rows[0]["from"] == "bundled" and rows[0]["quant"] == "Q8_0"
    assert [row["name"] for row in rows[: len(BUNDLED)]] == list(BUNDLED)
    assert rows[len(BUNDLED)] == {"name": "user/tiny:Q8_0", "quant": "Q8_0", "size_bytes": len(TINY), "path": str(path), "from": "hub", "parts": 1, "missing_parts": 0}
    out, err = run(capsys, "ls")
    table = out.splitlines()
    assert err == ""
    assert table[0].split() == ["name", "quant", "size", "path"] and re.match(r"user/tiny:Q8_0 +Q8_0 +3.3 MiB +/", table[1 + len(BUNDLED)])
    assert as_json(capsys, "show", "user/tiny")["file"] == str(path)
    out, err = run(capsys, "rm", "user/tiny:q8_0", "--yes")
    assert out == "" and err.splitlines() == ["user/tiny:Q8_0  tiny-Q8_0.gguf  3.3 MiB", "3.3 MiB are free"]
    assert not path.exists() and len(as_json(capsys, "ls")["models"]) == len(BUNDLED)
    assert run(capsys, "ls")[1] == "the hub's cache holds no GGUF model; to fetch one: zoomr models pull user/repo[:quant]\n"


def test_pull_as_json_and_quiet_and_again(hub, capsys):
    first = as_json(capsys, "pull", "user/repo:f16", "-q")
    assert (first["name"], first["quant"], first["size_bytes"], first["fetched_bytes"]) == ("user/repo:F16", "F16", 50_000, 50_000)
    assert first["files"] == ["big/m-F16-00001-of-00002.gguf", "big/m-F16-00002-of-00002.gguf"] and first["path"].endswith(first["files"][0])
    assert as_json(capsys, "pull", "user/repo:F16")["fetched_bytes"] == 0
    assert "user/repo:F16 is here already" in run(capsys, "pull", "user/repo:F16")[1]
    assert run(capsys, "pull", "user/repo:F16", "-q")[1] == ""


def test_pull_list_fetches_nothing(hub, capsys):
    out, _ = run(capsys, "pull", "--list", "user/repo")
    assert out.splitlines() == ["user/repo:Q4_K_M  48.8 KiB  (taken if none is named)", "user/repo:Q8_0  87.9 KiB", "user/repo:F16  48.8 KiB"]
    assert hub.fetched() == []
    run(capsys, "pull", "user/repo:Q8_0")
    listed = as_json(capsys, "pull", "--list", "user/repo:Q8_0")["models"]
    assert [(m["quant"], m["cached"], m["chosen"]) for m in listed] == [("Q4_K_M", False, False), ("Q8_0", True, True), ("F16", False, False)]


def test_a_download_that_was_cut_off_is_in_ls(hub, capsys):
    hub.cut_after, hub.then_cut_after = 20_000, 0
    assert "goes on from there" in run(capsys, "pull", "user/repo:Q8_0", code=1)[1]
    assert "19.5 KiB of downloads that were cut off" in run(capsys, "ls")[1]
    assert as_json(capsys, "ls")["incomplete"][0]["size_bytes"] == 20_000
    said = run(capsys, "rm", "user/repo", "--yes", code=2)[1]
    assert "user/repo is not in" in said and "there are user/repo" not in said and ".incomplete" in said


def test_a_split_model_that_was_cut_off_is_listed_counted_and_removed(hub, capsys):
    real = hub.repos["user/repo"]["big/m-F16-00002-of-00002.gguf"]
    path = Path(run(capsys, "pull", "user/repo:F16")[0].strip())
    second = path.with_name("m-F16-00002-of-00002.gguf")
    blob = second.resolve()
    second.unlink(), blob.rename(blob.with_name(blob.name + ".incomplete")).write_bytes(real[:5_000])
    row = as_json(capsys, "ls")["models"][len(BUNDLED)]
    assert (row["name"], row["size_bytes"], row["parts"], row["missing_parts"]) == ("user/repo:F16", 30_000, 1, 1)
    assert re.search(r"user/repo:F16 +F16 +29.3 KiB, 1 of 2 parts +/", run(capsys, "ls")[0])
    checked = doctor.hub_folder()
    assert checked.data["used_bytes"] == 30_000 and (checked.data["models"], checked.data["partial_models"]) == (0, 1) and checked.status == "note"
    assert hub_cache.find(hub_names.parse("user/repo:F16")) is None, "half a model is none"
    done = as_json(capsys, "rm", "user/repo:F16", "-y")
    assert done == {"removed": ["user/repo:F16"], "freed_bytes": 30_000} and not path.exists()
    run(capsys, "pull", "user/repo:F16")
    second.unlink()
    err = run(capsys, "rm", "user/repo", "-y")[1]
    assert "user/repo:F16  big/m-F16-00001-of-00002.gguf  29.3 KiB, 1 of 2 parts" in err and not path.exists()


def test_two_files_of_one_quantisation_are_named_by_their_files(hub, capsys):
    hub.repos["user/two"] = {"a-Q8_0.gguf": TINY, "b-Q8_0.gguf": TINY + b"\0"}
    for name in ("a-Q8_0.gguf", "b-Q8_0.gguf"):
        said = run(capsys, "pull", f"user/two:{name}")[1]
        assert said.splitlines()[-1] == f"user/two:{name} is here; to use it: -m user/two:{name}"
    rows = as_json(capsys, "ls")["models"][len(BUNDLED) :]
    assert [row["name"] for row in rows] == ["user/two:a-Q8_0.gguf", "user/two:b-Q8_0.gguf"]
    assert [model["name"] for model in as_json(capsys, "pull", "--list", "user/two")["models"]] == [row["name"] for row in rows]
    for row in rows:
        assert as_json(capsys, "show", row["name"])["file"] == row["path"]


def test_the_address_of_another_revision_is_refused(hub, capsys):
    said = run(capsys, "pull", "https://hf.co/user/repo/resolve/v9/m-Q8_0.gguf", code=2)[1]
    assert "names revision v9 of user/repo, and only branch main is fetched" in said and said.count("\n") == 1 and hub.requests == []


def test_m_takes_the_hubs_names_and_fetches_once(hub, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("in.jsonl").write_text('{"id": "a", "prompt": "1+1="}\n')
    assert main(["solve", "in.jsonl", "-m", "user/tiny", "-n", "4", "-o", "out.jsonl", "-q"]) == 0
    assert "fetching user/tiny:Q8_0" in capsys.readouterr().err
    assert json.loads(Path("out.jsonl.manifest.json").read_text())["model"]["file"] == "tiny-Q8_0.gguf"
    before = len(hub.requests)
    assert main(["plan", "-m", "hf.co/user/tiny:Q8_0", "--memory", "1GiB", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["model"]["name"] == "zoomr-tiny" and len(hub.requests) == before
    assert main(["solve", "in.jsonl", "-m", "zoomr-tiny", "-n", "4", "-o", "again.jsonl", "-q"]) == 0


def test_show_does_not_fetch(hub, capsys):
    _, err = run(capsys, "show", "user/tiny", code=1)
    assert "user/tiny is not in the cache; `zoomr models pull --list user/tiny` says what there is, `zoomr models pull user/tiny` fetches it" in err
    assert hub.requests == []


def test_rm_asks_and_refuses_what_is_not_the_caches(hub, capsys, tmp_path, monkeypatch):
    path = Path(run(capsys, "pull", "user/repo:Q8_0")[0].strip())
    assert "asks first, and nobody is at the terminal; add --yes" in run(capsys, "rm", "user/repo", code=2)[1]
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    asked = []
    monkeypatch.setattr(typer, "confirm", lambda text, **more: asked.append(text) or (_ for _ in ()).throw(typer.Abort()))
    assert run(capsys, "rm", "user/repo", code=130)[1].endswith("error: interrupted\n") and asked[0].startswith("remove 87.9 KiB from ")
    assert path.exists()
    (tmp_path / "mine.gguf").write_bytes(b"x")
    for name, said in (
        ("zoomr-tiny", "is part of zoomr-local"), (tmp_path / "mine.gguf", "only the hub's cache is cleared"), ("user/other", "is not in"),
        ("user/repo:Q2_K", "user/repo:Q2_K is not in"), ("nothing", "is not of the form user/repo[:quant]"),
    ):  # fmt: skip
        assert said in run(capsys, "rm", name, "--yes", code=2)[1]
    assert path.exists() and (tmp_path / "mine.gguf").exists()


def test_rm_of_a_repository_takes_all_its_models(hub, capsys):
    run(capsys, "pull", "user/repo:Q8_0"), run(capsys, "pull", "user/repo")
    assert as_json(capsys, "rm", "user/repo", "--yes") == {"removed": ["user/repo:Q4_K_M", "user/repo:Q8_0"], "freed_bytes": 140_000}
    assert len(as_json(capsys, "ls")["models"]) == len(BUNDLED)


# ---------------------------------------------------------------- show


@pytest.mark.parametrize("name", ["\x1b[2Jname.gguf", "\udcff.gguf"], ids=["escape", "no UTF-8"])
def test_names_of_files_cannot_write_to_the_terminal(hub, capsys, name):
    commit = hub_cache.repo_dir("user/odd") / "snapshots/c"
    commit.mkdir(parents=True)
    (commit / name).write_bytes(b"x")
    hub.repos["user/odd"] = {"\x1b[2Jname.gguf": b"x"}
    said = "".join([*run(capsys, "ls"), *run(capsys, "pull", "--list", "user/odd"), *run(capsys, "pull", "user/odd:no", code=1), *run(capsys, "rm", "user/odd", "-y")])
    assert "\x1b" not in said and said.encode()
    assert not (commit / name).exists()


def test_show_of_the_bundled_model(capsys):
    found = as_json(capsys, "show", "zoomr-tiny")
    expected = {"architecture": "llama", "quant": "Q8_0", "layers": 4, "heads": 4, "kv_heads": 2, "head_dim": 64, "kv_token_bytes": 2048,
                "trained_tokens": 4096, "window_tokens": 0, "dialect": "learned", "pageable": True, "refused": None}  # fmt: skip
    assert {key: found[key] for key in expected} == expected
    assert "<|im_start|>" in found["template"] and found["size_bytes"] > 3 << 20
    text = run(capsys, "show", "zoomr-tiny")[0]
    for row in ("KV cache        2 KiB a token (f16)", "heads           4 query, 2 KV, of 64", "trained on      4,096 tokens", "paging          yes"):
        assert row in text.splitlines()
    assert "dialect         learned: " in text


@pytest.mark.parametrize("name, expected", [
    ("llama", {"layers": 3, "heads": 4, "kv_heads": 2, "head_dim": 64, "kv_token_bytes": 3 * 2 * 2 * 64 * 2, "dialect": "extractive", "template": None}),
    ("qwen2", {"architecture": "qwen2", "layers": 2, "pageable": True}), ("gemma3", {"window_tokens": 64, "kv_token_bytes": 2 * 2 * 2 * 64 * 2, "pageable": True}),
    ("mamba", {"pageable": False, "heads": 0, "head_dim": None, "kv_token_bytes": 0}), ("mrope", {"pageable": False}), ("longrope", {"pageable": False}),
])  # fmt: skip
def test_show_of_other_architectures(files, capsys, name, expected):
    found = as_json(capsys, "show", files[name])
    assert {key: found[key] for key in expected} == expected
    text = run(capsys, "show", files[name])[0]
    if not found["pageable"]:
        assert found["refused"] and f"paging          no: {found['refused']}. Run it with --policy full" in text
    if found["template"] is None:
        assert "template        none: a single message is put as it is" in text


def test_every_field_is_documented(hub, capsys):
    page = (ROOT / "docs" / "models.md").read_text()
    fields = {*as_json(capsys, "show", "zoomr-tiny"), *as_json(capsys, "pull", "user/tiny"), *as_json(capsys, "ls"), *as_json(capsys, "ls")["models"][0]}
    fields |= {*as_json(capsys, "pull", "--list", "user/tiny"), *as_json(capsys, "pull", "--list", "user/tiny")["models"][0], *as_json(capsys, "rm", "user/tiny", "--yes")}
    assert not {field for field in fields if f"`{field}`" not in page}




def test_no_is_an_answer_and_no_interruption(hub, capsys, monkeypatch):
    run(capsys, "pull", "user/tiny")
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    monkeypatch.setattr(typer, "confirm", lambda text, **_: False)
    out, err = run(capsys, "rm", "user/tiny")
    assert "nothing was removed" in err and hub_cache.find(hub_names.parse("user/tiny")) is not None
