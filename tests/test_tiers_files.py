"""Page files and their directory: whole or not there, private, and gone when their process is."""

import fcntl
import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from tiers import FINGERPRINT, FullAfter, content, opened, page_files, put

from zoomr_local.errors import StorageError
from zoomr_local.tiers import PageStore, RawPages, TierLimits, directory, pagefile
from zoomr_local.tiers.directory import PageDirectory, default_base, free_bytes
from zoomr_local.tiers.pagefile import HEADER_BYTES, PageFileError, PageInfo, read_page, write_page

KEY = (3, "summary")
INFO = PageInfo(KEY, FINGERPRINT, "q8_0", 40, 7, 9000, 5000)


@pytest.fixture
def written(tmp_path):
    """(path, checksum) of a page file that is sound."""
    path = tmp_path / "page-1-3-summary.page"
    return path, write_page(path, INFO, content(KEY, 5000))


def read(path, checksum, info=INFO):
    out = np.zeros(info.stored_bytes, np.uint8)
    read_page(path, info, checksum, out)
    return out


def test_what_was_written_is_read_and_nobody_else_may(written, tmp_path):
    path, checksum = written
    np.testing.assert_array_equal(read(path, checksum), content(KEY, 5000))
    assert path.stat().st_size == INFO.file_bytes == HEADER_BYTES + 5000
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert os.listdir(tmp_path) == [path.name], "nothing temporary is left"


def broken(data: bytes):
    """Page files that are not the one that was written, by what happened to them."""
    for at in (0, 9, 16, 40, 60, HEADER_BYTES - 1, HEADER_BYTES, len(data) - 1):
        yield f"bit flipped at {at}", data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]
    for size in (0, 7, HEADER_BYTES - 1, HEADER_BYTES, len(data) - 1):
        yield f"cut off at {size}", data[:size]
    yield "something behind it", data + b"x"
    yield "zeros instead of data, as after a crash", data[:HEADER_BYTES] + bytes(len(data) - HEADER_BYTES)
    yield "all zeros", bytes(len(data))


def test_a_file_that_was_changed_is_refused(written):
    path, checksum = written
    data = path.read_bytes()
    for what, bad in broken(data):
        path.write_bytes(bad)
        with pytest.raises(PageFileError):
            read(path, checksum)
            pytest.fail(what)
    path.write_bytes(data)
    read(path, checksum)


@pytest.mark.parametrize("field, value", [
    ("key", (4, "summary")), ("key", (3, "detail")), ("fingerprint", b"another model..."), ("page_type", "f16"), ("first", 41),
    ("n_tokens", 8), ("raw_bytes", 9001),
])  # fmt: skip
def test_a_sound_file_of_another_page_is_refused(written, field, value):
    path, checksum = written
    with pytest.raises(PageFileError, match="header"):
        read(path, checksum, INFO.__class__(**{**INFO.__dict__, field: value}))


def test_a_sound_file_with_other_data_for_the_same_page_is_refused(written, tmp_path):
    path, checksum = written
    write_page(tmp_path / "other.page", INFO, content((9, "detail"), 5000))
    os.replace(tmp_path / "other.page", path)
    with pytest.raises(PageFileError, match="header"):
        read(path, checksum)


def test_links_and_directories_in_the_place_of_a_page_are_not_followed(written, tmp_path):
    path, checksum = written
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError):
        read(path, checksum)
    with pytest.raises(OSError):
        write_page(path.with_name("missing") / "x.page", INFO, content(KEY, 5000))


def test_a_page_that_could_not_be_written_leaves_no_file(tmp_path, monkeypatch):
    path = tmp_path / "page-1-3-summary.page"
    monkeypatch.setattr(pagefile.os, "write", FullAfter(3000))
    with pytest.raises(OSError, match="No space left"):
        write_page(path, INFO, content(KEY, 5000))
    assert os.listdir(tmp_path) == []


def test_a_page_has_its_name_only_once_it_is_whole(tmp_path, monkeypatch):
    path, names = tmp_path / "page-1-3-summary.page", []
    write = os.write

    def watched(file, data):
        names.append(os.listdir(tmp_path))
        return write(file, memoryview(data)[:999])

    monkeypatch.setattr(pagefile.os, "write", watched)
    write_page(path, INFO, content(KEY, 5000))
    assert len(names) > 5 and all(name == ["page-1-3-summary.tmp"] for name in names)


def test_the_directory_is_private_and_files_too_whatever_the_umask(tmp_path):
    before = os.umask(0)
    try:
        store = opened(tmp_path, 0, 1 << 20)
        put(store, 0, 100)
        store.settle(wait=True)
    finally:
        os.umask(before)
    (directory,) = tmp_path.iterdir()
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700
    assert {stat.S_IMODE(file.stat().st_mode) for file in directory.iterdir()} == {0o600}
    store.close()
    assert os.listdir(tmp_path) == []


CHILD = """
import os, sys, time
sys.path.insert(0, {tests!r})
from pathlib import Path
from tiers import opened, put
store = opened(Path({base!r}), 0, 1 << 20)
for block in range(5):
    put(store, block, 5000)
store.settle(wait=True)
print(os.getpid(), flush=True)
{end}
"""


def child(base: Path, end: str) -> subprocess.Popen:
    """A process that has five pages in a directory below ``base`` and then does ``end``."""
    code = CHILD.format(tests=str(Path(__file__).parent), base=str(base), end=end)
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline().strip() == str(process.pid), process.stderr.read()
    return process


@pytest.mark.parametrize("end", ["pass", "sys.exit(3)", "raise RuntimeError", "raise KeyboardInterrupt", "store = None"])
def test_the_directory_is_gone_when_its_process_ends_however_it_ends(tmp_path, end):
    process = child(tmp_path, end)
    process.communicate(timeout=60)
    assert os.listdir(tmp_path) == []


def test_a_forked_child_leaves_its_parents_pages_alone(tmp_path):
    end = "pid = os.fork()\nif pid: os.waitpid(pid, 0); print(len(list(Path({!r}).rglob('*.page'))))\nelse: sys.exit()"
    out, _ = child(tmp_path, end.format(str(tmp_path))).communicate(timeout=60)
    assert out.strip() == "5"


def test_what_a_killed_process_left_is_deleted_at_the_next_start_and_not_before(tmp_path):
    process = child(tmp_path, "time.sleep(60)")
    PageDirectory(tmp_path).close()
    assert len(page_files(tmp_path)) == 5, "its process lives"
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    assert len(page_files(tmp_path)) == 5
    PageDirectory(tmp_path).close()
    assert os.listdir(tmp_path) == []


@pytest.fixture
def dead_pid():
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait(timeout=60)
    return process.pid


def test_only_what_is_ours_is_deleted(tmp_path, dead_pid):
    stale = tmp_path / f"zoomr-{dead_pid}-00000000"
    mixed = tmp_path / f"zoomr-{dead_pid}-11111111"
    locked = tmp_path / f"zoomr-{dead_pid}-22222222"
    elsewhere = tmp_path / "notes"
    kept = [mixed / "thesis.txt", elsewhere / "page-1-1-detail.page", tmp_path / f"zoomr-{dead_pid}-nothex00" / "lock",
            tmp_path / f"zoomr-{os.getpid()}-33333333" / "lock", locked / "lock", locked / "page-1-0-detail.page"]  # fmt: skip
    gone = [stale / "lock", stale / "page-1-0-detail.page", stale / "page-1-1-summary.tmp", mixed / "page-1-0-detail.page"]
    for file in kept + gone:
        file.parent.mkdir(exist_ok=True)
        file.write_text(directory._machine())
    os.utime(mixed, (0, 0))  # it has no lock, and not only just now
    link = tmp_path / f"zoomr-{dead_pid}-44444444"
    link.symlink_to(elsewhere)
    (tmp_path / f"zoomr-{dead_pid}-55555555").write_text("a file")
    with open(locked / "lock") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        PageDirectory(tmp_path).close()
    assert all(file.exists() for file in kept) and not any(file.exists() for file in gone)
    assert not stale.exists() and link.is_symlink() and (tmp_path / f"zoomr-{dead_pid}-55555555").exists()


@pytest.mark.parametrize("machine, days, stays", [
    ("{host} {boot}", 0, False),
    ("{host} an-earlier-start", 0, False),
    ("a-container {boot}", 0, False),
    ("elsewhere another-start", 0, True),
    ("elsewhere another-start", 29, True),
    ("elsewhere another-start", 31, False),
    ("", 0, True),  # written by nobody we know: perhaps about to be
    (None, 0, True),  # no lock yet
    (None, 1, False),
])
def test_what_another_machine_may_still_use_stays(tmp_path, dead_pid, machine, days, stays, monkeypatch):
    """In a folder that machines share their processes' numbers say nothing here, and locks may not either."""
    host, boot = directory._machine().split(" ")
    path = tmp_path / f"zoomr-{dead_pid}-00000000"
    path.mkdir()
    (path / "page-1-0-detail.page").write_text("x")
    if machine is not None:
        (path / "lock").write_text(machine.format(host=host, boot=boot or "a-start"))
    monkeypatch.setattr(directory, "_machine", lambda: f"{host} {boot or 'a-start'}")
    os.utime(path, (time.time() - 86_400 * days,) * 2)
    PageDirectory(tmp_path).close()
    assert path.exists() == stays


def test_a_directory_that_cannot_be_written_to_is_refused_early(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(StorageError, match=r"cannot be written to .*file.*--kv-dir.*--kv-disk 0"):
        PageStore(TierLimits(0, 1 << 20, tmp_path / "file"))
    PageStore(TierLimits(1 << 20, 0, tmp_path / "file")).close()  # without a disk tier it is not looked at


def test_a_disk_without_the_room_is_refused_with_the_numbers_before_anything_is_stored(tmp_path):
    store = PageStore(TierLimits(0, 1 << 60, tmp_path))
    with pytest.raises(StorageError, match=r"up to 1048576 TiB.*free; lower --kv-disk \(now 1048576 TiB\).*--kv-dir"):
        store.begin(RawPages(), FINGERPRINT, 1 << 62)
    store.begin(RawPages(), FINGERPRINT, free_bytes(tmp_path) // 2)
    store.close()


def test_what_a_killed_run_left_makes_room_before_room_is_measured(tmp_path, dead_pid, monkeypatch):
    left = tmp_path / f"zoomr-{dead_pid}-00000000"
    left.mkdir()
    (left / "lock").write_text(directory._machine())
    (left / "page-1-0-detail.page").write_text("x")
    monkeypatch.setattr("zoomr_local.tiers.store.free_bytes", lambda base: 0 if left.exists() else 1 << 30)
    store = PageStore(TierLimits(0, 1 << 20, tmp_path))
    store.begin(RawPages(), FINGERPRINT, 1 << 20)
    store.close()


def test_pages_go_to_the_users_cache_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_base() == tmp_path / "zoomr-local"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert default_base().is_relative_to(Path.home())
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    store = PageStore(TierLimits(0, 1 << 20))
    store.begin(RawPages(), FINGERPRINT, 1 << 20)
    put(store, 0, 100)
    store.settle(wait=True)
    assert len(page_files(tmp_path / "zoomr-local")) == 1
    store.close()
    assert page_files(tmp_path) == []


def test_a_user_without_a_home_folder_is_told_what_to_set(monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("HOME")
    monkeypatch.setattr("pwd.getpwuid", lambda number: {}[number])
    with pytest.raises(StorageError, match="no home folder for pages; set HOME or XDG_CACHE_HOME, name a directory with --kv-dir"):
        default_base()
