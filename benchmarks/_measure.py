"""Time and peak memory, measured the same way by all benchmarks."""

from __future__ import annotations

import ctypes
import multiprocessing
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

Call = Callable[[], Any]


def timed(call: Call, device: str = "cpu") -> float:
    """Return the seconds that a call takes."""
    if device != "cpu":
        torch.cuda.synchronize()
    started = time.perf_counter()
    call()
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def interleaved(
    calls: Mapping[str, Call], repeats: int, slow: Mapping[str, int], device: str = "cpu"
) -> dict[str, list[float]]:
    """Time calls in rounds, so that what disturbs the machine disturbs all of them.

    Args:
        calls: what to time, by name.
        repeats: rounds that count; two more come before.
        slow: names of calls that are to run less often, and how often.
        device: where they run.

    Returns:
        Seconds of each round.
    """
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for round_ in range(repeats + 2):
        for name, call in calls.items():
            if round_ >= 2 if name not in slow else 2 <= round_ < 2 + slow[name]:
                seconds[name].append(timed(call, device))
            elif name not in slow:
                timed(call, device)
    return seconds


def peak(make: Callable[..., Call | None], *arguments: Any, device: str = "cpu") -> float | None:
    """Return the megabytes that a call takes above what it begins with, in a process of its own.

    Args:
        make: returns the call; a function of a module, so that another process finds it.
        *arguments: what it takes.
        device: where the call runs.
    """
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_peak, (make, arguments, device))


def _peak(make: Callable[..., Call | None], arguments: Any, device: str) -> float | None:
    call = make(*arguments)
    if call is None:
        return None
    if device != "cpu":
        call()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    call()  # what a first call keeps, such as a mask, is no part of the peak
    ctypes.CDLL(None).malloc_trim(0)  # glibc: hand back what is free, or it would not show
    before_ = _resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # Linux: begin a new peak
    result = call()
    found = _resident("VmHWM")
    del result
    return found - before_


def _resident(field: str) -> float:
    """Megabytes of memory that this process holds, or held at its peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 2**10 for line in lines if line.startswith(field))
