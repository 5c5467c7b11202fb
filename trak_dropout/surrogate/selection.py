"""Choosing training samples by their influence: facility location, or the largest means.

Facility location (arXiv 2502.09969 uses it with conditional gain) values a selection A, given
samples P that are there anyway, by ``sum_j max(0, max over A and P of influence_ij)`` beyond what P
alone has: every target j counts its best sample. Maximised greedily with lazy bounds (Minoux
1978), which gives at least ``1 - 1/e`` of the best value.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from trak_dropout._checks import check_integer

_BLOCK_VALUES = 4 * 2**20
_BATCH = 16


class InfluenceRows(Protocol):
    """Influences ``(n, m)`` whose rows can be had: an array, a memory map, or predictions."""

    @property
    def shape(self) -> tuple[int, ...]:
        """``(n, m)``."""

    def __getitem__(self, rows: Any, /) -> Any:
        """Rows by a slice or by an array of row numbers, ``(r, m)``."""


def select(
    influences: InfluenceRows,
    share: float | None = 0.3,
    *,
    count: int | None = None,
    method: Literal["facility_location", "top"] = "facility_location",
    given: ArrayLike = (),
    groups: ArrayLike | None = None,
    helpful_first: bool = True,
) -> NDArray[np.int64]:
    """Choose training samples by their influence on targets.

    Memory is a few rows of influences at a time, and a few numbers for each row.

    Args:
        influences: ``(n, m)``, the influence of each training sample on each target, positive where
            it helps: an array, a memory map, or `PredictedInfluences`.
        share: which share of the training samples to choose, in (0, 1].
        count: how many instead.
        method: ``"facility_location"`` covers every target by its most helpful sample; harm counts
            nothing. Once each target has the best that is left, another round begins on the
            remaining samples, as if there were no others; when none helps any target, the rest goes
            by mean. ``"top"`` takes the largest mean influences.
        given: numbers of training samples that are there anyway: they are not chosen, and targets
            that they cover count only for what is beyond (conditional gain).

        groups: the group of each training sample, such as its label, integers ``(n,)``: the same
            share is chosen of each, group by group. Influence alone may leave out whole classes.
        helpful_first: whether facility location turns to samples whose mean influence is negative
            only when all others are chosen. Because harm counts nothing there, mislabeled samples,
            which help the targets of their wrong label, would be taken otherwise; False is the
            paper's facility location.

    Returns:
        Numbers of the chosen samples, int64, in the order of choice, without repetition.

    Raises:
        ValueError: ``share`` or ``count`` is out of range, ``method`` is neither, ``given`` is out
            of range, ``groups`` does not fit, or an influence is NaN or infinite.
    """
    shape = tuple(influences.shape)
    if len(shape) != 2 or 0 in shape:
        raise ValueError(f"influences must be of shape (n, m), none of them 0, got {shape}")
    if method not in ("facility_location", "top"):
        raise ValueError(f"method must be 'facility_location' or 'top', got {method!r}")
    have = np.asarray(given)
    have = np.unique(have).astype(np.int64) if have.size else np.zeros(0, np.int64)
    if np.asarray(given).size and (
        np.asarray(given).dtype.kind not in "iu" or have.min() < 0 or have.max() >= shape[0]
    ):
        raise ValueError(f"given must be training samples' numbers from 0 to {shape[0] - 1}")
    if count is None:
        if share is None or isinstance(share, bool) or not 0 < share <= 1:
            raise ValueError(f"share must be in (0, 1], got {share!r}")
        count = min(max(1, round(share * shape[0])), shape[0] - len(have))
    count = check_integer("count", count, minimum=1)
    if count > shape[0] - len(have):
        raise ValueError(
            f"count={count} is above the {shape[0] - len(have)} training samples to choose from"
        )
    free = np.setdiff1d(np.arange(shape[0]), have)
    means = np.zeros(shape[0])
    for rows, block in _blocks(influences, free):
        means[rows] = block.mean(1)
    chosen = []
    for members, wanted in _shares(free, count, groups, shape[0]):
        by_mean = members[np.argsort(-means[members], kind="stable")]
        if method == "top":
            chosen.append(by_mean[:wanted])
            continue
        helpful = means[members] > 0
        parts = (members[helpful], members[~helpful]) if helpful_first else (members,)
        for part in parts:
            few = min(wanted, len(part))
            covering = _cover(influences, part, few, have)
            rest = by_mean[np.isin(by_mean, np.setdiff1d(part, covering))]
            chosen += [covering, rest[: few - len(covering)]]
            wanted -= few
    return np.concatenate(chosen)


def _shares(
    free: NDArray[np.int64], count: int, groups: ArrayLike | None, n: int
) -> list[tuple[NDArray[np.int64], int]]:
    """The members of each group that may be chosen, and how many to choose of them."""
    if groups is None:
        return [(free, count)]
    numbers = np.asarray(groups)
    if numbers.shape != (n,) or numbers.dtype.kind not in "iu":
        raise ValueError(
            f"groups must be one integer for each of the {n} training samples, got "
            f"{numbers.shape} of {numbers.dtype}"
        )
    members = [free[numbers[free] == group] for group in np.unique(numbers[free])]
    exact = np.array([count * len(some) / len(free) for some in members])
    counts = np.floor(exact).astype(int)
    counts[np.argsort(counts - exact, kind="stable")[: count - counts.sum()]] += 1
    return list(zip(members, counts.tolist(), strict=True))


def _cover(
    influences: InfluenceRows, free: NDArray[np.int64], count: int, given: NDArray[np.int64]
) -> NDArray[np.int64]:
    """Greedy facility location, round after round, as long as a sample helps a target."""
    start = np.zeros(influences.shape[1])
    for _, block in _blocks(influences, given):
        np.maximum(start, block.max(0), out=start)
    chosen: list[int] = []
    while len(chosen) < count:
        before = len(chosen)
        covered = start.copy()
        # Gains only fall within a round, so an old gain is a bound: only those on top are renewed.
        heap = [
            (-gain, int(row))
            for rows, block in _blocks(influences, free)
            for gain, row in zip(_gains(block, covered), rows, strict=True)
            if gain > 0
        ]
        heapq.heapify(heap)
        fresh: set[int] = set()
        while heap and len(chosen) < count:
            if heap[0][1] in fresh:
                row = heapq.heappop(heap)[1]
                chosen.append(row)
                np.maximum(covered, _values(influences, np.array([row]))[0], out=covered)
                fresh.clear()
                continue
            stale: list[int] = []
            while heap and len(stale) < _BATCH and heap[0][1] not in fresh:
                stale.append(heapq.heappop(heap)[1])
            rows = np.array(stale)
            for gain, row in zip(_gains(_values(influences, rows), covered), stale, strict=True):
                if gain > 0:
                    heapq.heappush(heap, (-gain, row))
                    fresh.add(row)
        if len(chosen) == before and not start.any():
            break
        free = np.setdiff1d(free, chosen)
        start = np.zeros_like(start)
    return np.array(chosen, dtype=np.int64)


def _gains(block: NDArray[np.float64], covered: NDArray[np.float64]) -> list[float]:
    """What each row adds to the coverage of all targets."""
    return np.maximum(block - covered, 0).sum(1).tolist()


def _blocks(
    influences: InfluenceRows, rows: NDArray[np.int64]
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.float64]]]:
    step = max(1, _BLOCK_VALUES // influences.shape[1])
    for first in range(0, len(rows), step):
        some = rows[first : first + step]
        yield some, _values(influences, some)


def _values(influences: InfluenceRows, rows: NDArray[np.int64]) -> NDArray[np.float64]:
    found = np.asarray(influences[rows])
    if np.iscomplexobj(found):
        raise ValueError(f"influences must be real numbers, got {found.dtype}")
    values = found.astype(np.float64, copy=False)
    if not np.isfinite(values).all():
        bad = rows[~np.isfinite(values).all(1)]
        raise ValueError(f"influences of training samples {bad[:10].tolist()} are NaN or infinite")
    return values
