"""The directory of page files: one a process, private, gone when the process is.

Page directories are named ``zoomr-PID-RANDOM`` and hold a locked file while their process lives, which says on which
machine. What a killed process left is deleted at the next start: only directories of that name, of the same user, whose process is
gone and whose lock is free, and in them only files that are named as ours. Of another machine's directory (a folder may be shared)
neither process id nor lock need say anything here: it is deleted a month after its last page.
"""

from __future__ import annotations

import fcntl
import os
import re
import secrets
import socket
import stat
import time
import weakref
from contextlib import suppress
from pathlib import Path

from ..errors import StorageError
from ..folders import user_folder
from .pagefile import remove

_DIRECTORY = re.compile(r"zoomr-(\d+)-[0-9a-f]{8}")
_FILE = re.compile(r"lock|page-\d+-\d+-(detail|summary)\.(page|tmp)")
_LOCK = "lock"
_BOOT = Path("/proc/sys/kernel/random/boot_id")
_MONTH, _MINUTE = 30 * 86_400.0, 60.0  # seconds


def default_base() -> Path:
    """Where page directories are made unless --kv-dir says otherwise: the user's cache folder.

    Raises StorageError where nobody knows this user's home folder, as in a container that runs as any number.
    """
    folder = user_folder("cache")
    if folder is None:
        raise StorageError(
            "this user has no home folder for pages; set HOME or XDG_CACHE_HOME, name a directory with --kv-dir, or do without"
            " the disk tier: --kv-disk 0"
        )
    return folder


def check_base(base: Path) -> None:
    """Raises StorageError unless files can be made in ``base``, which is made if it is missing."""
    probe = base / f"zoomr-probe-{os.getpid()}-{secrets.token_hex(4)}"
    try:
        base.mkdir(parents=True, exist_ok=True)
        probe.mkdir(mode=0o700)
        probe.rmdir()
    except OSError as error:
        raise StorageError(
            f"pages cannot be written to {base}: {error.strerror}; name another directory with --kv-dir,"
            " or do without the disk tier: --kv-disk 0"
        ) from None


def free_bytes(base: Path) -> int:
    """Bytes that this user may still write to the file system of ``base``, or of what it will be made in."""
    at = base.absolute()
    while not at.exists() and at != at.parent:
        at = at.parent
    fs = os.statvfs(at)
    return fs.f_bavail * fs.f_frsize


class PageDirectory:
    """This process's directory below ``base``; it exists from construction until ``close`` or the process's end."""

    def __init__(self, base: Path) -> None:
        """Deletes what dead processes left in ``base``. Raises StorageError if nothing can be written there."""
        check_base(base)
        remove_stale(base)
        self.path = base / f"zoomr-{os.getpid()}-{secrets.token_hex(4)}"
        try:
            self.path.mkdir(mode=0o700)
            lock = os.open(self.path / _LOCK, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise StorageError(f"{self.path} cannot be made: {error.strerror}; name another directory with --kv-dir") from None
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            pass  # a file system without locks: machine and process id say whether we live
        with suppress(OSError):  # a full disk: what nobody can place is kept for a month
            os.write(lock, _machine().encode())
        self._end = weakref.finalize(self, _remove_own, self.path, lock, os.getpid())

    def page_path(self, generation: int, block: int, part: str) -> Path:
        """The file of one page; generations never share a name."""
        return self.path / f"page-{generation}-{block}-{part}.page"

    def close(self) -> None:
        """Delete the directory and what is in it. Safe to call twice."""
        self._end()


def stale(base: Path) -> list[Path]:
    """The page directories in ``base`` that dead processes of this user left."""
    try:
        entries = list(os.scandir(base))
    except OSError:
        return []
    found = []
    for entry in entries:
        match = _DIRECTORY.fullmatch(entry.name)
        if match and _is_own(Path(entry.path)) and not _alive(int(match.group(1))) and _abandoned(Path(entry.path)):
            found.append(Path(entry.path))
    return found


def remove_stale(base: Path) -> None:
    """Delete the page directories in ``base`` that dead processes of this user left."""
    for path in stale(base):
        _remove_files(path)


def _is_own(path: Path) -> bool:
    try:
        info = os.lstat(path)
    except OSError:
        return False
    return stat.S_ISDIR(info.st_mode) and info.st_uid == os.getuid()


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):  # somebody else's, or no process id at all: keep out
        return True
    return True


def _machine() -> str:
    """This machine's name and, where there is one, the number of its last start, which containers on it share: "NAME BOOT"."""
    try:
        boot = _BOOT.read_text().strip()
    except OSError:
        boot = ""
    return f"{socket.gethostname()} {boot}"


def _abandoned(path: Path) -> bool:
    """Whether nobody holds the directory's lock: a process in another container has a number that says nothing here."""
    try:
        age = time.time() - path.stat().st_mtime
        file = os.open(path / _LOCK, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        return path.exists() and age > _MINUTE  # it may be about to be locked
    except OSError:
        return False
    try:
        theirs = os.read(file, 1024).decode(errors="replace").partition(" ")
        ours = _machine().partition(" ")
        if theirs[0] != ours[0] and (theirs[2] != ours[2] or not ours[2]) and age < _MONTH:
            return False
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except BlockingIOError:
        return False
    except OSError:
        return True
    finally:
        os.close(file)


def _remove_own(path: Path, lock: int, pid: int) -> None:
    if os.getpid() == pid:  # a forked child must not delete its parent's pages
        _remove_files(path)
        os.close(lock)


def _remove_files(path: Path) -> None:
    try:
        entries = list(os.scandir(path))
    except OSError:
        return
    for entry in entries:
        if _FILE.fullmatch(entry.name):
            remove(Path(entry.path))
    try:
        os.rmdir(path)
    except OSError:
        pass  # something in it is not ours: leave it
