"""The per-head section of docs/accuracy.md, from folders of `zoomr eval`: python -m benchmarks.accuracy_heads [FOLDER ...]

    zoomr eval -m plain-tiny -n 20 --policy full,recency,random,snapkv,h2o,rkv,pyramid,reasonalloc --kv-budget 332,652,1304 -o heads-plain-tiny
    python -m benchmarks.accuracy_heads heads-plain-tiny        # benchmarks/results/heads-plain-tiny.json, then the page
    python -m benchmarks.accuracy_heads                         # the page alone, from benchmarks/results/heads-*.json

A folder's records are needed beside its results.json: differences here are between any two policies, paired by problem, so a
result file keeps who had which problem right. `accuracy_heads_text.py` writes the words.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.accuracy import PAGE, RESULTS, load
from benchmarks.accuracy_heads_text import filled
from zoomr_local.engine_config import EngineConfig
from zoomr_local.errors import UsageError, ZoomrError
from zoomr_local.evaluate import Cell
from zoomr_local.evaluate_report import write_json
from zoomr_local.journal import code_of

KEPT = ("date", "command", "asked", "max_tokens", "temperature", "kv_type", "threads", "model", "versions", "machine")
CELL = (
    "family", "policy", "kv_budget", "settings_text", "n", "right", "failed", "out_of_tokens", "sequence_mean", "completion_tokens",
    "resident_peak", "resident_mean", "resident_peak_bytes", "tokens_per_s", "seconds",
)  # fmt: skip
RIGHT, WRONG, FAILED = "1", "0", "-"


def collected(folder: Path) -> dict[str, Any]:
    """What the page needs of a finished evaluation: conditions, figures a cell, and its ``answers``, a letter a problem of
    ``problems`` in its family: 1 right, 0 wrong, - failed. ``ram_bytes``: the most that any problem had outside the cells, where records say so.
    ``code``: what zoomr they were made with, where that is not what ``versions`` says alone (of a clone whose commit changed meanwhile).

    Raises UsageError for a folder without a whole evaluation.
    """
    result = load(folder / "results.json")
    for cell in result["cells"]:
        if "failed" not in cell or "completion_tokens" not in cell:
            raise UsageError(f"{folder / 'results.json'} has no count of failed problems; run zoomr eval again in that folder")
    problems: dict[str, list[str]] = {}
    cells = []
    for cell in result["cells"]:
        records = _records(folder, cell)
        order = problems.setdefault(cell["family"], list(records))
        if set(order) != set(records) or cell["n"] + cell["failed"] != len(records):
            raise UsageError(f"{folder / _file_name(cell)} does not hold the problems of results.json; run zoomr eval again in that folder")
        errors = Counter(record["error"]["message"] for record in records.values() if "error" in record)
        answers = "".join(FAILED if "error" in records[i] else RIGHT if records[i]["correct"] else WRONG for i in order)
        ram = [record["kv"]["ram_bytes"] for record in records.values() if "ram_bytes" in record.get("kv", {})]
        beside = {"ram_bytes": max(ram)} if ram else {}
        cells.append({**{name: cell[name] for name in CELL}, **beside, "answers": answers, "errors": dict(errors)})
    code = list(dict.fromkeys(name for cell in result["cells"] for name in code_of(folder / _file_name(cell))))
    several = {"code": code} if set(code) - {result["versions"].get("zoomr")} else {}
    return {**{name: result[name] for name in KEPT if name in result}, **several, "problems": problems, "cells": cells}


def _file_name(cell: dict[str, Any]) -> str:
    chosen = {name: tuple(value) if isinstance(value, list) else value for name, value in cell.get("settings", {}).items()}
    budget = {} if cell["kv_budget"] is None else {"kv_budget": cell["kv_budget"]}
    return Cell(cell["family"], EngineConfig(policy=cell["policy"], **budget), tuple(chosen.items())).file_name


def _records(folder: Path, cell: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The graded and failed records of a cell by the problem's id."""
    path = folder / _file_name(cell)
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        return {str(row["id"]): row for row in rows if "correct" in row or "message" in row["error"]}
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}; give a folder of zoomr eval") from error
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{path} is no file of records; run zoomr eval again in that folder") from error


def held(folder: Path = RESULTS) -> list[dict[str, Any]]:
    """The result files, by name."""
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("heads-*.json"))]


def main(argv: Sequence[str] | None = None) -> int:
    """Collect folders if any are given, write the page; the exit code."""
    p = argparse.ArgumentParser(prog="python -m benchmarks.accuracy_heads", description=__doc__.split("\n", 1)[0])
    p.add_argument("folders", nargs="*", type=Path, metavar="FOLDER", help="of zoomr eval, finished; its name, with heads- before it, becomes the result's")
    p.add_argument("--results", type=Path, default=RESULTS, metavar="DIR", help="default: benchmarks/results")
    p.add_argument("--page", type=Path, default=PAGE, help="default: docs/accuracy.md")
    args = p.parse_args(argv)
    try:
        for folder in args.folders:
            name = folder.resolve().name
            write_json(args.results / f"heads-{name.removeprefix('heads-')}.json", collected(folder))
        args.page.write_text(filled(args.page.read_text(encoding="utf-8"), held(args.results)), encoding="utf-8")
    except ZoomrError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except OSError as error:
        print(f"error: {error.filename}: {error.strerror}; give a page with the marks of docs/accuracy.md, and a folder for results", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
