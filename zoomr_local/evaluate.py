"""A grid of policies, budgets and families, every cell of it run over the same problems by the real engine.

Owns what the cells of a grid are, where their records stand, and the running; the command line calls it, and
Python programs may. A record is `solve.py`'s, its durability `journal.py`'s, what the records come to
`evaluate_report.py`'s. It opens no engine itself: it is handed a function that does, and knows no terminal.

What makes the cells comparable: the same problems in the same order, the same sampling and the same seed in all
of them, one limit on reply length per family, and a budget that is the hard peak of cells. `full` needs no budget,
so it runs once a family and is the other half of every pair.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import UsageError
from .gguf_file import printable
from .grading import Grader
from .journal import Journal, Manifest, record_key
from .policies import POLICIES
from .policies.heads import CLUSTER_CHOICES
from .problems import Columns
from .sampling import SamplingParams
from .sizes import counted
from .solve import Listener, Problem, Solver, Tally, read_problems, solve_all
from .tally import readable
from .workers import solve_side_by_side

if TYPE_CHECKING:
    from .dialects import MarkerSet
    from .engine import EngineConfig

REFERENCE = "full"
"""The policy that the others are paired with."""

_OF_BLOCKS = ("summaries", "thought_min", "summary_max")
_NAMED = ("summaries", "pin_prompt", *CLUSTER_CHOICES)
_TIERS = ("kv_ram", "kv_disk", "kv_page_type", "on_full", "wait_for_disk")
_NO_CHOICE = ("policy", "kv_budget", "kv_type", "seed", "threads", "kv_dir")  # said beside the settings, or without an effect on results

_FAMILY_CHARS = 60
_ROUND_TOKENS = 256  # reply limits are multiples of this, so that wording that shifts a trace by a word moves none


# ---------------------------------------------------------------- problems


@dataclass(frozen=True)
class Suite:
    """The problems of every family, in the order in which they are asked, and the reply limit of each in tokens."""

    problems: dict[str, list[Problem]]
    max_tokens: dict[str, int]

    @property
    def families(self) -> list[str]:
        """Their names, in order."""
        return list(self.problems)


def bundled_suite(
    families: Sequence[str] | None, n: int, seed: int, thoughts: int | None, split: str, max_tokens: int | None
) -> Suite:
    """``n`` problems of each family of the bundled tasks, ``thoughts`` thoughts each; None is every family, and as
    many thoughts as make traces of about 2,650 tokens.

    Equal arguments give equal problems, and a greater ``n`` begins with the problems of a smaller one. Without
    ``max_tokens`` a reply may be about half as long again as the reference trace of the family's first problem: enough
    for any sound reply, and a model that loops is cut off. Raises UsageError for a family, a number of thoughts
    or a split that the tasks do not have.
    """
    from zoomr_models.tasks import FAMILIES, LONG_THOUGHTS, generate

    chosen = list(families or FAMILIES)
    problems, limits = {}, {}
    for family in chosen:
        if family not in FAMILIES:
            raise UsageError(f"--family {family}: no such family; there are {', '.join(FAMILIES)}")
        try:
            drawn = generate(family, n, seed, thoughts or LONG_THOUGHTS[family], split)
        except ValueError as error:
            raise UsageError(str(error)) from error
        problems[family] = [
            Problem(p.id, ({"role": "user", "content": p.prompt},), p.answer, line) for line, p in enumerate(drawn, 1)
        ]
        # The tasks' text has about four characters a token, in this tokenizer and in those of stock models.
        limits[family] = max_tokens or -(-len(drawn[0].trace) * 3 // 8 // _ROUND_TOKENS) * _ROUND_TOKENS
    return Suite(problems, limits)


def file_suite(
    lines: Sequence[bytes], source: str, families: Sequence[str] | None, n: int | None, max_tokens: int, columns: Columns = Columns()
) -> Suite:
    """The first ``n`` problems (None: all) of each family in a JSONL input as `solve` reads it.

    A line's ``family`` groups it, by a name that can be printed; lines without one are of the family named after the file. ``columns``
    says where question, answer and id stand. Raises UsageError for what `read_problems` refuses, for problems without a reference
    answer and for a family the input lacks.
    """
    problems = read_problems(lines, source, columns)
    unanswered = [printable(str(p.id)) for p in problems if p.answer is None]
    if unanswered:
        raise UsageError(f'{source}: {counted(len(unanswered), "problem")} without an "answer" to compare with: '
                         f"{', '.join(unanswered[:5])}{', ...' if len(unanswered) > 5 else ''}")
    grouped: dict[str, list[Problem]] = {}
    for problem in problems:
        family = json.loads(lines[problem.line - 1].decode("utf-8-sig")).get("family")
        grouped.setdefault(_family_name(str(family) if family else Path(source).stem), []).append(problem)
    named = None if families is None else [_family_name(family) for family in families]
    for family in named or ():
        if family not in grouped:
            raise UsageError(f"--family {family}: {source} has none of it; it has {', '.join(grouped)}")
    chosen = {family: grouped[family][:n] for family in named or grouped}
    return Suite(chosen, dict.fromkeys(chosen, max_tokens))


def _family_name(text: str) -> str:
    """``text`` where it can be shown in a table as it is; else a short name that no other family has."""
    if printable(text, _FAMILY_CHARS) == text:
        return text
    digest = hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()[:8]
    return f"{printable(text, _FAMILY_CHARS - 9)}-{digest}"


# ---------------------------------------------------------------- the grid


@dataclass(frozen=True)
class Cell:
    """One family under one configuration. ``choices`` are the compared settings by which it differs from others."""

    family: str
    config: EngineConfig
    choices: tuple[tuple[str, Any], ...] = ()

    @property
    def policy(self) -> str:
        """The policy's name."""
        return self.config.policy

    @property
    def budget_tokens(self) -> int | None:
        """The hard peak of cells; None for ``full``, which has none."""
        return None if self.policy == REFERENCE else self.config.kv_budget

    @property
    def settings_text(self) -> str:
        """The compared settings, ``refresh=8 window=64``; empty where nothing is compared."""
        return " ".join(f"{name}={setting_text(value)}" for name, value in self.choices)

    @property
    def asked(self) -> dict[str, Any]:
        """Every setting of the cell that was chosen: the compared ones, and those with one value that is not the default."""
        defaults = type(self.config)()
        single = {
            name: value for name, value in asdict(self.config).items()
            if name not in _NO_CHOICE and value != getattr(defaults, name) and has_a_meaning(name, self.policy)
        }  # fmt: skip
        return {**dict(self.choices), **single}

    @property
    def label(self) -> str:
        """The cell in a few words for people."""
        budget = [] if self.budget_tokens is None else [str(self.budget_tokens)]
        return " ".join([self.family, self.policy, *budget, *self.settings_text.split()])

    @property
    def file_name(self) -> str:
        """Where its records stand in the output folder; different cells never share a file."""
        family = re.sub(r"[^\w-]", "_", self.family)
        if family != self.family:
            family += "-" + hashlib.sha256(self.family.encode()).hexdigest()[:8]
        budget = [] if self.budget_tokens is None else [str(self.budget_tokens)]
        return ".".join([family, self.policy, *budget, *self.settings_text.split(), "jsonl"])


def setting_text(value: Any) -> str:
    """A setting's value as the name of a cell has it: ``on``, ``8``, ``2+3``."""
    if value is None or isinstance(value, bool):
        return "default" if value is None else "on" if value else "off"
    return ("+".join(map(str, value)) or "all") if isinstance(value, tuple) else str(value)


def grid(
    families: Iterable[str], policies: Sequence[str], budgets: Sequence[int], base: EngineConfig,
    choices: Mapping[str, Sequence[Any]] | None = None,
) -> list[Cell]:  # fmt: skip
    """Every cell, family by family, ``full`` first so that the others can be compared as soon as they end.

    ``choices`` maps a field of EngineConfig to the values to try; a policy runs with every combination of those that mean
    something to it (``beacon_every`` where there are beacons, those about summaries where there are blocks, ``pin_prompt``
    under per-head policies, CLUSTER_CHOICES and ``refresh`` under `clusterkv`, the others where votes are taken). A field with one
    value is set but not compared, except for ``summaries``, ``pin_prompt`` and CLUSTER_CHOICES, which name a cell whenever they are given.
    Raises UsageError (BudgetError) for settings the engine refuses.
    """
    given = {name: list(dict.fromkeys(values)) for name, values in (choices or {}).items() if values}
    ordered = sorted(dict.fromkeys(policies), key=lambda name: name != REFERENCE)
    cells: dict[Cell, None] = {}
    for family, policy in itertools.product(families, ordered):
        own = {name: values for name, values in given.items() if _concerns(name, policy)}
        compared = {name: values for name, values in own.items() if len(values) > 1 or name in _NAMED}
        fixed = {name: values[0] for name, values in own.items() if name not in compared}
        for budget in [base.kv_budget] if policy == REFERENCE else budgets:
            config = replace(base, policy=policy, kv_budget=budget, **fixed)
            for values in itertools.product(*compared.values()):
                chosen = tuple(zip(compared, values, strict=True))
                cells[Cell(family, replace(config, **dict(chosen)), chosen)] = None
    return list(cells)


def has_a_meaning(setting: str, policy: str) -> bool:
    """Whether a field of EngineConfig can change what ``policy`` does."""
    kind = POLICIES[policy]
    if setting in ("flash_attn", "batch"):
        return True
    if setting in _TIERS:
        return kind.unit == "block" or setting == "kv_ram" and kind.unit == "head" and kind.recalls
    return not kind.pins_prompt if setting == "sinks" else _concerns(setting, policy)


def _concerns(setting: str, policy: str) -> bool:
    own = {"beacon_every": "beacon", "pin_prompt": "head"}
    if setting in own:
        return POLICIES[policy].unit == own[setting]
    recalls = POLICIES[policy].unit == "head" and POLICIES[policy].recalls
    if setting in CLUSTER_CHOICES or setting == "refresh" and recalls:
        return recalls
    return POLICIES[policy].unit == "block" if setting in _OF_BLOCKS else POLICIES[policy].uses_votes


# ---------------------------------------------------------------- running


@dataclass(frozen=True)
class Run:
    """What is wanted of `evaluate`: the cells, their problems, and where records go.

    ``model`` and ``versions`` are a manifest's; ``info`` is kept beside them for the reader. ``open_engine`` gives a
    model and an engine for a configuration, as a context manager. ``stopping`` is asked after every event.
    ``debug`` raises what would become a failed record. With ``jobs`` above 1 that many processes solve the problems
    of a cell side by side; ``open_engine`` must then be picklable. ``solver`` may be a subclass that adds to the records.
    ``markers`` are those that the user added for models that ``open_engine`` opens. ``open_grader`` gives who compares answers, as
    a context manager, picklable too; ``grader`` is its name with its version, empty for the built-in one.
    """

    cells: list[Cell]
    suite: Suite
    folder: Path
    open_engine: Callable[[EngineConfig], AbstractContextManager[tuple[Any, Any]]]
    model: dict[str, Any]
    versions: dict[str, Any]
    sampling: SamplingParams = SamplingParams()
    n_gpu_layers: int = 0
    info: dict[str, Any] = field(default_factory=dict)
    stopping: Callable[[], bool] = lambda: False
    debug: bool = False
    jobs: int = 1
    solver: Callable[..., Solver] = Solver
    markers: tuple[MarkerSet, ...] = ()
    open_grader: Callable[[], AbstractContextManager[Any]] = partial(nullcontext, Grader())
    grader: str = ""

    def manifest(self, cell: Cell) -> Manifest:
        """What a cell's records have in common; a second start with anything else is refused by name."""
        asked = cell.config.asked()
        asked["kv_budget"] = cell.budget_tokens
        settings = {
            **asked, "sampling": self.sampling.asked(), "max_tokens": self.suite.max_tokens[cell.family],
            "n_gpu_layers": self.n_gpu_layers,
        }  # fmt: skip
        if self.markers:
            settings["markers"] = [asdict(row) for row in self.markers]
        if self.grader:
            settings["grader"] = self.grader
        return Manifest(settings, self.model, self.versions, {**self.info, "threads": cell.config.threads})


Watch = Callable[[int, Cell, Tally], AbstractContextManager[Listener]]
"""Makes the listener of one cell from its number (0 first), the cell and the tally of what is done already."""


def evaluate(
    run: Run, watch: Watch, overwrite: bool = False, retry_failed: bool = False
) -> dict[Cell, list[dict[str, Any]]] | None:
    """Run what is not on the disk yet; the records of every cell, in the problems' order. None if told to stop.

    Each record is on the disk before the next problem begins, and a second call goes on where the first ended,
    however it ended, also one with ``overwrite``, which empties every cell's file before the first problem. Every cell's file is
    checked before anything runs: raises UsageError if one was made with other settings, another model or other problems, or is
    held by another process.
    """
    try:
        run.folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"cannot make the folder {run.folder}: {error.strerror}; choose another with -o") from error
    for cell in run.cells:
        with _open(run, cell, overwrite) as journal:
            if not overwrite:
                with readable(journal.path):
                    for record in _sort_out(run, cell, journal)[0]:
                        Tally().add(record)
    for cell in run.cells if overwrite else ():  # now: whoever stops on the way and goes on without it must not meet old records
        with _open(run, cell, overwrite) as journal:
            journal.begin(run.manifest(cell), overwrite)
    found = {}
    for number, cell in enumerate(run.cells):
        with _open(run, cell) as journal:
            if not _run_cell(run, number, cell, journal, watch, retry_failed):
                return None
            done = {str(record["id"]): record for record in journal.records}
        found[cell] = [done[str(problem.id)] for problem in run.suite.problems[cell.family]]
    return found


def _open(run: Run, cell: Cell, overwrite: bool = False) -> Journal:
    return Journal.open(run.folder / cell.file_name, overwrite=overwrite)


def _run_cell(run: Run, number: int, cell: Cell, journal: Journal, watch: Watch, retry_failed: bool) -> bool:
    """Run what one cell lacks; False if told to stop on the way."""
    manifest, tally = run.manifest(cell), Tally()
    done, left = _sort_out(run, cell, journal, retry_failed)
    with readable(journal.path):
        for record in done:
            tally.add(record)
    if not left:
        return True
    opened = partial(
        _open_solver, run.solver, run.open_engine, run.open_grader, cell.config, run.sampling, run.suite.max_tokens[cell.family], manifest, run.debug
    )
    keep = (lambda record: "error" not in record) if retry_failed else None
    with opened() as solver:
        manifest.info["resolved"] = solver.engine.resolved()
        journal.begin(manifest, keep=keep)
        if run.jobs == 1:
            with watch(number, cell, tally) as listener:
                return solve_all(left, replace(solver, stopping=run.stopping), journal.append, listener)
    with watch(number, cell, tally) as listener:
        return solve_side_by_side(left, opened, min(run.jobs, len(left)), journal.append, listener, run.stopping)


@contextmanager
def _open_solver(
    kind: Callable[..., Solver], open_engine: Callable[[EngineConfig], AbstractContextManager[tuple[Any, Any]]],
    open_grader: Callable[[], AbstractContextManager[Any]], config: EngineConfig, sampling: SamplingParams, max_tokens: int,
    manifest: Manifest, debug: bool,
) -> Iterator[Solver]:  # fmt: skip
    with open_engine(config) as (model, engine), open_grader() as grader:
        yield kind(model, engine, sampling, max_tokens, partial(_key, manifest), debug=debug, grader=grader)


def _key(manifest: Manifest, problem: Problem) -> str:
    return record_key(problem.asked(), manifest)


def _sort_out(
    run: Run, cell: Cell, journal: Journal, retry_failed: bool = False
) -> tuple[list[dict[str, Any]], list[Problem]]:
    """The records that one cell has, and the problems that it lacks. Raises UsageError as `evaluate` does."""
    manifest = run.manifest(cell)
    journal.check(manifest)
    held = {str(r["id"]): r for r in journal.records if not (retry_failed and "error" in r)}
    done, left, changed = [], [], []
    for problem in run.suite.problems[cell.family]:
        record = held.get(str(problem.id))
        if record is None:
            left.append(problem)
        elif record.get("key") != record_key(problem.asked(), manifest):
            changed.append(printable(str(problem.id)))
        else:
            done.append(record)
    if changed:
        raise UsageError(
            f"{journal.path} has records of {counted(len(changed), 'problem')} whose prompt or answer has changed since:"
            f" {', '.join(changed[:5])}{', ...' if len(changed) > 5 else ''};"
            " choose another output folder with -o, or start again with --overwrite"
        )
    return done, left
