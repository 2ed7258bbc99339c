"""A session's directory is replaced as a whole or not at all: kills, full disks, other people's files, damaged bytes."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from tiers import FullAfter

from zoomr_local import session, session_files
from zoomr_local.engine import Engine, EngineConfig
from zoomr_local.errors import SessionError
from zoomr_local.events import BlockLost, Finished, TokenDecoded, Warned
from zoomr_local.sampling import SamplingParams
from zoomr_local.session_files import MANIFEST, SessionDirectory
from zoomr_local.tiers import pagefile
from zoomr_models import bundled_model_path
from zoomr_models.tasks import generate

HERE = Path(__file__).parent
CONFIG = {"kv_budget": 160, "threads": 1}
WARM = {"temperature": 0.9, "seed": 5, "repeat_penalty": 1.1}


@pytest.fixture
def running(model, prompt):
    """An engine in the middle of a text with pages; further events with ``go(n tokens)``."""
    engine = Engine(model, EngineConfig(**CONFIG))
    stream = engine.generate(prompt, SamplingParams(**WARM), 400)

    def go(n: int) -> None:
        while n:
            n -= isinstance(next(stream), TokenDecoded)

    engine.go = go
    go(60)
    yield engine
    engine.close()


# ---------------------------------------------------------------- kills


def tokens(lines: list[str]) -> list[int]:
    return [event["token"] for event in map(json.loads, lines) if event["event"] == "TokenDecoded"]


def test_killed_at_any_moment_of_a_save_the_session_is_whole_and_goes_on(model, prompt, tmp_path):
    """A process that saves after every event, killed again and again; whoever loads next goes on where a save was."""
    n = 160
    engine = Engine(model, EngineConfig(**CONFIG))
    whole = [e.token for e in engine.generate(prompt, SamplingParams(**WARM), n) if isinstance(e, TokenDecoded)]
    rng, place = random.Random(1), tmp_path / "s"
    asked = {"directory": str(place), "model": str(bundled_model_path()), "config": CONFIG, "start": prompt,
             "sampling": WARM, "max_tokens": n, "save": True}  # fmt: skip
    numbers, left_over = [], 0
    for _ in range(40):
        with subprocess.Popen([sys.executable, str(HERE / "session_worker.py"), json.dumps(asked)], text=True,
                              stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:  # fmt: skip
            first = process.stdout.readline()
            assert first, process.stderr.read()
            time.sleep(rng.uniform(0, 0.25))
            process.send_signal(signal.SIGKILL)
        found = engine.load(place)
        with SessionDirectory.reading(place) as directory:
            named = {*directory.manifest()["files"], *(page["file"] for page in found.pages), MANIFEST}
        left_over += bool({path.name for path in place.iterdir()} - named)
        numbers.append(found.completion_tokens)
        rest = [e.token for e in engine.resume() if isinstance(e, TokenDecoded)]
        assert found.state["reply"]["counts"] and whole[len(whole) - len(rest) :] == rest
        assert len(rest) in (n - found.completion_tokens, n - found.completion_tokens + 1)  # one may be undelivered
        if found.completion_tokens >= n or len(numbers) >= 9:
            break
    engine.close()
    assert numbers == sorted(numbers) and numbers[-1] > numbers[0], "each process went on where the last had saved"
    assert left_over, "at least one kill was in the middle of a save"


def test_everything_is_on_the_disk_before_it_is_named_and_after(running, tmp_path, monkeypatch):
    """What a power loss needs and no kill can show: the order of syncs, the rename and the removals."""
    running.save(tmp_path / "s")
    steps = []

    def sync(file: int) -> None:
        there = (tmp_path / "s", *(tmp_path / "s").iterdir())
        steps.extend(path.name for path in there if os.path.samestat(path.stat(), os.fstat(file)))

    monkeypatch.setattr(session_files, "sync", sync)
    replace, unlink = os.replace, os.unlink
    monkeypatch.setattr(session_files.os, "replace", lambda *a, **k: (steps.append("rename"), replace(*a, **k)))
    monkeypatch.setattr(session_files.os, "unlink", lambda name, **k: (steps.append(f"remove {name}"), unlink(name, **k)))
    running.go(80)
    running.save(tmp_path / "s")
    steps.remove(f"remove {MANIFEST}.tmp")  # none was there
    written = ["pages-000002.bin", "state-000002.json", "arrays-000002.npz", "cells-000002.bin"]
    assert steps[:8] == [*written, "s", f"{MANIFEST}.tmp", "rename", "s"]
    assert {"remove state-000001.json", "remove arrays-000001.npz", "remove cells-000001.bin"} <= set(steps[8:])


# ---------------------------------------------------------------- full disks


class FullDisk:
    """In the place of os.write: room for so many bytes more, and the last write comes short, as a real one does."""

    def __init__(self, room_bytes: int) -> None:
        self.left = room_bytes

    def __call__(self, file: int, data: memoryview) -> int:
        if not self.left:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        n = os.write(file, data[: self.left])
        self.left -= n
        return n


def test_a_full_disk_leaves_the_old_session_and_none_of_the_new(running, tmp_path, monkeypatch):
    place = tmp_path / "s"
    saved = running.save(place)
    before = {path.name: path.read_bytes() for path in place.iterdir()}
    tokens_then = session.load(place).completion_tokens
    running.go(15)
    no_room = FullDisk(0)
    for name, full in [("write", FullDisk(room)) for room in (0, 1, 5000, 100_000, 300_000)] + [("rename", no_room)]:
        with monkeypatch.context() as patched:
            if name == "write":
                patched.setattr(session_files, "write", full)
            else:  # the last step of all
                patched.setattr(session_files.os, "replace", lambda *a, **k: full(0, b"x"))
            with pytest.raises(SessionError, match="No space left on device after .* the one saved before is whole"):
                running.save(place)
        assert {path.name: path.read_bytes() for path in place.iterdir()} == before
    assert running.save(place).written_bytes > 0
    assert session.load(place).completion_tokens == tokens_then + 15


def test_a_full_disk_at_the_first_save_leaves_nothing(running, tmp_path, monkeypatch):
    monkeypatch.setattr(session_files, "write", FullDisk(1000))
    with pytest.raises(SessionError, match="nothing is saved there"):
        running.save(tmp_path / "s")
    assert list((tmp_path / "s").iterdir()) == []


LIMITED = """
import resource, signal, sys
sys.path.insert(0, {here!r})
from zoomr_local.session_files import SessionDirectory
from zoomr_local.errors import SessionError
from pathlib import Path
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    with SessionDirectory.writing(Path({place!r})) as directory, directory.replacing() as new:
        new.put("cells", ".bin", bytes(300_000))
except SessionError as error:
    print(error)
"""


def test_a_limit_of_the_kernel_is_an_error_like_a_full_disk(running, tmp_path):
    """The system itself refuses the write here, after it took a part."""
    running.save(tmp_path / "s")
    before = sorted(path.name for path in (tmp_path / "s").iterdir())
    code = LIMITED.format(here=str(HERE), place=str(tmp_path / "s"))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "File too large after 100000 bytes; the one saved before is whole" in done.stdout, done.stderr
    assert sorted(path.name for path in (tmp_path / "s").iterdir()) == before and session.load(tmp_path / "s")


# ---------------------------------------------------------------- other people's files


def test_a_directory_with_other_files_is_left_alone(running, tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(SessionError, match=r"holds what is not a session \(thesis.txt\)"):
        running.save(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_links_are_not_followed(running, tmp_path):
    (tmp_path / "s").mkdir()
    (tmp_path / "victim").write_text("mine")
    (tmp_path / "s" / "cells-000001.bin").symlink_to(tmp_path / "victim")
    (tmp_path / "s" / "session.json.tmp").symlink_to(tmp_path / "victim")
    running.save(tmp_path / "s")
    assert (tmp_path / "victim").read_text() == "mine" and session.load(tmp_path / "s")
    assert not any(path.is_symlink() for path in (tmp_path / "s").iterdir())


def test_one_at_a_time(running, tmp_path):
    running.save(tmp_path / "s")
    with SessionDirectory.reading(tmp_path / "s"):
        with SessionDirectory.reading(tmp_path / "s"):
            pass
        with pytest.raises(SessionError, match="another process is using"):
            running.save(tmp_path / "s")
    with SessionDirectory.writing(tmp_path / "s"), pytest.raises(SessionError, match="another process is using"):
        session.load(tmp_path / "s")


def test_a_session_of_somebody_else_in_the_directory_is_replaced_with_its_pages(running, model, prompt, tmp_path):
    """Pages that this generation saved there before are not taken for granted once another session was there."""
    running.save(tmp_path / "s")
    other = Engine(model, EngineConfig(**CONFIG))
    for event in other.generate(prompt[5:], SamplingParams(**WARM), 200):
        if isinstance(event, TokenDecoded) and event.position > len(prompt) + 90:
            break
    other.save(tmp_path / "s")
    running.go(5)
    running.save(tmp_path / "s")
    rest = [e.token for e in running._stream if isinstance(e, TokenDecoded)]
    other.load(tmp_path / "s")
    assert [e.token for e in other.resume() if isinstance(e, TokenDecoded)] == rest
    other.close()


# ---------------------------------------------------------------- damage


def sealed(place: Path, change) -> None:
    """Change the manifest and give it a checksum that fits."""
    manifest = json.loads((place / MANIFEST).read_text())
    del manifest["checksum"]
    change(manifest)
    manifest["checksum"] = session_files._digest(session_files._canonical(manifest))
    (place / MANIFEST).write_text(json.dumps(manifest))


@pytest.fixture
def place(running, tmp_path) -> Path:
    running.save(tmp_path / "s")
    return tmp_path / "s"


@contextlib.contextmanager
def put_back(place: Path):
    before = {path: path.read_bytes() for path in place.iterdir()}
    yield
    for path in place.iterdir():
        path.unlink()
    for path, data in before.items():
        path.write_bytes(data)


def test_whatever_was_changed_is_said_and_loads_nothing(model, place):
    rng = np.random.default_rng(0)
    engine = Engine(model, EngineConfig(**CONFIG))
    for name in sorted(path.name for path in place.iterdir()):
        path = place / name
        size = path.stat().st_size
        for _ in range(6):
            with put_back(place):
                data = bytearray(path.read_bytes())
                kind = rng.integers(4)
                if kind == 0:
                    data[rng.integers(size)] ^= 1 << rng.integers(8)
                elif kind == 1:
                    del data[rng.integers(size) :]
                elif kind == 2:
                    data = bytearray()
                if kind == 3:
                    path.unlink()
                else:
                    path.write_bytes(data)
                with pytest.raises(SessionError, match="damaged|no session|cannot be read|not the manifest|of format") as caught:
                    engine.load(place)
                assert str(place) in str(caught.value)
    assert engine.load(place).completion_tokens == 60
    assert isinstance(list(engine.resume())[-1], Finished)
    engine.close()


@pytest.mark.parametrize("change", [
    lambda m: m.update(pages=[]),
    lambda m: m.update(pages=None),
    lambda m: m.pop("parts"),
    lambda m: m.update(files={}),
    lambda m: m["pages"][0].update(bytes=2**60),
    lambda m: m["pages"][0].update(bytes=-1),
    lambda m: m["pages"][0].update(offset=-5),
    lambda m: m["pages"][0].update(file="../../etc/passwd"),
    lambda m: m["pages"][0].update(block="x"),
    lambda m: m["pages"][0].update(raw_bytes=3),
    lambda m: m["pages"][0].update(first=3),
    lambda m: m["pages"].pop(0),
    lambda m: m["pages"].append(m["pages"][0]),
    lambda m: m["parts"].update(cells=m["parts"]["arrays"]),
    lambda m: m["parts"].update(state="/etc/passwd"),
    lambda m: m["parts"].update(state=m["parts"]["cells"]),
    lambda m: m.update(reserved_tokens="x"),
    lambda m: m.update(note=7),
    lambda m: m.update(made_with=None),
])
def test_a_forged_manifest_is_an_error_and_not_a_crash(model, place, change):
    sealed(place, change)
    engine = Engine(model, EngineConfig(**CONFIG))
    try:
        engine.load(place)
    except SessionError as error:
        assert str(place) in str(error)
    else:
        pytest.fail("it was loaded")
    finally:
        assert [e for e in engine.generate([5, 6, 7], SamplingParams(), 3)], "the engine still works"
        engine.close()


def test_a_manifest_that_cannot_be_read_is_an_error_and_not_a_crash(running, tmp_path):
    (tmp_path / MANIFEST).mkdir()
    with pytest.raises(SessionError, match="could not be saved"):
        running.save(tmp_path)
    with pytest.raises(SessionError, match="session.json cannot be read: Is a directory"):
        running.load(tmp_path)


def test_pages_that_find_no_room_on_the_disk_are_lost_blocks_and_said(model, prompt, tmp_path, monkeypatch):
    """Not a damaged session: it goes on without them, as a generation does."""
    config = EngineConfig(**CONFIG, kv_ram=0, kv_dir=tmp_path / "pages")
    engine = Engine(model, config)
    for event in engine.generate(prompt, SamplingParams(**WARM), 200):
        if isinstance(event, TokenDecoded) and event.position > len(prompt) + 60:
            break
    engine.save(tmp_path / "s")
    n_pages, half = len(engine.store.keys()), engine.store.disk_bytes // 2
    monkeypatch.setattr(pagefile.os, "write", FullAfter(half))
    engine.load(tmp_path / "s")
    monkeypatch.undo()
    events = list(engine.resume())
    lost = [e for e in events if isinstance(e, BlockLost)]
    assert 0 < len(lost) < n_pages and {e.reason for e in lost} == {"No space left on device"}
    assert len([e for e in events if isinstance(e, Warned)]) == 1
    assert isinstance(events[-1], Finished) and len(lost) <= events[-1].cache.faults < n_pages  # a block whose rows are in cells is not lost
    engine.close()


def test_another_format_is_named(place):
    sealed(place, lambda m: m.update(format=1))
    with pytest.raises(SessionError, match="a session of format 1, this version of zoomr reads format 2"):
        session.load(place)


def test_a_damaged_session_is_replaced_by_the_next_save(running, place):
    (place / MANIFEST).write_bytes(b"{")
    running.go(3)
    running.save(place)
    assert session.load(place).completion_tokens == 63
