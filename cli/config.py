"""`zoomr config show | path`: the settings in force, where each one is set, and which files are read.

Prints; files and layers are `zoomr_local.config`, the flags as settings `settings.py`.
"""

from __future__ import annotations

import difflib
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from zoomr_local.errors import UsageError

from . import options

if TYPE_CHECKING:
    from zoomr_local.config import Origin, Source

    from .settings import Found

app = typer.Typer(
    name="config", no_args_is_help=True, help="Show the settings in force, and the files they are read from.",
    context_settings={"help_option_names": ["-h", "--help"]},
)  # fmt: skip



def _commands(context: typer.Context) -> list[str]:
    from .settings import registry

    return list(registry(context.find_root().command))


Command = Annotated[
    str | None, typer.Argument(autocompletion=_commands, help="Only the settings of this command: chat, solve, ...", show_default=False)
]
WithOrigin = Annotated[bool, typer.Option("--origin", help="Say where each value is set: file and line, variable, or default.")]


@app.command("show")
def show(context: typer.Context, command: Command = None, origin: WithOrigin = False, model: options.Model = None, as_json: options.Json = False) -> None:
    """Print every setting and its value, as a command without flags would have it; -m chooses whose presets count."""
    from zoomr_local.config import load

    from .settings import Found

    found = Found(load(), context.find_root().command, os.environ)
    if command is not None and command not in found.commands:
        near = difflib.get_close_matches(command, found.commands, n=1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        raise UsageError(f"{command} has no settings{hint}; there are {', '.join(found.commands)}")
    rows = _rows(found, [command] if command else list(found.commands), model and str(model))
    if as_json:
        files = [_source_dict(source) for source in found.config.sources]
        try:
            print(json.dumps({"settings": rows, "markers": found.config.markers, "files": files}, default=str, allow_nan=False))
        except ValueError:
            raise UsageError("[[markers]] of your file (`zoomr config path`) hold a number that is not finite, for which JSON has no word; remove it") from None
        return
    _print(rows, origin, None if command else len(found.commands))
    if found.config.markers:
        print(f"{len(found.config.markers)} [[markers]] in your file")


@app.command("path")
def path(as_json: options.Json = False) -> None:
    """Print the files that settings are read from, the strongest first, whether or not they are there."""
    from zoomr_local.config import fault, paths

    sources = paths()
    faults = {source: fault(source) for source in sources}
    if as_json:
        print(json.dumps({"files": [_source_dict(source, faults[source]) for source in sources]}))
        return
    if all(source.kind != "user" for source in sources):
        options.tell("this user has no home folder, so there is no user file; set HOME or XDG_CONFIG_HOME, or name a file by ZOOMR_CONFIG")
    for source in sources:
        state = "not read: " + source.refused if source.refused else "is read" if source.exists else "not there"
        print(f"{source.kind:<8} {source.path}  ({'cannot be read' if faults[source] else state})")
    for source in filter(faults.get, sources):
        options.tell(f"error: {faults[source]}; until that is mended every command ends with this line")


def _source_dict(source: Source, fault: str = "") -> dict[str, Any]:
    return {"kind": source.kind, "path": str(source.path), "exists": source.exists, "refused": source.refused or None, "fault": fault or None}


def _rows(found: Found, names: list[str], model: str | None) -> list[dict[str, Any]]:
    """A row for each value that a setting has, with the commands that have it."""
    from zoomr_local.config import DEFAULT, Origin

    from .settings import converted

    rows: dict[tuple[str, str, Origin], dict[str, Any]] = {}
    for name in names:
        values = found.values(name, model=model)
        for key, option in found.commands[name].items():
            if key in values:
                setting = values[key][0]
                value, place = converted(option, setting), setting.origin
            else:
                value, place = option.default, Origin(DEFAULT)
            value = str(value) if isinstance(value, Path) else value
            row = rows.setdefault((key, repr(value), place), {"key": key, "value": value, "origin": place.as_dict(), "commands": []})
            row["commands"].append(name)
    return sorted(rows.values(), key=lambda row: row["key"])


def _print(rows: list[dict[str, Any]], origin: bool, n_commands: int | None) -> None:
    """Columns: the setting, its value, where it is set, and for which commands, if not for all that have it."""
    many = {row["key"] for row in rows if sum(other["key"] == row["key"] for other in rows) > 1}
    lines = []
    for row in rows:
        cells = [row["key"], _text(row["value"])]
        cells += [_place(row["origin"])] if origin else []
        cells += [", ".join(row["commands"]) if row["key"] in many or len(row["commands"]) == 1 and n_commands else ""]
        lines.append(cells)
    widths = [max((len(cells[column]) for cells in lines), default=0) for column in range(len(lines[0]) if lines else 0)]
    for cells in lines:
        print("  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)).rstrip())


def _text(value: Any) -> str:
    """As TOML has it, so that a line can be copied into a file; ``-`` where the command decides by itself."""
    return "-" if value is None else json.dumps(value, ensure_ascii=not str(value).isprintable())


def _place(origin: dict[str, Any]) -> str:
    if "variable" in origin:
        return origin["variable"]
    if "file" in origin:
        return f"{origin['file']}, line {origin['line']}" if origin["line"] else origin["file"]
    return origin["kind"]
