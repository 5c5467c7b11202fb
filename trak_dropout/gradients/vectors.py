"""`Sums`: the gradients of vectors, such as biases and the scales of norms."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from trak_dropout.gradients.factors import (
    Coordinates,
    Factor,
    Formed,
    Taken,
    columns_of,
    parts_of,
    raised,
    read_columns,
)

_ALL = slice(None)


class Sums(Factor):
    """Sums over positions; no more of them are made than are asked for.

    Few of a vector's entries are kept, while what they are summed from is as large as an
    activation: to go through all of it would cost more than all else that a norm needs.

    Args:
        values: what to sum, such as output gradients, ``(B, N, entries, *positions)``.
        times: returns what it is multiplied by, such as normalized inputs, for the entries that
            it is given (all when None), ``(B, N, c, *positions)``.
        shared: whether the layer's weight needs ``values``, too, so that they are held anyway.
    """

    def __init__(
        self,
        values: Tensor,
        times: Callable[[Tensor | None], Tensor] | None = None,
        shared: bool = False,
    ) -> None:
        self._values, self._times, self._shared = values, times, shared
        shape = values.shape
        self._entries, self._positions = shape[2], shape[1] * shape[3:].numel()

    @property
    def parts(self) -> tuple[Tensor, ...]:
        """What is held of each sample."""
        return (self._values,)

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return self._values.nbytes * (1 if self._times is None else 2)

    def single(self) -> tuple[Tensor, None] | None:
        """Return the only value of each sample, where it is one."""
        if self._positions != 1:
            return None
        if self._times is not None:  # no larger than a sample's output: made once
            self._values, self._times = raised(self._values) * self._times(None), None
        return self._values.flatten(1), None

    def take(self, at: Coordinates, budget: int) -> Iterator[Taken]:
        """Compute coordinates of all samples."""
        few = at.flat if len(at) < self._entries else None
        held = 8 * min(len(at), self._entries) * (2 * self._positions + 1)
        for part, sums in self._sums(few, parts_of(len(self._values), held, budget)):
            yield part, _ALL, sums if few is not None else read_columns(sums, at.flat)

    def form(self, part: slice) -> Tensor:
        """Form the gradients of some samples."""
        ((_, sums),) = self._sums(None, [part])
        return sums.unsqueeze(-1)

    def held(self, kept: Tensor | None = None) -> Factor:
        """Return the sums, zero where they are not kept, unless what they are of is held anyway."""
        if kept is None or len(kept) >= self._entries:
            return self if self._shared and kept is None else Formed(self.form(_ALL)[..., 0])
        if self._positions == 1:
            return self
        ((_, sums),) = self._sums(kept, [_ALL])
        whole = sums.new_zeros(len(sums), self._entries)
        whole[:, kept] = sums
        return Formed(whole)

    def _sums(self, which: Tensor | None, parts: list[slice]) -> Iterator[tuple[slice, Tensor]]:
        """Sums of some entries, ``(b, c)``, of some samples after others."""
        times = None if self._times is None else self._times(which)
        for part in parts:
            values = raised(entries(self._values[part], which))
            if times is not None:
                values = values * times[part]
            if values.ndim == 3:
                yield part, values.sum(1)
            else:
                yield part, _each(values.transpose(1, 2).flatten(2))


def entries(values: Tensor, which: Tensor | None) -> Tensor:
    """Some entries of ``(B, N, entries, *positions)``."""
    if which is None:
        return values
    return values.index_select(2, which) if values.ndim > 3 else columns_of(values, which)


def _each(lines: Tensor) -> Tensor:
    """Sums of the last dimension of ``(b, c, T)``; of a single line as of one among several."""
    if lines.shape[0] * lines.shape[1] == 1 < torch.get_num_threads():
        # A single long one would be cut among threads, and a row must not depend on its batch.
        return lines.expand(2, *lines.shape[1:]).sum(2)[:1]
    return lines.sum(2)
