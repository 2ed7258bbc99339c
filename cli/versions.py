"""Which versions are at work: printed by `zoomr --version`, kept in every manifest."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version


def versions() -> dict[str, str]:
    """``zoomr``, ``bindings`` (llama-cpp-python) and ``engine`` (the llama.cpp it carries)."""
    return {
        "zoomr": _installed("zoomr-local"),
        "bindings": "llama-cpp-python " + _installed("llama-cpp-python"),
        "engine": "pending",
    }


def _installed(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"
