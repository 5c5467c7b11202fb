"""Trying a training step on a copy of the module, before training begins."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers.logger import DummyLogger
from pytorch_lightning.utilities.exceptions import (  # type: ignore[attr-defined]
    MisconfigurationException,
)
from pytorch_lightning.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor, nn

from trak_dropout._random import random_states_kept
from trak_dropout.attribution import to_device
from trak_dropout.collation import ReorderingError
from trak_dropout.gradients import FactorError
from trak_dropout.gradients.intake import Shares
from trak_dropout.gradients.live import (
    CallLayout,
    Reduction,
    check_order,
    check_samples,
    find_layouts,
)
from trak_dropout.lightning.subject import submodule
from trak_dropout.reading import check_order_kept, read_groups, spaced

_SAMPLES = 3


class TryoutError(FactorError):
    """A training step cannot be tried by itself."""


def try_training_step(
    trainer: pl.Trainer,
    module: pl.LightningModule,
    part: str | None,
    shares: Shares,
    names: Sequence[str],
    check: bool,
) -> tuple[Mapping[str, Sequence[CallLayout]], Reduction | None]:
    """Learn how a module's layers see a batch, and compare rows with plain autograd.

    A copy of the module, whose Trainer has no logger, takes training steps on a few samples of the
    training set: on one sample twice and three times, to see where layers have their samples, and,
    with dropout and batch statistics turned off, of three samples, in two orders, and of each of
    them by itself, whose gradients must agree.

    Args:
        trainer: the Trainer, whose training loader is ready.
        module: the module; it is left as it is, and so are random states.
        part: the submodule whose gradients are taken, by name; the module itself when None.
        shares: a mask.
        names: the parameters that the mask was drawn for, by their names in that part.
        check: whether gradients that do not agree are an error.

    Returns:
        Where layers have their samples, and whether the loss is a mean or a sum over samples; None
        for the latter where they do not agree.

    Raises:
        TryoutError: samples cannot be read, or the copy's training step fails.
        FactorError: layers do not tell where their samples are, or, where that is checked, rows are
            not the gradients of single samples.
    """
    with random_states_kept(), torch.inference_mode(False), torch.enable_grad():
        batches = _read(trainer.train_dataloader)

        def step(twin: pl.LightningModule, which: Sequence[int], seed: int = 0) -> Tensor:
            torch.manual_seed(seed)
            batch = to_device(module, copy.deepcopy(batches[tuple(which)]), module.device)
            with trainer.precision_plugin.forward_context():
                return loss_of(twin, batch)

        def run(work: Callable[[pl.LightningModule], Any]) -> Any:
            try:
                return work(twin_of(module, trainer))
            except (FactorError, torch.OutOfMemoryError):
                raise
            except Exception as error:
                raise TryoutError(
                    "a training step of a copy of the module, on a few samples, failed: "
                    f"{type(error).__name__}: {error}"
                ) from error

        layouts = run(
            lambda twin: find_layouts(
                submodule(twin, part), names, lambda count: step(twin, [0] * count)
            )
        )

        def draws(twin: pl.LightningModule) -> bool:
            first, second = (step(twin, range(_SAMPLES), seed) for seed in (0, 1))
            return not torch.equal(first, second)

        def compare(settle: Callable[[nn.Module], object]) -> Reduction:
            def work(twin: pl.LightningModule) -> Reduction:
                settle(twin)
                model = submodule(twin, part)
                return check_samples(
                    model, shares, names, layouts, lambda which: step(twin, which), _SAMPLES
                )

            return run(work)

        try:  # in training mode, because a step may do other things than in evaluation
            return layouts, compare(_settle_random)
        except FactorError:
            try:
                return layouts, compare(lambda twin: twin.eval())
            except FactorError as error:
                if check and run(lambda twin: draws(twin.eval())):
                    raise FactorError(
                        "a training step draws random numbers of its own, such as for noise or "
                        "augmentation, so a sample by itself cannot be compared with a batch"
                    ) from error
                if check:
                    raise

        def order(twin: pl.LightningModule) -> None:
            _settle_random(twin)
            check_order(submodule(twin, part), names, layouts, lambda which: step(twin, which))

        run(order)
        return layouts, None


def _read(loader: Any) -> dict[tuple[int, ...], Any]:
    """Read a few samples, as the loader does, into batches of some of them."""
    size = len(loader.dataset)

    def read(indices: Iterable[int]) -> Iterable[Any]:
        group = [index % size for index in indices]
        return read_groups(loader, [group], _Batches(loader.collate_fn))

    try:
        check_order_kept(loader)
    except ReorderingError as error:
        raise MisconfigurationException(f"GradientCollector: {error}") from error
    failure: Exception | None = None
    # From all over it, because neighbors are often of one class; but those may not be alike.
    for indices in (spaced(_SAMPLES, size), range(_SAMPLES)):
        try:
            (found,) = read(indices)
            return found
        except Exception as error:
            failure = failure or error
    raise TryoutError(
        f"{_SAMPLES} samples of the training dataset cannot be read: "
        f"{type(failure).__name__}: {failure}"
    ) from failure


class _Batches:
    """Collates several batches of the same few samples.

    Args:
        collate: what makes a batch.
    """

    def __init__(self, collate: Callable[[list[Any]], Any]) -> None:
        self._collate = collate

    def __call__(self, samples: list[Any]) -> dict[tuple[int, ...], Any]:
        every = tuple(range(_SAMPLES))
        made: dict[tuple[int, ...], Any] = {}
        # The same sample several times has the same length.
        orders = every, every[::-1], (0, 1, 0)
        for which in ((0, 0), (0, 0, 0), *orders, *((i,) for i in every)):
            torch.manual_seed(0)
            made[which] = self._collate([samples[i] for i in which])
        return made


class _Quiet:
    """A Trainer to a module that is tried: what is read is the Trainer's, but for its loggers."""

    def __init__(self, trainer: pl.Trainer) -> None:
        self._trainer = trainer
        self.logger = DummyLogger()
        self.loggers = [self.logger]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._trainer, name)


def twin_of(module: pl.LightningModule, trainer: pl.Trainer) -> pl.LightningModule:
    """Copy a module; the copy reads its Trainer, but logs nothing."""
    twin = copy.deepcopy(module)  # without its Trainer
    twin.zero_grad(set_to_none=True)
    twin._trainer = _Quiet(trainer)  # type: ignore[assignment]
    for name in ("log", "log_dict", "print"):
        setattr(twin, name, lambda *_, **__: None)
    return twin


def _settle_random(twin: nn.Module) -> None:
    """Turn off what makes samples depend on chance or on each other."""
    kinds = (nn.modules.dropout._DropoutNd, nn.modules.batchnorm._BatchNorm)
    for part in twin.modules():
        if isinstance(part, kinds):
            part.eval()


def loss_of(module: pl.LightningModule, batch: Any) -> Tensor:
    """Take a module's training step, whose batch is on its device.

    Raises:
        TryoutError: it does not return a loss.
    """
    given = [batch]
    if is_param_in_hook_signature(module.training_step, "batch_idx", min_args=2):
        given.append(0)
    output = module.training_step(*given)
    loss = output.get("loss") if isinstance(output, Mapping) else output
    if not isinstance(loss, Tensor):
        raise TryoutError(f"training_step returned {type(loss).__name__} instead of a loss")
    return loss
