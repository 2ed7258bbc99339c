"""On which line of a TOML file each key stands, which TOML's own parsers do not say. `config.py` asks.

The file is known to be sound. It is read again one statement at a time: lines are added until they parse by themselves, which
the beginning of a longer statement never does. It is tried only where a statement of several lines can end.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .errors import UsageError

Path = tuple[str, ...]
MOST_CHARACTERS = 1 << 19
"""Tried in vain, after which nothing more is looked up: a hostile list may have something like an end in each of its lines."""
_ENDS = ("]", "}", '"' * 3, "'" * 3)


def key_lines(text: str, parse: Callable[[str], dict[str, Any]]) -> dict[Path, int]:
    """The first line, counted from 1, of every key and table by its path; tables of an array have their number in it.

    ``parse`` reads TOML and raises UsageError for what is none."""
    lines: dict[Path, int] = {}
    table: Path = ()
    counts: dict[Path, int] = {}
    begun, statement, in_vain = 1, "", 0
    for number, line in enumerate(text.split("\n"), 1):
        if not statement:
            begun = number
            if not line.strip() or line.lstrip().startswith("#"):
                continue
        statement += line + "\n"
        if begun < number and not any(end in line for end in _ENDS):
            continue
        try:
            data = parse(statement)
        except UsageError:
            in_vain += len(statement)
            if in_vain > MOST_CHARACTERS:
                return lines
            continue
        text_of, statement = statement.strip(), ""
        if text_of.startswith("["):
            table = _deepest(data)
            if text_of.startswith("[["):
                lines.setdefault(table, begun)
                counts[table] = counts.get(table, -1) + 1
                table = (*table, str(counts[table]))
            for end in range(1, len(table) + 1):
                lines.setdefault(table[:end], begun)
        else:
            for path in _paths(data):
                lines.setdefault((*table, *path), begun)
    return lines


def _deepest(data: dict[str, Any]) -> Path:
    """The path of the one table that a header makes."""
    path: Path = ()
    at: Any = data
    while at:
        if isinstance(at, list):
            at = at[0]
            continue
        ((name, at),) = at.items()
        path = (*path, name)
    return path


def _paths(data: dict[str, Any]) -> list[Path]:
    found: list[Path] = []
    for name, value in data.items():
        found.append((name,))
        if isinstance(value, dict):
            found += [(name, *path) for path in _paths(value)]
    return found
