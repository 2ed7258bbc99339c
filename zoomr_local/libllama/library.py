"""Finds the patched library, checks that everything fits, and holds its C functions. Imported by this package only."""

from __future__ import annotations

import ctypes
import importlib.metadata
import os
import sys
from pathlib import Path
from types import SimpleNamespace

from zoomr_local.errors import EngineError, LibraryError, UnsupportedModel

ABI = 6  # native/zoomr.h, ZOOMR_ABI
BINDINGS = "llama-cpp-python"
LOG_LEVEL_WARN = 3
GGML_TYPES = {"f32": 0, "f16": 1, "q4_0": 2, "q4_1": 3, "q5_0": 6, "q5_1": 7, "q8_0": 8, "bf16": 30}

REBUILD = "pip install --force-reinstall --no-deps ."


def bindings_command(version: str) -> str:
    """Installs the bindings alone: seconds, because their own copy of the engine is not built."""
    return f"CMAKE_ARGS=-DLLAMA_BUILD=OFF pip install --force-reinstall --no-deps {BINDINGS}=={version}"


def library_name() -> str:
    return {"darwin": "libllama.dylib", "win32": "llama.dll"}.get(sys.platform, "libllama.so")


def cure(otherwise: str) -> str:
    """The last line of an error: what to type. Where ``ZOOMR_LIB_DIR`` names the one folder that is looked at, building changes nothing there."""
    if os.environ.get("ZOOMR_LIB_DIR"):
        return f"No other folder is looked at: unset ZOOMR_LIB_DIR, or name the folder that holds this zoomr-local's {library_name()}"
    return f"{otherwise}: {REBUILD}"


def candidate_dirs() -> list[Path]:
    """Where the library may be, best first: said by hand, beside this package, a developer's build, installed."""
    if os.environ.get("ZOOMR_LIB_DIR"):
        return [Path(os.environ["ZOOMR_LIB_DIR"])]
    package = Path(__file__).resolve().parent.parent
    dirs = [package / "lib", package.parent / "build" / "dev" / "lib"]
    try:  # an editable install keeps the library apart from the sources
        dirs.append(Path(importlib.metadata.distribution("zoomr-local").locate_file("zoomr_local/lib")))
    except importlib.metadata.PackageNotFoundError:
        pass
    return dirs


def find_library() -> Path:
    dirs = candidate_dirs()
    for folder in dirs:
        if (folder / library_name()).is_file():
            return folder.resolve() / library_name()
    looked = ", ".join(str(folder) for folder in dirs) + (" (ZOOMR_LIB_DIR)" if os.environ.get("ZOOMR_LIB_DIR") else "")
    raise LibraryError(
        f"zoomr-local's own build of llama.cpp is missing: no {library_name()} in {looked}.\n"
        + cure("Build it, in a checkout of zoomr-local"))


def check_version(path: Path) -> str:
    """The engine version the library was built from; it must be ours, and of our ABI."""
    try:
        probe = ctypes.CDLL(str(path))
    except OSError as error:
        raise LibraryError(f"{path} cannot be loaded: {error}.\n" + cure("Build it again")) from error
    try:
        version = probe.zoomr_version
    except AttributeError:
        raise LibraryError(
            f"{path} is a stock llama.cpp, without the paging that zoomr-local adds.\n"
            + cure("Build the patched one")) from None
    version.restype = ctypes.c_char_p
    abi, _, engine = version().decode().partition(" ")
    if abi != str(ABI):
        raise LibraryError(
            f"{path} has interface {abi}, this zoomr-local needs {ABI}: they are from different versions.\n"
            + cure("Build it again"))
    return engine


def check_bindings(engine: str) -> None:
    """The installed bindings mirror the structs of exactly one engine version."""
    try:
        found = importlib.metadata.version(BINDINGS)
    except importlib.metadata.PackageNotFoundError:
        raise LibraryError(f"{BINDINGS} is not installed. Install it: {bindings_command(engine)}") from None
    if found != engine:
        raise LibraryError(
            f"{BINDINGS} is {found}, but zoomr-local's library was built from {engine}.\n"
            f"Install the matching one: {bindings_command(engine)}")


def import_bindings(path: Path):
    """``llama_cpp.llama_cpp`` running on our library."""
    if "llama_cpp" not in sys.modules:
        before = os.environ.get("LLAMA_CPP_LIB_PATH")
        os.environ["LLAMA_CPP_LIB_PATH"] = str(path.parent)
        try:
            import llama_cpp  # noqa: F401
        except Exception as error:  # whatever went wrong in there, the cure is the same
            raise LibraryError(f"{BINDINGS} cannot be imported on {path}: {error}") from error
        finally:
            if before is None:
                del os.environ["LLAMA_CPP_LIB_PATH"]
            else:
                os.environ["LLAMA_CPP_LIB_PATH"] = before
    bindings = sys.modules["llama_cpp"].llama_cpp
    loaded = Path(bindings._lib._name).resolve()
    if loaded != path:
        raise LibraryError(
            f"llama_cpp was imported before zoomr_local and runs on {loaded}.\n"
            f"Import zoomr_local.libllama first, or start with: LLAMA_CPP_LIB_PATH={path.parent}")
    return bindings


class Params(ctypes.Structure):
    """struct zoomr_params"""

    _fields_ = [("n_rows_max", ctypes.c_uint32), ("n_keys_max", ctypes.c_uint32), ("tap_query", ctypes.c_bool)]


class Info(ctypes.Structure):
    """struct zoomr_info"""

    _fields_ = [("n_layer", ctypes.c_uint32), ("n_head", ctypes.c_uint32), ("n_head_kv", ctypes.c_uint32),
                ("n_embd_head", ctypes.c_uint32), ("n_seq_max", ctypes.c_uint32), ("n_rows_max", ctypes.c_uint32),
                ("n_keys_max", ctypes.c_uint32), ("n_stream", ctypes.c_uint32),
                ("token_bytes", ctypes.c_uint64), ("geometry", ctypes.c_uint64)]


class MemoryEntry(ctypes.Structure):
    """struct zoomr_memory"""

    _fields_ = [("buffer", ctypes.c_char * 32), ("device", ctypes.c_char * 32), ("weights", ctypes.c_uint64),
                ("kv", ctypes.c_uint64), ("compute", ctypes.c_uint64), ("index", ctypes.c_uint64),
                ("in_ram", ctypes.c_bool), ("mappable", ctypes.c_bool)]


class GpuEntry(ctypes.Structure):
    """struct zoomr_gpu"""

    _fields_ = [("device", ctypes.c_char * 32), ("description", ctypes.c_char * 128), ("free", ctypes.c_uint64),
                ("total", ctypes.c_uint64), ("shares_ram", ctypes.c_bool)]


class HeadsParams(ctypes.Structure):
    """struct zoomr_heads_params"""

    _fields_ = [("n_cells", ctypes.POINTER(ctypes.c_uint32)), ("n_layer", ctypes.c_uint32), ("n_observe", ctypes.c_uint32),
                ("share", ctypes.c_bool), ("weights", ctypes.c_bool), ("queries", ctypes.c_bool)]


class HeadsInfo(ctypes.Structure):
    """struct zoomr_heads_info"""

    _fields_ = [("n_layer", ctypes.c_uint32), ("n_head", ctypes.c_uint32), ("n_head_kv", ctypes.c_uint32),
                ("n_embd_head_k", ctypes.c_uint32), ("n_embd_head_v", ctypes.c_uint32), ("n_observe", ctypes.c_uint32),
                ("cell_bytes", ctypes.c_uint64), ("kv_bytes", ctypes.c_uint64), ("observe_bytes", ctypes.c_uint64)]


class HeadsMoved(ctypes.Structure):
    """struct zoomr_heads_moved"""

    _fields_ = [("n_evicted", ctypes.c_uint64), ("n_recalled", ctypes.c_uint64), ("n_stored", ctypes.c_uint64)]


def own_functions(path: Path) -> SimpleNamespace:
    """Our C functions by name without the prefix, and a few of llama.cpp's with cheaper argument types."""
    lib = ctypes.CDLL(str(path))
    ptr, str_, size = ctypes.c_void_p, ctypes.c_char_p, ctypes.c_size_t
    i32, i64, u32, u64, f32 = ctypes.c_int32, ctypes.c_int64, ctypes.c_uint32, ctypes.c_uint64, ctypes.c_float
    table = {
        "zoomr_last_error": ([], str_),
        "zoomr_log_capture": ([], None),
        "zoomr_log_tail": ([str_, size, i32], size),
        "zoomr_kv_size": ([ptr], u32),
        "zoomr_kv_used": ([ptr], u32),
        "zoomr_token_bytes": ([ptr], u64),
        "zoomr_memory_use": ([ptr, ptr, ctypes.POINTER(MemoryEntry), size], i64),
        "zoomr_gpus": ([ctypes.POINTER(GpuEntry), size], i64),
        "zoomr_resident": ([ptr, i32, ptr, size], i64),
        "zoomr_state_bytes": ([ptr], i64),
        "zoomr_state_write": ([ptr, ptr, size], i64),
        "zoomr_state_read": ([ptr, ptr, size], i64),
        "zoomr_unsupported": ([ptr], str_),
        "zoomr_init": ([ptr, Params, ctypes.POINTER(ptr)], i32),
        "zoomr_free": ([ptr], None),
        "zoomr_get_info": ([ptr, ctypes.POINTER(Info)], None),
        "zoomr_layer_id": ([ptr, u32], i32),
        "zoomr_kq_scale": ([ptr, u32], f32),
        "zoomr_page_tokens": ([ptr, i32, i32, i32], i64),
        "zoomr_page_bytes": ([ptr, u64], i64),
        "zoomr_page_write": ([ptr, i32, i32, i32, ptr, size], i64),
        "zoomr_page_free": ([ptr, i32, i32, i32], i64),
        "zoomr_page_in": ([ptr, i32, ptr, size], i64),
        "zoomr_page_packed_bytes": ([ptr, u64, i32], i64),
        "zoomr_page_pack": ([ptr, ptr, size, i32, ptr, size], i64),
        "zoomr_page_unpack": ([ptr, ptr, size, ptr, size], i64),
        "zoomr_rows_set_n": ([ptr, u32], i32),
        "zoomr_rows_mean": ([ptr, u32, i32, i32, i32], i64),
        "zoomr_rows_get": ([ptr, u32, ptr], i32),
        "zoomr_rows_set": ([ptr, u32, ptr], i32),
        "zoomr_rows_clear": ([ptr], None),
        "zoomr_scores": ([ptr], ptr),
        "zoomr_query": ([ptr], ptr),
        "zoomr_key_scores": ([ptr], ptr),
        "zoomr_set_key_probe": ([ptr, i32, ptr, u32], i32),
        "zoomr_heads_unsupported": ([ptr], str_),
        "zoomr_heads_init": ([ptr, HeadsParams, ctypes.POINTER(ptr)], i32),
        "zoomr_heads_get_info": ([ptr, ctypes.POINTER(HeadsInfo)], None),
        "zoomr_heads_layer_id": ([ptr, u32], i32),
        "zoomr_heads_kq_scale": ([ptr, u32], f32),
        "zoomr_heads_n_cells": ([ptr, u32], u32),
        "zoomr_heads_pos": ([ptr, u32], ptr),
        "zoomr_heads_fits": ([ptr, u32], i32),
        "zoomr_heads_free_cells": ([ptr, u32, u32], i64),
        "zoomr_heads_evict": ([ptr, u32, u32, ptr, size], i64),
        "zoomr_heads_read": ([ptr, u32, u32, ptr, size, ptr, ptr], i64),
        "zoomr_heads_page_out": ([ptr, u32, u32, ptr, size, ptr, size], i64),
        "zoomr_heads_page_in": ([ptr, u32, u32, ptr, size, ptr, size, ptr], i64),
        "zoomr_heads_exchange": ([ptr, u32, ptr, size, ptr, ptr, size, ctypes.POINTER(HeadsMoved)], i32),
        "zoomr_heads_observe": ([ptr, ctypes.c_bool], None),
        "zoomr_heads_observed": ([ptr], u32),
        "zoomr_heads_weights": ([ptr, u32], ptr),
        "zoomr_heads_queries": ([ptr], ptr),
        "llama_get_logits_ith": ([ptr, i32], ptr),
    }
    functions = SimpleNamespace()
    for name, (argtypes, restype) in table.items():
        function = lib[name]  # indexing gives an object of our own: the bindings' argument types stay as they are
        function.argtypes = argtypes
        function.restype = restype
        setattr(functions, name.removeprefix("zoomr_"), function)
    return functions


ABORT = ctypes.CFUNCTYPE(None, ctypes.c_char_p)


@ABORT
def _end_process(message: bytes) -> None:
    """Instead of llama.cpp's stack trace and a core dump: a process whose graph has asserted cannot go on."""
    text = message.decode("utf-8", "replace").rsplit(": ", 1)[-1].strip()
    line = f"error: llama.cpp gave up ({text}); the model file is most likely damaged, or made for another version\n"
    os.write(2, line.encode())
    os._exit(1)


def end_quietly(path: Path) -> None:
    """One line and exit code 1 where llama.cpp would abort, unless ZOOMR_DEBUG is set."""
    if not os.environ.get("ZOOMR_DEBUG"):
        setter = ctypes.CDLL(str(path)).ggml_set_abort_callback
        setter.argtypes, setter.restype = [ABORT], ctypes.c_void_p
        setter(_end_process)


def load():
    """(bindings, our functions, library path, engine version); everything checked."""
    path = find_library()
    engine = check_version(path)
    check_bindings(engine)
    bindings = import_bindings(path)
    functions = own_functions(path)
    functions.log_capture()
    end_quietly(path)
    bindings.llama_backend_init()
    return bindings, functions, path, engine


llama, zoomr, LIBRARY_PATH, ENGINE_VERSION = load()


def log_tail(level_min: int = LOG_LEVEL_WARN) -> list[str]:
    """The newest lines of llama.cpp's own log, oldest first."""
    buffer = ctypes.create_string_buffer(1 << 14)
    zoomr.log_tail(buffer, len(buffer), level_min)
    return [line for line in buffer.value.decode(errors="replace").splitlines() if line.strip(" .")]


def last_log_line() -> str:
    """What llama.cpp said about its newest failure, for error messages: the cause, if it named one before giving up."""
    lines = log_tail()
    causes = [line.split("error loading model: ")[1] for line in lines[-2:] if "error loading model: " in line]
    return (causes or [line.strip() for line in lines[-1:]] or ["llama.cpp gave no reason"])[-1]


def checked(result: int) -> int:
    """A C function's result, its negative codes raised with their sentence."""
    if result < 0:
        message = zoomr.last_error().decode()
        raise (UnsupportedModel if result == -2 else EngineError)(message)
    return result


def library_info() -> dict:
    """engine (llama-cpp-python version), abi, lib_dir, system (features the library was compiled with)."""
    return {"engine": ENGINE_VERSION, "abi": ABI, "lib_dir": str(LIBRARY_PATH.parent),
            "system": llama.llama_print_system_info().decode().strip()}
