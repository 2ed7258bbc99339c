"""What this machine has: free memory, free disk, processor time, what this process takes. Imports nothing of ours but the errors.

No dependency is needed for it: Linux and its containers say it in /proc and /sys, macOS in two of its own commands.
GPUs are asked through llama.cpp (`libllama.gpus`), not here.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from .errors import EngineError

UNLIMITED = 1 << 60
"""A control group without a limit says "max" or a number near 2**63."""


@dataclass(frozen=True)
class Memory:
    """RAM in bytes. ``free_bytes`` is what new processes can get without swapping: reclaimable page cache counts.

    ``source`` says who answered, for people: "this machine", "this container's limit".
    """

    free_bytes: int
    total_bytes: int
    source: str


def memory(root: Path = Path("/")) -> Memory:
    """RAM of this machine, or of the container if that allows less. ``root`` is for tests.

    Raises EngineError where the system says nothing.
    """
    try:
        found = _mac_memory() if sys.platform == "darwin" else _linux_memory(root)
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        raise EngineError(
            f"this system does not say how much memory is free ({error}); `zoomr plan --memory 8GiB` plans without it,"
            " and --kv-budget takes a number of tokens"
        ) from None
    limit = _container_limit(root)
    return min(found, limit, key=lambda m: m.free_bytes) if limit else found


def _linux_memory(root: Path) -> Memory:
    fields = dict(re.findall(r"^(\w+):\s+(\d+) kB", (root / "proc/meminfo").read_text(), re.M))
    if not {"MemAvailable", "MemTotal"} <= fields.keys():
        raise ValueError("no MemAvailable in /proc/meminfo")
    return Memory(int(fields["MemAvailable"]) * 1024, int(fields["MemTotal"]) * 1024, "this machine")


def _container_limit(root: Path) -> Memory | None:
    """The tightest memory limit of the control groups (versions 1 and 2) that this process is in, or None."""
    tightest = None
    v2 = ("memory.max", "memory.current", "inactive_file")
    v1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
    for folder, limit_name, used_name, cache_name in _groups(root, "memory", v2, v1):
        try:
            limit = int((folder / limit_name).read_text())
            used = int((folder / used_name).read_text())
            cache = re.search(rf"^{cache_name} (\d+)$", (folder / "memory.stat").read_text(), re.M)
        except (OSError, ValueError):
            continue  # "max", or a file this kernel does not have
        if limit < UNLIMITED:
            free = max(0, limit - used + int(cache.group(1) if cache else 0))
            if tightest is None or free < tightest.free_bytes:
                tightest = Memory(free, limit, "this container's limit")
    return tightest


def cpu_limit(root: Path = Path("/")) -> float | None:
    """Cores' worth of processor time that the container's control groups (versions 1 and 2) allow, or None. ``root`` is for tests."""
    found = []
    for folder, *names in _groups(root, "cpu", ("cpu.max",), ("cpu.cfs_quota_us", "cpu.cfs_period_us")):
        try:
            quota, period = map(int, " ".join((folder / name).read_text() for name in names).split())
        except (OSError, ValueError):
            continue  # "max", or a file this kernel does not have
        if quota > 0 and period > 0:  # -1: no limit
            found.append(quota / period)
    return min(found, default=None)


def _groups(root: Path, controller: str, v2: tuple[str, ...], v1: tuple[str, ...]) -> list[tuple]:
    """(folder, file names) of every control group this process is in, in either version."""
    top = root / "sys/fs/cgroup"
    found = [(top, *v2), (top / controller, *v1)]
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return found
    for line in lines:
        _, controllers, path = line.split(":", 2)
        at, names = (top, v2) if not controllers else (top / controller, v1)
        if controllers and controller not in controllers.split(","):
            continue
        parts = Path(path).parts[1:]
        found += [(at.joinpath(*parts[: i + 1]), *names) for i in range(len(parts))]
    return found


def _mac_memory() -> Memory:
    """Not tested on a Mac: written from Apple's manual pages of sysctl and vm_stat."""
    run = lambda *command: subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout  # noqa: E731
    return mac_memory_of(run("sysctl", "-n", "hw.memsize"), run("vm_stat"))


def mac_memory_of(memsize: str, vm_stat: str) -> Memory:
    """What `sysctl -n hw.memsize` and `vm_stat` say together: pages that are free, or given back when asked for."""
    page = int(re.search(r"page size of (\d+) bytes", vm_stat).group(1))
    pages = {name: int(n) for name, n in re.findall(r"^Pages ([a-z ]+):\s+(\d+)\.", vm_stat, re.M)}
    return Memory(sum(pages.get(k, 0) for k in ("free", "inactive", "speculative", "purgeable")) * page, int(memsize), "this machine")


def unified_memory() -> bool:
    """True where the GPU's memory is the machine's: Apple silicon."""
    return sys.platform == "darwin" and platform.machine() == "arm64"


def own_bytes() -> int:
    """Resident memory of this process now, in bytes; 0 where the system does not say."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        pass
    try:
        done = subprocess.run(["ps", "-o", "rss=", "-p", str(os.getpid())], capture_output=True, text=True, timeout=10)
        return int(done.stdout) * 1024
    except (OSError, ValueError, subprocess.SubprocessError):
        return 0


def free_disk_bytes(folder: Path) -> int | None:
    """Free bytes of the file system that ``folder`` is on, or would be on; None if that cannot be asked."""
    for place in (folder, *folder.absolute().parents):
        try:
            return shutil.disk_usage(place).free
        except FileNotFoundError:
            continue
        except OSError:
            return None
    return None
