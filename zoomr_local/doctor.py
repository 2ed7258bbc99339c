"""What may be wrong with an installation, each with its cure: library, memory, folders, leftovers, and a test that computes.

`cli/doctor.py` prints it. A `Check` is ``ok``, a ``note`` (worth knowing, works all the same) or a ``problem``. Nothing is
changed here but that the folder of pages is made, as a run would; the library is only loaded in a process of its own, where it
may crash.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import platform
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from . import hub_cache, machine
from .child_process import module_command, module_environment
from .errors import EngineError, StorageError
from .gguf_file import printable
from .sizes import counted, format_bytes
from .tiers.directory import check_base, default_base, stale

OK, NOTE, PROBLEM = "ok", "note", "problem"
SELFTEST_SECONDS = 120
LEAST_FREE_DISK_BYTES = 1 << 30
LEAST_FREE_MEMORY_BYTES = 1 << 30
BINDINGS = "llama-cpp-python"
REBUILD = "CMAKE_ARGS=-DLLAMA_BUILD=OFF pip install --force-reinstall --no-deps ."
OTHER_LIBRARY = "unset ZOOMR_LIB_DIR, or name another folder by it"


@dataclass(frozen=True)
class Check:
    """One thing that was looked at. ``cure`` is the next command to type, empty where none is needed."""

    name: str
    status: str
    text: str
    cure: str = ""
    data: dict[str, Any] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def examine(model: Path, question: str, kv_dir: Path | None = None) -> Iterator[Check]:
    """Every check in turn, the quick ones first. ``model`` and ``question`` are for the test that computes."""
    yield versions()
    yield bindings()
    yield memory()
    yield cores()
    yield hub_folder()
    try:
        yield from page_folder(kv_dir or default_base())
    except StorageError as error:  # no home folder is known
        yield Check("pages", PROBLEM, printable(str(error), 400), "export HOME=DIR")
    yield bundled(model)
    yield from selftest(model, question)


def versions() -> Check:
    """Of this package and of Python."""
    found = {"zoomr": _version("zoomr-local"), "python": platform.python_version(), "system": f"{platform.system()} {platform.machine()}"}
    if sys.platform == "win32":
        return Check("versions", PROBLEM, "Windows is not supported", "use Linux or macOS, or the Windows Subsystem for Linux", found)
    return Check("versions", OK, f"zoomr {found['zoomr'] or 'from a checkout'}, Python {found['python']}, {found['system']}", data=found)


def bindings() -> Check:
    """llama-cpp-python: only its Python part is used, on zoomr's own library."""
    version, spec = _version(BINDINGS), importlib.util.find_spec("llama_cpp")
    if version is None or spec is None or not spec.submodule_search_locations:
        return Check("bindings", PROBLEM, f"{BINDINGS} is not installed", f"CMAKE_ARGS=-DLLAMA_BUILD=OFF pip install {BINDINGS}")
    lib = Path(spec.submodule_search_locations[0]) / "lib"
    own = any(lib.glob("*llama.*")) if lib.is_dir() else False
    data = {"version": version, "own_library": own}
    if own:
        return Check("bindings", OK, f"{BINDINGS} {version}; its own library is there too, and zoomr does not use it", data=data)
    return Check(
        "bindings", OK,
        f"{BINDINGS} {version}, without a library of its own, which zoomr does not need. pip keeps the wheel it built so: where"
        f" another environment does need that library: pip install --no-cache-dir --force-reinstall {BINDINGS}=={version}", data=data,
    )  # fmt: skip


def memory() -> Check:
    """Free and all."""
    try:
        found = machine.memory()
    except EngineError as error:
        return Check("memory", NOTE, printable(str(error)))
    text = f"{format_bytes(found.free_bytes)} of {format_bytes(found.total_bytes)} free ({found.source})"
    data = {"free_bytes": found.free_bytes, "total_bytes": found.total_bytes, "source": found.source}
    if found.free_bytes < LEAST_FREE_MEMORY_BYTES:
        return Check("memory", NOTE, text, "close other programs; `zoomr plan -m MODEL` says what fits", data)
    return Check("memory", OK, text, data=data)


def cores() -> Check:
    """How many this process may use, which is less than the machine has in a container."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    text = f"{allowed} of {os.cpu_count()} hardware threads may be used" if allowed != os.cpu_count() else f"{allowed} hardware threads"
    return Check("cores", OK, text, data={"allowed": allowed, "machine": os.cpu_count()})


def hub_folder() -> Check:
    """The hub's cache: models, their bytes, and downloads that were cut off."""
    folder = hub_cache.cache_dir()
    found = hub_cache.cached_models(whole=False)
    models, partial = [c for c in found if not c.model.missing], [c for c in found if c.model.missing]
    used, cut_off = sum(c.model.size_bytes or 0 for c in found), hub_cache.incomplete()
    package = _version("huggingface_hub")
    data = {
        "path": str(folder), "models": len(models), "partial_models": len(partial), "used_bytes": used, "incomplete_bytes": sum(size for _, size in cut_off),
        "huggingface_hub": package, "free_bytes": machine.free_disk_bytes(folder),
    }  # fmt: skip
    text = f"{folder}: {counted(len(models), 'GGUF model')}, {format_bytes(used)}"
    if partial:
        text += f" with the parts of {counted(len(partial), 'split model')} that lack{'s' if len(partial) == 1 else ''} others ({partial[0].reference})"
    if package is None:
        return Check("hub", NOTE, f"{text}; models cannot be fetched by name without huggingface_hub", "pip install huggingface_hub", data)
    if cut_off:
        left = format_bytes(data["incomplete_bytes"])
        return Check("hub", NOTE, f"{text}; {left} of downloads that were cut off: pull the same name again, or delete them",
                     "rm " + " ".join(_quoted(path) for path, _ in cut_off[:3]), data)  # fmt: skip
    if partial:
        return Check("hub", NOTE, text, f"zoomr models pull {partial[0].reference} (or zoomr models rm)", data)
    return Check("hub", OK, text, data=data)


def page_folder(folder: Path) -> Iterator[Check]:
    """The folder of the disk tier: whether it can be written, its room, and what killed runs left."""
    free = machine.free_disk_bytes(folder)
    data = {"path": str(folder), "free_bytes": free}
    try:
        check_base(folder)
    except StorageError as error:
        yield Check("pages", PROBLEM, printable(str(error), 400), "zoomr solve ... --kv-dir DIR (or --kv-disk 0)", data)
        return
    if free is not None and free < LEAST_FREE_DISK_BYTES:
        yield Check("pages", NOTE, f"{folder}: only {format_bytes(free)} free", "make room, or name another disk with --kv-dir", data)
    else:
        yield Check("pages", OK, f"{folder}: {'unknown room' if free is None else format_bytes(free) + ' free'} for pages on disk", data=data)
    left = [(path, _size(path)) for path in stale(folder)]
    if left:
        data = {"paths": [str(path) for path, _ in left], "bytes": sum(size for _, size in left)}
        text = f"killed runs left {format_bytes(data['bytes'])} in {len(left)} folder{'' if len(left) == 1 else 's'}; the next run with a disk tier deletes them"
        yield Check("leftovers", NOTE, text, "rm -r " + " ".join(_quoted(path) for path, _ in left[:3]), data)


def bundled(model: Path) -> Check:
    """The model that ships with the package."""
    from .errors import ModelError
    from .gguf_file import check_whole, checked_path

    try:
        check_whole(checked_path(model))
    except ModelError as error:
        return Check("bundled model", PROBLEM, printable(str(error), 400), REBUILD, {"path": str(model)})
    return Check("bundled model", OK, str(model), data={"path": str(model)})


def selftest(model: Path, question: str) -> Iterator[Check]:
    """The library, then pages, then a reply that is longer than its budget, in a process of its own."""
    environment = module_environment(OMP_NUM_THREADS="1")
    command = module_command("zoomr_local.selftest", str(model), question)
    try:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", env=environment,
                              timeout=SELFTEST_SECONDS)  # fmt: skip
        code, out, err = done.returncode, done.stdout, done.stderr
    except subprocess.TimeoutExpired as late:
        code, out, err = None, (late.stdout or b"").decode("utf-8", "replace") if isinstance(late.stdout, bytes) else late.stdout or "", ""
    found: dict[str, Any] = {}
    for line in out.splitlines():
        found.update(json.loads(line))
    for name, judge in (("library", _library), ("pages", _pages), ("budget", _budget)):
        if name not in found:
            yield _failed(name, code, found.get("why") or err)
            return
        yield judge(found[name])


def _library(found: dict[str, Any]) -> Check:
    devices = ", ".join(f"{g['device']} ({g['description']}, {format_bytes(g['free_bytes'])} free)" for g in found["gpus"]) or "CPU only"
    flags = ", ".join(part.split("=")[0].strip() for part in found["system"].replace("CPU :", "").split("|") if part.strip().endswith("= 1"))
    text = f"llama.cpp of {BINDINGS} {found['engine']}, patched (interface {found['abi']}), in {found['lib_dir']}; {devices}; built with {flags}"
    return Check("library", OK, text, data=found)


def _pages(found: dict[str, Any]) -> Check:
    wrong = [word for word, good in (("finite numbers", found["finite"]), ("lossless pages", found["lossless"]), ("exact removal", found["exact"]),
                                     ("an effect of removal", found["differs"])) if not good]  # fmt: skip
    if wrong:
        return Check("paging", PROBLEM, f"the library computes wrong here: no {', no '.join(wrong)}", _other_library(), found)
    return Check("paging", OK, "what leaves the cache comes back bit for bit, and what is away is away", data=found)


def _budget(found: dict[str, Any]) -> Check:
    kept = found["peak_tokens"] <= found["budget_tokens"]
    if not kept or found["page_outs"] < 1 or found["blocks"] < 2:
        text = f"a reply of {found['tokens']} tokens took {found['peak_tokens']} of {found['budget_tokens']} cells, wrote {found['blocks']} thoughts and paged out {found['page_outs']}"
        return Check("generation", PROBLEM, text, _other_library(), found)
    speed = found["tokens"] / found["seconds"]
    text = (f"{found['tokens']} tokens in {found['peak_tokens']} of {found['budget_tokens']} cells, {found['blocks']} thoughts, {found['page_outs']} paged"
            f" out, {found['page_ins']} came back; {speed:,.0f} tokens/s, one thread")  # fmt: skip
    return Check("generation", OK, text, data=found)


def _failed(step: str, code: int | None, said: str) -> Check:
    name = {"library": "library", "pages": "paging", "budget": "generation"}[step]
    if code is None:
        return Check(name, PROBLEM, f"the test was not done after {SELFTEST_SECONDS} seconds", "look for what keeps the machine busy, then: zoomr doctor")
    if code < 0:
        kind = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
        why = "it was built for another processor" if code == -signal.SIGILL else "the library is damaged or does not fit this system"
        return Check(name, PROBLEM, f"the library ends its process with {kind}: {why}", _other_library())
    lines = [line for line in said.strip().splitlines() if line.strip()] or ["it said nothing"]
    # the messages of LibraryError end in the command that helps, after a colon
    cure = lines[-1].rpartition(": ")[2] if len(lines) > 1 and step == "library" else _other_library()
    return Check(name, PROBLEM, printable(lines[0] if step == "library" else lines[-1], 400), cure)


def _other_library() -> str:
    """The cure of a library that is no good: a build does not reach the one that a variable names."""
    return OTHER_LIBRARY if os.environ.get("ZOOMR_LIB_DIR") else REBUILD


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _size(folder: Path) -> int:
    total = 0
    for at, _, names in os.walk(folder):
        for name in names:
            try:
                total += (Path(at) / name).lstat().st_size
            except OSError:
                continue
    return total


def _quoted(path: Path) -> str:
    import shlex

    return shlex.quote(str(path))
