"""`zoomr plan` and ``--kv-budget auto`` as a user meets them: text, JSON, exit codes, and files that are no models."""

import json
import re
import struct
import sys
from pathlib import Path

import pytest

from zoomr_cli.main import main
from zoomr_cli.plan import flag_size
from zoomr_local.plan import Measurer
from zoomr_local.sizes import parse_bytes
from zoomr_models import bundled_model_path

sys.path.append(str(Path(__file__).parent / "native"))
import tiny_models  # noqa: E402

TINY = str(bundled_model_path())


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return tiny_models.write_all(tmp_path_factory.mktemp("models"))


def run(capsys, *words: str, code: int = 0) -> tuple[str, str]:
    assert main(["plan", *map(str, words)]) == code
    return tuple(capsys.readouterr())


def as_json(capsys, *words: str, code: int = 0) -> dict:
    return json.loads(run(capsys, *words, "--json", code=code)[0])


def test_the_verdict_comes_first_and_the_command_is_whole(capsys):
    out, err = run(capsys, "--ctx", "32k", "--memory", "4GiB")
    first, _, second, third = out.splitlines()[0], *out.splitlines()[:3]
    assert re.fullmatch(r"fits: 32,768 tokens of zoomr-tiny in \S+ MiB of memory, 4 GiB given; the full cache takes \S+ MiB and would fit too", first)
    assert (second, third) == ("to run it:", "  zoomr solve problems.jsonl -n 32768 --kv-budget 2048 --kv-ram 128MiB --kv-disk 0")
    assert "was trained on 4,096 tokens" in err and "was trained" not in out


@pytest.mark.parametrize("columns", (60, 80, 120))
def test_tables_stay_inside_the_terminal(capsys, monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    out, _ = run(capsys, "--ctx", "16k", "--memory", "4GiB")
    tables = out[out.index("What 16,384") :]
    assert max(map(len, tables.splitlines())) <= columns
    if columns >= 80:
        for row in ("weights", "KV cache", "index, probe", "compute buffers", "pages in RAM", "program", "memory", "pages on disk"):
            assert re.search(rf"^ {row} ", tables, re.M), row
        assert [m.replace(",", "") for m in re.findall(r"^ +([\d,]+)  .*fits", tables, re.M)] == ["4096", "8192", "16384"]


def test_json_holds_the_same_numbers_and_they_add_up(capsys):
    found = as_json(capsys, "--ctx", "32k", "--memory", "1GiB")
    assert found["fits"] and found["next_step"] is None and found["smaller"] is None
    zoomr, full = found["zoomr"], found["full"]
    for needs in (zoomr, full):
        assert needs["total_bytes"] == sum(needs[k] for k in ("weights_bytes", "kv_bytes", "index_bytes", "compute_bytes"))
    assert found["kv"]["token_bytes"] == 4 * 2 * 128 * 2  # layers, K and V, two heads of 64, f16
    assert full["kv_bytes"] == 32768 * found["kv"]["token_bytes"]
    assert zoomr["kv_bytes"] == zoomr["kv_budget_tokens"] * found["kv"]["token_bytes"]
    assert zoomr["pages_bytes"] == 32768 * found["kv"]["page_token_bytes"] == zoomr["ram_tier_bytes"] + zoomr["disk_tier_bytes"]
    assert found["machine"]["room_bytes"] == (1 << 30) - found["machine"]["program_bytes"]
    assert [length["tokens"] for length in found["lengths"]] == [4096, 8192, 16384, 32768]
    assert found["lengths"][-1]["full_bytes"] == full["total_bytes"] + found["machine"]["program_bytes"]
    assert found["command"].split()[:3] == ["zoomr", "solve", "problems.jsonl"]


def test_every_field_is_documented(capsys):
    page = (Path(__file__).parent.parent / "docs" / "plan.md").read_text()

    def keys(value):
        for key, inner in value.items() if isinstance(value, dict) else ():
            yield key
            yield from keys(inner)
        for inner in value if isinstance(value, list) else ():
            yield from keys(inner)

    missing = {key for key in keys(as_json(capsys, "--memory", "60MiB", "--kv-budget", "100k", code=1)) if f"`{key}`" not in page}
    assert not missing


def test_too_little_memory_is_exit_code_1_with_the_next_step(capsys):
    out, _ = run(capsys, "--memory", "60MiB", "--kv-budget", "100k", code=1)
    assert out.startswith("does not fit: ") and "too little" in out.splitlines()[0]
    assert out.splitlines()[1].startswith("next smaller step: ")
    assert not as_json(capsys, "--memory", "1MiB", code=1)["fits"]


def test_a_smaller_budget_is_the_next_step_and_its_command_is_given(capsys):
    program = as_json(capsys, "--memory", "4GiB")["machine"]["program_bytes"]
    found = as_json(capsys, "--memory", str(program + (64 << 20)), "--kv-budget", "64k", code=1)
    assert found["next_step"] == "a smaller budget, --kv-budget 2048, fits"
    assert found["smaller"]["fits"] and "--kv-budget 2048" in found["command"]


def test_what_is_missing_is_the_whole_of_it_without_any_memory(capsys):
    found = as_json(capsys, "--memory", "0", code=1)
    zoomr = found["zoomr"]
    assert zoomr["short_bytes"] == zoomr["total_bytes"] + zoomr["ram_tier_bytes"] + found["machine"]["program_bytes"]
    assert found["machine"]["room_bytes"] == 0


def test_a_length_that_the_budget_holds_keeps_its_tiers_as_a_prompt_comes_on_top(capsys):
    out, err = run(capsys, "-c", "2k", "--memory", "1GiB")
    assert "--kv-budget 2048 --kv-ram 64MiB --kv-disk 0" in out.splitlines()[2]
    assert "2,048 tokens fit the budget whole" in err and "--policy full" in err
    assert "fit the budget whole" not in run(capsys, "-c", "4k", "--memory", "1GiB")[1]


def test_pages_without_a_place_are_in_the_verdict(capsys):
    out, _ = run(capsys, "--memory", "1GiB", "--kv-ram", "1MiB", "--kv-disk", "0")
    assert "given, but 67.5 MiB of its pages fit no tier; the full cache" in out.splitlines()[0]
    assert "fit no tier" not in run(capsys, "--memory", "1GiB")[0]


def test_layers_for_a_gpu_that_is_not_there_are_said(capsys):
    found = as_json(capsys, "-ngl", "99", "--memory", "1GiB")
    if not found["machine"]["gpus"]:
        assert "finds no GPU here" in run(capsys, "-ngl", "99", "--memory", "1GiB")[1]


def test_flags_reach_plan_and_command(capsys, tmp_path, files):
    found = as_json(capsys, "-m", files["llama"], "--ctx", "8k", "--memory", "2GiB", "--kv-budget", "1MiB", "--kv-type", "f16",
                    "--kv-page-type", "q8_0", "--kv-ram", "1MiB", "--kv-disk", "2MiB", "--kv-dir", tmp_path, "--no-flash-attn")  # fmt: skip
    zoomr = found["zoomr"]
    assert (zoomr["kv_budget_tokens"], zoomr["kv_ram_bytes"], zoomr["kv_disk_bytes"]) == (512, 1 << 20, 2 << 20)
    assert found["kv"]["page_type"] == "q8_0" and zoomr["missing_pages_bytes"] > 0
    assert found["command"] == (
        f"zoomr solve problems.jsonl -m {files['llama']} -n 8192 --no-flash-attn --kv-budget 512 --kv-page-type q8_0"
        f" --kv-ram 1MiB --kv-disk 2MiB --kv-dir {tmp_path}"
    )


def test_the_printed_command_is_one_that_solve_takes(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("problems.jsonl").write_text('{"id": "a", "prompt": "1+1="}\n')
    command = as_json(capsys, "--ctx", "256", "--memory", "1GiB")["command"].split()
    assert main([*command[1:], "-q"]) == 0
    assert json.loads(Path("problems.zoomr.out.jsonl").read_text())["id"] == "a"


def test_a_model_that_cannot_be_paged_is_counted_and_refused_by_name(capsys, files):
    out, err = run(capsys, "-m", files["mamba"], "--ctx", "4k")
    assert out.startswith("fits: 4,096 tokens of tiny-mamba take ") and "zoomr cannot page this model" in out.splitlines()[0]
    assert "--policy full" in out and "recurrent: the state is not made of tokens" in err
    found = as_json(capsys, "-m", files["mamba"], "--ctx", "4k")
    assert found["zoomr"] is None and not found["model"]["pageable"] and found["full"]["kv_bytes"] > 0


def test_what_cannot_be_read_is_one_line(capsys, tmp_path, files):
    whole = Path(files["gemma3"]).read_bytes()
    (tmp_path / "cut.gguf").write_bytes(whole[:50_000])
    (tmp_path / "text.gguf").write_text("not a model at all")
    (tmp_path / "layers.gguf").write_bytes(with_number(whole, "gemma3.block_count", 65536))
    (tmp_path / "pattern.gguf").write_bytes(with_number(whole, "gemma3.attention.sliding_window_pattern", 1))
    for name, said in (
        ("cut.gguf", "is cut short: it has 50,000 bytes of"), ("text.gguf", "is not a GGUF file"), (".", "is a folder"), ("none.gguf", "no model file at"),
        ("layers.gguf", "makes llama.cpp abort (SIGABRT, GGML_ASSERT("), ("pattern.gguf", "makes llama.cpp abort"),
    ):  # fmt: skip
        out, err = run(capsys, "-m", tmp_path / name, code=1)
        assert out == "" and said in err and len(err.splitlines()) == 1, err


def with_number(data: bytes, key: str, value: int) -> bytes:
    """A GGUF whose u32 ``key`` is ``value``: behind the key's text stand its type and the number."""
    at = data.index(key.encode()) + len(key) + 4
    return data[:at] + struct.pack("<I", value) + data[at + 4 :]


@pytest.mark.parametrize("words, said", [
    (["--ctx", "0"], "--ctx 0"), (["--ctx", "lots"], "--ctx lots"), (["--ctx", "2000k"], "plans go up to 1,048,576 tokens"),
    (["--memory", "8 apples"], "--memory 8 apples"), (["--kv-type", "q4_0"], "--kv-type q4_0: choose f16 or q8_0"),
    (["--kv-page-type", "q2"], "--kv-page-type q2: choose f16, q8_0 or q4_0"), (["--kv-budget", "5"], "at least 128 tokens"),
    (["--kv-budget", "3g"], "--kv-budget 3g: 1,572,864 cells"), (["--kv-budget", "many"], "a size (512MiB), or auto"),
    (["--kv-budget", "1KiB"], "--kv-budget 1KiB: 256 cells"), (["--kv-type", "q8_0", "--no-flash-attn"], "needs flash attention"),
    (["--kv-type", "q8_0", "--kv-page-type", "q8_0"], "needs --kv-type f16"), (["--kv-ram", "x"], "--kv-ram x"),
    (["--ctx", "9" * 400], "9...: give a number of tokens"), (["--memory", "9" * 5000], "9...: that is more than any disk holds"),
    (["--kv-budget", "9" * 400], "9...: give a number of tokens"), (["--kv-budget", "9" * 5000 + "g"], "9...: give a number of tokens (512, 4k), a size"),
])  # fmt: skip
def test_wrong_flags_are_exit_code_2(capsys, words, said):
    out, err = run(capsys, *words, code=2)
    assert out == "" and said in err and len(err.splitlines()) == 1, err


# ---------------------------------------------------------------- --kv-budget in the commands that generate


def solved(capsys, tmp_path, monkeypatch, *words: str, code: int = 0) -> tuple[dict | None, str]:
    monkeypatch.chdir(tmp_path)
    Path("in.jsonl").write_text('{"id": "a", "prompt": "1+1="}\n')
    assert main(["solve", "in.jsonl", "-o", "out.jsonl", "--overwrite", "-n", "4", *words]) == code
    records = Path("out.jsonl").read_text().splitlines() if Path("out.jsonl").exists() else []
    return json.loads(records[0]) if records else None, capsys.readouterr().err


def test_auto_takes_the_plans_choice_and_says_so_in_one_line(capsys, tmp_path, monkeypatch):
    record, err = solved(capsys, tmp_path, monkeypatch, "--kv-budget", "auto")
    said = [line for line in err.splitlines() if line.startswith("--kv-budget auto: ")]
    assert len(said) == 1 and said[0].startswith("--kv-budget auto: 2,048 cells, 4 MiB of KV cache; more would slow every token down (")
    assert record["id"] == "a"
    manifest = json.loads(Path("out.jsonl.manifest.json").read_text())
    assert manifest["settings"]["kv_budget"] == 2048
    assert solved(capsys, tmp_path, monkeypatch, "--kv-budget", "auto", "-q")[1] == ""


def test_a_budget_in_bytes(capsys, tmp_path, monkeypatch):
    _, err = solved(capsys, tmp_path, monkeypatch, "--kv-budget", "1MiB")
    assert "--kv-budget 1MiB: 512 cells, 1 MiB of KV cache" in err
    assert json.loads(Path("out.jsonl.manifest.json").read_text())["settings"]["kv_budget"] == 512


@pytest.mark.parametrize("text, said", [
    ("100KiB", "--kv-budget 100KiB: 256 cells, the fewest that llama.cpp allocates, take 512 KiB with zoomr-tiny (2 KiB a token)"),
    ("1000GiB", "--kv-budget 1000GiB: 524,288,000 cells; more than 1,048,576 are not planned for"),
    ("100000000", "--kv-budget 100000000: 100,000,000 cells; more than"), ("many", "a size (512MiB), or auto"),
])  # fmt: skip
def test_a_budget_that_cannot_be_is_refused_before_anything_runs(capsys, tmp_path, monkeypatch, text, said):
    record, err = solved(capsys, tmp_path, monkeypatch, "--kv-budget", text, code=2)
    assert record is None and said in err and len(err.splitlines()) == 1


def test_more_than_trained_is_said(capsys, tmp_path, monkeypatch):
    _, err = solved(capsys, tmp_path, monkeypatch, "--kv-budget", "8k")
    assert "8,192 cells, 16 MiB of KV cache; that is more than the 4,096 tokens that zoomr-tiny was trained on" in err


def test_policy_full_needs_none(capsys, tmp_path, monkeypatch):
    _, err = solved(capsys, tmp_path, monkeypatch, "--kv-budget", "auto", "--policy", "full")
    assert "policy full keeps every token" in err


@pytest.mark.parametrize("n_bytes", (0, 1, 64 << 20, 3 << 30, (1 << 20) + 1))
def test_sizes_in_commands_are_exact(n_bytes):
    assert parse_bytes(flag_size(n_bytes)) == n_bytes


def test_the_bundled_model_is_what_the_numbers_here_say():
    with Measurer(TINY) as measured:
        assert (measured.trained_tokens, measured.token_bytes()) == (4096, 2048)
