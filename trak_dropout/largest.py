"""The largest of many scores, that come a block of rows at a time."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from trak_dropout.scoring import GramError

PIECE = 64  # scores of a target that are looked at together


class Largest:
    """The k largest scores of each target so far, equal ones by row.

    Once there are k, few further ones matter. So the maximum of each piece of 64 scores is compared
    with the smallest kept, which reads every score once, and only pieces that go beyond are looked
    into. What is found waits until there is enough of it to be worth sorting.

    Args:
        targets: number of targets.
        k: how many to keep.
        device: where.
        dtype: of the scores.

    Attributes:
        values: ``(targets, up to k)``, best first.
        indices: their rows.
        seen: number of scores seen for each target.
    """

    def __init__(
        self, targets: int, k: int, device: Any, dtype: torch.dtype = torch.float32
    ) -> None:
        self.k = k
        self.values = torch.empty(targets, 0, device=device, dtype=dtype)
        self.indices = torch.empty(targets, 0, dtype=torch.int64, device=device)
        self.seen = 0
        self._waiting: list[tuple[Tensor, Tensor, Tensor]] = []
        self._width = 0

    def add(self, scores: Tensor, first: int) -> None:
        """Take in scores of the rows from ``first`` on, which follow on those before.

        Args:
            scores: ``(targets, rows)``, a multiple of `PIECE` of them, filled up with ``-inf``.
            first: number of the first row.

        Raises:
            GramError: a score is NaN or infinite.
        """
        pieces = scores.view(len(scores), -1, PIECE)
        maxima = pieces.amax(2)
        if math.isnan(top := float(maxima.amax())) or top == math.inf:
            raise GramError("scores leave the range of float32; scale the loss up")
        at = 0
        while at < pieces.shape[1]:
            missing = self.k - self.values.shape[1]
            # Never more at once than were seen before: the smallest kept is of too little use yet.
            stop = at + max(1, -(-missing // PIECE) if missing else self.seen // PIECE)
            start, end = at * PIECE, min(stop * PIECE, scores.shape[1])
            if missing:
                rows = torch.arange(first + start, first + end, device=scores.device)
                self._merge(scores[:, start:end], rows.expand(len(scores), -1))
            else:
                self._look(pieces[:, at:stop], maxima[:, at:stop], first + start)
            self.seen += end - start
            at = stop

    def settle(self) -> tuple[Tensor, Tensor]:
        """Sort in what waits; return values and row numbers, ``(targets, k)``, best first."""
        if self._waiting:
            targets, rows, values = (torch.cat(parts) for parts in zip(*self._waiting, strict=True))
            self._waiting, self._width = [], 0
            targets, order = torch.sort(targets, stable=True)
            counts = torch.bincount(targets, minlength=len(self.values))
            starts = torch.cumsum(counts, 0) - counts
            places = torch.arange(len(targets), device=targets.device) - starts[targets]
            width = int(counts.max())
            new = self.values.new_full((len(self.values), width), -math.inf)
            numbers = self.indices.new_zeros(new.shape)
            new[targets, places] = values[order]
            numbers[targets, places] = rows[order]
            self._merge(new, numbers)
        return self.values, self.indices

    def _look(self, pieces: Tensor, maxima: Tensor, first: int) -> None:
        """Find scores above the smallest kept."""
        least = self.values[:, -1]
        hits = torch.nonzero(maxima > least.unsqueeze(1))
        if not len(hits):
            return
        found = pieces[hits[:, 0], hits[:, 1]]
        inside = torch.nonzero(found > least[hits[:, 0]].unsqueeze(1))
        targets, numbers = hits[inside[:, 0]].T
        rows = first + numbers * PIECE + inside[:, 1]
        self._waiting.append((targets, rows, found[inside[:, 0], inside[:, 1]]))
        self._width += int(torch.bincount(targets).max())
        # Later rows are compared with what is kept now, so it should not stay behind for long.
        if self._width > self.k:
            self.settle()

    def _merge(self, values: Tensor, rows: Tensor) -> None:
        both = torch.cat([self.values, values], 1)
        # Stable, with earlier rows first: equal scores stay in the order of their rows.
        both, order = torch.sort(both, dim=1, descending=True, stable=True)
        self.values = both[:, : self.k].clone()
        self.indices = torch.cat([self.indices, rows], 1).gather(1, order[:, : self.k])
