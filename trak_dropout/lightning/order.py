"""Which samples of the data set each training batch holds.

A data loader's batch sampler runs in the training process, whatever workers there are, and batches
come out in the order of the lists of indices that it yields. So listening to it tells the indices
of every batch while the data set, the collation, the workers and the batches stay as they are, and
no random number is drawn. (Wrapping the data set would change what ``collate_fn`` and the module
are given.)
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytorch_lightning as pl
from numpy.typing import NDArray
from pytorch_lightning.utilities.exceptions import (  # type: ignore[attr-defined]
    MisconfigurationException,
)
from torch.utils.data import DataLoader, Sampler


class Pass:
    """The batches of one pass over a loader, as far as the sampler has told."""

    def __init__(self) -> None:
        self._batches: list[NDArray[np.int64]] = []

    def note(self, indices: Any) -> None:
        """Take note of the next batch's indices."""
        try:
            self._batches.append(np.asarray(indices, dtype=np.int64).reshape(-1))
        except (TypeError, ValueError) as error:
            raise MisconfigurationException(
                "GradientCollector(mode='training') needs a batch sampler that yields lists of "
                f"indices, got {indices!r}"
            ) from error

    def indices(self, number: int) -> NDArray[np.int64]:
        """Return the indices of a batch, counted from the beginning of the pass."""
        return self._batches[number]


class RecordingBatchSampler(Sampler[Any]):
    """A batch sampler in front of another, which yields what that one yields and remembers it.

    Args:
        inner: the other.
    """

    def __init__(self, inner: Any) -> None:
        self.inner = inner
        self.latest = Pass()

    def __iter__(self) -> Iterator[Any]:
        # Begun at once, as by the loader itself: random numbers may be drawn here.
        return self._told(iter(self.inner), self._begin())

    def _begin(self) -> Pass:
        self.latest = Pass()
        return self.latest

    def _told(self, batches: Iterator[Any], into: Pass) -> Iterator[Any]:
        for indices in batches:
            into.note(indices)
            yield indices

    def __len__(self) -> int:
        return len(self.inner)

    def __getattr__(self, name: str) -> Any:
        if name == "inner":  # while it is being unpickled
            raise AttributeError(name)
        return getattr(self.inner, name)


class Listener:
    """Listens to the batch samplers of a Trainer's loaders from when they are ready.

    Loaders are ready, and the first epoch's iterator is made, before any training hook runs; the
    strategy's ``process_dataloader`` is the last thing that sees them before.

    Args:
        trainer: the Trainer.
    """

    def __init__(self, trainer: pl.Trainer) -> None:
        self._trainer, self._strategy = trainer, trainer.strategy
        self._process = trainer.strategy.process_dataloader
        self._loaders: list[Any] = []
        self._active = True
        trainer.strategy.process_dataloader = self._ready  # type: ignore[method-assign,assignment]

    def _ready(self, loader: object) -> object:
        loader = self._process(loader)
        if not (self._active and self._trainer.training and isinstance(loader, DataLoader)):
            return loader
        if loader.batch_sampler is not None:
            if not isinstance(loader.batch_sampler, RecordingBatchSampler):
                _replace(loader, RecordingBatchSampler(loader.batch_sampler))
            self._loaders.append(loader)
        return loader

    def stop(self) -> None:
        """Leave the strategy and the loaders as they were found; a second call does nothing."""
        if not self._active:
            return
        self._active = False
        if self._strategy.__dict__.get("process_dataloader") == self._ready:
            del self._strategy.__dict__["process_dataloader"]
            before: Any = self._process
            while isinstance(owner := getattr(before, "__self__", None), Listener):
                if owner._active:
                    self._strategy.process_dataloader = before  # type: ignore[method-assign]
                    break
                before = owner._process
        for loader in self._loaders:
            if isinstance(loader.batch_sampler, RecordingBatchSampler):
                _replace(loader, loader.batch_sampler.inner)
        self._loaders = []


def _replace(loader: DataLoader[Any], batch_sampler: Any) -> None:
    # Assigning is forbidden once a loader is made, because its other settings would not follow.
    loader.__dict__["batch_sampler"] = batch_sampler


def latest_pass(loader: Any) -> Pass:
    """Return the pass that was begun last over a loader that is listened to.

    Args:
        loader: the training loader.

    Raises:
        MisconfigurationException: it is of a kind that cannot be listened to.
    """
    if not isinstance(loader, DataLoader):
        raise MisconfigurationException(
            "GradientCollector needs a single torch DataLoader as training loader, got "
            f"{type(loader).__name__}"
        )
    if not isinstance(loader.batch_sampler, RecordingBatchSampler):
        raise MisconfigurationException(
            "GradientCollector(mode='training') needs a loader that batches samples itself "
            "(batch_size must not be None), to know which samples a batch holds"
        )
    if type(loader).__iter__ is not DataLoader.__iter__ or not getattr(loader, "in_order", True):
        raise MisconfigurationException(
            "GradientCollector(mode='training') needs batches in the order in which the sampler "
            f"draws them, which {type(loader).__name__} does not promise (in_order=False, or an "
            "__iter__ of its own)"
        )
    return loader.batch_sampler.latest
