"""Trying a training step on a copy of the module, before training begins."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers.logger import DummyLogger
from pytorch_lightning.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor, nn

from trak_dropout._random import random_states_kept
from trak_dropout.attribution import to_device
from trak_dropout.gradients import FactorError
from trak_dropout.gradients.intake import Shares
from trak_dropout.gradients.live import CallLayout, Reduction, check_samples, find_layouts
from trak_dropout.lightning.subject import submodule

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

    A copy of the module, whose Trainer has no logger, takes training steps on the first samples of
    the training set: of two and of three samples, to see where layers have their samples, and, with
    dropout and batch statistics turned off, of three samples and of each of them by itself, whose
    gradients must agree.

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
        TryoutError: the copy's training step fails.
        FactorError: layers do not tell where their samples are, or, where that is checked, rows are
            not the gradients of single samples.
    """
    loader: Any = trainer.train_dataloader
    with random_states_kept(), torch.inference_mode(False), torch.enable_grad():
        items = [loader.dataset[i % len(loader.dataset)] for i in range(_SAMPLES)]

        def step(twin: pl.LightningModule, which: Sequence[int]) -> Tensor:
            torch.manual_seed(0)
            batch = to_device(module, loader.collate_fn([items[i] for i in which]), module.device)
            with trainer.precision_plugin.forward_context():
                return _loss_of(twin, batch)

        def run(work: Callable[[pl.LightningModule], Any]) -> Any:
            try:
                return work(_twin(module, trainer))
            except (FactorError, torch.OutOfMemoryError):
                raise
            except Exception as error:
                raise TryoutError(
                    "a training step of a copy of the module, on a few samples, failed: "
                    f"{type(error).__name__}: {error}"
                ) from error

        layouts = run(
            lambda twin: find_layouts(
                submodule(twin, part), names, lambda count: step(twin, range(count))
            )
        )

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
            except FactorError:
                if check:
                    raise
                return layouts, None


class _Quiet:
    """A Trainer to a module that is tried: what is read is the Trainer's, but for its loggers."""

    def __init__(self, trainer: pl.Trainer) -> None:
        self._trainer = trainer
        self.logger = DummyLogger()
        self.loggers = [self.logger]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._trainer, name)


def _twin(module: pl.LightningModule, trainer: pl.Trainer) -> pl.LightningModule:
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


def _loss_of(module: pl.LightningModule, batch: Any) -> Tensor:
    given = [batch]
    if is_param_in_hook_signature(module.training_step, "batch_idx", min_args=2):
        given.append(0)
    output = module.training_step(*given)
    loss = output.get("loss") if isinstance(output, Mapping) else output
    if not isinstance(loss, Tensor):
        raise TryoutError(f"training_step returned {type(loss).__name__} instead of a loss")
    return loss
