"""The pin, the patch and the script that applies it. Needs no library."""

import re
import shutil
import subprocess
import sys
import tarfile

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "native"))
import engine  # noqa: E402

LINE_BUDGET = 20
CHANGED = {"src/llama-context.h", "src/llama-cparams.h", "src/llama-graph.cpp", "src/llama-graph.h", "src/llama-kv-cache.h"}


def hunks():
    return [(name, old, new) for name, found in engine.parse_patch(engine.PATCH_FILE.read_text()).items()
            for _, old, new in found]


def test_the_patch_inserts_call_sites_within_its_budget():
    lines = engine.PATCH_FILE.read_text().splitlines()
    added = [line for line in lines if line.startswith("+") and not line.startswith("+++")]
    removed = [line for line in lines if line.startswith("-") and not line.startswith("---")]
    assert removed == [] and 0 < len(added) <= LINE_BUDGET
    assert {name for name, _, _ in hunks()} == CHANGED
    readme = (ROOT / "native" / "README.md").read_text()
    assert f"{len(added)} upstream lines" in readme, "native/README.md states the number"
    for name in CHANGED:
        assert name in readme, f"native/README.md gives the reason of the hunk in {name}"


def test_one_pin_for_source_bindings_and_documents():
    version, digest = engine.pin()
    assert re.fullmatch(r"[0-9a-f]{64}", digest)
    assert f'"llama-cpp-python=={version}"' in (ROOT / "pyproject.toml").read_text()
    for path in ("native/zoomr.cmake", "native/engine.py", "native/build.py", "CMakeLists.txt"):
        assert version not in (ROOT / path).read_text(), f"{path} repeats the pin"


@pytest.fixture
def tree(tmp_path):
    """A source tree that has just the places the patch looks for, moved by some lines as in another version."""
    for name in CHANGED:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("// moved\n" * 5 + "\n// other code\n".join(
            "\n".join(old) for hunk_name, old, _ in hunks() if hunk_name == name) + "\n")
    (tmp_path / "ggml").mkdir()
    return tmp_path


def test_the_patch_applies_once(tree):
    assert engine.apply_patch(tree) == len(hunks())
    patched = {name: (tree / name).read_text() for name in CHANGED}
    assert engine.is_patched(tree)
    assert engine.apply_patch(tree) == 0, "a second time changes nothing"
    assert patched == {name: (tree / name).read_text() for name in CHANGED}
    for name, _, new in hunks():
        assert "\n".join(new) in patched[name]


@pytest.mark.skipif(shutil.which("patch") is None, reason="compares with patch(1), which this machine lacks")
def test_the_patch_is_one_that_patch_understands(tree, tmp_path):
    done = subprocess.run(["patch", "-p1", "--dry-run", "-i", str(engine.PATCH_FILE)], cwd=tree, text=True, capture_output=True)
    assert done.returncode == 0, done.stdout


def test_a_patch_that_does_not_fit_names_version_and_next_command(tree):
    path = tree / "src" / "llama-graph.h"
    path.write_text(path.read_text().replace("causal_attn", "causal"))
    before = {name: (tree / name).read_text() for name in CHANGED}
    with pytest.raises(engine.EngineSourceError) as error:
        engine.apply_patch(tree)
    message = str(error.value)
    assert "src/llama-graph.h:" in message and engine.pin()[0] in message
    assert "ZOOMR_LLAMA_CPP_DIR" in message and "native/README.md" in message
    assert before == {name: (tree / name).read_text() for name in CHANGED}, "all or nothing"


def test_a_local_source_is_copied_and_a_patched_one_left_alone(tree, tmp_path):
    work = tmp_path / "work"
    made = engine.prepare(work, local=tree)
    assert made == work / "source" and engine.is_patched(made) and not engine.is_patched(tree)
    assert engine.prepare(work, local=made) == made
    pristine = engine.prepare(work, local=tree, pristine=True)
    assert not engine.is_patched(pristine)
    with pytest.raises(engine.EngineSourceError, match="needs an unpatched source"):
        engine.prepare(work, local=made, pristine=True)


def test_vocabularies_are_unpacked_for_the_tests_alone(tree, tmp_path):
    (tree / "models" / "templates").mkdir(parents=True)
    (tree / "models" / "ggml-vocab-x.gguf").write_bytes(b"GGUF")
    packed = tmp_path / "packed.tar.gz"
    with tarfile.open(packed, "w:gz") as tar:
        tar.add(tree, "llama_cpp_python-0/vendor/llama.cpp")
    engine.unpack(packed, tmp_path / "archive")
    engine.unpack(packed, tmp_path / "archive-pristine", (*engine.WANTED, *engine.TEST_DATA))
    user, tests = engine.prepare(tmp_path / "work", local=tree), engine.prepare(tmp_path / "work", local=tree, pristine=True)
    assert not (user / "models").exists() and not (tmp_path / "archive" / "models").exists()
    for made in (tests, tmp_path / "archive-pristine"):
        assert (made / "models" / "ggml-vocab-x.gguf").read_bytes() == b"GGUF" and (made / "src").is_dir()


def test_a_folder_without_a_source_is_said_to_be_one(tmp_path):
    done = subprocess.run([sys.executable, str(ROOT / "native" / "engine.py"), "prepare", "--work", str(tmp_path / "work"),
                           "--local", str(tmp_path)], text=True, capture_output=True)
    assert done.returncode == 1
    assert "is no llama.cpp source directory" in done.stderr and "Traceback" not in done.stderr


def test_another_patch_touches_only_the_files_it_changes(tree, tmp_path, monkeypatch):
    """What a build compiles again: the patched files that are not what they were, not every file that includes them."""
    made = engine.prepare(tmp_path / "work", local=tree)
    before = {name: (made / name).stat().st_mtime_ns for name in CHANGED}
    text = engine.PATCH_FILE.read_text()
    newer = tmp_path / "newer.patch"
    newer.write_text(text.replace('+#include "zoomr-graph.h"', '+#include "zoomr-graph.h" // moved'))
    monkeypatch.setattr(engine, "PATCH_FILE", newer)
    monkeypatch.setattr(engine.apply_patch, "__defaults__", (newer,))
    assert engine.prepare(tmp_path / "work", local=tree) == made
    after = {name: (made / name).stat().st_mtime_ns for name in CHANGED}
    assert {name for name in CHANGED if after[name] != before[name]} == {"src/llama-graph.cpp"}
    assert "// moved" in (made / "src" / "llama-graph.cpp").read_text()


def test_of_archives_of_several_pins_the_pinned_one_is_taken(tmp_path, monkeypatch):
    """Names sort as text: 0.3.99 comes after 0.3.100."""
    packed = {"llama_cpp_python-0.3.99.tar.gz": b"earlier", "Llama_cpp-0.3.100.tar.gz": b"other", "llama_cpp_python_0.3.100.tar.gz": b"pinned"}
    for name, data in packed.items():
        (tmp_path / name).write_bytes(data)
    wanted = engine.sha256(tmp_path / "llama_cpp_python_0.3.100.tar.gz")
    monkeypatch.setattr(engine, "pin", lambda: ("0.3.100", wanted))
    monkeypatch.setattr(engine.subprocess, "run", lambda command, **_: subprocess.CompletedProcess(command, 0, ""))
    assert engine.download(tmp_path).read_bytes() == b"pinned"
    monkeypatch.setattr(engine, "pin", lambda: ("0.3.101", "0" * 64))
    with pytest.raises(engine.EngineSourceError, match="does not have the sha256"):
        engine.download(tmp_path)
