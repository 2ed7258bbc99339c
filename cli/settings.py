"""The flags as settings: gives every command what files and variables say, before its flags are read.

The registry of settings is the commands' own options; a setting is called as its flag (``--kv-budget`` is ``kv-budget``). Reading
and merging are `zoomr_local.config`. `main.py` makes its group of `ConfiguredGroup`, `config.py` prints what is in force.
"""

from __future__ import annotations

import math
import os
import re
import sys
from collections.abc import Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from typer.core import TyperGroup

from zoomr_local.errors import UsageError, ZoomrError

if TYPE_CHECKING:
    from zoomr_local.config import Config, Setting

PROJECT_KEYS = frozenset({
    "beacon-every", "flash-attn", "keep-thinking", "kv-budget", "kv-page-type", "kv-type", "max-tokens", "min-p", "on-full", "policy", "refresh",
    "repeat-last-n", "repeat-penalty", "seed", "sinks", "stop", "summaries", "summary-max", "summary-rows", "system", "temp", "think-budget", "thinking", "thought-min", "top-k", "top-p",
    "vote-layers", "vote-window", "votes-per-head", "wait-for-disk", "window", "zoomed-blocks",
})  # fmt: skip
"""What a project's file may say: how a model is run. Not which model, as naming one fetches it and a hostile one is parsed by C++; not
where anything is read or written; not how much of the machine is taken (tiers, threads, layers on the GPU); not what is said or asked."""

ONE_RUN = frozenset({
    "answer-column", "checkpoint", "continue", "csv", "dry-run", "encoding", "force", "help", "html", "id-column", "input-format", "json", "limit",
    "list", "open", "output", "output-format", "overwrite", "plot", "problem", "question-column", "retry-failed", "schema", "session", "template",
    "trace", "trace-problems", "version", "yes",
})  # fmt: skip
"""Flags that say what one run does, not how zoomr is set: nobody's file may overwrite a result or answer a question."""

NOT_CONFIGURED = frozenset({"config"})
_META = "zoomr.settings"
_HELP = frozenset({"-h", "--help"})


class ConfiguredGroup(TyperGroup):
    """The commands. Before one of them reads its flags, what is set elsewhere becomes their defaults."""

    def resolve_command(self, ctx: Any, args: list[str]) -> tuple[Any, Any, list[str]]:
        name, command, rest = super().resolve_command(ctx, args)
        if command is not None and name in registry(self) and not ctx.resilient_parsing:
            ctx.default_map = {name: self._defaults(ctx, name, command, rest)}
        return name, command, rest

    def _defaults(self, ctx: Any, name: str, command: Any, rest: list[str]) -> dict[str, Any]:
        from zoomr_local.config import load

        options = registry(self)[name]
        values: dict[str, tuple[Setting, Any]] = {}
        if _HELP & set(rest):
            with suppress(UsageError):  # help is for those whose files are broken, too
                values = Found(load(), self, os.environ).values(name)
        else:
            found = Found(load(), self, os.environ)
            with command.make_context(name, list(rest), resilient_parsing=True) as typed:
                values, passed_over = _used(found.values(name, typed), command, typed)
            _say_notes(found, name, typed, values, passed_over)
            ctx.meta[_META] = {
                name.removeprefix("--"): setting for key, (setting, _) in values.items() if not _was_typed(typed, options[key])
                for name in (*options[key].opts, *options[key].secondary_opts)
            }  # fmt: skip
        return {options[key].name: value for key, (_, value) in values.items()}

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except ZoomrError as error:
            error.args = (with_origins(str(error), ctx.meta.get(_META, {})),)
            raise


class Found:
    """What is in force for each command. Raises UsageError, at once, for keys that are none and values that are unfit."""

    def __init__(self, config: Config, root: Any, environment: Mapping[str, str]) -> None:
        self.config, self.environment = config, environment
        self.commands = registry(root)
        self.general = {name: _general(name, self.commands) for name in self.commands}
        why = "it is for one run, give it as a flag"
        config.check(self.commands, PROJECT_KEYS, dict.fromkeys(ONE_RUN, why))
        for setting in config.settings:
            for name in self.commands if setting.command is None else [setting.command]:
                if setting.command is not None or setting.key in self.general[name]:
                    converted(self.commands[name][setting.key], setting)

    def values(self, name: str, typed: Any = None, model: str | None = None) -> dict[str, tuple[Setting, Any]]:
        """Of the command ``name``: each setting that stands somewhere, and its value as its flag would give it to the command.
        ``typed`` is the context of its flags, ``model`` what -m says where there is none."""
        keys, general = self.commands[name], self.general[name]
        if "model" in keys:
            if typed is not None and _was_typed(typed, keys["model"]):
                model = str(typed.params["model"])
            elif model is None and any(setting.model is not None for setting in self.config.settings):  # else nobody asks for its name
                first = self.config.in_force(name, {"model"}, general, "", self.environment)
                model = str(first["model"].value) if first else _default_model()
        settings = self.config.in_force(name, keys, general, model or "", self.environment)
        return {key: (setting, prepared(keys[key], setting)) for key, setting in settings.items()}


def registry(root: Any) -> dict[str, dict[str, Any]]:
    """Every setting there is: of each command its options by the name of their flag."""
    found = {}
    for name, command in root.commands.items():
        if name not in NOT_CONFIGURED and getattr(command, "commands", None) is None:
            options = {key_of(param): param for param in command.params if param.param_type_name == "option"}
            found[name] = {key: param for key, param in options.items() if key not in ONE_RUN}
    return found


def key_of(option: Any) -> str:
    """``kv-budget`` of ``--kv-budget``, ``max-tokens`` of ``-n, --max-tokens``."""
    return next(name for name in option.opts if name.startswith("--")).removeprefix("--")


def prepared(option: Any, setting: Setting) -> Any:
    """The value as text, as if it had been typed; flags as truth, repeatable ones as a list. Raises UsageError.

    Checked by the option itself, so that the error names the place and not a flag that nobody typed."""
    value = _as_typed(option, setting)
    converted(option, setting)
    return value


def converted(option: Any, setting: Setting) -> Any:
    """The value that a command is given. Raises UsageError."""
    from zoomr_local.config import wrong

    import typer

    value = _as_typed(option, setting)
    try:
        found = option.process_value(_context(option), value)
    except typer.BadParameter as error:
        shown = value if isinstance(value, str) else setting.value
        raise wrong(setting.origin, f"{setting.key} {shown}: {error.message[:1].lower()}{error.message[1:]}") from None
    if isinstance(found, float) and not math.isfinite(found):
        raise wrong(setting.origin, f"{setting.key} {found}: must be a finite number")
    return found


def _as_typed(option: Any, setting: Setting) -> Any:
    from zoomr_local.config import ENVIRONMENT, wrong

    value, written = setting.value, setting.origin.kind != ENVIRONMENT
    if option.is_flag:
        if written and not isinstance(value, bool):
            raise wrong(setting.origin, f"{setting.key} is true or false, not {value!r}")
        return value
    parts = value if isinstance(value, list) else [value]
    if any(isinstance(part, bool) or not isinstance(part, (str, int, float)) for part in parts):
        shown = str(value).lower() if isinstance(value, bool) else "a table or date" if not isinstance(value, list) else "such a list"
        raise wrong(setting.origin, f"{setting.key} takes {option.metavar}, not {shown}")
    if option.multiple:
        return [str(part) for part in parts]
    if isinstance(value, list) and option.metavar != "LIST":
        raise wrong(setting.origin, f"{setting.key} takes one value, not a list")
    return ",".join(map(str, parts))


def _context(option: Any) -> Any:
    """A context of no command, as an option's own check asks for one."""
    import typer

    return typer.Context(typer.core.TyperCommand(name="zoomr", params=[option]))


def _general(name: str, commands: Mapping[str, Mapping[str, Any]]) -> set[str]:
    """The keys of a command that follow what is set for all. Where one command takes several values of a setting, to compare them
    (`eval --policy full,zoomr`), and others take one, that is another question, and only its own table answers it."""

    def width(option: Any) -> int:
        return 2 if option.multiple else 1 if option.metavar == "LIST" else 0

    return {
        key for key, option in commands[name].items()
        if width(option) == min(width(keys[key]) for keys in commands.values() if key in keys)
    }  # fmt: skip


def _was_typed(context: Any, option: Any) -> bool:
    source = context.get_parameter_source(option.name)
    return source is not None and source.name == "COMMANDLINE"


def _default_model() -> str:
    from . import options

    return next(iter(options.bundled_models()))


def _used(values: dict[str, tuple[Setting, Any]], command: Any, typed: Any) -> tuple[dict[str, tuple[Setting, Any]], list[str]]:
    """``values`` without those that the command has no use for beside the flags that are typed, and what is to be said of that."""
    from .setting_use import unused

    params = {key_of(param): param for param in command.params if param.param_type_name == "option"}

    def get(key: str) -> Any:
        if key not in params:
            return None
        if _was_typed(typed, params[key]):
            return typed.params.get(params[key].name)
        return values[key][1] if key in values else params[key].default

    without = unused([key for key in values if not _was_typed(typed, params[key])], get)
    notes = [f"{key} is not used here: {why} ({values[key][0].origin} sets it)" for key, why in without.items() if why]
    return {key: value for key, value in values.items() if key not in without}, notes


def _say_notes(found: Found, name: str, typed: Any, values: Mapping[str, tuple[Setting, Any]], passed_over: list[str]) -> None:
    """On stderr: what a project's file sets, as it came with somebody's checkout; files and settings passed over; variables nearly right."""
    from zoomr_local.config import PROJECT, mistaken_variables

    quiet = typed.params.get("quiet") or ("quiet" in values and values["quiet"][1] in (True, "1", "true", "yes", "on"))
    if quiet or sys.stderr is None:
        return
    keys = {key for commands in found.commands.values() for key in commands}
    lines = [f"{source.path} is not read: {source.refused}" for source in found.config.sources if source.refused]
    set_there = [key for key, (setting, _) in values.items() if setting.origin.kind == PROJECT and not _was_typed(typed, found.commands[name][key])]
    if set_there:
        path = next(source.path for source in found.config.sources if source.kind == PROJECT)
        lines.append(f"{path} sets {', '.join(sorted(set_there))}")
    lines += [f"{there} is no setting; did you mean {near}?" for there, near in mistaken_variables(found.environment, keys)]
    for line in lines + passed_over:
        print(f"note: {line}", file=sys.stderr)


def with_origins(message: str, settings: Mapping[str, Setting]) -> str:
    """``message`` of an error, and of each flag in it that nobody typed where it was set."""
    flags = dict.fromkeys(re.findall(r"(?<![\w-])--([a-z][a-z-]*[a-z])", message))
    places = [f"--{flag} is set by {settings[flag].origin}" for flag in flags if flag in settings]
    return f"{message} ({'; '.join(places)})" if places else message
