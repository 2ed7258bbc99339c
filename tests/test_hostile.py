"""Files that are no models, or are made to do harm: one line and exit code 1 from every command, and no second look at good files."""

from __future__ import annotations

import io
import os
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from zoomr_cli.main import main
from zoomr_local import gguf_file, trial
from zoomr_local.errors import EngineError, ModelError, StorageError
from zoomr_local.model import Model
from zoomr_models import bundled_model_path

sys.path.append(str(Path(__file__).resolve().parent.parent))  # benchmarks are not installed

from benchmarks import mutants  # noqa: E402

ENDLESS = "{% for i in range(99999) %}{% for j in range(99999) %}{% for k in range(99999) %}{% endfor %}{% endfor %}{% endfor %}"


@pytest.fixture(scope="module")
def sound() -> mutants.Gguf:
    return mutants.Gguf.read(bundled_model_path())


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    """A cache folder in which no file has passed yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
    monkeypatch.setattr(trial, "_passed", set())
    monkeypatch.delenv("ZOOMR_DEBUG", raising=False)


def value(file: mutants.Gguf, key: str, new: bytes) -> bytes:
    """The file with other bytes behind the type of metadata ``key``."""
    (found,) = [v for v in file.values if v.key == key]
    return file.joined(file.head[: found.at] + new + file.head[found.end :])


def text(new: str) -> bytes:
    return struct.pack("<Q", len(new.encode())) + new.encode()


def hostile(file: mutants.Gguf) -> dict[str, tuple[bytes, str]]:
    """Bytes of files by name, and what is said of each."""
    whole = file.joined(file.head)
    return {
        "cut.gguf": (whole[:-5], f"is cut short: it has {len(whole) - 5:,} bytes of the {len(whole):,} that its header announces"),
        "words.gguf": (b"these are words", "is not a GGUF file (it starts with b'thes', not b'GGUF')"),
        "empty.gguf": (b"", "is not a GGUF file (it starts with b'', not b'GGUF')"),
        "layers.gguf": (value(file, "llama.block_count", struct.pack("<I", 65536)), "makes llama.cpp abort (SIGABRT, GGML_ASSERT("),
        "unknown.gguf": (value(file, "general.architecture", text("notyetmade")), "unknown model architecture: 'notyetmade'"),
        "count.gguf": (whole[:16] + struct.pack("<Q", 2**63 - 1) + whole[24:], "announces 9,223,372,036,854,775,807 metadata values"),
    }


COMMANDS = {
    "solve": ["solve", "in.jsonl", "-o", "out.jsonl", "-n", "4"], "eval": ["eval", "-n", "1", "--policy", "zoomr", "--kv-budget", "512", "-o", "e"],
    "demo": ["demo"], "bench": ["bench", "-d", "256", "--force"], "plan": ["plan"], "show": ["models", "show"],
    "auto": ["solve", "in.jsonl", "-o", "out.jsonl", "--kv-budget", "auto"], "full": ["solve", "in.jsonl", "-o", "out.jsonl", "--policy", "full"], "chat": ["chat"],
}  # fmt: skip


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_says_it_in_one_line(command, sound, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("in.jsonl").write_text('{"id": "a", "prompt": "1+1="}\n')
    for name, (data, said) in hostile(sound).items():
        Path(name).write_bytes(data)
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"1 + 1 = ?\n")))
        words = COMMANDS[command]
        code = main([*words, name] if command == "show" else [*words, "-m", name])
        out, err = capsys.readouterr()
        last = err.splitlines()[-1]
        assert code == 1 and out == "", (name, out, err)
        assert last.startswith("error: ") and said in last and name in last, (name, err)
        assert "Traceback" not in err and len(err.splitlines()) <= (2 if command == "demo" else 1), err  # demo says first what it will do


def test_a_template_that_never_ends_is_found(sound, tmp_path, monkeypatch):
    path = tmp_path / "endless.gguf"
    path.write_bytes(value(sound, "tokenizer.chat_template", text(ENDLESS)))
    monkeypatch.setattr(trial, "TRIAL_SECONDS", 8)
    with pytest.raises(ModelError, match="kept llama.cpp or its own chat template busy for 8 seconds"):
        Model.open(path)


def test_a_template_that_eats_memory_is_found(sound, tmp_path):
    path = tmp_path / "eats.gguf"
    path.write_bytes(value(sound, "tokenizer.chat_template", text("{{ 'a' * 20000000000 }}")))
    with pytest.raises(ModelError, match="makes more text than there is memory"):
        Model.open(path)


@pytest.mark.parametrize("template", ["{{ 1 / 0 }}", "{% for %}", "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "{{ range(10**9) }}"])
def test_a_template_that_fails_is_one_problem_of_the_input(template, sound, tmp_path, monkeypatch, capsys):
    """Exit code 3: the problem has its record."""
    monkeypatch.chdir(tmp_path)
    Path("in.jsonl").write_text('{"id": "a", "prompt": "1+1="}\n')
    Path("odd.gguf").write_bytes(value(sound, "tokenizer.chat_template", text(template)))
    assert main(["solve", "in.jsonl", "-o", "out.jsonl", "-m", "odd.gguf", "-q"]) == 3
    assert "the chat template of zoomr-tiny refused the messages" in Path("out.jsonl").read_text()
    assert "Traceback" not in capsys.readouterr().err


def test_names_from_files_cannot_write_to_the_terminal(sound, tmp_path, capsys):
    path = tmp_path / "named.gguf"
    path.write_bytes(value(sound, "general.name", text("\x1b[2Jowned\nerror: fake")))
    assert main(["models", "show", str(path)]) == 0
    out, err = capsys.readouterr()
    assert "\x1b" not in out + err and "[2Jowned error: fake" in out and not any(line.startswith("error") for line in out.splitlines())


def test_llama_cpp_giving_up_while_it_computes_is_one_line(tmp_path):
    """The net below the trial: what asserts in a running graph ends the process quietly."""
    script = "from zoomr_local.libllama.library import llama, LIBRARY_PATH\nimport ctypes\nctypes.CDLL(str(LIBRARY_PATH)).ggml_abort(b'x.cpp', 1, b'GGML_ASSERT(%s) failed', b'rows')"
    clean = {k: v for k, v in os.environ.items() if k != "ZOOMR_DEBUG"}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=clean)
    assert done.returncode == 1
    assert done.stderr == "error: llama.cpp gave up (GGML_ASSERT(rows) failed); the model file is most likely damaged, or made for another version\n"
    loud = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env={**clean, "ZOOMR_DEBUG": "1"})
    assert loud.returncode == -6


# ---------------------------------------------------------------- the second time


def counted(monkeypatch) -> list[Path]:
    tried: list[Path] = []
    real = trial._try_elsewhere
    monkeypatch.setattr(trial, "_try_elsewhere", lambda path: (tried.append(path), real(path)))
    return tried


def test_a_good_file_is_tried_once_and_again_when_it_changes(tmp_path, monkeypatch):
    tried = counted(monkeypatch)
    path = tmp_path / "m.gguf"
    path.write_bytes(bundled_model_path().read_bytes())
    for _ in range(2):
        assert trial.check(path) == path
    trial._passed.clear()  # another process
    trial.check(str(path))
    assert tried == [path]
    info = path.stat()
    path.write_bytes(path.read_bytes()[::-1][:-4] + b"GGUF")  # same name, size and, below, time
    os.utime(path, ns=(info.st_atime_ns, info.st_mtime_ns))
    with pytest.raises(ModelError, match="not a GGUF file"):
        trial.check(path)


def test_a_bad_file_is_never_remembered(sound, tmp_path, monkeypatch):
    tried = counted(monkeypatch)
    path = tmp_path / "bad.gguf"
    path.write_bytes(value(sound, "llama.block_count", struct.pack("<I", 65536)))
    for _ in range(2):
        with pytest.raises(ModelError, match="abort"):
            trial.check(path)
    assert len(tried) == 2


def test_only_so_many_files_are_remembered(tmp_path, monkeypatch):
    monkeypatch.setattr(trial, "_try_elsewhere", lambda path: None)
    monkeypatch.setattr(trial, "MOST_REMEMBERED", 3)
    for i in range(5):
        (tmp_path / f"{i}.gguf").write_bytes(bundled_model_path().read_bytes())
        trial.check(tmp_path / f"{i}.gguf")
    assert len(list((Path(os.environ["XDG_CACHE_HOME"]) / "zoomr-local/tried").iterdir())) == 3


def test_without_a_cache_folder_it_works_too(tmp_path, monkeypatch):
    monkeypatch.setattr(trial, "_try_elsewhere", lambda path: None)
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert trial.check(bundled_model_path())


@pytest.mark.parametrize("error", [PermissionError(13, "Permission denied"), StorageError("no home folder")])
def test_a_cache_folder_that_may_not_be_looked_into_or_has_no_home(error, monkeypatch):
    tried = []
    monkeypatch.setattr(trial, "_try_elsewhere", tried.append)
    monkeypatch.setattr(trial, "default_base", lambda: (_ for _ in ()).throw(error))
    assert trial.check(bundled_model_path()) and trial.check(bundled_model_path())
    assert len(tried) == 1, "this process remembers it all the same"


def test_modules_that_lie_beside_a_model_are_not_run(tmp_path, monkeypatch):
    for name in ("secrets", "json", "gguf", "runpy", "numpy"):
        (tmp_path / f"{name}.py").write_text("open('ran', 'w'); raise SystemExit(9)\n")
    monkeypatch.chdir(tmp_path)
    assert trial.check(bundled_model_path())
    assert not Path("ran").exists()


def test_a_trial_that_cannot_run_is_not_the_models_fault(monkeypatch):
    monkeypatch.setattr(trial.sys, "executable", "/bin/false")
    with pytest.raises(EngineError, match="ended with code 1: it said nothing"):
        trial.check(bundled_model_path())


# ---------------------------------------------------------------- the header


def test_the_header_of_a_good_file():
    header = gguf_file.check_whole(bundled_model_path())
    assert header.metadata["general.architecture"] == "llama" and header.needed_bytes <= header.file_bytes
    assert header.arrays["tokenizer.ggml.tokens"] > 500


def split(folder: Path, count: int, number: int, said: int | None = None) -> Path:
    """A part of a split model: no tensors, and the three values that llama.cpp wants."""
    values = b""
    for key, amount in (("split.no", number - 1), ("split.count", said or count)):
        values += struct.pack("<Q", len(key)) + key.encode() + struct.pack("<IH", 2, amount)
    path = folder / f"m-{number:05d}-of-{count:05d}.gguf"
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 2) + values)
    return path


def test_split_files(tmp_path):
    first, second = split(tmp_path, 2, 1), split(tmp_path, 2, 2)
    assert gguf_file.part_paths(first) == [first, second]
    assert gguf_file.check_whole(first).metadata["split.count"] == 2
    with pytest.raises(ModelError, match="is part 2 of a split model; give its first part"):
        gguf_file.check_whole(second)
    second.unlink()
    with pytest.raises(ModelError, match="split into 2 files, and 1 is missing: m-00002-of-00002.gguf"):
        gguf_file.check_whole(first)
    second.write_bytes(first.read_bytes()[:30])
    with pytest.raises(ModelError, match="m-00002-of-00002.gguf is damaged or cut short"):
        gguf_file.check_whole(first)
    alone = split(tmp_path, 1, 1, said=3)
    with pytest.raises(ModelError, match="is the first of 3 parts, but is not named so"):
        gguf_file.check_whole(alone)


def test_a_vocabulary_that_would_fill_the_memory_is_refused_before_llama_cpp_reads_it(tmp_path):
    path = tmp_path / "hole.gguf"
    key = b"tokenizer.ggml.tokens"
    with path.open("wb") as file:
        file.write(b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q", len(key)) + key + struct.pack("<IIQ", 9, 8, 1 << 30))
        file.truncate(16 << 30)  # a hole: a thousand million empty texts
    with pytest.raises(ModelError, match="announces 1,073,741,824 elements"):
        gguf_file.check_whole(path)


@pytest.mark.parametrize("tensors, values, said", [(0, 65_537, "announces 65,537 metadata values"), (262_145, 0, "announces 262,145 tensors")])
def test_a_header_that_would_take_minutes_to_read_is_refused(tmp_path, tensors, values, said):
    path = tmp_path / "many.gguf"
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, tensors, values) + bytes(24 * max(tensors, values)))  # empty names, numbers of one byte
    with pytest.raises(ModelError, match=said):
        gguf_file.read_header(path)


@pytest.mark.parametrize("text, shown", [("a\x1b[1mb\r\nc\u202e", "a [1mb c"), ("x" * 300, "x" * 197 + "..."), ("ä 你", "ä 你")])
def test_printable(text, shown):
    assert gguf_file.printable(text) == shown
