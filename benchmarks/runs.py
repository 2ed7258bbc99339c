"""What `benchmarks.settings` and `benchmarks.agreement` share: flags, problems and budgets, and the conditions they state.

Both solve bundled problems with the policy `zoomr` through `zoomr_local.evaluate`'s grid, keep every record in a
folder so that the same command goes on where it was, and write one result file. Nothing else imports this.
"""

from __future__ import annotations

import argparse
import datetime
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.reader import Reader
from benchmarks.speed import commit, machine, tell
from benchmarks.turns import ROOT
from zoomr_cli import INTERRUPTED, SOME_FAILED, options, render, versions
from zoomr_cli import solve as solving
from zoomr_local.engine import EngineConfig
from zoomr_local.errors import ModelError, UsageError, ZoomrError
from zoomr_local.evaluate import Cell, Run, Suite, bundled_suite, evaluate
from zoomr_local.journal import code_of, model_fingerprint
from zoomr_local.sampling import SamplingParams
from zoomr_local.solve import Tally

RESULTS = ROOT / "benchmarks" / "results"
BUDGETS = "652"
"""The budget of docs/accuracy.md: a quarter of the full trace."""


def parser(module: str, purpose: str, split: str, n: int) -> argparse.ArgumentParser:
    """The flags that both commands take."""
    p = argparse.ArgumentParser(prog=f"python -m benchmarks.{module}", description=purpose)
    p.add_argument("-m", "--model", type=Path, metavar="GGUF", help="default: the bundled model")
    p.add_argument("-n", type=int, default=n, help=f"problems a family (default: {n})")
    p.add_argument("--families", metavar="LIST", help="for example dag,series (default: all)")
    p.add_argument("--kv-budget", default=BUDGETS, metavar="LIST", help=f"cells, one number for all and perhaps FAMILY=N (default: {BUDGETS})")
    p.add_argument("--split", choices=("dev", "test"), default=split, help=f"default: {split}")
    p.add_argument("--seed", type=int, default=0, help="of the problems (default: 0)")
    p.add_argument("--thoughts", type=int, help="steps a problem takes (default: traces of about 2,650 tokens)")
    p.add_argument("-j", "--jobs", type=int, default=1, metavar="N", help="processes side by side (default: 1)")
    p.add_argument("--work", type=Path, default=ROOT / "build" / "bench" / module, metavar="DIR", help="records of finished problems")
    p.add_argument("--fresh", action="store_true", help="throw away the records of an earlier run and begin again")
    p.add_argument("--result", type=Path, default=RESULTS / f"{module}.json", metavar="JSON", help=f"default: benchmarks/results/{module}.json")
    p.add_argument("--dry-run", action="store_true", help="print what would be run and how many tokens it takes; run nothing")
    p.add_argument("-q", "--quiet", action="store_true", help="no progress")
    p.set_defaults(published=RESULTS / f"{module}.json", published_split=split)
    return p


def budgets(text: str, families: Sequence[str]) -> dict[str, int]:
    """Cells of every family, from ``704,linsys=848``: a number for all, and numbers by name that come before it.

    Raises UsageError for what is no number, an unknown family, or a family that is left without a number.
    """
    common: int | None = None
    named: dict[str, int] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        name, _, number = part.rpartition("=")
        if not number.isdigit():
            raise UsageError(f"--kv-budget {part}: give a number of cells, or FAMILY=N")
        if name:
            named[name] = int(number)
        else:
            common = int(number)
    without = [family for family in families if family not in named and common is None]
    if without:
        raise UsageError(f"--kv-budget {text}: no number for {', '.join(without)}; add one for all, for example 704")
    return {family: named.get(family, common) for family in families}


class Plan:
    """What a command line asks for: the problems, the model, and the cell of every family with no setting changed."""

    def __init__(self, args: argparse.Namespace, module: str, argv: Sequence[str]) -> None:
        """Raises UsageError for families, budgets or numbers that do not exist, and where the result of another split would take
        the place of the published one; ModelError without a model file."""
        if min(args.n, args.jobs) < 1:
            raise UsageError(f"-n {args.n} -j {args.jobs}: both must be at least 1")
        if args.split != args.published_split and not args.dry_run and args.result.resolve() == args.published.resolve():
            raise UsageError(
                f"--split {args.split}: {args.published.name} is put into the docs and is of the {args.published_split} problems;"
                f" name another file, for example --result build/bench/{module}-{args.split}.json"
            )
        self.args = args
        chosen = None if args.families is None else [part.strip() for part in args.families.split(",") if part.strip()]
        self.suite: Suite = bundled_suite(chosen, args.n, args.seed, args.thoughts, args.split, None)
        self.budgets = budgets(args.kv_budget, self.suite.families)
        self.model_file: Path = options.model_path(args.model)
        self.command = command_line(module, argv)
        try:
            self.model = model_fingerprint(self.model_file)
        except OSError as error:
            raise ModelError(f"cannot read the model {self.model_file}: {error.strerror}; give a .gguf file with -m") from error
        threads = 1 if args.jobs > 1 else options.thread_count(None, self.model_file)
        self._conditions: dict[str, Any] = {}
        self.cells = {
            family: Cell(family, EngineConfig(policy="zoomr", kv_budget=budget, threads=threads, seed=args.seed))
            for family, budget in self.budgets.items()
        }

    def solve(self, cells: list[Cell], every: Sequence[Cell]) -> dict[Cell, list[dict[str, Any]]]:
        """The records of ``cells``, with their lookups, in the problems' order; only what is not on the disk yet is solved.

        ``every`` is what is to be solved in all, for the progress. Raises UsageError if the folder's records were made
        with other settings, another model or other problems.
        """
        number = {cell: i for i, cell in enumerate(every, 1)}
        opened = partial(solving.open_engine, self.model_file, n_gpu_layers=0)
        run = Run(
            cells, self.suite, self.args.work, opened, self.model, versions.versions(), SamplingParams(seed=self.args.seed),
            info={"command": self.command}, jobs=self.args.jobs, solver=Reader,
        )  # fmt: skip

        @contextmanager
        def watch(_: int, cell: Cell, tally: Tally) -> Iterator[Any]:
            total, quiet = len(self.suite.problems[cell.family]), self.args.quiet
            if not quiet:
                begun = f", {tally.done} done already" if tally.done else ""
                tell(f"[{number[cell]} of {len(every)}] {cell.label}: {total} problems{begun}")
            with render.make_progress(total, tally, cell.budget_tokens, quiet) as progress:
                yield progress

        found = evaluate(run, watch, overwrite=self.args.fresh)
        assert found is not None  # nobody asks it to stop: Ctrl-C raises
        code = [*self._conditions.get("code", []), *(name for cell in cells for name in code_of(self.args.work / cell.file_name))]
        if set(code) - {run.versions.get("zoomr")}:
            self._conditions["code"] = list(dict.fromkeys(code))
        return found

    def conditions(self) -> dict[str, Any]:
        """What the figures depend on, for the result file: the same object at every call. If records turn out to be of other
        commits too, as a run went on or is only reported at this one, `solve` puts all of them there as ``code``."""
        a = self.args
        self._conditions |= {
            "date": datetime.date.today().isoformat(), "commit": commit(), "command": self.command, "machine": machine(),
            "model": self.model, "versions": versions.versions(), "temperature": 0.0,
            "asked": {"n": a.n, "split": a.split, "seed": a.seed, "thoughts": a.thoughts, "families": self.suite.families},
            "kv_budget": self.budgets, "max_tokens": self.suite.max_tokens, "jobs": a.jobs,
        }  # fmt: skip
        return self._conditions

    def tokens(self) -> dict[str, int]:
        """About how many tokens one cell of each family decodes, by the tasks' reference traces."""
        from zoomr_models.tasks import LONG_THOUGHTS, generate

        a = self.args
        found = {}
        for family in self.suite.families:
            drawn = generate(family, min(a.n, 8), a.seed, a.thoughts or LONG_THOUGHTS[family], a.split)
            found[family] = a.n * sum(len(p.trace) for p in drawn) // len(drawn) // 4  # about four characters a token
        return found


def conditions_text(result: dict[str, Any]) -> str:
    """The same for people, one paragraph."""
    asked, model, host = result["asked"], result["model"], result["machine"]
    of = f"{asked['thoughts']} thoughts" if asked["thoughts"] else "about 2,650 tokens"
    cells = ", ".join(f"{budget} ({family})" for family, budget in result["kv_budget"].items())
    busy = f" The machine was busy ({host['busy']}): the seconds are not to be trusted." if host["busy"] else ""
    return (
        f"{result['date']}, commit {result['commit']}, `{result['command']}`. {asked['n']} problems a family of {of}, split {asked['split']}, "
        f"seed {asked['seed']}, greedy; policy zoomr, budget in cells: {cells}. Model {model['file']}, {model['bytes']:,} bytes, SHA-256 of "
        f"{model['hashed']} {model['sha256'][:16]}. Machine: {host['cpu']}, {host['cores']} cores, {host['system']}.{busy}{several_text(result)}"
    )


def several_text(result: dict[str, Any]) -> str:
    """Whether there are records of other commits than the one that is named, a sentence with a space before it, or nothing."""
    return f" **Not all records are of that commit**: they were made with zoomr {', '.join(result['code'])}." if "code" in result else ""


def command_line(module: str, argv: Sequence[str]) -> str:
    """The command with every path cut to its last part, so that a result file names no folder of a machine."""
    return " ".join([f"python -m benchmarks.{module}", *(a.rstrip("/").rsplit("/", 1)[-1] for a in argv)])


def write_result(path: Path, result: dict[str, Any]) -> None:
    """One JSON object a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def ended(body: Callable[[], int]) -> int:
    """The exit code of a command: the body's, or 1, 2 or 130 with one clear line on stderr."""
    try:
        return body()
    except ZoomrError as error:
        tell(f"error: {error}")
        return error.exit_code
    except KeyboardInterrupt:
        tell("interrupted: every finished problem is kept; the same command goes on")
        return INTERRUPTED
