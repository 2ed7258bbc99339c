"""Where paged-out blocks live: byte pages that are written once and never change.

Only `kv_cache.py` stores and fetches pages. This version has one tier, RAM; pages are kept until the generation
ends and their bytes are not limited (the disk tier and its limits come with DESIGN.md section 8).
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Page:
    """A stored page: a read-only uint8 view of ``n_bytes`` and its CRC-32."""

    data: np.ndarray
    checksum: int

    @property
    def n_bytes(self) -> int:
        """Size in bytes."""
        return self.data.nbytes

    def intact(self) -> bool:
        """True if the bytes still have the checksum they were stored with; in RAM only tests ask."""
        return zlib.crc32(self.data) == self.checksum


class RamTier:
    """An arena of large slabs; pages are cut from them one after the other and freed all at once.

    Slabs are big because fresh memory costs milliseconds to touch the first time; they are kept for the next
    generation.
    """

    slab_bytes = 32 << 20

    def __init__(self) -> None:
        self._slabs: list[np.ndarray] = []
        self._slab = 0
        self._used = 0
        self.stored_bytes = 0

    def allocate(self, n_bytes: int) -> np.ndarray:
        """A writable uint8 array of ``n_bytes``; hand it back through ``store`` once it is filled."""
        while True:
            if self._slab == len(self._slabs):
                self._slabs.append(np.empty(max(self.slab_bytes, n_bytes), np.uint8))
            slab = self._slabs[self._slab]
            if self._used + n_bytes <= slab.nbytes:
                start, self._used = self._used, self._used + n_bytes
                return slab[start : start + n_bytes]
            self._slab, self._used = self._slab + 1, 0

    def store(self, data: np.ndarray) -> Page:
        """Seal an allocated array: from now on its bytes are immutable."""
        data.flags.writeable = False
        self.stored_bytes += data.nbytes
        return Page(data, zlib.crc32(data))

    def clear(self) -> None:
        """Forget all pages, keep the memory."""
        self._slab = self._used = self.stored_bytes = 0
