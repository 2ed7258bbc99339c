"""A running generation saved to a directory, and one made of it again that goes on with the same tokens.

`engine.py` saves and loads through this; `checkpoint.py` and a chat use the engine. What is in a session: the
generation's own state (JSON and arrays), a snapshot of the cells (number by number), and every stored page as it
is in its tier. A page never changes, so a save writes those that came since the last one to the same directory.

A session continues bit for bit only with what it was made with, so that is kept as plain names and values, and
compared by name: the model's bytes, its quantisation and template, the cache's types, the policy, the versions.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import time
import zipfile
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Iterator

import numpy as np

from .errors import SessionError, StorageError, UsageError, ZoomrError
from .generation import Generation
from .libllama import library_info
from .model import Model
from .session_files import Replacement, SessionDirectory
from .tiers import PageInfo, PageStore, Placement

SAMPLES, SAMPLE_BYTES, EDGE_BYTES = 256, 4096, 1 << 20
"""Of a model file: so many samples, evenly spread, and both ends are hashed. A difference elsewhere goes unnoticed."""


@dataclass(frozen=True)
class Saved:
    """One save: what it wrote (bytes), what the session takes on disk now (bytes), and how long it took."""

    path: Path
    written_bytes: int
    total_bytes: int
    seconds: float


@dataclass(frozen=True)
class Session:
    """A saved session as read from its directory, checked. ``note`` is what the caller of save gave."""

    path: Path
    made_with: dict[str, Any]
    reserved_tokens: int
    note: dict[str, Any]
    state: dict[str, Any]
    cells: np.ndarray
    pages: list[dict[str, Any]]
    checksum: str

    @property
    def content(self) -> str:
        """The text of the answer when it was saved."""
        return self.state["reply"]["text"]["content"]

    @property
    def reasoning(self) -> str:
        """The text of thoughts and summaries when it was saved."""
        return self.state["reply"]["text"]["reasoning"]

    @property
    def needed_tokens(self) -> int:
        """Tokens that the generation can have at most, prompt included; of a conversation those it has room for."""
        room = int(self.state.get("turns", {}).get("room_tokens", 0))
        return max(len(self.state["prompt"]) + int(self.state["max_tokens"]), room)

    @property
    def completion_tokens(self) -> int:
        """Tokens sampled when it was saved."""
        return sum(self.state["reply"]["counts"].values())


# ---------------------------------------------------------------- what it was made with


def made_with(model: Model, settings: dict[str, Any], cache: dict[str, Any], cells: int | None) -> dict[str, Any]:
    """Names and values that must be equal for a session to be continued. ``cells`` None: as many as are needed."""
    llama, library = model.llama, library_info()
    template = llama.chat_template()
    return {
        "model": model.name,
        "architecture": model.arch,
        "quantisation": llama.desc,
        "model file": model_identity(model.path),
        "chat template": None if template is None else hashlib.sha256(template.encode()).hexdigest()[:16],
        **cache,
        **{name.replace("_", " "): list(value) if isinstance(value, tuple) else value for name, value in settings.items()},
        "cells": cells,
        "engine": f"llama.cpp of llama-cpp-python {library['engine']}",
        "native interface": library["abi"],
    }


def model_identity(path: Path) -> str:
    """Size in bytes and a hash of a model file: its ends and samples in between, not gigabytes. Raises SessionError."""
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            edges = [(0, EDGE_BYTES), (max(0, size - EDGE_BYTES), EDGE_BYTES)]
            for offset, n in [*edges, *((size * i // SAMPLES, SAMPLE_BYTES) for i in range(SAMPLES))]:
                file.seek(offset)
                digest.update(file.read(n))
    except OSError as error:
        raise SessionError(f"a session names its model's file, and {path} cannot be read: {error.strerror}") from None
    return f"{size} bytes, sha256 of samples {digest.hexdigest()[:16]}"


def differences(there: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """``kv budget: 512 there, 256 now`` for each name whose values differ."""
    return [
        f"{name}: {_word(there.get(name))} there, {_word(now.get(name))} now"
        for name in [*there, *(name for name in now if name not in there)]
        if there.get(name) != now.get(name)
    ]


def _word(value: Any) -> str:
    return "none" if value is None else str(value)


# ---------------------------------------------------------------- saving


def save(
    path: Path, generation: Generation, with_: dict[str, Any], reserved_tokens: int, note: dict[str, Any]
) -> Saved:
    """Save ``generation`` as the session in ``path``, in place of the one there.

    Raises SessionError if the directory is somebody else's, in use or full, EngineError if the generation has not
    begun or broke in the middle of a step, UnsupportedModel if the model's memory is more than a KV cache. The old
    session is whole then.
    """
    began = time.perf_counter()
    try:
        json.dumps(note)
    except (TypeError, ValueError) as error:
        raise UsageError(f"the note of a session must be JSON: {error}") from None
    store = generation.cache.store
    generation.settle()
    state, arrays = split(generation.state())
    cells = generation.context.snapshot()
    with SessionDirectory.writing(path) as directory:
        known = _saved_before(directory, generation)
        with directory.replacing() as new:
            placements = store.placements()
            where = {p.info.key: known[p.info.key][1] for p in placements if known.get(p.info.key, (None,))[0] is p.info}
            where |= _link(new, store, [p for p in placements if p.info.key not in where])
            fresh = [p for p in placements if p.info.key not in where]
            if fresh:
                where |= {p.info.key: at for p, at in zip(fresh, new.put_pages(_bytes_of(store, fresh)))}
            pages = [{**_placed(p), **where[p.info.key]} for p in placements]
            parts = {
                "state": new.put("state", ".json", json.dumps(state).encode()),
                "arrays": new.put("arrays", ".npz", _npz(arrays)),
                "cells": new.put("cells", ".bin", cells),
            }
            manifest = new.commit({
                "made_with": with_, "reserved_tokens": reserved_tokens, "note": note, "parts": parts, "pages": pages,
            })  # fmt: skip
    _remember(generation, path, manifest)
    total = sum(f["bytes"] for f in manifest["files"].values()) + sum(p["bytes"] for p in pages)
    return Saved(path, new.written_bytes, total, time.perf_counter() - began)


def save_note(path: Path, note: dict[str, Any]) -> Saved:
    """Save ``note`` alone as the session in ``path``, in place of the one there: `note` reads it, `load` refuses it.

    Raises SessionError as ``save`` does.
    """
    began = time.perf_counter()
    with SessionDirectory.writing(path) as directory, directory.replacing() as new:
        new.commit({"made_with": {}, "reserved_tokens": 0, "note": note, "parts": {}, "pages": []})
    return Saved(path, new.written_bytes, new.written_bytes, time.perf_counter() - began)


def _link(new: Replacement, store: PageStore, placements: list[Placement]) -> dict[tuple[int, str], dict[str, Any]]:
    """Those of the pages that are on disk already and could be linked, and where they are in the session."""
    where = {}
    for placed in placements:
        key, found = placed.info.key, store.file(placed.info.key)
        name = None if found is None else new.link(found[0], key)
        if name is not None:
            where[key] = {"file": name, "offset": found[1], "bytes": placed.info.stored_bytes, "crc32": found[2]}
    return where


def _bytes_of(store: PageStore, placements: list[Placement]) -> Iterator[np.ndarray]:
    """The pages' bytes one after the other; reading them for a save is not counted as reading."""
    for placed in placements:
        counted = store.read_bytes
        data = store.stored(placed.info.key)
        store.read_bytes = counted
        if data is None:
            raise SessionError(f"a page of block {placed.info.key[0]} could not be read back, so the session is not saved")
        yield data


def _placed(placed: Placement) -> dict[str, Any]:
    info = placed.info
    return {
        "block": info.key[0], "part": info.key[1], "first": info.first, "tokens": info.n_tokens, "raw_bytes": info.raw_bytes,
        "at": placed.offset, "on_disk": placed.on_disk, "ahead": placed.ahead,
        "buffered": placed.buffered,
    }  # fmt: skip


def _remember(generation: Generation, path: Path, manifest: dict[str, Any]) -> None:
    """Note where the pages of ``generation`` are in ``path``, for its next save there."""
    store = generation.cache.store
    where = {
        (p["block"], p["part"]): (store.info((p["block"], p["part"])), {k: p[k] for k in ("file", "offset", "bytes", "crc32")})
        for p in manifest["pages"]
        if (p["block"], p["part"]) in store
    }
    generation.saved_pages = (path.resolve(), manifest["checksum"], where)


def _saved_before(directory: SessionDirectory, generation: Generation) -> dict[tuple[int, str], tuple[Any, dict[str, Any]]]:
    """The pages that this generation saved to this directory, if nobody has saved another session there since."""
    if generation.saved_pages is None:
        return {}
    path, checksum, where = generation.saved_pages
    try:
        manifest = directory.manifest()
    except SessionError:
        return {}
    return where if manifest and manifest["checksum"] == checksum and path == directory.path.resolve() else {}


def _npz(arrays: dict[str, np.ndarray]) -> bytes:
    out = io.BytesIO()
    np.savez(out, **arrays)
    return out.getvalue()


def split(state: Any, path: str = "state") -> tuple[Any, dict[str, np.ndarray]]:
    """A tree of JSON values and arrays as JSON, with ``{"array": name}`` in an array's place, and the arrays by name."""
    if isinstance(state, np.ndarray):
        return {"array": path}, {path: state}
    arrays: dict[str, np.ndarray] = {}
    if isinstance(state, dict):
        tree = {}
        for key, value in state.items():
            tree[key], found = split(value, f"{path}.{key}")
            arrays |= found
        return tree, arrays
    return state, arrays


def join(tree: Any, arrays: dict[str, np.ndarray]) -> Any:
    """What ``split`` took apart."""
    if isinstance(tree, dict):
        return arrays[tree["array"]] if tree.keys() == {"array"} else {k: join(v, arrays) for k, v in tree.items()}
    return tree


# ---------------------------------------------------------------- loading


def load(path: Path, with_: dict[str, Any] | None = None) -> Session:
    """Read and check the session in ``path``; nothing else is changed.

    With ``with_`` a session that was made with anything else is refused by a SessionError that names each
    difference. Raises SessionError if there is none, if it is damaged, or if it is being written.
    """
    with SessionDirectory.reading(path) as directory:
        manifest = directory.manifest()
        if manifest is None:
            raise SessionError(f"no session in {path}")
        with _damage_is_said(path):
            if not manifest["parts"]:
                raise SessionError(f"the session in {path} is a conversation's text without its cache")
            found = differences(manifest["made_with"], json.loads(json.dumps(with_))) if with_ is not None else []
            if found:
                raise SessionError(f"the session in {path} was made with something else ({'; '.join(found)})")
            files, parts = manifest["files"], manifest["parts"]
            tree = json.loads(directory.read(parts["state"], files[parts["state"]]))
            data = directory.read(parts["arrays"], files[parts["arrays"]])
            with np.load(io.BytesIO(data), allow_pickle=False) as stored:
                state = join(tree, {name: stored[name] for name in stored.files})
            cells = np.frombuffer(directory.read(parts["cells"], files[parts["cells"]]), np.uint8)
            return Session(
                path, manifest["made_with"], int(manifest["reserved_tokens"]), dict(manifest["note"]), state, cells,
                list(manifest["pages"]), manifest["checksum"],
            )  # fmt: skip


def note(path: Path) -> dict[str, Any]:
    """The note of the session in ``path``, also where other parts of it are damaged or were made with something else.

    Raises SessionError if there is no session, if its manifest is damaged, or if it is being written.
    """
    with SessionDirectory.reading(path) as directory:
        manifest = directory.manifest()
    if manifest is None:
        raise SessionError(f"no session in {path}")
    with _damage_is_said(path):
        return dict(manifest["note"])


def restore(session: Session, generation: Generation) -> None:
    """Make a new ``generation``, on an empty context and store, go on where ``session`` was saved.

    Raises SessionError if the session's parts do not fit each other or the tiers' limits; the generation and what
    is in the cells are of no use then.
    """
    store = generation.cache.store
    with _damage_is_said(session.path):
        generation.context.restore_snapshot(session.cells)
        with SessionDirectory.reading(session.path) as directory:
            for page in session.pages:
                data = directory.read_piece(page["file"], page["offset"], page["bytes"], page["crc32"])
                if not store.restore(_placement(page, store), data):
                    raise SessionError(
                        f"the pages of the session in {session.path} do not fit --kv-ram and --kv-disk; raise one of them"
                    )
        store.settle(wait=True)
        generation.restore(session.state)
        generation.settle()  # a page that could not be put back is a block that is lost, as anywhere else
        _check(session, generation)
    _remember(generation, session.path, {"pages": session.pages, "checksum": session.checksum})


def _check(session: Session, generation: Generation) -> None:
    """Raise SessionError unless what the books say to be in cells or stored is there."""
    cache, store, line = generation.cache, generation.cache.store, generation.timeline
    whole = len(generation.context.resident(cache.sequence)) == cache.resident_tokens
    for block in line.blocks:
        for part, span in (("detail", block.detail), ("summary", block.summary)):
            key = (block.number, part)
            if key in store:
                info = store.info(key)
                whole &= span == (info.first, info.first + info.n_tokens)
                whole &= info.raw_bytes == generation.context.page_size(info.n_tokens)
            elif span:
                whole &= bool(cache.resident(part)[block.number] or cache.lost(part)[block.number])
    if not whole or any(block >= len(line.blocks) for block, _ in store.keys()):
        raise SessionError(f"the session in {session.path} does not fit itself: what it says and what is in it differ")


def _placement(page: dict[str, Any], store: PageStore) -> Placement:
    info = PageInfo(
        (page["block"], page["part"]), store.fingerprint, store.codec.page_type, page["first"], page["tokens"],
        page["raw_bytes"], page["bytes"],
    )  # fmt: skip
    return Placement(info, page["at"], page["on_disk"], page["ahead"], page["buffered"])


_DAMAGE = (
    ZoomrError, LookupError, ValueError, TypeError, AttributeError, ArithmeticError, EOFError, zipfile.BadZipFile,
)  # fmt: skip


@contextmanager
def _damage_is_said(path: Path) -> Iterator[None]:
    """Whatever goes wrong while a session's parts are read, and is not said as an error of its own, means damage."""
    try:
        yield
    except (SessionError, StorageError):
        raise
    except MemoryError:
        raise SessionError(f"there is not enough memory to load the session in {path}") from None
    except _DAMAGE as error:
        reason = str(error) if isinstance(error, ZoomrError) else f"{type(error).__name__}: {error}"
        raise SessionError(f"the session in {path} is damaged ({reason})") from None
