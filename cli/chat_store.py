"""Where conversations are kept between two starts: a private folder, one directory each, and the history of what was typed.

The last conversation without a name is called ``last``, and the next one takes its place with its first turn.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from zoomr_local.errors import UsageError
from zoomr_local.folders import user_folder

LAST = "last"
_NAME = re.compile(r"[\w][\w.-]{0,63}")


def state_folder() -> Path:
    """The user's folder of state: $XDG_STATE_HOME/zoomr-local, else the system's place for it."""
    folder = user_folder("state")
    if folder is None:
        raise UsageError("this user has no home folder for conversations; set HOME, or XDG_STATE_HOME")
    return folder


def user_path(name: str) -> Path:
    """``name`` as a path, with ``~`` and ``~user`` put in full. Raises UsageError where that is no path, or no such folder is known."""
    if "\0" in name:
        raise UsageError(f"{name!r} is no path: it has a null character")
    try:
        return Path(name).expanduser()
    except RuntimeError:
        raise UsageError(f"the home folder in {name} is not known; write the path in full") from None


class ChatStore:
    """Saved conversations below ``base``. Everything in it is readable by its owner only."""

    def __init__(self, base: Path | None = None) -> None:
        self._base = base

    @property
    def base(self) -> Path:
        """The folder, made by nobody yet. Raises UsageError if none was named and the user has no home folder."""
        self._base = self._base or state_folder()
        return self._base

    def path(self, name: str) -> Path:
        """The directory of the conversation ``name``; a name with a slash is a path. Raises UsageError."""
        if "/" in name:
            return user_path(name)
        if not _NAME.fullmatch(name):
            raise UsageError(f"{name!r} is no name for a conversation: use letters, digits, - and _, or a path with a slash")
        return self.base / "chats" / name

    def holds(self, name: str) -> bool:
        """Whether a conversation is saved under ``name``. Raises UsageError."""
        return os.path.exists(self.path(name) / "session.json")

    def version(self, place: Path) -> tuple[int, int] | None:
        """What changes with every save in ``place``; None if nothing is saved there."""
        try:
            found = (place / "session.json").stat()
        except OSError:
            return None
        return found.st_ino, found.st_mtime_ns

    def names(self) -> list[str]:
        """The conversations there are, the newest first; none for a user without a home folder."""
        try:
            found = list((self.base / "chats").glob("*/session.json"))
        except UsageError:
            return []
        return [path.parent.name for path in sorted(found, key=lambda path: -path.stat().st_mtime)]

    def make(self) -> None:
        """Make the folder, mode 0700. Raises OSError."""
        for folder in (self.base, self.base / "chats"):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)

    @property
    def history(self) -> Path:
        """The file of what was typed."""
        return self.base / "chat-history"

    def private_history(self) -> Path:
        """That file, made with mode 0600. Raises OSError."""
        self.make()
        os.close(os.open(self.history, os.O_CREAT | os.O_WRONLY, 0o600))
        return self.history
