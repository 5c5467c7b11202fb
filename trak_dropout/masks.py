"""Which gradient coordinates are kept, with which weight, and which output column each one feeds.

Everything here is a pure function of its arguments and knows nothing of TRAK or models. A mask
stands for a sparse random matrix ``P`` of shape ``(grad_dim, proj_dim)``, whose non-zero entries
are ``P[coordinates[t], columns[t]] = weights[t]``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from trak_dropout._checks import check_integer
from trak_dropout.sampling import Floats, Integers, Stream, UnequalSample, allot, sample_block
from trak_dropout.statistics import GradientStatistics, as_matrix

SCHEMES = ("dropout", "unit_dropout", "weighted_dropout")
DEFAULT_FOLD = 16


@dataclass(frozen=True)
class Layout:
    """Names and shapes of the parameters whose gradients make up a coordinate vector.

    Coordinates count the parameters in this order, each flattened in C order, as TRAK's
    ``vectorize`` does.

    Args:
        names: parameter names, in ``named_parameters()`` order.
        shapes: the shape of each parameter.
    """

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]

    @classmethod
    def flat(cls, grad_dim: int) -> Layout:
        """Return the layout of gradients of which only the length is known: a single vector."""
        return cls(("grads",), ((grad_dim,),))

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """Number of coordinates of each parameter."""
        return tuple(math.prod(shape) for shape in self.shapes)

    @property
    def grad_dim(self) -> int:
        """Number of coordinates in all."""
        return sum(self.sizes)


@dataclass(frozen=True)
class Mask:
    """A sparse projection: the kept coordinates, the column each one feeds, and its weight.

    Args:
        coordinates: kept coordinates, ascending, one that feeds several columns as often; int64,
            shape ``(n,)``.
        columns: the column that each feeds; int64, shape ``(n,)``.
        weights: its factor there (sign times scale); float64, shape ``(n,)``.
        proj_dim: number of output columns.
    """

    coordinates: Integers
    columns: Integers
    weights: Floats
    proj_dim: int

    @cached_property
    def folded(self) -> bool:
        """Whether several coordinates share a column (or stand out of order)."""
        n = len(self.columns)
        return n != self.proj_dim or not np.array_equal(self.columns, np.arange(n))


def draw_mask(
    scheme: str,
    layout: Layout,
    proj_dim: int,
    seed: int,
    model_id: int,
    fold: int = DEFAULT_FOLD,
    statistics: GradientStatistics | None = None,
) -> Mask:
    """Draw the mask that belongs to the arguments; the same arguments always give the same mask.

    ``fold * proj_dim`` distinct coordinates are drawn by the scheme and dealt out to the columns,
    ``fold`` to each, with random signs: in random order, or by weighted dropout, which knows their
    sizes, so that large ones share a column with small ones (`_deal_by_size`). Where there are
    fewer, all are kept, and each feeds several columns, as many as another or one more. ``fold=1``
    is the pure coordinate dropout of arXiv 2509.15651: column j is the j-th kept coordinate,
    unsigned.

    A coordinate that was drawn with probability ``pi`` and feeds ``c`` columns has the weight
    ``sign * sqrt(proj_dim / (pi c))`` in each. That gives ``E<Pg, Ph> = proj_dim <g, h>`` exactly:
    the coordinate's own products add up to ``proj_dim / pi``, and the cross products inside a
    column have independent signs, so their mean is zero.

    Args:
        scheme: one of `SCHEMES`.
        layout: the parameters. ``"dropout"`` depends on their total size alone.
        proj_dim: number of output columns, ``k``.
        seed: seed of the projector.
        model_id: the checkpoint; another one gives an independent mask.
        fold: coordinates summed into each column; the number of all of them at most, more means
            all.
        statistics: mean squares of gradients, for ``"weighted_dropout"``.

    Returns:
        The mask.

    Raises:
        TypeError: an argument that counts something is no integer.
        ValueError: an argument is out of range, the scheme is unknown, or statistics are missing.
    """
    check_scheme(scheme)
    check_dimensions(layout.grad_dim, proj_dim, fold)
    seed, model_id = check_integer("seed", seed), check_integer("model_id", model_id)
    proj_dim, fold, grad_dim = int(proj_dim), int(fold), layout.grad_dim
    stream = Stream("mask 1", scheme, grad_dim, proj_dim, fold, seed, model_id)
    n = fold * proj_dim
    if n >= grad_dim:
        size = min(fold, grad_dim)
        kept = stream.deal(proj_dim, size, grad_dim)
        columns = np.arange(len(kept)) // size
        squares = proj_dim / np.bincount(kept)[kept]
    else:
        kept, inclusion, sizes = _draw(stream, scheme, layout, n, statistics)
        if fold == 1:
            columns = np.arange(n)
        elif sizes is None:
            columns = stream.permutation(n) // fold
        else:
            columns = stream.permutation(proj_dim)[_deal_by_size(sizes, proj_dim)]
        squares = proj_dim / inclusion
    order = np.argsort(kept, kind="stable")
    kept, weights = kept[order], np.sqrt(squares[order])
    if fold == 1:
        return Mask(kept, np.arange(n), weights, proj_dim)
    return Mask(kept, columns[order], stream.signs(len(kept)) * weights, proj_dim)


def _draw(
    stream: Stream, scheme: str, layout: Layout, n: int, statistics: GradientStatistics | None
) -> tuple[Integers, Floats, Floats | None]:
    """Draw ``n`` distinct coordinates; return them, their probabilities, and sizes if known."""
    if scheme == "dropout":
        return stream.distinct(n, layout.grad_dim), np.full(n, n / layout.grad_dim), None
    if scheme == "unit_dropout":
        return *_draw_units(stream, layout, n), None
    if statistics is None:
        raise ValueError(
            "statistics: weighted_dropout draws by the size of gradients and has seen none; "
            "call calibrate, or open the store that holds them"
        )
    check_statistics(statistics, layout)
    return UnequalSample(statistics.weights(), n).draw(stream)


def _deal_by_size(sizes: Floats, groups: int) -> Integers:
    """Deal out entries in rounds, largest first, there and back again.

    The noise of a column is the products of its entries' squares. It is least where all columns
    hold as much, and where a large entry shares its column with small ones only. Which column an
    entry goes to does not bias anything, because signs are drawn independently of it.

    Args:
        sizes: of the entries, a multiple of ``groups`` of them.
        groups: number of columns.

    Returns:
        The column of each entry.
    """
    rounds, places = np.divmod(np.arange(len(sizes)), groups)
    columns = np.empty(len(sizes), dtype=np.int64)
    columns[np.argsort(-sizes, kind="stable")] = np.where(rounds % 2, groups - 1 - places, places)
    return columns


def _draw_units(stream: Stream, layout: Layout, n: int) -> tuple[Integers, Floats]:
    """Draw a block of each weight matrix, and of all vectors together single coordinates."""
    sizes, starts = np.array(layout.sizes), np.cumsum([0, *layout.sizes])
    flat = np.array([len(shape) < 2 for shape in layout.shapes])
    matrices, vectors = np.flatnonzero(~flat & (sizes > 0)), np.flatnonzero(flat)
    groups = [int(sizes[i]) for i in matrices]
    pool = int(sizes[vectors].sum())
    counts, inclusion = allot(stream, n, [*groups, pool] if pool else groups)
    parts = [
        starts[i] + sample_block(stream, count, *as_matrix(layout.shapes[i]))
        for i, count in zip(matrices, counts, strict=False)
    ]
    if pool:
        pooled, ends = stream.distinct(counts[-1], pool), np.cumsum(sizes[vectors])
        which = np.searchsorted(ends, pooled, side="right")
        parts.append(starts[vectors][which] + pooled - (ends - sizes[vectors])[which])
    return np.concatenate(parts), np.repeat(inclusion, counts)


def check_statistics(statistics: GradientStatistics, layout: Layout) -> None:
    """Raise ValueError unless the statistics are those of parameters of these shapes."""
    found = [(len(r), len(c)) for r, c in zip(statistics.rows, statistics.columns, strict=True)]
    expected = [as_matrix(shape) for shape in layout.shapes]
    if found != expected:
        raise ValueError(
            f"statistics are of parameters of {len(found)} matrices {found[:3]}..., the layout has "
            f"{len(expected)} {expected[:3]}...; calibrate with gradients of this model"
        )


def check_scheme(scheme: object) -> None:
    """Raise ValueError unless ``scheme`` is one of `SCHEMES`."""
    if scheme not in SCHEMES:
        raise ValueError(f"proj_type={scheme!r} is not known; use one of {', '.join(SCHEMES)}")


def check_dimensions(grad_dim: object, proj_dim: object, fold: object) -> None:
    """Raise TypeError or ValueError unless ``1 <= proj_dim <= grad_dim`` and ``fold >= 1``."""
    check_integer("grad_dim", grad_dim, minimum=1)
    check_integer("proj_dim", proj_dim, minimum=1)
    check_integer("fold", fold, minimum=1)
    if proj_dim > grad_dim:  # type: ignore[operator]  # both are integers by now
        raise ValueError(
            f"proj_dim={proj_dim} is above grad_dim={grad_dim}, the number of gradient "
            "coordinates: a mask keeps coordinates and cannot make new ones; lower proj_dim"
        )


def spans(mask: Mask, sizes: Sequence[int]) -> list[tuple[int, int, int]]:
    """Where the kept coordinates of each parameter stand in a mask.

    Args:
        mask: a mask over ``sum(sizes)`` coordinates.
        sizes: number of coordinates of each parameter, in order.

    Returns:
        For each parameter ``(offset, start, stop)``: its kept coordinates are
        ``mask.coordinates[start:stop] - offset``.
    """
    ends = np.cumsum(np.asarray([0, *sizes], dtype=np.int64))
    cuts = np.searchsorted(mask.coordinates, ends)
    return [(int(ends[i]), int(cuts[i]), int(cuts[i + 1])) for i in range(len(sizes))]
