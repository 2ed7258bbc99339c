"""What the operating system says of a measurement: memory of this process, and who else is computing.

`bench_case.py` reads its own memory here and marks how busy the machine was around every measurement;
`benchmarks/` uses the same clocks. Standard library only, so that a baseline process can use it without the
engine. Sizes are bytes, times are seconds; what a system does not tell is None.
"""

from __future__ import annotations

import os
import resource
import sys
import time
from dataclasses import dataclass
from pathlib import Path

BUSY_CORES = 0.1
"""Other processes that use more of a core than this spoil a figure: threads wait for each other."""

TICK_SECONDS = 0.02
"""The kernel counts CPU time in hundredths of a second, for the machine and for the process: less than this is nothing."""

BUSY_LOAD = 0.5
"""Load average above which a machine is busy, where the kernel does not tell CPU time (no /proc)."""


def process_cpu_seconds(pid: int) -> float:
    """User and system CPU seconds of a process, all its threads; 0 where /proc is missing."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def machine_cpu_seconds() -> float:
    """CPU seconds since boot that were not this machine's to use freely: those of all its processes, and those that its hypervisor
    gave to other machines while somebody here wanted to compute (steal: it slows a measurement as a process does). 0 where /proc is missing."""
    try:
        fields = [int(n) for n in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
    except OSError:
        return 0.0
    user, nice, system, _idle, _iowait, irq, softirq, steal = fields
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def load_average() -> float:
    """The one-minute load average."""
    return os.getloadavg()[0]


@dataclass(frozen=True)
class Busy:
    """How much other processes computed while something was measured: ``others_cores`` of a core, None if untold."""

    wall_seconds: float
    others_seconds: float | None

    @property
    def others_cores(self) -> float | None:
        """Cores that others used on average; None where the system does not say."""
        if self.others_seconds is None:
            return None
        return self.others_seconds / self.wall_seconds if self.wall_seconds > 0 else 0.0

    @property
    def reason(self) -> str:
        """Why a figure taken meanwhile is not to be trusted; empty if it is."""
        if self.others_seconds is None or self.others_seconds <= TICK_SECONDS + BUSY_CORES * self.wall_seconds:
            return ""
        return f"other processes used {self.others_cores:.2f} cores"


class Meter:
    """A clock of wall time, of this process's CPU time and of the machine's."""

    def __init__(self) -> None:
        self._mark = self._read()

    def _read(self) -> tuple[float, float, float]:
        return time.perf_counter(), machine_cpu_seconds(), process_cpu_seconds(os.getpid())

    def start(self) -> None:
        """Begin to measure."""
        self._mark = self._read()

    def stop(self) -> Busy:
        """What others did since ``start``."""
        wall, machine, own = (b - a for a, b in zip(self._mark, self._read()))
        told = machine_cpu_seconds() > 0
        return Busy(wall, max(0.0, machine - own) if told else None)


def why_busy_now(seconds: float = 1.0) -> str:
    """Why the machine is too busy to begin, or empty: CPU time over ``seconds`` of waiting, else the load average."""
    meter = Meter()
    time.sleep(seconds)
    busy = meter.stop()
    if busy.others_seconds is not None:
        return busy.reason
    load = load_average()
    return f"the load average is {load:.2f}" if load > BUSY_LOAD else ""


# ---------------------------------------------------------------- memory


@dataclass(frozen=True)
class Memory:
    """Memory of this process in bytes. ``peak_bytes`` is the most since the last ``reset_peak``, else since its start.

    ``anonymous_bytes`` is the resident part without pages of files (mapped weights); None where untold.
    """

    resident_bytes: int | None
    anonymous_bytes: int | None
    peak_bytes: int


def memory() -> Memory:
    """What the operating system counts for this process now."""
    status = _status()
    if "VmHWM" in status:
        anonymous = status.get("RssAnon", 0) + status.get("RssShmem", 0)
        return Memory(status["VmRSS"], anonymous if "RssAnon" in status else None, status["VmHWM"])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return Memory(None, None, peak if sys.platform == "darwin" else 1024 * peak)


def reset_peak() -> bool:
    """Let the peak count from now. False where the system cannot: the peak is then the whole process's."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _status() -> dict[str, int]:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return {}
    fields = (line.split() for line in lines if line.endswith(" kB"))
    return {field[0].rstrip(":"): 1024 * int(field[1]) for field in fields}
