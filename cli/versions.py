"""Which versions are at work: printed by `zoomr --version`, kept in every manifest."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version


def versions() -> dict[str, str]:
    """``zoomr``, ``bindings`` (llama-cpp-python) and ``engine`` (the llama.cpp of which llama-cpp-python release).

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
    return {"zoomr": _installed("zoomr-local"), "bindings": "llama-cpp-python " + _installed("llama-cpp-python")}


def _installed(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"
