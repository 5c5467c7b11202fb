"""Per-sample gradients as the factors they are made of, and how single coordinates are taken.

The gradient of a layer's weight is, for each sample, a sum of outer products of output gradients
and inputs. Kept coordinates are computed from these two, so that neither a per-sample gradient nor
a weight gradient ever exists.
"""

from __future__ import annotations

import copy
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, ItemsView, Iterator, KeysView, Mapping, Sequence, ValuesView
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from trak_dropout.statistics import as_matrix

DEFAULT_BUDGET = 32 * 2**20
"""Bytes that taking coordinates may use for intermediate values at a time."""

# What a way of taking coordinates costs, in multiply-adds of a matrix product: reading one product
# of a gather with all samples of a coordinate together, writing one entry of a block, copying one
# entry of what a block is made of, a multiply-add of a product of two lines and what comes on top
# for each, and the calls for a batch. Measured on CPUs, calls with other things in the caches.
# Calls are shared by a batch of the usual size, whatever its own is: rows must not depend on that.
_TOGETHER, _WRITTEN, COPIED, _DOT, _BEGUN = 20, 40, 20, 5, 120
_CALLS = {"gather": 1.5e7, "form": 3e7, "block": 4e7, "dots": 3e7}
_USUAL = 32
_KINDS = 8

# Bytes of a piece of values that stays in a core's cache, and below what an allocator takes from
# the operating system anew each time; and of the lines that are laid out at a time.
PIECE, _LAID_OUT = 2**20, 2**24

_SMALL = 2**15  # numbers to read that are not worth a second thread


class Coordinates:
    """Coordinates of one parameter, and what is known of their rows and columns.

    Args:
        flat: coordinates in the flattened parameter, int64 ``(c,)``, in any order.
        rows: rows of the parameter, seen as a matrix of its first dimension by all others.
        columns: its columns.
    """

    def __init__(self, flat: Tensor, rows: int, columns: int) -> None:
        self.flat = flat
        self.shape = rows, columns
        self.rows = torch.div(flat, max(columns, 1), rounding_mode="floor")
        self.columns = flat - self.rows * columns
        self._pieces: dict[int, list[tuple[int, Coordinates]]] = {}
        self._patterns: dict[tuple[int, torch.dtype], tuple[Tensor, Tensor]] = {}
        self._count = flat.numel()
        self.ways: dict[Any, tuple[str, float]] = {}  # chosen before, of products of the same size
        self._known: dict[Any, Any] = {}

    def __len__(self) -> int:
        return self._count

    @cached_property
    def distinct_rows(self) -> tuple[Tensor, Tensor]:
        """Rows that occur, ascending, and for each coordinate where its row stands there."""
        return torch.unique(self.rows, return_inverse=True)

    @cached_property
    def distinct_columns(self) -> tuple[Tensor, Tensor]:
        """Columns that occur, ascending, and for each coordinate where its column stands there."""
        return torch.unique(self.columns, return_inverse=True)

    @cached_property
    def order(self) -> Tensor:
        """The places of the coordinates, by ascending coordinate."""
        return torch.argsort(self.flat, stable=True)

    @cached_property
    def by_line(self) -> tuple[Coordinates, Tensor]:
        """The same coordinates by ascending row, or column where there are more columns.

        What is read then follows one another in memory. Also where each coordinate stands there.
        """
        order = torch.argsort(self.rows if self.shape[0] > self.shape[1] else self.columns)
        return Coordinates(self.flat[order], *self.shape), torch.argsort(order)

    @cached_property
    def lines(self) -> tuple[Tensor | None, Tensor | None]:
        """Rows and columns that occur; None where most do, because all cost as little then."""
        rows, columns = self.distinct_rows[0], self.distinct_columns[0]
        return (
            None if 4 * len(rows) > 3 * self.shape[0] else rows,
            None if 4 * len(columns) > 3 * self.shape[1] else columns,
        )

    @cached_property
    def laid_out(self) -> tuple[int, int]:
        """How many `lines` there are."""
        rows, columns = (
            every if some is None else len(some)
            for every, some in zip(self.shape, self.lines, strict=True)
        )
        return rows, columns

    @property
    def turned(self) -> bool:
        """Whether there are more `lines` of columns than of rows."""
        rows, columns = self.laid_out
        return columns > rows

    def pattern(self, samples: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Where samples have the coordinates, in matrices that hold their `lines` one by one.

        Of rows and columns, those of which there are more lines are the rows of the result.
        Threads share these in the order in which they laid them out, so that most of what a thread
        reads is its own, which counts where cores do not share a cache.

        Args:
            samples: how many stand beside each other at every row, and at every column.
            dtype: of the values.

        Returns:
            A sparse matrix of zeros ``(rows * samples, columns * samples)``, or the other way round
            where they are `turned`, and where each coordinate of each sample, ``(c, samples)``,
            stands among its values.
        """
        key = samples, dtype
        if key not in self._patterns:
            rows, columns = self.lines
            height, width = self.laid_out
            row = self.rows if rows is None else self.distinct_rows[1]
            column = self.columns if columns is None else self.distinct_columns[1]
            each = torch.arange(samples, device=row.device)
            if self.turned:
                row, column, height, width = column, row, width, height
            row = (row.unsqueeze(1) * samples + each).flatten()
            column = (column.unsqueeze(1) * samples + each).flatten()
            order = torch.argsort(row * (width * samples) + column)
            lines = torch.arange(height * samples + 1, device=row.device)
            starts = torch.searchsorted(row[order], lines)
            with warnings.catch_warnings():  # a word on sparse tensors being in beta state
                warnings.simplefilter("ignore")
                zeros = torch.sparse_csr_tensor(
                    starts,
                    column[order],
                    torch.zeros(len(order), dtype=dtype, device=row.device),
                    (height * samples, width * samples),
                )
            places = torch.empty_like(order)
            places[order] = torch.arange(len(order), device=row.device)
            self._patterns[key] = zeros, places.view(-1, samples)
        return self._patterns[key]

    def known(self, key: Any, work_out: Callable[[], Any]) -> Any:
        """What a kind of products has worked out for these, now or before.

        Args:
            key: of the kind; of few it is kept, because inputs may have any size.
            work_out: to be called where it is not known.
        """
        if key not in self._known:
            if len(self._known) >= _KINDS:
                self._known.clear()
            self._known[key] = work_out()
        return self._known[key]

    @cached_property
    def in_block(self) -> Tensor:
        """Where each coordinate stands in the block of all rows and columns that occur."""
        return self.distinct_rows[1] * len(self.distinct_columns[0]) + self.distinct_columns[1]

    def split(self, most: int) -> list[tuple[int, Coordinates]]:
        """Cut into pieces of at most so many coordinates, each with where it begins."""
        if len(self) <= most:
            return [(0, self)]
        if most not in self._pieces:
            parts = enumerate(torch.split(self.flat, most))
            self._pieces[most] = [(i * most, Coordinates(p, *self.shape)) for i, p in parts]
        return self._pieces[most]


Taken = tuple[slice, slice, Tensor]
_ALL = slice(None)


class Factor(ABC):
    """A contribution to the per-sample gradients of one parameter, ``(B, rows, columns)``."""

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Bytes held."""

    @abstractmethod
    def take(self, at: Coordinates, budget: int) -> Iterator[Taken]:
        """Compute coordinates of all samples, piece by piece.

        Args:
            at: which; at least one.
            budget: bytes that a piece and what it is computed from may take.

        Yields:
            Samples, coordinates, and their values ``(b, c)``, float32 or float64.
        """

    @abstractmethod
    def form(self, part: slice) -> Tensor:
        """Form the gradients of some samples in full, ``(b, rows, columns)``."""

    @property
    def parts(self) -> tuple[Tensor, ...]:
        """What is held of each sample, ``(B, ...)``: one proportional to the sample's output."""
        return ()

    def single(self) -> tuple[Tensor, Tensor | None] | None:
        """Return the two vectors of each sample whose outer product this is.

        Returns:
            ``(B, rows)`` and ``(B, columns)``, or the gradients themselves, flattened, and None;
            None where it is something else.
        """
        return None

    def held(self, kept: Tensor | None = None) -> Factor:
        """Return what to hold instead where coordinates are not taken at once.

        Args:
            kept: the only ones that will be taken, int64 ``(c,)``; any when None.
        """
        return self


class Formed(Factor):
    """Gradients that exist: of vectors, and of what has no rule.

    Args:
        values: ``(B, *shape)``.
    """

    def __init__(self, values: Tensor) -> None:
        self.values = values

    @property
    def parts(self) -> tuple[Tensor, ...]:
        """What is held of each sample."""
        return (self.values,)

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return self.values.nbytes

    def single(self) -> tuple[Tensor, None]:
        """Return the gradients, flattened."""
        return self.values.reshape(len(self.values), -1), None

    def take(self, at: Coordinates, budget: int) -> Iterator[Taken]:
        """Compute coordinates of all samples."""
        for part in parts_of(len(self.values), 8 * len(at), budget):
            values = self.values[part]
            yield part, _ALL, raised(read_columns(values.reshape(len(values), -1), at.flat))

    def form(self, part: slice) -> Tensor:
        """Form the gradients of some samples."""
        values = self.values[part]
        rows = values.shape[1] if values.ndim > 1 else 1
        return raised(values.reshape(len(values), rows, values.shape[2:].numel()))


class Products(Factor):
    """A sum of outer products over positions: each gives one value for each row and column.

    Of four ways to the coordinates the cheapest is taken: to read both factors at each coordinate;
    to lay out the positions of each row and each column in a line, and multiply two lines for each
    coordinate; to multiply out the block of all rows and columns that occur; or to multiply out
    everything.
    """

    positions: int
    # Columns of what is held are read, and lines are columns.
    reading = 60
    """What it costs to read one product of a gather, in the same multiply-adds."""
    laying = 80
    """What it costs to lay one entry of a line where it belongs."""

    @property
    @abstractmethod
    def on_cpu(self) -> bool:
        """Whether the factors lie in main memory."""

    @abstractmethod
    def left(self, part: slice, rows: Tensor | None = None) -> Tensor:
        """Values of rows (all when None), ``(b, positions, r)``."""

    @abstractmethod
    def right(self, part: slice, columns: Tensor | None = None) -> Tensor:
        """Values of columns (all when None), ``(b, positions, c)``."""

    @abstractmethod
    def __len__(self) -> int:
        """Number of samples."""

    def gather(self, part: slice, at: Coordinates) -> Tensor:
        """Coordinates of some samples, by reading both factors at each."""
        if self.positions == 1:
            return self.left(part, at.rows).mul_(self.right(part, at.columns))[:, 0]
        at, places = at.by_line
        values = self.left(part, at.rows).mul_(self.right(part, at.columns)).sum(1)
        return values.index_select(1, places)

    def together(self, part: slice, at: Coordinates) -> Iterator[tuple[slice, Tensor]]:
        """As `gather` for a single position, but what is read at a coordinate lies together.

        Yields:
            Coordinates, and their values as the transpose of a contiguous matrix.
        """
        left = self.left(part)[:, 0].T.contiguous()
        right = self.right(part)[:, 0].T.contiguous()
        for begin, piece in at.split(max(1, PIECE // (left.itemsize * left.shape[1]))):
            values = left.index_select(0, piece.rows).mul_(right.index_select(0, piece.columns))
            yield slice(begin, begin + len(piece)), values.T

    @property
    def line(self) -> int:
        """Entries of a line, in which the positions of a row or a column are laid out."""
        return self.positions

    def lines(self, part: slice, at: Coordinates) -> tuple[Tensor, Tensor]:
        """Lay out the positions of rows and of columns, ``(r * b, line)`` and ``(c * b, line)``."""
        rows, columns = at.lines
        return _lines(self.left(part, rows)), _lines(self.right(part, columns))

    def dots(self, part: slice, at: Coordinates) -> Tensor:
        """Coordinates of some samples, by multiplying two lines of positions for each."""
        left, right = self.lines(part, at)
        dtype = torch.promote_types(left.dtype, right.dtype)
        samples = len(range(len(self))[part])
        zeros, places = at.pattern(samples, dtype)
        one, other = (right, left) if at.turned else (left, right)
        found = torch.sparse.sampled_addmm(zeros, one.to(dtype), other.to(dtype).T, beta=0.0)
        return found.values().index_select(0, places.flatten()).view(places.shape).T

    def block(self, part: slice, rows: Tensor | None, columns: Tensor | None) -> Tensor:
        """The product of some rows and columns, of some samples, ``(b, r, c)``."""
        return self.left(part, rows).mT @ self.right(part, columns)

    def form(self, part: slice) -> Tensor:
        """Form the gradients of some samples in full."""
        return self.block(part, None, None)

    def costs(self, at: Coordinates) -> dict[str, tuple[float, float]]:
        """Multiply-adds and values held of each way, for one sample, without those of calls."""
        rows, columns = at.shape
        read = _TOGETHER if self._lie_together(at) else self.reading * self.positions
        found: dict[str, tuple[float, float]] = {
            "gather": (read * len(at), 2 * len(at) * self.positions),
            "form": ((self.positions + _WRITTEN) * rows * columns, rows * columns),
        }
        if len(at) < rows * columns:
            r, c = len(at.distinct_rows[0]), len(at.distinct_columns[0])
            copied = COPIED * (r + c) * self.positions
            found["block"] = (
                copied + (self.positions + _WRITTEN) * r * c,
                r * c + (r + c) * self.positions,
            )
        r, c = at.laid_out
        if self.positions > 1 and self.on_cpu and len(at) <= r * c:  # a sparse matrix has no more
            copied = (r + c) * self.line
            found["dots"] = (
                (_DOT * self.line + _BEGUN) * len(at) + self.laying * copied,
                2 * len(at) + copied,
            )
        return found

    def _lie_together(self, at: Coordinates) -> bool:
        """Whether single positions are read so often that it pays to bring samples together."""
        return self.positions == 1 and 2 * len(at) > sum(at.shape)

    def take(self, at: Coordinates, budget: int) -> Iterator[Taken]:
        """Compute coordinates of all samples in the cheapest way."""
        key = type(self), self.positions, budget, self.on_cpu
        if key not in at.ways:
            costs = self.costs(at)
            # A way that could not hold a single sample within the budget is not open.
            ways = [way for way in costs if 8 * (costs[way][1] + len(at)) <= budget]
            cheapest = min(
                ways, key=lambda way: costs[way][0] + _CALLS[way] / _USUAL, default="gather"
            )
            at.ways[key] = cheapest, 8 * (costs[cheapest][1] + len(at))
        way, held = at.ways[key]
        parts = parts_of(len(self), held, budget)
        if way == "gather" and self._lie_together(at):
            for part in parts:
                for which, values in self.together(part, at):
                    yield part, which, values
        elif way == "dots":
            for part in parts_of(len(self), held, min(budget, _LAID_OUT)):
                yield part, _ALL, self.dots(part, at)
        elif way == "gather":
            most = max(1, budget // (8 * (2 * self.positions + 1)))
            for part in parts:
                for begin, piece in at.split(most):
                    yield part, slice(begin, begin + len(piece)), self.gather(part, piece)
        elif way == "form":
            for part in parts:
                yield part, _ALL, read_columns(self.form(part).flatten(1), at.flat)
        else:
            rows, columns = at.distinct_rows[0], at.distinct_columns[0]
            for part in parts:
                block = self.block(part, rows, columns).flatten(1)
                yield part, _ALL, read_columns(block, at.in_block)


class Outer(Products):
    """Outer products of two matrices for each sample.

    Args:
        left: values of the rows, such as output gradients, ``(B, T, rows)``.
        right: values of the columns, such as inputs, ``(B, T, columns)``.
    """

    def __init__(self, left: Tensor, right: Tensor) -> None:
        self._left, self._right = left, right
        self.positions = left.shape[1]

    def __len__(self) -> int:
        return self._left.shape[0]

    @property
    def parts(self) -> tuple[Tensor, ...]:
        """What is held of each sample."""
        return (self._left, self._right)

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return self._left.nbytes + self._right.nbytes

    @property
    def on_cpu(self) -> bool:
        """Whether the factors lie in main memory."""
        return self._left.is_cpu

    def single(self) -> tuple[Tensor, Tensor] | None:
        """Return the only two vectors of each sample, where there is a single position."""
        return (self._left[:, 0], self._right[:, 0]) if self.positions == 1 else None

    def left(self, part: slice, rows: Tensor | None = None) -> Tensor:
        """Values of rows."""
        return raised(columns_of(self._left[part], rows))

    def right(self, part: slice, columns: Tensor | None = None) -> Tensor:
        """Values of columns."""
        return raised(columns_of(self._right[part], columns))


class Lookups(Factor):
    """Rows of a table that were looked up: each adds its output gradient to its row.

    Args:
        rows: which, int64 ``(B, T)``; negative ones add nothing.
        values: output gradients ``(B, T, columns)``.
        height: rows of the table.
    """

    def __init__(self, rows: Tensor, values: Tensor, height: int) -> None:
        self._rows, self._values, self._height = rows, values, height

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def parts(self) -> tuple[Tensor, ...]:
        """What is held of each sample."""
        return (self._values,)

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return self._rows.nbytes + self._values.nbytes

    def take(self, at: Coordinates, budget: int) -> Iterator[Taken]:
        """Compute coordinates: pair each lookup with the coordinates that lie in its row."""
        rows, ascending = self._rows.contiguous(), at.rows[at.order]
        starts = torch.searchsorted(ascending, rows)
        counts = torch.searchsorted(ascending, rows, right=True) - starts
        most = int(counts.sum(1).max()) if counts.numel() else 0
        for part in parts_of(len(self), 8 * len(at) + 64 * most, budget):
            values = raised(self._values[part])
            many = counts[part].flatten()
            lookup = torch.repeat_interleave(many)
            before = many.cumsum(0) - many
            which = torch.arange(len(lookup), device=lookup.device) - before[lookup]
            which += starts[part].flatten()[lookup]
            which = at.order[which]
            found = values.reshape(-1)[lookup * values.shape[2] + at.columns[which]]
            sample = torch.div(lookup, self._rows.shape[1], rounding_mode="floor")
            out = torch.zeros(len(values) * len(at), dtype=found.dtype, device=found.device)
            out.index_add_(0, sample * len(at) + which, found)
            yield part, _ALL, out.view(len(values), len(at))

    def form(self, part: slice) -> Tensor:
        """Form the gradients of some samples in full."""
        rows, values = self._rows[part], raised(self._values[part])
        values = values.masked_fill((rows < 0).unsqueeze(-1), 0)
        out = values.new_zeros(len(rows), self._height, values.shape[2])
        return out.scatter_add_(1, rows.clamp_min(0).unsqueeze(-1).expand_as(values), values)


class FactoredGradient:
    """Per-sample gradients of one parameter: a sum of factors.

    Args:
        factors: the contributions; none where the parameter had no part in the output.
        samples: number of samples, ``B``.
        like: the parameter, for shape, dtype and device.
        budget: bytes that taking coordinates may use at a time.
    """

    def __init__(
        self, factors: Sequence[Factor], samples: int, like: Tensor, budget: int = DEFAULT_BUDGET
    ) -> None:
        self.factors = list(factors)
        self.shape = torch.Size((samples, *like.shape))
        self.dtype, self.device = like.dtype, like.device
        self._budget = budget

    def __len__(self) -> int:
        return self.shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(factor.nbytes for factor in self.factors)

    def coordinates(self, flat: Tensor) -> Coordinates:
        """Return coordinates of this parameter, ``(c,)``, to be taken."""
        return Coordinates(flat, *as_matrix(self.shape[1:]))

    def take(self, at: Coordinates) -> Iterator[Taken]:
        """Compute coordinates of all samples, piece by piece; what is yielded adds up.

        Args:
            at: the coordinates.

        Yields:
            Samples, coordinates, and values ``(b, c)`` to add there, float32 or float64.
        """
        if len(at) and len(self):
            for factor in self.factors:
                yield from factor.take(at, self._budget)

    def single(self) -> tuple[Tensor, Tensor | None] | None:
        """Return the two vectors of each sample whose outer product this is, as `Factor.single`."""
        return self.factors[0].single() if len(self.factors) == 1 else None

    def held(self, kept: Tensor | None = None) -> FactoredGradient:
        """Return what to hold where coordinates are not taken at once, as `Factor.held`."""
        found = copy.copy(self)
        found.factors = [factor.held(kept) for factor in self.factors]
        return found

    def form(self, part: slice = slice(None)) -> Tensor:
        """Form the gradients of some samples, ``(b, *shape)``, of the parameter's dtype."""
        samples = len(range(len(self))[part])
        if not self.factors or not samples:
            return torch.zeros(samples, *self.shape[1:], dtype=self.dtype, device=self.device)
        first, *others = (factor.form(part).flatten(1) for factor in self.factors)
        total = sum(others, first)
        return total.to(self.dtype).reshape(samples, *self.shape[1:])

    def pieces(self) -> Iterator[Tensor]:
        """Form the gradients of all samples, a few at a time within the budget."""
        step = max(1, self._budget // max(1, 4 * self.shape[1:].numel()))
        for begin in range(0, len(self), step):
            yield self.form(slice(begin, begin + step))


class FactoredGradients(dict[str, Tensor]):
    """Per-sample gradients of all parameters, as factors.

    Reads like the dict from parameter name to per-sample gradient ``(B, *shape)`` that it stands
    for (and is one to ``isinstance``, by which TRAK's projectors tell); what is read that way is
    formed, and not kept. `DropoutProjector` reads `factored` instead.

    Args:
        factored: the gradients of each parameter, in ``named_parameters()`` order.
    """

    def __init__(self, factored: Mapping[str, FactoredGradient]) -> None:
        super().__init__()
        self.factored = dict(factored)

    def __getitem__(self, name: str) -> Tensor:
        return self.factored[name].form()

    def __iter__(self) -> Iterator[str]:
        return iter(self.factored)

    def __len__(self) -> int:
        return len(self.factored)

    def __contains__(self, name: object) -> bool:
        return name in self.factored

    def __bool__(self) -> bool:
        return bool(self.factored)

    def __repr__(self) -> str:
        samples = next((len(gradient) for gradient in self.factored.values()), 0)
        return (
            f"FactoredGradients({len(self)} parameters, {samples} samples, "
            f"{self.nbytes / 2**20:.1f} MiB)"
        )

    @property
    def nbytes(self) -> int:
        """Bytes held by all factors."""
        return sum(gradient.nbytes for gradient in self.factored.values())

    def keys(self) -> KeysView[str]:  # type: ignore[override]
        """Names of the parameters."""
        return KeysView(self)

    def values(self) -> ValuesView[Tensor]:  # type: ignore[override]
        """Gradients, formed one after another."""
        return ValuesView(self)

    def items(self) -> ItemsView[str, Tensor]:  # type: ignore[override]
        """Names and gradients, formed one after another."""
        return ItemsView(self)

    def get(self, name: str, default: Any = None) -> Any:
        """Form a parameter's gradients; the default where it is not among them."""
        return self[name] if name in self else default  # noqa: SIM401 (this is get)

    def copy(self) -> dict[str, Tensor]:
        """Form all gradients."""
        return dict(self.items())

    def _read_only(self, *_: Any, **__: Any) -> Any:
        raise TypeError("FactoredGradients is read-only; dict(gradients.items()) forms a copy")

    __setitem__ = __delitem__ = __ior__ = _read_only
    clear = pop = popitem = setdefault = update = _read_only
    __hash__ = None
    __eq__ = object.__eq__


def parts_of(samples: int, held: float, budget: int) -> list[slice]:
    """Cut samples into parts that stay within a budget, at ``held`` bytes for each."""
    step = max(1, int(budget // max(held, 1)))
    if step >= samples:
        return [_ALL]  # which costs nothing to cut out
    return [slice(i, min(i + step, samples)) for i in range(0, samples, step)]


def _lines(values: Tensor) -> Tensor:
    """Lay out ``(b, T, d)`` as ``(d * b, T)``, line by line, in each the samples one by one."""
    b, length, d = values.shape
    if values.is_contiguous():  # a single matrix is transposed many times faster than several
        return values.view(b * length, d).T.contiguous().view(d * b, length)
    return values.permute(2, 0, 1).reshape(d * b, length)


def columns_of(values: Tensor, which: Tensor | None) -> Tensor:
    """Some entries of the last dimension of ``(b, T, d)``."""
    if which is None:
        return values
    # Of a matrix, columns are read many times faster than of a tensor with three dimensions.
    taken = read_columns(values.flatten(0, 1), which)
    return taken.view(*values.shape[:2], taken.shape[1])


def read_columns(matrix: Tensor, which: Tensor) -> Tensor:
    """Some columns of a matrix, ``(n, d)`` to ``(n, c)``."""
    # Faster, but uses one thread only.
    if matrix.is_cpu and (len(matrix) * len(which) <= _SMALL or torch.get_num_threads() == 1):
        return matrix.index_select(1, which)
    return matrix.gather(1, which.expand(len(matrix), -1))


def _at_least_float32(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def raised(values: Tensor) -> Tensor:
    """Sums run in float32 at least."""
    if values.dtype == torch.float32:
        return values
    return values.to(_at_least_float32(values.dtype))
