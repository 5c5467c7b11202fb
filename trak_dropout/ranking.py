"""The most influential training samples of each target, without the matrix of all scores."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm
from trak import TRAKer

from trak_dropout._checks import check_integer
from trak_dropout._files import replacing
from trak_dropout._html import describe_html
from trak_dropout.curvature import check_curvature, curved
from trak_dropout.largest import PIECE, Largest
from trak_dropout.progress import Progress, unfinished
from trak_dropout.rowfile import IncompleteStoreError, RowFile, read_experiments
from trak_dropout.scoring import DampedScoreComputer, GramError, refuse_targets
from trak_dropout.shards import Shards
from trak_dropout.store import FeatureFiles
from trak_dropout.streaming import (
    DEFAULT_MEMORY,
    files_and_computer,
    fingerprints,
    mean_out_to_loss,
    streamed_gram,
)

METHODS = ("influence", "dot", "cosine")
# Above it rounding to float32 could change scores by more than 1e-5 of their size.
_CANCELLATION = 20.0

_SHOWN_TARGETS, _SHOWN_SAMPLES = 20, 8


class TopInfluences(NamedTuple):
    """The most influential training samples of each target: a pair of arrays.

    Args:
        indices: numbers of training samples, int64 ``(n_targets, k)``, best first.
        values: their scores, float32 ``(n_targets, k)``.
    """

    indices: NDArray[np.int64]
    values: NDArray[np.float32]

    def _repr_html_(self) -> str:
        targets, k = self.indices.shape
        few = min(k, _SHOWN_SAMPLES)
        rows = [
            (t, *(f"{self.indices[t, j]} ({self.values[t, j]:.3g})" for j in range(few)))
            for t in range(min(targets, _SHOWN_TARGETS))
        ]
        facts = {
            "targets": f"{targets:,},",
            "samples of each": f"{k:,};",
            "shown": "number (score)",
        }
        head = ("target", *(f"{rank + 1}." for rank in range(few)))
        return describe_html(type(self).__name__, facts, head, rows)


def top_influences(
    store_or_traker: FeatureFiles | TRAKer,
    exp_name: str,
    k: int,
    *,
    harmful: bool = False,
    groups: Sequence[int] | None = None,
    model_ids: Iterable[int] | None = None,
    damping: float | str | None = None,
    method: str = "influence",
    curvature: str = "output",
    memory: int = DEFAULT_MEMORY,
    progress: bool = False,
    device: str | torch.device | None = None,
    fabric: Any = None,
) -> TopInfluences:
    """Find the training samples with the largest scores for each target.

    The same scores as ``TRAKer.finalize_scores``, means over checkpoints of the scores times the
    mean out-to-loss gradient, but never ``n_train x n_targets`` of them in memory or on disk:
    training gradients are read a few rows at a time, and only the best so far are kept. (Where
    TRAKer stores float16, it also scales the features of each checkpoint to one magnitude, which
    is not done here.)

    Sums and the best so far are kept in the store's directory every half a minute: called again
    after it was interrupted or killed, it goes on from there.

    Args:
        store_or_traker: a store, or a TRAKer that has featurized its training set; targets have
            been scored with ``TRAKer.start_scoring_checkpoint`` and ``score``, or with
            ``AttributionStore.add_targets``.
        exp_name: the targets' experiment name.
        k: how many training samples for each target.
        harmful: the most negative scores instead: samples that lower the target's output.
        groups: for each target the number of its group, ``(n_targets,)``, from 0 on; targets are
            then means over a group, one row of the result for each group.
        model_ids: the checkpoints to average; all complete ones when None.
        damping: relative damping; when None, that of the TRAKer's `DampedScoreComputer`, else
            ``"auto"``.
        method: ``"influence"``; or as cheap baselines, which solve nothing, ``"dot"``: inner
            products of gradients times the out-to-loss gradient (TracIn, arXiv 2002.08484, with
            equal learning rates), as projections estimate them, so ``proj_dim`` of the store times
            those of full gradients divided by their number of coordinates; or ``"cosine"``: their
            cosine.
        curvature: ``"output"``, as TRAK has it, or ``"loss"``: which gradients the inverted matrix
            is made of, see `trak_dropout.curvature`.
        memory: bytes to use for blocks of rows and of targets, beside one Gram matrix and its
            decomposition.
        progress: whether to show a progress bar.
        device: where to compute, the CPU or a CUDA device; that of the TRAKer or of ``fabric`` when
            None, else the CPU.
        fabric: a launched Lightning ``Fabric``: its processes, which all call this, share the rows,
            and each returns the whole result. Their machines see the same store.

    Returns:
        ``(indices, values)``: training samples, int64, and their scores, float32, both
        ``(n_targets, k)``, best first, equal scores by index.

    Raises:
        TypeError: ``store_or_traker`` is neither; or ``k`` is no integer.
        ValueError: ``k`` is not between 1 and the number of training samples, ``groups`` does
            not fit the targets, or ``method`` or ``curvature`` is unknown.
        IncompleteStoreError: a checkpoint or the targets are missing, incomplete or damaged.
        GramError: gradients are NaN or infinite, all zero, or singular without damping.
        RankError: another process has failed.
    """
    files, computer = files_and_computer(store_or_traker, damping, device, fabric)
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
    if method != "influence" and damping is not None:
        raise ValueError(f"damping={damping!r} has no meaning for method={method!r}; leave it out")
    if check_curvature(curvature) != "output" and method != "influence":
        raise ValueError(f"curvature={curvature!r} has no meaning for method={method!r}")
    chosen = files.choose(model_ids)
    k, memory = check_integer("k", k, minimum=1), check_integer("memory", memory, minimum=1)
    harmful = bool(harmful)
    rows = {m: files.file(m, "grads") for m in chosen}
    weight = _row_weights(files, chosen, method) * (-1.0 if harmful else 1.0)
    n = len(weight)
    if k > n:
        raise ValueError(f"k={k} is above the number of training samples, {n}")
    targets = {m: Targets(files, m, exp_name, groups) for m in chosen}
    if len({len(found) for found in targets.values()}) > 1:
        raise IncompleteStoreError(
            f"exp_name={exp_name!r} has other numbers of targets for other checkpoints: "
            + ", ".join(f"{len(found)} for {m}" for m, found in targets.items())
            + "; add or score them again, or give model_ids"
        )
    read = [*rows.values(), *(files.file(m, "out_to_loss") for m in chosen)]
    inputs = fingerprints(*read, *(found.file for found in targets.values()))
    scales = {m: files.scale(m) for m in chosen}
    numbers = None if groups is None else np.asarray(groups).tolist()
    how = [
        method,
        curvature,
        computer.damping,
        computer.lambda_reg,
        list(scales.values()),
    ]
    arguments = [exp_name, k, harmful, numbers, memory, *how]
    shards = Shards(fabric, n)
    with unfinished(files.save_dir, "top", inputs, arguments, shards.rank, shards.world) as work:
        solved, weights = {}, {}
        hidden = not progress or shards.rank > 0
        for m in chosen:
            file, factors = curved(files, m, curvature, shards, memory)
            rows[m] = file
            weights[m] = (weight / factors).float()
            if method == "influence":
                solved[m] = _solved(
                    computer, file, targets[m], shards, work, m, scales[m], memory, hidden
                )
            else:
                parts = _plain(
                    targets[m], method, scales[m], max(1, memory // (40 * file.shape[1]))
                )
                solved[m] = _kept(work, m, (len(targets[m]), file.shape[1]), parts)
        with shards.agreed():
            best = _best(rows, solved, weights, k, method, shards, work, memory, computer, hidden)
    values, indices = _merged(best, k, shards)
    sign = np.float32(-1 if harmful else 1)
    return TopInfluences(indices.cpu().numpy(), values.cpu().numpy() * sign)


def _row_weights(files: FeatureFiles, chosen: Sequence[int], method: str) -> Tensor:
    """What the sum over checkpoints is multiplied by for each training sample, float32 ``(n,)``."""
    weight = mean_out_to_loss(files, chosen)
    weight = torch.ones_like(weight) if method == "cosine" else weight
    return (weight / len(chosen)).to(torch.float32)


def _solved(
    computer: DampedScoreComputer,
    file: RowFile,
    targets: Targets,
    shards: Shards,
    work: Progress,
    model_id: int,
    scale: float,
    memory: int,
    hidden: bool,
) -> RowFile:
    """What training rows are multiplied with; for ``k > n`` the scores themselves."""
    n, k = file.shape
    done = work.folder / f"solved_{model_id}.npy"
    # Every process must know whether sums are still to be taken together.
    if int(shards.total(torch.tensor(int(done.is_file())))) == shards.world:
        return RowFile(done)
    with tqdm(total=n // shards.world, desc=f"Gram matrix {model_id}", disable=hidden) as bar:
        gram = streamed_gram(computer, file, shards, work, f"gram_{model_id}", memory, bar)
    factor = computer.decompose(gram, n, k, scale=scale)
    step = max(1, memory // (40 * max(n, k) if k > n else 40 * k))
    cancellation: list[Tensor] = []

    def parts() -> Iterator[Tensor]:
        for block in targets.blocks(step):
            refuse_targets(block)
            right = block.to(computer.device, torch.float64).T
            if k > n:
                few = max(1, memory // (40 * k))
                right = torch.cat(
                    [computer.checked(x, first) @ right for first, x in file.blocks(few)]
                )
            part = computer.solve_for(factor, right)
            if k <= n:
                cancellation.append(computer.cancellation(gram, part).cpu())
            yield part
        if cancellation:
            work.keep(f"cancellation_{model_id}", {"values": torch.cat(cancellation)})

    found = _kept(work, model_id, (len(targets), min(n, k)), parts())
    work.drop(f"gram_{model_id}")
    return found


def _plain(targets: Targets, method: str, scale: float, step: int) -> Iterator[Tensor]:
    """What training rows are multiplied with for the baselines, a few targets at a time."""
    for block in targets.blocks(step):
        refuse_targets(block)
        found = block.double()
        found /= found.norm(dim=1, keepdim=True) if method == "cosine" else scale**2
        yield found


def _kept(
    work: Progress, model_id: int, shape: tuple[int, int], parts: Iterable[Tensor]
) -> RowFile:
    """Write rows to a file, which is there when it is whole."""
    done = work.folder / f"solved_{model_id}.npy"
    with replacing(done) as file:
        header = {"descr": "<f8", "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, header)
        for part in parts:
            file.write(np.ascontiguousarray(part.cpu().numpy(), dtype="<f8").data)
    return RowFile(done)


def _best(
    rows: Mapping[int, RowFile],
    solved: Mapping[int, RowFile],
    weights: Mapping[int, Tensor],
    k: int,
    method: str,
    shards: Shards,
    work: Progress,
    memory: int,
    computer: DampedScoreComputer,
    hidden: bool,
) -> list[Largest]:
    """The largest scores of this process's rows, for some targets at a time."""
    count = len(next(iter(solved.values())))
    n, device = shards.stop - shards.start, torch.device(computer.device)
    widest = max(matrix.shape[1] for matrix in rows.values())
    step = max(1, min(count, memory // (16 * widest * len(rows) + 64 * k)))
    enlarged = [work.load(f"cancellation_{m}") for m in rows]
    result = []
    with tqdm(total=count * n, desc="Scoring", disable=hidden) as bar:
        for start in range(0, count, step):
            worst = [float(e["values"][start : start + step].max()) for e in enlarged if e]
            exact = max(worst, default=0.0) > _CANCELLATION
            dtype = torch.float64 if exact else torch.float32
            few = {
                m: file.rows(start, start + step).to(device, dtype) for m, file in solved.items()
            }
            size = len(next(iter(few.values())))
            block = memory // (2 * (4 * widest + dtype.itemsize * (widest + 2 * size)))
            block = max(1, min(block, n + PIECE - 1) // PIECE) * PIECE
            best, name = Largest(size, k, device, dtype), f"best_{start}"
            first = shards.start
            kept = work.load(name)
            if kept is not None:
                best.values, best.indices = kept["values"].to(device), kept["indices"].to(device)
                first = int(kept["next"])
                best.seen = first - shards.start
                bar.update(size * best.seen)
            product = torch.empty(size, block, dtype=dtype, device=device)
            sums = _products(rows, few, weights, method, product, first, shards.stop)
            for at, length in sums:
                filled = -(-length // PIECE) * PIECE
                product[:, length:filled] = -math.inf
                best.add(product[:, :filled], at)
                bar.update(size * length)
                if work.due(name, 5.0 if at + length == shards.stop else None):
                    best.settle()
                    done = torch.tensor(at + length)
                    work.keep(name, {"values": best.values, "indices": best.indices, "next": done})
            best.settle()
            result.append(best)
    return result


def _products(
    rows: Mapping[int, RowFile],
    few: Mapping[int, Tensor],
    weights: Mapping[int, Tensor],
    method: str,
    product: Tensor,
    first: int,
    stop: int,
) -> Iterator[tuple[int, int]]:
    """Fill ``product`` with scores, a block of rows at a time; yields its first row and length."""
    block = product.shape[1]
    # What few holds of the others, whose dual form was solved, are scores already.
    readers = {
        m: file.blocks(block, first, stop)
        for m, file in rows.items()
        if method != "influence" or file.shape[1] <= file.shape[0]
    }
    widest = max((rows[m].shape[1] for m in readers), default=0)
    longest = {m: float(target.double().norm(dim=1).max()) for m, target in few.items()}
    space = torch.empty(block * widest, dtype=product.dtype, device=product.device)
    for at in range(first, stop, block):
        length = min(block, stop - at)
        out = product[:, :length]
        for i, (m, target) in enumerate(few.items()):
            factors = weights[m][at : at + length].to(product.device)
            if m not in readers:
                part = target[:, at : at + length] * factors
                out.copy_(part) if i == 0 else out.add_(part)
                continue
            read = next(readers[m])[1].to(product.device)
            if product.dtype == torch.float64:  # else the product below would be one of float32
                read, factors = read.double(), factors.double()
            by = factors
            if method != "influence":
                by = _plain_weights(read, factors, method, at, longest[m])
            # Rows are converted anyway, so multiplying them with their weights costs nothing.
            scaled = space[: read.numel()].view(read.shape)
            torch.mul(read, by.unsqueeze(1), out=scaled)
            if i == 0:
                torch.mm(target, scaled.T, out=out)
            else:
                out.addmm_(target, scaled.T)
        yield at, length


def _plain_weights(
    read: Tensor, factors: Tensor, method: str, first: int, longest: float
) -> Tensor:
    """Weights of rows for the baselines, which no Gram matrix has checked."""
    norms = torch.linalg.vector_norm(read.double(), dim=1)
    if not bool(torch.isfinite(norms).all()):
        bad = (first + torch.nonzero(~torch.isfinite(norms)).flatten()).tolist()
        raise GramError(f"compressed gradients of samples {bad[:10]} are NaN or infinite")
    if method == "cosine":
        return (factors.double() / norms.clamp_min(1e-300)).clamp_max(1e300).to(factors.dtype)
    size = float(norms.max()) * longest
    if size > 1e37 or 0 < size < 1e-30:
        raise GramError(
            f"inner products of gradients are of the order of {size:.0e}, out of the range of "
            "float32; use method='cosine', or scale the loss"
        )
    return factors


def _merged(best: Sequence[Largest], k: int, shards: Shards) -> tuple[Tensor, Tensor]:
    """The largest scores over all processes: values and rows, ``(n_targets, k)``."""
    values, indices = (
        torch.cat([getattr(b, name) for b in best]) for name in ("values", "indices")
    )
    if shards.world == 1:
        return values, indices
    missing = (0, k - values.shape[1])  # a process may have fewer rows
    values = torch.nn.functional.pad(values, missing, value=-math.inf)
    indices = torch.nn.functional.pad(indices, missing)
    # Ranks hold ascending rows, so a stable sort keeps equal scores in their order.
    both, order = torch.sort(torch.cat(shards.all(values), 1), dim=1, descending=True, stable=True)
    return both[:, :k], torch.cat(shards.all(indices), 1).gather(1, order[:, :k])


class Targets:
    """Compressed gradients of the targets of an experiment, or of the means of groups of them.

    Args:
        files: the store.
        model_id: the checkpoint.
        exp_name: the targets' experiment name.
        groups: for each target the number of its group, from 0 on.

    Raises:
        IncompleteStoreError: they are missing or damaged, or have another number of columns.
        ValueError: ``groups`` does not fit them.
    """

    def __init__(
        self,
        files: FeatureFiles,
        model_id: int,
        exp_name: str,
        groups: Sequence[int] | None = None,
    ) -> None:
        self._about = f"exp_name={exp_name!r} for model_id={model_id}"
        try:
            self.file = files.file(model_id, f"{exp_name}_grads")
        except IncompleteStoreError as error:
            known = files.save_dir / "experiments.json"
            names = sorted(read_experiments(known)) if known.is_file() else []
            raise IncompleteStoreError(
                f"exp_name={exp_name!r} has no targets for model_id={model_id}; known experiments: "
                f"{', '.join(names) or 'none'} ({error})"
            ) from error
        expected = files.file(model_id, "grads").shape[1]
        if self.file.shape[1] != expected:
            raise IncompleteStoreError(
                f"{self.file.file} has {self.file.shape[1]} columns, the training gradients "
                f"{expected}"
            )
        if not len(self.file):
            raise IncompleteStoreError(f"{self._about}: there are no targets")
        self._groups = None if groups is None else _group_numbers(groups, len(self.file))

    def __len__(self) -> int:
        return len(self.file) if self._groups is None else int(self._groups.max()) + 1

    def blocks(self, step: int) -> Iterator[Tensor]:
        """Yield them, a few rows ``(b, k)`` at a time.

        Args:
            step: how many.

        Raises:
            IncompleteStoreError: a target is zero.
        """
        if self._groups is None:
            for first, rows in self.file.blocks(step):
                self._refuse_empty(rows, first)
                yield rows
            return
        sizes = torch.bincount(self._groups)
        means = torch.zeros(len(sizes), self.file.shape[1], dtype=torch.float64)
        for first, rows in self.file.blocks(step):
            self._refuse_empty(rows, first)
            numbers = self._groups[first : first + len(rows)]
            means.index_add_(0, numbers, rows.double() / sizes[numbers].unsqueeze(1))
        for first in range(0, len(means), step):
            yield means[first : first + step]

    def whole(self) -> Tensor:
        """Return all of them, ``(n_targets, k)``; raises as `blocks`."""
        return torch.cat([block.clone() for block in self.blocks(len(self.file))])

    def _refuse_empty(self, rows: Tensor, first: int) -> None:
        empty = (first + torch.nonzero(~rows.any(dim=1)).flatten()).tolist()
        if empty:
            raise IncompleteStoreError(
                f"targets {empty[:10]} of {self._about} are all zero: either they have not been "
                "scored, or the model's output does not depend on the parameters there; score "
                "them, or leave them out"
            )


def _group_numbers(groups: Sequence[int], count: int) -> Tensor:
    given = np.asarray(groups)
    if given.shape != (count,) or given.dtype.kind not in "iu" or int(given.min()) < 0:
        raise ValueError(
            f"groups must be one number from 0 on for each of the {count} targets, got "
            f"{given.dtype} of shape {given.shape}"
        )
    absent = np.setdiff1d(np.arange(min(int(given.max()) + 1, count + 1)), given)
    if len(absent):
        raise ValueError(f"groups: no target is in group {int(absent[0])}")
    return torch.from_numpy(given.astype(np.int64))
