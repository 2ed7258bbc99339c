"""Which cells of several results of `zoomr eval` are of one model and way of measuring, and with which settings each was run.

A setting that a run compared stands in a cell's ``settings_text``; one that was given as a single value stands in the cell's ``asked``, and
in results of before there was that, in the command line only. Here both come to one text, so that cells are put together, and judged
as defaults, only where they are. `accuracy.py` calls it.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Sequence
from typing import Any

from zoomr_local.evaluate import has_a_meaning, setting_text
from zoomr_local.journal import compared_versions
from zoomr_local.policies import POLICIES

Result = dict[str, Any]
Cell = dict[str, Any]

_SINGLE = {
    "refresh": None, "votes_per_head": None, "zoomed_blocks": None, "window": None, "vote_window": None, "vote_layers": None, "summary_rows": None,
    "beacon_every": None, "thought_min": None, "summary_max": None, "sinks": "4", "kv_page_type": "f16", "on_full": "drop",
    "flash_attn": "on", "wait_for_disk": "off",
}  # fmt: skip
"""Settings that an older result names in its command only, if they had one value, and the text of the default where it can be typed."""

_SWITCHES = {"flash_attn": ("flash_attn", "on"), "no_flash_attn": ("flash_attn", "off"), "wait_for_disk": ("wait_for_disk", "on"), "no_wait_for_disk": ("wait_for_disk", "off")}


def merged(results: Sequence[Result]) -> list[Result]:
    """One result a model and way of measuring, with the cells of all its results; of cells measured twice the one of more problems stands.

    A cell has all its settings in ``settings_text`` then, and in ``command`` what measured it.
    """
    found: dict[str, Result] = {}
    for result in results:
        whole = found.setdefault(json.dumps([result.get("model"), compared_versions(result.get("versions") or {}), way(result)], sort_keys=True), {**result, "cells": []})
        cells = {_place(cell): cell for cell in whole["cells"]}
        for cell in result["cells"]:
            command = cell.get("command") or result.get("command") or ""
            cell = {**cell, "settings_text": _settings(cell, command), "command": command}
            if _place(cell) not in cells or cell["n"] > cells[_place(cell)]["n"]:
                cells[_place(cell)] = cell
        whole["cells"] = list(cells.values())
    return list(found.values())


def way(result: Result) -> dict[str, Any]:
    """How it was measured, but for the number of problems."""
    longest = dict(_typed(result.get("command") or "")).get("max_tokens")  # an older result has it there only
    asked = {"max_tokens": int(longest) if longest and longest.isdecimal() else None, **(result.get("asked") or {})}
    asked.pop("n", None)
    return {**asked, "temperature": result.get("temperature"), "kv_type": result.get("kv_type")}


def _place(cell: Cell) -> tuple[str, str, int | None, str]:
    return cell["family"], cell["policy"], cell["kv_budget"], cell["settings_text"]


def _settings(cell: Cell, command: str) -> str:
    """Every setting of a cell that was chosen, ``refresh=8 window=64``, in the order of their names."""
    if "asked" in cell:
        chosen = {name: setting_text(tuple(value) if isinstance(value, list) else value) for name, value in cell["asked"].items()}
    else:
        chosen = {name: value for name, _, value in (part.partition("=") for part in cell["settings_text"].split())}
        for flag, following in _typed(command) if cell["policy"] in POLICIES else ():
            name, value = _SWITCHES.get(flag, (flag, following))
            if name in _SINGLE and value != _SINGLE[name] and has_a_meaning(name, cell["policy"]):
                chosen.setdefault(name, value.replace(",", "+"))
    return " ".join(f"{name}={value}" for name, value in sorted(chosen.items()))


def _typed(command: str) -> Iterator[tuple[str, str]]:
    """Each flag of a command line that has a value, by its name with ``_``, and the value; what follows, of one that has none."""
    try:
        words = shlex.split(command)
    except ValueError:  # a stranger's
        return
    for word, following in zip(words, [*words[1:], ""], strict=False):
        if word.startswith("--"):
            name, equals, value = word.removeprefix("--").partition("=")
            yield name.replace("-", "_"), value if equals else following
