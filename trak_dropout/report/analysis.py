"""What a store says: its health, and influence at each checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trak_dropout.curvature import curved
from trak_dropout.rowfile import IncompleteStoreError, RowFile, read_experiments
from trak_dropout.scoring import DampedScoreComputer
from trak_dropout.shards import Shards
from trak_dropout.store import FeatureFiles, Store
from trak_dropout.streaming import DEFAULT_MEMORY, gram_of

_WIDEST_SPECTRUM = 6144
_BLOCK_ROWS = 4096


@dataclass(frozen=True)
class Spectrum:
    """How gradients of a checkpoint spread over directions.

    Args:
        eigenvalues: of the Gram matrix, descending.
        ridge: what damping adds to each.
    """

    eigenvalues: NDArray[np.float64]
    ridge: float

    @property
    def directions(self) -> float:
        """How many directions count: the sum of ``e / (e + ridge)``."""
        kept = np.maximum(self.eigenvalues, 0)
        return float((kept / np.maximum(kept + self.ridge, np.finfo(float).tiny)).sum())


@dataclass(frozen=True)
class Checkpoint:
    """What is known of one checkpoint.

    Args:
        model_id: its number.
        facts: what the manifest says of it, such as ``epoch`` and ``global_step``.
        collected: how many training samples have been collected.
        size: how many there are.
        zero_rows: collected samples whose compressed gradient is all zero.
        spectrum: of its Gram matrix; None where incomplete or too large.
    """

    model_id: int
    facts: dict[str, Any]
    collected: int
    size: int
    zero_rows: int = 0
    spectrum: Spectrum | None = None

    @property
    def complete(self) -> bool:
        """Whether every training sample has been collected."""
        return self.collected == self.size

    @property
    def state(self) -> str:
        """Complete or not, in words."""
        if self.facts.get("abandoned"):
            return "set aside by a resumed run"
        return "complete" if self.complete else f"{self.collected} of {self.size} samples"

    @property
    def name(self) -> str:
        """What to call it: by its step where that is known."""
        if isinstance(self.facts.get("global_step"), int):
            return f"step {self.facts['global_step']}"
        return f"checkpoint {self.model_id}"


def checkpoints(
    files: FeatureFiles,
    computer: DampedScoreComputer,
    spectra_of: Sequence[int],
    curvature: str = "output",
) -> list[Checkpoint]:
    """Look at every checkpoint of a store, whether complete or not.

    Args:
        files: the store.
        computer: damps as scores are damped.
        spectra_of: the checkpoints that scores use; the spectrum is taken of these.
        curvature: which matrix scores invert.

    Returns:
        The checkpoints, ascending.
    """
    known = files.manifest["model_ids"] if isinstance(files, Store) else {}
    ids = {int(name) for name in known}
    ids |= {int(file.stem.removeprefix("id_")) for file in files.save_dir.glob("id_*.json")}
    found = []
    for m in sorted(ids):
        collected, size = _progress(files.save_dir / str(m))
        zero, spectrum = 0, None
        if m in spectra_of:
            rows = files.file(m, "grads")
            zero = sum(int((~block.any(dim=1)).sum()) for _, block in rows.blocks(_BLOCK_ROWS))
            if min(rows.shape) <= _WIDEST_SPECTRUM:
                gram = gram_of(computer, _curved(files, m, curvature)[0])
                spectrum = Spectrum(
                    torch.linalg.eigvalsh(gram).flip(0).cpu().numpy(),
                    computer.ridge(gram, *rows.shape, scale=files.scale(m)),
                )
        found.append(Checkpoint(m, dict(known.get(str(m), {})), collected, size, zero, spectrum))
    return found


def _progress(folder: Path) -> tuple[int, int]:
    file = folder / "_is_featurized.mmap"
    if not file.is_file():
        return 0, 0
    try:
        done = np.load(file, mmap_mode="r")
    except ValueError as error:
        raise IncompleteStoreError(f"{file} is damaged or cut short: {error}") from error
    return int(done.sum()), len(done)


def experiments(files: FeatureFiles) -> dict[str, int]:
    """Return the number of targets of each experiment that a store holds.

    Raises:
        IncompleteStoreError: the file that names them is damaged.
    """
    known = files.save_dir / "experiments.json"
    return read_experiments(known) if known.is_file() else {}


def scores_across(
    files: FeatureFiles,
    computer: DampedScoreComputer,
    exp_name: str,
    targets: Sequence[int],
    samples: NDArray[np.int64],
    model_ids: Sequence[int],
    curvature: str = "output",
) -> NDArray[np.float64]:
    """Compute single scores at each checkpoint; their means are those of `top_influences`.

    Args:
        files: the store.
        computer: damps.
        exp_name: the targets' experiment name.
        targets: ``T`` of the targets.
        samples: training samples for each of them, ``(T, s)``.
        model_ids: the checkpoints, ``C``.
        curvature: which matrix is inverted.

    Returns:
        ``(C, T, s)``.
    """
    result = np.zeros((len(model_ids), *samples.shape))
    weight = np.mean([files.file(m, "out_to_loss").rows()[:, 0].numpy() for m in model_ids], 0)
    for row, m in zip(result, model_ids, strict=True):
        rows, factors = _curved(files, m, curvature)
        n, k = rows.shape
        factor = computer.decompose(gram_of(computer, rows), n, k, scale=files.scale(m))
        whole = rows.rows().to(computer.device, torch.float64) if k > n else None
        given = files.file(m, f"{exp_name}_grads").rows()[list(targets)]
        solved = computer.solve(factor, given, whole).cpu()
        for scores, vector, wanted in zip(row, solved, samples, strict=True):
            if whole is not None:  # the dual form has the scores already
                scores[:] = vector[wanted]
            else:
                grads = torch.cat([rows.rows(i, i + 1) for i in wanted.tolist()]).double()
                scores[:] = grads @ vector
            scores *= weight[wanted] / factors[wanted].numpy()
    return result


def _curved(files: FeatureFiles, model_id: int, curvature: str) -> tuple[RowFile, Tensor]:
    shards = Shards(None, len(files.file(model_id, "grads")))
    return curved(files, model_id, curvature, shards, DEFAULT_MEMORY)
