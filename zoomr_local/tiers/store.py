"""The store of paged-out blocks: an arena in RAM, then a directory on disk, both with limits.

`kv_cache.py` puts pages in and gets them back; a session iterates, reads and restores them. One generation at a
time: ``begin`` forgets the last one's pages.

A page is put once and never changes. Which page is where depends on the order of calls only, never on how fast
the two background threads are: every decision is made by the caller's thread, which waits for a thread where a
decision needs its result. Pages in the arena are in order of last use; the coldest leave first. Past
``_ahead_bytes`` the coldest are written to disk before anybody needs their room, so that eviction seldom waits.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Callable, Iterable

import numpy as np

from ..errors import StorageError, TierSizeError
from ..sizes import format_bytes
from .allocator import aligned
from .codec import RawPages
from .directory import PageDirectory, check_base, default_base, free_bytes, remove_stale
from .entry import Entry, Placement
from .limits import TRANSFER_BYTES, TierLimits
from .moves import Moves
from .pagefile import HEADER_BYTES, Key, PageInfo, remove

__all__ = ["TRANSFER_BYTES", "PageStore", "TierLimits"]


class PageStore(Moves):
    """Pages of one generation at a time.

    Peaks and totals since ``begin``, in bytes: ``ram_peak_bytes``, ``disk_peak_bytes``, ``stored_bytes`` (every
    page once), ``written_bytes`` and ``read_bytes`` (files, headers included), ``largest_bytes`` (of one page, as the
    arena rounds it). ``faults`` counts file operations that failed.
    """

    def __init__(self, limits: TierLimits = TierLimits()) -> None:
        """Allocates nothing. Raises StorageError if a directory that was named cannot be written to."""
        self.limits = limits
        if limits.disk_bytes and limits.directory is not None:
            check_base(limits.directory)
        super().__init__()
        self._forget()
        self._plan(RawPages(), b"\0" * 16, 0, 0)

    # one generation

    def begin(self, codec: Any, fingerprint: bytes, need_bytes: int) -> None:
        """Forget every page and size the tiers for a generation that can never store more than ``need_bytes``.

        The arena is allocated and touched here: of what is needed, not more than the limit. ``codec`` is a
        RawPages or PackedPages; ``fingerprint`` (16 bytes) names model and geometry. Raises TierSizeError if the
        disk could not hold what may go there, or if there is no memory for the arena.
        """
        self.clear()
        ram, disk, transfer = self.limits.shares(need_bytes, codec.lossless)
        if disk:
            base = self.limits.directory or default_base()
            remove_stale(base)  # what a killed run left there takes room that may be needed
            free = free_bytes(base)
            if free < disk:
                raise TierSizeError(
                    f"up to {format_bytes(disk)} of pages may go to {base}, where {format_bytes(free)} are free; lower"
                    f" --kv-disk (now {format_bytes(self.limits.disk_bytes)}), or name another directory with --kv-dir"
                )
            if self._directory is None or not self._directory.path.is_dir():
                self._directory = PageDirectory(base)
        self._arena.begin(ram)
        self._plan(codec, fingerprint, disk, transfer)

    def clear(self) -> None:
        """Forget all pages and delete their files; the arena and the directory are kept for the next generation."""
        self._writer.drain()
        self._reader.drain()
        for entry in self._pages.values():
            if entry.path is not None:
                remove(entry.path)
        self._generation += 1
        self._forget()
        self._arena.begin(0)

    def close(self) -> None:
        """Forget all pages, end the threads, free the arena, delete the directory. Safe to call twice."""
        self.clear()
        self._writer.close()
        self._reader.close()
        self._arena.close()
        if self._directory is not None:
            self._directory.close()
            self._directory = None

    # what is stored

    def __contains__(self, key: Key) -> bool:
        return key in self._pages

    def keys(self) -> list[Key]:
        """Every stored page's key, in the order in which they were put."""
        return list(self._pages)

    def info(self, key: Key) -> PageInfo:
        """Sizes, positions and type of a stored page."""
        return self._pages[key].info

    def put(self, key: Key, first: int, n_tokens: int, raw_bytes: int, write: Callable[[np.ndarray], Any]) -> int | None:
        """Store a new page: ``write`` is called once, with the uint8 [raw_bytes] array to fill.

        Returns the bytes it takes in a tier, or None, with nothing changed but colder pages moved to disk, if
        neither tier has room for it.
        """
        if key in self._pages:
            raise ValueError(f"{key} is stored already")
        stored = self.codec.stored_bytes(raw_bytes, n_tokens)
        info = PageInfo(key, self.fingerprint, self.codec.page_type, first, n_tokens, raw_bytes, stored)
        entry = Entry(info)
        if not self._place(entry) and not self._claim_disk(entry):
            return None
        if self.codec.lossless and entry.offset is not None:
            write(self._arena.view(entry))
        else:
            raw = self._buffers.take(raw_bytes)
            write(raw)
            if entry.offset is not None:
                entry.filling = self._writer.submit(self._buffers.done_with, raw, self.codec.pack, raw, self._arena.view(entry))
            else:
                self._write_directly(entry, raw)
        self._admit(entry)
        self._write_ahead()
        return stored

    def could_hold(self, raw_bytes: int, n_tokens: int) -> bool:
        """Whether a page of this size would have room if nothing else were stored."""
        stored = self.codec.stored_bytes(raw_bytes, n_tokens)
        return aligned(stored) <= self._arena.capacity_bytes or HEADER_BYTES + stored <= self._disk_limit

    def placements(self) -> list[Placement]:
        """Where every page is, coldest first among those in RAM: with the pages' bytes, all a session needs to keep."""
        entries = [e for e in self._pages.values() if e.offset is None] + list(self._arena.pages.values())
        return [
            Placement(e.info, e.offset, e.on_disk, e.info.key in self._ahead, e.buffer is not None) for e in entries
        ]

    def restore(self, placed: Placement, stored: np.ndarray) -> bool:
        """Put back a page from its stored bytes (uint8 [stored_bytes]); in the order of ``placements``.

        It goes where it was if that is possible within this store's limits, else where ``put`` would put it.
        False if neither tier has room. Raises StorageError for a page of another type, model or size.
        """
        info = placed.info
        if (info.page_type, info.fingerprint) != (self.codec.page_type, self.fingerprint) or stored.nbytes != info.stored_bytes:
            raise StorageError(f"the page of block {info.key[0]} was stored by another model, cache or --kv-page-type")
        if info.key in self._pages:
            raise ValueError(f"{info.key} is stored already")
        entry = Entry(info)
        as_it_was = self._arena.place(entry, placed.offset) if placed.offset is not None else self._claim_disk(entry)
        if not as_it_was and not self._place(entry) and not self._claim_disk(entry):
            return False
        if entry.offset is not None:
            self._arena.view(entry)[:] = stored
            if placed.on_disk:
                self._send(entry)
        else:
            self._write_stored(entry, stored)
            if placed.ahead:
                self._ahead[info.key] = entry
            room = not self._buffer_bytes or self._buffer_bytes + info.stored_bytes <= self._read_limit
            if placed.ahead and placed.buffered and room:
                entry.buffer = np.array(stored)
                self._buffer_bytes += entry.buffer.nbytes
        self._admit(entry)
        return True

    def _admit(self, entry: Entry) -> None:
        info = entry.info
        self._pages[info.key] = entry
        self.stored_bytes += info.stored_bytes
        self.largest_bytes = max(self.largest_bytes, aligned(info.stored_bytes))
        self._note_peaks()

    def stored(self, key: Key) -> np.ndarray | None:
        """A page's exact stored bytes, uint8 [stored_bytes], after waiting for whatever is still being done to it.

        Changes nothing about where the page is; valid until the next call. None if its file cannot be read as it
        was written: the page is lost then, see ``take_faults``.
        """
        entry = self._pages[key]
        if entry.offset is not None or entry.buffer is not None:
            return self._filled(entry)
        out = np.empty(entry.info.stored_bytes, np.uint8)
        self._start_read(entry, out)
        data = self._filled(entry)
        entry.filling, entry.from_disk = None, False
        return data

    def file(self, key: Key) -> tuple[Path, int, int] | None:
        """A page's file, where in it the stored bytes begin, and their CRC-32; None if it has none, or not yet.

        The file is never changed, only deleted in time: a link to it stays a copy of the page.
        """
        entry = self._pages[key]
        if not entry.on_disk or entry.writing is not None or entry.checksum is None:
            return None
        return entry.path, HEADER_BYTES, entry.checksum

    def get(self, key: Key) -> np.ndarray | None:
        """A page in the cache's own bytes, uint8 [raw_bytes]; otherwise like ``stored``, and counts as a use."""
        data = self.stored(key)
        if data is None:
            return None
        entry = self._pages[key]
        self._touch(entry)
        self._forget_ahead(entry)
        if self.codec.lossless:
            return data
        if len(self._scratch) < entry.info.raw_bytes:
            self._scratch = np.empty(entry.info.raw_bytes, np.uint8)
        raw = self._scratch[: entry.info.raw_bytes]
        self.codec.unpack(data, raw)
        return raw

    def touch(self, key: Key) -> None:
        """Note a use of a page, so that colder ones leave the arena first."""
        self._touch(self._pages[key])

    def drop(self, key: Key) -> None:
        """Forget one page for good, in both tiers."""
        entry = self._pages[key]
        entry.wait_filled()
        self._settle_write(entry, wait=True)
        if self._pages.get(key) is entry:  # its writing may have failed just now
            self._lose(entry)

    # reading ahead

    def pin(self, keys: Iterable[Key]) -> None:
        """Until the next call these pages are not evicted; reads of others that were not picked up are forgotten."""
        self._pinned = set(keys)
        for entry in [e for key, e in self._ahead.items() if key not in self._pinned]:
            self._forget_ahead(entry)

    def at_hand(self, key: Key) -> bool:
        """True if ``get`` needs no read that has not been asked for: in RAM, or read ahead."""
        return self._pages[key].offset is not None or key in self._ahead

    def read_ahead(self, key: Key) -> int:
        """Begin to read a page that is not at hand; from now on it is. Returns its file's bytes.

        It lands in the arena, in place of colder pages, else in a buffer beside it; where there is room for
        neither, it is read when it is needed.
        """
        entry = self._pages[key]
        n = entry.info.stored_bytes
        if self._place(entry):
            self._start_read(entry, self._arena.view(entry))
        else:
            self._ahead[key] = entry
            if not self._buffer_bytes or self._buffer_bytes + n <= self._read_limit:
                entry.buffer = np.empty(n, np.uint8)
                self._buffer_bytes += n
                self._start_read(entry, entry.buffer)
        self._note_peaks()
        return entry.info.file_bytes
