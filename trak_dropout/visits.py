"""The record that mode ``"training"`` keeps beside the rows of a block: who came when.

A block is one epoch and one model_id of a store. Its ``grads.mmap`` has the row of each sample of
the data set at the sample's index, as in any store; ``repeats.npy`` has those of further visits of
a sample within the epoch; ``visits.safetensors`` has one entry for each time that a sample took
part in training, in the order of appearance.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from trak_dropout._safetensors import load_tensors, save_tensors
from trak_dropout.rowfile import IncompleteStoreError

VISITS, REPEATS = "visits.safetensors", "repeats.npy"
IN_PLACE, NOT_STORED = -1, -2

_KINDS = {
    "index": np.int64,
    "place": np.int64,
    "batch": np.int64,
    "step": np.int64,
    "rank": np.int32,
    "share": np.float64,
    "learning_rate": np.float64,
}
_OF_BATCH = ("batch", "step", "rank", "share")


@dataclass
class Batch:
    """A training batch: what the visits of its samples have in common.

    Args:
        index: its samples, int64 ``(B,)``.
        batch: its number, as in `Visits`, and so on.
        step: optimizer steps taken before.
        rank: the process.
        share: of each sample.
        learning_rate: of each parameter group.
    """

    index: NDArray[np.int64]
    batch: int
    step: int
    rank: int
    share: float
    learning_rate: Sequence[float]


@dataclass
class Visits:
    """When samples took part in training, ``V`` times in all.

    Args:
        index: the sample's index in the data set, int64 ``(V,)``.
        place: where its row is, int64 ``(V,)``: `IN_PLACE` for row ``index`` of ``grads.mmap``, a
            row of ``repeats.npy``, or `NOT_STORED` where the gradient was not finite.
        batch: number of the training batch, from 1 on, int64 ``(V,)``.
        step: optimizer steps taken before, int64 ``(V,)``.
        rank: the process, int32 ``(V,)``.
        share: what the sample's own loss was multiplied by in what the optimizer stepped by, such
            as one over the batch size times the number of accumulated batches and of processes;
            float64 ``(V,)``.
        learning_rate: of each parameter group in the optimizer step that the sample took part in,
            0 where there was no such group yet, float64 ``(V, groups)``.
    """

    index: NDArray[np.int64]
    place: NDArray[np.int64]
    batch: NDArray[np.int64]
    step: NDArray[np.int64]
    rank: NDArray[np.int32]
    share: NDArray[np.float64]
    learning_rate: NDArray[np.float64]

    @classmethod
    def none(cls, groups: int = 1) -> Visits:
        """Return no visits."""
        empty = {name: np.zeros(0, kind) for name, kind in _KINDS.items()}
        return cls(**{**empty, "learning_rate": np.zeros((0, groups))})

    @classmethod
    def of(cls, batches: Sequence[Batch]) -> Visits:
        """Return the visits of at least one batch; where rows are is not known yet."""
        groups = max(len(batch.learning_rate) for batch in batches)
        rates = [[*b.learning_rate, *[0.0] * (groups - len(b.learning_rate))] for b in batches]
        shared = {name: [getattr(b, name) for b in batches] for name in _OF_BATCH}
        counts = [len(batch.index) for batch in batches]
        index = np.concatenate([batch.index for batch in batches])
        return cls(
            index=index,
            place=np.zeros_like(index),
            learning_rate=np.repeat(np.array(rates), counts, axis=0),
            **{n: np.repeat(np.array(values, _KINDS[n]), counts) for n, values in shared.items()},
        )

    @classmethod
    def joined(cls, parts: list[Visits]) -> Visits:
        """Return all visits of several records, one record after the other."""
        parts = [part for part in parts if len(part)] or parts[:1] or [cls.none()]
        columns = {name: [getattr(part, name) for part in parts] for name in _KINDS}
        groups = max(rates.shape[1] for rates in columns["learning_rate"])
        columns["learning_rate"] = [
            np.pad(rates, ((0, 0), (0, groups - rates.shape[1])))
            for rates in columns["learning_rate"]
        ]
        return cls(**{name: np.concatenate(column) for name, column in columns.items()})

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, which: NDArray) -> Visits:
        """Return some of the visits."""
        return Visits(**{field.name: getattr(self, field.name)[which] for field in fields(self)})

    def save(self, file: Path) -> None:
        """Replace a file with this record.

        Args:
            file: the file.
        """
        arrays = {name: np.asarray(getattr(self, name), _KINDS[name]) for name in _KINDS}
        tensors = {name: torch.from_numpy(np.ascontiguousarray(a)) for name, a in arrays.items()}
        save_tensors(file, tensors)

    @classmethod
    def load(cls, file: Path) -> Visits:
        """Read a record.

        Args:
            file: the file.

        Raises:
            IncompleteStoreError: there is none, or it is damaged.
        """
        if not file.is_file():
            raise IncompleteStoreError(
                f"{file} does not exist: mode='training' did not collect this block, or not to "
                "its end"
            )
        try:
            tensors = load_tensors(file)
            return cls(**{name: tensors[name].numpy() for name in _KINDS})
        except (KeyError, ValueError) as error:
            raise IncompleteStoreError(f"{file} is damaged: {error}") from error
