"""`python -m zoomr_cli.docs > docs/cli.md`: the reference of every command and flag, made from the commands themselves.

A test compares the page with this output, so the page cannot drift. Built from the parameters rather than from
the printed help, which depends on typer's version and the terminal.
"""

from __future__ import annotations

from typing import Any

import typer

from .main import app

_HEAD = """# The command line

Made by `python -m zoomr_cli.docs > docs/cli.md`; edit the commands in `cli/`, not this page.

Exit codes: 0 done, 1 failed (missing model or library, full disk), 2 used wrongly (flags, input, an output that
does not fit), 3 some problems failed (each has its record), 130 interrupted (everything finished is on the disk).

Flags that are settings can also be set by variables (`ZOOMR_KV_BUDGET`) and in files: [config.md](config.md).

Results go to stdout, everything else to stderr. `NO_COLOR` is honoured. `ZOOMR_DEBUG=1` lets errors through with
their traceback. What stands in the files of `zoomr solve`: [records.md](records.md).
"""


def reference() -> str:
    """The whole page."""
    root = typer.main.get_command(app)
    parts = [_HEAD]
    for name, command in root.commands.items():
        inner = getattr(command, "commands", None)
        for words, one in ((name, command),) if inner is None else ((f"{name} {word}", each) for word, each in inner.items()):
            parts.append(_section(words, one))
    return "\n".join(parts)


def _section(name: str, command: Any) -> str:
    arguments = [p for p in command.params if p.param_type_name == "argument"]
    options = [p for p in command.params if p.param_type_name == "option"]
    usage = " ".join(["zoomr", name, *(p.name.upper() if p.required else f"[{p.name.upper()}]" for p in arguments), "[OPTIONS]"])
    lines = [f"## zoomr {name}", "", command.help, "", f"    {usage}", "", "| | default | |", "|---|---|---|"]
    lines += [f"| `{p.name.upper()}` | | {_cell(p.help)} |" for p in arguments]
    for panel in dict.fromkeys(getattr(p, "rich_help_panel", None) for p in options):
        if panel:
            lines.append(f"| **{panel}** | | |")
        lines += [_row(p) for p in options if getattr(p, "rich_help_panel", None) == panel]
    return "\n".join(lines) + "\n"


def _row(option: Any) -> str:
    names = ", ".join(f"`{name}`" for name in [*option.opts, *option.secondary_opts])
    if not option.is_flag:
        names += f" {_cell(option.metavar)}"
    variable = f" Environment: `{option.envvar}`." if option.envvar else ""
    shown = option.show_default and option.default is not None and option.default is not False
    default = "" if not shown else "on" if option.default is True else str(option.default)
    return f"| {names} | {default} | {_cell(option.help or '')}{variable} |"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


if __name__ == "__main__":
    print(reference(), end="")
