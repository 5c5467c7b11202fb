"""Sound scores from compressed gradients: damped, symmetric, in double precision.

With ``X`` the compressed training gradients, ``(n, k)``, TRAK's features are
``X (X^T X + lambda I)^-1``, its score of training sample i for target t is their product with
the target's compressed gradient times the out-to-loss gradient of i. The damping is relative to
the mean eigenvalue: ``lambda = damping * trace(X^T X) / k``, so that it means the same for any
scale of gradients. ``damping="auto"`` is a rule of ours, see `automatic_ridge`.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor
from trak.score_computers import AbstractScoreComputer

from trak_dropout.scaling import StorageScales

_BLOCK_ROWS = 4096
_FLATNESS = 6.0


class GramError(ValueError):
    """The Gram matrix of the compressed gradients cannot be used."""


class DampedScoreComputer(AbstractScoreComputer):
    """TRAK's score computer with relative damping and a symmetric solve.

    Sums and the solve run in float64 whatever the storage type. Where there are more columns
    than samples (``k > n``) the ``n x n`` system is solved instead; the result is the same.

    Args:
        dtype: TRAK's storage type; features are returned in float32 at least, and TRAK casts.
        device: where to compute.
        damping: relative damping, non-negative. ``"auto"`` follows the spectrum
            (`automatic_ridge`), unless TRAKer is given a ``lambda_reg``.
        logging_level: accepted for TRAK's interface.
        lambda_reg: TRAK's absolute regularisation, added to the diagonal of ``X^T X``.
        scales: tells what gradients and features at hand were multiplied by to be stored in
            float16, if they were, so that ``lambda_reg`` and means over checkpoints stay what they
            are without.

    Raises:
        ValueError: ``damping`` or ``lambda_reg`` is out of range, or both are given.
    """

    def __init__(
        self,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
        damping: float | str = "auto",
        logging_level: int = logging.INFO,
        lambda_reg: float = 0.0,
        scales: Callable[[], StorageScales | None] = lambda: None,
    ) -> None:
        super().__init__(dtype, device)
        self.damping = check_damping(damping)
        if not (math.isfinite(lambda_reg) and lambda_reg >= 0):
            raise ValueError(f"lambda_reg must be finite and not negative, got {lambda_reg!r}")
        if lambda_reg and damping != "auto":
            raise ValueError(
                f"damping={damping!r} (relative) and lambda_reg={lambda_reg!r} (absolute) are "
                "both given; leave one at its default"
            )
        self.lambda_reg = float(lambda_reg)
        self._scales = scales

    def get_xtx(self, grads: Tensor) -> Tensor:
        """Compute the Gram matrix.

        Args:
            grads: compressed gradients ``X``, ``(n, k)``.

        Returns:
            ``X^T X``, ``(k, k)``, or ``X X^T``, ``(n, n)``, where ``k > n``; float64.

        Raises:
            GramError: a row is NaN or infinite, or every entry is zero.
        """
        n, k = grads.shape
        if k > n:
            whole = self.checked(grads, 0)
            gram = whole @ whole.T
        else:
            gram = torch.zeros(k, k, dtype=torch.float64, device=self.device)
            for start, block in _blocks(grads):
                self.add_to_gram(gram, block, start)
        refuse_zero(gram)
        return gram

    def add_to_gram(self, gram: Tensor, block: Tensor, start: int) -> None:
        """Add ``B^T B`` of some rows to ``X^T X``.

        Args:
            gram: float64 ``(k, k)``, added to in place.
            block: rows ``(b, k)``.
            start: number of the first, for messages.

        Raises:
            GramError: a row is NaN or infinite.
        """
        part = self.checked(block, start)
        gram.addmm_(part.T, part)

    def checked(self, block: Tensor, start: int) -> Tensor:
        """Return rows in float64 on the device.

        Args:
            block: rows ``(b, k)``.
            start: number of the first, for messages.

        Raises:
            GramError: a row is NaN or infinite.
        """
        part = self._double(block)
        _refuse_non_finite(part, start)
        return part

    def get_x_xtx_inv(self, grads: Tensor, xtx: Tensor) -> Tensor:
        """Compute ``X (X^T X + lambda I)^-1``.

        Args:
            grads: compressed gradients ``X``, ``(n, k)``.
            xtx: what `get_xtx` returned for them; not changed.

        Returns:
            Features ``(n, k)``, float32, on ``device``. For float16 storage they are scaled to
            a mean magnitude of about one, as TRAK scales them: there the scale of scores is free.

        Raises:
            GramError: the Gram matrix is singular without damping.
        """
        n, k = grads.shape
        factor = self.decompose(xtx, n, k)
        if k > n:
            features = torch.cholesky_solve(self._double(grads), factor)
        else:
            features = torch.cat(
                [
                    torch.cholesky_solve(self._double(block).T, factor).T
                    for block in torch.split(grads, _BLOCK_ROWS)
                ]
            )
        if self.dtype == torch.float16:
            by = 2.0 ** math.floor(math.log2(float(features.abs().mean())))
            features /= by
            if (scales := self._scales()) is not None:
                scales.divided(by)
        result = features.to(torch.float32)
        if not bool(torch.isfinite(result).all()):
            raise GramError(
                "features leave the range of float32: the compressed gradients are too small "
                f"(mean square {float(xtx.trace()) / grads.numel():.1e}); scale the loss up"
            )
        return result

    def get_scores(self, features: Tensor, target_grads: Tensor, accumulator: Tensor) -> None:
        """Add the scores of one checkpoint to an accumulator.

        Args:
            features: ``(n, k)``.
            target_grads: compressed gradients of the targets, ``(m, k)``.
            accumulator: ``(n, m)``, added to in place.

        Raises:
            GramError: a target's gradient is NaN or infinite.
        """
        targets = target_grads.to(self.device, torch.float32)
        refuse_targets(targets)
        if (scales := self._scales()) is not None:
            targets = targets * scales.weight()
        for start in range(0, len(features), _BLOCK_ROWS):
            block = features[start : start + _BLOCK_ROWS].to(self.device, torch.float32)
            accumulator[start : start + _BLOCK_ROWS] += (block @ targets.T).to(accumulator.device)

    def decompose(
        self,
        gram: Tensor,
        n: int,
        k: int,
        *,
        damping: float | str | None = None,
        scale: float | None = None,
    ) -> Tensor:
        """Compute the Cholesky factor of the damped Gram matrix.

        Args:
            gram: what `get_xtx` returned for ``(n, k)`` gradients; not changed.
            n: number of samples.
            k: number of columns.
            damping: relative damping in place of the computer's own.
            scale: the factor of the stored gradients, where ``scales`` cannot tell.

        Returns:
            float64, lower triangular.

        Raises:
            GramError: the Gram matrix is singular without damping.
        """
        ridge = self.ridge(gram, n, k, damping, scale)
        damped = gram.clone()
        damped.diagonal().add_(ridge)
        factor, info = torch.linalg.cholesky_ex(damped)
        rank_deficient = k > n and ridge == 0
        # A pivot at rounding level is noise: the inverse would be noise as well.
        pivots = factor.diagonal().square()
        floor = len(gram) * torch.finfo(torch.float64).eps * float(damped.diagonal().max())
        if int(info) or rank_deficient or bool((pivots <= floor).any()):
            raise self._singular(n, k, damping)
        return factor

    def solve(self, factor: Tensor, targets: Tensor, whole: Tensor | None = None) -> Tensor:
        """Solve for targets.

        Args:
            factor: what `decompose` returned.
            targets: compressed gradients ``T``, ``(m, k)``.
            whole: the training gradients ``X`` where ``k > n``, in float64 on the device.

        Returns:
            ``T (X^T X + lambda I)^-1``, ``(m, k)``, whose product with a training row is the score;
            or with ``whole`` the scores themselves, ``T (X^T X + lambda I)^-1 X^T``, ``(m, n)``.
            Both float64.

        Raises:
            GramError: a target is NaN or infinite, or a result leaves float32.
        """
        right = self._double(targets)
        refuse_targets(right)
        # In the dual form, X (X^T X + l)^-1 = (X X^T + l)^-1 X.
        return self.solve_for(factor, right.T if whole is None else whole @ right.T)

    def solve_for(self, factor: Tensor, right: Tensor) -> Tensor:
        """Solve for right sides, as `solve` does.

        Args:
            factor: what `decompose` returned.
            right: ``T^T``, ``(k, m)``, or where ``k > n`` ``X T^T``, ``(n, m)``; float64.

        Returns:
            As `solve`.

        Raises:
            GramError: a result leaves float32.
        """
        result = torch.cholesky_solve(right, factor).T
        if not bool(torch.isfinite(result.float()).all()):
            raise GramError(
                "scores leave the range of float32: the compressed gradients are too small "
                f"(largest pivot {float(factor.diagonal().max()):.1e}); scale the loss up"
            )
        return result

    def scores(
        self, grads: Tensor, gram: Tensor, targets: Tensor, damping: float | str | None = None
    ) -> Tensor:
        """Compute the scores of one checkpoint, in double precision.

        Args:
            grads: compressed training gradients ``X``, ``(n, k)``.
            gram: what `get_xtx` returned for them.
            targets: compressed gradients ``T``, ``(m, k)``.
            damping: relative damping in place of the computer's own.

        Returns:
            ``X (X^T X + lambda I)^-1 T^T``, float64 ``(n, m)``.

        Raises:
            GramError: a target is not finite, or the Gram matrix is singular without damping.
        """
        n, k = grads.shape
        factor = self.decompose(gram, n, k, damping=damping)
        if k > n:
            return self.solve(factor, targets, self._double(grads)).T
        solved = self.solve(factor, targets).T
        return torch.cat([self._double(block) @ solved for _, block in _blocks(grads)])

    @staticmethod
    def cancellation(gram: Tensor, solved: Tensor) -> Tensor:
        """Estimate by how much rounding errors of products with training rows are enlarged.

        With little damping most of ``d = (X^T X + lambda I)^-1 t`` may lie where no training row
        has anything, and must cancel in the products. Their size is ``sqrt(d^T G d / n)``, that of
        their rounding errors, in units of the precision, ``|d| sqrt(trace(G) / n) / sqrt(k)``.

        Args:
            gram: ``G = X^T X``, ``(k, k)``.
            solved: rows ``d``, ``(m, k)``.

        Returns:
            The ratio of the two, float64 ``(m,)``; 1 where no direction is special.
        """
        size = ((solved @ gram) * solved).sum(1).clamp_min(0)
        rounding = solved.square().sum(1) * gram.trace() / len(gram)
        return (rounding / size.clamp_min(torch.finfo(torch.float64).tiny)).sqrt()

    def leverages(
        self,
        gram: Tensor,
        n: int,
        k: int,
        dampings: Sequence[float | str | None] = (None,),
        scale: float | None = None,
    ) -> Callable[[Tensor], Tensor]:
        """Prepare for ``x^T (X^T X + lambda I)^-1 x`` of rows, where ``k <= n``.

        A single damping takes a Cholesky decomposition, several share the eigenvectors.

        Args:
            gram: what `get_xtx` returned.
            n: number of samples.
            k: number of columns.
            dampings: relative dampings; None for the computer's own.
            scale: as for `decompose`.

        Returns:
            A function of rows ``(b, k)`` that returns float64 ``(len(dampings), b)``.

        Raises:
            GramError: the Gram matrix is singular without damping.
        """
        if len(dampings) == 1:
            factor = self.decompose(gram, n, k, damping=dampings[0], scale=scale)
            return lambda rows: (
                torch.linalg.solve_triangular(factor, self._double(rows).T, upper=False)
                .square()
                .sum(0, keepdim=True)
            )
        weights, vectors = self._spectrum(gram, n, k, dampings, scale)
        return lambda rows: weights @ (self._double(rows) @ vectors).square().T

    def dual_leverages(
        self,
        gram: Tensor,
        n: int,
        k: int,
        dampings: Sequence[float | str | None] = (None,),
        scale: float | None = None,
    ) -> Tensor:
        """Compute ``x^T (X^T X + lambda I)^-1 x`` of all rows, where ``k > n``.

        Args:
            gram: what `get_xtx` returned, ``X X^T``.
            n: number of samples.
            k: number of columns.
            dampings: as for `leverages`.
            scale: as for `decompose`.

        Returns:
            float64 ``(len(dampings), n)``.

        Raises:
            GramError: the Gram matrix is singular without damping.
        """
        if len(dampings) == 1:  # they are [(X X^T + l)^-1 X X^T]_ii
            factor = self.decompose(gram, n, k, damping=dampings[0], scale=scale)
            return torch.cholesky_solve(gram, factor).diagonal().clone().unsqueeze(0)
        weights, vectors = self._spectrum(gram, n, k, dampings, scale)
        rows = gram @ vectors  # of X, in terms of its left singular vectors times values squared
        return weights @ (rows * vectors).T

    def _spectrum(
        self,
        gram: Tensor,
        n: int,
        k: int,
        dampings: Sequence[float | str | None],
        scale: float | None,
    ) -> tuple[Tensor, Tensor]:
        """``1 / (e + lambda)`` for each damping, and the eigenvectors."""
        values, vectors = torch.linalg.eigh(gram)
        floor = len(gram) * torch.finfo(torch.float64).eps * float(values[-1])
        weights = []
        for damping in dampings:
            ridge = self.ridge(gram, n, k, damping, scale)
            damped = values.clamp_min(0) + ridge
            if (k > n and ridge == 0) or bool((damped <= floor).any()):
                raise self._singular(n, k, damping)
            weights.append(1 / damped)
        return torch.stack(weights), vectors

    def ridge(
        self,
        gram: Tensor,
        n: int,
        k: int,
        damping: float | str | None = None,
        scale: float | None = None,
    ) -> float:
        """Compute what is added to the diagonal of the Gram matrix.

        Args:
            gram: what `get_xtx` returned.
            n: number of samples.
            k: number of columns.
            damping: relative damping in place of the computer's own.
            scale: as for `decompose`.
        """
        if damping is None and self.lambda_reg:
            scales = self._scales()
            own = 1.0 if scales is None else scales.factor()
            return self.lambda_reg * (own if scale is None else scale) ** 2
        damping = self.damping if damping is None else check_damping(damping)
        if damping == "auto":
            return automatic_ridge(gram, n, k)
        return float(damping) * float(gram.trace()) / k

    def _double(self, block: Tensor) -> Tensor:
        return block.to(self.device, torch.float64)

    def _singular(self, n: int, k: int, damping: float | str | None) -> GramError:
        used = self.damping if damping is None else damping
        return GramError(
            f"the Gram matrix of {n} samples and {k} columns is singular with "
            f"damping={used!r}, lambda_reg={self.lambda_reg!r}: some columns are zero "
            "for every sample or depend on others; use damping='auto' or a positive damping"
        )


def _blocks(grads: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Rows a few at a time, with the number of the first."""
    for start in range(0, len(grads), _BLOCK_ROWS):
        yield start, grads[start : start + _BLOCK_ROWS]


def _refuse_non_finite(block: Tensor, start: int) -> None:
    if not math.isfinite(float(block.sum())):
        bad = (start + torch.nonzero(~torch.isfinite(block).all(dim=1)).flatten()).tolist()
        if bad:
            raise GramError(f"compressed gradients of samples {bad[:10]} are NaN or infinite")


def refuse_targets(targets: Tensor) -> None:
    """Raise GramError where a target's compressed gradient, a row, is NaN or infinite."""
    if not bool(torch.isfinite(targets).all()):
        bad = torch.nonzero(~torch.isfinite(targets).all(dim=1)).flatten().tolist()
        raise GramError(f"compressed gradients of targets {bad[:10]} are NaN or infinite")


def refuse_zero(gram: Tensor) -> None:
    """Raise GramError where a Gram matrix is zero."""
    if float(gram.trace()) == 0:
        raise GramError(
            "every compressed gradient is zero; if the gradients are tiny, store them with "
            "use_half_precision=False, and check that the checkpoint is not fully converged"
        )


def automatic_ridge(gram: Tensor, n: int, k: int) -> float:
    """Compute the absolute damping that ``"auto"`` stands for, ``6 mean(e)^2 / rms(e)``.

    ``e`` are the ``n`` eigenvalues of ``X X^T``, whose mean is the mean squared norm of a
    compressed gradient. More columns do not change what ``X X^T`` approximates, so the rule, unlike
    one relative to ``trace(X^T X) / k``, does not depend on ``k``. Where few directions hold most
    of the gradients the mean is far below the root-mean-square, and the damping goes down with it.
    Found by a study of linear datamodeling scores (benchmarks/damping.py, docs/damping); needs no
    ground truth.

    Args:
        gram: ``X^T X`` or ``X X^T``.
        n: number of samples.
        k: number of columns.

    Returns:
        What to add to the diagonal.
    """
    return ridge_of_moments(float(gram.trace()) / n, float(gram.square().sum()), n, k)


def ridge_of_moments(mean: float, squares: float, n: int, k: int) -> float:
    """Compute `automatic_ridge` of the moments that it depends on.

    A random projection to ``k`` columns adds about ``trace^2 / k`` to the sum of squares, which
    makes the spectrum look steeper than it is; that is taken off.

    Args:
        mean: of the ``n`` eigenvalues.
        squares: the sum of their squares.
        n: number of samples.
        k: number of columns.

    Returns:
        What to add to the diagonal.
    """
    mean_square = max((squares - (n * mean) ** 2 / k) / n, mean**2)
    return _FLATNESS * mean**2 / math.sqrt(mean_square)


def check_damping(damping: float | str) -> float | str:
    """Return ``damping``, or raise ValueError unless it is ``"auto"`` or finite and >= 0."""
    if damping == "auto":
        return damping
    if isinstance(damping, str | bool) or not (math.isfinite(damping) and damping >= 0):
        raise ValueError(f"damping must be 'auto' or a number not below 0, got {damping!r}")
    return float(damping)
