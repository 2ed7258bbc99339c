"""A model's calibration: measured on the real library, found again by the bytes of its model, refused with the command to type."""

import json
import os
import shutil

import heads_reference as slow
import numpy as np
import pytest

from zoomr_cli.main import main
from zoomr_local import calibrate, calibrations, machine
from zoomr_local.engine import Engine, EngineConfig
from zoomr_local.errors import UsageError
from zoomr_local.libllama.heads import HeadStore
from zoomr_local.policies.heads import Calibration
from zoomr_models import BUNDLED, bundled_model_path

FOUND = Calibration((3.0, 1.0, 2.0, 7.5), 0.93, 8, 800)


@pytest.fixture
def copy(tmp_path, monkeypatch):
    """A model's file in a folder of its own, and a data folder that is empty."""
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    (tmp_path / "models").mkdir()
    return shutil.copy(bundled_model_path(), tmp_path / "models" / "mine.gguf")


def of(path, **more):
    return Calibration(**{**FOUND.__dict__, "model": calibrations.fingerprint(path), **more})


@pytest.mark.parametrize("name, content", [("mine.gguf", None), ("notes.json", b'{"mine": 1}'), ("notes.json", b"[1]"), ("none/x.json", None)])
def test_no_file_but_a_calibration_is_written_over_and_that_is_said_first(copy, tmp_path, capsys, monkeypatch, name, content):
    target = tmp_path / "models" / name
    if content is not None:
        target.write_bytes(content)
    before = target.read_bytes() if target.exists() else None
    monkeypatch.setattr(calibrate, "calibrate", None)
    assert main(["calibrate", "-m", str(copy), "-o", str(target)]) == 2
    assert "name another file with -o" in capsys.readouterr().err
    assert (target.read_bytes() if target.exists() else None) == before


def test_a_large_file_or_none_that_can_be_read_is_refused_unread(tmp_path):
    with (tmp_path / "model.gguf").open("wb") as file:
        file.truncate(1 << 40)
    os.mkfifo(tmp_path / "pipe")
    for name in ("model.gguf", "pipe"):
        with pytest.raises(UsageError, match="is there, and is no calibration"):
            calibrations.check_target(tmp_path / name)


def test_a_calibration_in_a_folder_of_somebody_else_is_renewed_where_it_is_found(copy, tmp_path, monkeypatch):
    target = calibrations.write(of(copy), tmp_path / "models" / "mine.gguf", None)
    monkeypatch.setattr(calibrations, "write_atomically", lambda *_: (_ for _ in ()).throw(PermissionError(13, "Permission denied")))
    assert calibrations.write(of(copy, prompts=9), tmp_path / "models" / "mine.gguf", None) == target
    assert calibrations.find(tmp_path / "models" / "mine.gguf").prompts == 9


def test_an_older_calibration_is_replaced_whole_or_stays(copy, tmp_path, monkeypatch):
    target = tmp_path / "models" / "mine.calibration.json"
    calibrations.write(of(copy), copy, target)
    calibrations.check_target(target)
    before = target.read_bytes()
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(UsageError, match="No space left"):
        calibrations.write(of(copy, prompts=9), copy, target)
    assert target.read_bytes() == before and [p.name for p in target.parent.iterdir() if p.name.startswith(".")] == []


def test_the_demand_is_the_slow_references(model, prompt, monkeypatch):
    rows = {}
    weights = HeadStore.weights

    def watched(store, layer):
        seen = weights(store, layer)
        held = store.positions(layer)[0] >= 0
        rows.setdefault(layer, []).append(seen[0][:, held].copy())
        return seen

    monkeypatch.setattr(HeadStore, "weights", watched)
    done = []
    found = calibrate.calibrate(model, [prompt[:60], prompt[:33]], 5, threads=1, tell=done.append)
    assert done == [1, 2] and found.prompts == 2 and 2 <= found.queries <= 10 and len(rows) == 4
    assert {len(seen) for seen in rows.values()} == {found.queries}
    for layer, demand in enumerate(found.demand):
        each = [slow.tokens_for_mass(head, found.mass) for step in rows[layer] for head in step]
        assert demand == pytest.approx(np.mean(each)) and max(each) <= 65
    assert found.model == calibrations.fingerprint(model.path)


def test_a_reply_beyond_the_trained_length_or_memory_is_refused_before_anything_is_allocated(copy, capsys, monkeypatch):
    monkeypatch.setattr(calibrate, "HeadStore", None)
    assert main(["calibrate", "-m", str(copy), "-n", "3000000", "-q"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err == ("error: -n 3000000: the longest probe has 365 tokens, with that reply 3,000,365, and zoomr-tiny was trained on 4,096;"
                                 " give -n 3731 or less\n")  # fmt: skip
    monkeypatch.setattr(calibrate.machine, "memory", lambda: machine.Memory(2 * 400 * 2048, 8 << 30, "a test"))
    assert main(["calibrate", "-m", str(copy), "-n", "36", "-q"]) == 2
    assert "-n 36: 401 cells a head take 1.57 MiB while they are made, 1.56 MiB are free; give -n 35 or less" in capsys.readouterr().err


def test_a_plot_costs_no_figures(copy, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("zoomr_local.evaluate_report.require_matplotlib", lambda: None)
    monkeypatch.setattr(calibrate, "calibrate", lambda *_: of(copy))
    monkeypatch.setattr(calibrate, "plot", lambda path, *_: (_ for _ in ()).throw(UsageError(f"--plot {path}: no room")))
    assert main(["calibrate", "-m", str(copy), "--plot", "y.png", "--json"]) == 2
    out, err = capsys.readouterr()
    assert json.loads(out)["demand"] == list(FOUND.demand) and "--plot y.png: no room" in err
    monkeypatch.setattr(calibrate, "calibrate", None)
    assert main(["calibrate", "-m", str(copy), "--plot", str(tmp_path)]) == 2
    assert f"--plot {tmp_path} is a folder; name a PNG file in it" in capsys.readouterr().err


@pytest.mark.parametrize("name", BUNDLED)
def test_a_bundled_model_ships_with_its_own(name, monkeypatch, tmp_path):
    """Of these very bytes: a model that is trained again is calibrated again (zoomr calibrate -m NAME) in the same commit."""
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))  # none but the shipped one
    assert len(calibrations.find(bundled_model_path(name)).demand) == {"breadcrumbs-tiny": 7}.get(name, 4)


def test_it_is_written_beside_the_model_and_found_there(copy):
    assert calibrations.write(of(copy), copy, None) == copy.with_name("mine.calibration.json")
    assert calibrations.find(copy) == of(copy)


def test_where_that_cannot_be_written_it_is_in_the_data_folder(copy, tmp_path):
    copy.with_name("mine.calibration.json").mkdir()
    written = calibrations.write(of(copy), copy, None)
    assert written.is_relative_to(tmp_path / "data") and written.name.startswith("mine-")
    copy.with_name("mine.calibration.json").rmdir()
    assert calibrations.find(copy) == of(copy)


def test_of_another_models_file_the_command_is_named(copy):
    with pytest.raises(UsageError, match=r"needs to know how many tokens .* mine.gguf .*: zoomr calibrate -m .*mine.gguf$"):
        calibrations.find(copy)
    calibrations.write(of(copy, model={"bytes": 1, "sha256": "0", "hashed": "all"}), copy, None)
    with pytest.raises(UsageError, match=r"mine.calibration.json is the calibration of another model .*: zoomr calibrate -m .*mine.gguf$"):
        calibrations.find(copy)
    copy.with_name("mine.calibration.json").write_text("{")
    with pytest.raises(UsageError, match="is not JSON.*zoomr calibrate"):
        calibrations.find(copy)


def test_a_renamed_model_keeps_its_calibration(copy):
    calibrations.write(of(copy), copy, None)
    renamed = copy.rename(copy.with_name("other.gguf"))
    copy.with_name("mine.calibration.json").rename(copy.with_name("other.calibration.json"))
    assert calibrations.find(renamed).demand == FOUND.demand


def test_no_file_can_be_written(copy, tmp_path):
    with pytest.raises(UsageError, match="cannot be written.*-o"):
        calibrations.write(of(copy), copy, tmp_path / "nowhere" / "c.json")


def test_reasonalloc_without_one_is_refused_before_anything_runs(copy, tmp_path, capsys):
    from zoomr_local.model import Model

    loaded = Model.open(copy)
    with pytest.raises(UsageError, match="zoomr calibrate -m"):
        Engine(loaded, EngineConfig(policy="reasonalloc", threads=1))
    loaded.close()
    problems = tmp_path / "in.jsonl"
    problems.write_text(json.dumps({"id": "a", "prompt": "2+2?", "answer": "4"}) + "\n")
    for command in (["solve", str(problems), "-o", str(tmp_path / "out"), "--policy", "reasonalloc"],
                    ["solve", str(problems), "-o", str(tmp_path / "out"), "--policy", "reasonalloc", "--dry-run"],
                    ["eval", "--suite", str(problems), "-o", str(tmp_path / "eval"), "--policy", "full,reasonalloc"]):
        assert main([*command, "-m", str(copy)]) == 2
        assert "zoomr calibrate -m" in capsys.readouterr().err
    assert not (tmp_path / "out").exists() and not (tmp_path / "eval").exists()


def test_the_command_writes_it_and_reasonalloc_runs(copy, tmp_path, capsys):
    assert main(["calibrate", "-m", str(copy), "-n", "1"]) == 0
    printed = capsys.readouterr()
    assert printed.out.count("layer ") == 4 and "mine.calibration.json" in printed.err
    assert calibrations.find(copy).prompts == 8
    problems, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    problems.write_text(json.dumps({"id": "a", "prompt": "2+2?", "answer": "4"}) + "\n")
    flags = ["--policy", "reasonalloc", "--kv-budget", "128", "-n", "4", "-m", str(copy)]
    assert main(["solve", str(problems), "-o", str(out), *flags]) == 0
    kv = json.loads(out.read_text())["kv"]
    assert kv["policy"] == "reasonalloc" and sum(kv["layer_cells"]) == 4 * 128 and kv["allocated"] == 128 >= kv["resident_peak"]
    assert main(["eval", "--suite", str(problems), "-o", str(tmp_path / "eval"), "--policy", "rkv", "--kv-budget", "128",
                 "--pin-prompt", "on,off", "--max-tokens", "4", "-m", str(copy), "-q"]) == 0
    assert {p.name for p in (tmp_path / "eval").glob("*.jsonl")} == {"in.rkv.128.pin_prompt=on.jsonl", "in.rkv.128.pin_prompt=off.jsonl"}


@pytest.mark.parametrize("flags, named", [
    (["--checkpoint", "c"], "--checkpoint"), (["--kv-ram", "64MiB"], "--kv-ram"), (["--kv-page-type", "q8_0"], "--kv-page-type"),
    (["--think-budget", "100"], "--think-budget"), (["--kv-type", "q8_0"], "--kv-type q8_0"),
    (["--on-full", "stop"], "--on-full"), (["--pin-prompt", "maybe"], "--pin-prompt maybe"),
])  # fmt: skip
def test_flags_without_a_meaning_are_refused_by_name(tmp_path, monkeypatch, capsys, flags, named):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in.jsonl").write_text('{"id": 1, "prompt": "2+2?"}\n')
    assert main(["solve", "in.jsonl", "--policy", "h2o", *flags]) == 2
    assert named in capsys.readouterr().err


def test_bars_and_plot(tmp_path):
    lines = calibrate.wave_lines(FOUND, width=15)
    assert [line.count("#") for line in lines] == [6, 2, 4, 15]
    pytest.importorskip("matplotlib")
    calibrate.plot(tmp_path / "new/wave.png", FOUND, "mine", np.array([20, 10, 15, 35]), 20)
    assert (tmp_path / "new/wave.png").read_bytes().startswith(b"\x89PNG")
