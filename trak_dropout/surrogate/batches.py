"""Batches of pairs to learn from: single pairs, or all pairs of some sources and some targets."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    RandomSampler,
    Sampler,
    SequentialSampler,
)

_CHECKED = 8192  # pairs of a batch of those held out
_CHECKED_SOURCES = 512


class Pairs(Dataset[list[Tensor]]):
    """Batches of pairs: the examples of each side and which of them each pair has, influences.

    And, where asked for, another source of the same target with its influence.
    """

    def __init__(
        self, source: Tensor, target: Tensor, index: Tensor, values: Tensor, others: bool
    ) -> None:
        self._source, self._target, self._others = source, target, others
        if others:  # pairs of a target lie together, so that another is found by counting
            order = torch.argsort(index[:, 1], stable=True)
            index, values = index[order], values[order]
            self._counts = torch.bincount(index[:, 1], minlength=len(target))
            self._starts = self._counts.cumsum(0) - self._counts
        self._index, self._values = index, values

    def __len__(self) -> int:
        return len(self._values)

    def __getitem__(self, numbers: list[int]) -> list[Tensor]:
        chosen = torch.tensor(numbers)
        rows, columns = self._index[chosen].T
        batch = []
        for side, some in ((self._source, rows), (self._target, columns)):
            distinct, which = torch.unique(some, return_inverse=True)
            batch += [side[distinct], which]
        batch.append(self._values[chosen])
        if self._others:
            place = torch.rand(len(chosen)) * self._counts[columns]
            other = self._starts[columns] + place.long()
            batch += [self._source[self._index[other, 0]], self._values[other]]
        return batch

    def shuffled(self, batch_size: int, generator: torch.Generator) -> DataLoader[Any]:
        """A loader of batches in random order."""
        return _loader(
            self, BatchSampler(RandomSampler(self, generator=generator), batch_size, False)
        )

    def in_order(self) -> DataLoader[Any]:
        """A loader of large batches."""
        return _loader(self, BatchSampler(SequentialSampler(self), _CHECKED, False))


class Rectangles(Dataset[list[Tensor]]):
    """Batches of all pairs of some sources with some targets: both sides' examples, influences."""

    def __init__(self, source: Tensor, target: Tensor, values: Tensor) -> None:
        self._source, self._target, self._values = source, target, values

    def __getitem__(self, sides: tuple[Tensor, Tensor]) -> list[Tensor]:
        rows, columns = sides
        values = self._values[rows][:, columns]
        return [self._source[rows], self._target[columns], values]

    def shuffled(
        self, rows: Tensor, columns: Tensor, shape: tuple[int, int], generator: torch.Generator
    ) -> DataLoader[Any]:
        """A loader in which every pair of these sources and targets comes once in an epoch."""
        return _loader(self, _Shuffled(rows, columns, shape, generator))

    def outside(self, rows: Tensor, columns: Tensor) -> DataLoader[Any]:
        """A loader of all pairs but those of these sources with these targets."""
        n, m = self._values.shape
        other_rows, other_columns = _without(n, rows), _without(m, columns)
        parts = [(part, torch.arange(m)) for part in torch.split(other_rows, _CHECKED_SOURCES)]
        if len(other_columns):
            parts += [(part, other_columns) for part in torch.split(rows, _CHECKED_SOURCES)]
        return _loader(self, [part for part in parts if len(part[0])])


class _Shuffled(Sampler[Any]):
    """Cuts shuffled sources and targets into blocks, and pairs the blocks in random order."""

    def __init__(
        self, rows: Tensor, columns: Tensor, shape: tuple[int, int], generator: torch.Generator
    ) -> None:
        self._sides = (rows, columns)
        self._shape = shape
        self._generator = generator

    def __len__(self) -> int:
        rows, columns = (
            -(-len(side) // size) for side, size in zip(self._sides, self._shape, strict=True)
        )
        return rows * columns

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        row_blocks, column_blocks = (
            torch.split(side[torch.randperm(len(side), generator=self._generator)], size)
            for side, size in zip(self._sides, self._shape, strict=True)
        )
        for number in torch.randperm(len(self), generator=self._generator).tolist():
            row, column = divmod(number, len(column_blocks))
            yield row_blocks[row], column_blocks[column]


def _loader(data: Dataset[list[Tensor]], sampler: Any) -> DataLoader[Any]:
    """A loader that asks for whole batches at once."""
    return DataLoader(data, batch_size=None, sampler=sampler)


def _without(count: int, some: Tensor) -> Tensor:
    """The numbers below ``count`` that are not among some."""
    left = torch.ones(count, dtype=torch.bool)
    left[some] = False
    return torch.nonzero(left).flatten()
