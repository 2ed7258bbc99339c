"""The finished replies of problems that are not finished: what `solve` has of a vote or of a second try when it is killed.

One file beside the output, `OUT.attempts`, a JSON line a reply, each on the disk before the next one starts; the
output's lock guards it. A problem's lines are of no use once its record is written, and the file goes with the last.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


class AttemptLog:
    """``path`` None: nothing outlives the process."""

    def __init__(self, path: Path | None = None) -> None:
        """Reads what is there; a torn last line is dropped, as are lines that are none of ours."""
        self.path = path
        self._known: dict[tuple[str, int, int], dict[str, Any]] = {}
        if path is not None and path.exists():
            for line in path.read_bytes().split(b"\n"):
                try:
                    data = json.loads(line)
                    self._known[data["key"], data["vote"], data["attempt"]] = dict(data["result"], seconds=float(data["result"]["seconds"]))
                except (ValueError, LookupError, TypeError):
                    continue

    @classmethod
    def beside(cls, output: Path) -> AttemptLog:
        """The log of an output."""
        return cls(output.with_name(output.name + ".attempts"))

    @property
    def count(self) -> int:
        """How many replies are known."""
        return len(self._known)

    def keep(self, keys: set[str]) -> int:
        """Forget all but the replies to problems with these resume keys; returns how many are left."""
        self._known = {name: result for name, result in self._known.items() if name[0] in keys}
        self._rewrite()
        return self.count

    def get(self, key: str, vote: int, attempt: int) -> dict[str, Any] | None:
        """The result of one reply, None if it was not made yet. ``seconds`` in it is how long it took."""
        found = self._known.get((key, vote, attempt))
        return None if found is None else dict(found)

    def add(self, key: str, vote: int, attempt: int, result: dict[str, Any]) -> None:
        """One more; on the disk when this returns. Raises OSError (disk full)."""
        if self.path is None:
            return
        self._known[key, vote, attempt] = dict(result)
        line = json.dumps({"key": key, "vote": vote, "attempt": attempt, "result": result}).encode() + b"\n"
        try:
            with self.path.open("ab") as file:
                file.write((b"" if not file.tell() or self._ends_whole() else b"\n") + line)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self.path)) from error

    def forget(self, key: str) -> None:
        """The problem's record is on the disk."""
        if any(name[0] == key for name in self._known):
            self.keep({name[0] for name in self._known} - {key})

    def _ends_whole(self) -> bool:
        with self.path.open("rb") as file:
            file.seek(-1, os.SEEK_END)
            return file.read(1) == b"\n"

    def _rewrite(self) -> None:
        if self.path is None or not self.path.exists():
            return
        if not self._known:
            self.path.unlink()
            return
        new = self.path.with_name(self.path.name + ".new")
        lines = (json.dumps({"key": k, "vote": v, "attempt": a, "result": r}) + "\n" for (k, v, a), r in self._known.items())
        with new.open("wb") as file:
            file.write("".join(lines).encode())
            file.flush()
            os.fsync(file.fileno())
        os.replace(new, self.path)
