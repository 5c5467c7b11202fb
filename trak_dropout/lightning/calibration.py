"""What weighted dropout draws by, where gradients are those of training steps."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor

from trak_dropout._random import random_states_kept
from trak_dropout.attribution import to_device
from trak_dropout.gradients.factors import FactoredGradient
from trak_dropout.gradients.live import Layouts, LiveGradients
from trak_dropout.lightning.processes import Processes
from trak_dropout.lightning.subject import submodule
from trak_dropout.lightning.tryout import loss_of, twin_of
from trak_dropout.projector import DropoutProjector
from trak_dropout.reading import batch_size_of, read_groups, spaced
from trak_dropout.store import Store


def calibrate_by_steps(
    projector: DropoutProjector,
    owner: int | None,
    trainer: pl.Trainer,
    module: pl.LightningModule,
    part: str | None,
    layouts: Layouts | None,
    samples: int,
) -> None:
    """Calibrate weighted dropout with the gradients of training steps, on a copy of the module.

    Dropout and batch statistics are as in training. Each of the batches holds samples from all over
    the data set.

    Args:
        projector: to be calibrated; knows the parameters.
        owner: the checkpoint whose statistics they are; None for all checkpoints.
        trainer: the Trainer, whose training loader is ready.
        module: the module; it is left as it is, and so are random states.
        part: the submodule whose gradients are taken, by name; the module itself when None.
        layouts: where its layers have their samples.
        samples: how many samples to take, about.

    Raises:
        ValueError: gradients are all zero or not finite.
    """
    assert projector.layout is not None
    names = projector.layout.names
    with random_states_kept(), torch.inference_mode(False), torch.enable_grad():
        twin = twin_of(module, trainer)
        model = submodule(twin, part)
        whole = _Whole(dict(model.named_parameters()), names)
        # Without AMP's float16, whose gradients vanish unless their loss is scaled.
        halved = getattr(trainer.precision_plugin, "scaler", None) is not None

        def gradients() -> Iterator[Mapping[str, FactoredGradient]]:
            for group, batch in _batches(trainer.train_dataloader, samples):
                live.begin(len(group))
                context = nullcontext() if halved else trainer.precision_plugin.forward_context()
                with context:
                    loss = loss_of(twin, to_device(module, batch, module.device))
                live.expect()
                loss.backward()  # type: ignore[no-untyped-call]
                live.end()
                yield whole.taken()
                twin.zero_grad(set_to_none=True)

        with LiveGradients(model, whole, names, layouts=layouts, check=False) as live:
            projector.calibrate(gradients(), owner, samples=samples)


def take_over_statistics(projector: DropoutProjector, root: Path, processes: Processes) -> None:
    """Give the projectors of other processes the statistics that the first one has stored."""
    if projector.proj_type == "weighted_dropout" and not processes.is_first:
        for owner, statistics in Store(root).projector().statistics.items():
            if owner not in projector.statistics:
                projector.set_statistics(statistics, owner)


def _batches(loader: Any, samples: int) -> Iterator[tuple[list[int], Any]]:
    """Batches as large as the loader's, with the indices of their samples."""
    size = len(loader.dataset)
    each = min(batch_size_of(loader), size)
    number = max(1, min(samples, size) // each)
    every = spaced(number * each, size)
    groups = [every[i::number] for i in range(number)]
    return zip(groups, read_groups(loader, groups, loader.collate_fn), strict=True)


class _Whole:
    """Stands where `LiveGradients` expects a mask, and holds whole gradients as factors.

    Args:
        weights: the parameters.
        names: of those whose gradients are wanted, in order.
    """

    def __init__(self, weights: Mapping[str, Tensor], names: Sequence[str]) -> None:
        self._weights = {name: weights[name] for name in names}
        self.names = frozenset(names)

    def zeros(self, samples: int) -> Tensor:
        """Begin a batch; what is returned is no use."""
        self._held = {
            name: FactoredGradient([], samples, weight) for name, weight in self._weights.items()
        }
        return torch.zeros(samples, 1)

    def add(self, out: Tensor, name: str, gradient: FactoredGradient | Tensor) -> None:
        """Take a contribution to a parameter's gradients."""
        assert isinstance(gradient, FactoredGradient)
        self._held[name].factors += gradient.factors

    def held(self, name: str, gradient: FactoredGradient) -> FactoredGradient:
        """What to hold of a parameter's gradient, of which all coordinates are needed."""
        return gradient.held()

    def add_all(self, out: Tensor, gradients: Mapping[str, FactoredGradient]) -> None:
        """Take contributions to several parameters' gradients."""
        for name, gradient in gradients.items():
            self.add(out, name, gradient)

    def finish(self, out: Tensor) -> Tensor:
        """End a batch."""
        return out

    def taken(self) -> dict[str, FactoredGradient]:
        """Hand over the gradients of the last batch."""
        held, self._held = self._held, {}
        return held
