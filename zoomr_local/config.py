"""Settings from files and variables: which files are read, what stands in them, and which value is in force.

Pure: reads, merges and remembers where each value stands. It knows no flags; which keys there are, and which of them a project
may set, is told by `cli/settings.py`, whose registry is the flags themselves. Docs: docs/config.md.

Strongest first: the environment (``ZOOMR_KV_BUDGET``), the project file (``zoomr.toml``), the user file, and in that the
tables of the model that is used. In one file the table of a command (``[chat]``) goes before what stands above all tables.
"""

from __future__ import annotations

import difflib
import os
import re
import stat
import sys
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from .config_lines import key_lines
from .errors import UsageError
from .folders import user_folder
from .gguf_file import printable

PROJECT, USER, ENVIRONMENT, FLAG, DEFAULT = "project", "user", "environment", "flag", "default"
PREFIX, VARIABLE = "ZOOMR_", "ZOOMR_CONFIG"
NOT_SETTINGS = frozenset({VARIABLE, "ZOOMR_DEBUG", "ZOOMR_LIB_DIR", "ZOOMR_STOCK_LIB"})
"""Variables of that prefix that are no flags."""
PROJECT_NAME, USER_NAME = "zoomr.toml", "config.toml"
MOST_BYTES = 1 << 16
_MODELS, _MARKERS = "models", "markers"
_MOST_NAMES = 16
_QUOTED = re.compile(r"""\"{3}(?:[^\\]|\\.)*?(?:\"{3}|\Z)|'{3}.*?(?:'{3}|\Z)|"(?:[^"\\\n]|\\[^\n])*"?|'[^'\n]*'?|\#[^\n]*""", re.DOTALL)
"""Strings and comments; one that is not closed goes on to where the parser gives up, so that no text is read twice."""
_DEEP_KEY = re.compile(rf"""(?:^|[\[{{,])[ \t]*(?:(?:[\w-]+|"")[ \t]*\.[ \t]*){{{_MOST_NAMES},}}""", re.MULTILINE)
"""A key of more names than any setting has, in a text without what its quotes hold: TOML's parser takes minutes and gigabytes for thousands of them."""


@dataclass(frozen=True)
class Origin:
    """Where a value stands: ``kind``, and the file with its line (None if it is not known) or the variable."""

    kind: str
    name: str = ""
    line: int | None = None

    def __str__(self) -> str:
        if not self.name:
            return self.kind
        return f"{self.name}, line {self.line}" if self.line else self.name

    def as_dict(self) -> dict[str, Any]:
        """For ``--json``: kind, and what of file, line and variable there is."""
        if self.kind == ENVIRONMENT:
            return {"kind": self.kind, "variable": self.name}
        if not self.name:
            return {"kind": self.kind}
        return {"kind": self.kind, "file": self.name, "line": self.line}


@dataclass(frozen=True)
class Setting:
    """One value as its file or variable has it; ``command`` and ``model`` (a name or glob) are whom it is for, None is all."""

    key: str
    value: Any
    origin: Origin
    command: str | None = None
    model: str | None = None


@dataclass(frozen=True)
class Source:
    """A file that is looked for: there or not. ``refused`` says why one that is there is not read."""

    kind: str
    path: Path
    exists: bool
    refused: str = ""


@dataclass(frozen=True)
class Config:
    """Everything that stands in the files. ``markers`` are the ``[[markers]]`` of the user file, unread, for `dialects.py`."""

    sources: tuple[Source, ...] = ()
    settings: tuple[Setting, ...] = ()
    markers: list[dict[str, Any]] = field(default_factory=list)

    def in_force(
        self, command: str, keys: Collection[str], general: Collection[str], model: str, environment: Mapping[str, str]
    ) -> dict[str, Setting]:
        """The strongest value of each of ``keys`` that has one. Those of ``general`` follow what is for all commands too,
        the others only the table of their ``command``. ``model`` is what -m says."""

        def layer(setting: Setting) -> tuple[int, bool]:
            return (0 if setting.model is not None else 1 if setting.origin.kind == USER else 2), setting.command is not None

        found: dict[str, Setting] = {}
        for setting in sorted(self.settings, key=layer):  # which keeps the files' order within a layer
            meant = setting.command == command or (setting.command is None and setting.key in general)
            if meant and setting.key in keys and (setting.model is None or matches(setting.model, model)):
                found[setting.key] = setting
        for key in keys:
            text = environment.get(variable(key), "")
            if text and key in general:
                found[key] = Setting(key, text, Origin(ENVIRONMENT, variable(key)))
        return found

    def check(self, registry: Mapping[str, Collection[str]], project_keys: Collection[str], refused: Mapping[str, str]) -> None:
        """Raises UsageError for a table of no command and for a key that is no setting, with the nearest one.

        ``registry``: the keys of each command. ``refused``: flags that are no settings, and why."""
        every = {key for keys in registry.values() for key in keys}
        for setting in self.settings:
            key, command = setting.key, setting.command
            if command is not None and command not in registry:
                what = f"{command} takes a value, not a table" if command in every else f"there is no command {command}{_near(command, registry)}"
                raise wrong(setting.origin, what)
            keys = every if command is None else registry[command]
            if key not in keys:
                where = "" if command is None else f" of {command}"
                raise wrong(setting.origin, f"{key} is no setting{where}" + (f": {refused[key]}" if key in refused else _near(key, keys)))
            if setting.origin.kind == PROJECT and key not in project_keys:
                raise wrong(setting.origin, f"a project file may not set {key}; set it in your own file (`zoomr config path`),"
                                            f" as {variable(key)} or as a flag")  # fmt: skip
            if setting.model is not None and key == "model":
                raise wrong(setting.origin, "the settings of a model cannot choose the model")


def wrong(origin: Origin, what: str) -> UsageError:
    """The error of one value. Names that a file made up cannot write to the terminal."""
    return UsageError(printable(f"{origin}: {what}", 600))


def variable(key: str) -> str:
    """The environment's name of a setting: ``kv-budget`` is ``ZOOMR_KV_BUDGET``."""
    return PREFIX + key.upper().replace("-", "_")


def mistaken_variables(environment: Iterable[str], keys: Collection[str]) -> list[tuple[str, str]]:
    """Variables that are no setting but nearly one, each with the one it is near."""
    known = {variable(key) for key in keys}
    found = []
    for name in sorted(environment):
        if name.startswith(PREFIX) and name not in known | NOT_SETTINGS:
            found += [(name, near) for near in difflib.get_close_matches(name, sorted(known), n=1, cutoff=0.85)]
    return found


def matches(pattern: str, model: str) -> bool:
    """Whether ``pattern``, a name or glob, is for what -m says: the whole of it, or its last part with or without the
    ending (``.gguf``, ``:quant``), in any case."""
    whole = model.lower()
    last = whole.rsplit("/", 1)[-1]
    names = {whole, last, last.removesuffix(".gguf"), last.split(":")[0]}
    return any(fnmatchcase(name, pattern.lower()) for name in names)


# ---------------------------------------------------------------- files


def load(environment: Mapping[str, str] | None = None) -> Config:
    """The project's file and the user's. Raises UsageError, with file and line, for what is not TOML of tables and values,
    and for a file named by ``ZOOMR_CONFIG`` that is not there."""
    environment = os.environ if environment is None else environment
    sources = [source for source in (_project_source(), _user_source(environment)) if source is not None]
    settings: list[Setting] = []
    markers: list[dict[str, Any]] = []
    for source in sources:
        if source.exists and not source.refused:
            of_file, marked = _read(source)
            settings += of_file
            markers += marked
    return Config(tuple(sources), tuple(settings), markers)


def paths(environment: Mapping[str, str] | None = None) -> list[Source]:
    """The files that `load` reads, strongest first; none is opened."""
    found = (_project_source(), _user_source(os.environ if environment is None else environment, must=False))
    return [source for source in found if source is not None]


def fault(source: Source) -> str:
    """Why a file that is there cannot be used, as every command would say it; empty if it can, and for one that is not looked into."""
    if not source.exists or source.refused:
        return ""
    try:
        _read(source)
    except UsageError as error:
        return str(error)
    return ""


def project_folders(start: Path, home: Path | None) -> list[Path]:
    """Where a project's file may stand, nearest first: ``start``, and its parents up to the root of the repository (``.git``)
    or to below the home folder. Outside of both ``start`` alone: in a folder that all may write to, anybody's file lies."""
    folders = []
    for folder in (start, *start.parents):
        if folder == home:
            return folders or [start]
        folders.append(folder)
        if os.path.exists(folder / ".git"):  # a parent that may not be entered has none for us
            return folders
    return [start]


def _project_source() -> Source | None:
    """The nearest ``zoomr.toml``, else where it would be looked for first; None in a folder that was removed."""
    try:
        here = Path(os.getcwd())
    except OSError:
        return None
    home = os.path.realpath(os.path.expanduser("~"))
    for folder in project_folders(here, Path(home) if os.path.isabs(home) else None):
        path = folder / PROJECT_NAME
        try:
            owner = path.stat().st_uid
        except OSError:
            continue
        refused = "" if owner in (os.getuid(), 0) else "it belongs to another user"
        return Source(PROJECT, path, True, refused)
    return Source(PROJECT, here / PROJECT_NAME, False)


def _user_source(environment: Mapping[str, str], must: bool = True) -> Source | None:
    given = environment.get(VARIABLE, "")
    if given:
        path = Path(os.path.expanduser(given)).absolute()
        if must and not os.path.exists(path):
            raise UsageError(f"{VARIABLE}: there is no file {given}")
        return Source(USER, path, os.path.exists(path))
    folder = user_folder("config")
    return None if folder is None else Source(USER, folder / USER_NAME, os.path.lexists(folder / USER_NAME))


def _deep_line(text: str) -> int | None:
    """The line of the first key that is too deep. Dots in strings and comments make no key."""
    bare = _QUOTED.sub(lambda found: '""' + "\n" * found.group().count("\n"), text)
    deep = _DEEP_KEY.search(bare)
    return bare.count("\n", 0, deep.start()) + 1 if deep else None


def _read(source: Source) -> tuple[list[Setting], list[dict[str, Any]]]:
    """The settings and markers of one file. Raises UsageError."""
    text = _text(source.path)
    if line := _deep_line(text):
        origin = Origin(source.kind, str(source.path), line)
        raise wrong(origin, f"a key of more than {_MOST_NAMES} names; no settings are nested so deep")
    data = _toml(source.path, text)
    reader = _Reader(source, text)
    markers = data.pop(_MARKERS, None)
    models = data.pop(_MODELS, None)
    for name, value in ((_MARKERS, markers), (_MODELS, models)):
        if value is not None and source.kind == PROJECT:
            raise wrong(reader.origin(name), f"a project file may not have {name}; they are for your own file (`zoomr config path`)")
    settings = reader.table(data)
    if models is not None:
        if not isinstance(models, dict) or not all(isinstance(table, dict) for table in models.values()):
            raise wrong(reader.origin(_MODELS), 'models are tables, for example [models."qwen3*"]')
        for name, table in models.items():
            settings += reader.table(table, name)
    if markers is not None and (not isinstance(markers, list) or not all(isinstance(entry, dict) for entry in markers)):
        raise wrong(reader.origin(_MARKERS), "markers are tables, each under [[markers]]")
    return settings, markers or []


def _text(path: Path) -> str:
    if str(path) == os.devnull:
        return ""
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise UsageError(f"{path} is no file")
        with path.open("rb") as file:
            data = file.read(MOST_BYTES + 1)
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}") from None
    if len(data) > MOST_BYTES:
        raise UsageError(f"{path}: more than {MOST_BYTES >> 10} KiB are no settings")
    try:
        return data.decode("utf-8").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UsageError(f"{path}, line {line}: not UTF-8; save the file in that encoding") from None


def _toml(path: Path, text: str) -> dict[str, Any]:
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        what = re.sub(r"\s*\(at .*\)$", "", str(error))
        at = re.search(r"at line (\d+), column", str(error))
        line = int(at.group(1)) if at else text.count("\n") + 1
        raise wrong(Origin("", str(path), line), f"no TOML: {what[:1].lower()}{what[1:]}") from None
    except RecursionError:
        raise UsageError(f"{path}: no settings are nested so deep") from None
    except ValueError:  # Python's own limit
        raise UsageError(f"{path}: no setting is a number of thousands of digits") from None


class _Reader:
    """Turns the tables of one file into settings; the lines are looked up when the first one is asked for."""

    def __init__(self, source: Source, text: str) -> None:
        self.source = source
        self._lines = key_lines(text, lambda part: _toml(source.path, part))

    def origin(self, *path: str) -> Origin:
        return Origin(self.source.kind, str(self.source.path), self._lines.get(path))

    def table(self, data: dict[str, Any], model: str | None = None) -> list[Setting]:
        """Settings for all commands, and those of the commands' tables."""
        above = () if model is None else (_MODELS, model)
        found = self._settings({key: value for key, value in data.items() if not isinstance(value, dict)}, above, None, model)
        for name, inner in data.items():
            if isinstance(inner, dict):
                found += self._settings(inner, (*above, name), name, model)
        return found

    def _settings(self, data: dict[str, Any], above: tuple[str, ...], command: str | None, model: str | None) -> list[Setting]:
        found: dict[str, Setting] = {}
        for name, value in data.items():
            key, origin = name.replace("_", "-"), self.origin(*above, name)
            if key in found:
                raise wrong(origin, f"{key} is set twice, see line {found[key].origin.line}")
            if _has_huge_number(value):
                raise wrong(origin, f"{key}: no setting is a number of more than 64 bits")
            found[key] = Setting(key, value, origin, command, model)
        return list(found.values())


def _has_huge_number(value: Any) -> bool:
    """Whether a value, or one in a list, is an integer beyond those of TOML; Python cannot even write the largest of them."""
    left = [value]
    while left:
        one = left.pop()
        if isinstance(one, list):
            left += one
        elif isinstance(one, int) and one.bit_length() > 64:
            return True
    return False


def _near(name: str, names: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, sorted(names), n=1)
    return f"; did you mean {near[0]}?" if near else "; `zoomr config show` lists them"
