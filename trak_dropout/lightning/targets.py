"""Targets whose compressed gradients are kept with each checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.utilities import CombinedLoader
from pytorch_lightning.utilities.exceptions import (  # type: ignore[attr-defined]
    MisconfigurationException,
)
from torch.utils.data import DataLoader

from trak_dropout.collation import ReorderingError
from trak_dropout.gradients import BatchError
from trak_dropout.reading import check_order_kept, check_order_known, sequential_loader

SPLITS = ("val", "test", "predict")
Targets = str | list[str] | Mapping[str, Any] | None
TargetLoader = tuple[int, Iterable[Any]]
"""The number that transfer hooks are given of a loader, and the loader."""


def check_targets(targets: Targets) -> None:
    """Check what was given as targets.

    Args:
        targets: names of the Trainer's loaders, or loaders by the name of their experiment.

    Raises:
        ValueError: a name is not known, or no plain name.
    """
    if isinstance(targets, Mapping):
        for name in targets:
            if not isinstance(name, str) or not name.isidentifier():
                raise ValueError(f"targets: {name!r} is no plain name for an experiment")
        return
    for name in _names(targets):
        if name not in SPLITS:
            raise ValueError(
                f"targets: {name!r} is not known; use {', '.join(map(repr, SPLITS))}, or give "
                "loaders by name, such as {'hard': loader}"
            )


def target_loaders(trainer: pl.Trainer, targets: Targets) -> dict[str, TargetLoader]:
    """Return the loaders of targets, by the name of their experiment.

    Args:
        trainer: the Trainer whose loaders, or whose data module's or module's, are meant.
        targets: as for `check_targets`.

    Raises:
        MisconfigurationException: there is no such loader, or it draws samples in an order that
            nobody knows.
    """
    if isinstance(targets, Mapping):
        return {name: (0, _in_order(name, loader)) for name, loader in targets.items()}
    found: dict[str, TargetLoader] = {}
    for split in _names(targets):
        loaders = _split_loaders(trainer, split)
        if isinstance(loaders, CombinedLoader):
            loaders = loaders.iterables
        if isinstance(loaders, list | tuple):
            loaders = dict(enumerate(loaders))
        if isinstance(loaders, Mapping):
            named = {f"{split}_{key}": loader for key, loader in loaders.items()}
            check_targets(named)
        else:
            named = {split: loaders}
        found |= {name: (i, _in_order(name, named[name])) for i, name in enumerate(named)}
    return found


def try_targets(targets: Mapping[str, TargetLoader], work: Callable[[Any, int], object]) -> None:
    """Refuse targets that no gradients can be computed of, or whose collation reorders them.

    Args:
        targets: from `target_loaders`.
        work: what will be done with each batch, given the batch and the number of its loader.

    Raises:
        BatchError: the task cannot take the first batch of a loader, or there is none.
        MisconfigurationException: scores would be those of other targets, or a loader can be read
            only once.
    """
    for name, (number, loader) in targets.items():
        try:
            check_order_kept(loader)
        except ReorderingError as error:
            raise MisconfigurationException(
                f"GradientCollector: of the targets {name!r}, {error}"
            ) from error
        if isinstance(loader, Iterator):
            raise MisconfigurationException(
                f"GradientCollector: targets {name!r} are a {type(loader).__name__}, which can be "
                "read only once; give a loader, or a list of batches"
            )
        batch = next(iter(loader), None)
        if batch is None:
            raise BatchError(f"targets {name!r}: there are none in the loader")
        try:
            work(batch, number)
        except BatchError as error:
            raise BatchError(f"targets {name!r}: {error}") from error


def _names(targets: Any) -> list[str]:
    return [] if targets is None else [targets] if isinstance(targets, str) else list(targets)


def _split_loaders(trainer: pl.Trainer, split: str) -> Any:
    if split == "val":
        if trainer.val_dataloaders is not None:
            return trainer.val_dataloaders
        given = trainer.fit_loop.epoch_loop.val_loop._data_source
        if not given.is_module() and given.instance is not None:  # to fit(), and not read yet
            return given.instance
    hook = f"{split}_dataloader"
    problem: Any = "there is none"
    for owner in (getattr(trainer, "datamodule", None), trainer.lightning_module):
        if owner is None:
            continue
        try:
            loaders = getattr(owner, hook)()
        except (AttributeError, NotImplementedError, MisconfigurationException) as error:
            problem = error
            continue
        if loaders is not None:
            return loaders
    raise MisconfigurationException(
        f"GradientCollector(targets={split!r}) needs a loader from the {hook} of the data module "
        f"or module during fit, but: {problem}; prepare that data in setup('fit'), or give a "
        "loader by name, targets={'" + split + "': loader}"
    )


def _in_order(name: str, loader: Any) -> Iterable[Any]:
    if not isinstance(loader, DataLoader):
        return loader
    try:
        check_order_known(loader)
    except ValueError as error:
        raise MisconfigurationException(f"GradientCollector: targets {name!r}: {error}") from error
    return sequential_loader(loader)
