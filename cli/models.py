"""`zoomr models ls | pull | show | rm`: the models on this disk, and those of the hub.

Reads flags and prints. Names and downloads are `zoomr_local.hub`, the cache `zoomr_local.hub_cache`, what a file holds
`zoomr_local.model_facts`.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from zoomr_local.errors import UsageError

from . import options
from .summaries import user_markers

if TYPE_CHECKING:
    from zoomr_local.hub_cache import Cached

_PIPE_COLUMNS = 200  # where stdout is no terminal nothing is wrapped
_TEMPLATE_CHARS = 160

app = typer.Typer(
    name="models", no_args_is_help=True, help="List, fetch, inspect and remove models.",
    context_settings={"help_option_names": ["-h", "--help"]},
)  # fmt: skip

Name = Annotated[
    str,
    typer.Argument(
        autocompletion=options.model_names, show_default=False,
        help="A path, a bundled name (zoomr-tiny, plain-tiny, breadcrumbs-tiny), or user/repo[:quant] of the Hugging Face hub.",
    ),
]  # fmt: skip
HubName = Annotated[
    str,
    typer.Argument(
        autocompletion=options.model_names, show_default=False, help="user/repo[:quant]; instead of a quantisation also the name of a file.",
    ),
]  # fmt: skip


@app.command("ls")
def ls(as_json: options.Json = False) -> None:
    """List the bundled models and the GGUF files in the hub's cache."""
    from zoomr_local import hub_cache

    rows = [_bundled_row(name, path) for name, path in options.bundled_models().items()]
    rows += [_cached_row(cached) for cached in hub_cache.cached_models(whole=False)]
    cut_off = hub_cache.incomplete()
    if as_json:
        parts = [{"path": str(path), "size_bytes": size} for path, size in cut_off]
        print(json.dumps({"cache": str(hub_cache.cache_dir()), "models": rows, "incomplete": parts}))
        return
    _print_table(rows)
    if all(row["from"] == "bundled" for row in rows):
        options.tell("the hub's cache holds no GGUF model; to fetch one: zoomr models pull user/repo[:quant]")
    if cut_off:
        from zoomr_local.sizes import format_bytes

        size = format_bytes(sum(size for _, size in cut_off))
        print(f"{size} of downloads that were cut off are in the cache; `zoomr models pull` of the same name goes on with them", file=sys.stderr)


@app.command("pull")
def pull(
    name: HubName,
    only_list: Annotated[bool, typer.Option("--list", help="Only list what the repository has; nothing is fetched.")] = False,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Fetch a model from the Hugging Face hub into its cache; a download that was cut off goes on."""
    from zoomr_local import hub
    from zoomr_local.hub_names import parse
    from zoomr_local.sizes import format_bytes

    reference = parse(name)
    if reference is None:
        raise UsageError(f"{name} is not of the form user/repo[:quant]")
    if only_list:
        _print_listed(reference, hub.repo_models(reference.repo), as_json)
        return
    say = (lambda text: None) if quiet else options.tell
    done = hub.pull(reference, say, progress=not quiet)
    say(f"{done.reference} is here" + ("" if done.fetched_bytes else " already") + f"; to use it: -m {done.reference}")
    if as_json:
        found = {"name": str(done.reference), "path": str(done.path), "files": list(done.model.files), "quant": done.model.quant}
        print(json.dumps({**found, "size_bytes": done.model.size_bytes, "fetched_bytes": done.fetched_bytes}))
    elif quiet or not sys.stdout.isatty():
        print(done.path)
    else:
        say(f"{done.path} ({format_bytes(done.model.size_bytes or 0)})")


@app.command("show")
def show(name: Name, as_json: options.Json = False) -> None:
    """Say what a model is, what its cache costs a token, and whether zoomr can page it; no weights are read."""
    from zoomr_local import hub, hub_cache, trial
    from zoomr_local.errors import ModelError
    from zoomr_local.hub_names import parse

    reference = None if name in options.bundled_models() or os.path.exists(os.path.expanduser(name)) else parse(name)
    if reference is not None and hub_cache.find(reference) is None:
        raise ModelError(f"{reference} is not in the cache; `zoomr models pull --list {reference.repo}` says what there is, `zoomr models pull {reference}` fetches it")
    path = trial.check(hub.resolve(name, options.bundled_models(), options.tell))
    from zoomr_local.model_facts import facts

    found = facts(path, user_markers())
    if as_json:
        print(json.dumps(found))
        return
    for label, text in _fact_rows(found):
        print(f"{label:<15} {text}")


@app.command("rm")
def rm(
    name: HubName,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    as_json: options.Json = False,
) -> None:
    """Remove a model from the hub's cache; without a quantisation all of the repository's GGUF files."""
    from zoomr_local import hub_cache
    from zoomr_local.gguf_file import printable
    from zoomr_local.sizes import format_bytes

    chosen = _to_remove(name)
    size = format_bytes(sum(c.model.size_bytes or 0 for c in chosen))
    for cached in chosen:
        files = ", ".join(map(printable, cached.model.files))
        print(f"{cached.reference}  {files}  {format_bytes(cached.model.size_bytes or 0)}{_parts_text(len(cached.model.files), cached.model.missing)}", file=sys.stderr)
    if not yes:
        if not sys.stdin.isatty():
            raise UsageError(f"removing {size} asks first, and nobody is at the terminal; add --yes")
        if not typer.confirm(f"remove {size} from {hub_cache.cache_dir()}?", err=True):
            options.tell("nothing was removed")
            chosen = []
    freed = sum(hub_cache.remove(cached) for cached in chosen)
    if chosen:
        options.tell(f"{format_bytes(freed)} are free")
        if left := hub_cache.incomplete(chosen[0].repo):
            options.tell(_cut_off_text(left))
    if as_json:
        print(json.dumps({"removed": [str(c.reference) for c in chosen], "freed_bytes": freed}))


def _to_remove(name: str) -> list[Cached]:
    """The cached models that ``name`` means. Raises UsageError for what is not in the cache."""
    from zoomr_local import hub_cache
    from zoomr_local.hub_names import parse

    if name in options.bundled_models():
        raise UsageError(f"{name} is part of zoomr-local and cannot be removed")
    reference = None if os.path.isfile(os.path.expanduser(name)) else parse(name)
    if reference is None:
        raise UsageError(f"{name} is not of the form user/repo[:quant]; only the hub's cache is cleared, other files are yours to delete")
    if reference.tag is None:
        chosen = hub_cache.cached_models(reference.repo, whole=False)
    else:
        found = hub_cache.find(reference, whole=False)
        chosen = [found] if found else []
    if not chosen:
        there = [str(c.reference) for c in hub_cache.cached_models(reference.repo, whole=False)]
        left = [] if there else hub_cache.incomplete(reference.repo)
        there = there or [repo for repo in hub_cache.cached_repos() if repo != reference.repo]
        also = f"; {_cut_off_text(left)}" if left else f"; there are {', '.join(there[:8])}" if there else ""
        raise UsageError(f"{reference} is not in {hub_cache.cache_dir()}{also}")
    return chosen


def _cut_off_text(left: list[tuple[Path, int]]) -> str:
    """What of a repository is no model yet, and how to be rid of it."""
    import shlex

    from zoomr_local.sizes import format_bytes

    paths = " ".join(shlex.quote(str(path)) for path, _ in left[:3])
    return f"{format_bytes(sum(size for _, size in left))} of a download that was cut off is there: `zoomr models pull` goes on with it, this deletes it: rm {paths}"


def _parts_text(parts: int, missing: int) -> str:
    """``, 1 of 2 parts`` for a model that lacks some."""
    return f", {parts} of {parts + missing} parts" if missing else ""


def _bundled_row(name: str, path: Path) -> dict[str, Any]:
    from zoomr_local.model_facts import file_quant

    size = path.stat().st_size if path.is_file() else None
    return {"name": name, "quant": file_quant(path), "size_bytes": size, "path": str(path), "from": "bundled", "parts": 1, "missing_parts": 0}


def _cached_row(cached: Cached) -> dict[str, Any]:
    from zoomr_local.model_facts import file_quant

    model = cached.model
    return {"name": str(cached.reference), "quant": model.quant or file_quant(cached.path), "size_bytes": model.size_bytes, "path": str(cached.path),
            "from": "hub", "parts": len(model.files), "missing_parts": model.missing}


def _console() -> Any:
    from rich.console import Console

    return Console(markup=False, highlight=False, emoji=False, width=None if sys.stdout.isatty() else _PIPE_COLUMNS)


def _print_table(rows: list[dict[str, Any]]) -> None:
    from rich.table import Table

    from zoomr_local.sizes import format_bytes

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for heading in ("name", "quant", "size", "path"):
        table.add_column(heading, justify="right" if heading == "size" else "left", overflow="fold", no_wrap=heading in ("quant", "size"))
    for row in rows:
        size = "missing" if row["size_bytes"] is None else format_bytes(row["size_bytes"])
        size += _parts_text(row["parts"], row["missing_parts"])
        path = "".join(c if c.isprintable() else "?" for c in row["path"])
        table.add_row(row["name"], row["quant"] or "-", size, path)
    _console().print(table)


def _print_listed(reference: Any, models: list[Any], as_json: bool) -> None:
    from zoomr_local import hub_cache
    from zoomr_local.hub_names import matching, title
    from zoomr_local.sizes import format_bytes

    here = {c.model.files for c in hub_cache.cached_models(reference.repo)}
    chosen = matching(models, reference.tag) if models else []
    rows = [
        {"name": f"{reference.repo}:{title(m, models)}", "quant": m.quant, "size_bytes": m.size_bytes, "files": list(m.files),
         "cached": m.files in here, "chosen": m in chosen}
        for m in models
    ]  # fmt: skip
    if as_json:
        print(json.dumps({"repo": reference.repo, "models": rows}))
        return
    for row in rows:
        marks = ", ".join(word for word, on in (("taken if none is named" if reference.tag is None else "meant", row["chosen"]), ("in the cache", row["cached"])) if on)
        size = "" if row["size_bytes"] is None else format_bytes(row["size_bytes"])
        print(f"{row['name']}  {size}" + (f"  ({marks})" if marks else ""))
    if not rows:
        options.tell(f"{reference.repo} has no GGUF model; look for a repository whose name ends in -GGUF")


def _fact_rows(found: dict[str, Any]) -> list[tuple[str, str]]:
    from zoomr_local.sizes import format_bytes

    heads = f"{found['heads']} query, {found['kv_heads']} KV, of {found['head_dim']}" if found["head_dim"] else "none"
    window = f", windows of {found['window_tokens']:,} tokens apart" if found["window_tokens"] else ""
    template = found["template"]
    shown = "none: a single message is put as it is" if template is None else template[:_TEMPLATE_CHARS] + ("..." if len(template) > _TEMPLATE_CHARS else "")
    return [
        ("name", found["name"]), ("file", found["file"]),
        ("architecture", f"{found['architecture']} ({found['description']})"),
        ("quantisation", found["quant"] or "not said"),
        ("size", f"{format_bytes(found['size_bytes'])} of weights, {found['parameters']:,} parameters"),
        ("layers", str(found["layers"])), ("heads", heads),
        ("KV cache", f"{format_bytes(found['kv_token_bytes'])} a token (f16){window}"),
        ("trained on", f"{found['trained_tokens']:,} tokens"),
        ("vocabulary", f"{found['vocabulary']:,} tokens"),
        ("template", shown), ("thinking", found["thinking"] or "not marked"), ("dialect", f"{found['dialect']}: {found['dialect_why']}"),
        ("paging", "yes" if found["pageable"] else f"no: {found['refused']}. Run it with --policy full"),
    ]  # fmt: skip
