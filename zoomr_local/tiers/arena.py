"""The RAM tier: one piece of memory, allocated and touched once, and the pages in it in order of last use."""

from __future__ import annotations

from typing import Callable

import numpy as np

from ..errors import TierSizeError
from ..sizes import format_bytes
from .allocator import FreeList, aligned
from .entry import Entry
from .pagefile import Key

PAGE_OF_MEMORY_BYTES = 4096


class Arena:
    """Memory of at most ``capacity_bytes``; which pages may leave it is the store's decision."""

    def __init__(self) -> None:
        self._memory = np.empty(0, np.uint8)
        self.pages: dict[Key, Entry] = {}  # coldest first
        self._space = FreeList(0)

    def begin(self, n_bytes: int) -> None:
        """Forget all pages and use ``n_bytes``; memory that is there already is kept. Raises TierSizeError."""
        if len(self._memory) < n_bytes:
            self._memory = np.empty(0, np.uint8)
            try:
                self._memory = np.empty(n_bytes, np.uint8)
            except MemoryError:
                raise TierSizeError(f"no memory for --kv-ram: {format_bytes(n_bytes)} are needed; lower it") from None
            self._memory[::PAGE_OF_MEMORY_BYTES] = 0  # fresh memory costs milliseconds to touch: now, not in mid-thought
        self.pages = {}
        self._space = FreeList(n_bytes)

    def close(self) -> None:
        """Give the memory back."""
        self._memory = np.empty(0, np.uint8)
        self.pages = {}
        self._space = FreeList(0)

    @property
    def capacity_bytes(self) -> int:
        """Bytes that pages may take, the rounding of each included."""
        return self._space.capacity_bytes

    @property
    def used_bytes(self) -> int:
        """Bytes that pages take."""
        return self._space.used_bytes

    @property
    def free_bytes(self) -> int:
        """Bytes that no page takes, in however many holes."""
        return self._space.free_bytes

    def view(self, entry: Entry) -> np.ndarray:
        """The page's bytes, uint8 [stored_bytes]; valid until the next compaction or eviction."""
        return self._memory[entry.offset : entry.offset + entry.info.stored_bytes]

    def place(self, entry: Entry, offset: int | None = None) -> bool:
        """Give a page room, as the most recently used, at ``offset`` if that is given; False if there is none."""
        if offset is None:
            entry.offset = self._space.take(entry.info.stored_bytes)
        elif self._space.take_at(offset, entry.info.stored_bytes):
            entry.offset = offset
        if entry.offset is None:
            return False
        self.pages[entry.info.key] = entry
        return True

    def touch(self, entry: Entry) -> None:
        """Make a page the most recently used."""
        self.pages[entry.info.key] = self.pages.pop(entry.info.key)

    def remove(self, entry: Entry) -> None:
        """Free a page's room; nobody may be reading or writing it any more."""
        self._space.free(entry.offset, entry.info.stored_bytes)
        entry.offset = None
        del self.pages[entry.info.key]

    def compact(self, quiet: Callable[[Entry], None]) -> None:
        """Move the pages together, so that what is free is one hole. ``quiet`` ends what is going on with a page."""
        end = 0
        for entry in sorted(self.pages.values(), key=lambda entry: entry.offset):
            quiet(entry)
            if entry.offset is None:  # it was lost just now
                continue
            if entry.offset != end:
                data = self.view(entry)
                self._memory[end : end + len(data)] = data
                entry.offset = end
            end += aligned(entry.info.stored_bytes)
        self._space.reset(end)
