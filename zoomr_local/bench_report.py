"""Results of `zoomr bench` as rows, CSV, JSON, a markdown table like llama-bench's, and a PNG.

A row is one test of one case (`tg128 @ d8192`); a case that could not be measured is one row with its reason. The
rows are the same in every form. Figures are medians with the least and the greatest repetition, not mean and standard
deviation as llama-bench gives: a few repetitions on a shared machine have outliers, not a distribution.
"""

from __future__ import annotations

import csv
import io
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from .bench_case import MEASURED, TOO_BUSY
from .errors import UsageError
from .sizes import counted, format_bytes

COLUMNS = (
    "model", "model_type", "model_size_bytes", "model_params", "backend", "n_gpu_layers", "threads", "type_k", "type_v",
    "flash_attn", "policy", "kv_budget_tokens", "depth_tokens", "depth_by", "test", "status", "reason", "busy", "others_cores",
    "tokens_per_second", "tokens_per_second_min", "tokens_per_second_max", "samples",
    "kv_bytes", "index_bytes", "ram_bytes", "disk_bytes", "rss_peak_bytes", "rss_peak_is", "rss_anonymous_bytes",
    "page_in_count", "page_in_ms_p50", "page_in_ms_p95", "page_out_count", "page_out_ms_p50", "page_out_ms_p95",
    "page_type", "logical_tokens", "disk_written_bytes", "disk_written_bytes_per_1000_tokens", "lost_blocks",
)  # fmt: skip
"""The columns of a row, in order: keys in JSON, heads in CSV."""

PAUSES = tuple(column for column in COLUMNS if column.startswith(("page_in_", "page_out_")))
"""Columns of decoding alone: None in the row of a prefill."""

MEMORY = ("kv_bytes", "index_bytes", "ram_bytes", "disk_bytes", "rss_peak_bytes", "rss_peak_is", "rss_anonymous_bytes")


def percentile(values: Sequence[float], percent: float) -> float | None:
    """The least value that at least ``percent`` per cent of ``values`` do not exceed (nearest rank); None of none."""
    if not values:
        return None
    return sorted(values)[max(0, math.ceil(percent / 100 * len(values)) - 1)]


def rows(result: Mapping[str, Any], force: bool = False) -> list[dict[str, Any]]:
    """The rows of one case. A figure taken while the machine was busy is left out, unless ``force``: then it is marked."""
    common = dict.fromkeys(COLUMNS)
    common.update({key: result.get(key) for key in COLUMNS if key in result})
    common.update(
        model=result.get("model_name") or Path(result["model"]).stem, depth_tokens=result["depth"], depth_by=result["way"],
        kv_budget_tokens=None if result["policy"] == "full" else result["config"].get("kv_budget"), busy=False,
        page_type=None if result["policy"] == "full" else result["config"].get("kv_page_type"),
    )  # fmt: skip
    if result["status"] != MEASURED:
        names = [f"{test}{result[tokens]} @ d{result['depth']}" for test, tokens in (("pp", "prompt_tokens"), ("tg", "gen_tokens"))]
        return [{**common, "test": name} for name in names]
    common.update({key: result["memory"][key] for key in MEMORY})
    common.update(_paging(result["paging"]))
    tests = sorted(result["tests"], key=lambda test: test["test"])  # pp, then tg, as llama-bench has them
    return [{**common, **_speed(test, result["depth"], force), **(dict.fromkeys(PAUSES) if test["test"] == "pp" else {})} for test in tests]


def _speed(test: Mapping[str, Any], depth: int, force: bool) -> dict[str, Any]:
    row = {"test": f"{test['test']}{test['tokens']} @ d{depth}", "others_cores": _digits(test["others_cores"], 3), "busy": bool(test["busy"])}
    if test["busy"] and not force:
        return {**row, "status": TOO_BUSY, "reason": f"{test['busy']}; measure again, or quote it with --force"}
    samples = [_digits(test["tokens"] / seconds, 5) for seconds in test["seconds"]]
    return {
        **row, "reason": test["busy"], "samples": samples, "tokens_per_second": _digits(statistics.median(samples), 5),
        "tokens_per_second_min": min(samples), "tokens_per_second_max": max(samples),
    }  # fmt: skip


def _paging(paging: Mapping[str, Any]) -> dict[str, Any]:
    out = {key: paging[key] for key in ("logical_tokens", "disk_written_bytes", "lost_blocks")}
    out["disk_written_bytes_per_1000_tokens"] = round(1000 * paging["disk_written_bytes"] / paging["logical_tokens"])
    for way in ("in", "out"):
        seconds = paging[f"page_{way}_seconds"]
        out[f"page_{way}_count"] = len(seconds)
        for percent in (50, 95):
            value = percentile(seconds, percent)
            out[f"page_{way}_ms_p{percent}"] = None if value is None else _digits(1e3 * value, 4)
    return out


def _digits(value: float | None, digits: int) -> float | None:
    return None if value is None else float(f"{value:.{digits}g}")


# ---------------------------------------------------------------- forms


def to_csv(found: Iterable[Mapping[str, Any]]) -> str:
    """The rows as CSV with a head; a list of samples is joined by spaces, what is not known is empty."""
    out = io.StringIO()
    writer = csv.DictWriter(out, COLUMNS, lineterminator="\n")
    writer.writeheader()
    for row in found:
        writer.writerow({**row, "samples": " ".join(map(str, row["samples"] or []))})
    return out.getvalue()


def speed_text(row: Mapping[str, Any]) -> str:
    """``12.3 (12.1 to 12.6)``, with a * where the machine was busy; the status where there is no figure."""
    if row["tokens_per_second"] is None:
        return str(row["status"])
    low, mid, high = (f"{row[key]:.4g}" for key in ("tokens_per_second_min", "tokens_per_second", "tokens_per_second_max"))
    return f"{mid}{'*' if row['busy'] else ''} ({low} to {high})"


def bytes_text(n_bytes: int | None) -> str:
    """A size, ``-`` for none and for nothing."""
    return format_bytes(n_bytes) if n_bytes else "-"


def pause_text(row: Mapping[str, Any], way: str) -> str:
    """``p50 / p95`` in ms, ``-`` where nothing moved."""
    if not row[f"page_{way}_count"]:
        return "-"
    return " / ".join(f"{row[f'page_{way}_ms_p{percent}']:.3g}" for percent in (50, 95))


def params_text(params: int) -> str:
    """``1.54 B`` or ``3.16 M``, as llama-bench writes it."""
    return f"{params / 1e9:.2f} B" if params >= 1e9 else f"{params / 1e6:.2f} M"


def threads_text(threads: int) -> str:
    """``1 thread``, ``2 threads``."""
    return f"{threads} thread" if threads == 1 else f"{threads} threads"


HEAD = ("model", "size", "params", "backend", "threads", "type_k", "policy", "test", "t/s", "KV", "RAM tier", "disk tier",
        "RSS peak", "page-in ms", "page-out ms", "disk/1k tokens")  # fmt: skip
NUMBERS_FROM = 8  # columns from here on are right-aligned


def markdown(found: Iterable[Mapping[str, Any]]) -> str:
    """A table in llama-bench's layout, with our columns behind; for a pipe."""
    lines = [f"| {' | '.join(HEAD)} |", "|" + "|".join(" --- " if i < NUMBERS_FROM else " ---: " for i in range(len(HEAD))) + "|"]
    lines += [f"| {' | '.join(_markdown_cells(row))} |" for row in found]
    return "\n".join(lines) + "\n"


def _markdown_cells(row: Mapping[str, Any]) -> list[str]:
    known = row["model_size_bytes"] is not None
    return [
        row["model"], bytes_text(row["model_size_bytes"]), params_text(row["model_params"]) if known else "-",
        row["backend"] or "-", str(row["threads"] or "-"), row["type_k"] or "-", row["policy"], row["test"], speed_text(row),
        *(bytes_text(row[key]) for key in ("kv_bytes", "ram_bytes", "disk_bytes", "rss_peak_bytes")),
        pause_text(row, "in"), pause_text(row, "out"), bytes_text(row["disk_written_bytes_per_1000_tokens"]),
    ]  # fmt: skip


def notes(found: Sequence[Mapping[str, Any]], repetitions: int) -> list[str]:
    """What must be said beside any table of these rows: the statistic, how depths were reached, marks and reasons."""
    said = [f"t/s: median (least to greatest) of {repetitions}. page-in, page-out: p50 / p95 of the pauses while decoding."]
    ways = {row["depth_by"] for row in found}
    if "text" in ways:
        said.append("Depths reached by text: every token before the measurement was computed.")
    if "planted" in ways:
        said.append("Depths planted: keys and values of a few computed pieces, repeated; closing and paging are real.")
    if any(row["policy"] == "full" and row["flash_attn"] and row["backend"] == "CPU" for row in found):
        said.append("full: with flash attention, llama.cpp's default. On many CPUs it is faster at depth without: try --no-flash-attn too.")
    if any(row["busy"] and row["tokens_per_second"] is not None for row in found):
        said.append("*: the machine was busy, so the figure is too low and varies.")
    if any(row["rss_peak_is"] == "process" for row in found):
        said.append("RSS peak: of the whole process; this system does not tell a phase's.")
    lost = sum(row["lost_blocks"] or 0 for row in found if row["test"].startswith("tg"))
    if lost:
        said.append(f"{counted(lost, 'block')} {'was' if lost == 1 else 'were'} lost, because the tiers were full or failed: see --kv-ram, --kv-disk and --on-full.")
    for row in found:
        line = f"{row['policy']}, {row['test']}: {row['status']}: {row['reason']}."
        if row["status"] != MEASURED and line not in said:
            said.append(line)
    return said


# ---------------------------------------------------------------- plot


def require_matplotlib() -> None:
    """Raises UsageError that names the extra if matplotlib is missing: asked before a run, not after it."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise UsageError("--plot needs matplotlib, which the extra installs: pip install 'zoomr-local[bench]'") from error


def held_bytes(row: Mapping[str, Any]) -> int:
    """Memory that the length costs: cells, index and the RAM tier."""
    return row["kv_bytes"] + row["index_bytes"] + row["ram_bytes"]


def lines(found: Iterable[Mapping[str, Any]], test: str) -> dict[str, list[Mapping[str, Any]]]:
    """By policy, the measured rows of one kind of test (``pp`` or ``tg``), by depth."""
    out: dict[str, list[Mapping[str, Any]]] = {}
    for row in sorted(found, key=lambda row: row["depth_tokens"]):
        if row["test"].startswith(test) and row["kv_bytes"] is not None:
            out.setdefault(row["policy"], []).append(row)
    return out


def plot(path: Path, found: Sequence[Mapping[str, Any]]) -> None:
    """Tokens/s of decoding and of prefill, and memory, against length, a line a policy, as a PNG.

    Raises UsageError if matplotlib is missing or nothing was measured.
    """
    require_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter

    if not lines(found, "tg"):
        raise UsageError("--plot: nothing was measured, so there is nothing to draw")
    figure = Figure(figsize=(13.5, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, 3)
    for panel, test, title in ((axes[0], "tg", "decode, tokens/s"), (axes[1], "pp", "prefill, tokens/s")):
        for policy, points in lines(found, test).items():
            _draw_speed(panel, policy, [row for row in points if row["tokens_per_second"] is not None])
        panel.set(title=title, ylim=(0, None))
    for policy, points in lines(found, "tg").items():
        axes[2].plot([p["depth_tokens"] for p in points], [held_bytes(p) / 2**20 for p in points], marker="o", markersize=4, label=policy)
    axes[2].set(title="memory that the length costs, MiB\n(cells, index, RAM tier)", ylim=(0, None))
    for panel in axes:
        panel.set_xscale("log", base=2)
        panel.set_xlabel("depth, tokens")
        panel.xaxis.set_major_formatter(FuncFormatter(lambda depth, _: depth_text(int(depth))))
        panel.grid(alpha=0.3)
    axes[2].legend(fontsize="small")
    figure.suptitle(_plot_title(found), fontsize="small")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png", dpi=150)


def _draw_speed(panel: Any, policy: str, points: Sequence[Mapping[str, Any]]) -> None:
    middle = [row["tokens_per_second"] for row in points]
    below = [row["tokens_per_second"] - row["tokens_per_second_min"] for row in points]
    above = [row["tokens_per_second_max"] - row["tokens_per_second"] for row in points]
    panel.errorbar([row["depth_tokens"] for row in points], middle, [below, above], marker="o", markersize=4, capsize=2, label=policy)


def _plot_title(found: Sequence[Mapping[str, Any]]) -> str:
    row = next(row for row in found if row["kv_bytes"] is not None)
    ways = " and ".join(sorted({r["depth_by"] for r in found}))
    busy = "; THE MACHINE WAS BUSY" if any(r["busy"] for r in found) else ""
    budget = next((f", budget {r['kv_budget_tokens']:,} cells" for r in found if r["kv_budget_tokens"]), "")
    return f"{row['model']}, {row['backend']}, {threads_text(row['threads'])}{budget}; depths by {ways}; bars: least to greatest{busy}"


def depth_text(tokens: int) -> str:
    """``8k`` for 8192, other counts as they are."""
    return f"{tokens // 1024}k" if tokens % 1024 == 0 else f"{tokens:,}"
