"""Computing in the middle of a training run without leaving a trace in it."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities.seed import isolate_rng

from trak_dropout.attribution import preserved


@contextmanager
def undisturbed(module: pl.LightningModule, seed: int, weights: bool = False) -> Iterator[None]:
    """Compute gradients in eval mode, and leave everything as it was found.

    Args:
        module: the module.
        seed: random numbers start from it within the block.
        weights: whether the parameters will be changed, too.
    """
    # A checkpoint may be saved from the validation loop, which runs in inference mode.
    with (
        isolate_rng(),
        torch.inference_mode(False),
        torch.enable_grad(),
        preserved(module, weights),
    ):
        random.seed(seed)
        np.random.seed(seed % 2**32)  # noqa: NPY002  # for data sets that use it
        torch.manual_seed(seed % 2**63)
        module.eval()
        yield


def differs(module: pl.LightningModule, weights: dict[str, Any]) -> bool:
    """Whether the module's parameters or buffers are other than those of a state dict.

    Args:
        module: the module.
        weights: the state dict; entries that the module lacks do not count.
    """
    tensors = [*module.named_parameters(), *module.named_buffers()]
    return any(
        name in weights and not torch.equal(tensor, weights[name].to(tensor.device))
        for name, tensor in tensors
    )
