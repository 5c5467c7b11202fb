"""The self-check: what is found of a few samples, and what plain autograd says of each alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from trak_dropout.gradients.factors import FactoredGradient
from trak_dropout.gradients.taps import FactorError

# Relative to the largest entry of the parameter's gradient, by the least precise type involved.
TOLERANCE = {torch.float64: 1e-7, torch.float32: 2e-3, torch.bfloat16: 0.15, torch.float16: 0.05}
_LOOKED_AT = 32
_SHORT, _BLOCK = 2**13, 2**9
# Outputs may differ by so many times the type's precision, but no further than this.
_ROUNDINGS, _FURTHEST = 1e3, 0.05


@dataclass(frozen=True)
class Entries:
    """Some entries of one sample's gradient of a parameter.

    Args:
        which: their numbers, int64 ``(c,)``.
        values: float64 ``(c,)``.
        largest: the largest magnitude in the whole gradient.
    """

    which: Tensor
    values: Tensor
    largest: float

    @classmethod
    def of(cls, flat: Tensor) -> Entries:
        """Choose those of a flattened gradient: its largest, and some from everywhere."""
        few = min(_LOOKED_AT, len(flat))
        spread = torch.arange(few, device=flat.device) * len(flat) // few
        largest, size = _largest(flat, few)
        which = torch.unique(torch.cat([largest, spread]))
        return cls(which, flat[which].double(), size)


@dataclass(frozen=True)
class Single:
    """A sample that was run by itself.

    Args:
        output: the task's output.
        gradients: of each parameter.
    """

    output: float
    gradients: Mapping[str, Entries]


Within = Callable[[int, dict[str, Tensor]], tuple[float, dict[str, Tensor]]]
"""Autograd's word on a sample in its batch: takes its place and numbers of coordinates of each
parameter, and returns its output and their values, float64."""


class Alone:
    """What plain autograd says of some samples, each by itself, and what is found of them.

    Args:
        samples: by their place in the batch.
        dtypes: of the parameters.

    Attributes:
        overall: the size of the largest entry of all their gradients.
    """

    def __init__(self, samples: Mapping[int, Single], dtypes: Mapping[str, torch.dtype]) -> None:
        self._samples, self._dtypes = samples, dtypes
        sizes = (g.largest for single in samples.values() for g in single.gradients.values())
        self.overall = max(filter(math.isfinite, sizes), default=0.0)
        self._found = {
            i: {name: torch.zeros_like(g.values) for name, g in single.gradients.items()}
            for i, single in samples.items()
        }

    def see(self, name: str, gradient: FactoredGradient) -> None:
        """Take note of a contribution to the batch's gradients of a parameter."""
        for i, single in self._samples.items():
            if name not in single.gradients:
                continue
            which = single.gradients[name].which
            for part, at, taken in gradient.take(gradient.coordinates(which)):
                samples = range(len(gradient))[part]
                if i in samples:
                    self._found[i][name][at] += taken[samples.index(i)]

    def agrees(self, lowest: torch.dtype, within: Within, before: str) -> bool:
        """Return whether all is as it should be and there was something to see.

        Where a sample's gradient is another than by itself, but its output is the same, and
        autograd has the same gradient for it in the batch, rounding has moved it over a kink, such
        as a unit that is zero or not: that is as it should be.

        Args:
            lowest: the least precise type that was involved.
            within: for samples of which that is to be seen.
            before: what an error means for earlier batches.

        Raises:
            FactorError: something differs.
        """
        checked = True
        for i, single in self._samples.items():
            gradients = single.gradients
            overall = max((g.largest for g in gradients.values()), default=0.0)
            if not all(math.isfinite(g.largest) for g in gradients.values()):
                checked = False
                continue
            checked &= overall > 0 or not self._dtypes  # zeros tell nothing
            expected = {name: g.values for name, g in gradients.items()}
            error = self._difference(i, expected, overall, lowest, before)
            if error is not None:
                try:
                    output, expected = within(i, {name: g.which for name, g in gradients.items()})
                except torch.OutOfMemoryError:
                    raise
                except Exception as failure:  # what differs is the more telling
                    raise error from failure
                if self._apart(output, single.output, lowest):
                    raise error
                if self._difference(i, expected, overall, lowest, before) is not None:
                    raise error
        return checked

    def _difference(
        self,
        i: int,
        expected: Mapping[str, Tensor],
        overall: float,
        lowest: torch.dtype,
        before: str,
    ) -> FactorError | None:
        """What differs of a sample."""
        for name, gradient in self._samples[i].gradients.items():
            tolerance = TOLERANCE.get(least_precise([self._dtypes[name], lowest]), 0.15)
            error = float((self._found[i][name] - expected[name]).abs().max())
            if not error <= tolerance * (gradient.largest + 1e-3 * overall):
                return FactorError(
                    f"the gradient of {name} (sample {i} of the batch) differs from autograd's "
                    f"by {error:.3g}, where its largest entry is {gradient.largest:.3g}. Its "
                    "layer is not what its rule takes it for, or the output of a sample "
                    "depends on others, or the model is random in its present mode (call "
                    f"model.eval()). FactoredGradientComputer(exact=[{name!r}]) forms this "
                    f"gradient without a rule; or leave {name} out of grad_wrt{before}"
                )
        return None

    def _apart(self, first: float, second: float, lowest: torch.dtype) -> bool:
        """Whether two outputs differ by more than rounding."""
        tolerance = rounding(least_precise([*self._dtypes.values(), lowest]))
        return not abs(first - second) <= tolerance * max(1.0, abs(second))


def rounding(dtype: torch.dtype) -> float:
    """How far outputs may differ by rounding, relative to them or to one."""
    return min(_FURTHEST, _ROUNDINGS * torch.finfo(dtype).eps)


def least_precise(dtypes: Iterable[torch.dtype]) -> torch.dtype:
    """The least precise of some types."""
    return max(dtypes, key=lambda dtype: torch.finfo(dtype).eps)


def _largest(flat: Tensor, few: int) -> tuple[Tensor, float]:
    """Where the entries of largest magnitude are, and the largest magnitude.

    They lie in the blocks whose largest entries are largest: to sort those is many times faster.
    """
    if len(flat) <= _SHORT:
        values, places = flat.abs().topk(few)
        return places, float(values[0])
    whole = len(flat) // _BLOCK * _BLOCK
    blocks = flat[:whole].view(-1, _BLOCK)
    # Of magnitudes this takes many times as long: they would have to be written first.
    sizes = torch.maximum(blocks.amax(1), blocks.amin(1).neg_())
    chosen = sizes.topk(min(few, len(sizes))).indices
    inside = torch.arange(_BLOCK, device=flat.device)
    rest = torch.arange(whole, len(flat), device=flat.device)
    places = torch.cat([(chosen.unsqueeze(1) * _BLOCK + inside).flatten(), rest])
    values, found = flat[places].abs().topk(few)
    return places[found], float(values[0])
