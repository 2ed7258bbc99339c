"""What the output of `zoomr solve` promises: whole records, one process, one set of settings."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zoomr_local.errors import UsageError
from zoomr_local.journal import Journal, Manifest, code_of, manifest_path, model_fingerprint, record_key

MANIFEST = Manifest({"policy": "zoomr", "kv_budget": 512}, {"file": "m.gguf"}, {"zoomr": "1"}, {"command": "a"})
RECORDS = [{"id": "a", "content": "eins"}, {"id": "b", "content": "zwei \u2028 \r\n drei"}, {"id": "c", "content": "\ud800"}]


def write(path: Path, records=RECORDS, manifest=MANIFEST) -> bytes:
    with Journal.open(path) as journal:
        journal.begin(manifest)
        for record in records:
            journal.append(record)
    return path.read_bytes()


@pytest.fixture
def out(tmp_path) -> Path:
    return tmp_path / "out.jsonl"


def test_records_read_back_in_order_one_a_line(out):
    data = write(out)
    assert [json.loads(line) for line in data.split(b"\n")[:-1]] == RECORDS
    with Journal.open(out) as journal:
        assert journal.records == RECORDS


def test_a_second_start_appends_and_leaves_finished_bytes_alone(out):
    data = write(out)
    assert write(out, [{"id": "d"}]).startswith(data)


def test_any_cut_of_the_last_record_is_repaired_and_costs_only_that_record(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cut")
    whole = write(folder / "whole.jsonl")
    first = whole.index(b"\n") + 1

    @settings(deadline=None, max_examples=60)  # each example waits for the disk
    @given(st.integers(first, len(whole)))
    def check(length):
        out = folder / "cut.jsonl"
        out.unlink(missing_ok=True)
        write(out)
        os.truncate(out, length)
        with Journal.open(out) as journal:
            kept = whole[:length].count(b"\n")
            assert len(journal.records) == kept
            assert journal.torn_bytes == length - (whole[:length].rfind(b"\n") + 1)
            assert out.stat().st_size == length, "nothing is cut before begin"
            journal.begin(MANIFEST)
            journal.append({"id": "z"})
        ids = [json.loads(line)["id"] for line in out.read_bytes().split(b"\n")[:-1]]
        assert ids == ["a", "b", "c"][:kept] + ["z"]

    check()


def test_zeros_after_a_power_loss_are_a_torn_line(out):
    data = write(out)
    out.write_bytes(data + b"\0" * 100)
    with Journal.open(out) as journal:
        assert (len(journal.records), journal.torn_bytes) == (3, 100)
        journal.begin(MANIFEST)
    assert out.read_bytes() == data


def test_a_damaged_line_in_the_middle_is_refused_by_number(out):
    lines = write(out).split(b"\n")
    lines[1] = b'{"id": "b"'
    out.write_bytes(b"\n".join(lines))
    with pytest.raises(UsageError, match="line 2 is not a record"):
        Journal.open(out)


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        (Manifest({"policy": "zoomr", "kv_budget": 256}, MANIFEST.model, MANIFEST.versions), "settings.kv_budget: 512 there, 256 now"),
        (Manifest(MANIFEST.settings, {"file": "n.gguf"}, MANIFEST.versions), 'model: m.gguf there, n.gguf now'),
        (Manifest(MANIFEST.settings, MANIFEST.model, {"zoomr": "2"}), 'versions.zoomr: "1" there, "2" now'),
    ],
)
def test_other_settings_are_refused_by_name_and_change_nothing(out, changed, named):
    data = write(out) + b'{"id": "torn'
    out.write_bytes(data)
    with Journal.open(out) as journal, pytest.raises(UsageError, match="--overwrite") as caught:
        journal.begin(changed)
    assert named in str(caught.value)
    assert out.read_bytes() == data


def test_info_may_differ(out):
    write(out)
    with Journal.open(out) as journal:
        journal.begin(Manifest(MANIFEST.settings, MANIFEST.model, MANIFEST.versions, {"command": "b"}))
    assert json.loads(manifest_path(out).read_text())["info"] == {"command": "b"}


def at(commit: str, **info) -> Manifest:
    return Manifest(MANIFEST.settings, MANIFEST.model, {"zoomr": commit}, info)


def test_a_commit_between_two_starts_costs_no_record_and_is_kept(out):
    """Of a clone; keys stay those of before commits were known. An installed version is compared as ever."""
    older, newer, first = at("checkout at aaa"), at("checkout at bbb+"), at("not installed")
    assert older.differences(newer) == [] == first.differences(newer) and len({m.fingerprint() for m in (older, newer, first)}) == 1
    assert older.differences(at("0.2")) == ['versions.zoomr: "not installed" there, "0.2" now'] and at("0.1").differences(at("0.2"))
    data = write(out, manifest=first)
    for manifest, earlier in ((older, ["not installed"]), (older, ["not installed"]), (newer, ["not installed", "checkout at aaa"]), (older, ["not installed", "checkout at bbb+"])):
        with Journal.open(out) as journal:
            assert journal.earlier_code(manifest) == earlier
            journal.begin(manifest)
        assert json.loads(manifest_path(out).read_text())["info"] == {"earlier_zoomr": earlier} and out.read_bytes() == data
        assert code_of(out) == [*earlier, manifest.versions["zoomr"]]
    with Journal.open(out) as journal:
        journal.begin(newer, overwrite=True)
    assert code_of(out) == ["checkout at bbb+"]


def test_settings_compare_as_json_would_store_them():
    stored = Manifest({"stop": ["a"]}, {}, {})
    assert stored.differences(Manifest({"stop": ("a",)}, {}, {})) == []
    assert stored.fingerprint() == Manifest({"stop": ("a",)}, {}, {}).fingerprint()


def test_overwrite_starts_again(out):
    write(out)
    with Journal.open(out) as journal:
        journal.begin(Manifest({"policy": "full"}, {}, {}), overwrite=True)
        journal.append({"id": "new"})
    assert out.read_text() == '{"id": "new"}\n'


def test_somebody_elses_file_is_never_cut(out):
    out.write_text("one line of a poem without a newline")
    with Journal.open(out) as journal, pytest.raises(UsageError, match="manifest"):
        journal.begin(MANIFEST)
    assert out.read_text() == "one line of a poem without a newline"


def test_records_without_a_manifest_are_refused(out):
    write(out)
    manifest_path(out).unlink()
    with Journal.open(out) as journal, pytest.raises(UsageError, match="is missing"):
        journal.check(MANIFEST)


def test_dropping_records_keeps_the_others_and_the_lock(out):
    write(out)
    with Journal.open(out) as journal:
        journal.begin(MANIFEST, keep=lambda r: r["id"] != "b")
        assert [r["id"] for r in journal.records] == ["a", "c"]
        with pytest.raises(UsageError, match="another process"):
            Journal.open(out)
        journal.append({"id": "b"})
    with Journal.open(out) as journal:
        assert [r["id"] for r in journal.records] == ["a", "c", "b"]
    assert sorted(p.name for p in out.parent.iterdir()) == ["out.jsonl", "out.jsonl.manifest.json"]


def test_a_second_process_is_refused_and_the_lock_dies_with_its_owner(out):
    script = (
        "import sys; from pathlib import Path; from zoomr_local.journal import Journal\n"
        "j = Journal.open(Path(sys.argv[1])); print('locked', flush=True); sys.stdin.read()"
    )
    owner = subprocess.Popen(
        [sys.executable, "-c", script, str(out)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert owner.stdout.readline() == "locked\n"
        with pytest.raises(UsageError, match="another process is writing"):
            Journal.open(out)
    finally:
        owner.kill()
        owner.communicate()
    with Journal.open(out) as journal:
        journal.begin(MANIFEST)


def test_a_file_that_was_made_for_nothing_is_taken_away_again(out):
    Journal.open(out).close()
    assert not out.exists()
    out.touch()
    Journal.open(out).close()
    assert out.exists()


def test_a_device_or_a_folder_is_no_output(tmp_path):
    for path in (Path("/dev/null"), tmp_path):
        with pytest.raises(UsageError, match="not a regular file"):
            Journal.open(path)


def test_the_key_changes_with_the_prompt_the_reference_and_the_settings():
    problem = {"id": "a", "prompt": "?", "answer": "1"}
    keys = {
        record_key(problem, MANIFEST),
        record_key({**problem, "prompt": "!"}, MANIFEST),
        record_key({**problem, "answer": "2"}, MANIFEST),
        record_key(problem, Manifest({}, {}, {})),
    }
    assert len(keys) == 4
    assert record_key(problem, MANIFEST) in keys


def test_models_that_differ_at_either_end_have_different_fingerprints(tmp_path):
    size = 3 << 20
    prints = []
    for name, at in (("plain", None), ("head", 10), ("tail", size - 10)):
        data = bytearray(size)
        if at is not None:
            data[at] = 1
        path = tmp_path / name / "m.gguf"
        path.parent.mkdir()
        path.write_bytes(data)
        prints.append(json.dumps(model_fingerprint(path)))
    assert len(set(prints)) == 3
