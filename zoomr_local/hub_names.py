"""How models on the Hugging Face hub are named: ``user/repo[:quant]``, the files of a repository, and which one is meant.

Pure: names and sizes in, a choice out. `hub_cache.py` and `hub.py` give it what is on the disk and on the hub.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from .errors import ModelError, UsageError
from .gguf_file import printable
from .sizes import counted, format_bytes

PREFERRED = "Q4_K_M"
"""What users of llama.cpp and Ollama get when they name no quantisation."""

_PREFERRED_BITS = 4
_HOST = re.compile(r"^(?:hf:/{1,2}|(?:https?:/{1,2})?(?:www\.)?(?:huggingface\.co|hf\.co)/)")
_IN_REPO = re.compile(r"^([^/]+/[^/]+)/(resolve|blob|tree)/([^/?]+)/?([^?]*)(?:\?.*)?$")
_BRANCH = "main"
_REPO = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*/[A-Za-z0-9_][A-Za-z0-9_.-]*")
_PART = re.compile(r"(.+)-(\d{5})-of-(\d{5})", re.IGNORECASE)
_QUANT = re.compile(r"(?:^|[-._])((?:UD-)?(?:I?Q\d\w*|TQ\d\w*|BF16|FP?16|FP?32|MXFP4\w*|NVFP4\w*))$", re.IGNORECASE)
_NOT_MODELS = ("mmproj", "imatrix", "mtp-", "eagle3-", "dflash-", "dspark-")
"""Parts of the names of GGUF files that go with a model and are none: as in llama.cpp's own choice."""

_KINDS = ("_K_M", "_K_L", "_K_XL", "_K_S", "_K")
_MOST_NAMED = 12


@dataclass(frozen=True)
class Reference:
    """``user/repo``, and which of its models: a quantisation, a file name, or None for the preferred one."""

    repo: str
    tag: str | None = None

    def __str__(self) -> str:
        return self.repo if self.tag is None else f"{self.repo}:{self.tag}"


@dataclass(frozen=True)
class Listed:
    """One model of a repository: a file, or the parts of a split one in order, by their names there.

    ``size_bytes``: of all parts, None if it is not known. ``missing``: parts that are not there.
    """

    files: tuple[str, ...]
    size_bytes: int | None
    quant: str | None
    missing: int = 0


def title(model: Listed, among: Iterable[Listed]) -> str:
    """What to write behind the colon to get ``model`` and no other of ``among``; safe to print."""
    alone = all(other.quant != model.quant or other.files == model.files for other in among)
    return model.quant if model.quant and alone else printable(model.files[0])


def parse(text: str) -> Reference | None:
    """``user/repo[:quant]``, also as an address of the hub; None for what can only be a path.

    Raises UsageError for the address of another revision than the branch main, which is the one that is fetched, and for that of a folder.
    """
    short = _HOST.sub("", text)
    inside = _IN_REPO.match(short) if short != text else None
    if inside:
        return _inside(*inside.groups())
    name, colon, tag = short.rstrip("/").partition(":")
    if not _REPO.fullmatch(name) or (colon and not tag) or (name.lower().endswith(".gguf") and short == text):
        return None
    return Reference(name, tag or None)


def _inside(repo: str, what: str, revision: str, path: str) -> Reference | None:
    """What the address of a file or folder in a repository means."""
    if revision != _BRANCH:
        raise UsageError(
            f"the address names revision {printable(revision)} of {printable(repo)}, and only branch {_BRANCH} is fetched; write /{_BRANCH}/ in its place,"
            " or download the file and give its path"
        )
    if what == "tree" and path:
        raise UsageError(f"the address names a folder of {printable(repo)}; `zoomr models pull --list {printable(repo)}` lists the models, to name one as user/repo:quant")
    if what == "tree":
        return Reference(repo)
    return Reference(repo, path) if path.endswith(".gguf") else None


def quant_of(file: str) -> str | None:
    """The quantisation that a file's name ends in, in capitals: ``Q4_K_M``; None if it says none."""
    stem = re.sub(r"\.gguf$", "", file.rsplit("/", 1)[-1], flags=re.IGNORECASE)
    split = _PART.fullmatch(stem)
    match = _QUANT.search(split.group(1) if split else stem)
    return match.group(1).upper() if match else None


def listed(sizes: Mapping[str, int | None]) -> list[Listed]:
    """The models among the files of a repository, by name and size in bytes; best first."""
    groups: dict[tuple[str, int], dict[int, str]] = {}
    for name in sorted(sizes):
        base = name.rsplit("/", 1)[-1].lower()
        if not base.endswith(".gguf") or any(word in base for word in _NOT_MODELS):
            continue
        split = _PART.fullmatch(name[: -len(".gguf")])
        prefix, number, count = (split.group(1), int(split.group(2)), int(split.group(3))) if split else (name, 1, 1)
        groups.setdefault((prefix, count), {})[number] = name
    found = []
    for (_, count), parts in groups.items():
        files = tuple(parts[number] for number in sorted(parts))
        known = [sizes[file] for file in files]
        total = None if None in known else sum(size or 0 for size in known)
        found.append(Listed(files, total, quant_of(files[0]), max(0, count - len(files))))
    return sorted(found, key=order)


def order(model: Listed) -> tuple[tuple[int, bool, bool, int], tuple[str, ...]]:
    """Sorts models, the one that is meant by a bare ``user/repo`` first."""
    return (preference(model.quant), model.files)


def preference(quant: str | None) -> tuple[int, bool, bool, int]:
    """Sorts quantisations, the preferred one first: four bits, then the nearest, more bits before fewer."""
    digits = re.search(r"\d+", quant or "")
    if quant is None or digits is None:
        return (1000, True, True, 0)
    name, bits = quant.removeprefix("UD-"), int(digits.group())
    kind = next((i for i, end in enumerate(_KINDS) if name.endswith(end)), len(_KINDS))
    return (abs(bits - _PREFERRED_BITS), bits < _PREFERRED_BITS, not name.startswith("Q"), kind)


def matching(models: Iterable[Listed], tag: str | None) -> list[Listed]:
    """Those of ``models``, best first, that ``tag`` means: a quantisation, a file's name, or None for the best."""
    models = list(models)
    if tag is None:
        return [model for model in models if model.quant == models[0].quant]
    if tag.lower().endswith(".gguf"):
        return [m for m in models if m.files[0] == tag] or [m for m in models if m.files[0].rsplit("/", 1)[-1] == tag]
    wanted = tag.upper()
    return [m for m in models if m.quant == wanted] or [m for m in models if (m.quant or "").removeprefix("UD-") == wanted]


def pick(models: Iterable[Listed], reference: Reference, where: str) -> Listed:
    """The model that ``reference`` means, with all its parts. Raises ModelError that names what there is; ``where`` is for its text."""
    found = choose(models, reference, where)
    if found.missing:
        raise ModelError(f"{reference.repo} lacks {counted(found.missing, 'part')} of {printable(found.files[0])} {where}")
    return found


def choose(models: Iterable[Listed], reference: Reference, where: str) -> Listed:
    """As `pick`, but parts of the model may be missing."""
    models = list(models)
    if not models:
        raise ModelError(f"{reference.repo} has no GGUF model {where}; look for a repository whose name ends in -GGUF")
    found, tag = matching(models, reference.tag), reference.tag or ""
    if not found:
        raise ModelError(f"{reference.repo} has no {printable(tag)} {where}{_near(tag, models)}; there are {names(models)}")
    if len(found) > 1:
        files = ", ".join(printable(model.files[0]) for model in found)
        raise ModelError(f"{reference} means {len(found)} models: {files}; name one of them, as in {reference.repo}:{printable(found[0].files[0])}")
    return found[0]


def names(models: Iterable[Listed]) -> str:
    """``Q4_K_M (4.7 GiB), Q8_0 (8.1 GiB)``."""
    models = list(models)
    shown = [title(m, models) + ("" if m.size_bytes is None else f" ({format_bytes(m.size_bytes)})") for m in models[:_MOST_NAMED]]
    return ", ".join(shown) + (f" and {len(models) - _MOST_NAMED} more" if len(models) > _MOST_NAMED else "")


def _near(tag: str, models: list[Listed]) -> str:
    import difflib

    close = difflib.get_close_matches(tag.upper(), [m.quant for m in models if m.quant], n=1)
    return f" (did you mean {close[0]}?)" if close else ""
