"""The most influential training samples of each target, without the matrix of all scores."""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm
from trak import TRAKer

from trak_dropout._checks import check_integer
from trak_dropout.scoring import GramError, files_and_computer
from trak_dropout.store import FeatureFiles, IncompleteStoreError, RowFile


def top_influences(
    store_or_traker: FeatureFiles | TRAKer,
    exp_name: str,
    k: int,
    *,
    harmful: bool = False,
    groups: Sequence[int] | None = None,
    model_ids: Iterable[int] | None = None,
    damping: float | str | None = None,
    memory: int = 256 * 2**20,
    progress: bool = False,
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Find the training samples with the largest scores for each target.

    The same scores as ``TRAKer.finalize_scores``, means over checkpoints of the scores times the
    mean out-to-loss gradient, but never ``n_train x n_targets`` of them in memory or on disk:
    training gradients are read a few rows at a time, and only the best so far are kept. (Where
    TRAKer stores float16, it also scales the features of each checkpoint to one magnitude, which
    is not done here.)

    Args:
        store_or_traker: a store, or a TRAKer that has featurized its training set; targets have
            been scored with ``TRAKer.start_scoring_checkpoint`` and ``score``, or with
            ``AttributionStore.add_targets``.
        exp_name: the targets' experiment name.
        k: how many training samples for each target.
        harmful: the most negative scores instead: samples that lower the target's output.
        groups: for each target the number of its group, ``(n_targets,)``, from 0 on; scores are
            then means over the targets of a group, one row for each group.
        model_ids: the checkpoints to average; all complete ones when None.
        damping: relative damping; when None, that of the TRAKer's `DampedScoreComputer`, else
            ``"auto"``.
        memory: bytes to use for blocks of rows and of targets, beside one Gram matrix and its
            decomposition.
        progress: whether to show a progress bar.

    Returns:
        Indices of training samples, int64, and their scores, float32, both ``(n_targets, k)``, best
        first, equal scores by index.

    Raises:
        TypeError: ``store_or_traker`` is neither; or ``k`` is no integer.
        ValueError: ``k`` is not between 1 and the number of training samples, or ``groups`` does
            not fit the targets.
        IncompleteStoreError: a checkpoint or the targets are missing, incomplete or damaged.
        GramError: gradients are NaN or infinite, all zero, or singular without damping.
    """
    files, computer = files_and_computer(store_or_traker, damping)
    chosen = files.choose(model_ids)
    check_integer("k", k, minimum=1)
    rows = {m: files.file(m, "grads") for m in chosen}
    n = min(map(len, rows.values()))
    if k > n:
        raise ValueError(f"k={k} is above the number of training samples, {n}")
    targets = {m: _targets(files, m, exp_name, groups) for m in chosen}
    count = len(next(iter(targets.values())))
    all_weights = [files.file(m, "out_to_loss").rows().double() for m in chosen]
    weight = torch.stack(all_weights).mean(0)
    if not bool(torch.isfinite(weight).all()):
        bad = torch.nonzero(~torch.isfinite(weight[:, 0])).flatten().tolist()
        raise GramError(f"out-to-loss gradients of samples {bad[:10]} are NaN or infinite")
    sign = -1.0 if harmful else 1.0
    weight = (sign * weight / len(chosen)).to(torch.float32)

    with tempfile.TemporaryDirectory(prefix=".solving", dir=files.save_dir) as folder:
        solved: dict[int, RowFile] = {}
        for m in tqdm(chosen, desc="Solving", disable=not progress):
            solve = computer.solver(computer.get_xtx(rows[m]), rows[m])
            file = Path(folder) / f"{m}.npy"
            width = min(rows[m].shape)
            step = max(1, memory // (40 * max(rows[m].shape[1], width)))
            kept = np.lib.format.open_memmap(file, "w+", np.float32, (count, width))
            for start in range(0, count, step):
                kept[start : start + step] = solve(targets[m][start : start + step]).cpu().numpy()
            kept.flush()
            del kept, solve
            solved[m] = RowFile(file)
        widest = max(matrix.shape[1] for matrix in rows.values())
        step = max(1, min(count, memory // (4 * 4 * widest * len(chosen))))
        block = max(1, memory // (4 * (8 * widest + 16 * step)))
        bar = tqdm(total=count * n, desc="Scoring", disable=not progress)
        best = []
        for start in range(0, count, step):
            few = {
                m: file.rows(start, start + step).to(computer.device) for m, file in solved.items()
            }
            top = _Best(len(next(iter(few.values()))), k, computer.device)
            for first in range(0, n, block):
                last = min(first + block, n)
                total: Tensor | None = None
                for m, matrix in rows.items():
                    if matrix.shape[1] > len(matrix):
                        product = few[m][:, first:last].T.clone()
                    else:
                        read = matrix.rows(first, last).to(computer.device, torch.float32)
                        product = read @ few[m].T
                    total = product if total is None else total + product
                assert total is not None
                top.add(total.mul_(weight[first:last].to(computer.device)), first)
                bar.update((last - first) * top.targets)
            best.append(top)
        bar.close()
    indices = torch.cat([top.indices for top in best]).cpu().numpy()
    values = torch.cat([top.values for top in best]).cpu().numpy()
    return indices, np.float32(sign) * values


class _Best:
    """The largest scores of each target so far.

    Args:
        targets: number of targets.
        k: how many to keep.
        device: where.
    """

    def __init__(self, targets: int, k: int, device: Any) -> None:
        self.targets, self.k = targets, k
        self.values = torch.empty(targets, 0, device=device)
        self.indices = torch.empty(targets, 0, dtype=torch.int64, device=device)

    def add(self, scores: Tensor, first: int) -> None:
        """Take in scores ``(rows, targets)`` of the training samples from ``first`` on."""
        if not math.isfinite(float(scores.sum())) and not bool(torch.isfinite(scores).all()):
            raise GramError("scores leave the range of float32; scale the loss up")
        full = self.values.shape[1] == self.k
        if full:
            # Once there are k, few scores still matter; earlier samples win ties.
            above = scores > self.values[:, -1]
            most = int(above.sum(0).max())
            if most == 0:
                return
        else:
            most = min(self.k, len(scores))
        values, rows = self._largest(scores, min(most, self.k))
        both = torch.cat([self.values, values], 1)
        indices = torch.cat([self.indices, rows + first], 1)
        order = torch.sort(both, dim=1, descending=True, stable=True).indices[:, : self.k]
        self.values, self.indices = both.gather(1, order), indices.gather(1, order)

    @staticmethod
    def _largest(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """The k largest of each column, ``(targets, k)``, equal ones by row."""
        values, rows = torch.topk(scores.T, k, dim=1)
        last = values[:, -1:]
        tied = (last == scores.T).sum(1) > (values == last).sum(1)
        for target in torch.nonzero(tied).flatten().tolist():  # topk picks any of equal scores
            order = torch.sort(scores[:, target], descending=True, stable=True).indices[:k]
            values[target], rows[target] = scores[order, target], order
        # Among equal values, ascending rows: sort by row first, then stably by value.
        by_row = torch.sort(rows, dim=1).indices
        values, rows = values.gather(1, by_row), rows.gather(1, by_row)
        by_value = torch.sort(values, dim=1, descending=True, stable=True).indices
        return values.gather(1, by_value), rows.gather(1, by_value)


def _targets(
    files: FeatureFiles, model_id: int, exp_name: str, groups: Sequence[int] | None
) -> Tensor:
    """Compressed gradients of the targets, or of the means of groups of them."""
    try:
        file = files.file(model_id, f"{exp_name}_grads")
    except IncompleteStoreError as error:
        known = files.save_dir / "experiments.json"
        names = sorted(json.loads(known.read_text())) if known.is_file() else []
        raise IncompleteStoreError(
            f"exp_name={exp_name!r} has no targets for model_id={model_id}; known experiments: "
            f"{', '.join(names) or 'none'} ({error})"
        ) from error
    targets = file.rows()
    expected = files.file(model_id, "grads").shape[1]
    if targets.shape[1] != expected:
        raise IncompleteStoreError(
            f"{file.file} has {targets.shape[1]} columns, the training gradients {expected}"
        )
    empty = torch.nonzero(~targets.any(dim=1)).flatten().tolist()
    if empty or not len(targets):
        raise IncompleteStoreError(
            f"targets {empty[:10]} of exp_name={exp_name!r} are all zero for model_id={model_id}: "
            "they have not been scored (completely)"
        )
    if groups is None:
        return targets
    numbers = torch.as_tensor(np.asarray(groups))
    if (
        numbers.shape != (len(targets),)
        or numbers.dtype.is_floating_point
        or int(numbers.min()) < 0
    ):
        raise ValueError(
            f"groups must be one number from 0 on for each of the {len(targets)} targets, got "
            f"shape {tuple(numbers.shape)}"
        )
    sizes = torch.bincount(numbers)
    if bool((sizes == 0).any()):
        raise ValueError(f"groups: no target is in group {int(torch.nonzero(sizes == 0)[0])}")
    sums = torch.zeros(len(sizes), targets.shape[1], dtype=torch.float64)
    return sums.index_add_(0, numbers, targets.double()) / sizes.unsqueeze(1)
