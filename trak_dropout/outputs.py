"""Model output functions that TRAK lacks, and how a task is named."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from trak.modelout_functions import TASK_TO_MODELOUT, AbstractModelOutput


class LossOutput(AbstractModelOutput):
    """The model output ``f(z) = -loss(z)``, with an out-to-loss gradient of one.

    With it and `DampedScoreComputer`, TRAK computes the classical influence function
    ``g_target^T (F + lambda I)^-1 g_train`` with the empirical Fisher matrix ``F`` (up to the
    factor ``n`` between ``F`` and the Gram matrix), as in arXiv 2509.15651.

    A batch is ``(*inputs, target)``: the model is called on the inputs, and ``loss_fn`` on its
    output and the target, one sample at a time with a leading dimension of one. A mean or a sum
    over samples is therefore the sample's own loss. (A class weight together with
    ``reduction="mean"`` cancels for a single sample; use ``reduction="sum"``.)

    Works with gradient computers that pass weights (functional) and with those that pass None
    and read the model (iterative).

    Args:
        loss_fn: takes ``(output, target)``, each with a leading dimension of one, and returns
            one value. A module is called as it is.

    Raises:
        TypeError: ``loss_fn`` cannot be called.
    """

    def __init__(self, loss_fn: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        if not callable(loss_fn):
            raise TypeError(f"loss_fn must be callable on (output, target), got {loss_fn!r}")
        self.loss_fn = loss_fn

    @property
    def name(self) -> str:
        """The name under which stores record it: another loss has another."""
        loss = self.loss_fn
        return f"LossOutput({loss if isinstance(loss, nn.Module) else _qualified_name(loss)})"

    def get_output(
        self,
        model: nn.Module,
        weights: dict[str, Tensor] | None,
        buffers: dict[str, Tensor] | None,
        *batch: Tensor,
    ) -> Tensor:
        """Compute minus the loss.

        Args:
            model: the model.
            weights: its parameters by name; None to use the model's own.
            buffers: its buffers by name.
            *batch: inputs and target of one sample without batch dimension when weights are
                given, of a batch otherwise.

        Returns:
            A scalar when weights are given, else ``(B,)``.
        """
        *inputs, target = batch
        if weights is None:
            outputs = model(*inputs)
            return torch.func.vmap(self._single)(outputs, target)
        output = torch.func.functional_call(
            model, (weights, buffers or {}), tuple(part.unsqueeze(0) for part in inputs)
        )
        return self._single(output.squeeze(0), target)

    def _single(self, output: Tensor, target: Tensor) -> Tensor:
        loss = self.loss_fn(output.unsqueeze(0), target.unsqueeze(0))
        if loss.numel() != 1:
            raise ValueError(
                f"loss_fn must return one value for one sample, got shape {tuple(loss.shape)}; "
                "use a loss with reduction='mean' or 'sum'"
            )
        return -loss.reshape(())

    def get_out_to_loss_grad(
        self,
        model: nn.Module,
        weights: dict[str, Tensor] | None,
        buffers: dict[str, Tensor] | None,
        batch: Sequence[Tensor],
    ) -> Tensor:
        """Return ones, shape ``(B, 1)``: the output is the loss itself."""
        return torch.ones(len(batch[0]), 1, device=batch[0].device)


def resolve_task(task: str | AbstractModelOutput) -> AbstractModelOutput:
    """Return the model output function that a task names.

    Args:
        task: a name that TRAK knows, or a model output function, which is returned as it is.

    Returns:
        The model output function.

    Raises:
        ValueError: TRAK knows no task of that name.
        TypeError: ``task`` is neither.
    """
    if isinstance(task, AbstractModelOutput):
        return task
    if not isinstance(task, str):
        raise TypeError(f"task must be a name or an AbstractModelOutput instance, got {task!r}")
    if task not in TASK_TO_MODELOUT:
        raise ValueError(f"task={task!r} is not known; use one of {', '.join(TASK_TO_MODELOUT)}")
    return TASK_TO_MODELOUT[task]()


def task_name(task: str | AbstractModelOutput) -> str:
    """Return the name under which a store records a task.

    Args:
        task: a name, or a model output function.

    Returns:
        TRAK's name of the task, or one that tells its class and, of a `LossOutput`, its loss.
    """
    if isinstance(task, str):
        return task
    if isinstance(task, LossOutput):
        return task.name
    known = {output: name for name, output in TASK_TO_MODELOUT.items()}
    return known.get(type(task)) or _qualified_name(type(task))


def _qualified_name(thing: object) -> str:
    named = thing if hasattr(thing, "__qualname__") else type(thing)
    return f"{named.__module__}.{named.__qualname__}"
