"""Finished pieces of a long run, on the disk as they finish, so that the same command goes on after any kind of end."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

UNKNOWN = "unknown"


class Journal:
    """Lines of JSON, one a finished piece, for one set of settings: other settings have another file.

    A torn last line, of a process that was killed while it wrote, is forgotten. Each line has the ``commit`` that its piece was
    measured at, because the same command may go on at another one.
    """

    def __init__(self, folder: Path, name: str, settings: dict[str, Any], fresh: bool = False, commit: str = UNKNOWN) -> None:
        digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:10]
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / f"{name}-{digest}.jsonl"
        self.pieces: dict[str, Any] = {}
        self.commit, self._made_at = commit, {}
        if fresh:
            self.path.unlink(missing_ok=True)
        whole = b""
        for line in self.path.read_bytes().splitlines(keepends=True) if self.path.exists() else []:
            try:
                key, value, *more = json.loads(line)
            except ValueError:
                break
            if not line.endswith(b"\n"):
                break
            self.pieces[key] = value
            self._made_at[key] = more[0] if more else UNKNOWN
            whole += line
        self.path.write_bytes(whole)

    def __contains__(self, key: str) -> bool:
        return key in self.pieces

    def __getitem__(self, key: str) -> Any:
        return self.pieces[key]

    def add(self, key: str, value: Any) -> None:
        """Keep a finished piece."""
        self.pieces[key] = json.loads(json.dumps(value))
        with self.path.open("a") as file:
            file.write(json.dumps([key, value, self.commit]) + "\n")
            file.flush()
        self._made_at[key] = self.commit

    def commits(self) -> list[str]:
        """The commits that the pieces were measured at, in their order; pieces of before that was kept are of an unknown one."""
        return list(dict.fromkeys(self._made_at.values()))

    def done(self) -> None:
        """The run is complete and its result is written: the pieces are not needed any more."""
        self.path.unlink(missing_ok=True)
