"""Powers of two that keep compressed gradients within the range of float16 storage.

float16 holds nothing above 65 504, and turns what is below 6e-8 into zero. Gradients of a converged
model, or of a loss summed over many tokens, leave that range easily. So where they are stored in
float16, the gradients of each checkpoint are multiplied by a power of two, which loses nothing and
which the store's manifest keeps. Scores do not depend on it: features go down as targets go up.
TRAK's features are divided by another number then, to fit as well. It is kept, too, because
checkpoints must not weigh more or less in a mean of scores for it.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

_LOG = logging.getLogger(__name__)
_LARGEST = torch.finfo(torch.float16).max
_VANISHING = 2.0**-25  # rounds to zero; half of the smallest number of float16
# Gradients whose largest entry lies between these are stored as they are.
_USUAL = (2.0**-4, 2.0**10)
# Where the largest entry is put otherwise: later rows, and targets, may be larger by four thousand,
# and rows smaller by two hundred million are still there.
_TARGET_EXPONENT = 4
_STEEPEST = 120  # a factor that float32 holds


class StorageScales:
    """For each checkpoint the factor with which its compressed gradients are stored.

    Args:
        divisor: TRAKer divides projected gradients by this before it stores them.
        factors: factors already chosen, by model_id.
        choose: called with a model_id, the factor and the one before it (None for the first) when
            a factor is chosen, before anything multiplied by it is returned. It may raise
            ValueError where it is too late for another. When None, values are just multiplied by
            the factors given, to be compared with what is stored.
        divisors: what the features of checkpoints were divided by, by model_id.
        divided: called with a model_id and such a number to keep it.

    Attributes:
        factors: the factor of each checkpoint that has one.
        current: the checkpoint whose files are open.
    """

    def __init__(
        self,
        divisor: float,
        factors: Mapping[int, float] | None = None,
        choose: Callable[[int, float, float | None], None] | None = None,
        divisors: Mapping[int, float] | None = None,
        divided: Callable[[int, float], None] | None = None,
    ) -> None:
        self.factors = dict(factors or {})
        self.current: int | None = None
        self._divisor = divisor
        self._choose = choose
        self._divisors = dict(divisors or {})
        self._divided = divided

    def factor(self) -> float:
        """Return the factor of the current checkpoint."""
        return 1.0 if self.current is None else self.factors.get(self.current, 1.0)

    def divided(self, by: float) -> None:
        """Note that the features of the current checkpoint are stored divided by a number."""
        if self.current is not None:
            self._divisors[self.current] = by
            if self._divided is not None:
                self._divided(self.current, by)

    def weight(self) -> float:
        """Return by what scores from stored features must be multiplied.

        Relative to the first checkpoint, as features of float16 have no scale of their own.
        """
        if self.current not in self._divisors:
            return 1.0
        return self._divisors[self.current] / self._divisors[min(self._divisors)]

    def apply(self, model_id: int, values: Tensor) -> Tensor:
        """Multiply projected gradients by the checkpoint's factor, in place.

        The first batch with a gradient that is not zero chooses the factor. A batch that would
        overflow with it chooses a smaller one.

        Args:
            model_id: the checkpoint.
            values: projected gradients, ``(B, k)``, finite, before TRAKer's division.

        Returns:
            ``values``. Rows so small beside the others that float16 holds nothing of them are zero,
            which is logged as a warning.

        Raises:
            ValueError: another factor is needed, but cannot be chosen any more.
        """
        if self._choose is None or values.numel() == 0:
            return values.mul_(self.factors.get(model_id, 1.0))
        rows = values.abs().amax(dim=1).double() / self._divisor
        largest = float(rows.max())
        before = self.factors.get(model_id)
        if largest == 0 or not math.isfinite(largest):
            return values
        if before is None or largest * before > _LARGEST:
            exponent = _TARGET_EXPONENT - math.floor(math.log2(largest))
            usual = before is None and _USUAL[0] <= largest <= _USUAL[1]
            factor = 1.0 if usual else 2.0 ** max(-_STEEPEST, min(_STEEPEST, exponent))
            self._choose(model_id, factor, before)
            self.factors[model_id] = before = factor
        values *= before
        vanished = torch.nonzero((rows > 0) & (rows * before <= _VANISHING)).flatten()
        if len(vanished):
            values[vanished.to(values.device)] = 0
            _LOG.warning(
                "samples %s of a batch (model_id=%d) have gradients so small beside others that "
                "float16 stores zeros; use_half_precision=False keeps them",
                vanished[:10].tolist(),
                model_id,
            )
        return values
