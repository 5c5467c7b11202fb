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
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from trak import TRAKer
from trak.score_computers import AbstractScoreComputer

from trak_dropout.store import FeatureFiles, RowFile

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

    def get_xtx(self, grads: Tensor | RowFile) -> Tensor:
        """Compute the Gram matrix.

        Args:
            grads: compressed gradients ``X``, ``(n, k)``; a file is read a few rows at a time.

        Returns:
            ``X^T X``, ``(k, k)``, or ``X X^T``, ``(n, n)``, where ``k > n``; float64.

        Raises:
            GramError: a row is NaN or infinite, or every entry is zero.
        """
        n, k = grads.shape
        if k > n:
            whole = self._double(next(_blocks(grads, n))[1]) if n else torch.empty(0, k)
            _refuse_non_finite(whole, 0)
            gram = whole @ whole.T
        else:
            gram = torch.zeros(k, k, dtype=torch.float64, device=self.device)
            for start, block in _blocks(grads):
                part = self._double(block)
                _refuse_non_finite(part, start)
                gram.addmm_(part.T, part)
        if float(gram.trace()) == 0:
            raise GramError(
                "every compressed gradient is zero; if the gradients are tiny, store them with "
                "use_half_precision=False, and check that the checkpoint is not fully converged"
            )
        return gram

    def get_x_xtx_inv(self, grads: Tensor, xtx: Tensor) -> Tensor:
        """Compute ``X (X^T X + lambda I)^-1``.

        Args:
            grads: compressed gradients ``X``, ``(n, k)``.
            xtx: what `get_xtx` returned for them; not changed.

        Returns:
            Features ``(n, k)``, float32, on ``device``. For float16 storage they are scaled to
            a mean magnitude of one, as TRAK scales them: there the scale of scores is free.

        Raises:
            GramError: the Gram matrix is singular without damping.
        """
        n, k = grads.shape
        factor = self._factor(xtx, k, n)
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
            features /= features.abs().mean()
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
        targets = target_grads.to(self.device, torch.float32).T
        if not bool(torch.isfinite(targets).all()):
            bad = torch.nonzero(~torch.isfinite(targets).all(dim=0)).flatten().tolist()
            raise GramError(f"compressed gradients of targets {bad[:10]} are NaN or infinite")
        for start in range(0, len(features), _BLOCK_ROWS):
            block = features[start : start + _BLOCK_ROWS].to(self.device, torch.float32)
            accumulator[start : start + _BLOCK_ROWS] += (block @ targets).to(accumulator.device)

    def solver(self, gram: Tensor, grads: Tensor | RowFile) -> Callable[[Tensor], Tensor]:
        """Decompose once, to solve for targets a few at a time.

        Args:
            gram: what `get_xtx` returned for ``grads``.
            grads: compressed training gradients ``X``, ``(n, k)``.

        Returns:
            A function of compressed target gradients ``T``, ``(m, k)``. Where ``k <= n`` it returns
            ``T (X^T X + lambda I)^-1``, ``(m, k)``, whose product with a training row is the score;
            else the scores themselves, ``T (X^T X + lambda I)^-1 X^T``, ``(m, n)``. Both float32.
            It raises GramError where a target is NaN or infinite, or a result leaves float32.

        Raises:
            GramError: the Gram matrix is singular without damping.
        """
        n, k = grads.shape
        factor = self._factor(gram, k, n)
        whole = self._double(next(_blocks(grads, n))[1]) if k > n else None

        def solve(targets: Tensor) -> Tensor:
            right = self._double(targets).T
            if not bool(torch.isfinite(right).all()):
                bad = torch.nonzero(~torch.isfinite(right).all(dim=0)).flatten().tolist()
                raise GramError(f"compressed gradients of targets {bad[:10]} are NaN or infinite")
            # In the dual form, X (X^T X + l)^-1 = (X X^T + l)^-1 X.
            right = right if whole is None else whole @ right
            result = torch.cholesky_solve(right, factor).T.to(torch.float32)
            if not bool(torch.isfinite(result).all()):
                raise GramError(
                    "scores leave the range of float32: the compressed gradients are too small "
                    f"(trace of the Gram matrix {float(gram.trace()):.1e}); scale the loss up"
                )
            return result

        return solve

    def get_leverages(self, grads: Tensor | RowFile) -> Tensor:
        """Compute ``x_i^T (X^T X + lambda I)^-1 x_i`` for each row.

        Args:
            grads: compressed gradients ``X``, ``(n, k)``; a file is read a few rows at a time.

        Returns:
            float64 ``(n,)``.

        Raises:
            GramError: as for `get_xtx` and `get_x_xtx_inv`.
        """
        n, k = grads.shape
        gram = self.get_xtx(grads)
        factor = self._factor(gram, k, n)
        if k > n:  # x_i^T (X^T X + l)^-1 x_i = [(X X^T + l)^-1 X X^T]_ii
            return torch.cholesky_solve(gram, factor).diagonal().clone()
        return torch.cat(
            [
                torch.linalg.solve_triangular(factor, self._double(block).T, upper=False)
                .square()
                .sum(0)
                for _, block in _blocks(grads)
            ]
        )

    def _double(self, block: Tensor) -> Tensor:
        return block.to(self.device, torch.float64)

    def _factor(self, gram: Tensor, k: int, n: int) -> Tensor:
        """The Cholesky factor of the damped Gram matrix."""
        trace = float(gram.trace())
        if self.lambda_reg:
            ridge = self.lambda_reg
        else:
            ridge = (
                automatic_ridge(gram, n)
                if self.damping == "auto"
                else float(self.damping) * trace / k
            )
        damped = gram.clone()
        damped.diagonal().add_(ridge)
        factor, info = torch.linalg.cholesky_ex(damped)
        rank_deficient = k > n and ridge == 0
        # A pivot at rounding level is noise: the inverse would be noise as well.
        pivots = factor.diagonal().square()
        floor = len(gram) * torch.finfo(torch.float64).eps * float(damped.diagonal().max())
        if int(info) or rank_deficient or bool((pivots <= floor).any()):
            raise GramError(
                f"the Gram matrix of {n} samples and {k} columns is singular with "
                f"damping={self.damping!r}, lambda_reg={self.lambda_reg!r}: some columns are zero "
                "for every sample or depend on others; use damping='auto' or a positive damping"
            )
        return factor


def _blocks(grads: Tensor | RowFile, rows: int = _BLOCK_ROWS) -> Iterator[tuple[int, Tensor]]:
    """Rows a few at a time, with the number of the first."""
    for start in range(0, len(grads), rows):
        stop = start + rows
        yield start, grads[start:stop] if isinstance(grads, Tensor) else grads.rows(start, stop)


def _refuse_non_finite(block: Tensor, start: int) -> None:
    if not math.isfinite(float(block.sum())):
        bad = (start + torch.nonzero(~torch.isfinite(block).all(dim=1)).flatten()).tolist()
        if bad:
            raise GramError(f"compressed gradients of samples {bad[:10]} are NaN or infinite")


def automatic_ridge(gram: Tensor, n: int) -> float:
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

    Returns:
        What to add to the diagonal.
    """
    mean = float(gram.trace()) / n
    root_mean_square = float(torch.linalg.matrix_norm(gram)) / math.sqrt(n)
    return _FLATNESS * mean * (mean / root_mean_square)


def check_damping(damping: float | str) -> float | str:
    """Return ``damping``, or raise ValueError unless it is ``"auto"`` or finite and >= 0."""
    if damping == "auto":
        return damping
    if isinstance(damping, str | bool) or not (math.isfinite(damping) and damping >= 0):
        raise ValueError(f"damping must be 'auto' or a number not below 0, got {damping!r}")
    return float(damping)


def files_and_computer(
    store_or_traker: FeatureFiles | TRAKer, damping: float | str | None
) -> tuple[FeatureFiles, DampedScoreComputer]:
    """Return the files of a store or a TRAKer, and the score computer to use with them.

    Args:
        store_or_traker: a store, or a TRAKer.
        damping: relative damping; when None, that of the TRAKer's `DampedScoreComputer`, else
            ``"auto"``.

    Raises:
        TypeError: it is neither a store nor a TRAKer.
    """
    own = None
    if isinstance(store_or_traker, FeatureFiles):
        files = store_or_traker
    elif isinstance(store_or_traker, TRAKer):
        files, own = FeatureFiles(store_or_traker.save_dir), store_or_traker.score_computer
    else:
        raise TypeError(f"store_or_traker must be a store or a TRAKer, got {store_or_traker!r}")
    if damping is None and isinstance(own, DampedScoreComputer):
        return files, own
    return files, DampedScoreComputer(damping="auto" if damping is None else damping)


def self_influence(
    store_or_traker: FeatureFiles | TRAKer,
    model_ids: Iterable[int] | None = None,
    damping: float | str | None = None,
) -> NDArray[np.float64]:
    """Compute the influence of each training sample on itself.

    The diagonal of the score matrix whose targets are the training samples: the mean over
    checkpoints of ``x_i^T (X^T X + lambda I)^-1 x_i`` times the mean out-to-loss gradient, as
    TRAK averages. Large where the model had to bend for the sample: mislabeled and atypical
    samples come first.

    Args:
        store_or_traker: a store, or a TRAKer that has featurized its training set.
        model_ids: the checkpoints to average; all complete ones when None.
        damping: relative damping; when None, that of the TRAKer's `DampedScoreComputer`, else
            ``"auto"``.

    Returns:
        float64 ``(n_train,)``.

    Raises:
        IncompleteStoreError: a checkpoint is not completely featurized, or there is none.
        GramError: the Gram matrix is all zero, not finite, or singular without damping.
    """
    files, computer = files_and_computer(store_or_traker, damping)
    leverages: Any = 0.0
    out_to_loss: Any = 0.0
    chosen = files.choose(model_ids)
    for model_id in chosen:
        found = computer.get_leverages(files.file(model_id, "grads"))
        leverages = leverages + found.cpu().numpy()
        out_to_loss = out_to_loss + files.out_to_loss(model_id)[:, 0].astype(np.float64)
    return leverages / len(chosen) * (out_to_loss / len(chosen))
