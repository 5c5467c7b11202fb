"""How large gradients are, parameter by parameter: the statistics behind weighted dropout.

Of a weight matrix only the mean squares of its rows and of its columns are kept, never one number
per entry; the root-mean-square of an entry is modeled as their product. Memory is of the order of
inputs plus outputs.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from trak_dropout.sampling import Floats, Separable

# An entry that was zero in every calibration sample may not be later: no probability may be zero,
# or the expectation would not be exact. Mean squares are raised by this share of their mean.
_FLOOR = 1e-3


def as_matrix(shape: Sequence[int]) -> tuple[int, int]:
    """Return the rows and columns as which a parameter is seen: outputs by flattened inputs.

    Args:
        shape: the parameter's shape.

    Returns:
        Rows and columns; a vector or scalar is a single column.
    """
    return (shape[0] if shape else 1), math.prod(shape[1:])


@dataclass(frozen=True)
class GradientStatistics:
    """Mean squares of per-sample gradients.

    Args:
        rows: for each parameter the mean square of each row's sum of squares, float64.
        columns: likewise for its columns.
        samples: number of samples they were taken from.
    """

    rows: tuple[Floats, ...]
    columns: tuple[Floats, ...]
    samples: int

    def weights(self) -> list[Separable]:
        """Root-mean-squares of all entries, as products of rows and columns, all positive."""
        total = sum(float(r.sum()) for r in self.rows)
        entries = sum(len(r) * len(c) for r, c in zip(self.rows, self.columns, strict=True))
        overall = total / entries
        weights = []
        for rows, columns in zip(self.rows, self.columns, strict=True):
            # In mean squares per entry, each axis with mean one beside the parameter's own level.
            own = float(rows.mean()) / len(columns) if len(rows) and len(columns) else 0.0
            level = max(own, _FLOOR * overall)
            weights.append(Separable(np.sqrt(level * _relative(rows)), np.sqrt(_relative(columns))))
        return weights

    @cached_property
    def digest(self) -> str:
        """A short hash of the values, by which stores tell statistics apart."""
        content = b"".join(a.astype("<f8").tobytes() for a in (*self.rows, *self.columns))
        return hashlib.sha256(content).hexdigest()[:16]

    def to_tensors(self) -> dict[str, Tensor]:
        """Return the statistics as named tensors."""
        return {
            "samples": torch.tensor(self.samples),
            **{f"rows.{i}": torch.from_numpy(a) for i, a in enumerate(self.rows)},
            **{f"columns.{i}": torch.from_numpy(a) for i, a in enumerate(self.columns)},
        }

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> GradientStatistics:
        """Return the statistics that `to_tensors` gave."""
        count = sum(name.startswith("rows.") for name in tensors)
        rows, columns = (
            tuple(tensors[f"{axis}.{i}"].numpy() for i in range(count))
            for axis in ("rows", "columns")
        )
        return cls(rows, columns, int(tensors["samples"]))

    @classmethod
    def of(cls, batches: Iterable[Sequence[Tensor | Iterable[Tensor]]]) -> GradientStatistics:
        """Take the statistics of gradients.

        Args:
            batches: batches of per-sample gradients, each a sequence with a tensor ``(B, *shape)``
                for every parameter, or several of them with some samples each.

        Returns:
            The statistics.

        Raises:
            ValueError: there is no sample, or every gradient is zero, or one is not finite.
        """
        rows: list[Tensor] = []
        columns: list[Tensor] = []
        samples = 0
        for blocks in batches:
            seen = 0
            for i, block in enumerate(blocks):
                for j, piece in enumerate([block] if isinstance(block, Tensor) else block):
                    height, width = as_matrix(piece.shape[1:])
                    squares = piece.detach().reshape(len(piece), height, width).double().square()
                    across, down = squares.sum((0, 2)).cpu(), squares.sum((0, 1)).cpu()
                    if samples == 0 and i == len(rows) and j == 0:
                        rows.append(across)
                        columns.append(down)
                    else:
                        rows[i] += across
                        columns[i] += down
                    seen += len(piece) if i == 0 else 0
            samples += seen
        totals = [float(r.sum()) for r in rows]
        if samples == 0 or not all(map(math.isfinite, totals)) or sum(totals) == 0:
            raise ValueError(
                "gradients: there are no samples to calibrate with"
                if samples == 0
                else "gradients: all of those to calibrate with are zero, or one is NaN or infinite"
            )
        return cls(
            tuple((r / samples).numpy() for r in rows),
            tuple((c / samples).numpy() for c in columns),
            samples,
        )


def _relative(values: Floats) -> Floats:
    """Values over their mean, none under the floor; ones where all are zero."""
    mean = values.mean() if len(values) else 0.0
    return np.maximum(values / mean, _FLOOR) if mean > 0 else np.ones_like(values)
