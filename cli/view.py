"""`zoomr view FILE`: draws what `--trace` has recorded, in the terminal or as one page."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from zoomr_local.errors import UsageError

from . import options

if TYPE_CHECKING:
    from zoomr_local.trace_file import Recorded, TraceContent

_MOST_COLUMNS = 120
_LARGE_PAGE_BYTES = 16 << 20  # beyond this a browser needs seconds to draw

File = Annotated[Path, typer.Argument(help="A file that --trace has written.")]
ProblemId = Annotated[
    str | None,
    typer.Option("--problem", metavar="ID", help="This one of several; 2:ID is that of the second run. Default: the one with most zooms."),
]
Html = Annotated[
    Path | None, typer.Option("--html", metavar="OUT.html", help="Write a page with all problems (with --problem, that one) instead.")
]
Open = Annotated[bool, typer.Option("--open", help="Open the page in the browser; without --html a temporary one.")]


def view(
    file: File,
    problem: ProblemId = None,
    html: Html = None,
    open_: Open = False,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> int:
    """Look at a recorded run: thoughts and summaries over time, what was in the cache, and what the heads voted for."""
    from zoomr_local.trace_file import read_trace
    from zoomr_local.trace_view import picture

    content = read_trace(file)
    say = _silent if quiet else _say
    if content.torn_bytes:
        say(f"{file}: the last line is torn ({content.torn_bytes:,} bytes), as after a kill; it is left out")
    if not content.problems:
        raise UsageError(f"{file} holds no problem yet; it was only begun")
    chosen = _chosen(content, problem, file)
    pictures = [picture(one) for one in ([chosen] if chosen else content.problems)]
    first = max(range(len(pictures)), key=lambda i: (pictures[i]["zooms"], i))
    if as_json:
        print(json.dumps({"torn_bytes": content.torn_bytes, "problems": pictures}))
    if html is not None or open_:
        _write_page(html, pictures, first, open_, say)
    elif not as_json:
        _print(pictures, first)
    return 0


def _chosen(content: TraceContent, asked: str | None, file: Path) -> Recorded | None:
    """The problem that was asked for; the newest of that name unless its run is named too."""
    if asked is None:
        return None
    found = [one for one in content.problems if asked in (str(one.id), f"{one.run}:{one.id}")]
    if not found:
        from .view_draw import shown

        names = list(dict.fromkeys(str(one.id) for one in content.problems))
        more = f" and {len(names) - 8} more" if len(names) > 8 else ""
        raise UsageError(f"{file} has no problem {asked}; it has {shown(', '.join(names[:8]))}{more}")
    return found[-1]


def _write_page(html: Path | None, pictures: list[dict[str, Any]], first: int, open_: bool, say: Any) -> None:
    from .view_page import page

    data = page(pictures, first).encode()
    if len(data) > _LARGE_PAGE_BYTES:
        say(f"the page has {len(data) >> 20} MiB, which browsers draw slowly; --problem ID makes one of a single problem")
    path = _temporary(data) if html is None else _replaced(html, data)
    say(f"page: {path} ({len(data):,} bytes, {len(pictures)} problem{'s' * (len(pictures) != 1)})")
    if open_:
        import webbrowser

        if not webbrowser.open(path.resolve().as_uri()):
            raise UsageError(f"no browser was found; open {path} yourself")


def _temporary(data: bytes) -> Path:
    file, name = tempfile.mkstemp(prefix="zoomr-view-", suffix=".html")
    with os.fdopen(file, "wb") as out:
        out.write(data)
    return Path(name)


def _replaced(path: Path, data: bytes) -> Path:
    """Write ``path``, mode 0600, which must not exist or be a page of ours."""
    from .view_page import MARK

    try:
        if path.exists():
            with path.open("rb") as old:
                if MARK.encode() not in old.read(200):
                    raise UsageError(f"--html {path}: there is such a file and it is no page of zoomr view; name another one")
        file, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        try:
            with os.fdopen(file, "wb") as out:
                out.write(data)
            os.replace(name, path)
        except BaseException:
            os.unlink(name)
            raise
    except OSError as error:
        raise UsageError(f"--html {path}: {error.strerror}; name another file") from None
    return path


def _print(pictures: list[dict[str, Any]], first: int) -> None:
    from rich.console import Console

    from . import view_draw, view_heads
    from .blocks import ASCII, UNICODE, legend

    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # half of a surrogate pair can stand in a model's text
    console = Console(markup=False, highlight=False, emoji=False)
    width = min(console.width, _MOST_COLUMNS)
    glyphs = UNICODE if (console.encoding or "").lower().startswith("utf") else ASCII
    chosen = pictures[first]
    for i, line in enumerate(view_draw.heading(chosen)):
        console.print(line, style="bold" if i == 0 else "dim", width=width)
    console.print(f"\n{'thought (its summary)':>25} time ->", style="dim")
    console.print(view_draw.drawing(chosen, width, glyphs), end="")
    console.print(legend(width, glyphs) if chosen["heads"] is None else view_heads.row_legend(width, glyphs))
    for line in view_heads.maps(chosen, width, glyphs is UNICODE):
        console.print(line, width=width, no_wrap=True, overflow="crop")
    lines = view_draw.thoughts(chosen, width)
    if lines:
        console.print()
        for line in lines:
            console.print(line, width=width, no_wrap=True, overflow="ellipsis")
    for line in view_draw.notes(chosen):
        console.print(line, width=width)
    if len(pictures) > 1:
        _print_others(console, pictures, first)


def _print_others(console: Any, pictures: list[dict[str, Any]], first: int) -> None:
    from .view_draw import shown

    console.print(f"\nThis is one of {len(pictures)}; --problem ID shows another, --html FILE all of them:", style="dim")
    for i, one in enumerate(pictures):
        if i != first:
            console.print(shown(f"  {one['run']}:{one['id']}  {one['policy']}, {one['tokens']:,} tokens, {one['zooms']:,} zooms"), style="dim")


def _say(text: str) -> None:
    print(text, file=sys.stderr)


def _silent(text: str) -> None:
    """With --quiet."""
