"""Time and peak memory, measured the same way by all benchmarks."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import statistics
import sys
import time
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

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


class Live(TorchDispatchMode):
    """Follows the bytes of all tensors that exist, made while it is active.

    What a process holds is more: allocators keep freed blocks that no new tensor fits.
    """

    def __init__(self) -> None:
        super().__init__()
        self._sizes: dict[int, int] = {}
        self.total = self.peak = 0

    def _gone(self, key: int) -> None:
        self.total -= self._sizes.pop(key, 0)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call the function and take note of new storages."""
        for value in tree_leaves((args, kwargs)):
            if isinstance(value, torch.Tensor):
                self._see(value, was_there=True)  # such as weights, though this is their first view
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, torch.Tensor):
                self._see(value)
        self.peak = max(self.peak, self.total)
        return result

    def _see(self, value: torch.Tensor, was_there: bool = False) -> None:
        if value.layout == torch.sparse_csr:  # has no storage of its own
            for part in (value.crow_indices(), value.col_indices(), value.values()):
                self._see(part, was_there)
            return
        storage = value.untyped_storage()
        key = storage._cdata
        if key not in self._sizes:
            self._sizes[key] = 0 if was_there else storage.nbytes()
            self.total += self._sizes[key]
            weakref.finalize(storage, self._gone, key)


def peak_of_tensors(make: Callable[..., Call | None], *arguments: Any) -> float:
    """Return the megabytes of tensors that exist at most during a call, beyond those before it."""
    call = make(*arguments)
    assert call is not None
    call()
    with Live() as live:
        call()
    return live.peak / 2**20


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
    before_ = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # Linux: begin a new peak
    result = call()
    found = resident("VmHWM")
    del result
    return found - before_


def resident(field: str) -> float:
    """Megabytes of memory that this process holds, or held at its peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 2**10 for line in lines if line.startswith(field))


class Measured:
    """Seconds of a block, and the megabytes that the process held at most beyond those before.

    ``before`` is what it held to begin with. Linux; elsewhere, and where the kernel does not allow
    it, megabytes are None.
    """

    def __enter__(self) -> Measured:
        """Begin."""
        self.seconds, self.megabytes = 0.0, None
        try:
            ctypes.CDLL(None).malloc_trim(0)
            self.before: float | None = resident("VmRSS")
            Path("/proc/self/clear_refs").write_text("5")
        except OSError:
            self.before = None
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
            self._on_gpu = torch.cuda.memory_allocated()
        self._started = time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        """End."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds = time.perf_counter() - self._started
        if torch.cuda.is_available():
            used = torch.cuda.max_memory_allocated() - self._on_gpu
            self.megabytes = used / 2**20 if used else None
        if self.megabytes is None and self.before is not None:
            self.megabytes = max(0.0, resident("VmHWM") - self.before)


def spread(wall: list[float], cpu: list[float]) -> dict[str, Any]:
    """What is reported of paired ratios, by the clock and of processor time."""
    return {
        "ratio": statistics.median(wall),
        "lowest": min(wall),
        "highest": max(wall),
        "ratios": wall,
        "cpu_ratio": statistics.median(cpu),
        "cpu_ratios": cpu,
    }


_KEPT = {
    "MALLOC_MMAP_THRESHOLD_": str(2**30),
    "MALLOC_TRIM_THRESHOLD_": str(2**30),
    "MALLOC_TOP_PAD_": str(2**28),
}


def keep_freed_memory() -> None:
    """Start the script anew with a C library that keeps freed memory, if it has not been.

    glibc otherwise hands large blocks back after each batch, and which of two fits in one process
    pays for their pages is chance: ratios between them moved by a third.
    """
    if any(os.environ.get(name) != value for name, value in _KEPT.items()):
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **_KEPT})


@contextmanager
def freed_memory_given_back() -> Iterator[None]:
    """Have processes that are started in the block hand memory back as they would by default."""
    held = {name: os.environ.pop(name, None) for name in _KEPT}
    try:
        yield
    finally:
        os.environ.update({name: value for name, value in held.items() if value is not None})
