"""Breadcrumbs training as commands: recipes, what is missing, and the measures that are read off (needs torch)."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
from crumbs import BEACON, CRUMBS, PLAIN, PLAN, end_even, fresh, lively, next_scores, weights_of  # noqa: E402

try:
    from zoomr_models import export, tasks, tokenizer
    from zoomr_models.train import breadcrumbs, recipe, rollout, run
except ImportError:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from models import export, tasks, tokenizer
    from models.train import breadcrumbs, recipe, rollout, run

TOML = Path(breadcrumbs.__file__).parent / "breadcrumbs.toml"
RECIPE = """
name = "t"
style = "beacons"
seed = 0
minutes = 0.0
steps = 3
threads = 1
tokens = 300
lr = 3e-3
embedding_lr = 3e-3
warmup = 1
recall_weight = 0.5
index_layers = []
beacon_every = [4, 8]
average = 0.9
[breadcrumbs]
mode = "joint"
warm_up = 1
problems = 2
samples = 4
temperature = 1.0
slack = 0.3
clip = 0.2
policy_lr = 1e-3
references = 1
thoughts = { series = [1, 1] }
[shape]
layers = 2
width = 64
heads = 2
kv_heads = 1
ff = 96
[[stage]]
until = 1.0
masked = 1.0
recall_tokens = 0
recall_pairs = 4
index_weight = 0.0
thoughts = { series = [1, 2] }
"""


@pytest.fixture
def folder(tmp_path):
    """A recipe, the comparison that extends it, and a plain checkpoint to begin with."""
    (tmp_path / "joint.toml").write_text(RECIPE)
    (tmp_path / "alone.toml").write_text('extends = "joint.toml"\nname = "alone"\n[breadcrumbs]\nmode = "distill"\n')
    plain = run.Run(replace(PLAN, shape=PLAIN, name="plain"), tmp_path)
    plain.average.load_state_dict(lively().state_dict())
    plain.save()
    (tmp_path / "checkpoint.pt").rename(tmp_path / "plain.pt")
    return tmp_path


@pytest.mark.parametrize("name", ["joint", "alone"])
def test_a_command_trains_and_another_measures(folder, name, capsys, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(breadcrumbs, "is_right", end_even)
    out = folder / name
    breadcrumbs.main([str(folder / f"{name}.toml"), str(out), "--start", str(folder / "plain.pt")])
    lines = [json.loads(x) for x in (out / "log.jsonl").read_text().splitlines()]
    assert [x["step"] for x in lines] == [1, 2, 3] and "loss" in lines[0] and all(x["kl"] > 0 and x["thoughts"] == 1 and x["reference"] > 0 for x in lines[1:])
    assert all(("used" in x) is (name == "joint") for x in lines[1:])
    assert (out / "loss.png").stat().st_size > 1000
    net, state = export.load_network(out / "checkpoint.pt")
    policy, _ = export.load_network(out / "policy.pt")
    assert net.shape.vocab == BEACON + 1 and policy.shape.vocab == BEACON and state["step"] == 3
    assert torch.equal(weights_of(policy), weights_of(lively())) is (name == "alone")
    breadcrumbs.main([str(folder / f"{name}.toml"), str(out)])  # a finished run has nothing left to do
    assert len((out / "log.jsonl").read_text().splitlines()) == 3
    for checkpoint, kinds in (("checkpoint", ["c = 4", "c = 8", "c = 16"]), ("policy", ["uncompressed"])):
        monkeypatch.setattr(sys, "argv", ["rollout", str(out / f"{checkpoint}.pt"), "--families", "series", "--thoughts", "1", "-n", "2"])
        rollout.main()
        told = capsys.readouterr().out.splitlines()
        assert len(told) == len(kinds) and all(f"series  {kind}" in line for kind, line in zip(kinds, told))


def test_measures_are_what_they_say():
    """Of a network that knows nothing, token by token from the slow view of its caches."""
    problems = tasks.generate("series", 2, 0, 1, "dev")
    net = lively(replace(PLAIN, vocab=BEACON + 1))
    share, whole = rollout.teacher_forced(net, problems, 4)
    right = told = 0
    for p in problems:
        prompt, reply = tokenizer.encode(tasks.prompt_text(p.prompt)), tokenizer.encode(p.plain_trace)
        for n, token in enumerate(reply):
            right += int(next_scores(net, prompt + reply[:n], len(prompt), 4).argmax()) == token
            told += 1
    assert share == pytest.approx(right / told) and whole == 0
    assert rollout.sampled(net, problems, 4) == 0


def test_right_answers_and_whole_traces_are_counted(monkeypatch):
    """Replies that are two of three reference traces, and a network that misses one token of one trace."""
    problems = tasks.generate("series", 3, 0, 1, "dev")
    written = [tokenizer.encode(p.plain_trace) + [tokenizer.IM_END] * (not p.plain_trace.endswith("<|im_end|>")) for p in problems]
    written[1] = written[1][:-3]
    monkeypatch.setattr(rollout, "sample", lambda net, prompts, limit, every: [
        rollout.Reply(torch.tensor(prompt + reply), len(prompt), torch.zeros(len(reply))) for prompt, reply in zip(prompts, written, strict=True)
    ])  # fmt: skip
    net, calls = lively(replace(PLAIN, vocab=BEACON + 1)), []
    assert rollout.sampled(net, problems, 4) == 2

    def told(net, hidden, ids, weights, sources):
        calls.append(ids)
        hits = weights > 0
        hits[0, int(hits[0].nonzero()[-1])] = len(calls) != 2
        return torch.zeros(()), hits

    monkeypatch.setattr(f"{rollout.__package__}.losses.token_loss", told)
    share, whole = rollout.teacher_forced(net, problems, 4)
    assert whole == 2 and 0.9 < share < 1


def test_what_is_missing_is_said(folder, capsys):
    out = str(folder / "out")

    def refuses(*arguments):
        with pytest.raises(SystemExit) as stop:
            breadcrumbs.main([str(a) for a in arguments])
        assert stop.value.code == 2
        return capsys.readouterr().err

    assert "--start" in refuses(folder / "joint.toml", out)
    assert "there is no file" in refuses(folder / "none.toml", out)
    assert "there is no file" in refuses(folder / "joint.toml", out, "--start", folder / "none.pt")
    (folder / "bad.toml").write_text('extends = "joint.toml"\n[breadcrumbs]\nmode = "both"\n')
    assert "'both'" in refuses(folder / "bad.toml", out, "--start", folder / "plain.pt")
    (folder / "far.toml").write_text('extends = "joint.toml"\n[breadcrumbs]\nthoughts = { serie = [1, 2] }\n')
    assert "no family serie" in refuses(folder / "far.toml", out, "--start", folder / "plain.pt")
    (folder / "less.toml").write_text('extends = "joint.toml"\n[breadcrumbs]\nreferences = -1\n')
    assert "references is -1" in refuses(folder / "less.toml", out, "--start", folder / "plain.pt")
    (folder / "long.toml").write_text('extends = "joint.toml"\n[breadcrumbs]\nwarm_up = 3\n')
    assert "3 steps" in refuses(folder / "long.toml", out, "--start", folder / "plain.pt")
    (folder / "wide.toml").write_text('extends = "joint.toml"\n[shape]\nwidth = 128\n')
    assert "width=128" in refuses(folder / "wide.toml", out, "--start", folder / "plain.pt")
    assert "[breadcrumbs]" in refuses(TOML.parent / "plain.toml", out, "--start", folder / "plain.pt")
    fresh(folder, replace(PLAN, name="other")).save()
    assert "'other'" in refuses(folder / "joint.toml", folder)


def test_the_compared_recipes_differ_in_the_mode_alone():
    whole, joint, alone = (recipe.load_recipe(TOML.parent / f"{name}.toml") for name in ("breadcrumbs", "weak-joint", "weak-distill"))
    assert (joint.breadcrumbs.mode, alone.breadcrumbs.mode) == ("joint", "distill")
    assert replace(alone, name=joint.name, breadcrumbs=joint.breadcrumbs) == joint
    assert replace(alone.breadcrumbs, mode="joint") == joint.breadcrumbs
    assert (whole.shape, whole.breadcrumbs.noise) == (joint.shape, 0) and joint.breadcrumbs.noise > 0
    for made in (whole, joint):
        assert breadcrumbs._checked(made, TOML) is made and set(made.beacon_every) == {4, 8, 16}
    plain = recipe.load_recipe(TOML.parent / "plain.toml").shape
    assert joint.shape == replace(plain, vocab=BEACON + 1, layers=plain.layers + joint.breadcrumbs.layers)
    with pytest.raises(ValueError, match="at least 2"):
        replace(joint.breadcrumbs, samples=1)
    with pytest.raises(ValueError, match="noise -1"):
        replace(joint.breadcrumbs, noise=-1)


def test_a_recipe_with_noise_begins_with_both_networks_weakened_alike_in_every_process(tmp_path):
    """What was given stays as it is: a run is made once to be checked and once in each process."""
    start, plan = lively(), replace(PLAN, breadcrumbs=replace(CRUMBS, noise=0.5))
    first, second = (breadcrumbs.BreadcrumbsRun(plan, tmp_path, start) for _ in range(2))
    assert torch.equal(weights_of(start), weights_of(lively()))
    whole = breadcrumbs.BreadcrumbsRun(PLAN, tmp_path, start)
    for one, other, clean in ((first.net, second.net, whole.net), (first.policy.net, second.policy.net, whole.policy.net)):
        assert torch.equal(weights_of(one), weights_of(other))
        for a, b in zip(one.parameters(), clean.parameters(), strict=True):
            if b.ndim > 1 and b.std() > 0:
                assert ((a - b).std() / b.std()).item() == pytest.approx(0.5, rel=0.2)
            elif b.ndim == 1:
                assert torch.equal(a, b)
    assert torch.equal(weights_of(first.net), weights_of(first.average))
