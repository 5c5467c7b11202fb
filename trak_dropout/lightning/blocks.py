"""Writing the rows of an epoch as its samples come."""

from __future__ import annotations

import itertools
import os
import shutil
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from trak_dropout.visits import IN_PLACE, NOT_STORED, REPEATS, VISITS, Visits

Rows = NDArray[np.float32]


class BlockWriter:
    """Writes one process's rows of a block.

    The first process writes into the store's own file, the others into files beside it, which
    `merge` brings together. Plain writes instead of a memory map: a full disk is an error then and
    not a signal that kills the process, and written pages do not count as its memory.

    Args:
        directory: the block's directory.
        size: number of samples of the data set.
        columns: of the rows.
        rank: the process.
        kept: visits that a resumed run keeps, all others are forgotten; None for a new block.
    """

    def __init__(
        self, directory: Path, size: int, columns: int, rank: int, kept: Visits | None = None
    ) -> None:
        self.directory, self._rank, self._stride = directory, rank, 4 * columns
        self._seen = np.zeros(size, bool)
        self._parts: list[Visits] = []
        path = _rows_file(directory, rank)
        if kept is None or not path.is_file():
            if rank:
                np.lib.format.open_memmap(path, "w+", np.float32, (size, columns))
            _repeats_part(directory, rank).unlink(missing_ok=True)
            (directory / _visits_part(rank)).unlink(missing_ok=True)
        self._offset: int = np.load(path, mmap_mode="r").offset
        self._file = os.open(path, os.O_RDWR)
        self._again = os.open(_repeats_part(directory, rank), os.O_RDWR | os.O_CREAT)
        self._repeats = 0
        if kept is not None:
            self._parts = [kept]
            self._seen[kept.index[kept.place == IN_PLACE]] = True
            self._repeats = int((kept.place >= 0).sum())
            for index in np.flatnonzero(~self._seen):  # what came after the point of return
                os.pwrite(self._file, bytes(self._stride), self._offset + index * self._stride)
        os.ftruncate(self._again, self._repeats * self._stride)

    @property
    def seen(self) -> NDArray[np.bool_]:
        """Which samples have a row in place, ``(size,)``."""
        return self._seen

    def add(self, visits: Visits, rows: Rows) -> None:
        """Write rows.

        Args:
            visits: who came; ``place`` is filled in.
            rows: float32 ``(V, columns)``. Those with NaN or infinities are not stored.

        Raises:
            OSError: the disk is full, or the like.
        """
        rows = np.ascontiguousarray(rows, np.float32)
        stored = np.flatnonzero(np.isfinite(rows.sum(1, dtype=np.float64)))
        index = visits.index[stored]
        first = np.zeros(len(index), bool)
        first[np.unique(index, return_index=True)[1]] = True
        first &= ~self._seen[index]
        fresh, again = stored[first], stored[~first]
        visits.place[:] = NOT_STORED
        visits.place[fresh] = IN_PLACE
        visits.place[again] = self._repeats + np.arange(len(again))
        if len(again):
            _write(self._again, _bytes(rows[again]), self._repeats * self._stride)
            self._repeats += len(again)
        # In the file's order, so that neighbors are written together.
        order = fresh[np.argsort(visits.index[fresh])]
        where, data = visits.index[order], _bytes(rows[order])
        begins = np.flatnonzero(np.diff(where, prepend=-2) != 1)
        offsets = (self._offset + where[begins] * self._stride).tolist()
        edges = (np.append(begins, len(where)) * self._stride).tolist()
        for offset, (begin, end) in zip(offsets, itertools.pairwise(edges), strict=True):
            _write(self._file, data[begin:end], offset)
        self._seen[where] = True
        self._parts.append(visits)

    def sync(self) -> Visits:
        """Bring everything to disk, the record last, and return it."""
        os.fsync(self._file)
        os.fsync(self._again)
        visits = Visits.joined(self._parts)
        self._parts = [visits]
        visits.save(self.directory / _visits_part(self._rank))
        return visits

    def close(self) -> None:
        """Close the files."""
        os.close(self._file)
        os.close(self._again)


def keep_others(directory: Path, size: int, columns: int, ranks: int, last: int) -> None:
    """Keep what processes wrote before that a resumed run does not have, for `merge`.

    To be called in one process.

    Args:
        directory: the block's directory.
        size: number of samples of the data set.
        columns: of the rows.
        ranks: number of processes now.
        last: number of the last batch that the run keeps.
    """
    for rank in range(ranks, _ranks_in(directory)):
        kept = Visits.load(directory / _visits_part(rank))
        writer = BlockWriter(directory, size, columns, rank, kept[kept.batch <= last])
        writer.sync()
        writer.close()


def _ranks_in(directory: Path) -> int:
    """The number of processes whose visits a directory holds."""
    found = itertools.takewhile(
        lambda rank: (directory / _visits_part(rank)).is_file(), itertools.count()
    )
    return sum(1 for _ in found)


def merge(directory: Path) -> Visits:
    """Bring the files of all processes together, into one block.

    Where several processes saw a sample, the row of the lowest one is in place; further ones are
    repeats. To be called in one process, when all have synchronized theirs.

    Args:
        directory: the block's directory.

    Returns:
        All visits, in the order of appearance.
    """
    ranks = _ranks_in(directory)
    parts = [Visits.load(directory / _visits_part(rank)) for rank in range(ranks)]
    target = np.load(_rows_file(directory, 0), mmap_mode="r+")
    seen = np.zeros(len(target), bool)
    repeats: list[NDArray] = []
    count = 0
    for rank, visits in enumerate(parts):
        own = np.load(_rows_file(directory, rank), mmap_mode="r")
        again = np.fromfile(_repeats_part(directory, rank), np.float32)
        repeats.append(again.reshape(-1, target.shape[1]))
        further = visits.place >= 0
        visits.place[further] += count
        count += len(repeats[-1])
        mine = np.flatnonzero(visits.place == IN_PLACE)
        late = mine[seen[visits.index[mine]]]
        first = visits.index[np.setdiff1d(mine, late)]
        if rank:
            target[first] = own[first]
            repeats.append(np.array(own[visits.index[late]]))
            visits.place[late] = count + np.arange(len(late))
            count += len(late)
        seen[first] = True
    target.flush()
    if count:
        beside = directory / f"{REPEATS}.tmp.npy"
        np.save(beside, np.concatenate(repeats))
        os.replace(beside, directory / REPEATS)
    else:
        (directory / REPEATS).unlink(missing_ok=True)
    together = Visits.joined(parts)
    together = together[np.lexsort((together.rank, together.batch))]
    together.save(directory / VISITS)
    for part in directory.glob("*.part"):
        part.unlink()
    return together


def set_aside(directory: Path, ranks: int) -> tuple[Path | None, bool]:
    """Move a finished block out of the way, to be collected again.

    Args:
        directory: the block's directory.
        ranks: number of processes.

    Returns:
        Where an earlier block is kept, if there is one, and whether the directory holds what can be
        gone on with.
    """
    aside = directory.with_name(f"{directory.name}.earlier")
    if (directory / VISITS).is_file():
        shutil.rmtree(aside, ignore_errors=True)
        os.rename(directory, aside)
        return aside, False
    begun = all((directory / _visits_part(rank)).is_file() for rank in range(ranks))
    if aside.is_dir() and not begun:  # killed right after moving it
        shutil.rmtree(directory, ignore_errors=True)
        return aside, False
    # The file that is made last tells whether a killed run came far enough to be gone on with.
    whole = (directory / "_is_featurized.mmap").is_file()
    return (aside if aside.is_dir() else None), whole


def goes_on(earlier: Path, later: Path) -> bool:
    """Whether a block begins with all that an earlier one of the same epoch holds."""
    before, now = Visits.load(earlier / VISITS), Visits.load(later / VISITS)
    first = np.arange(len(before))
    if len(now) < len(before):
        return False
    now = now[first]
    named = ("index", "batch", "step", "rank", "share", "learning_rate")
    return all(np.array_equal(getattr(before, name), getattr(now, name)) for name in named) and all(
        np.array_equal(rows_of(earlier, before[some]), rows_of(later, now[some]), equal_nan=True)
        for some in np.array_split(first, -(-len(first) // 4096) or 1)
    )


def rows_of(directory: Path, visits: Visits) -> Rows:
    """Read the rows of visits of a finished block, ``(V, columns)``; NaN where none was stored."""
    grads = np.load(directory / "grads.mmap", mmap_mode="r")
    rows = np.array(grads[visits.index])
    again = np.flatnonzero(visits.place >= 0)
    if len(again):
        rows[again] = np.load(directory / REPEATS, mmap_mode="r")[visits.place[again]]
    rows[visits.place == NOT_STORED] = np.nan
    return rows


def _bytes(rows: Rows) -> memoryview:
    return rows.reshape(-1).view(np.uint8).data


def _write(file: int, data: memoryview, offset: int) -> None:
    while data:
        written = os.pwrite(file, data, offset)
        data, offset = data[written:], offset + written


def _rows_file(directory: Path, rank: int) -> Path:
    return directory / ("grads.mmap" if rank == 0 else f"grads.{rank}.part")


def _repeats_part(directory: Path, rank: int) -> Path:
    return directory / f"repeats.{rank}.part"


def _visits_part(rank: int) -> str:
    return f"visits.{rank}.part"
