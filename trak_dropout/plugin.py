"""`plugin`: the plugs for TRAK's sockets, as keyword arguments of ``TRAKer``."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial, update_wrapper
from typing import Any

import torch
from torch import nn
from trak.modelout_functions import AbstractModelOutput

from trak_dropout.gradients import FactoredGradientComputer
from trak_dropout.masks import DEFAULT_FOLD
from trak_dropout.outputs import task_name
from trak_dropout.projector import DropoutProjector
from trak_dropout.scoring import DampedScoreComputer, check_damping
from trak_dropout.store import ManifestSaver


def plugin(
    model: nn.Module,
    proj_dim: int,
    seed: int = 0,
    proj_type: str = "dropout",
    device: str | torch.device = "cpu",
    grad_wrt: Iterable[str] | None = None,
    damping: float | str = "auto",
    *,
    fold: int = DEFAULT_FOLD,
) -> dict[str, Any]:
    """Return the plugs for TRAK's sockets: ``TRAKer(model=..., ..., **plugin(model, 4096))``.

    Args:
        model: the model to attribute.
        proj_dim: number of columns of the compressed gradients.
        seed: seed of the masks.
        proj_type: the scheme, as for `DropoutProjector`.
        device: where compressed gradients are made; give TRAKer the same.
        grad_wrt: names of the parameters to take gradients of, all when None, frozen ones too;
            passed on to TRAKer.
        damping: relative damping of the scores, as for `DampedScoreComputer`.
        fold: coordinates summed into each column, as for `DropoutProjector`.

    Returns:
        ``projector``, ``gradient_computer``, ``score_computer``, ``saver`` and, where given,
        ``grad_wrt``. With this gradient computer the store knows its task, too.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: an argument is out of range.
    """
    names = None if grad_wrt is None else grad_wrt if isinstance(grad_wrt, str) else list(grad_wrt)
    projector = DropoutProjector.from_model(
        model, proj_dim, seed, proj_type, device, grad_wrt=names, fold=fold
    )
    tasks: list[str] = []
    plugs: dict[str, Any] = {
        "projector": projector,
        "gradient_computer": _noting_task(tasks.append),
        "score_computer": partial(
            DampedScoreComputer, damping=check_damping(damping), scales=lambda: projector.scales
        ),
        # TRAKer gives its task to the gradient computer, and then makes the saver.
        "saver": partial(
            ManifestSaver, projector=projector, task=lambda: tasks.pop() if tasks else None
        ),
    }
    if names is not None:
        plugs["grad_wrt"] = names
    return plugs


def _noting_task(note: Callable[[str], None]) -> type[FactoredGradientComputer]:
    """A `FactoredGradientComputer` that says the name of its task when it is made."""

    class Noting(FactoredGradientComputer):
        def __init__(self, model: nn.Module, task: AbstractModelOutput, *args: Any, **options: Any):
            super().__init__(model, task, *args, **options)
            note(task_name(task))

    update_wrapper(Noting, FactoredGradientComputer, updated=())
    return Noting
