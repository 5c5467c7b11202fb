"""Model output functions that TRAK lacks, and how a task is named."""

from __future__ import annotations

import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from trak.modelout_functions import (
    TASK_TO_MODELOUT,
    AbstractModelOutput,
    ImageClassificationModelOutput,
    TextClassificationModelOutput,
)


class _MinusLoss(AbstractModelOutput, ABC):
    """A model output that is minus a loss, so that its out-to-loss gradient is one."""

    @property
    @abstractmethod
    def name(self) -> str:
        """The name under which stores record it: another loss has another."""

    def get_out_to_loss_grad(
        self,
        model: nn.Module,
        weights: dict[str, Tensor] | None,
        buffers: dict[str, Tensor] | None,
        batch: Sequence[Tensor],
    ) -> Tensor:
        """Return ones, shape ``(B, 1)``: the output is the loss itself."""
        return torch.ones(len(batch[0]), 1, device=batch[0].device)


class LossOutput(_MinusLoss):
    """The model output ``f(z) = -loss(z)``, with an out-to-loss gradient of one.

    With it and `DampedScoreComputer`, TRAK computes the classical influence function
    ``g_target^T (F + lambda I)^-1 g_train`` with the empirical Fisher matrix ``F`` (up to the
    factor ``n`` between ``F`` and the Gram matrix), as in arXiv 2509.15651.

    A batch is ``(*inputs, target)``: the model is called on the inputs, and ``loss_fn`` on its
    output, a tensor, and the target, one sample at a time with a leading dimension of one. A mean
    or a sum over samples is therefore the sample's own loss. (A class weight together with
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
        return f"LossOutput({_loss_name(self.loss_fn)})"

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
            outputs = _tensor(model(*inputs))
            return torch.func.vmap(self._single)(outputs, target)
        output = torch.func.functional_call(
            model, (weights, buffers or {}), tuple(part.unsqueeze(0) for part in inputs)
        )
        return self._single(_tensor(output).squeeze(0), target)

    def get_batch_output(
        self,
        model: nn.Module,
        weights: dict[str, Tensor],
        buffers: dict[str, Tensor] | None,
        *batch: Tensor,
    ) -> Tensor:
        """Compute minus the loss of each sample, with one forward of the model for all.

        Args:
            model: the model.
            weights: its parameters by name.
            buffers: its buffers by name.
            *batch: inputs and targets of a batch.

        Returns:
            ``(B,)``.
        """
        *inputs, target = batch
        outputs = torch.func.functional_call(model, (weights, buffers or {}), tuple(inputs))
        return torch.func.vmap(self._single)(_tensor(outputs), target)

    def _single(self, output: Tensor, target: Tensor) -> Tensor:
        loss = self.loss_fn(output.unsqueeze(0), target.unsqueeze(0))
        if loss.numel() != 1:
            raise ValueError(
                f"loss_fn must return one value for one sample, got shape {tuple(loss.shape)}; "
                "use a loss with reduction='mean' or 'sum'"
            )
        return -loss.reshape(())


def _tensor(output: Any) -> Tensor:
    if isinstance(output, Tensor):
        return output
    raise TypeError(
        f"the model returned a {type(output).__name__}, LossOutput takes a tensor; wrap the model "
        "in a module that returns what loss_fn is to see"
    )


class CausalLMOutput(_MinusLoss):
    """Minus the next-token loss of a sequence, for causal language models.

    A batch is ``(input_ids,)``, ``(input_ids, attention_mask)`` or ``(input_ids, attention_mask,
    labels)``, each ``(B, T)``. Position ``t`` predicts the label at ``t + 1``; where no labels are
    given they are the input tokens, without those that the mask leaves out. Hugging Face models
    are called by keywords, other modules as ``model(input_ids)`` or ``model(input_ids,
    attention_mask)``; they return logits ``(B, T, vocabulary)``, or have them as an attribute.

    As with `LossOutput` the out-to-loss gradient is one, so that scores are influence functions.

    Args:
        reduction: ``"mean"`` or ``"sum"`` over the tokens of a sequence that have a label.
        ignore_index: label of positions that do not count.

    Raises:
        ValueError: ``reduction`` is neither.
    """

    def __init__(self, reduction: str = "mean", ignore_index: int = -100) -> None:
        super().__init__()
        if reduction not in ("mean", "sum"):
            raise ValueError(f"reduction must be 'mean' or 'sum', got {reduction!r}")
        self.reduction = reduction
        self.ignore_index = ignore_index

    @property
    def name(self) -> str:
        """The name under which stores record it."""
        return f"CausalLMOutput({self.reduction}, {self.ignore_index})"

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
            *batch: tensors of one sequence, ``(T,)``, when weights are given, of a batch otherwise.

        Returns:
            A scalar when weights are given, else ``(B,)``.
        """
        if weights is None:
            weights = dict(model.named_parameters())
            return self.get_batch_output(model, weights, buffers, *batch)
        rows = tuple(part.unsqueeze(0) for part in batch)
        return self.get_batch_output(model, weights, buffers, *rows).squeeze(0)

    def get_batch_output(
        self,
        model: nn.Module,
        weights: dict[str, Tensor],
        buffers: dict[str, Tensor] | None,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> Tensor:
        """Compute minus the loss of each sequence, with one forward of the model for all.

        Args:
            model: the model.
            weights: its parameters by name.
            buffers: its buffers by name.
            input_ids: tokens ``(B, T)``.
            attention_mask: which of them count, ``(B, T)``; all when None.
            labels: tokens to predict, ``(B, T)``.

        Returns:
            ``(B,)``; zero for a sequence without labels.
        """
        if hasattr(model, "config") and hasattr(model, "get_input_embeddings"):
            keywords: dict[str, Any] = {"input_ids": input_ids, "use_cache": False}
            if attention_mask is not None:
                keywords["attention_mask"] = attention_mask
            result = torch.func.functional_call(model, (weights, buffers or {}), (), keywords)
        else:
            given = (input_ids,) if attention_mask is None else (input_ids, attention_mask)
            result = torch.func.functional_call(model, (weights, buffers or {}), given)
        logits = result if isinstance(result, Tensor) else result.logits
        if labels is None:
            labels = input_ids
            if attention_mask is not None:
                labels = labels.masked_fill(attention_mask == 0, self.ignore_index)
        losses = nn.functional.cross_entropy(
            logits[:, :-1].float().transpose(1, 2) if logits.dtype.itemsize == 2
            else logits[:, :-1].transpose(1, 2),
            labels[:, 1:],
            reduction="none",
            ignore_index=self.ignore_index,
        )  # fmt: skip
        total = losses.sum(1)
        if self.reduction == "sum":
            return -total
        return -total / (labels[:, 1:] != self.ignore_index).sum(1).clamp_min(1)


def batch_output_of(task: AbstractModelOutput) -> Callable[..., Tensor] | None:
    """Return the function that computes a task's output for all samples of a batch at once.

    Args:
        task: the model output function.

    Returns:
        Its own ``get_batch_output``, which takes model, weights, buffers and the batch and returns
        ``(B,)``; for TRAK's image and text classification the same margin as theirs; else None.
    """
    own: Callable[..., Tensor] | None = getattr(task, "get_batch_output", None)
    return own or _BATCH_OUTPUTS.get(type(task))


def out_to_loss_of(task: AbstractModelOutput) -> Callable[[Tensor], Tensor] | None:
    """Return the function that computes out-to-loss gradients from a task's outputs.

    Args:
        task: the model output function.

    Returns:
        For TRAK's image and text classification, whose output is the margin ``log(p / (1 - p))``,
        one minus the probability ``p`` of the label, ``(B,)`` to ``(B,)``; else None.
    """
    plain = type(task) in _BATCH_OUTPUTS and getattr(task, "loss_temperature", 1.0) == 1.0
    return _one_minus_probability if plain else None


def _one_minus_probability(margins: Tensor) -> Tensor:
    return torch.sigmoid(-margins)


def _image_margins(
    model: nn.Module, weights: Any, buffers: Any, images: Tensor, labels: Tensor
) -> Tensor:
    return _margins(torch.func.functional_call(model, (weights, buffers), images), labels)


def _text_margins(model: nn.Module, weights: Any, buffers: Any, *batch: Tensor) -> Tensor:
    names = ("input_ids", "token_type_ids", "attention_mask")
    inputs = dict(zip(names, batch[:3], strict=True))
    logits = torch.func.functional_call(model, (weights, buffers), (), inputs)
    return _margins(logits, batch[3])


def _margins(logits: Tensor, labels: Tensor) -> Tensor:
    """Logit of the label minus the log-sum-exp of all others, ``(B,)``."""
    at = labels.unsqueeze(1)
    others = logits.scatter(1, at, -torch.inf).logsumexp(1)
    return logits.gather(1, at).squeeze(1) - others


_BATCH_OUTPUTS: dict[type[AbstractModelOutput], Callable[..., Tensor]] = {
    ImageClassificationModelOutput: _image_margins,
    TextClassificationModelOutput: _text_margins,
}


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
    if isinstance(task, _MinusLoss):
        return task.name
    known = {output: name for name, output in TASK_TO_MODELOUT.items()}
    return known.get(type(task)) or _qualified_name(type(task))


def _loss_name(loss: Any) -> str:
    """A name that tells a loss and its settings, the same in every process."""
    if isinstance(loss, partial):
        given = [*map(_value, loss.args), *_settings(loss.keywords)]
        return _with(_loss_name(loss.func), given)
    if not isinstance(loss, nn.Module):
        return _qualified_name(loss)
    # Most losses have a repr without settings. Those as by default stay unnamed.
    own = {
        name: getattr(loss, name)
        for name, parameter in signature(type(loss)).parameters.items()
        if hasattr(loss, name) and _value(getattr(loss, name)) != _value(parameter.default)
    }
    return _with(str(loss), _settings(own))


def _with(name: str, settings: Sequence[str]) -> str:
    return f"{name} with {', '.join(settings)}" if settings else name


def _settings(values: Mapping[str, Any]) -> list[str]:
    return [f"{name}={_value(value)}" for name, value in sorted(values.items())]


def _value(value: Any) -> str:
    """A setting's value, of a tensor its checksum."""
    if isinstance(value, Tensor):
        content = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        return f"tensor {tuple(value.shape)} {zlib.crc32(content.tobytes()):08x}"
    if value is None or isinstance(value, bool | int | float | str):
        return repr(value)
    if isinstance(value, list | tuple):
        return f"({', '.join(map(_value, value))})"
    return _loss_name(value) if callable(value) else _qualified_name(type(value))


def _qualified_name(thing: object) -> str:
    named = thing if hasattr(thing, "__qualname__") else type(thing)
    return f"{named.__module__}.{named.__qualname__}"
