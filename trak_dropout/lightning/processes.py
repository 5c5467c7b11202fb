"""The processes of a Trainer, which must go on together or fail together."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import pytorch_lightning as pl
import torch
from pytorch_lightning.strategies import (  # type: ignore[attr-defined]
    DDPStrategy,
    DeepSpeedStrategy,
    SingleDeviceStrategy,
    XLAStrategy,
)
from pytorch_lightning.utilities.exceptions import (  # type: ignore[attr-defined]
    MisconfigurationException,
)
from torch import Tensor, distributed

T = TypeVar("T")


class CollectionError(RuntimeError):
    """Another process of the run failed while gradients were collected."""


class Processes:
    """Lets the processes of a Trainer agree.

    Args:
        trainer: the Trainer.
    """

    def __init__(self, trainer: pl.Trainer) -> None:
        self.rank, self.count = trainer.global_rank, trainer.world_size
        self.is_first = trainer.is_global_zero

    def agree(self, work: Callable[[], T]) -> T:
        """Do work in the first process and tell the others what came of it.

        Args:
            work: called in the first process only.

        Returns:
            What it returned, in all processes.

        Raises:
            CollectionError: it raised, or a process has died; the first process raises what it
                raised.
        """
        if self.count == 1:
            return work()
        told: list[Any] = [None]
        failure = None
        if self.is_first:
            try:
                told = [(work(), None)]
            except Exception as error:
                failure, told = error, [(None, _describe(error))]
        with _peers_needed():
            distributed.broadcast_object_list(told, src=0)
        result, problem = told[0]
        if failure is not None:
            raise failure
        if problem is not None:
            raise CollectionError(f"process 0 failed: {problem}")
        return result

    @contextmanager
    def together(self) -> Iterator[None]:
        """End a block in all processes at the same time, or raise in all of them.

        Raises:
            CollectionError: another process raised within the block, or has died.
        """
        failure: Exception | None = None
        try:
            yield
        except Exception as error:
            failure = error
        if self.count > 1:
            problems: list[str | None] = [None] * self.count
            with _peers_needed(failure):
                distributed.all_gather_object(
                    problems, None if failure is None else _describe(failure)
                )
            others = [f"process {r} failed: {text}" for r, text in enumerate(problems) if text]
            if failure is None and others:
                raise CollectionError("; ".join(others))
        if failure is not None:
            raise failure

    def least(self, value: float | None) -> float | None:
        """Return the smallest value of all processes that have one.

        Args:
            value: this process's; None when it has none.
        """
        values = [value]
        if self.count > 1:
            values = [None] * self.count
            with _peers_needed():
                distributed.all_gather_object(values, value)
        return min((v for v in values if v is not None), default=None)

    def same(self, what: str, value: Any) -> None:
        """Check that a value is the same in all processes.

        Args:
            what: what the value is, for the message.
            value: it.

        Raises:
            MisconfigurationException: it is not.
        """
        if self.count == 1:
            return
        values: list[Any] = [None] * self.count
        with _peers_needed():
            distributed.all_gather_object(values, value)
        if any(other != values[0] for other in values):
            raise MisconfigurationException(
                f"GradientCollector: {what} must be the same in all processes, got {values}"
            )

    def take_over(self, tensors: dict[str, Tensor]) -> None:
        """Overwrite tensors, in place, with those of the first process.

        Args:
            tensors: any dtype, by name, the same names and shapes in all processes.
        """
        if self.count == 1:
            return
        told: list[Any] = [{name: tensor.cpu() for name, tensor in tensors.items()}]
        with _peers_needed():
            distributed.broadcast_object_list(told, src=0)
        with torch.no_grad():
            for name, tensor in tensors.items():
                tensor.copy_(told[0][name])


def check_strategy(trainer: pl.Trainer) -> None:
    """Refuse strategies under which no process has all the weights.

    Args:
        trainer: the Trainer.

    Raises:
        MisconfigurationException: its strategy is neither a single device nor DDP.
    """
    strategy = trainer.strategy
    if not isinstance(strategy, SingleDeviceStrategy | DDPStrategy) or isinstance(
        strategy, DeepSpeedStrategy | XLAStrategy
    ):
        raise MisconfigurationException(
            "GradientCollector needs all weights in each process, which "
            f"{type(strategy).__name__} does not give it; use a single device or strategy='ddp', "
            "or collect afterwards from saved checkpoints with TRAKer and trak_dropout.plugin"
        )


@contextmanager
def _peers_needed(failure: Exception | None = None) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        if failure is not None:
            raise failure from error
        raise CollectionError(
            "another process of this run has died or no longer answers while gradients were "
            "collected; what is in the store is kept, and a resumed run goes on from there"
        ) from error


def _describe(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
