"""`zoomr doctor`: what it finds on a healthy machine, and every problem that it can name, with its cure and exit code."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from zoomr_cli.main import main
from zoomr_local import doctor, machine, selftest
from zoomr_local.errors import LibraryError
from zoomr_models import bundled_model_path

MIB = 1 << 20
GOOD = {
    "library": {"engine": "1.2.3", "abi": 4, "lib_dir": "/lib", "system": "CPU : AVX2 = 1 | AVX512 = 0 | ", "gpus": []},
    "pages": {"lossless": True, "exact": True, "finite": True, "differs": True},
    "budget": {"tokens": 90, "blocks": 5, "page_outs": 3, "page_ins": 1, "peak_tokens": 256, "budget_tokens": 256, "seconds": 0.5},
}


@pytest.fixture(autouse=True)
def own_folders(tmp_path, monkeypatch):
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def child(monkeypatch):
    """Sets what the process of the self-test says and how it ends."""

    def set_(steps: dict, code: int = 0, err: str = "") -> None:
        out = "".join(json.dumps({name: step}) + "\n" if name != "failed" else json.dumps({"failed": step, "why": err}) + "\n" for name, step in steps.items())
        monkeypatch.setattr(doctor.subprocess, "run", lambda *a, **k: SimpleNamespace(returncode=code, stdout=out, stderr=err))

    set_(GOOD)
    return set_


def run(capsys, code: int = 0) -> dict[str, dict]:
    assert main(["doctor", "--json"]) == code
    found = json.loads(capsys.readouterr().out)
    assert found["healthy"] == (code == 0)
    return {check["name"]: check for check in found["checks"]}


def test_a_healthy_installation(capsys):
    """All of it for real: the library is loaded, pages go and come, a reply outgrows its budget."""
    found = run(capsys)
    assert list(found) == ["versions", "bindings", "memory", "cores", "hub", "pages", "bundled model", "library", "paging", "generation"]
    assert {c["status"] for c in found.values()} <= {"ok", "note"}
    assert found["paging"]["data"] == GOOD["pages"]
    made = found["generation"]["data"]
    assert made["page_outs"] > 0 and made["peak_tokens"] <= made["budget_tokens"] == 256 and made["blocks"] >= 2
    assert found["library"]["data"]["engine"] and found["library"]["data"]["system"].startswith("CPU")


def test_what_people_see(capsys, child):
    assert main(["doctor"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "everything works" and any(line.startswith("ok       library: llama.cpp of llama-cpp-python 1.2.3") for line in lines)
    child({}, code=-signal.SIGILL)
    assert main(["doctor"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert "problem  library: the library ends its process with SIGILL: it was built for another processor" in lines
    assert "         -> " + doctor.REBUILD in lines and lines[-1].endswith("checks found a problem")


@pytest.mark.parametrize("steps, code, err, name, said", [
    ({}, -signal.SIGSEGV, "", "library", "SIGSEGV: the library is damaged or does not fit this system"),
    ({"failed": "library"}, 1, "the build is missing: no lib in /x.\nBuild it: pip install .", "library", "the build is missing: no lib in /x."),
    ({k: GOOD[k] for k in ("library",)}, -6, "", "paging", "SIGABRT"),
    ({**GOOD, "pages": {**GOOD["pages"], "lossless": False}}, 0, "", "paging", "the library computes wrong here: no lossless pages"),
    ({**GOOD, "pages": {**GOOD["pages"], "exact": False, "finite": False}}, 0, "", "paging", "no finite numbers, no exact removal"),
    ({**GOOD, "budget": {**GOOD["budget"], "peak_tokens": 257}}, 0, "", "generation", "257 of 256 cells"),
    ({**GOOD, "budget": {**GOOD["budget"], "page_outs": 0}}, 0, "", "generation", "paged out 0"),
    ({**GOOD, "budget": {**GOOD["budget"], "blocks": 0}}, 0, "", "generation", "wrote 0 thoughts"),
    ({k: GOOD[k] for k in ("library", "pages")}, 1, "Traceback\nOSError: no", "generation", "OSError: no"),
])  # fmt: skip
def test_every_way_in_which_the_self_test_fails(capsys, child, steps, code, err, name, said):
    child(steps, code, err)
    found = run(capsys, code=1)[name]
    assert found["status"] == "problem" and said in found["text"] and found["cure"]
    if "Build it" in err:
        assert found["cure"] == "pip install ."


def test_a_library_that_a_variable_names_is_not_cured_by_building(capsys, child, monkeypatch, tmp_path):
    monkeypatch.setenv("ZOOMR_LIB_DIR", str(tmp_path))
    child({}, code=-signal.SIGSEGV)
    assert run(capsys, code=1)["library"]["cure"] == "unset ZOOMR_LIB_DIR, or name another folder by it"
    monkeypatch.undo()
    monkeypatch.setenv("ZOOMR_LIB_DIR", str(tmp_path))
    found = run(capsys, code=1)["library"]
    assert f"in {tmp_path} (ZOOMR_LIB_DIR)" in found["text"]
    assert found["cure"].startswith("unset ZOOMR_LIB_DIR, or name the folder that holds this zoomr-local's libllama.")


def test_a_self_test_that_does_not_end(capsys, monkeypatch):
    def late(*args, **more):
        raise subprocess.TimeoutExpired("x", 1, output=(json.dumps({"library": GOOD["library"]}) + "\n").encode())

    monkeypatch.setattr(doctor.subprocess, "run", late)
    found = run(capsys, code=1)
    assert found["library"]["status"] == "ok" and "was not done after 120 seconds" in found["paging"]["text"]


def test_a_damaged_bundled_model(child, tmp_path):
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(bundled_model_path().read_bytes()[:-100])
    assert doctor.bundled(cut).status == "problem" and "is cut short" in doctor.bundled(cut).text
    assert doctor.bundled(tmp_path / "none.gguf").status == "problem"


def test_bindings_with_and_without_a_library_of_their_own(monkeypatch, tmp_path):
    (tmp_path / "lib").mkdir()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: SimpleNamespace(submodule_search_locations=[str(tmp_path)]))
    monkeypatch.setattr(doctor, "_version", lambda name: "0.3.36")
    bare = doctor.bindings()
    assert bare.status == "ok" and not bare.data["own_library"] and "--no-cache-dir --force-reinstall llama-cpp-python==0.3.36" in bare.text
    (tmp_path / "lib/libllama.so").touch()
    assert doctor.bindings().data["own_library"] and "does not use it" in doctor.bindings().text
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert doctor.bindings().status == "problem" and "LLAMA_BUILD=OFF pip install llama-cpp-python" in doctor.bindings().cure


def test_what_killed_runs_and_cut_downloads_left(capsys, child, tmp_path):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    left = tmp_path / f"cache/zoomr-local/zoomr-{dead.pid}-0123abcd"
    left.mkdir(parents=True)
    (left / "page-1-2-detail.page").write_bytes(b"x" * MIB)
    os.utime(left, (0, 0))  # without a lock it might be one that is just being made
    mine = tmp_path / f"cache/zoomr-local/zoomr-{os.getpid()}-0123abcd"
    mine.mkdir()
    part = tmp_path / "hf/hub/models--user--repo/blobs/abc.incomplete"
    part.parent.mkdir(parents=True)
    part.write_bytes(b"x" * 2 * MIB)
    found = run(capsys)
    assert found["leftovers"]["text"] == "killed runs left 1 MiB in 1 folder; the next run with a disk tier deletes them"
    assert found["leftovers"]["cure"] == f"rm -r {left}" and str(mine) not in found["leftovers"]["cure"]
    assert "2 MiB of downloads that were cut off" in found["hub"]["text"] and found["hub"]["cure"] == f"rm {part}"
    assert found["leftovers"]["status"] == found["hub"]["status"] == "note", "notes leave it healthy"


def test_a_page_folder_that_cannot_be_written(capsys, child, tmp_path, monkeypatch):
    blocked = tmp_path / "file"
    blocked.write_text("in the way")
    monkeypatch.setenv("XDG_CACHE_HOME", str(blocked))
    found = run(capsys, code=1)["pages"]
    assert found["status"] == "problem" and "cannot be written" in found["text"] and "--kv-dir" in found["cure"]
    shutil.rmtree(tmp_path / "cache", ignore_errors=True)
    assert main(["doctor", "--json", "--kv-dir", str(tmp_path / "other")]) == 0


def test_little_memory_little_disk_and_no_hub_are_notes(monkeypatch, tmp_path):
    monkeypatch.setattr(machine, "memory", lambda: machine.Memory(300 * MIB, 8 << 30, "this machine"))
    monkeypatch.setattr(machine, "free_disk_bytes", lambda folder: 100 * MIB)
    monkeypatch.setattr(doctor, "_version", lambda name: None)
    assert [doctor.memory().status, next(doctor.page_folder(tmp_path)).status, doctor.hub_folder().status] == ["note"] * 3
    assert doctor.hub_folder().cure == "pip install huggingface_hub"


def test_the_self_test_says_which_step_failed(monkeypatch, capfd):
    def missing():
        raise LibraryError("no library")

    monkeypatch.setattr(selftest, "library", missing)
    assert selftest.main(str(bundled_model_path()), "?") == 1
    assert json.loads(capfd.readouterr().out) == {"failed": "library", "why": "no library"}
