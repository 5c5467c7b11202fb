"""Which gradient coordinates are kept, with which weight, and which output column each one feeds.

Everything here is a pure function of its arguments and knows nothing of TRAK, models or
torch. A mask stands for a sparse random matrix ``P`` of shape ``(grad_dim, proj_dim)``,
whose non-zero entries are ``P[coordinates[t], columns[t]] = weights[t]``.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from trak_dropout._checks import check_integer

SCHEMES = ("dropout",)
DEFAULT_FOLD = 16
_WORD = 2**64


@dataclass(frozen=True)
class Layout:
    """Names and shapes of the parameters whose gradients make up a coordinate vector.

    Coordinates count the parameters in this order, each flattened in C order, as TRAK's
    ``vectorize`` does.

    Args:
        names: parameter names, in ``named_parameters()`` order.
        shapes: the shape of each parameter.
    """

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """Number of coordinates of each parameter."""
        return tuple(math.prod(shape) for shape in self.shapes)

    @property
    def grad_dim(self) -> int:
        """Number of coordinates in all."""
        return sum(self.sizes)


@dataclass(frozen=True)
class Mask:
    """A sparse projection: the kept coordinates, the column each one feeds, and its weight.

    Args:
        coordinates: kept coordinates, ascending, one that feeds several columns as often; int64,
            shape ``(n,)``.
        columns: the column that each feeds; int64, shape ``(n,)``.
        weights: its factor there (sign times scale); float64, shape ``(n,)``.
        proj_dim: number of output columns.
    """

    coordinates: NDArray[np.int64]
    columns: NDArray[np.int64]
    weights: NDArray[np.float64]
    proj_dim: int

    @cached_property
    def folded(self) -> bool:
        """Whether several coordinates share a column (or stand out of order)."""
        n = len(self.columns)
        return n != self.proj_dim or not np.array_equal(self.columns, np.arange(n))


def fold_coordinates(
    entries: NDArray[np.int64], signs: NDArray[np.float64], grad_dim: int, proj_dim: int
) -> Mask:
    """Lay a random sequence of coordinates over the columns, the same number into each.

    A coordinate that was drawn with probability ``pi`` and feeds ``c`` columns has the weight
    ``sign * sqrt(proj_dim / (pi c))`` in each. That gives ``E<Pg, Ph> = proj_dim <g, h>`` exactly,
    however the entries are grouped: the coordinate's own products add up to ``proj_dim / pi``, and
    the cross products inside a column have independent signs, so their mean is zero.

    Args:
        entries: coordinates in random order, shape ``(n,)``, ``n`` a multiple of ``proj_dim``;
            distinct, or each of the ``grad_dim`` coordinates at least once.
        signs: ``+1`` or ``-1`` for each, shape ``(n,)``.
        grad_dim: number of coordinates drawn from.
        proj_dim: number of columns.

    Returns:
        The mask, its coordinates ascending.
    """
    n = len(entries)
    order = np.argsort(entries, kind="stable")
    coordinates = entries[order]
    if n <= grad_dim:
        scale = np.full(n, math.sqrt(proj_dim * grad_dim / n))
    else:
        copies = np.bincount(coordinates, minlength=grad_dim)
        scale = np.sqrt(proj_dim / copies[coordinates])
    return Mask(coordinates, order // (n // proj_dim), signs[order] * scale, proj_dim)


def draw_mask(
    scheme: str,
    grad_dim: int,
    proj_dim: int,
    seed: int,
    model_id: int,
    fold: int = DEFAULT_FOLD,
) -> Mask:
    """Draw the mask that belongs to the arguments; the same arguments always give the same mask.

    Every column sums ``fold`` distinct coordinates with random signs. ``fold * proj_dim`` of them
    are drawn uniformly without replacement, in time and memory of the order of that number,
    however large ``grad_dim`` is. Where there are fewer, all are kept, and each feeds several
    columns, as many as another or one more. ``fold=1`` is the pure coordinate dropout of arXiv
    2509.15651: column j is the j-th kept coordinate, unsigned.

    Args:
        scheme: one of `SCHEMES`.
        grad_dim: number of gradient coordinates.
        proj_dim: number of output columns, ``k``.
        seed: seed of the projector.
        model_id: the checkpoint; another one gives an independent mask.
        fold: coordinates summed into each column; ``grad_dim`` at most, more means all.

    Returns:
        The mask.

    Raises:
        TypeError: an argument that counts something is no integer.
        ValueError: an argument is out of range, or the scheme is unknown.
    """
    check_scheme(scheme)
    check_dimensions(grad_dim, proj_dim, fold)
    seed, model_id = check_integer("seed", seed), check_integer("model_id", model_id)
    stream = _Stream("mask 1", scheme, int(grad_dim), int(proj_dim), int(fold), seed, model_id)
    if fold == 1:
        kept = np.sort(stream.distinct(proj_dim, grad_dim))
        return fold_coordinates(kept, np.ones(proj_dim), grad_dim, proj_dim)
    per_column = min(fold, grad_dim)
    entries = stream.entries(proj_dim, per_column, grad_dim)
    return fold_coordinates(entries, stream.signs(len(entries)), grad_dim, proj_dim)


def check_scheme(scheme: object) -> None:
    """Raise ValueError unless ``scheme`` is one of `SCHEMES`."""
    if scheme not in SCHEMES:
        raise ValueError(f"proj_type={scheme!r} is not known; use one of {', '.join(SCHEMES)}")


def check_dimensions(grad_dim: object, proj_dim: object, fold: object) -> None:
    """Raise TypeError or ValueError unless ``1 <= proj_dim <= grad_dim`` and ``fold >= 1``."""
    check_integer("grad_dim", grad_dim, minimum=1)
    check_integer("proj_dim", proj_dim, minimum=1)
    check_integer("fold", fold, minimum=1)
    if proj_dim > grad_dim:  # type: ignore[operator]  # both are integers by now
        raise ValueError(
            f"proj_dim={proj_dim} is above grad_dim={grad_dim}, the number of gradient "
            "coordinates: a mask keeps coordinates and cannot make new ones; lower proj_dim"
        )


class _Stream:
    """Random numbers that depend on the words of a key alone.

    Only the raw output of a Philox counter generator is used: NumPy guarantees that it never
    changes, which it does not for the distributions of its ``Generator``.
    """

    def __init__(self, *key: str | int) -> None:
        digest = hashlib.sha256(json.dumps(key).encode()).digest()
        self._bits = np.random.Philox(key=int.from_bytes(digest[:16], "little"))

    def words(self, n: int) -> NDArray[np.uint64]:
        """``n`` uniform 64-bit words."""
        return self._bits.random_raw(n)

    def signs(self, n: int) -> NDArray[np.float64]:
        """``n`` fair signs, +1.0 or -1.0."""
        return 1.0 - 2.0 * (self.words(n) >> np.uint64(63)).astype(np.float64)

    def permutation(self, n: int) -> NDArray[np.int64]:
        """The numbers below ``n`` in random order."""
        return np.argsort(self.words(n), kind="stable")

    def entries(self, groups: int, size: int, population: int) -> NDArray[np.int64]:
        """Fill groups with ``size`` distinct numbers below ``population`` each, one after another.

        All numbers of all groups are distinct where there are enough. Else they are whole random
        permutations after each other, the last one cut off.
        """
        n = groups * size
        if n <= population:
            return self.distinct(n, population)
        parts = [self.permutation(population)]
        for filled in range(population, n, population):
            following = self.permutation(population)
            # A group that reaches over two permutations must not take a number twice: what it
            # already holds waits until the group is full.
            begun = parts[-1][population - filled % size :]
            free = np.flatnonzero(~np.isin(following, begun))[: -filled % size]
            parts.append(np.concatenate([following[free], np.delete(following, free)]))
        return np.concatenate(parts)[:n]

    def distinct(self, n: int, population: int) -> NDArray[np.int64]:
        """A uniform ordered sample of ``n`` distinct numbers below ``population``, in O(n)."""
        if 2 * n > population:
            return self.permutation(population)[:n]
        # Words beyond the last whole multiple of the population would make small numbers likelier.
        limit = _WORD - _WORD % population
        found = np.empty(0, dtype=np.int64)
        while len(found) < n:
            words = self.words(n - len(found))
            if limit < _WORD:
                words = words[words < np.uint64(limit)]
            fresh = (words % np.uint64(population)).astype(np.int64)
            found = _first_occurrences(np.concatenate([found, fresh]))
        return found


def _first_occurrences(values: NDArray[np.int64]) -> NDArray[np.int64]:
    """The distinct values in the order of their first appearance."""
    _, first = np.unique(values, return_index=True)
    return values[np.sort(first)]


def spans(mask: Mask, sizes: Sequence[int]) -> list[tuple[int, int, int]]:
    """Where the kept coordinates of each parameter stand in a mask.

    Args:
        mask: a mask over ``sum(sizes)`` coordinates.
        sizes: number of coordinates of each parameter, in order.

    Returns:
        For each parameter ``(offset, start, stop)``: its kept coordinates are
        ``mask.coordinates[start:stop] - offset``.
    """
    ends = np.cumsum(np.asarray([0, *sizes], dtype=np.int64))
    cuts = np.searchsorted(mask.coordinates, ends)
    return [(int(ends[i]), int(cuts[i]), int(cuts[i + 1])) for i in range(len(sizes))]
