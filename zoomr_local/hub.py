"""Model names become files: a path, a bundled name, or ``user/repo[:quant]`` of the Hugging Face hub.

The hub is spoken to through huggingface_hub (the extra ``hub``), which brings its variables (``HF_ENDPOINT``,
``HF_TOKEN``, ``HF_HOME``, ``HF_HUB_OFFLINE``), logins and cache. It is imported only when something must be fetched: a model
in the cache is found by `hub_cache.py` alone and loads without a network. Bytes are fetched here, with that package's
``http_get``, because its own download starts again from nothing when a process was cut off.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from . import hub_cache
from .errors import ModelError, StorageError, UsageError
from .gguf_file import checked_path, printable
from .hub_names import Listed, Reference, listed, matching, order, parse, pick, title
from .sizes import counted, format_bytes

INSTALL = "pip install huggingface_hub"
SECONDS = 10
_PIECE_BYTES = 1 << 22
_HASH = re.compile(r"[0-9a-f]{64}")
_SAFE = re.compile(r"[0-9A-Za-z_-]{1,128}")
_TRUE = {"1", "ON", "YES", "TRUE"}

Say = Callable[[str], None]


@dataclass(frozen=True)
class Pulled:
    """What a pull did: the model, where its first file is, and how many bytes came over the network."""

    reference: Reference
    model: Listed
    path: Path
    fetched_bytes: int


def resolve(text: str, bundled: Mapping[str, Path], say: Say) -> Path:
    """The file that ``text`` names: an existing path, a bundled model, or one of the hub, which is fetched if need be.

    What is about to be fetched is told to ``say`` first. Raises ModelError for what there is not, with what it may
    have meant, and what `pull` raises.
    """
    if text in bundled and not Path(text).is_file():
        return bundled[text]
    path = Path(os.path.expanduser(text))  # which leaves a user who is not known as it is
    try:
        here = path.exists()
    except OSError as error:
        raise ModelError(f"cannot read the model {path}: {error.strerror}; give a .gguf file with -m") from None
    if here:
        return checked_path(path)
    reference = parse(text)
    if reference is None:
        raise ModelError(_no_such(text, path, bundled))
    cached = hub_cache.find(reference)
    return cached.path if cached else pull(reference, say).path


def offline() -> bool:
    """Whether the user forbids the network (``HF_HUB_OFFLINE``)."""
    return (os.environ.get("HF_HUB_OFFLINE") or os.environ.get("TRANSFORMERS_OFFLINE") or "").upper() in _TRUE


def endpoint() -> str:
    """Address of the hub (``HF_ENDPOINT``)."""
    return (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")


def repo_models(repo: str) -> list[Listed]:
    """The GGUF models of ``user/repo`` on the hub, best first. Raises ModelError if it cannot be asked."""
    _require(Reference(repo))
    hub = _library(Reference(repo))
    with _explained(hub, Reference(repo)):
        info = hub.HfApi(endpoint=endpoint()).model_info(repo, files_metadata=True, timeout=SECONDS)
    return listed({file.rfilename: file.size for file in info.siblings or []})


def pull(reference: Reference, say: Say, progress: bool = True) -> Pulled:
    """Fetch what of a model is not in the cache yet; a download that was cut off goes on where it ended.

    ``progress``: bars on stderr, if that is a terminal.
    Raises ModelError if there is no such model, it is not open to this user, or the network fails; StorageError if the
    disk is full or cannot be written.
    """
    _require(reference)
    hub = _library(reference)
    there = repo_models(reference.repo)
    model = pick(there, reference, f"on {endpoint()}")
    name = Reference(reference.repo, title(model, [*there, *(c.model for c in hub_cache.cached_models(reference.repo))]))
    _check_names(reference, model)
    folder = hub_cache.repo_dir(reference.repo)
    if not progress:
        hub.utils.disable_progress_bars()
    fetched, first = 0, None
    with _explained(hub, reference), _disk_errors(folder, model):
        wanted = [_Blob.of(hub, reference.repo, file, folder) for file in model.files]
        missing = sum(blob.missing_bytes for blob in wanted)
        _check_room(folder, name, missing)
        if missing:
            here = f"; {format_bytes((model.size_bytes or missing) - missing)} of it are here" if missing != model.size_bytes else ""
            size = format_bytes(model.size_bytes or missing)
            say(f"fetching {name} from {endpoint()}: {_files_text(model)}, {size}{here}, to {hub_cache.cache_dir()}")
        for blob in wanted:
            try:
                fetched += blob.fetch(hub)
            except KeyboardInterrupt:
                say("what came is kept; the same command goes on from there")
                raise
            # makes the name of the blob; asks the hub once more, and is the place where a library's cache may change
            path = hub.hf_hub_download(reference.repo, blob.file, cache_dir=str(hub_cache.cache_dir()), endpoint=endpoint())
            first = first or Path(path)
    return Pulled(name, model, first, fetched)


@dataclass
class _Blob:
    """One file to fetch. ``path`` is where its bytes belong in the cache, ``part`` where they grow meanwhile."""

    file: str
    url: str
    size_bytes: int
    etag: str
    path: Path

    @classmethod
    def of(cls, hub: Any, repo: str, file: str, folder: Path) -> "_Blob":
        url = hub.hf_hub_url(repo, file, endpoint=endpoint())
        found = hub.get_hf_file_metadata(url, timeout=SECONDS, endpoint=endpoint())
        if found.etag is None or not _SAFE.fullmatch(found.etag) or found.size is None:
            raise ModelError(f"{endpoint()} does not say how large {printable(file)} is and what it holds; is HF_ENDPOINT a hub?")
        return cls(file, url, found.size, found.etag, folder / "blobs" / found.etag)

    @property
    def part(self) -> Path:
        return self.path.with_name(self.path.name + hub_cache.INCOMPLETE)

    @property
    def missing_bytes(self) -> int:
        if self.path.exists():
            return 0
        return self.size_bytes - self._part_bytes()

    def _part_bytes(self) -> int:
        try:
            size = self.part.stat().st_size
        except OSError:
            return 0
        return size if size <= self.size_bytes else 0

    def fetch(self, hub: Any) -> int:
        """Bytes that came over the network. Checks size and, where the hub names it, the SHA-256."""
        if self.path.exists():
            return 0
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.part.open("ab") as file:
            _lock(file, self.file)
            if self.path.exists():  # another process was faster
                return 0
            before = self._part_bytes()
            if before < file.tell():
                file.truncate(0)
            file.seek(before)
            headers = hub.utils.build_hf_headers(library_name="zoomr-local")
            hub.file_download.http_get(
                self.url, file, resume_size=before, headers=headers, expected_size=self.size_bytes, displayed_filename=self.file,
            )  # fmt: skip
            file.flush()
            self._check()
            os.replace(self.part, self.path)
        return self.size_bytes - before

    def _check(self) -> None:
        if not _HASH.fullmatch(self.etag):
            return  # small files are named by git's hash, which GGUF files never are
        digest = hashlib.sha256()
        with self.part.open("rb") as file:
            while piece := file.read(_PIECE_BYTES):
                digest.update(piece)
        if digest.hexdigest() != self.etag:
            self.part.unlink()
            raise ModelError(f"{printable(self.file)} arrived damaged (its SHA-256 is not the hub's) and was deleted; pull it again")


def _check_names(reference: Reference, model: Listed) -> None:
    """Of files that would lie outside their folder not a byte is fetched. Raises ModelError."""
    for file in model.files:
        if any(part in ("", ".", "..") for part in file.split("/")) or "\\" in file or not file.isprintable():
            raise ModelError(f"{reference.repo} names a file {printable(file)}, which no folder can hold; take another repository")


def _lock(file: Any, name: str) -> None:
    import fcntl

    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ModelError(f"another process is fetching {printable(name)} right now; wait for it, then try again") from None
    except OSError:
        pass  # a file system without locks


def _check_room(folder: Path, name: Reference, missing_bytes: int) -> None:
    from .machine import free_disk_bytes

    free = free_disk_bytes(folder)
    if free is not None and free < missing_bytes:
        raise StorageError(
            f"{name} needs {format_bytes(missing_bytes)} more, {hub_cache.cache_dir()} has {format_bytes(free)} free;"
            " make room (`zoomr models ls`, `zoomr models rm`), or name another disk with HF_HOME"
        )


@contextmanager
def _disk_errors(folder: Path, model: Listed) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS):
            raise
        free = f" ({format_bytes(shutil.disk_usage(hub_cache.cache_dir()).free)} free)" if hub_cache.cache_dir().exists() else ""
        raise StorageError(
            f"{hub_cache.cache_dir()} cannot be written: {os.strerror(error.errno)}{free}; what came is kept, and the same command goes"
            " on from there; HF_HOME names another disk"
        ) from None


def _require(reference: Reference) -> None:
    if offline():
        raise ModelError(f"{_here(reference)}, and HF_HUB_OFFLINE forbids the network; unset it and: zoomr models pull {reference}")


def _library(reference: Reference) -> Any:
    if not _is_address(endpoint()):
        raise ModelError(f"HF_ENDPOINT is {printable(endpoint())}, not the address of a hub; unset it for https://huggingface.co")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    try:
        import huggingface_hub
        import huggingface_hub.file_download
        import huggingface_hub.utils
    except ImportError as error:
        raise ModelError(f"{_here(reference)}, and asking the hub needs the package huggingface_hub ({error}): {INSTALL}") from None
    return huggingface_hub


def _is_address(text: str) -> bool:
    try:
        parts = urlsplit(text)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0 and text.isprintable()
    except ValueError:
        return False


def _here(reference: Reference) -> str:
    there = hub_cache.cached_models(reference.repo)
    if there and matching(sorted({c.model for c in there}, key=order), reference.tag):
        return f"{reference} is in the cache and -m {reference} takes it"
    return f"{reference} is not in the cache"


@contextmanager
def _explained(hub: Any, reference: Reference) -> Iterator[None]:
    """Every way in which the hub can fail, as one sentence."""
    errors = hub.utils
    network = next(c for c in errors.HfHubHTTPError.__mro__ if c.__name__ == "HTTPError")  # of whichever client it uses
    repo, at = reference.repo, endpoint()
    try:
        yield
    except (ModelError, StorageError):
        raise
    except errors.GatedRepoError:
        raise ModelError(f"{repo} is gated: ask for access at {at}/{repo}, then log in with `hf auth login` or set HF_TOKEN") from None
    except errors.RepositoryNotFoundError:
        raise ModelError(
            f"there is no {repo} on {at}, or it is private: check the name{_similar(repo, hub_cache.cached_repos())};"
            " for a private one log in with `hf auth login` or set HF_TOKEN"
        ) from None
    except errors.HFValidationError as error:
        raise UsageError(f"{printable(str(reference))} is no name of a repository: {printable(str(error))}") from None
    except errors.HfHubHTTPError as error:
        code = getattr(error.response, "status_code", "?")
        raise ModelError(f"{at} refused {reference} with status {code}; try again later, and see that HF_TOKEN may read it") from None
    except (network, errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
        raise ModelError(
            f"{at} cannot be reached for {reference} ({printable(str(error) or type(error).__name__, 120)}); check the network, HF_ENDPOINT"
            " and proxies. What came already is kept, and the same command goes on from there"
        ) from None
    except OSError as error:
        if error.errno is not None:
            raise  # of the disk
        raise ModelError(f"{reference} did not arrive whole ({printable(str(error), 120)}); the same command goes on from there") from None
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ModelError(f"{at} did not answer like a hub for {reference} ({printable(str(error), 120)}); check HF_ENDPOINT") from None


def _files_text(model: Listed) -> str:
    first = printable(model.files[0])
    return first if len(model.files) == 1 else f"{first} and {counted(len(model.files) - 1, 'more file')}"


def _no_such(text: str, path: Path, bundled: Mapping[str, Path]) -> str:
    try:
        beside = [entry.name for entry in os.scandir(path.parent) if entry.name.endswith(".gguf")]
    except OSError:
        beside = []
    folder = "" if path.parent == Path(".") else f"{path.parent}{os.sep}"
    known = [*bundled, *(str(c.reference) for c in hub_cache.cached_models()), *(folder + name for name in beside)]
    near = _similar(text, known)
    return f"no model file at {printable(text)}{near}; give the path of a .gguf file with -m, a bundled name ({', '.join(bundled)}), or user/repo[:quant] of the hub"


def _similar(text: str, known: list[str]) -> str:
    """The nearest known name, also when only its last part is near: people leave out users and repositories."""
    import difflib

    ways = {way.lower(): name for name in known for way in (name, name.rsplit("/", 1)[-1], name.rsplit("/", 1)[-1].partition(":")[0])}
    close = difflib.get_close_matches(text.lower(), list(ways), n=1, cutoff=0.7)
    return f" (did you mean {printable(ways[close[0]])}?)" if close else ""
