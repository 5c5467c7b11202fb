"""The self-check's comparison of samples with plain autograd."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from trak.modelout_functions import AbstractModelOutput

import trak_dropout as td
from trak_dropout import FactoredGradientComputer, FactorError
from trak_dropout.gradients import alone


@pytest.mark.parametrize("size", [3, 5, 7, 30, 101])
def test_large_entries_are_found_block_by_block(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    monkeypatch.setattr(alone, "_SHORT", 4)
    monkeypatch.setattr(alone, "_BLOCK", 5)
    flat = torch.randn(size, generator=torch.Generator().manual_seed(size))
    places, largest = alone._largest(flat, 3)
    assert set(places.tolist()) == set(flat.abs().topk(3).indices.tolist())
    assert largest == float(flat.abs().max())
    flat[size // 2] = math.nan
    assert math.isnan(alone._largest(flat, 3)[1])


class Kinked(nn.Module):
    """Units that are on in a batch and off alone, by what they are shifted.

    Args:
        shift: how far from the kink they are.
    """

    def __init__(self, shift: float) -> None:
        super().__init__()
        self.first, self.last, self.shift = nn.Linear(5, 7), nn.Linear(7, 3), shift

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        together = len(x) > 1 or torch._C._functorch.is_batchedtensor(x)
        near = y - y.detach() + (self.shift if together else -self.shift)
        return self.last(torch.cat([near[:, :1].relu(), y[:, 1:]], 1))


class Squares(AbstractModelOutput):
    """An output that TRAK's own classes do not have, of which only a sample's is known."""

    def __init__(self) -> None:
        """Have nothing to set."""

    def get_output(self, model: nn.Module, weights: Any, buffers: Any, *batch: Tensor) -> Tensor:
        out = torch.func.functional_call(model, (weights, buffers), (batch[0].unsqueeze(0),))
        return out.square().sum()

    def get_out_to_loss_grad(
        self, model: nn.Module, weights: Any, buffers: Any, batch: Any
    ) -> Tensor:
        return torch.ones(len(batch[0]), 1)


class BatchedSquares(Squares):
    """The same, of whole batches as well."""

    def get_batch_output(
        self, model: nn.Module, weights: Any, buffers: Any, *batch: Tensor
    ) -> Tensor:
        out = torch.func.functional_call(model, (weights, buffers), (batch[0],))
        return out.square().sum(1)


@pytest.mark.parametrize("task", [Squares(), BatchedSquares()])
@pytest.mark.parametrize("into", [False, True])
def test_rounding_over_a_kink_is_no_error(task: Squares, into: bool) -> None:
    torch.manual_seed(0)
    x = torch.randn(6, 5)
    model = Kinked(1e-9)
    computer = FactoredGradientComputer(model, task)
    expected = []
    for i in range(6):  # with the units on, as in the batch
        model.zero_grad()
        model(x).square().sum(1)[i].backward()
        expected.append(torch.cat([p.grad.flatten() for p in model.parameters()]))  # type: ignore[union-attr]
    projector = td.DropoutProjector.from_model(model, 32, fold=1)
    if into:
        found = computer.compute_into([x], projector.shares(0, torch.device("cpu")))
    else:
        found = projector.project(computer.compute_per_sample_grad([x]), 0)
    torch.testing.assert_close(found, projector.project(torch.stack(expected), 0))
    assert "rule of Linear" in computer.describe()


@pytest.mark.parametrize("task", [Squares(), BatchedSquares()])
def test_an_output_that_differs_is_one(task: Squares) -> None:
    torch.manual_seed(0)
    with pytest.raises(FactorError, match=r"first\.weight .* differs from autograd's"):
        FactoredGradientComputer(Kinked(0.1), task, batched=True).compute_per_sample_grad(
            [torch.randn(6, 5)]
        )
