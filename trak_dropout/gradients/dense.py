"""Exact per-sample gradients, formed in full for just the parameters that are asked for."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from trak.gradient_computers import FunctionalGradientComputer
from trak.modelout_functions import (
    AbstractModelOutput,
    IterativeImageClassificationModelOutput,
)

from trak_dropout._checks import check_model


class BatchError(ValueError):
    """A batch is not what the task takes."""


class DenseGradientComputer(FunctionalGradientComputer):
    """TRAK's functional gradient computer that differentiates only what is asked for.

    Same values as ``FunctionalGradientComputer``, which computes the gradients of every
    parameter and then drops those not in ``grad_wrt`` (MadryLab/trak issue 1); here they are
    never computed. Batches are checked against the task.

    Args:
        model: the model.
        task: the model output function.
        grad_dim: number of gradient coordinates; kept for TRAK's interface.
        dtype: TRAK's storage type; gradients keep the parameters' own.
        device: kept for TRAK's interface; gradients lie where the parameters do.
        grad_wrt: names of the parameters to take gradients of; all when None.

    Raises:
        TypeError: the task is one for TRAK's ``IterativeGradientComputer``.
    """

    def __init__(
        self,
        model: nn.Module,
        task: AbstractModelOutput,
        grad_dim: int | None = None,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
        grad_wrt: Iterable[str] | None = None,
    ) -> None:
        check_model(model)
        if isinstance(task, IterativeImageClassificationModelOutput):
            raise TypeError(
                "task: the iterative output reads the model's own weights, so functional "
                "gradients of it are zero; use task='image_classification', or TRAK's "
                "IterativeGradientComputer"
            )
        wanted = None if grad_wrt is None else frozenset(grad_wrt)
        super().__init__(model, task, grad_dim, dtype, device, wanted)

    def compute_per_sample_grad(self, batch: Sequence[Tensor]) -> dict[str, Tensor]:
        """Compute the gradient of the task's output for each sample.

        Args:
            batch: tensors with one first dimension ``B``, as many as the task's
                ``get_output`` takes.

        Returns:
            Parameter name to gradients ``(B, *parameter.shape)``, in ``named_parameters()``
            order, of the parameters' dtypes.

        Raises:
            BatchError: the task cannot take the batch.
        """
        check_batch(self.modelout_fn, batch)
        wanted = self.func_weights if self.grad_wrt is None else self.grad_wrt
        varied = {name: w for name, w in self.func_weights.items() if name in wanted}
        fixed = {name: w for name, w in self.func_weights.items() if name not in wanted}

        def output(varied: dict[str, Tensor], *sample: Tensor) -> Tensor:
            return self.modelout_fn.get_output(
                self.model, {**varied, **fixed}, self.func_buffers, *sample
            )

        per_sample = torch.func.vmap(
            torch.func.grad(output),
            in_dims=(None, *([0] * len(batch))),
            randomness="different",
        )
        try:
            return per_sample(varied, *batch)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            raise refused(self.modelout_fn, batch, error) from error

    def compute_loss_grad(self, batch: Sequence[Tensor]) -> Tensor:
        """Compute the gradient of the loss with respect to the output, for each sample.

        Args:
            batch: as for `compute_per_sample_grad`.

        Returns:
            Tensor ``(B, 1)``, also where the task gives ``(B,)``.

        Raises:
            BatchError: the task cannot take the batch.
        """
        check_batch(self.modelout_fn, batch)
        try:
            with torch.no_grad():
                values = super().compute_loss_grad(batch)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            raise refused(self.modelout_fn, batch, error) from error
        if values.numel() != len(batch[0]):
            raise BatchError(
                f"task: get_out_to_loss_grad of {type(self.modelout_fn).__name__} returned shape "
                f"{tuple(values.shape)} for {len(batch[0])} samples, expected one value for each"
            )
        return values.reshape(-1, 1)


def check_batch(task: AbstractModelOutput, batch: Any) -> int:
    """Check that a batch has the form that a task takes.

    Args:
        task: the model output function.
        batch: what the data loader gave.

    Returns:
        The number of samples, ``B``.

    Raises:
        BatchError: the batch is no tuple or list of tensors, holds another number of them than
            the task's ``get_output`` takes, or they differ in their first dimension.
    """
    takes, optional = _inputs_of(task)
    if not isinstance(batch, list | tuple) or not batch:
        raise BatchError(_message(takes, task, f"a {type(batch).__name__}"))
    if not all(isinstance(part, Tensor) and part.ndim > 0 for part in batch):
        raise BatchError(_message(takes, task, _describe(batch)))
    if takes is not None and not len(takes) - optional <= len(batch) <= len(takes):
        raise BatchError(_message(takes, task, _describe(batch)))
    sizes = {len(part) for part in batch}
    if len(sizes) > 1:
        raise BatchError(
            _message(takes, task, _describe(batch)) + "; the first dimensions must be equal"
        )
    return sizes.pop()


def _inputs_of(task: AbstractModelOutput) -> tuple[list[str] | None, int]:
    """Names of the tensors that ``get_output`` takes, None for any, and how many are optional."""
    method: Any = task.get_output
    function = getattr(method, "__func__", None)
    return _inputs(method, 3) if function is None else _inputs(function, 4)


@lru_cache(maxsize=64)
def _inputs(function: Any, before: int) -> tuple[list[str] | None, int]:
    parameters = list(inspect.signature(function).parameters.values())[before:]
    if any(p.kind is inspect.Parameter.VAR_POSITIONAL for p in parameters):
        return None, 0
    names = [p.name for p in parameters if p.kind is not inspect.Parameter.KEYWORD_ONLY]
    return names, sum(p.default is not inspect.Parameter.empty for p in parameters)


def _message(takes: list[str] | None, task: AbstractModelOutput, given: str) -> str:
    wants = "tensors" if takes is None else f"tensors ({', '.join(takes)})"
    return (
        f"batch: {type(task).__name__} takes a tuple of {wants}, got {given}; change the "
        "collate_fn (or, with Lightning, make one in on_after_batch_transfer), or write a model "
        "output function that takes as many tensors"
    )


def refused(task: AbstractModelOutput, batch: Sequence[Tensor], error: Exception) -> BatchError:
    """Return the error to raise where a task failed on a batch."""
    return BatchError(
        f"batch: {type(task).__name__} failed on {_describe(batch)} with "
        f"{type(error).__name__}: {error}"
    )


def _describe(batch: Sequence[Any]) -> str:
    parts = (
        f"{str(part.dtype).removeprefix('torch.')} {tuple(part.shape)}"
        if isinstance(part, Tensor)
        else type(part).__name__
        for part in batch
    )
    return f"({', '.join(parts)})"
