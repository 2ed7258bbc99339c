"""How well the agreement of the votes predicts that a lookup is right, and that a problem is right.

    python -m benchmarks.agreement -n 50 -j 2       # every family; goes on where it was stopped
    python -m benchmarks.agreement --dry-run        # how many tokens that is

Solves bundled problems with `zoomr` and hears every selection of its policy (`reader.py`). What a lookup is, and the
arithmetic, is `lookups.py`. Every problem's record, its lookups with it, is kept in a folder; families can also be run by
processes started by hand (`--families dag --result FILE`), and the same command for all families then only reports.
Writes benchmarks/results/agreement.json; `benchmarks.accuracy` puts it into docs/accuracy.md.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

from benchmarks import lookups, runs
from benchmarks.report import table

Record = dict[str, Any]

DISTANCES = (1, 5, 9, 17)
"""Where the groups of distances begin, in blocks back."""


# ---------------------------------------------------------------- what it comes to


def summary(found: dict[str, list[Record]]) -> dict[str, Any]:
    """Every family's counts, and the three AUCs by family and over all of them, ready for JSON."""
    whole = {family: [r for r in records if "error" not in r] for family, records in found.items()}
    every = [lookup for records in whole.values() for record in records for lookup in record["lookups"]]
    return {
        "families": {family: _family(records) for family, records in whole.items()},
        "failed": sum(len(found[family]) - len(whole[family]) for family in found),
        "distances": _distances(every),
        "predicts": {name: _predicts(whole, cases) for name, cases in CASES.items()},
    }


def _family(records: Sequence[Record]) -> dict[str, Any]:
    read = [lookup for record in records for lookup in record["lookups"]]
    return {
        "problems": len(records), "problems_right": sum(bool(r["correct"]) for r in records), "lookups": len(read),
        "right": sum(x["right"] for x in read),
        "where": {place: _count(x for x in read if x["where"] == place) for place in (lookups.ZOOMED, lookups.RESIDENT, lookups.OUT)},
    }  # fmt: skip


def _count(read: Any) -> dict[str, int]:
    read = list(read)
    return {"lookups": len(read), "right": sum(x["right"] for x in read)}


def _distances(read: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    groups = []
    for first, after in zip(DISTANCES, (*DISTANCES[1:], None), strict=True):
        inside = [x for x in read if first <= x["distance"] and (after is None or x["distance"] < after)]
        last = None if after is None else after - 1
        groups.append({"from": first, "to": last, **_count(inside), "in_cells": sum(x["where"] != lookups.OUT for x in inside)})
    return groups


def _of_lookups(record: Record, outcome: Callable[[dict[str, Any]], bool]) -> list[tuple[float, bool]]:
    return [(x["agreement"], outcome(x)) for x in record["lookups"] if x["agreement"] is not None]


CASES: dict[str, Callable[[Record], list[tuple[float, bool]]]] = {
    "a lookup is right": lambda record: _of_lookups(record, lambda x: x["right"]),
    "the needed thought is in cells": lambda record: _of_lookups(record, lambda x: x["where"] != lookups.OUT),
    "a problem is right": lambda record: [] if record["kv"]["agreement"] is None else [(record["kv"]["agreement"], bool(record["correct"]))],
}
"""What may be predicted, each by the agreement: scores and outcomes of one record."""


def _predicts(whole: dict[str, list[Record]], cases: Callable[[Record], list[tuple[float, bool]]]) -> dict[str, Any]:
    strata = {family: [cases(record) for record in records] for family, records in whole.items()}
    by_family = {family: lookups.auc([problems]) for family, problems in strata.items()}
    return {"all": lookups.auc(list(strata.values())), "families": by_family}


# ---------------------------------------------------------------- text


def text(result: dict[str, Any] | None) -> str:
    """The section of docs/accuracy.md, and what the command prints: verdicts, AUCs, where what was needed stood."""
    if result is None:
        return "Not measured."
    verdicts = "\n".join(f"- {verdict(name, predicted['all'])}" for name, predicted in result["predicts"].items())
    failed = f"\n\n{result['failed']} problems failed and are not counted." if result["failed"] else ""
    return (
        f"{verdicts}\n\n{_auc_table(result)}\n\n{_place_table(result)}\n\n{_distance_table(result)}{failed}\n\n{runs.conditions_text(result)}"
    )


def verdict(name: str, found: dict[str, Any]) -> str:
    """One sentence: what an AUC and its interval allow to say."""
    if found["auc"] is None:
        said = "not defined, as no family has both right and wrong cases"
    elif found["interval95"] is None:
        said = f"{found['auc']:.3f}, from too few problems for an interval"
    else:
        low, high = found["interval95"]
        known = "better than chance" if low > 0.5 else "worse than chance" if high < 0.5 else "not told from chance (0.5)"
        said = f"{found['auc']:.3f} ({low:.3f}, {high:.3f}): {known}"
    return f"That {name}: AUC {said}; n = {found['n']}, of them {found['n_wrong']} not, in {found['problems']} problems."


def _auc_table(result: dict[str, Any]) -> str:
    rows = []
    for name, predicted in result["predicts"].items():
        for family, found in {"all": predicted["all"], **predicted["families"]}.items():
            area = "-" if found["auc"] is None else f"{found['auc']:.3f}"
            interval = "" if found["interval95"] is None else " ({:.3f}, {:.3f})".format(*found["interval95"])
            rows.append([name, family, area + interval, str(found["n"]), str(found["n_wrong"]), str(found["problems"])])
    return table(["agreement predicts that", "family", "AUC (95 %)", "n", "of them not", "problems"], rows)


def _place_table(result: dict[str, Any]) -> str:
    head = ["family", "problems right", "lookups", "right %", "thought in cells %", "of them zoomed %", "right % in cells", "right % out"]
    rows = []
    for family, f in result["families"].items():
        where = f["where"]
        inside = {k: where[lookups.ZOOMED][k] + where[lookups.RESIDENT][k] for k in ("lookups", "right")}
        rows.append([
            family, f"{f['problems_right']} of {f['problems']}", str(f["lookups"]), percent(f["right"], f["lookups"]),
            percent(inside["lookups"], f["lookups"]), _percent(where[lookups.ZOOMED]["lookups"], inside["lookups"]),
            _percent(inside["right"], inside["lookups"]), _percent(where[lookups.OUT]["right"], where[lookups.OUT]["lookups"]),
        ])  # fmt: skip
    return table(head, rows)


def _distance_table(result: dict[str, Any]) -> str:
    rows = []
    for group in result["distances"]:
        if group["to"] is None:
            blocks = f"{group['from']} or more"
        else:
            blocks = f"{group['from']} to {group['to']}"
        rows.append([blocks, str(group["lookups"]), percent(group["right"], group["lookups"]), percent(group["in_cells"], group["lookups"])])
    return table(["blocks back", "lookups", "right %", "thought in cells %"], rows)


def percent(part: int, whole: int) -> str:
    """A share whose n stands beside it."""
    return f"{100 * part / whole:.1f}" if whole else "-"


def _percent(part: int, whole: int) -> str:
    return f"{percent(part, whole)} (n = {whole})"


# ---------------------------------------------------------------- the command


def main(argv: Sequence[str] | None = None) -> int:
    """Run, write the result file, print the tables; the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    args = runs.parser("agreement", __doc__.split("\n", 1)[0], "test", 50).parse_args(argv)
    return runs.ended(lambda: _main(args, argv))


def _main(args: Any, argv: Sequence[str]) -> int:
    plan = runs.Plan(args, "agreement", argv)
    if args.dry_run:
        tokens = plan.tokens()
        for family, cell in plan.cells.items():
            print(f"{cell.label}: about {tokens[family]:,} tokens")
        print(f"about {sum(tokens.values()):,} tokens to decode")
        return 0
    conditions, cells = plan.conditions(), list(plan.cells.values())  # before hours of solving: at which commit it began
    found = summary({cell.family: records for cell, records in plan.solve(cells, cells).items()})
    result = {**conditions, **found}
    runs.write_result(args.result, result)
    print(text(result))
    if result["failed"]:
        runs.tell(f"{result['failed']} problems failed and are not counted; add --fresh to solve everything again")
    return runs.SOME_FAILED if result["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
