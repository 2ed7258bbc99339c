"""The hub's cache on this disk: which models are in it, and removing one.

The layout is huggingface_hub's, which llama.cpp and other programs share: ``models--user--repo`` with ``blobs`` (the
bytes, by hash), ``snapshots/COMMIT`` (names, linked to blobs) and ``refs`` (branches). It is read here rather than by
that package, because a model that is on the disk must load without it, without a network and at once.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from .errors import StorageError
from .hub_names import Listed, Reference, choose, listed, matching, order, pick, title

_PREFIX = "models--"
INCOMPLETE = ".incomplete"
"""Suffix of a blob that is still being downloaded, as huggingface_hub has it."""


@dataclass(frozen=True)
class Cached:
    """A model in the cache: of which repository and commit, where its first file is, and what tells it from the repository's others."""

    repo: str
    commit: str
    model: Listed
    path: Path
    tag: str

    @property
    def reference(self) -> Reference:
        """What to give with -m."""
        return Reference(self.repo, self.tag)


def cache_dir() -> Path:
    """Where the hub's programs keep models: ``HF_HUB_CACHE``, else ``hub`` in ``HF_HOME``, else the user's cache folder."""
    for variable, inside in (("HF_HUB_CACHE", ""), ("HUGGINGFACE_HUB_CACHE", ""), ("HF_HOME", "hub"), ("XDG_CACHE_HOME", "huggingface/hub")):
        if os.environ.get(variable):
            return Path(os.path.expanduser(os.path.expandvars(os.environ[variable]))) / inside
    return Path(os.path.expanduser("~/.cache/huggingface/hub"))


def repo_dir(repo: str) -> Path:
    """The folder of ``user/repo``, whether or not it is there."""
    return cache_dir() / (_PREFIX + repo.replace("/", "--"))


def cached_repos() -> list[str]:
    """``user/repo`` of everything in the cache, sorted."""
    try:
        names = [entry.name for entry in os.scandir(cache_dir()) if entry.is_dir()]
    except OSError:
        return []
    repos = [name.removeprefix(_PREFIX).replace("--", "/", 1) for name in names if name.startswith(_PREFIX)]
    return sorted(repo for repo in repos if "/" in repo)


def cached_models(repo: str | None = None, whole: bool = True) -> list[Cached]:
    """The GGUF models in the cache, of one repository or of all; of each the newest commit that has it.

    ``whole``: only those that can be loaded. Else also those that lack parts, as a split model does whose download was cut off."""
    found = [cached for name in ([repo] if repo else cached_repos()) for cached in _of_repo(name)]
    return [cached for cached in found if not (whole and cached.model.missing)]


def _of_repo(repo: str) -> list[Cached]:
    """Those of one repository. Some parts of a model that another commit has more of are not named apart."""
    there: list[tuple[Path, Listed]] = []
    for snapshot in _snapshots(repo_dir(repo)):
        there += [(snapshot, model) for model in listed(_sizes(snapshot)) if all(model.files != other.files for _, other in there)]
    kept = [(at, model) for at, model in there if not any(set(model.files) < set(other.files) for _, other in there)]
    models = [model for _, model in kept]
    return [Cached(repo, at.name, model, at / model.files[0], title(model, models)) for at, model in kept]


def find(reference: Reference, whole: bool = True) -> Cached | None:
    """The cached model that ``reference`` means, or None; without a tag the preferred one of those that are there.

    ``whole``: as for `cached_models`. Raises ModelError if it means several.
    """
    cached = cached_models(reference.repo, whole)
    models = sorted({c.model for c in cached}, key=order)
    if not matching(models, reference.tag):
        return None
    chosen = (pick if whole else choose)(models, reference, "in the cache")
    return next(c for c in cached if c.model == chosen)


def incomplete(repo: str | None = None) -> list[tuple[Path, int]]:
    """Files, of one repository or of all, whose download was cut off or is under way, with their sizes in bytes."""
    found = []
    for repo in [repo] if repo else cached_repos():
        for path in _parts(repo):
            try:
                found.append((path, path.stat().st_size))
            except OSError:
                continue
    return found


def remove(cached: Cached) -> int:
    """Delete a model from every commit that has it, and the bytes that nothing else names. Bytes that became free.

    The repository's folder goes with its last file, unless a download into it is under way or was cut off, or somebody
    has put it elsewhere and linked it.
    Raises StorageError if something cannot be deleted.
    """
    folder = repo_dir(cached.repo)
    blobs: set[Path] = set()
    freed = 0
    try:
        for snapshot in _snapshots(folder):
            for name in cached.model.files:
                entry = snapshot / name
                if entry.is_symlink():
                    blobs.add(Path(os.path.realpath(entry)))
                elif entry.is_file():
                    freed += entry.stat().st_size
                else:
                    continue
                entry.unlink()
                _prune(entry.parent, folder / "snapshots")
        named = {os.path.realpath(entry) for snapshot in _snapshots(folder) for entry in _files(snapshot)}
        inside = Path(os.path.realpath(folder / "blobs"))
        for blob in blobs:
            if blob.parent == inside and str(blob) not in named and blob.is_file():
                freed += blob.stat().st_size
                blob.unlink()
        if not any(True for snapshot in _snapshots(folder) for _ in _files(snapshot)) and not _parts(cached.repo) and not folder.is_symlink():
            shutil.rmtree(folder)
            shutil.rmtree(cache_dir() / ".locks" / folder.name, ignore_errors=True)
    except OSError as error:
        raise StorageError(f"{error.filename or folder} cannot be removed: {error.strerror or error}") from None
    return freed


def _parts(repo: str) -> list[Path]:
    return [path for path in _files(repo_dir(repo) / "blobs") if path.name.endswith(INCOMPLETE)]


def _prune(folder: Path, top: Path) -> None:
    """Remove ``folder`` and those above it, below ``top``, as far as they are empty."""
    while folder != top:
        try:
            folder.rmdir()
        except OSError:
            return
        folder = folder.parent


def _snapshots(folder: Path) -> list[Path]:
    """The commits of a repository that are in the cache: the one of branch main first, then the newest. Links to folders
    elsewhere are none: what they lead to is not the cache's to remove."""
    try:
        found = [Path(entry.path) for entry in os.scandir(folder / "snapshots") if entry.is_dir(follow_symlinks=False)]
        found.sort(key=lambda path: path.stat().st_mtime, reverse=True)
    except OSError:
        return []
    try:
        main = (folder / "refs/main").read_text().strip()
    except (OSError, ValueError):
        main = ""
    return sorted(found, key=lambda path: path.name != main)


def _files(folder: Path) -> Iterator[Path]:
    for at, _, names in os.walk(folder):
        yield from (Path(at) / name for name in names)


def _sizes(snapshot: Path) -> dict[str, int | None]:
    sizes: dict[str, int | None] = {}
    for path in _files(snapshot):
        try:
            sizes[path.relative_to(snapshot).as_posix()] = path.stat().st_size
        except OSError:
            continue  # a link to nothing: half removed, or half downloaded
    return sizes
