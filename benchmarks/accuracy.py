"""Writes the figures of docs/accuracy.md from result files of `zoomr eval`: python -m benchmarks.accuracy [RESULT.json ...]

    python -m benchmarks.accuracy           # all of benchmarks/results/accuracy*.json
    python -m benchmarks.accuracy --plot    # and the pictures beside the page, one a model, from the same files

The bars are the project's own, stated before anything was measured. Every bar is judged on the measured shares,
its intervals stand in the table; a bar that no cell of the results speaks to is said to be not measured. The
sections on settings and agreement are `benchmarks.settings`' and `benchmarks.agreement`'s, from their result files.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from zoomr_local.errors import UsageError, ZoomrError
from zoomr_local.evaluate_report import auc_text, plot

from . import agreement as lookups_agreement
from . import settings as chosen_settings
from .accuracy_bars import bars, difference, has, share, uncompressed
from .accuracy_merge import merged, way
from .report import table

ROOT = Path(__file__).resolve().parent.parent
PAGE, RESULTS = ROOT / "docs" / "accuracy.md", ROOT / "benchmarks" / "results"
SECTIONS = {"settings": chosen_settings.text, "agreement": lookups_agreement.text, "agreement-tight": lookups_agreement.text}
"""Blocks that are made from one result file each, of the same name; their text without one says so."""

MARKS = {name: (f"<!-- {name}: begin -->", f"<!-- {name}: end -->") for name in ("bars", "pictures", "figures", *SECTIONS)}

HOLDS: dict[str, tuple[str, ...]] = {
    "date": (), "command": (), "asked": ("suite", "seed"), "max_tokens": (), "temperature": (), "kv_type": (), "agreement": (),
    "model": ("file", "bytes", "hashed", "sha256"), "versions": (), "machine": ("system", "cores"),
}  # fmt: skip
"""What a result file has beside its cells, and what of it the page needs."""

CELL = (
    "family", "policy", "kv_budget", "settings_text", "n", "right", "accuracy", "wilson95", "from_full", "out_of_tokens", "agreement", "seconds",
    "sequence_mean", "resident_peak", "resident_mean", "resident_peak_bytes", "page_ins", "tokens_per_s",
)  # fmt: skip

Result = dict[str, Any]
Cell = dict[str, Any]
# ---------------------------------------------------------------- text


def bars_text(results: Sequence[Result]) -> str:
    """The bars over the cells of all results of one model; results of other models stand apart, those with a bar that is missed first."""
    parts: list[tuple[bool, str]] = []
    models = merged(results)
    for result in models:
        if len(models) > 1 and not has(result, "zoomr") and not has(result, "breadcrumbs"):
            continue  # something to compare with: no bar is for it
        found = bars(result, models)
        missed, open_ = (sum(met is verdict for _, _, met in found) for verdict in (False, None))
        also = f" {open_} {'is' if open_ == 1 else 'are'} not measured." if open_ else ""
        head = (f"**{missed} of {len(found)} bars are not reached.**" if missed else "Every bar that was measured is reached.") + also
        words = {True: "met", False: "**not met**", None: "not measured"}
        rows = [[asked, measured, words[met]] for asked, measured, met in found]
        parts.append((missed == 0, f"{_source(result, models)}{head}\n\n{table(['bar', 'measured (95 % interval)', ''], rows)}"))
    return "\n\n".join(text for _, text in sorted(parts, key=lambda part: part[0]))


def _source(result: Result, models: Sequence[Result]) -> str:
    """Of which model the bars are, and every command whose cells they were judged on."""
    drawn_on = [result, uncompressed(result, models)] if has(result, "breadcrumbs") else [result]
    commands = dict.fromkeys(cell.get("command") for whole in drawn_on for cell in whole["cells"] if cell["n"])
    lines = [f"- `{command}`" for command in commands if command]
    title = [f"### {Path(result['model']['file']).stem}"] if len(models) > 1 else []
    return "".join(f"{part}\n\n" for part in (*title, *(["Measured by\n\n" + "\n".join(lines)] if lines else [])))


def figures_text(results: Sequence[Result]) -> str:
    """Conditions and tables of every result."""
    return "\n\n".join(f"{_title(r, results)}{conditions(r)}\n\n{figures(r)}\n\n{agreement(r)}" for r in results)


def _title(result: Result, results: Sequence[Result]) -> str:
    return f"### `{result['command']}`\n\n" if len(results) > 1 else ""


def conditions(result: Result) -> str:
    """What was run, on what."""
    asked, model = result["asked"], result["model"]
    thoughts = f"{asked['thoughts']} thoughts" if asked.get("thoughts") else "problems of about 2,650 tokens"
    of = f"{thoughts}, split {asked['split']}, " if "split" in asked else ""
    limits = ", ".join(f"{limit} ({family})" for family, limit in result["max_tokens"].items())
    sampling = "greedy" if result["temperature"] == 0 else f"temperature {result['temperature']}"
    return (
        f"{result['date']}, `{result['command']}`. Suite {asked['suite']}, {of}seed {asked['seed']}; {sampling}, at most "
        f"{limits} tokens a reply; K and V in {result['kv_type']}. Model {model['file']}, {model['bytes']:,} bytes, SHA-256 of "
        f"{model['hashed']} {model['sha256'][:16]}. {', '.join(f'{k} {v}' for k, v in result['versions'].items())}. Machine: {result['machine']['system']}, "
        f"{result['machine']['cores']} cores."
        + (f" Its records were made with zoomr {', '.join(result['code'])}." if "code" in result else "")
    )


def figures(result: Result) -> str:
    """A line a cell."""
    head = ["family", "policy", "budget", "n", "right %", "from full, points", "cut off", "peak", "mean", "peak KiB", "page-ins", "tokens/s", "s"]
    compared = any(cell["settings_text"] for cell in result["cells"])
    rows = []
    for cell in result["cells"]:
        name = f"{cell['policy']} {cell['settings_text']}".strip() if compared else cell["policy"]
        rows.append([
            cell["family"], name, str(cell["kv_budget"] or "-"), str(cell["n"]), share(cell) if cell["n"] else "-", difference(cell),
            str(cell["out_of_tokens"]), str(cell["resident_peak"]), f"{cell['resident_mean']:.0f}",
            f"{cell['resident_peak_bytes'] / 1024:.0f}", str(cell["page_ins"]), f"{cell['tokens_per_s'] or 0:.0f}", f"{cell['seconds']:.0f}",
        ])  # fmt: skip
    return table(head, rows)


def agreement(result: Result) -> str:
    """What the agreement predicts, a line a cell and the whole."""
    rows = []
    for cell in result["cells"]:
        a = cell["agreement"]
        if a:
            auc = auc_text(a["auc"], a["n"], a["n_wrong"]).partition(" ")[0]
            name = f"{cell['policy']} {cell['settings_text']}".strip()
            rows.append([cell["family"], name, str(cell["kv_budget"]), f"{a['mean']:.3f}", auc, str(a["n"]), str(a["n_wrong"])])
    whole = result["agreement"]
    if not rows or whole is None:
        return "No policy here votes, so there is no agreement."
    n_wrong = sum(cell["agreement"]["n_wrong"] for cell in result["cells"] if cell["agreement"])
    return (
        f"Agreement as a predictor that a problem is right: AUC {auc_text(whole['auc'], whole['n'], n_wrong)}; n = {whole['n']}, {whole['pairs']} pairs, each within a cell.\n\n"
        + table(["family", "policy", "budget", "mean agreement", "AUC", "n", "of them wrong"], rows)
    )


# ---------------------------------------------------------------- page


def filled(page: str, results: Sequence[Result], sections: Mapping[str, Any] | None = None) -> str:
    """``page`` with its generated blocks made from ``results``, and from ``sections`` as `held` gives them."""
    sections = sections or {}
    bodies = {"bars": bars_text(results), "pictures": pictures_text(results), "figures": figures_text(results)}
    for name, body in {**bodies, **{name: text(sections.get(name)) for name, text in SECTIONS.items()}}.items():
        begin, end = MARKS[name]
        head, rest = page.split(begin, 1)
        page = f"{head}{begin}\n\n{body}\n\n{end}{rest.split(end, 1)[1]}"
    return page


def held(folder: Path = RESULTS) -> dict[str, Any]:
    """The result of each section, None where ``folder`` has none."""
    found = {}
    for name in SECTIONS:
        path = folder / f"{name}.json"
        found[name] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
    return found


def load(path: Path) -> Result:
    """A result file. Raises UsageError for a file that is none."""
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}; give results.json of zoomr eval") from error
    missing = ["cells"] if not isinstance(result, dict) else _missing(result)
    if missing:
        raise UsageError(f"{path} has no {', '.join(missing[:5])}; give results.json of zoomr eval")
    return result


def _missing(result: Result) -> list[str]:
    """What of the keys that the page needs is not in a result."""
    found = [] if isinstance(result.get("cells"), list) and result["cells"] else ["cells"]
    for name, inside in HOLDS.items():
        if name not in result:
            found.append(name)
        elif inside and not isinstance(result[name], dict):
            found += [f"{name}.{key}" for key in inside]
        else:
            found += [f"{name}.{key}" for key in inside if key not in result[name]]
    if not found:
        found = [f"cells[{n}].{key}" for n, cell in enumerate(result["cells"]) for key in CELL if not isinstance(cell, dict) or key not in cell]
    return found


def picture(result: Result) -> str:
    """The file name of a model's picture."""
    return f"accuracy-{Path(result['model']['file']).stem}.png"


def pictures_text(results: Sequence[Result]) -> str:
    """The pictures of the page, one a model; `--plot` draws them."""
    names = dict.fromkeys(picture(result) for result in merged(results))
    return "\n\n".join(f"![{name.removeprefix('accuracy-').removesuffix('.png')}: accuracy against KV cells, a panel a family]({name})" for name in names)


def drawn(results: Sequence[Result]) -> dict[str, Result]:
    """What each picture shows, by its file name: every cell of one model.

    Raises UsageError if two models, two versions of what ran them, or two ways of measuring would share a picture.
    """
    found: dict[str, Result] = {}
    for result in merged(results):
        other = found.setdefault(picture(result), result)
        if other is not result:
            raise UsageError(
                f"--plot: the results of {result['model']['file']} are of two models, versions or ways of measuring (SHA-256"
                f" {other['model']['sha256'][:8]} and {result['model']['sha256'][:8]}, {other['versions']} and {result['versions']},"
                f" {way(other)} and {way(result)}); name those of one"
            )
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Write the page, and draw if that is asked; the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.accuracy", description=__doc__.split("\n", 1)[0])
    parser.add_argument("results", nargs="*", type=Path, metavar="RESULT.json", help="results.json of a folder of zoomr eval (default: benchmarks/results/accuracy*.json)")
    parser.add_argument("--page", type=Path, default=PAGE, help="default: docs/accuracy.md")
    parser.add_argument("--plot", action="store_true", help="draw accuracy against KV cells too, accuracy-MODEL.png beside the page (needs matplotlib)")
    arguments = parser.parse_args(argv)
    paths = arguments.results or sorted(RESULTS.glob("accuracy*.json"))
    try:
        results = [load(path) for path in paths]
        for name, result in drawn(results).items() if arguments.plot else ():
            plot(arguments.page.with_name(name), result)
        try:
            page = arguments.page.read_text(encoding="utf-8")
        except OSError as error:
            raise UsageError(f"--page {arguments.page}: {error.strerror}; give a page with the marks of docs/accuracy.md") from error
        arguments.page.write_text(filled(page, results, held()), encoding="utf-8")
    except ZoomrError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
