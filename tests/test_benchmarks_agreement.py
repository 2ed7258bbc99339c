"""The benchmark of agreement: which sentences are lookups, where their thoughts stood, areas under curves, and its files."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from fake_engine import FakeEngine, opener
from hypothesis import given, settings
from hypothesis import strategies as st
from scripted import SPECIAL, BookContext, ScriptedModel, ScriptedSampler

from zoomr_local import generation
from zoomr_local.block_generation import BlockGeneration
from zoomr_local.events import BlockClosed, PagedIn, PagedOut, Refreshed, TokenDecoded
from zoomr_local.policies import POLICIES, Settings
from zoomr_local.sampling import SamplingParams
from zoomr_local.solve import Problem
from zoomr_local.tiers import PageStore, RawPages, TierLimits

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT))  # benchmarks are not installed

from benchmarks import agreement, lookups  # noqa: E402
from benchmarks.lookups import OUT, RESIDENT, ZOOMED, Lookup  # noqa: E402
from benchmarks.reader import Ear, Reader  # noqa: E402

# ---------------------------------------------------------------- lookups


def said(text, start=0, role="thought"):
    """Events of a text, a token a word with the space before it."""
    words = text.replace(" ", "\0 ").strip("\0").split("\0")
    return [TokenDecoded(start + i, 0, word, role, 0) for i, word in enumerate(words)]


def test_a_lookup_reads_a_value_of_an_earlier_thought():
    first = said("Next oak. elm is 3. so oak is 12.")  # ten tokens; elm was worked out nowhere
    second = said(" Need oak. oak is 12. so fir is 4. oak is 7. fir is 4.", 10)
    closed = [BlockClosed(0, "thought", (0, 10), None, ""), BlockClosed(1, "thought", (10, 25), None, "")]
    assert lookups.lookups([*first, closed[0], *second, closed[1]]) == [
        Lookup("oak", 14, True, 1, RESIDENT, None),  # fir is of this very thought, so it is read from no earlier one
        Lookup("oak", 21, False, 1, RESIDENT, None),
    ]


def test_what_counts_is_the_value_the_model_wrote_last():
    blocks = [BlockClosed(0, "thought", (0, 4), None, ""), BlockClosed(1, "thought", (4, 8), None, "")]
    events = [*said("so oak is 1."), blocks[0], *said(" so oak is 2.", 4), blocks[1], *said(" Now. oak is 1. oak is 2.", 8)]
    assert [(x.right, x.distance) for x in lookups.lookups(events)] == [(False, 1), (True, 1)]


def test_summaries_and_answers_hold_no_lookups():
    thought = [*said("so oak is 1."), BlockClosed(0, "thought", (0, 4), (4, 8), "")]
    assert lookups.lookups([*thought, *said(" . oak is 1.", 4, "summary"), *said(" . oak is 1.", 8, "answer")]) == []


def test_what_happens_when_the_value_is_sampled_comes_too_late_for_it():
    begun = [*said("so oak is 1."), BlockClosed(0, "thought", (0, 4), None, "")]
    def read(*moves):
        return lookups.lookups([*begun, *said(" Now. oak is 1.", 4), *moves])[0]  # the value has position 7
    out, back = PagedOut(5, (0,), "detail", 4, 0), PagedIn(6, (0,), "detail", 4, 0)
    chosen = Refreshed(6, (0,), 0.5, "selected")
    assert (read(out).where, read(out, back).where, read(out, back, chosen).where) == (OUT, RESIDENT, ZOOMED)
    assert read(out, PagedIn(7, (0,), "detail", 4, 0)).where == OUT
    assert read(chosen).agreement == 0.5 and read(Refreshed(7, (0,), 0.5, "selected")).agreement is None
    assert read(out, chosen).where == OUT, "chosen, but still on its way from the disk"
    assert read(PagedOut(6, (0,), "summary", 4, 0)).where == RESIDENT


class Recorder:
    def __init__(self):
        self.events = []

    def event(self, event):
        self.events.append(event)


class Spoken(ScriptedModel):
    """A scripted model that can say the given words."""

    n_vocab = 1000

    def __init__(self, words):
        super().__init__()
        self.words = list(dict.fromkeys(words))

    def piece(self, token, special=False):
        return b"" if token < 10 else self.words[token - 10].encode()

    def tokens(self, text):
        return [10 + self.words.index(word) for word in split(text)]


class Watching(BookContext):
    """Remembers which positions were in cells while each token was decoded."""

    def __init__(self, n_cells):
        super().__init__(n_cells)
        self.seen = {}

    def decode(self, tokens, positions, **more):
        super().decode(tokens, positions, **more)
        self.seen[max(positions)] = set(self.cells)


def split(text):
    return text.replace(" ", "\0 ").strip("\0").split("\0")


NAMES = "oak elm ash fig ivy yew fir hop pea nut rye oat".split()


def spoken_thoughts(rng):
    """Thoughts that look back at two earlier names each, and their summaries."""
    yield f" Next {NAMES[0]}. Keep it so {NAMES[0]} is 1.", f" Worked out {NAMES[0]}."
    for i in range(1, len(NAMES)):
        a, b = (NAMES[j] for j in rng.integers(0, i, 2))
        read = f" {a} is {NAMES.index(a) + 1}. {b} is 99."  # the first right, the second wrong
        yield f" Next {NAMES[i]}. Need {a} and {b}. Look back at the notes now.{read} Keep it so {NAMES[i]} is {i + 1}.", f" Worked out {NAMES[i]}."


@pytest.mark.parametrize("refresh", [1, 3, 8])
def test_where_a_thought_stood_is_what_the_engine_had_in_cells_when_it_read(refresh):
    parts = list(spoken_thoughts(np.random.default_rng(refresh)))
    model = Spoken([word for thought, summary in parts for word in split(thought) + split(summary)])
    _, unthink, begin, end = SPECIAL.values()
    script = [t for thought, summary in parts for t in (*model.tokens(thought), begin, *model.tokens(summary), end)]
    context, policy = Watching(128), POLICIES["zoomr"](Settings(summary_tokens=40, window_tokens=0, refresh_tokens=refresh))
    store = PageStore(TierLimits(1 << 24, 0))
    store.begin(RawPages(), bytes(16), 1 << 20)
    ear = Ear(Recorder())
    g = BlockGeneration(model, context, store, policy, 128)
    ScriptedSampler.script = [*script, unthink]
    original, generation.LlamaSampler = generation.LlamaSampler, ScriptedSampler
    try:
        with ear.on(SimpleNamespace(policy=policy, context=context)):
            for event in g.run([11, 12, SPECIAL["<think>"]], SamplingParams(), len(script) + 2):
                ear.event(event)
    finally:
        generation.LlamaSampler = original
    events, found = ear.events, lookups.lookups(ear.events)
    assert len(found) == 2 * (len(NAMES) - 1) and [x.right for x in found[::2]] == [True] * (len(NAMES) - 1)
    assert not any(x.right for x in found[1::2])
    thought_of = {name: g.timeline.blocks[i].detail for i, name in enumerate(NAMES)}
    for x in found:
        inside = set(range(*thought_of[x.name])) <= context.seen[x.position - 1]
        assert inside == (x.where != OUT), x
    assert {x.where for x in found} == {ZOOMED, RESIDENT, OUT}
    heard = [e for e in events if isinstance(e, Refreshed)]
    assert len(heard) == g.refreshes and [e.agreement for e in heard if e.agreement is not None] == g.agreements


# ---------------------------------------------------------------- areas under curves


def obvious_auc(scores, right, weights):
    won = pairs = 0
    for score, is_right, weight in zip(scores, right, weights, strict=True):
        for other, other_right, times in zip(scores, right, weights, strict=True):
            if is_right and not other_right:
                pairs += weight * times
                won += weight * times * (1 if score > other else 0.5 if score == other else 0)
    return won, pairs


cases = st.lists(st.tuples(st.integers(0, 5), st.booleans(), st.integers(0, 3)), max_size=25)


@settings(max_examples=200, deadline=None)
@given(cases)
def test_the_auc_is_that_of_all_pairs(drawn):
    scores, right, weights = (np.array([case[i] for case in drawn], kind) for i, kind in enumerate((float, bool, float)))
    assert lookups.weighted_auc(scores, right, weights) == pytest.approx(obvious_auc(scores, right, weights))


def test_pairs_are_made_within_a_family_only():
    easy = [[(0.9, True), (0.8, True)]]
    hard = [[(0.2, True), (0.3, False)]]
    assert lookups.auc([easy, hard])["auc"] == 0 and lookups.auc([easy, hard])["pairs"] == 1
    assert lookups.auc([[*easy, *hard]])["pairs"] == 3


def test_no_pairs_no_area_and_few_problems_no_interval():
    assert lookups.auc([[[(0.5, True)]]]) == {"auc": None, "interval95": None, "n": 1, "n_wrong": 0, "problems": 1, "pairs": 0}
    assert lookups.auc([])["n"] == 0 and lookups.auc([[[]]])["auc"] is None
    mixed = [(0.9, True), (0.1, False)]
    assert lookups.auc([[mixed] * 4])["interval95"] is None
    assert lookups.auc([[mixed] * 5])["interval95"] == [1, 1]


def test_the_interval_draws_whole_problems():
    rng = np.random.default_rng(1)
    alone = [[(float(rng.normal(right, 2)), bool(right))] for right in (0, 1) * 60]
    copied = [problem * 20 for problem in alone]  # twenty times the cases, no more problems: nothing more is known
    one, many = (lookups.auc([problems]) for problems in (alone, copied))
    assert one["auc"] == many["auc"] and one["interval95"] == many["interval95"]
    low, high = one["interval95"]
    assert low < one["auc"] < high
    # Hanley and McNeil's error at this area, 60 against 60, is .05: the interval is about four of them wide
    assert 0.15 < high - low < 0.25


def test_the_difference_of_two_shares_is_over_the_same_problems():
    better, worse = [(4, 4), (3, 4)] * 10, [(3, 4), (3, 4)] * 10
    found = lookups.paired_share(better, worse)
    assert found["difference"] == 0.125 and 0 < found["interval95"][0] < 0.125 < found["interval95"][1] < 0.25
    assert lookups.paired_share(worse, better)["difference"] == -0.125
    assert lookups.paired_share([(4, 4)] * 4 + [(3, 4)] * 16, [(3, 4)] * 20) == {"difference": 0.05, "interval95": None}, "four differ"
    assert lookups.paired_share([], []) == lookups.paired_share([(0, 0)], [(1, 2)]) == {"difference": None, "interval95": None}


# ---------------------------------------------------------------- what it comes to


def read(right, where, score, distance=1):
    return {"right": right, "where": where, "agreement": score, "distance": distance}


def record(right, score, *found):
    return {"correct": right, "kv": {"agreement": score}, "lookups": list(found)}


FOUND = {
    "dag": [
        record(True, 0.8, read(True, ZOOMED, 0.9), read(True, RESIDENT, None, 4), read(True, OUT, 0.4, 5)),
        record(False, 0.3, read(False, OUT, 0.2, 17), read(False, ZOOMED, 0.6, 16)),
        {"error": {"type": "EngineError", "message": "x"}},
    ],
    "series": [record(True, None, read(True, RESIDENT, None))],
}


def test_a_summary_by_hand():
    found = agreement.summary(FOUND)
    assert found["failed"] == 1
    assert found["families"]["dag"] == {
        "problems": 2, "problems_right": 1, "lookups": 5, "right": 3,
        "where": {ZOOMED: {"lookups": 2, "right": 1}, RESIDENT: {"lookups": 1, "right": 1}, OUT: {"lookups": 2, "right": 1}},
    }  # fmt: skip
    assert [(g["from"], g["to"], g["lookups"], g["right"], g["in_cells"]) for g in found["distances"]] == [
        (1, 4, 3, 3, 3), (5, 8, 1, 1, 0), (9, 16, 1, 0, 1), (17, None, 1, 0, 0),
    ]  # fmt: skip
    read_right, in_cells, whole = (found["predicts"][name] for name in agreement.CASES)
    assert (read_right["all"]["auc"], read_right["all"]["pairs"], read_right["all"]["n"]) == (0.75, 4, 4)
    assert (in_cells["families"]["dag"]["auc"], in_cells["families"]["dag"]["n_wrong"]) == (1, 2)
    assert (whole["all"]["auc"], whole["all"]["n"], whole["families"]["series"]["auc"]) == (1, 2, None)


@pytest.mark.parametrize(("area", "interval", "said"), [
    (0.7, [0.6, 0.8], "better than chance"), (0.3, [0.2, 0.4], "worse than chance"), (0.6, [0.5, 0.7], "not told from chance"),
    (0.9, None, "too few problems"), (None, None, "not defined"),
])  # fmt: skip
def test_the_verdict_claims_no_more_than_the_interval(area, interval, said):
    assert said in agreement.verdict("x", {"auc": area, "interval95": interval, "n": 9, "n_wrong": 3, "problems": 2})


# ---------------------------------------------------------------- the command


@pytest.fixture
def engine(monkeypatch):
    engine = FakeEngine()
    engine.policy = SimpleNamespace(select=lambda view: view)
    monkeypatch.setattr("zoomr_cli.solve.open_engine", opener(engine))
    monkeypatch.setattr("zoomr_cli.versions.versions", lambda: {"zoomr": "test"})
    return engine


def test_a_run_goes_on_where_it_was_stopped_and_writes_one_file(tmp_path, engine, capsys):
    def interrupt():
        if len(engine.prompts) == 4:
            engine.on_token = lambda: None
            raise KeyboardInterrupt

    engine.on_token = interrupt
    command = ["-n", "2", "--families", "dag,series", "--thoughts", "3", "--work", str(tmp_path / "work"), "--result", str(tmp_path / "r.json"), "-q"]
    assert agreement.main(command) == 130
    assert "the same command goes on" in capsys.readouterr().err and not (tmp_path / "r.json").exists()
    assert agreement.main(command) == 0 and engine.prompts[3:] == [engine.prompts[3]] * 2, "only the problem in flight is solved again"
    result = json.loads((tmp_path / "r.json").read_text())
    assert {name: f["problems"] for name, f in result["families"].items()} == {"dag": 2, "series": 2}
    assert str(tmp_path) not in (tmp_path / "r.json").read_text()
    assert agreement.text(result) + "\n" == capsys.readouterr().out
    assert agreement.main([*command, "--kv-budget", "256"]) == 0, "another budget has files of its own"
    assert agreement.main([*command, "--seed", "1"]) == 2
    assert "made with other settings" in capsys.readouterr().err
    assert agreement.main([*command, "--seed", "1", "--fresh"]) == 0


def test_a_dry_run_counts_and_runs_nothing(tmp_path, capsys):
    assert agreement.main(["-n", "10", "--families", "series", "--dry-run", "--work", str(tmp_path / "w")]) == 0
    assert "tokens to decode" in capsys.readouterr().out and not (tmp_path / "w").exists()


@pytest.mark.parametrize(("arguments", "complaint"), [
    (["--families", "dags"], "no such family"), (["--kv-budget", "x"], "give a number of cells"), (["-n", "0"], "must be at least 1"),
    (["--kv-budget", "dag=300"], "no number for ledger, linsys, series"), (["-m", "none.gguf"], "none.gguf"),
])  # fmt: skip
def test_misuse_is_one_clear_line(arguments, complaint, capsys):
    assert agreement.main(arguments) in (1, 2)
    err = capsys.readouterr().err
    assert err.startswith("error: ") and complaint in err and len(err.splitlines()) == 1


def test_records_of_other_commits_are_said(tmp_path, engine, monkeypatch, capsys):
    """A run goes on at another commit and keeps what is solved; the page must not name the last commit alone."""
    command = ["--families", "series", "--thoughts", "3", "--work", str(tmp_path / "work"), "--result", str(tmp_path / "r.json"), "-q"]
    for n, commit, made in (("1", "aaa", []), ("1", "bbb", ["aaa"]), ("2", "ccc", ["aaa", "ccc"])):
        monkeypatch.setattr("zoomr_cli.versions.versions", lambda commit=commit: {"zoomr": f"checkout at {commit}"})
        assert agreement.main(["-n", n, *command]) == 0
        names = [f"checkout at {name}" for name in made]
        assert json.loads((tmp_path / "r.json").read_text()).get("code", []) == names
        assert (f"**Not all records are of that commit**: they were made with zoomr {', '.join(names)}." in capsys.readouterr().out) is bool(made)


def test_another_split_never_takes_the_place_of_the_published_result(tmp_path, engine, monkeypatch, capsys):
    """The file that goes into the docs is of one split; the other one's result needs a name of its own."""
    monkeypatch.setattr("benchmarks.runs.RESULTS", tmp_path)
    command = ["--split", "dev", "-n", "1", "--families", "series", "--thoughts", "3", "--work", str(tmp_path / "work"), "-q"]
    assert agreement.main(command) == 2
    err = capsys.readouterr().err
    assert "of the test problems" in err and "--result build/bench/agreement-dev.json" in err and len(err.splitlines()) == 1
    assert agreement.main([*command, "--result", f"{tmp_path}/work/../agreement.json"]) == 2 and not engine.prompts
    assert agreement.main([*command, "--result", str(tmp_path / "other.json")]) == 0
    assert not (tmp_path / "agreement.json").exists() and (tmp_path / "other.json").exists()
    assert agreement.main([*command, "--dry-run"]) == 0, "which writes nothing"
    assert agreement.main([*command[2:], "--fresh"]) == 0 and (tmp_path / "agreement.json").exists()


def test_a_reader_adds_the_lookups_to_the_record_and_lets_the_policy_go(engine):
    def select(view):
        return SimpleNamespace(zoomed=(0,), agreement=0.5)

    def wrong_at_problem_b():
        engine.policy.select(None)  # as the real engine does between its events
        if engine.prompts[-1] == "b":
            raise ValueError("x")

    engine.policy.select, engine.on_token = select, wrong_at_problem_b
    engine.context = SimpleNamespace(resident=lambda sequence: np.array([0, 4, 8]))
    heard = Recorder()
    with opener(engine)(None, None, 0) as (model, opened):
        reader = Reader(model, opened, SamplingParams(), 9)
        done, failed = (reader.solve(Problem(name, ({"role": "user", "content": name},), "4", 1), heard) for name in "ab")
    assert done["correct"] and done["lookups"] == [] and "lookups" not in failed and failed["error"]["message"] == "x"
    assert engine.policy.select is select and any(isinstance(event, Refreshed) for event in heard.events)


def test_an_ear_keeps_each_selection_once():
    context = SimpleNamespace(resident=lambda sequence: np.array([0, 4, 8]))
    policy = SimpleNamespace(select=lambda view: SimpleNamespace(zoomed=(3,), agreement=0.25))
    ear = Ear(Recorder())
    with ear.on(SimpleNamespace(policy=policy, context=context)):
        policy.select(None)
        ear.event(Refreshed(9, (3,), 0.25, "interval"))
    policy.select(None)
    assert ear.events == [Refreshed(9, (3,), 0.25, "selected")]
