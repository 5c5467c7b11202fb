"""Computations over the rows of a store: a few at a time, restartable, in several processes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm
from trak import TRAKer

from trak_dropout.progress import Progress, unfinished
from trak_dropout.rowfile import RowFile
from trak_dropout.scoring import DampedScoreComputer, refuse_zero
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


def fingerprint(*files: RowFile) -> list[Any]:
    """What tells files from others that once had their names."""
    found = [(str(file.file), file.file.stat(), file.shape) for file in files]
    return [[name, stat.st_size, stat.st_mtime_ns, *shape] for name, stat, shape in found]


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
        gram = computer.dual_gram(file.rows())
        bar.update(n)
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


def self_influence(
    store_or_traker: FeatureFiles | TRAKer,
    model_ids: Iterable[int] | None = None,
    damping: float | str | Sequence[float | str] | None = None,
    *,
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
    several = isinstance(damping, Sequence) and not isinstance(damping, str)
    dampings: Sequence[Any] = list(damping) if several else [None]  # type: ignore[arg-type]
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
    total: Any = 0.0
    out_to_loss: Any = 0.0
    arguments = [dampings, computer.damping, computer.lambda_reg]
    inputs, place = fingerprint(*found.values()), Shards(fabric, 0)
    with unfinished(
        files.save_dir, "self_influence", inputs, arguments, place.rank, place.world
    ) as work:
        for m, file in found.items():
            n, k = file.shape
            shards = Shards(fabric, n)
            hidden = not progress or shards.rank > 0
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
            total = total + values.cpu().numpy()
            out_to_loss = out_to_loss + files.out_to_loss(m)[:, 0].astype(np.float64)
    result = total / len(chosen) * (out_to_loss / len(chosen))
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
