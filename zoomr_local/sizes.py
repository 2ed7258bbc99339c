"""Sizes in bytes and counts as people write them. Anybody may import this file; it imports nothing of ours but the errors."""

from __future__ import annotations

import re

from .errors import UsageError

UNITS = {
    "": 1, "b": 1,
    "k": 2**10, "m": 2**20, "g": 2**30, "t": 2**40,
    "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40,
    "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12,
}  # fmt: skip
"""Bytes of each unit, in lower case. A single letter is binary, as in dd and llama.cpp; only KB, MB, GB, TB are decimal."""

MOST_BYTES = 2**62
_MOST_CHARS = 60


def parse_bytes(text: str, flag: str = "size") -> int:
    """Bytes of ``1GiB``, ``64MiB``, ``500MB``, ``1.5g`` or a plain number of bytes; 0 is allowed.

    Raises UsageError naming ``flag`` for anything else, for a part of a byte and for 4 EiB and more.
    """
    match = re.fullmatch(r"\s*0*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)\s*", text)
    unit = UNITS.get(match.group(2).lower()) if match else None
    if unit is None:
        raise UsageError(f"{flag} {shortened(text)}: give a size in bytes, for example 1GiB, 64MiB, 500MB or 1073741824")
    number = match.group(1)
    if float(number) <= MOST_BYTES:  # Python has no integers of more than some thousand digits
        size = float(number) * unit if "." in number else int(number) * unit
    else:
        size = MOST_BYTES
    if size >= MOST_BYTES:
        raise UsageError(f"{flag} {shortened(text)}: that is more than any disk holds; give for example 8GiB")
    if "." in number and unit == 1:
        raise UsageError(f"{flag} {shortened(text)}: a number of bytes is whole; give for example 1GiB")
    return int(size)


def shortened(text: str) -> str:
    """What somebody typed, for an error of one line: a long one without its end."""
    return text if len(text) <= _MOST_CHARS else f"{text[: _MOST_CHARS - 3]}..."


def format_bytes(n_bytes: float) -> str:
    """``1.5 GiB``, ``64 MiB``, ``512 B``: three digits at most behind the largest binary unit that fits."""
    if n_bytes < 1024:
        return f"{int(n_bytes)} B"
    value, unit = float(n_bytes), ""
    for unit in ("KiB", "MiB", "GiB", "TiB"):
        value /= 1024
        if value < 1023.5 or unit == "TiB":
            break
    digits = 0 if value >= 100 else 1 if value >= 10 else 2
    text = f"{value:.{digits}f}"
    return f"{text.rstrip('0').rstrip('.') if '.' in text else text} {unit}"


def counted(n: int, noun: str, several: str | None = None) -> str:
    """``1 token``, ``2 tokens``, ``1,024 tokens``; ``several`` where the plural takes more than an s."""
    return f"{n:,} {noun if n == 1 else several or noun + 's'}"
