"""Readings of the machine around a measurement: idleness, CPU use and steal, peak memory of a process tree.

Reads /proc and so needs Linux; elsewhere the readings are None and nothing waits. No torch.
"""

from __future__ import annotations

import os
import platform
import time
from dataclasses import asdict, dataclass
from pathlib import Path

PROC = Path("/proc")


@dataclass(frozen=True, slots=True)
class CpuTimes:
    """Jiffies of all cores since boot."""

    idle: int
    steal: int
    total: int


@dataclass(frozen=True, slots=True)
class CpuUse:
    """Shares of all cores between two readings, 0 to 1. steal: taken by the hypervisor."""

    busy: float
    steal: float


def cpu_times() -> CpuTimes | None:
    try:
        first = (PROC / "stat").read_text().splitlines()[0]
    except OSError:
        return None
    user, nice, system, idle, iowait, irq, softirq, steal = (int(x) for x in first.split()[1:9])
    return CpuTimes(idle + iowait, steal, user + nice + system + idle + iowait + irq + softirq + steal)


def cpu_use(before: CpuTimes | None, after: CpuTimes | None) -> CpuUse | None:
    if before is None or after is None:
        return None
    total = max(1, after.total - before.total)
    return CpuUse(
        busy=round(1 - (after.idle - before.idle) / total, 4),
        steal=round((after.steal - before.steal) / total, 4),
    )


@dataclass(frozen=True, slots=True)
class Idleness:
    """How busy the machine still was when the wait ended, and how long it lasted."""

    busy_before: float | None
    waited_s: float
    timed_out: bool


def wait_idle(max_busy: float = 0.15, window_s: float = 2.0, timeout_s: float = 180.0) -> Idleness:
    """Wait until less than `max_busy` of all cores was in use for `window_s` seconds, or the time is out."""
    start = time.monotonic()
    while True:
        before = cpu_times()
        if before is None:
            return Idleness(None, 0.0, False)
        time.sleep(window_s)
        use = cpu_use(before, cpu_times())
        waited = round(time.monotonic() - start, 1)
        if use is not None and use.busy < max_busy:
            return Idleness(use.busy, waited, False)
        if waited > timeout_s:
            return Idleness(None if use is None else use.busy, waited, True)


def _children(pid: int) -> list[int]:
    children: list[int] = []
    for path in (PROC / str(pid) / "task").glob("*/children"):
        try:
            children += [int(x) for x in path.read_text().split()]
        except OSError:
            # The thread ended between the listing and the read.
            continue
    return children


def peak_rss_mb(pid: int | None = None) -> float | None:
    """Sum of the peak resident sizes of a process and its living descendants, in MiB."""
    todo, total_kb = [os.getpid() if pid is None else pid], 0
    while todo:
        current = todo.pop()
        try:
            status = (PROC / str(current) / "status").read_text()
        except OSError:
            continue
        total_kb += sum(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM"))
        todo += _children(current)
    return round(total_kb / 1024, 1) if total_kb else None


@dataclass(frozen=True, slots=True)
class Machine:
    """What the measurements ran on. memory_gib: of the whole machine."""

    cpu: str
    num_cores: int
    isa: tuple[str, ...]
    memory_gib: float
    system: str
    python: str


_ISA = ("avx2", "avx512f", "avx512_bf16", "avx512_vnni", "avx_vnni", "amx_bf16", "amx_int8", "asimd", "bf16")


def machine() -> Machine:
    cpu, flags = platform.processor() or platform.machine(), set[str]()
    try:
        for line in (PROC / "cpuinfo").read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                cpu = value.strip()
            if key.strip() in ("flags", "Features"):
                flags |= set(value.split())
    except OSError:
        # Not Linux: the name from `platform` is what there is.
        pass
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return Machine(
        cpu=cpu,
        num_cores=cores,
        isa=tuple(name for name in _ISA if name in flags),
        memory_gib=round(memory, 1),
        system=platform.platform(),
        python=platform.python_version(),
    )


def as_dict(reading: Machine | Idleness | CpuUse | None) -> dict[str, object] | None:
    return None if reading is None else asdict(reading)
