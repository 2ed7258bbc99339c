"""The append-only file of records that survives being killed, and the manifest beside it.

Owns `OUT.jsonl` (one JSON record a line, each flushed and fsynced before the next problem starts) and
`OUT.jsonl.manifest.json` (the settings that every record in it was made with, written atomically before the
first record). `solve` writes through it; any program may read both files with a JSON parser.

What it promises: after SIGKILL or power loss at any moment, every record that was reported as done is whole,
at most one torn line stands at the end, and a second start cuts that line off (and says so) and goes on. One
process at a time: the output itself is locked, and the lock dies with its owner. Records made with
different settings never meet in one file.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from .errors import UsageError
from .files import write_atomically
from .sizes import counted

CHECKOUT, NOT_INSTALLED = "checkout at ", "not installed"
"""How ``versions.zoomr`` begins where a clone is run, and what it is where not even a commit is known."""
_EARLIER = "earlier_zoomr"
_EDGE_BYTES = 1 << 20  # of a model file that are hashed at each end: enough to tell two quantisations apart


@dataclass(frozen=True)
class Manifest:
    """What the records of one output have in common.

    ``settings``, ``model`` and ``versions`` must be equal for a run to be resumed, but for the commit of a clone: whoever
    commits between two starts keeps what is finished. ``info`` (the command, what the policy resolved to, threads, and in
    ``earlier_zoomr`` the commits that earlier records were made at) is kept for the reader and may differ.
    """

    settings: dict[str, Any]
    model: dict[str, Any]
    versions: dict[str, Any]
    info: dict[str, Any] = field(default_factory=dict)

    def differences(self, other: Manifest) -> list[str]:
        """``settings.kv_budget: 512 there, 256 now`` for each compared field in which ``other`` (now) differs."""
        found = []
        if _plain(self.model) != _plain(other.model):
            there, now = self.model.get("file"), other.model.get("file")
            found.append(f"model: {there} there, {now} now" if there != now else f"model: another {now} than there")
        pairs = {"settings": (_plain(self.settings), _plain(other.settings)), "versions": (compared_versions(self.versions), compared_versions(other.versions))}
        for part, (there, now) in pairs.items():
            for name in sorted(there.keys() | now.keys()):
                if there.get(name) != now.get(name):
                    found.append(f"{part}.{name}: {_short(there.get(name))} there, {_short(now.get(name))} now")
        return found

    def fingerprint(self) -> str:
        """A hash over the compared fields, part of every record's key."""
        text = json.dumps([_plain(self.settings), _plain(self.model), compared_versions(self.versions)], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def code(self) -> list[str]:
        """``versions.zoomr`` of every start that records were made in, the last one's last."""
        earlier, now = self.info.get(_EARLIER), self.versions.get("zoomr")
        names = [name for name in earlier if isinstance(name, str)] if isinstance(earlier, list) else []
        return [*(name for name in names if name != now), *([now] if isinstance(now, str) else [])]


def record_key(problem: dict[str, Any], manifest: Manifest) -> str:
    """The resume key of one problem: a hash of what was asked, the reference and all settings."""
    text = json.dumps([_plain(problem), manifest.fingerprint()], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def model_fingerprint(path: Path) -> dict[str, Any]:
    """Name, size in bytes and a SHA-256 of a model file.

    Files over 2 MiB are hashed at both ends only, so that a resume does not read gigabytes: metadata and
    tokenizer stand in the first MiB, the last tensors in the last. Raises OSError if unreadable.
    """
    size = path.stat().st_size
    digest = hashlib.sha256()
    with path.open("rb") as file:
        if size <= 2 * _EDGE_BYTES:
            digest.update(file.read())
        else:
            digest.update(file.read(_EDGE_BYTES))
            file.seek(-_EDGE_BYTES, os.SEEK_END)
            digest.update(file.read())
    whole = size <= 2 * _EDGE_BYTES
    return {"file": path.name, "bytes": size, "sha256": digest.hexdigest(), "hashed": "all" if whole else "both ends"}


@dataclass(frozen=True)
class LineForm:
    """How a record is written as a line and read back; ``read`` raises ValueError for a line that is none."""

    write: Callable[[dict[str, Any]], dict[str, Any]] = lambda record: record
    read: Callable[[dict[str, Any]], dict[str, Any]] = lambda line: line


class Journal:
    """One locked output. Open, check the manifest, then append; close in ``finally`` or use ``with``.

    Nothing is changed on disk before ``begin``, so a refused run leaves the file as it was found.
    """

    def __init__(
        self, path: Path, file: int, records: list[dict[str, Any]], whole_bytes: int, torn_bytes: int, form: LineForm = LineForm()
    ):
        """Use ``Journal.open``."""
        self.path, self._form = path, form
        self.manifest_path = manifest_path(path)
        self.records = records
        self.torn_bytes = torn_bytes
        self._file = file
        self._whole_bytes = whole_bytes
        self._unused = False

    @classmethod
    def open(cls, path: Path, form: LineForm = LineForm(), overwrite: bool = False) -> Journal:
        """Lock ``path`` (made if absent) and read its records; those that will be overwritten are read only to tell a stranger's file.

        Raises UsageError if another process holds it or if a line before the last is not a record.
        """
        made = not os.path.exists(path)
        file = _open_locked(path)
        try:
            with os.fdopen(os.dup(file), "rb") as reader:
                data = reader.read()
            ours = overwrite and manifest_path(path).is_file()
            records, whole = ([], 0) if ours else _read_records(path, data, form, overwrite)
        except BaseException:
            os.close(file)
            raise
        journal = cls(path, file, records, whole, len(data) - whole, form)
        journal._unused = made
        return journal

    def check(self, manifest: Manifest) -> None:
        """Raise UsageError if the records here were made with other settings than ``manifest``'s."""
        if not self.records and not self.torn_bytes:
            return
        held = f"{self.path} holds {counted(len(self.records), 'record')}"
        stored = _read_manifest(self.manifest_path)
        if stored is None:
            raise UsageError(
                f"{held} but {self.manifest_path.name} is missing, so their settings are unknown;"
                " choose another output with -o, or start again with --overwrite"
            )
        differing = stored.differences(manifest)
        if differing:
            raise UsageError(
                f"{held} made with other settings ({'; '.join(differing)});"
                " use those settings, choose another output with -o, or start again with --overwrite"
            )

    def earlier_code(self, manifest: Manifest) -> list[str]:
        """``versions.zoomr`` that the records here were made with where it is not ``manifest``'s: other commits of one clone."""
        stored = _read_manifest(self.manifest_path) if self.records else None
        return [] if stored is None else [name for name in stored.code() if name != manifest.versions.get("zoomr")]

    def begin(self, manifest: Manifest, overwrite: bool = False, keep: Callable[[dict], bool] | None = None) -> None:
        """Make the file ready to append: cut a torn last line, write the manifest.

        ``overwrite`` drops all records; ``keep`` drops those it returns False for (the file is then replaced
        atomically). Raises UsageError as ``check`` does.
        """
        if overwrite:
            self.records, self._whole_bytes, self.torn_bytes = [], 0, 0
        self.check(manifest)
        if earlier := self.earlier_code(manifest):
            manifest = replace(manifest, info={**manifest.info, _EARLIER: earlier})
        self._unused = False
        os.ftruncate(self._file, self._whole_bytes)
        write_atomically(self.manifest_path, (json.dumps(asdict(manifest), indent=1, sort_keys=True) + "\n").encode())
        kept = [r for r in self.records if keep is None or keep(r)]
        if len(kept) != len(self.records):
            self._replace(kept)
        os.fsync(self._file)

    def append(self, record: dict[str, Any]) -> None:
        """Write one record as one line and return when it is on the disk. Raises OSError (disk full)."""
        try:
            _write_line(self._file, self._form.write(record))
            os.fsync(self._file)
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self.path)) from error
        self.records.append(record)

    def close(self) -> None:
        """Release the lock. The files stay, except an empty one that ``open`` made and nothing was begun in."""
        if self._file >= 0:
            if self._unused:
                self.path.unlink(missing_ok=True)
            os.close(self._file)
            self._file = -1

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _replace(self, records: list[dict[str, Any]]) -> None:
        """Put a file with only ``records`` in the output's place, holding a lock at every moment."""
        held: list[int] = []

        def hold(file: int) -> None:
            _lock(file)
            held.append(os.dup(file))  # the lock belongs to the open file, so it outlives the writer's descriptor

        write_atomically(self.path, b"".join(_line(self._form.write(r)) for r in records), before_rename=hold)
        os.close(self._file)
        self._file = held[0]
        fcntl.fcntl(self._file, fcntl.F_SETFL, os.O_APPEND)
        self.records = records


def manifest_path(path: Path) -> Path:
    """Where the manifest of an output stands."""
    return path.with_name(path.name + ".manifest.json")


def _write_line(file: int, record: dict[str, Any]) -> None:
    """Write one record to an open file descriptor, all of it or OSError."""
    data = _line(record)
    while data:
        data = data[os.write(file, data) :]


def _line(record: dict[str, Any]) -> bytes:
    # Half of a surrogate pair can stand in decoded model text; JSON escapes keep it and the line stays UTF-8.
    try:
        return (json.dumps(record, ensure_ascii=False) + "\n").encode()
    except UnicodeEncodeError:
        return (json.dumps(record) + "\n").encode()


def _read_records(path: Path, data: bytes, form: LineForm, overwrite: bool) -> tuple[list[dict[str, Any]], int]:
    """The whole records in ``data`` and the number of bytes they take; what follows them is a torn line.

    A line is whole when its newline is there and it is a JSON object with an id: a kill cuts a line short,
    and a power loss can leave zeros in its place. Only the last line may be damaged.
    """
    records: list[dict[str, Any]] = []
    whole = 0
    *lines, rest = data.split(b"\n")
    for number, line in enumerate(lines, start=1):
        record = _parse_record(line, form)
        if record is None:
            following = len(lines) - number + bool(rest)
            if following:
                cure = f"remove it, as no manifest says that it is ours: rm {path}" if overwrite else "start again with --overwrite"
                raise UsageError(
                    f"{path} line {number} is not a record of zoomr solve, and {counted(following, 'more line')}"
                    f" {'stands' if following == 1 else 'stand'} after it; choose another output with -o, or {cure}"
                )
            break
        records.append(record)
        whole += len(line) + 1
    return records, whole


def _parse_record(line: bytes, form: LineForm) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
        return form.read(record) if isinstance(record, dict) and "id" in record else None
    except ValueError:
        return None


def _read_manifest(path: Path) -> Manifest | None:
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        parts = raw["settings"], raw["model"], raw["versions"], raw.get("info", {})
        if not all(isinstance(part, dict) for part in parts):
            raise TypeError("a part of it is no object")
        return Manifest(*parts)
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(
            f"{path} is not a manifest of zoomr solve ({error}); choose another output with -o,"
            " or start again with --overwrite"
        ) from error


def _open_locked(path: Path) -> int:
    """A descriptor for appending to ``path`` that holds its lock. Raises UsageError if somebody else does."""
    if os.path.exists(path) and not os.path.isfile(path):
        raise UsageError(f"{path} is not a regular file; name a file with -o, or write to standard output with -o -")
    while True:
        try:
            file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise UsageError(f"cannot write {path}: {error.strerror}; choose another output with -o") from error
        try:
            _lock(file)
        except BlockingIOError as error:
            os.close(file)
            raise UsageError(
                f"another process is writing {path}; wait for it to end, or choose another output with -o"
            ) from error
        # Its owner may have replaced the file between our open and our lock: then we hold the lock of a ghost.
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file), os.stat(path)):
                return file
        os.close(file)


def _lock(file: int) -> None:
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def code_of(path: Path) -> list[str]:
    """``versions.zoomr`` of every start that the records of the output ``path`` were made in; empty without a manifest. Raises UsageError for a damaged one."""
    manifest = _read_manifest(manifest_path(path))
    return [] if manifest is None else manifest.code()


def compared_versions(versions: dict[str, Any]) -> dict[str, Any]:
    """``versions`` with every clone alike, and like one whose commit was not known, so that keys do not change with a commit."""
    found = _plain(versions)
    return {**found, "zoomr": NOT_INSTALLED} if str(found.get("zoomr")).startswith(CHECKOUT) else found


def _plain(value: Any) -> Any:
    """``value`` as JSON would give it back: tuples are lists, so that stored and new settings compare equal."""
    return json.loads(json.dumps(value))


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
