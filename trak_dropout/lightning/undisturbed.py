"""Computing in the middle of a training run without leaving a trace in it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import pytorch_lightning as pl
import torch
from torch import nn

from trak_dropout._random import random_states_kept
from trak_dropout.attribution import own_precision, preserved
from trak_dropout.lightning.data import set_random_states


@contextmanager
def undisturbed(module: pl.LightningModule, seed: int, weights: bool = False) -> Iterator[None]:
    """Compute gradients in eval mode, and leave everything as it was found.

    Args:
        module: the module.
        seed: random numbers start from it within the block.
        weights: whether the parameters will be changed, too.
    """
    # Compiled code knows nothing of hooks; before torch 2.6 there was no way to step around it.
    stance = getattr(torch.compiler, "set_stance", None)
    # A checkpoint may be saved from the validation loop, which runs in inference mode.
    with (
        random_states_kept(),
        torch.inference_mode(False),
        torch.enable_grad(),
        nullcontext() if stance is None else stance("force_eager"),
        preserved(module, weights),
        own_precision(module),
    ):
        set_random_states(seed, 0)
        module.eval()
        yield


def differs(model: nn.Module, weights: Mapping[str, Any]) -> bool:
    """Whether the model's parameters or buffers are other than those of a state dict.

    Args:
        model: the model.
        weights: the state dict; entries that the model lacks do not count.
    """
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return any(
        name in weights and not torch.equal(tensor, weights[name].to(tensor.device))
        for name, tensor in tensors
    )
