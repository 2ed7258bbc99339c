"""A run of the training: it resumes, trains in several processes, ends with its command, and says in a line what it cannot use (needs torch)."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest

torch = pytest.importorskip("torch")
from processes import still_runs, wait_until  # noqa: E402

try:
    from zoomr_models import export, tokenizer
    from zoomr_models.train import network, recipe, run, side_by_side
except ImportError:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from models import export, tokenizer
    from models.train import network, recipe, run, side_by_side

SMALL = network.Shape(len(tokenizer.TOKENS), layers=2, width=64, heads=2, kv_heads=1, ff=96)


def test_a_run_learns_and_resumes(tmp_path):
    stage = recipe.Stage(1.0, {"dag": (1, 2), "series": (1, 2)}, 0.5, 100, 4, 0.1)
    plan = recipe.Recipe(
        "t", 0, 0, 8, 1, 300, 3e-3, 3e-3, 2, 0.5, (0, 1), 0.9, SMALL, (stage,)
    )  # fmt: skip
    first = run.Run(plan, tmp_path)
    reports = []
    for i in range(8):
        first.set_rate()
        reports.append(run.train_step(first, Random(i)))
        first.step += 1
    assert reports[-1]["loss"] < reports[0]["loss"]
    first.save()
    second = run.Run(plan, tmp_path)
    second.resume()
    assert second.step == 8
    for a, b in zip(first.net.parameters(), second.net.parameters()):
        assert torch.equal(a, b)


def test_a_run_begins_with_the_weights_that_another_ships(tmp_path, capsys):
    plan = recipe.Recipe("t", 0, 0, 0, 1, 300, 3e-3, 3e-3, 2, 0.5, (0, 1), 0.9, SMALL, (STAGE,))
    before = run.Run(plan, tmp_path)
    with torch.no_grad():
        for p in before.average.parameters():
            p.add_(1.0)
    before.save()
    start, _ = export.load_network(tmp_path / "checkpoint.pt")
    after = run.Run(plan, tmp_path / "new", start)
    for a, b, c in zip(before.average.parameters(), after.net.parameters(), after.average.parameters()):
        assert torch.equal(a, b) and torch.equal(a, c)
    with pytest.raises(SystemExit):
        run.main([str(Path(recipe.__file__).parent / "tiny.toml"), str(tmp_path / "x"), "--start", str(tmp_path / "checkpoint.pt")])
    assert "but the recipe needs" in capsys.readouterr().err


STAGE = recipe.Stage(1.0, {"dag": (1, 2), "series": (1, 2)}, 0.5, 0, 4, 0.1)
PAIR = recipe.Recipe("t", 0, 0, 3, 1, 300, 3e-3, 3e-3, 2, 0.5, (0, 1), 0.9, SMALL, (STAGE,), processes=2)  # fmt: skip


def _a_run(folder):
    made, rank = run.Run(PAIR, folder), side_by_side.rank()
    net = network.Network(SMALL)
    net.load_state_dict(made.net.state_dict())
    net(torch.arange(9)[None] + rank)[0].sum().backward()
    own = {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}
    side_by_side.average_gradients(net)
    mean = {name: p.grad for name, p in net.named_parameters() if p.grad is not None}
    run.loop(made, run.train_step, lambda step: True)
    torch.save({"own": own, "mean": mean, "net": made.net.state_dict()}, folder / f"{rank}.pt")


def test_two_processes_take_the_step_of_their_mean_gradient(tmp_path):
    side_by_side.start(2, _a_run, tmp_path)
    one, two = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    assert any(not torch.equal(one["own"][name], two["own"][name]) for name in one["own"])
    for name, mean in one["mean"].items():
        assert torch.allclose(mean, (one["own"][name] + two["own"][name]) / 2, atol=1e-5) and torch.equal(mean, two["mean"][name])
    assert all(torch.equal(one["net"][name], two["net"][name]) for name in one["net"])
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["family"] for line in lines] == ["dag", "series"] * 3 and lines[-1]["step"] == 3
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert all(torch.equal(state["net"][name], one["net"][name]) for name in one["net"])


def test_a_run_takes_over_no_run_of_another_recipe(tmp_path):
    plan = recipe.Recipe("one", 0, 0, 2, 1, 300, 3e-3, 3e-3, 2, 0.5, (0, 1), 0.9, SMALL, (STAGE,))
    run.Run(plan, tmp_path).save()
    before = (tmp_path / "checkpoint.pt").read_bytes()
    with pytest.raises(ValueError, match="holds a run of 'one' and the recipe is 'two'; give another folder"):
        run.train(replace(plan, name="two"), tmp_path)
    assert (tmp_path / "checkpoint.pt").read_bytes() == before


@pytest.mark.parametrize("text, message", [
    ("name = ", "is no recipe: Invalid value"), ("name = 'x'", "is no recipe: 'stage' is missing"), ("extends = 'none.toml'", "none.toml"),
    ("extends = 'plain.toml'\nsteppes = 3", "has no setting 'steppes'"),
])  # fmt: skip
def test_what_is_no_recipe_is_said_in_a_line(tmp_path, capsys, text, message):
    plain = Path(recipe.__file__).parent / "plain.toml"
    (tmp_path / "plain.toml").write_text(plain.read_text())
    (tmp_path / "bad.toml").write_text(text)
    with pytest.raises(SystemExit) as stop:
        run.main([str(tmp_path / "bad.toml"), str(tmp_path / "out")])
    said = capsys.readouterr().err
    assert stop.value.code == 2 and message in said and "Traceback" not in said and str(tmp_path) in said


@pytest.mark.parametrize("data", [b"hello", b"", b"PK\x03\x04"])
def test_what_is_no_checkpoint_is_said_in_a_line(tmp_path, capsys, data):
    (tmp_path / "junk.pt").write_bytes(data)
    with pytest.raises(SystemExit) as stop:
        run.main([str(Path(recipe.__file__).parent / "plain.toml"), str(tmp_path / "out"), "--start", str(tmp_path / "junk.pt")])
    assert stop.value.code == 2 and f"{tmp_path / 'junk.pt'} is no checkpoint of a training run" in capsys.readouterr().err


def test_a_recipe_of_breadcrumbs_names_its_own_command(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        run.main([str(Path(recipe.__file__).parent / "breadcrumbs.toml"), str(tmp_path / "out")])
    assert stop.value.code == 2 and "python -m models.train.breadcrumbs " in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_a_resumed_run_forgets_the_log_after_its_checkpoint(tmp_path):
    plan = recipe.Recipe("t", 0, 0, 4, 1, 300, 3e-3, 3e-3, 2, 0.5, (0, 1), 0.9, SMALL, (STAGE,))
    ended = run.Run(plan, tmp_path)
    ended.step = 2
    ended.save()
    lines = [json.dumps({"step": step, "old": True}) for step in (1, 2, 3)]
    (tmp_path / "log.jsonl").write_text("\n".join(lines) + '\n{"step": 4, "ol')
    resumed = run.Run(plan, tmp_path)
    resumed.resume()
    run.loop(resumed, run.train_step, lambda step: True)
    found = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [(line["step"], "old" in line) for line in found] == [(1, True), (2, True), (3, False), (4, False)]


_A_RUN_TO_KILL = """
import os, sys, time
from pathlib import Path
from {package} import side_by_side

def work(folder):
    (folder / f"{{side_by_side.rank()}}.pid").write_text(str(os.getpid()))
    time.sleep(600)  # until it is killed

if __name__ == "__main__":
    side_by_side.start(2, work, Path(sys.argv[1]))
"""


def test_no_process_outlives_the_command_that_started_it(tmp_path):
    script = tmp_path / "killed.py"
    script.write_text(_A_RUN_TO_KILL.format(package=side_by_side.__package__))
    path = os.pathsep.join([str(Path(__file__).resolve().parents[1]), *filter(None, sys.path)])
    run_of_two = subprocess.Popen([sys.executable, str(script), str(tmp_path)], env={**os.environ, "PYTHONPATH": path})
    files = [tmp_path / "0.pid", tmp_path / "1.pid"]
    try:
        wait_until(lambda: all(f.exists() and f.read_text() for f in files))
    finally:
        run_of_two.kill()
        run_of_two.wait()
    assert not any(still_runs(int(f.read_text())) for f in files)
