"""Computations over the rows of a store: a few at a time, restartable, in several processes."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm
from trak import TRAKer

from trak_dropout._checks import check_integer
from trak_dropout.curvature import check_curvature, curved
from trak_dropout.progress import Progress, fingerprint, unfinished
from trak_dropout.rowfile import IncompleteStoreError, RowFile
from trak_dropout.scoring import DampedScoreComputer, GramError, check_damping, refuse_zero
from trak_dropout.shards import Shards
from trak_dropout.store import FeatureFiles

DEFAULT_MEMORY = 256 * 2**20
_WORTH_KEEPING = 5.0  # seconds


def files_and_computer(
    store_or_traker: FeatureFiles | TRAKer,
    damping: float | str | None = None,
    device: str | torch.device | None = None,
    fabric: Any = None,
) -> tuple[FeatureFiles, DampedScoreComputer]:
    """Return the files of a store or a TRAKer, and the score computer to use with them.

    Args:
        store_or_traker: a store, or a TRAKer.
        damping: relative damping; when None, that of the TRAKer's `DampedScoreComputer`, else
            ``"auto"``.
        device: where to compute; that of the TRAKer or ``fabric`` when None, else the CPU.
        fabric: a launched Lightning ``Fabric``, if there is one.

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
    if device is None:
        device = "cpu" if fabric is None else fabric.device
        device = own.device if own is not None and fabric is None else device
    if isinstance(own, DampedScoreComputer) and damping is None:
        if own.lambda_reg:
            return files, DampedScoreComputer(device=device, lambda_reg=own.lambda_reg)
        damping = own.damping
    return files, DampedScoreComputer(device=device, damping="auto" if damping is None else damping)


def fingerprints(*files: RowFile) -> list[list[Any]]:
    """What tells files from others that once had their names."""
    return [fingerprint(file.file, *file.shape) for file in files]


def mean_out_to_loss(files: FeatureFiles, model_ids: Sequence[int]) -> Tensor:
    """Return the mean of the out-to-loss gradients over checkpoints.

    Args:
        files: the store.
        model_ids: the checkpoints.

    Returns:
        float64 ``(n_train,)``.

    Raises:
        IncompleteStoreError: they are missing, damaged or of another length than the gradients.
        GramError: one is NaN or infinite.
    """
    found = []
    for m in model_ids:
        rows, n = files.file(m, "out_to_loss"), len(files.file(m, "grads"))
        if rows.shape != (n, 1):
            raise IncompleteStoreError(f"{rows.file} has shape {rows.shape}, expected {(n, 1)}")
        found.append(rows.rows()[:, 0].double())
        if len(found[0]) != n:
            raise IncompleteStoreError(
                f"checkpoints {model_ids[0]} and {m} have {len(found[0])} and {n} training samples"
            )
    mean = torch.stack(found).mean(0)
    if not bool(torch.isfinite(mean).all()):
        bad = torch.nonzero(~torch.isfinite(mean)).flatten().tolist()
        raise GramError(f"out-to-loss gradients of samples {bad[:10]} are NaN or infinite")
    return mean


def streamed_gram(
    computer: DampedScoreComputer,
    file: RowFile,
    shards: Shards,
    progress: Progress,
    name: str,
    memory: int,
    bar: Any,
) -> Tensor:
    """Compute the Gram matrix of a file's rows.

    Args:
        computer: which to use.
        file: compressed gradients ``(n, k)``.
        shards: which rows are this process's; sums go over all of them.
        progress: where to keep sums meanwhile.
        name: under which name.
        memory: bytes for blocks of rows.
        bar: a progress bar in rows.

    Returns:
        As ``DampedScoreComputer.get_xtx``.

    Raises:
        GramError: a row is NaN or infinite, or every entry is zero.
        RankError: another process has failed.
    """
    n, k = file.shape
    if k > n:
        with shards.agreed():
            gram = _dual_gram(computer, file, shards, memory, bar)
        gram = shards.total(gram)
    else:
        with shards.agreed():
            kept = progress.load(name)
            start = shards.start if kept is None else int(kept["next"])
            gram = torch.zeros(k, k, dtype=torch.float64) if kept is None else kept["gram"]
            gram = gram.to(computer.device)
            bar.update(start - shards.start)
            for first, block in file.blocks(max(1, memory // (20 * k)), start, shards.stop):
                computer.add_to_gram(gram, block, first)
                bar.update(len(block))
                done = first + len(block)
                if progress.due(name, _WORTH_KEEPING if done == shards.stop else None):
                    progress.keep(name, {"gram": gram, "next": torch.tensor(done)})
        gram = shards.total(gram)
    refuse_zero(gram)
    return gram


def gram_of(computer: DampedScoreComputer, file: RowFile, memory: int = DEFAULT_MEMORY) -> Tensor:
    """Compute the Gram matrix of a file's rows in one go, as `streamed_gram` does."""
    shards = Shards(None, len(file))
    with tempfile.TemporaryDirectory() as folder, tqdm(disable=True) as bar:
        return streamed_gram(computer, file, shards, Progress(Path(folder)), "gram", memory, bar)


def _dual_gram(
    computer: DampedScoreComputer, file: RowFile, shards: Shards, memory: int, bar: Any
) -> Tensor:
    """This process's part of ``X X^T``: pairs of blocks of rows, each with all columns."""
    n, k = file.shape
    gram = torch.zeros(n, n, dtype=torch.float64, device=computer.device)
    step = max(1, memory // (24 * k))
    starts = range(0, n, step)
    for i, first in enumerate(starts):
        rows = computer.checked(file.rows(first, first + step), first)
        for j, other in enumerate(starts[: i + 1]):
            if (i * (i + 1) // 2 + j) % shards.world != shards.rank:
                continue
            columns = rows if i == j else computer.checked(file.rows(other, other + step), other)
            part = rows @ columns.T
            gram[first : first + step, other : other + step] = part
            gram[other : other + step, first : first + step] = part.T
        bar.update(len(rows) // shards.world)
    return gram


def self_influence(
    store_or_traker: FeatureFiles | TRAKer,
    model_ids: Iterable[int] | None = None,
    damping: float | str | Sequence[float | str] | None = None,
    *,
    curvature: str = "output",
    memory: int = DEFAULT_MEMORY,
    progress: bool = False,
    device: str | torch.device | None = None,
    fabric: Any = None,
) -> NDArray[np.float64]:
    """Compute the influence of each training sample on itself.

    The diagonal of the score matrix whose targets are the training samples: the mean over
    checkpoints of ``x_i^T (X^T X + lambda I)^-1 x_i`` times the mean out-to-loss gradient, as
    TRAK averages. Large where the model had to bend for the sample: mislabeled and atypical
    samples come first.

    Rows are read a few at a time. Called again after it was interrupted, it goes on.

    Args:
        store_or_traker: a store, or a TRAKer that has featurized its training set.
        model_ids: the checkpoints to average; all complete ones when None.
        damping: relative damping; when None, that of the TRAKer's `DampedScoreComputer`, else
            ``"auto"``. Several in a list share one decomposition.
        curvature: ``"output"``, as TRAK has it, or ``"loss"``: which gradients the inverted matrix
            is made of, see `trak_dropout.curvature`.
        memory: bytes to use for blocks of rows, beside a Gram matrix and its decomposition.
        progress: whether to show a progress bar.
        device: where to compute, the CPU or a CUDA device; that of the TRAKer or of ``fabric`` when
            None, else the CPU.
        fabric: a launched Lightning ``Fabric``: its processes, which all call this, share the rows,
            and each returns the whole result. Their machines see the same store.

    Returns:
        float64 ``(n_train,)``; with several dampings ``(len(damping), n_train)``.

    Raises:
        IncompleteStoreError: a checkpoint is not completely featurized, or there is none.
        GramError: the Gram matrix is all zero, not finite, or singular without damping.
        RankError: another process has failed.
    """
    several = damping is not None and not isinstance(damping, str | int | float | np.generic)
    dampings: Sequence[Any] = [None]
    if several:
        dampings = [check_damping(one) for one in damping]  # type: ignore[union-attr]
    check_integer("memory", memory, minimum=1)
    check_curvature(curvature)
    if not dampings:
        raise ValueError("damping is an empty list; give at least one value, or None")
    files, computer = files_and_computer(
        store_or_traker,
        None if several else damping,  # type: ignore[arg-type]
        device,
        fabric,
    )
    chosen = files.choose(model_ids)
    found = {m: files.file(m, "grads") for m in chosen}
    weight = mean_out_to_loss(files, chosen).numpy()
    total: Any = 0.0
    arguments = [dampings, computer.damping, computer.lambda_reg, curvature]
    read = [*found.values(), *(files.file(m, "out_to_loss") for m in chosen)]
    inputs, place = fingerprints(*read), Shards(fabric, 0)
    with unfinished(
        files.save_dir, "self_influence", inputs, arguments, place.rank, place.world
    ) as work:
        for m, file in found.items():
            n, k = file.shape
            shards = Shards(fabric, n)
            hidden = not progress or shards.rank > 0
            file, factors = curved(files, m, curvature, shards, memory)
            with tqdm(total=2 * n // shards.world, desc=f"model_id {m}", disable=hidden) as bar:
                gram = streamed_gram(computer, file, shards, work, f"gram_{m}", memory, bar)
                if k > n:
                    values = computer.dual_leverages(gram, n, k, dampings, files.scale(m))
                    bar.update(n)
                else:
                    leverages = computer.leverages(gram, n, k, dampings, files.scale(m))
                    name = f"leverages_{m}"
                    with shards.agreed():
                        values = _over_rows(leverages, file, shards, work, name, memory, bar)
                    values = shards.joined(values)
            work.drop(f"gram_{m}")
            total = total + (values.cpu() / factors.square()).numpy()
    result = total / len(chosen) * weight
    return result if several else result[0]


def _over_rows(
    function: Callable[[Tensor], Tensor],
    file: RowFile,
    shards: Shards,
    work: Progress,
    name: str,
    memory: int,
    bar: Any,
) -> Tensor:
    """Apply a function of rows, which gives some values for each, to this process's rows."""
    kept = work.load(name)
    parts = [] if kept is None else [kept["values"]]
    start = shards.start + (parts[0].shape[-1] if parts else 0)
    bar.update(start - shards.start)
    for first, block in file.blocks(max(1, memory // (24 * file.shape[1])), start, shards.stop):
        parts.append(function(block))
        bar.update(len(block))
        done = first + len(block)
        if work.due(name, _WORTH_KEEPING if done == shards.stop else None):
            parts = [torch.cat(parts, -1)]
            work.keep(name, {"values": parts[0]})
    return torch.cat(parts, -1) if parts else function(torch.empty(0, file.shape[1]))
