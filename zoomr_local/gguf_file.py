"""The header of a GGUF file, read without llama.cpp: its metadata, and whether everything it announces is there.

`trial.py` asks this file before llama.cpp sees a model, `zoomr models` for what it lists of many files at once. Only
rules that every sound file keeps are checked, so that none is refused that llama.cpp would take; what the metadata
means is llama.cpp's to judge. Imports nothing of ours but the errors.
"""

from __future__ import annotations

import os
import re
import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from .errors import ModelError

MOST_ELEMENTS = 1 << 24
"""Elements of an array: the largest vocabularies have about 2**18 tokens. Each costs llama.cpp up to 40 bytes."""

MOST_VALUES, MOST_TENSORS = 1 << 16, 1 << 18
"""Models have some fifty values and, each expert counted, some ten thousand tensors; reading a million takes seconds."""

MOST_TEXT_BYTES = 1 << 24
"""Bytes of one text; chat templates take some ten thousand."""

MOST_HEADER_BYTES = 1 << 29

_CHUNK_BYTES = 1 << 20
_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_TEXT, _ARRAY = 8, 9
_ALIGNMENT = 32
_PART = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf", re.IGNORECASE)


@dataclass(frozen=True)
class Header:
    """What stands in front of the weights.

    ``metadata``: every single value, by key; texts are decoded, bytes that are no UTF-8 replaced. ``arrays``: the
    number of elements of every array. ``needed_bytes``: the least size of a file that holds all tensors.
    """

    version: int
    n_tensors: int
    file_bytes: int
    needed_bytes: int
    metadata: dict[str, Any] = field(default_factory=dict)
    arrays: dict[str, int] = field(default_factory=dict)


def printable(text: str, most: int = 200) -> str:
    """``text`` from a file as one line that is safe to print: no control characters, at most ``most`` characters."""
    line = " ".join("".join(c if c.isprintable() else " " for c in text[: 4 * most]).split())
    return line if len(line) <= most else line[: most - 3] + "..."


def checked_path(path: str | Path) -> Path:
    """``path``, if there is a file. Raises ModelError."""
    path = Path(os.path.expanduser(path))
    if path.is_dir():
        raise ModelError(f"{path} is a folder; give the path of a .gguf file with -m")
    if not path.is_file():
        raise ModelError(f"no model file at {path}; give the path of a .gguf file with -m")
    return path


def part_paths(path: Path) -> list[Path]:
    """All files of a model of which ``path`` is the first: itself, or every part of a split one by llama.cpp's names."""
    match = _PART.fullmatch(path.name)
    if match is None or int(match.group(2)) != 1:
        return [path]
    count = int(match.group(3))
    return [path.with_name(f"{match.group(1)}-{n:05d}-of-{match.group(3)}{path.suffix}") for n in range(1, count + 1)]


def check_whole(path: Path) -> Header:
    """The header of the model at ``path``; of a split one, that of its first part.

    Raises ModelError, with the cure, if a file of it is missing, cut short, damaged, or no GGUF at all.
    """
    parts = part_paths(path)
    missing = [part.name for part in parts if not part.is_file()]
    if missing:
        raise ModelError(f"{path} is split into {len(parts)} files, and {len(missing)} {'is' if len(missing) == 1 else 'are'} missing: {', '.join(missing[:3])}")
    first, *others = [read_header(part) for part in parts]
    number, count = first.metadata.get("split.no", 0), first.metadata.get("split.count", 0)
    if isinstance(number, int) and number > 0:
        raise ModelError(f"{path} is part {number + 1} of a split model; give its first part with -m")
    if isinstance(count, int) and count > 1 and len(parts) != count:
        raise ModelError(f"{path} is the first of {count} parts, but is not named so; name them NAME-00001-of-{count:05d}.gguf and so on")
    for part, header in zip(parts[1:], others, strict=True):
        _check_bytes(part, header)
    _check_bytes(path, first)
    return first


def read_header(path: Path) -> Header:
    """Read the header of one file. Raises ModelError if it is no GGUF, is cut short in the header, or announces what
    cannot be."""
    try:
        with path.open("rb") as file:
            reader = _Reader(path, file)
            magic = bytes(reader.take(min(4, reader.file_bytes)))
            if magic != b"GGUF":
                raise ModelError(f"{path} is not a GGUF file (it starts with {magic!r}, not b'GGUF')")
            return _read(reader)
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror or error}") from None


def _check_bytes(path: Path, header: Header) -> None:
    if header.file_bytes < header.needed_bytes:
        raise ModelError(
            f"{path} is cut short: it has {header.file_bytes:,} bytes of the {header.needed_bytes:,} that its header"
            " announces; download or copy it again"
        )


class _Reader:
    """Bytes of a file from its start, fetched in pieces."""

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self.path, self._file = path, file
        self.file_bytes = file.seek(0, 2)
        file.seek(0)
        self.data, self.at = bytearray(), 0

    def damaged(self, what: str) -> ModelError:
        return ModelError(f"{self.path} is damaged or cut short: {what}; download or copy it again")

    def need(self, n_bytes: int, what: str = "its header") -> None:
        """Have ``n_bytes`` behind ``at`` in ``data``."""
        end = self.at + n_bytes
        if end > self.file_bytes:
            raise self.damaged(f"{what} goes past its end at {self.file_bytes:,} bytes")
        if end > MOST_HEADER_BYTES:
            raise self.damaged(f"{what} goes past {MOST_HEADER_BYTES >> 20} MiB, more than any header takes")
        while len(self.data) < end:
            piece = self._file.read(max(_CHUNK_BYTES, end - len(self.data)))
            if not piece:
                raise self.damaged(f"{what} goes past its end at {self.file_bytes:,} bytes")
            self.data += piece

    def take(self, n_bytes: int, what: str = "its header") -> bytearray:
        self.need(n_bytes, what)
        self.at += n_bytes
        return self.data[self.at - n_bytes : self.at]

    def number(self, form: str, what: str = "its header") -> Any:
        size = struct.calcsize(form)
        self.need(size, what)
        self.at += size
        return struct.unpack_from(form, self.data, self.at - size)[0]

    def text(self, what: str) -> str:
        length = self.number("<Q", what)
        if length > MOST_TEXT_BYTES:
            raise self.damaged(f"{what} has a length of {length:,} bytes")
        return self.take(length, what).decode("utf-8", "replace")

    def skip_texts(self, count: int, what: str) -> None:
        """Vocabularies have hundreds of thousands of texts, hence no call for each."""
        unpack = struct.Struct("<Q").unpack_from
        for _ in range(count):
            if self.at + 8 > len(self.data):
                self.need(8, what)
            (length,) = unpack(self.data, self.at)
            if length > MOST_TEXT_BYTES:
                raise self.damaged(f"{what} has a text of {length:,} bytes")
            self.at += 8 + length
        self.need(0, what)


def _read(reader: _Reader) -> Header:
    version = reader.number("<I")
    if not 2 <= version <= 3:
        hint = "it is written for machines of the other byte order" if version & 0xFFFF == 0 else "versions 2 and 3 can be read"
        raise ModelError(f"{reader.path} is a GGUF of version {version}; {hint}")
    n_tensors, n_values = reader.number("<q"), reader.number("<q")
    for count, most, name in ((n_tensors, MOST_TENSORS, "tensors"), (n_values, MOST_VALUES, "metadata values")):
        if not 0 <= count <= most or count > reader.file_bytes:
            raise reader.damaged(f"it announces {count:,} {name}")
    metadata: dict[str, Any] = {}
    arrays: dict[str, int] = {}
    for i in range(n_values):
        key = reader.text(f"the name of metadata value {i + 1} of {n_values}")
        _read_value(reader, key, metadata, arrays)
    needed = _read_tensors(reader, n_tensors, metadata.get("general.alignment", _ALIGNMENT))
    return Header(version, n_tensors, reader.file_bytes, needed, metadata, arrays)


def _read_value(reader: _Reader, key: str, metadata: dict[str, Any], arrays: dict[str, int]) -> None:
    what = f"metadata {printable(key, 60)!r}"
    kind = reader.number("<I", what)
    if kind == _TEXT:
        metadata[key] = reader.text(what)
    elif kind in _SCALARS:
        metadata[key] = reader.number(_SCALARS[kind], what)
    elif kind == _ARRAY:
        inner, count = reader.number("<I", what), reader.number("<Q", what)
        if count > MOST_ELEMENTS:
            raise reader.damaged(f"{what} announces {count:,} elements")
        if inner == _TEXT:
            reader.skip_texts(count, what)
        elif inner in _SCALARS:
            size = struct.calcsize(_SCALARS[inner]) * count
            reader.need(size, what)
            reader.at += size
        else:
            raise reader.damaged(f"{what} has elements of type {inner}, which there is not")
        arrays[key] = count
    else:
        raise reader.damaged(f"{what} has type {kind}, which there is not")


def _read_tensors(reader: _Reader, count: int, alignment: Any) -> int:
    """Bytes of the file up to the end of its last tensor."""
    from gguf.constants import GGML_QUANT_SIZES  # numpy and all; not needed to list models

    ends = []
    for i in range(count):
        what = f"tensor {i + 1} of {count}"
        name = printable(reader.text(f"the name of {what}"), 60)
        n_dims = reader.number("<I", what)
        if n_dims > 4:
            raise reader.damaged(f"tensor {name!r} has {n_dims} dimensions")
        shape = [reader.number("<q", what) for _ in range(n_dims)]
        if any(size < 0 for size in shape):
            raise reader.damaged(f"tensor {name!r} has a negative size, {shape}")
        kind, offset = reader.number("<I", what), reader.number("<Q", what)
        block, block_bytes = GGML_QUANT_SIZES.get(kind, (0, 0))  # a type that this table lacks is left to llama.cpp
        elements = 1
        for size in shape:
            elements *= size
        ends.append(offset + (elements // block * block_bytes if block else 0))
    if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
        raise reader.damaged(f"its alignment is {printable(str(alignment), 40)}, not a power of two")
    start = -(-reader.at // alignment) * alignment
    return start + max(ends) if ends else reader.at
