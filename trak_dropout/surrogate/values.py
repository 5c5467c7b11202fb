"""Influence values to learn from: those of a random share of rows and columns."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor
from trak import TRAKer

from trak_dropout._checks import check_integer
from trak_dropout.ranking import Targets
from trak_dropout.scoring import DampedScoreComputer, GramError, refuse_zero, ridge_of_moments
from trak_dropout.store import FeatureFiles
from trak_dropout.streaming import files_and_computer

_BLOCK_ROWS = 4096


def sample_axes(
    n_source: int, n_target: int, share: float = 0.05, seed: int = 0
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Draw a random share of training samples and of targets.

    Args:
        n_source: number of training samples (rows).
        n_target: number of targets (columns).
        share: share of each axis, in (0, 1].
        seed: the same seed gives the same sample.

    Returns:
        Row and column numbers, int64, ascending, without repetition; two of each at least, where
        there are two.

    Raises:
        TypeError: a number is no integer.
        ValueError: a number is below 1, or ``share`` is out of range.
    """
    if isinstance(share, bool) or not 0 < share <= 1:
        raise ValueError(f"share must be in (0, 1], got {share!r}")
    random = np.random.default_rng(check_integer("seed", seed, minimum=0))
    axes = []
    for name, size in (("n_source", n_source), ("n_target", n_target)):
        size = check_integer(name, size, minimum=1)
        count = min(size, max(2, round(share * size)))
        axes.append(np.sort(random.choice(size, count, replace=False)).astype(np.int64))
    return axes[0], axes[1]


def sampled_influences(
    store_or_traker: FeatureFiles | TRAKer,
    exp_name: str,
    rows: ArrayLike | None = None,
    *,
    gram: Literal["all", "rows"] = "all",
    train_set_size: int | None = None,
    model_ids: Iterable[int] | None = None,
    damping: float | str | None = None,
) -> NDArray[np.float32]:
    """Compute the scores of some training samples for the targets of an experiment.

    The same scores as ``TRAKer.finalize_scores`` in float32 for these rows, if the Gram matrix is
    made of all rows. Made of the sampled rows alone, ``X^T X`` is estimated as ``n / len(rows)``
    times theirs (and ``"auto"`` damping from an unbiased estimate of its spectrum), so that the
    gradients of all other training samples are never read, and need not have been computed.

    Args:
        store_or_traker: a store or a TRAKer; the targets are those of ``add_targets`` or
            ``TRAKer.score``. Give these only the targets that are in the sample.
        exp_name: the targets' experiment name.
        rows: which training samples, ``(r,)``; all when None.
        gram: ``"all"`` makes the Gram matrix of all rows of the store, ``"rows"`` of ``rows``.
        train_set_size: number of training samples that the rows of the Gram matrix stand for, where
            the store itself holds a sample of them; the rows of the store when None.
        model_ids: the checkpoints to average; all complete ones when None.
        damping: relative damping, as for `self_influence`.

    Returns:
        float32 ``(r, n_targets)``; only this and the gradients of ``rows`` are held in memory.

    Raises:
        IncompleteStoreError: a checkpoint or the targets are missing or incomplete.
        GramError: gradients are NaN or infinite, all zero, or singular without damping.
        ValueError: ``rows`` are empty or out of range, ``gram`` is neither, or ``train_set_size``
            is smaller than the Gram matrix's rows.
    """
    files, computer = files_and_computer(store_or_traker, damping)
    if gram not in ("all", "rows"):
        raise ValueError(f"gram must be 'all' or 'rows', got {gram!r}")
    chosen = files.choose(model_ids)
    n = len(files.grads(chosen[0]))
    picked = _rows(rows, n)
    size = n if train_set_size is None else check_integer("train_set_size", train_set_size)
    base = n if gram == "all" else len(picked)
    if size < base:
        raise ValueError(f"train_set_size={size} is below the Gram matrix's rows, {base}")
    total: Tensor | None = None
    weight = np.zeros((len(picked), 1))
    for m in chosen:
        targets = Targets(files, m, exp_name).whole()
        some = torch.from_numpy(np.array(files.grads(m)[picked]))
        file, k = files.file(m, "grads"), some.shape[1]
        dual = k > base
        if dual or gram == "rows":
            whole = some if gram == "rows" else file.rows()
            gram_matrix = computer.get_xtx(whole)
        else:
            gram_matrix = torch.zeros(k, k, dtype=torch.float64, device=computer.device)
            for start, block in file.blocks(_BLOCK_ROWS, 0, n):
                computer.add_to_gram(gram_matrix, block, start)
            refuse_zero(gram_matrix)
        damped, scale = computer, files.scale(m)
        if size > base and computer.damping == "auto" and not computer.lambda_reg:
            damped = _extrapolated(
                computer, gram_matrix, some if gram == "rows" else file.rows(), size
            )
            scale = 1.0  # that damping was found on the gradients as they are stored
        factor = damped.decompose(gram_matrix, base, k, scale=scale)
        if dual:
            inner = whole.to(computer.device, torch.float64)
            scores = damped.solve(factor, targets, inner).T
            scores = scores if gram == "rows" else scores[torch.from_numpy(picked)]
        else:
            scores = some.to(computer.device, torch.float64) @ damped.solve(factor, targets).T
        scores = scores * (base / size)
        total = scores if total is None else total + scores
        weight += files.out_to_loss(m)[picked].astype(np.float64)
    assert total is not None
    result = (total.cpu().numpy() * (weight / len(chosen) ** 2)).astype(np.float32)
    if not np.isfinite(result).all():
        raise GramError("scores leave the range of float32, or out-to-loss gradients do")
    return result


def _extrapolated(
    computer: DampedScoreComputer, gram: Tensor, grads: Tensor, size: int
) -> DampedScoreComputer:
    """The computer with the damping that ``"auto"`` would find for ``size`` rows like these.

    A relative number needs nothing: it scales with the Gram matrix. The rule of `automatic_ridge`
    takes ``|X X^T|_F^2``, whose diagonal grows with n and whose rest with its square.
    """
    norms, (count, k) = grads.double().square().sum(1), grads.shape
    if count < 2:
        raise ValueError("rows: 'auto' damping from a sample needs two rows at least, got 1")
    diagonal = float(norms.square().sum())
    apart = float(gram.square().sum()) - diagonal
    frobenius = size * (size - 1) * apart / (count * (count - 1)) + size * diagonal / count
    ridge = ridge_of_moments(float(norms.mean()), frobenius, size, k)
    return DampedScoreComputer(computer.dtype, computer.device, lambda_reg=ridge * count / size)


def _rows(rows: ArrayLike | None, n: int) -> NDArray[np.int64]:
    if rows is None:
        return np.arange(n, dtype=np.int64)
    picked = np.asarray(rows)
    if picked.ndim != 1 or len(picked) == 0 or picked.dtype.kind not in "iu":
        raise ValueError(
            f"rows must be training samples' numbers, (r,), got shape {picked.shape} of "
            f"{picked.dtype}"
        )
    if picked.min() < 0 or picked.max() >= n:
        raise ValueError(
            f"rows must lie from 0 to {n - 1}, got {int(picked.min())} to {int(picked.max())}"
        )
    return picked.astype(np.int64)
