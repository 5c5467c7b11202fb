"""Reproducible random sampling: uniform, in blocks, and with unequal probabilities.

Only the raw words of a counter generator are used, so that samples are the same on every machine
and with every version of NumPy. No function needs memory of the order of what it samples from.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Integers = NDArray[np.int64]
Floats = NDArray[np.float64]
_WORD = 2**64
# Probabilities this close to one count as one: rounding could otherwise hit a coordinate twice.
_CERTAIN = 1 - 1e-9


class Stream:
    """Random numbers that depend on the words of a key alone.

    NumPy guarantees for ever the raw output of its Philox bit generator, which it does not for
    the distributions of its ``Generator``.

    Args:
        *key: words and numbers.
    """

    def __init__(self, *key: str | int) -> None:
        digest = hashlib.sha256(json.dumps(key).encode()).digest()
        self._bits = np.random.Philox(key=int.from_bytes(digest[:16], "little"))

    def words(self, n: int) -> NDArray[np.uint64]:
        """``n`` uniform 64-bit words."""
        return self._bits.random_raw(n)

    def fraction(self) -> float:
        """A uniform number in [0, 1)."""
        return int(self.words(1)[0] >> np.uint64(11)) / 2**53

    def signs(self, n: int) -> Floats:
        """``n`` fair signs, +1.0 or -1.0."""
        return 1.0 - 2.0 * (self.words(n) >> np.uint64(63)).astype(np.float64)

    def permutation(self, n: int) -> Integers:
        """The numbers below ``n`` in random order."""
        return np.argsort(self.words(n), kind="stable")

    def distinct(self, n: int, population: int) -> Integers:
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
            _, first = np.unique(both := np.concatenate([found, fresh]), return_index=True)
            found = both[np.sort(first)]
        return found

    def deal(self, groups: int, size: int, population: int) -> Integers:
        """Fill groups with ``size`` distinct numbers below ``population`` each, using all of them.

        The groups, one after another, are whole random permutations, the last one cut off, so
        that no number comes up twice more often than another. Needs ``groups * size >=
        population >= size``.
        """
        parts = [self.permutation(population)]
        for filled in range(population, groups * size, population):
            following = self.permutation(population)
            # A group that reaches over two permutations must not take a number twice: what it
            # already holds waits until the group is full.
            begun = parts[-1][population - filled % size :]
            free = np.flatnonzero(~np.isin(following, begun))[: -filled % size]
            parts.append(np.concatenate([following[free], np.delete(following, free)]))
        return np.concatenate(parts)[: groups * size]


def allot(stream: Stream, n: int, sizes: Sequence[int]) -> tuple[list[int], list[float]]:
    """Share out a sample over groups in proportion to their sizes.

    Each group gets its share rounded by largest remainders, but at least one. Where there are
    fewer samples than groups, which groups get one is drawn systematically, in proportion to size.

    Args:
        stream: random numbers, used only in the second case.
        n: samples in all, at most ``sum(sizes)``.
        sizes: number of elements of each group, all positive.

    Returns:
        For each group the number of samples, adding up to ``n``, and the probability with which
        a uniform sample of the group includes an element.
    """
    total = sum(sizes)
    exact = [n * size / total for size in sizes]
    if n < len(sizes):
        ends = np.floor(np.cumsum(exact[:-1]) + stream.fraction()).astype(int)
        return np.diff(ends, prepend=0, append=n).tolist(), [n / total] * len(sizes)
    counts = [max(1, math.floor(share)) for share in exact]
    by_remainder = sorted(range(len(sizes)), key=lambda i: (counts[i] - exact[i], i))
    while sum(counts) < n:
        for i in by_remainder:
            if sum(counts) < n and counts[i] < sizes[i]:
                counts[i] += 1
    while sum(counts) > n:
        counts[max(range(len(counts)), key=lambda i: (counts[i], -i))] -= 1
    return counts, [count / size for count, size in zip(counts, sizes, strict=True)]


def block_shape(n: int, rows: int, columns: int) -> tuple[int, int, int]:
    """Return the block in which ``n`` entries of a matrix are taken.

    Args:
        n: number of entries, at most ``rows * columns``.
        rows: rows of the matrix.
        columns: its columns.

    Returns:
        Whole rows of the block, its columns, and the entries of one further, ragged row. The
        block has about the matrix's proportions.
    """
    wide = min(max(round(math.sqrt(n * columns / rows)), -(-n // rows), 1), columns, n)
    return n // wide, wide, n % wide


def sample_block(stream: Stream, n: int, rows: int, columns: int) -> Integers:
    """Draw ``n`` entries of a matrix: random rows times random columns.

    What does not divide goes into one more random row, of which only the first few of the random
    columns are taken. As rows and columns are in random order, every entry of the matrix is as
    likely as any other, ``n / (rows * columns)`` exactly.

    Args:
        stream: random numbers.
        n: number of entries.
        rows: rows of the matrix.
        columns: its columns.

    Returns:
        Positions of the entries in the flattened matrix, distinct.
    """
    if n == 0:
        return np.empty(0, dtype=np.int64)
    full, wide, rest = block_shape(n, rows, columns)
    chosen = stream.distinct(full + (rest > 0), rows) * columns
    across = stream.distinct(wide, columns)
    block = (chosen[:full, None] + across).reshape(-1)
    return np.concatenate([block, chosen[full:] + across[:rest]])


@dataclass(frozen=True)
class Separable:
    """Weights of a matrix's entries that are products, ``rows[i] * columns[j]``, all positive."""

    rows: Floats
    columns: Floats


class UnequalSample:
    """Systematic sampling of exactly ``n`` entries with probabilities ``min(1, c * weight)``.

    The entries of all matrices, row by row and within a row by falling weight, lie on a line, each
    as long as its probability; points at distance one, the first at random, hit each entry with
    just that probability, and never twice. Entries of probability one are taken first. Work and
    memory are of the order of the number of rows and columns and of ``n``, never of the entries.

    Args:
        weights: the matrices' weights.
        n: number of entries, below the number of them all.
    """

    def __init__(self, weights: Sequence[Separable], n: int) -> None:
        self.n = n
        self._weights = weights
        self._order = [np.argsort(-w.columns, kind="stable") for w in weights]
        self._falling = [w.columns[o] for w, o in zip(weights, self._order, strict=True)]
        self._prefix = [np.concatenate([[0.0], np.cumsum(f)]) for f in self._falling]
        self.scale, self._certain = self._solve()

    def draw(self, stream: Stream) -> tuple[Integers, Floats, Floats]:
        """Draw the sample.

        Args:
            stream: random numbers; one is used.

        Returns:
            Positions of the entries among all entries of all matrices, each flattened, their
            inclusion probabilities, and their weights.
        """
        lengths, positions, probabilities, weights = [], [], [], []
        offset = 0
        for w, order, certain, prefix in self._parts():
            lengths.append(self.scale * w.rows * (prefix[-1] - prefix[certain]))
            i = np.repeat(np.arange(len(w.rows)), certain)
            starts = np.repeat(np.cumsum(certain) - certain, certain)
            j = np.arange(len(i)) - starts
            positions.append(offset + i * len(w.columns) + order[j])
            probabilities.append(np.ones(len(i)))
            weights.append(w.rows[i] * w.columns[order[j]])
            offset += len(w.rows) * len(w.columns)
        ends = np.cumsum(np.concatenate(lengths))
        rest = self.n - sum(map(len, positions))
        points = (np.arange(rest) + stream.fraction()) * (ends[-1] / rest) if rest else np.empty(0)
        rows = np.minimum(np.searchsorted(ends, points, side="right"), len(ends) - 1)
        into = points - np.where(rows > 0, ends[rows - 1], 0.0)
        first = offset = 0
        for w, order, certain, prefix in self._parts():
            here = slice(*np.searchsorted(rows, [first, first + len(w.rows)]))
            i = rows[here] - first
            reach = into[here] / (self.scale * w.rows[i]) + prefix[certain[i]]
            j = np.searchsorted(prefix, reach, side="right") - 1
            j = np.clip(j, certain[i], len(w.columns) - 1)
            positions.append(offset + i * len(w.columns) + order[j])
            weights.append(w.rows[i] * w.columns[order[j]])
            probabilities.append(self.scale * weights[-1])
            first += len(w.rows)
            offset += len(w.rows) * len(w.columns)
        return np.concatenate(positions), np.concatenate(probabilities), np.concatenate(weights)

    def probabilities(self) -> Floats:
        """Inclusion probabilities of all entries: of the order of their number, for small ones."""
        dense = [np.outer(w.rows, w.columns).reshape(-1) for w in self._weights]
        scaled = self.scale * np.concatenate(dense)
        return np.where(scaled >= _CERTAIN, 1.0, scaled)

    def _parts(self) -> zip[tuple[Separable, Integers, Integers, Floats]]:
        return zip(self._weights, self._order, self._certain, self._prefix, strict=True)

    def _solve(self) -> tuple[float, list[Integers]]:
        """The scale ``c``, and for each row how many of its largest entries are certain."""
        certain = [np.zeros(len(w.rows), dtype=np.int64) for w in self._weights]
        taken = -1
        while taken != (taken := int(sum(c.sum() for c in certain))):
            open_weight = sum(
                float(w.rows @ (p[-1] - p[c]))
                for w, p, c in zip(self._weights, self._prefix, certain, strict=True)
            )
            scale = (self.n - taken) / open_weight
            # More certain entries leave more length to the others: the counts only ever grow.
            grown = [
                np.maximum(c, np.searchsorted(-f, -_CERTAIN / (scale * w.rows), side="right"))
                for w, f, c in zip(self._weights, self._falling, certain, strict=True)
            ]
            if sum(int(c.sum()) for c in grown) >= self.n:
                break  # nothing would be left for the others, which may be small but not zero
            certain = grown
        return scale, certain
