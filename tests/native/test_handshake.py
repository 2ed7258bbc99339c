"""Every way in which library and bindings can fail to fit is one LibraryError with the command that cures it."""

import ctypes
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, find_stock

from zoomr_local.errors import LibraryError
from zoomr_local.libllama import library, library_info

REBUILD = "pip install --force-reinstall --no-deps ."
UNSET = ": unset ZOOMR_LIB_DIR, or name the folder that holds this zoomr-local's libllama."


def run(code: str, **env: str) -> subprocess.CompletedProcess:
    """A fresh interpreter, as nothing of this can be undone in ours."""
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    return subprocess.run([sys.executable, "-c", code], text=True, capture_output=True,
                          env={**os.environ, "PYTHONPATH": path, **env})


def import_error(**env: str) -> str:
    """The message with which importing fails; it must be a LibraryError and nothing else."""
    done = run("from zoomr_local.errors import LibraryError\n"
               "try:\n    import zoomr_local.libllama\n"
               "except LibraryError as error:\n    print(error)\nelse:\n    print('no error')", **env)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_library_that_is_loaded_is_ours():
    info = library_info()
    assert info["abi"] == library.ABI
    assert Path(info["lib_dir"]) == library.LIBRARY_PATH.parent
    assert info["engine"] in library.bindings_command(info["engine"])
    done = run("import zoomr_local.libllama as L, llama_cpp; print(llama_cpp.llama_cpp._lib._name)",
               ZOOMR_LIB_DIR=info["lib_dir"])
    assert done.stdout.strip() == str(library.LIBRARY_PATH), done.stderr


def test_importing_leaves_the_environment_alone():
    done = run("import os, zoomr_local.libllama; print(os.environ.get('LLAMA_CPP_LIB_PATH'))",
               ZOOMR_LIB_DIR=library_info()["lib_dir"], LLAMA_CPP_LIB_PATH="/elsewhere")
    assert done.stdout.strip() == "/elsewhere", done.stderr


def test_nothing_is_printed():
    done = run("import zoomr_local.libllama as L\n"
               "try: L.LlamaModel('/nonexistent.gguf')\nexcept Exception as e: pass",
               ZOOMR_LIB_DIR=library_info()["lib_dir"])
    assert done.stdout == "" and done.stderr == ""


def test_a_missing_library(tmp_path):
    message = import_error(ZOOMR_LIB_DIR=str(tmp_path))
    assert "is missing" in message and f"{tmp_path} (ZOOMR_LIB_DIR)" in message and UNSET in message and REBUILD not in message


def test_without_the_variable_the_cure_is_to_build(tmp_path, monkeypatch):
    monkeypatch.delenv("ZOOMR_LIB_DIR", raising=False)
    monkeypatch.setattr(library, "candidate_dirs", lambda: [tmp_path])
    with pytest.raises(LibraryError, match=f"in {re.escape(str(tmp_path))}\\.\nBuild it, in a checkout of zoomr-local: {re.escape(REBUILD)}$"):
        library.find_library()
    (tmp_path / library.library_name()).write_bytes(b"not a library")
    with pytest.raises(LibraryError, match=f"\nBuild it again: {re.escape(REBUILD)}$"):
        library.check_version(tmp_path / library.library_name())


def test_a_stock_library(stock):
    message = import_error(ZOOMR_LIB_DIR=str(find_stock()))
    assert "stock llama.cpp" in message and UNSET in message


def test_a_library_that_cannot_be_loaded(tmp_path):
    (tmp_path / library.library_name()).write_bytes(b"not a library")
    message = import_error(ZOOMR_LIB_DIR=str(tmp_path))
    assert "cannot be loaded" in message and UNSET in message


def compiled(tmp_path: Path, version: str) -> Path:
    """A library that says it is another version."""
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    source = tmp_path / "fake.c"
    source.write_text(f'const char * zoomr_version(void) {{ return "{version}"; }}\n')
    subprocess.run([compiler, "-shared", "-fPIC", "-o", str(tmp_path / library.library_name()), str(source)], check=True)
    return tmp_path


def test_a_library_of_another_interface(tmp_path):
    message = import_error(ZOOMR_LIB_DIR=str(compiled(tmp_path, f"999 {library.ENGINE_VERSION}")))
    assert "interface 999" in message and f"needs {library.ABI}" in message and UNSET in message


def test_bindings_of_another_version(tmp_path):
    message = import_error(ZOOMR_LIB_DIR=str(compiled(tmp_path, f"{library.ABI} 9.9.9")))
    assert f"llama-cpp-python is {library.ENGINE_VERSION}" in message
    assert "CMAKE_ARGS=-DLLAMA_BUILD=OFF pip install --force-reinstall --no-deps llama-cpp-python==9.9.9" in message


def test_missing_bindings(monkeypatch):
    def missing(name):
        raise library.importlib.metadata.PackageNotFoundError(name)
    monkeypatch.setattr(library.importlib.metadata, "version", missing)
    with pytest.raises(LibraryError, match="not installed.*-DLLAMA_BUILD=OFF pip install .*llama-cpp-python==0"):
        library.check_bindings("0.3.36")


def test_llama_cpp_imported_before_us(stock):
    folder = str(find_stock())
    done = run("import llama_cpp\nfrom zoomr_local.errors import LibraryError\n"
               "try:\n    import zoomr_local.libllama\nexcept LibraryError as error:\n    print(error)",
               LLAMA_CPP_LIB_PATH=folder, ZOOMR_LIB_DIR=library_info()["lib_dir"])
    assert "was imported before zoomr_local" in done.stdout and folder in done.stdout, done.stderr
    assert f"LLAMA_CPP_LIB_PATH={library_info()['lib_dir']}" in done.stdout


def test_llama_cpp_imported_before_us_on_our_library_is_fine():
    done = run("import llama_cpp, zoomr_local.libllama; print('fine')",
               LLAMA_CPP_LIB_PATH=library_info()["lib_dir"], ZOOMR_LIB_DIR=library_info()["lib_dir"])
    assert done.stdout.strip() == "fine", done.stderr


def test_structs_have_the_size_the_library_was_compiled_with():
    """A wrong field shifts every later one; the header is the only other place that names them."""
    header = (ROOT / "native" / "zoomr.h").read_text()
    for name, struct in (("zoomr_params", library.Params), ("zoomr_info", library.Info)):
        body = header.split(f"struct {name} {{")[1].split("};")[0]
        declared = [line.split(";")[0].split() for line in body.splitlines() if ";" in line]
        sizes = {"uint32_t": ctypes.c_uint32, "uint64_t": ctypes.c_uint64, "bool": ctypes.c_bool}
        assert [(field, sizes[kind]) for kind, field in declared] == struct._fields_
    assert f"#define ZOOMR_ABI {library.ABI}\n" in header


def test_every_declared_function_is_mapped():
    header = (ROOT / "native" / "zoomr.h").read_text()
    declared = {name for line in header.splitlines() if line.startswith("LLAMA_API")
                for name in re.findall(r"(zoomr_\w+)\s*\(", line)} - {"zoomr_version"}
    assert {name.removeprefix("zoomr_") for name in declared} <= set(vars(library.zoomr))
