"""Rows of a store, written where they belong."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from trak_dropout.rowfile import IncompleteStoreError
from trak_dropout.store import storable

_COMMIT_SECONDS = 0.5


class RowWriter:
    """Writes rows of a checkpoint's files in place, and notes which ones are safe.

    Several processes may write different rows of the same files. Plain writes instead of a memory
    map: a full disk is an error then and not a signal that kills the process, and written pages do
    not count as its memory. They run in the background, one at a time: taking pages for what is
    written can cost as much as computing it. A row is noted as featurized only after it has reached
    the disk, which is waited for in the background as well; what fails there is raised by the next
    call.

    Args:
        directory: the checkpoint's directory, with its files at full length.

    Raises:
        IncompleteStoreError: a file is missing, damaged or of another shape.
    """

    def __init__(self, directory: Path) -> None:
        self._files = [_Matrix(directory / f"{name}.mmap") for name in ("grads", "out_to_loss")]
        self._flags = _Matrix(directory / "_is_featurized.mmap")
        if len({file.rows for file in (*self._files, self._flags)}) != 1:
            raise IncompleteStoreError(f"the files in {directory} differ in their number of rows")
        self._pending: list[tuple[int, int]] = []
        self._disk = ThreadPoolExecutor(2, "rows of a store")
        self._writing: Future[None] | None = None
        self._committing: Future[None] | None = None
        self._failed = False
        self._committed = time.monotonic()

    def write(self, start: int, grads: Tensor, out_to_loss: Tensor) -> None:
        """Write rows from ``start`` on.

        Args:
            start: the first row.
            grads: ``(B, proj_dim)``; may be read until the next call.
            out_to_loss: ``(B, 1)``.

        Raises:
            ValueError: a row cannot be held by the files' type.
            OSError: the disk is full, or the like.
        """
        stored = [
            storable(values.cpu().numpy(), file.dtype, file.path.name)
            for file, values in zip(self._files, (grads, out_to_loss.float()), strict=True)
        ]
        self._end_writing()
        self._writing = self._disk.submit(self._put, start, stored)
        self._pending.append((start, len(grads)))
        if time.monotonic() - self._committed > _COMMIT_SECONDS:
            self._begin_commit()

    def commit(self) -> None:
        """Bring what was written to disk, and note its rows as featurized."""
        self._begin_commit()
        self._end_commit()

    def close(self) -> None:
        """Close the files."""
        self._disk.shutdown()
        for file in (*self._files, self._flags):
            file.close()

    def _put(self, start: int, stored: list[NDArray]) -> None:
        for file, values in zip(self._files, stored, strict=True):
            file.write(start, values)

    def _end_writing(self) -> None:
        writing, self._writing = self._writing, None
        if writing is not None:
            try:
                writing.result()
            except BaseException:
                del self._pending[-1:]  # none is left where a commit has failed as well
                raise

    def _begin_commit(self) -> None:
        self._end_commit()
        try:
            self._end_writing()
        finally:
            pending, self._pending = self._pending, []
            if pending and not self._failed:
                self._committing = self._disk.submit(self._note, pending)

    def _end_commit(self) -> None:
        committing, self._committing = self._committing, None
        if committing is not None:
            try:
                committing.result()
            except BaseException:
                # What was written since may be lost with it, though the next sync would succeed.
                self._failed, self._pending = True, []
                raise
        self._committed = time.monotonic()

    def _note(self, rows: list[tuple[int, int]]) -> None:
        for file in self._files:
            file.sync()
        for start, count in rows:
            self._flags.write(start, np.ones(count, self._flags.dtype))
        self._flags.sync()


@contextmanager
def row_writer(directory: Path) -> Iterator[RowWriter]:
    """Open a `RowWriter`; what was written is noted even when the block raises.

    Args:
        directory: as for `RowWriter`.

    Yields:
        The writer.
    """
    writer = RowWriter(directory)
    try:
        yield writer
    finally:
        try:
            writer.commit()
        finally:
            writer.close()


def featurized(directory: Path) -> NDArray[np.bool_]:
    """Return which rows of a checkpoint are written, ``(n_train,)``.

    Args:
        directory: the checkpoint's directory.
    """
    return np.load(directory / "_is_featurized.mmap").astype(bool)


class _Matrix:
    """A file in NumPy's format, open for writing rows."""

    def __init__(self, path: Path) -> None:
        try:
            mapped = np.load(path, mmap_mode="r")
        except (OSError, ValueError) as error:
            raise IncompleteStoreError(f"{path} is missing or damaged: {error}") from error
        self.path, self.dtype, self.rows = path, mapped.dtype, len(mapped)
        self._offset: int = mapped.offset
        self._stride: int = mapped.strides[0]
        self._file = open(path, "r+b", buffering=0)  # noqa: SIM115  # until close()

    def write(self, start: int, values: NDArray) -> None:
        left = np.ascontiguousarray(values, self.dtype).reshape(-1).view(np.uint8).data
        self._file.seek(self._offset + start * self._stride)
        while left:
            left = left[self._file.write(left) :]

    def sync(self) -> None:
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()
