"""Which versions are at work: printed by `zoomr --version`, kept in every manifest."""

from __future__ import annotations

import os
import subprocess
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from zoomr_local.journal import CHECKOUT, NOT_INSTALLED

_CODE = ("cli", "zoomr_local", "models", "native", "benchmarks", ":!benchmarks/results")
_GIT_SECONDS = 5


def versions() -> dict[str, str]:
    """``zoomr``, ``bindings`` (llama-cpp-python) and ``engine`` (the llama.cpp of which llama-cpp-python release).

    ``zoomr`` that is not installed but run from a clone is ``checkout at COMMIT``, with a ``+`` if tracked code differs from it.

    Raises LibraryError if the library is missing or does not fit.
    """
    from zoomr_local.libllama import library_info

    return {**_packages(), "engine": f"llama.cpp of llama-cpp-python {library_info()['engine']}, patched"}


def printed_versions() -> str:
    """The same for people, a line each; a missing library is said instead of raised."""
    from zoomr_local.errors import LibraryError

    try:
        rows = versions()
    except LibraryError as error:
        rows = {**_packages(), "engine": f"not available: {error}"}
    return "\n".join(f"{name:<9} {value}" for name, value in rows.items())


def _packages() -> dict[str, str]:
    zoomr = _installed("zoomr-local")
    if zoomr == NOT_INSTALLED:
        zoomr = checkout(Path(__file__).resolve().parent.parent) or zoomr
    return {"zoomr": zoomr, "bindings": "llama-cpp-python " + _installed("llama-cpp-python")}


def _installed(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return NOT_INSTALLED


@cache
def checkout(root: Path) -> str | None:
    """``checkout at COMMIT`` of the clone that ``root`` is the top of, as of the first call (the code is loaded by then); None if it is none or git cannot tell.

    git is run nowhere else: its variables, which may name another repository, are dropped, and it neither writes an index nor starts a watcher.
    """
    if not (root / ".git").exists() or not (root / "zoomr_local").is_dir():
        return None
    command = ["git", "--no-optional-locks", "-c", "core.fsmonitor=false", f"--git-dir={root / '.git'}", f"--work-tree={root}",
               "status", "--porcelain=v2", "--branch", "--untracked-files=no", "--", *_CODE]  # fmt: skip
    clean = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    try:
        done = subprocess.run(command, cwd=root, env=clean, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=_GIT_SECONDS, check=True)
    except (OSError, subprocess.SubprocessError, ValueError):
        return None
    lines = done.stdout.splitlines()
    commit = next((line.split()[2] for line in lines if line.startswith("# branch.oid ")), "(initial)")
    changed = any(not line.startswith("#") for line in lines)
    return None if commit == "(initial)" else f"{CHECKOUT}{commit[:10]}{'+' * changed}"
