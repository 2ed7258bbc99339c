"""The unfinished problem of a run of `solve`, saved now and then, so that a killed run goes on in the middle of it.

`solve.py` asks this when a problem begins, after every event and when its record is on the disk; the command line
makes it. A checkpoint is a session (`session.py`) in a directory of its own below the user's, named by the problem's
resume key, and its note says which run it belongs to. One that does not fit is thrown away, and said, only if it is
this run's own; anybody else's is refused before anything is decoded.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from .errors import EngineError, SessionError, UnsupportedModel, UsageError
from .events import Event
from .journal import Manifest
from .session_files import SessionDirectory
from .sizes import counted

EVERY_SECONDS = 30.0
"""Between two saves: little enough to lose, and seldom enough not to be felt."""

Say = Callable[[str], None]

_KEY = re.compile(r"[0-9a-f]{16}")


class Checkpoint:
    """One problem's place on disk. ``resumed`` counts the times that it was taken up; ``warnings`` are what the
    events before that said, ``seconds`` what earlier processes spent on it, and ``failures`` the saves that failed in
    this process."""

    def __init__(self, path: Path, run: dict[str, Any], every_seconds: float, say: Say, tell: Say) -> None:
        self.path, self._run, self._every, self._say, self._tell = path, run, every_seconds, say, tell
        self.resumed = self.failures = 0
        self.warnings: list[str] = []
        self.seconds = 0.0
        self._saved = self._began = time.monotonic()

    def events(self, engine: Any, start: Callable[[], Iterator[Event]], label: str, seed: int | None = None) -> Iterator[Event]:
        """The remaining events of what is saved here, or those of ``start()`` if nothing is, or nothing that fits.

        With ``seed``: what is saved of a reply with another one is of an earlier reply, which has ended, and is removed.
        """
        self._began = time.monotonic()
        if not self.path.exists():
            return start()
        try:
            session = engine.load(self.path)
            resumed, warnings = int(session.note["resumed"]) + 1, [str(text) for text in session.note["warnings"]]
            seconds = float(session.note.get("seconds", 0.0))
            if seed is not None and session.state["sampling"]["seed"] != seed:
                self.remove()
                return start()
        except (SessionError, LookupError, TypeError, ValueError) as error:
            self._say(f"{label}: the checkpoint does not fit and is thrown away, so it starts from the beginning ({error})")
            self.remove()
            return start()
        self.resumed, self.warnings, self.seconds = resumed, warnings, seconds
        self._tell(f"{label}: goes on after {counted(session.completion_tokens, 'token')} of its reply, saved in {self.path.parent}")
        self._saved = time.monotonic()
        return engine.resume()

    def tick(self, engine: Any, warnings: list[str], now: bool = False) -> None:
        """Save, if it is time or ``now``. A save that fails is said once and tried again when it is time."""
        if not now and time.monotonic() - self._saved < self._every:
            return
        try:
            seconds = round(self.seconds + time.monotonic() - self._began, 3)
            engine.save(self.path, {"run": self._run, "resumed": self.resumed, "warnings": warnings, "seconds": seconds})
        except (SessionError, UnsupportedModel, EngineError) as error:
            self.failures += 1
            if self.failures == 1:  # after a failed step its own error is still to come, and must come through
                self._say(f"warning: {error}; {'nothing is saved' if isinstance(error, EngineError) else 'decoding goes on'}")
        self._saved = time.monotonic()

    def remove(self) -> None:
        """Delete what is saved here; what cannot be is said and left for the next start."""
        if not self.path.exists():
            return
        try:
            with SessionDirectory.writing(self.path) as directory:
                directory.remove()
        except SessionError as error:
            self._say(f"warning: a checkpoint that is not needed any more stays: {error}")


class Checkpoints:
    """The checkpoints of one run below ``directory``."""

    def __init__(
        self, directory: Path, manifest: Manifest, output: Path, every_seconds: float = EVERY_SECONDS,
        say: Say = lambda text: None, tell: Say = lambda text: None,
    ) -> None:
        """``say`` hears of what is thrown away or fails, ``tell`` of what goes well."""
        self.directory, self._manifest, self._every = directory, manifest, every_seconds
        self._say, self._tell = say, tell
        settings = {"settings": manifest.settings, "model": manifest.model, "versions": manifest.versions}
        self._run = {**settings, "output": str(output.resolve())}
        self._unused: list[tuple[str, str]] = []

    def of(self, key: str) -> Checkpoint:
        """The checkpoint of the problem with this resume key, whether or not there is one yet."""
        return Checkpoint(self.directory / key, self._run, self._every, self._say, self._tell)

    def check(self, keys: set[str], left: set[str], overwrite: bool = False) -> None:
        """Look at what is there before anything is decoded. ``keys``: of all problems; ``left``: of those to solve.

        Makes the directory (mode 0700). Notes for `prune` the checkpoints of this run whose problem is done or
        whose save was never finished, and with ``overwrite`` all of this run's. Raises UsageError for anything that
        is not this run's.
        """
        try:
            self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            names = sorted(path.name for path in self.directory.iterdir())
        except OSError as error:
            raise UsageError(f"--checkpoint {self.directory}: {error.strerror}; name another directory") from None
        unused: list[tuple[str, str]] = []
        for name in names:
            path = self.directory / name
            if not _KEY.fullmatch(name) or not path.is_dir():
                raise UsageError(f"--checkpoint {self.directory} holds {name}, which is no checkpoint; name another directory")
            reason = self._reason(path, name in keys)
            if name in keys and name not in left:
                reason = "its problem is done"
            if name in keys and overwrite:
                reason = "--overwrite starts its problem again"
            if reason:
                unused.append((name, reason))
        self._unused = unused

    def prune(self) -> None:
        """Remove, and say so, what `check` found to be of no use: once nothing can refuse the run any more."""
        for name, reason in self._unused:
            self._say(f"{self.directory / name}: {reason}; it is thrown away")
            self.of(name).remove()

    def close(self) -> None:
        """Remove the directory if nothing is left in it."""
        try:
            self.directory.rmdir()
        except OSError:
            pass

    def _reason(self, path: Path, ours: bool) -> str | None:
        """Why this run's own checkpoint is of no use, or None. Raises UsageError for somebody else's."""
        try:
            with SessionDirectory.reading(path) as directory:
                manifest = directory.manifest()
            run = None if manifest is None else manifest["note"].get("run")
        except (SessionError, LookupError, AttributeError) as error:
            if ours:
                return f"the checkpoint is damaged ({error})"
            raise UsageError(f"{path} is no checkpoint of this run ({error}); name another directory with --checkpoint") from None
        if run is None and ours:
            return "nothing was saved in it yet"
        differing = self._differences(run)
        if differing:
            raise UsageError(
                f"{path} is the checkpoint of another run ({'; '.join(differing)}); go on with that run's command, name"
                f" another directory with --checkpoint, or remove it: rm -r {path}"
            )
        return None

    def _differences(self, run: Any) -> list[str]:
        try:
            there = Manifest(run["settings"], run["model"], run["versions"])
            found = there.differences(self._manifest)
            if run["output"] != self._run["output"]:
                found.append(f"output: {run['output']} there, {self._run['output']} now")
        except (LookupError, TypeError, AttributeError):
            return ["it does not say which"]
        return found
