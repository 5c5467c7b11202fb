"""Which part of a LightningModule gradients are taken of, and of what."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import filter as matching
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.utilities import rank_zero_warn
from pytorch_lightning.utilities.exceptions import (  # type: ignore[attr-defined]
    MisconfigurationException,
)
from torch import nn
from trak.modelout_functions import AbstractModelOutput

from trak_dropout.attribution import whole
from trak_dropout.outputs import LossOutput

OWN_LOSS = "loss"
_LOSS_NAMES = ("loss_fn", "criterion", "loss_function", "loss")


def submodule(module: pl.LightningModule, name: str | None) -> nn.Module:
    """Return the part of a module that is called on batches.

    Args:
        module: the module.
        name: of a submodule, with dots; the whole module when None.

    Raises:
        MisconfigurationException: there is no such submodule.
    """
    if name is None:
        return module
    try:
        found = module.get_submodule(name)
    except AttributeError as error:
        children = ", ".join(child for child, _ in module.named_children())
        raise MisconfigurationException(
            f"GradientCollector(model={name!r}): {error}; {type(module).__name__} has {children}"
        ) from error
    return whole(found)


def submodule_weights(
    module: pl.LightningModule, model: nn.Module, weights: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the entries of a module's state dict that belong to a part of it.

    Args:
        module: the module.
        model: a submodule, or the module itself.
        weights: the state dict.

    Returns:
        The entries by their names in ``model``.
    """
    names = [name for name, child in module.named_modules() if child is model]
    prefix = f"{names[0]}." if names[0] else ""
    return {
        name.removeprefix(prefix): tensor
        for name, tensor in weights.items()
        if name.startswith(prefix)
    }


def parameter_names(model: nn.Module, wanted: str | Sequence[str] | None) -> list[str] | None:
    """Return the parameters that names and patterns stand for, in their order in the model.

    Args:
        model: the model.
        wanted: names, or patterns as of the shell, such as ``"encoder.*.weight"``; None for all.

    Raises:
        MisconfigurationException: one of them stands for no parameter.
    """
    if wanted is None:
        return None
    known = [name for name, _ in model.named_parameters()]
    chosen: set[str] = set()
    for pattern in [wanted] if isinstance(wanted, str) else wanted:
        found = [pattern] if pattern in known else matching(known, pattern)
        if not found:
            raise MisconfigurationException(
                f"GradientCollector(grad_wrt={wanted!r}): {pattern!r} matches no parameter of "
                f"{type(model).__name__}, which has {', '.join(known[:12])}"
                + (", ..." if len(known) > 12 else "")
            )
        chosen.update(found)
    return [name for name in known if name in chosen]


def own_loss(module: nn.Module) -> AbstractModelOutput:
    """Build a model output of the loss function that a module has as an attribute.

    Args:
        module: the module.

    Raises:
        MisconfigurationException: it has none under one of the usual names.
    """
    for name in _LOSS_NAMES:
        loss = getattr(module, name, None)
        if callable(loss):
            weighted = isinstance(loss, nn.CrossEntropyLoss | nn.NLLLoss) and (
                loss.weight is not None and loss.reduction == "mean"
            )
            if weighted:
                rank_zero_warn(
                    f"GradientCollector(task={OWN_LOSS!r}): {type(module).__name__}.{name} divides "
                    "by the class weights of its samples, so that for a single one its weight "
                    "cancels: this task is the loss without class weights. To keep them, give task="
                    f"trak_dropout.LossOutput({type(loss).__name__}(weight=..., reduction='sum'))"
                )
            return LossOutput(loss)
    raise MisconfigurationException(
        f"GradientCollector(task={OWN_LOSS!r}): {type(module).__name__} has no loss function as "
        f"attribute {', '.join(_LOSS_NAMES)}, called on (output, target); give "
        "task=trak_dropout.LossOutput(your_loss)"
    )
