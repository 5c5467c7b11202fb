"""Scores along a training run, from the blocks that mode ``"training"`` collects.

In a step with learning rate ``lr``, plain gradient descent changes a target's output ``f`` by
``-lr * share * <grad loss_i, grad f>`` for each sample ``i`` of the batch, to first order. Summed
over the visits of a sample that is its trajectory score; without the share it is TracIn's
(arXiv 2002.08484), with every visit at the weights of that very step. The target's gradient is
taken once for each block, at the weights at its end.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from trak_dropout._checks import check_integer
from trak_dropout.largest import PIECE, Largest
from trak_dropout.ranking import Targets
from trak_dropout.rowfile import IncompleteStoreError, RowFile
from trak_dropout.store import Store
from trak_dropout.visits import IN_PLACE, REPEATS, VISITS, Visits

Weighting = Literal["learning_rate", "change"]
_BLOCK_ROWS = 8192


def block_visits(store: Store, model_id: int) -> Visits:
    """Return who took part in training when, in a block.

    Args:
        store: a store that mode ``"training"`` collected.
        model_id: the block.

    Returns:
        The record.

    Raises:
        IncompleteStoreError: there is none.
    """
    return Visits.load(store.save_dir / str(model_id) / VISITS)


def trajectory_scores(
    store: Store,
    exp_name: str,
    *,
    weighting: Weighting = "learning_rate",
    group: int | None = None,
    model_ids: Iterable[int] | None = None,
) -> NDArray[np.float32]:
    """Score every training sample for every target, along the training run.

    The sum over a sample's visits ``t`` of ``w_t <g_sample(t), g_target>``, with ``g_sample`` minus
    the gradient of the training loss at the weights of step ``t``, and ``g_target`` the gradient of
    the target's output at the end of the block that ``t`` lies in. Inner products are estimated
    without bias from the compressed gradients. Positive where training on the sample raised the
    target's output.

    Args:
        store: a store that mode ``"training"`` collected; targets have been added with
            ``AttributionStore.add_targets``.
        exp_name: the targets' experiment name.
        weighting: ``w_t`` is the step's ``"learning_rate"``, as in TracIn; or the learning rate
            times the sample's share of the step, which estimates the ``"change"`` of the target's
            output that plain gradient descent made because of the sample.
        group: the parameter group whose learning rate counts; needed only if they differ.
        model_ids: the blocks to sum over; all finished ones when None.

    Returns:
        float32 ``(n_train, n_targets)``; zero for samples that never took part in training.

    Raises:
        ValueError: ``weighting`` is unknown, or groups differ in their learning rates.
        IncompleteStoreError: a block or the targets are missing, incomplete or damaged.
    """
    run = _Run(store, exp_name, weighting, group, model_ids)
    return torch.cat([scores for _, scores in run.scores(0, run.targets)]).numpy()


def trajectory_influences(
    store: Store,
    exp_name: str,
    k: int,
    *,
    harmful: bool = False,
    weighting: Weighting = "learning_rate",
    group: int | None = None,
    model_ids: Iterable[int] | None = None,
    memory: int = 256 * 2**20,
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Find the training samples with the largest trajectory scores for each target.

    The scores of `trajectory_scores`, of which never more than a part exists at a time.

    Args:
        store: as for `trajectory_scores`.
        exp_name: the targets' experiment name.
        k: how many training samples for each target.
        harmful: the most negative scores instead.
        weighting: as for `trajectory_scores`.
        group: as for `trajectory_scores`.
        model_ids: the blocks to sum over; all finished ones when None.
        memory: bytes to use for a part of the scores.

    Returns:
        Indices of training samples, int64, and their scores, float32, both ``(n_targets, k)``, best
        first, equal scores by index.

    Raises:
        TypeError: ``k`` is no integer.
        ValueError: ``k`` is not between 1 and the number of training samples, or as for
            `trajectory_scores`.
        IncompleteStoreError: as for `trajectory_scores`.
        GramError: scores leave the range of float32.
    """
    check_integer("k", k, minimum=1)
    run = _Run(store, exp_name, weighting, group, model_ids)
    if k > run.size:
        raise ValueError(f"k={k} is above the number of training samples, {run.size}")
    sign = -1.0 if harmful else 1.0
    step = max(1, min(run.targets, memory // (16 * _BLOCK_ROWS)))
    best = []
    for start in range(0, run.targets, step):
        stop = min(start + step, run.targets)
        top = Largest(stop - start, k, "cpu")
        for first, scores in run.scores(start, stop):
            padding = -len(scores) % PIECE
            filled = nn.functional.pad(scores.T * sign, (0, padding), value=-math.inf)
            top.add(filled.contiguous(), first)
        best.append(top.settle())
    values, indices = (torch.cat(parts).numpy() for parts in zip(*best, strict=True))
    return indices, np.float32(sign) * values


def trajectory_self_influence(
    store: Store,
    *,
    weighting: Weighting = "learning_rate",
    group: int | None = None,
    model_ids: Iterable[int] | None = None,
) -> NDArray[np.float64]:
    """Compute the influence of each training sample on its own loss, along the training run.

    The sum over a sample's visits ``t`` of ``w_t |g_sample(t)|^2``, as TracIn's self-influence:
    large for samples whose label is likely wrong.

    Args:
        store: a store that mode ``"training"`` collected.
        weighting: as for `trajectory_scores`.
        group: as for `trajectory_scores`.
        model_ids: the blocks to sum over; all finished ones when None.

    Returns:
        float64 ``(n_train,)``.

    Raises:
        ValueError: as for `trajectory_scores`.
        IncompleteStoreError: a block is missing, incomplete or damaged.
    """
    total = np.zeros(store.train_set_size)
    for model_id in store.choose(model_ids):
        block = _Block(store, model_id, weighting, group)
        for first in range(0, block.size, _BLOCK_ROWS):
            rows = block.rows.rows(first, first + _BLOCK_ROWS).double()
            last = first + len(rows)
            total[first:last] += block.weights[first:last] * rows.square().sum(1).numpy()
        if len(block.again):
            squares = np.square(block.repeats.astype(np.float64)).sum(1)
            np.add.at(total, block.again, block.again_weights * squares)
    return total * _scale(store)


class _Run:
    """Blocks, and the targets at each of them."""

    def __init__(
        self,
        store: Store,
        exp_name: str,
        weighting: Weighting,
        group: int | None,
        model_ids: Iterable[int] | None,
    ) -> None:
        chosen = store.choose(model_ids)
        self._blocks = [_Block(store, m, weighting, group) for m in chosen]
        self._given = [Targets(store, m, exp_name).whole() for m in chosen]
        self._scale = _scale(store)
        self.size, self.targets = store.train_set_size, len(self._given[0])

    def scores(self, start: int, stop: int) -> Iterable[tuple[int, Tensor]]:
        """Scores ``(rows, targets)`` of some targets, a few rows at a time, with the first row."""
        few = [given[start:stop].double() * self._scale for given in self._given]
        for first in range(0, self.size, _BLOCK_ROWS):
            last = min(first + _BLOCK_ROWS, self.size)
            total = torch.zeros(last - first, stop - start, dtype=torch.float64)
            for block, targets in zip(self._blocks, few, strict=True):
                total += block.weighted(first, last) @ targets.T
            yield first, total.float()


class _Block:
    """The rows of a block and what each of them weighs."""

    def __init__(
        self, store: Store, model_id: int, weighting: Weighting, group: int | None
    ) -> None:
        self.rows: RowFile = store.file(model_id, "grads")
        self.size = len(self.rows)
        visits = block_visits(store, model_id)
        weights = _weights(visits, weighting, group)
        here, again = visits.place == IN_PLACE, visits.place >= 0
        self.weights = np.zeros(self.size)
        self.weights[visits.index[here]] = weights[here]
        order = np.argsort(visits.place[again])
        self.again = visits.index[again][order]
        self.again_weights = weights[again][order]
        self._file = store.save_dir / str(model_id) / REPEATS
        if len(self.again) and not self._file.is_file():
            raise IncompleteStoreError(f"{self._file} is missing, which holds repeated visits")

    @property
    def repeats(self) -> NDArray[np.float32]:
        """Rows of further visits, memory-mapped."""
        return np.load(Path(self._file), mmap_mode="r")

    def weighted(self, first: int, last: int) -> Tensor:
        """Sums of rows times weights of some samples, float64 ``(last - first, columns)``."""
        weights = torch.from_numpy(self.weights[first:last]).unsqueeze(1)
        total = self.rows.rows(first, last).double() * weights
        inside = np.flatnonzero((self.again >= first) & (self.again < last))
        if len(inside):
            extra = torch.from_numpy(np.array(self.repeats[inside])).double()
            extra *= torch.from_numpy(self.again_weights[inside]).unsqueeze(1)
            total.index_add_(0, torch.from_numpy(self.again[inside] - first), extra)
        return total


def _weights(visits: Visits, weighting: Weighting, group: int | None) -> NDArray[np.float64]:
    if weighting not in ("learning_rate", "change"):
        raise ValueError(f"weighting must be 'learning_rate' or 'change', got {weighting!r}")
    rates = visits.learning_rate
    if group is None:
        if len(rates) and not np.array_equal(rates, np.repeat(rates[:, :1], rates.shape[1], 1)):
            raise ValueError(
                f"the {rates.shape[1]} parameter groups have different learning rates; say with "
                "group= which one counts, and collect its parameters only (grad_wrt)"
            )
        group = 0
    if not 0 <= group < rates.shape[1]:
        raise ValueError(f"group={group}, but the optimizer has {rates.shape[1]} parameter groups")
    chosen: NDArray[np.float64] = rates[:, group]
    return chosen if weighting == "learning_rate" else chosen * visits.share


def _scale(store: Store) -> float:
    """What makes inner products of rows those of gradients: rows are divided by its root."""
    return store.settings.grad_dim / store.settings.proj_dim
