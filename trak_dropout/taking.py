"""Takes the coordinates that a mask keeps from gradients, and adds them up in its columns.

Where coordinates fold, everything runs with samples innermost in memory: what is read at a
coordinate, and what is added to a column, lies together then.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from trak_dropout.gradients.factors import (
    DEFAULT_BUDGET,
    Coordinates,
    FactoredGradient,
    raised,
    read_columns,
)
from trak_dropout.masks import Mask, spans

Block = Tensor | FactoredGradient
_ALL = slice(None)

BUFFER = 2**21
"""Bytes of each of the two factors of single positions that are multiplied at a time."""


class Plan:
    """A mask cut into the blocks in which gradients come, its indices on their device.

    Args:
        mask: the mask.
        shapes: of the gradients of one sample, block by block, in the order of coordinates.
        device: where they lie.
        dtype: in which sums run.
    """

    def __init__(
        self, mask: Mask, shapes: Sequence[torch.Size], device: torch.device, dtype: torch.dtype
    ) -> None:
        self._columns, self._device, self._dtype = mask.proj_dim, device, dtype
        cuts = spans(mask, [shape.numel() for shape in shapes])
        self.kept = [
            (i, Kept(mask, offset, slice(start, stop), device, dtype))
            for i, (offset, start, stop) in enumerate(cuts)
            if stop > start
        ]
        # Without folding every column has one weight, so that all are applied at the end, at once.
        self._weights = None if mask.folded else torch.as_tensor(mask.weights).to(device, dtype)
        self._singles: dict[tuple[tuple[int, bool], ...], Singles] = {}

    def of(self, blocks: Sequence[Block]) -> Tensor:
        """Compressed gradients of all blocks, in order, ``(B, proj_dim)``."""
        formed = [block for block in blocks if isinstance(block, Tensor)]
        if self._weights is None or len(formed) < len(blocks):
            out = self.zeros(len(blocks[0]))
            self.add_to(out, dict(enumerate(blocks)))
        else:  # every column is one coordinate: what is read is the result
            out = torch.cat([kept.read(formed[i]) for i, kept in self.kept], 1).to(self._dtype)
        return self.finish(out)

    def zeros(self, samples: int) -> Tensor:
        """Compressed gradients to begin with, ``(samples, proj_dim)``."""
        if self._weights is not None:
            return torch.zeros(samples, self._columns, dtype=self._dtype, device=self._device)
        return torch.zeros(self._columns, samples, dtype=self._dtype, device=self._device).T

    def add_to(self, out: Tensor, blocks: Mapping[int, Block]) -> None:
        """Add the shares of blocks, by number, to ``out``, in place."""
        single = self._add_singles(out, blocks)
        for i, kept in self.kept:
            if i in blocks and i not in single:
                kept.add_to(out, blocks[i])

    def _add_singles(self, out: Tensor, blocks: Mapping[int, Block]) -> Sequence[int]:
        """Add the shares of the blocks with a single position; returns which these are."""
        vectors = {}
        for i, _ in self.kept:
            block = blocks.get(i)
            if isinstance(block, FactoredGradient) and (pair := block.single()) is not None:
                vectors[i] = pair
        if len(vectors) < 2 or not len(out):
            return ()
        if self._weights is not None:
            return [
                i for i, kept in self.kept if i in vectors and kept.add_single(out, *vectors[i])
            ]
        # A gradient that was a product may be formed on another batch.
        which = tuple((i, second is None) for i, (_, second) in vectors.items())
        if which not in self._singles:
            self._singles[which] = Singles(
                [(kept, vectors[i]) for i, kept in self.kept if i in vectors]
            )
        self._singles[which].add_to(out, list(vectors.values()))
        return tuple(vectors)

    def finish(self, out: Tensor) -> Tensor:
        """Apply what is left to apply, in place, when every share has been added."""
        return out if self._weights is None else out.mul_(self._weights)


class Shares:
    """The shares of single parameters in compressed gradients; see `DropoutProjector.shares`.

    Args:
        names: of the plan's blocks.
        plan: the mask, cut by parameter.
    """

    def __init__(self, names: Sequence[str], plan: Plan) -> None:
        self._kept, self._plan = {names[i]: kept for i, kept in plan.kept}, plan
        self._place = {name: i for i, name in enumerate(names)}
        self._names = frozenset(self._kept)

    @property
    def names(self) -> frozenset[str]:
        """The parameters of which a coordinate is kept."""
        return self._names

    def zeros(self, samples: int) -> Tensor:
        """Compressed gradients to begin with, ``(samples, proj_dim)``."""
        return self._plan.zeros(samples)

    def add(self, out: Tensor, name: str, gradient: FactoredGradient | Tensor) -> None:
        """Add the share of a parameter, ``(B, *shape)``, to ``out``, in place."""
        kept = self._kept.get(name)
        if kept is not None:
            kept.add_to(out, gradient)

    def held(self, name: str, gradient: FactoredGradient) -> FactoredGradient:
        """What to hold of a parameter's gradient until `add_all`: sums of vectors' kept entries."""
        return gradient.held(self._kept[name].flat)

    def add_all(self, out: Tensor, gradients: Mapping[str, FactoredGradient]) -> None:
        """Add the shares of several parameters at once, which costs less than one by one."""
        self._plan.add_to(out, {self._place[name]: one for name, one in gradients.items()})

    def finish(self, out: Tensor) -> Tensor:
        """Apply what is left to apply, in place, when every share has been added."""
        return self._plan.finish(out)


class Kept:
    """The kept coordinates of one block; by column where several may feed one.

    Args:
        mask: the mask.
        offset: the block's first coordinate.
        place: where its kept coordinates stand in the mask.
        device: where gradients lie.
        dtype: in which sums run.
    """

    def __init__(
        self, mask: Mask, offset: int, place: slice, device: torch.device, dtype: torch.dtype
    ) -> None:
        order = np.arange(place.start, place.stop)
        if mask.folded:
            order = order[np.argsort(mask.columns[place], kind="stable")]
        self.flat = torch.as_tensor(mask.coordinates[order] - offset, device=device)
        self.columns = torch.as_tensor(mask.columns[order], device=device)
        self.weights = torch.as_tensor(mask.weights[order]).to(device, dtype)
        self._place = None if mask.folded else place
        self._coordinates: Coordinates | None = None
        self._bags: dict[tuple[int, int], Bags] = {}

    def add_to(self, out: Tensor, block: Block) -> None:
        """Add the block's share, unweighted where nothing folds, to ``out``, ``(B, k)``."""
        if isinstance(block, FactoredGradient):
            if self._coordinates is None:
                self._coordinates = block.coordinates(self.flat)
            for part, at, values in block.take(self._coordinates):
                self._fold(out if part == _ALL else out[part], at, values)
            return
        taken = self.read(block)
        if self._place is not None:
            out[:, self._place] += taken
        else:  # not by bags: a row is the same to the bit whatever batch it comes in
            out.index_add_(1, self.columns, taken.to(out.dtype) * self.weights)

    def read(self, block: Tensor) -> Tensor:
        """Kept coordinates of gradients that exist, unweighted, ``(B, c)``."""
        if block.is_contiguous():
            return read_columns(block.view(len(block), block.shape[1:].numel()), self.flat)
        if block.ndim > 1:  # read where it lies: reshaping would copy all of it
            axes = torch.unravel_index(self.flat, block.shape[1:])
            return block.movedim(0, -1)[axes].T
        return block.unsqueeze(1)

    def add_single(self, out: Tensor, first: Tensor, second: Tensor | None) -> bool:
        """Add the share of outer products to ``out``, unweighted, where nothing folds.

        Args:
            out: ``(B, k)``.
            first: of each sample, ``(B, rows)``; the gradients themselves where there is no second.
            second: ``(B, columns)``.

        Returns:
            Whether that was done; many coordinates are taken faster with samples together.
        """
        assert self._place is not None
        if second is None:
            values = raised(read_columns(first, self.flat))
        else:
            shape = first.shape[1], second.shape[1]
            if len(self.flat) > sum(shape):
                return False
            if self._coordinates is None:
                self._coordinates = Coordinates(self.flat, *shape)
            values = raised(read_columns(first, self._coordinates.rows))
            values *= raised(read_columns(second, self._coordinates.columns))
        out[:, self._place] += values
        return True

    def _fold(self, out: Tensor, at: slice, values: Tensor) -> None:
        """Add values ``(b, c)`` of some of the coordinates to their columns of ``out``."""
        if self._place is not None:
            first = self._place.start + (at.start or 0)
            out[:, first : first + values.shape[1]].add_(values)
            return
        begin = at.start or 0
        key = begin, begin + values.shape[1]
        if key not in self._bags:
            self._bags[key] = Bags(self.columns[slice(*key)], self.weights[slice(*key)])
        self._bags[key].add_to(out.T, values.T)


class Bags:
    """Sums of weighted rows, several for each row of the result.

    Args:
        columns: which row of the result each one belongs to, ascending, ``(c,)``; at least one.
        weights: their weights.
    """

    def __init__(self, columns: Tensor, weights: Tensor) -> None:
        self._columns, self._weights = columns, weights
        first, last = int(columns[0]), int(columns[-1])
        self._rows = slice(first, last + 1)
        self._every = torch.arange(len(columns), device=columns.device)
        span = torch.arange(first, last + 1, device=columns.device)
        self._starts = torch.searchsorted(columns, span)
        self._few = 2 * len(columns) < len(span)

    def add_to(self, out: Tensor, values: Tensor) -> None:
        """Add the sums of ``values``, ``(c, b)``, to ``out``, ``(k, b)``."""
        dtype = torch.promote_types(values.dtype, out.dtype)
        values, weights = values.to(dtype), self._weights.to(dtype)
        if self._few:
            out.index_add_(0, self._columns, (values * weights.unsqueeze(1)).to(out.dtype))
            return
        sums = nn.functional.embedding_bag(
            self._every,
            values.contiguous(),
            self._starts,
            mode="sum",
            per_sample_weights=weights,
        )
        out[self._rows].add_(sums)


Vectors = tuple[Tensor, Tensor | None]
"""Of each sample the two vectors whose outer product a gradient is, ``(B, rows)`` and
``(B, columns)``; no second one where the first is the gradient."""


class Singles:
    """Coordinates of several blocks that are products of two vectors for each sample.

    All vectors are laid in one table, so that the coordinates of all blocks are taken at once,
    column by column of the result.

    Args:
        blocks: kept coordinates, and vectors of the shapes that will come.
    """

    def __init__(self, blocks: Sequence[tuple[Kept, Vectors]]) -> None:
        self._read: list[Tensor | None] = []
        left, right, height = [], [], 1  # the first row of the table is one
        for kept, (first, second) in blocks:
            flat = kept.flat
            if second is None:
                self._read.append(flat)
                left.append(height + torch.arange(len(flat), device=flat.device))
                right.append(torch.zeros_like(flat))
                height += len(flat)
            else:
                self._read.append(None)
                rows, width = first.shape[1], second.shape[1]
                row = torch.div(flat, width, rounding_mode="floor")
                left.append(height + row)
                right.append(height + rows + flat - row * width)
                height += rows + width
        columns = torch.cat([kept.columns for kept, _ in blocks])
        order = torch.argsort(columns, stable=True)
        self._height = height
        self._left, self._right = torch.cat(left)[order], torch.cat(right)[order]
        self._columns = columns[order]
        self._weights = torch.cat([kept.weights for kept, _ in blocks])[order]
        self._pieces: dict[int, list[tuple[Tensor, Tensor, Bags]]] = {}

    def add_to(self, out: Tensor, vectors: Sequence[Vectors]) -> None:
        """Add the shares of all blocks to ``out``, ``(B, k)``.

        Args:
            out: what to add to.
            vectors: of each block.
        """
        dtype = out.dtype
        for values in (values for pair in vectors for values in pair if values is not None):
            dtype = torch.promote_types(dtype, values.dtype)
        step = max(1, DEFAULT_BUDGET // (self._height * dtype.itemsize))
        for begin in range(0, len(out), step):
            part = slice(begin, begin + step)
            table = self._table(vectors, part, dtype)
            most = max(1, BUFFER // (table.shape[1] * table.itemsize))
            # Used for every piece: an allocator may take memory of this size from the operating
            # system anew each time.
            buffers = table.new_empty(2, min(most, len(self._columns)), table.shape[1])
            for left, right, bags in self._cut(most):
                values, others = buffers[:, : len(left)]
                torch.index_select(table, 0, left, out=values)
                torch.index_select(table, 0, right, out=others)
                bags.add_to(out[part].T, values.mul_(others))

    def _table(self, vectors: Sequence[Vectors], part: slice, dtype: torch.dtype) -> Tensor:
        """All vectors of some samples below each other, ``(height, b)``."""
        given = [
            _apart(vector[part]) if read is None else read_columns(vector[part], read)
            for read, pair in zip(self._read, vectors, strict=True)
            for vector in pair
            if vector is not None
        ]
        ones = given[0].new_ones(len(given[0]), 1)
        return torch.cat([values.to(dtype).T for values in (ones, *given)])

    def _cut(self, most: int) -> list[tuple[Tensor, Tensor, Bags]]:
        """Cut into pieces of at most so many coordinates."""
        if most not in self._pieces:
            starts = range(0, len(self._columns), most)
            parts: Iterator[slice] = (slice(i, i + most) for i in starts)
            self._pieces[most] = [
                (self._left[p], self._right[p], Bags(self._columns[p], self._weights[p]))
                for p in parts
            ]
        return self._pieces[most]


def _apart(values: Tensor) -> Tensor:
    """The same matrix, its rows no multiple of 4096 bytes apart.

    Otherwise the entries of a column compete for the same few places in a core's cache.
    """
    if values.shape[1] * values.itemsize % 4096:
        return values
    return nn.functional.pad(values, (0, 64 // values.itemsize))[:, : values.shape[1]]
