"""A matrix in a file, read a few rows at a time."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor


class IncompleteStoreError(ValueError):
    """What was asked of a store has not been collected."""


def read_object(path: Path) -> dict[str, Any]:
    """Return the JSON object that a file of a store holds.

    Args:
        path: the file.

    Raises:
        IncompleteStoreError: it is damaged.
    """
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        raise IncompleteStoreError(f"{path} is damaged, no JSON: {error}") from error
    if not isinstance(content, dict):
        raise IncompleteStoreError(f"{path} is damaged: no object, but a {type(content).__name__}")
    return content


def read_experiments(path: Path) -> dict[str, int]:
    """Return the number of targets of each experiment.

    Args:
        path: the file in which a store names them, ``experiments.json``.

    Raises:
        IncompleteStoreError: it is damaged.
    """
    content = read_object(path)
    try:
        return {name: int(facts["num_targets"]) for name, facts in content.items()}
    except (KeyError, TypeError, ValueError) as error:
        raise IncompleteStoreError(
            f"{path} is damaged: it does not give each experiment's num_targets ({error!r})"
        ) from error


class RowFile:
    """A matrix in a file, read a few rows at a time, none of which stay in memory.

    A memory map would be simpler, but every page that is read counts as memory of the process.

    Args:
        file: in NumPy's format.

    Raises:
        IncompleteStoreError: the file is missing, damaged, cut short, or no matrix.
    """

    def __init__(self, file: Path) -> None:
        if not file.is_file():
            raise IncompleteStoreError(f"{file} does not exist")
        try:
            mapped = np.load(file, mmap_mode="r")
        except (EOFError, ValueError) as error:
            raise IncompleteStoreError(f"{file} is damaged or cut short: {error}") from error
        if mapped.ndim != 2 or not mapped.flags.c_contiguous or mapped.dtype.kind != "f":
            raise IncompleteStoreError(f"{file} holds no matrix of numbers, row after row")
        self.file, self.dtype = file, mapped.dtype
        self.shape: tuple[int, int] = mapped.shape
        self._offset: int = mapped.offset

    def __len__(self) -> int:
        return self.shape[0]

    def rows(self, start: int = 0, stop: int | None = None) -> Tensor:
        """Read rows ``start`` to ``stop``, all when not given, as a tensor ``(b, columns)``."""
        stop = len(self) if stop is None else min(stop, len(self))
        values = np.empty((max(0, stop - start), self.shape[1]), self.dtype)
        self._fill(values, start)
        return torch.from_numpy(values)

    def blocks(
        self, rows: int, start: int = 0, stop: int | None = None
    ) -> Iterator[tuple[int, Tensor]]:
        """Read rows a few at a time, the next ones while these are worked on.

        Args:
            rows: how many at a time.
            start: the first row.
            stop: the row after the last; all when None.

        Yields:
            The number of the first row and a tensor ``(b, columns)`` of the file's type. It may be
            changed, and holds other rows after the block that follows.

        Raises:
            IncompleteStoreError: the file has become shorter.
        """
        stop = len(self) if stop is None else min(stop, len(self))
        if stop <= start:
            return
        # Buffers of its own each time would cost as much as reading: pages are cleared first.
        shape = (min(rows, stop - start), self.shape[1])
        buffers = [np.empty(shape, self.dtype) for _ in range(2)]

        def read(first: int) -> Tensor:
            values = buffers[(first - start) // rows % 2][: min(rows, stop - first)]
            self._fill(values, first)
            return torch.from_numpy(values)

        with ThreadPoolExecutor(1) as reader:
            coming = reader.submit(read, start)
            for first in range(start, stop, rows):
                block = coming.result()
                if first + rows < stop:
                    coming = reader.submit(read, first + rows)
                yield first, block

    def _fill(self, values: np.ndarray, start: int) -> None:
        with self.file.open("rb") as stream:
            stream.seek(self._offset + start * self.shape[1] * self.dtype.itemsize)
            if stream.readinto(values.reshape(-1).view(np.uint8).data) != values.nbytes:
                raise IncompleteStoreError(f"{self.file} has become shorter while it was read")
