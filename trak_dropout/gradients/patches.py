"""`Patches`: the factors of a convolution's weight gradient."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from trak_dropout.gradients.factors import (
    COPIED,
    Coordinates,
    Products,
    raised,
    read_columns,
)

_INDICES = 2**17
"""Entries that may be told by number, for a piece of coordinates."""


class Patches(Products):
    """A convolution: products of output gradients and the windows of the input they come from.

    Windows are never copied out as a whole: they are a view of the padded input, of a few samples.

    Args:
        left: output gradients ``(B, N, out_channels, *out)``.
        inputs: ``(B, N, in_channels, *in)``.
        padding: as ``torch.nn.functional.pad`` takes it.
        mode: likewise.
        kernel: size of a window.
        stride: step from window to window.
        dilation: step inside a window.
        groups: of channels.
    """

    reading, laying = 130, 60

    def __init__(
        self,
        left: Tensor,
        inputs: Tensor,
        padding: Sequence[int],
        mode: str,
        kernel: Sequence[int],
        stride: Sequence[int],
        dilation: Sequence[int],
        groups: int,
    ) -> None:
        self._left, self._input = left, inputs
        self._padding, self._mode = list(padding), mode
        self.positions = left.shape[1] * math.prod(left.shape[3:])
        self._groups = groups
        self._kernel, self._stride, self._dilation = tuple(kernel), tuple(stride), tuple(dilation)

    @property
    def _kind(self) -> tuple[Any, ...]:
        """How windows lie in the padded input."""
        return self._kernel, self._stride, self._dilation, tuple(self._padding)

    def _padded(self, part: slice) -> Tensor:
        """The padded input ``(b, N, in_channels, *size)`` of some samples."""
        return _pad(self._input[part], self._padding, self._mode)

    def _windows(self, part: slice) -> Tensor:
        """Windows ``(b, channels, *kernel, N, *out)`` of some samples."""
        return self._windows_of(self._padded(part))

    def _windows_of(self, values: Tensor) -> Tensor:
        """Windows of padded inputs."""
        strides = values.stride()
        windows = values.as_strided(
            (*values.shape[:3], *self._kernel, *self._left.shape[3:]),
            (
                *strides[:3],
                *(s * d for s, d in zip(strides[3:], self._dilation, strict=True)),
                *(s * d for s, d in zip(strides[3:], self._stride, strict=True)),
            ),
        )
        return windows.movedim(1, 2 + len(self._kernel))

    @cached_property
    def _grid(self) -> tuple[int, ...]:
        """Size of what every step of a window reads of the padded input, from one offset on."""
        around = (a + b for a, b in zip(self._padding[::2], self._padding[1::2], strict=True))
        sizes = zip(self._input.shape[3:], reversed([*around]), self._stride, strict=True)
        return tuple(-(-(size + more) // step) for size, more, step in sizes)

    @cached_property
    def _run(self) -> int:
        """Entries of the grid from the first to the last that a place of the window meets."""
        last = (n - 1 for n in self._left.shape[3:])
        return 1 + sum(n * step for n, step in zip(last, _steps(self._grid), strict=True))

    @property
    def line(self) -> int:
        """Entries of a line, in which the positions of a row or a column are laid out."""
        return self._left.shape[1] * self._run

    def lines(self, part: slice, at: Coordinates) -> tuple[Tensor, Tensor]:
        """Lay out the positions of rows and of columns, ``(r * b, line)`` and ``(c * b, line)``.

        What a place of the window meets is in one grid, where it follows one another but for gaps.
        Everything from the first to the last is copied at once, which is much faster than without
        the gaps; they meet zeros.

        Args:
            part: samples.
            at: the coordinates whose rows and columns are needed.
        """
        rows, run, grids = at.lines[0], self._run, self._grids(part)
        samples, n, entries = grids.shape
        runs = grids.as_strided((entries - run + 1, samples, n, run), (1, *grids.stride()))
        right = runs.index_select(0, self._starts(at))
        left = self._left[part] if rows is None else self._left[part].index_select(2, rows)
        left = raised(left).movedim(2, 0)
        spread = left.new_zeros(*left.shape[:3], run)
        steps = _steps(self._grid)
        spread.as_strided(left.shape, (*spread.stride()[:3], *steps)).copy_(left)
        return spread.view(-1, n * run), right.view(-1, n * run)

    def _grids(self, part: slice) -> Tensor:
        """The grids of all offsets of all channels, ``(b, N, channels * offsets * entries)``."""
        values = raised(self._padded(part))
        if max(self._stride) > 1:
            n, ways = len(self._kernel), [*zip(self._grid, self._stride, strict=True)]
            lacking = [a * b - c for (a, b), c in zip(ways, values.shape[3:], strict=True)]
            values = nn.functional.pad(values, [x for end in reversed(lacking) for x in (0, end)])
            values = values.reshape(*values.shape[:3], *(x for way in ways for x in way))
            values = values.permute(0, 1, 2, *range(4, 4 + 2 * n, 2), *range(3, 3 + 2 * n, 2))
        return values.reshape(*values.shape[:2], -1).contiguous()

    def _starts(self, at: Coordinates) -> Tensor:
        """Where the first entry that each column meets is among those of all grids."""

        def work_out() -> Tensor:
            columns = at.lines[1]
            if columns is None:
                columns = torch.arange(at.shape[1], device=at.flat.device)
            start, *places = self._places(columns)
            ways = [*zip(places, self._dilation, self._stride, strict=True)]
            for place, dilation, stride in ways:
                start = start * stride + place * dilation % stride
            for (place, dilation, stride), size in zip(ways, self._grid, strict=True):
                start = start * size + place * dilation // stride
            return start

        found: Tensor = at.known(("starts", *self._kind, self._grid), work_out)
        return found

    def _places(self, columns: Tensor) -> tuple[Tensor, ...]:
        """Channels of columns, and places in the window."""
        size = math.prod(self._kernel)
        channels = torch.div(columns, size, rounding_mode="floor")
        return channels, *torch.unravel_index(columns - channels * size, self._kernel)

    def __len__(self) -> int:
        return self._left.shape[0]

    @property
    def parts(self) -> tuple[Tensor, ...]:
        """What is held of each sample."""
        return (self._left, self._input)

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return self._left.nbytes + self._input.nbytes

    @property
    def on_cpu(self) -> bool:
        """Whether the factors lie in main memory."""
        return self._left.is_cpu

    def left(self, part: slice, rows: Tensor | None = None) -> Tensor:
        """Values of output channels."""
        left = self._left[part]
        left = left if rows is None else left.index_select(2, rows)
        return raised(left.transpose(1, 2).flatten(2)).mT

    def right(self, part: slice, columns: Tensor | None = None) -> Tensor:
        """Values at places of the window of a group's first channels."""
        if columns is None:
            windows = self._windows(part)
            return raised(windows.flatten(1, 1 + len(self._kernel)).flatten(2)).mT
        return self._read(part, columns, 0)

    def _read(self, part: slice, columns: Tensor, first: Tensor | int) -> Tensor:
        """Values at places of the window, in groups that begin at channel ``first``."""
        channels, *places = self._places(columns)
        at: tuple[Any, ...] = (slice(None), channels + first, *places)
        return raised(self._windows(part)[at].flatten(2)).mT

    def gather(self, part: slice, at: Coordinates) -> Tensor:
        """Coordinates of some samples, by reading both factors at each."""
        if self._indexed(at):
            left = self._left[part].flatten(3)
            right, inside = self._sources(at)
            b, n = left.shape[:2]
            values = raised(left.flatten(0, 1).index_select(1, at.rows))
            values *= read_columns(self._input[part].flatten(0, 1).flatten(1), right).view_as(
                values
            )
            if inside is not None:
                values *= inside
            return values.sum(2).view(b, n, -1).sum(1)
        if self._groups == 1:
            return super().gather(part, at)
        width = self._left.shape[2] // self._groups
        first = torch.div(at.rows, width, rounding_mode="floor") * self._in_group
        return (self.left(part, at.rows) * self._read(part, at.columns, first)).sum(1)

    def _indexed(self, at: Coordinates) -> bool:
        """Whether coordinates are so few that each entry they read can be told by its number."""
        return len(at) * math.prod(self._left.shape[3:]) <= _INDICES

    def _sources(self, at: Coordinates) -> tuple[Tensor, Tensor | None]:
        """Which entries of the input coordinates read, one position after the other.

        Returns:
            Numbers ``(c * positions,)``, and zero where there is none, ``(c, positions)``; None
            where that is nowhere.
        """

        def work_out() -> tuple[Tensor, Tensor | None]:
            shape = self._input.shape[3:]
            numbers = torch.arange(math.prod(shape), dtype=torch.float64).view(1, 1, 1, *shape)
            channels, *places = self._places(at.columns.cpu())
            numbers = _pad(numbers, self._padding, self._mode, -1.0)
            first: tuple[Any, ...] = (0, 0, *places)
            each = self._windows_of(numbers)[first].flatten(1).long()
            width = self._left.shape[2] // self._groups
            channels += torch.div(at.rows.cpu(), width, rounding_mode="floor") * self._in_group
            index = channels.unsqueeze(1) * math.prod(shape) + each.clamp_min(0)
            inside = None if bool((each >= 0).all()) else (each >= 0).to(self._left)
            return index.flatten().to(at.flat.device), inside

        kind = *self._kind, self._input.shape[2:], self._mode, self._groups
        found: tuple[Tensor, Tensor | None] = at.known(("sources", *kind), work_out)
        return found

    def _lie_together(self, at: Coordinates) -> bool:
        """As for all products; but rows of different groups read different windows."""
        return self._groups == 1 and super()._lie_together(at)

    @property
    def _in_group(self) -> int:
        return self._input.shape[2] // self._groups

    def form(self, part: slice) -> Tensor:
        """Form the gradients of some samples in full."""
        if self._groups == 1:
            return super().form(part)
        left, right = self.left(part), self.right(part)
        b, t = left.shape[:2]
        split = [x.reshape(b, t, self._groups, -1).movedim(2, 1) for x in (left, right)]
        return (split[0].mT @ split[1]).flatten(1, 2)

    def costs(self, at: Coordinates) -> dict[str, tuple[float, float]]:
        """Multiply-adds and values held of each way, for one sample, without those of calls."""
        found = super().costs(at)
        if self._groups > 1:  # rows see different columns: there is no common block
            found.pop("block", None)
            found.pop("dots", None)
        channels = self._in_group * self._groups
        entries = channels * self._input.shape[1] * math.prod((*self._grid, *self._stride))
        copied = channels * math.prod(self._kernel) * self.positions
        padded = entries if any(self._padding) else 0
        on_top = {
            "gather": 0 if self._indexed(at) else padded,
            "block": padded,
            "form": copied + padded,
            "dots": padded + (entries if max(self._stride) > 1 else 0),
        }
        return {
            way: (work + COPIED * on_top[way], held + on_top[way])
            for way, (work, held) in found.items()
        }


def _pad(values: Tensor, padding: Sequence[int], mode: str, value: float = 0.0) -> Tensor:
    """Pad ``(b, N, channels, *in)``."""
    if not any(padding):
        return values
    value = value if mode == "constant" else 0.0
    flat = nn.functional.pad(values.flatten(0, 1), padding, mode, value)
    return flat.view(*values.shape[:2], *flat.shape[1:])


def _steps(size: Sequence[int]) -> list[int]:
    """How far neighbors are apart in each direction, where entries lie line by line."""
    return [math.prod(size[i + 1 :]) for i in range(len(size))]
