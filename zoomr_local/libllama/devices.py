"""The machine as llama.cpp's backends see it: cores, GPUs, and what buffers hold. Imported by this package and the bench."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass

from zoomr_local.machine import cpu_limit

from .library import GpuEntry, zoomr


def usable_cores() -> int:
    """Threads that can decode at once: the physical cores, or fewer where a container's share of processor time is smaller.

    More than that wait for each other while none of them runs.
    """
    limit = cpu_limit()
    return physical_cores() if limit is None else max(1, min(physical_cores(), math.ceil(limit)))


def physical_cores() -> int:
    """Cores this process may run on, hardware threads counted once: more threads than that slow decoding."""
    if not hasattr(os, "sched_getaffinity"):
        return os.cpu_count() or 1
    cpus = os.sched_getaffinity(0)
    seen = set()
    for cpu in cpus:
        base = f"/sys/devices/system/cpu/cpu{cpu}/topology/"
        try:
            with open(base + "physical_package_id") as package, open(base + "core_id") as core:
                seen.add((package.read(), core.read()))
        except OSError:
            return len(cpus)
    return len(seen)


@dataclass(frozen=True)
class BufferUse:
    """What a model and one context hold in one kind of buffer, in bytes; ``compute`` counts the logits' buffer too.

    ``in_ram`` is False for a device's own memory; ``mappable`` weights are used from the mapped file (page cache).
    """

    buffer: str
    device: str
    weights_bytes: int
    kv_bytes: int
    compute_bytes: int
    index_bytes: int
    in_ram: bool
    mappable: bool


@dataclass(frozen=True)
class Gpu:
    """A GPU that the library was built for: its memory in bytes; ``shares_ram`` if it has none of its own."""

    device: str
    description: str
    free_bytes: int
    total_bytes: int
    shares_ram: bool


def gpus() -> list[Gpu]:
    """The machine's GPUs, as llama.cpp's backends see them; empty for a CPU build."""
    entries = (GpuEntry * 16)()
    found = min(zoomr.gpus(entries, len(entries)), len(entries))
    return [Gpu(e.device.decode(), e.description.decode(errors="replace"), e.free, e.total, e.shares_ram) for e in entries[:found]]
