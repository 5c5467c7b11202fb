"""Gradients of vectors: the entries that are asked for, as autograd has them for each sample."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn

import trak_dropout as td
from trak_dropout.gradients.factors import FactoredGradient
from trak_dropout.gradients.live import LiveGradients
from trak_dropout.gradients.rules import rule_of
from trak_dropout.gradients.vectors import Sums
from trak_dropout.lightning.calibration import _Whole


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def trained_norm(batch: bool) -> nn.Module:
    norm = nn.BatchNorm2d(6).double()
    norm(torch.randn(8, 6, 3, 3).double() + 2)  # running statistics of their own
    return norm.train(batch)


LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "batch norm": (lambda: trained_norm(False), (6, 5, 4)),
    "batch norm, of the batch": (lambda: trained_norm(True), (6, 5, 4)),
    "batch norm without statistics": (
        lambda: nn.BatchNorm1d(6, track_running_stats=False).double().eval(), (6, 7),
    ),
    "batch norm of vectors": (lambda: nn.BatchNorm1d(6).double().eval(), (6,)),
    "group norm": (lambda: nn.GroupNorm(3, 6).double(), (6, 5, 4)),
    "layer norm": (lambda: nn.LayerNorm(6).double(), (5, 6)),
    "layer norm of several dimensions": (lambda: nn.LayerNorm((5, 6)).double(), (3, 5, 6)),
    "layer norm of vectors": (lambda: nn.LayerNorm(6).double(), (6,)),
    "convolution": (lambda: nn.Conv2d(2, 6, 3).double(), (2, 5, 4)),
    "linear": (lambda: nn.Linear(4, 6).double(), (5, 4)),
}  # fmt: skip


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("held", [False, True])
def test_entries_are_those_of_autograd(name: str, held: bool) -> None:
    torch.manual_seed(0)
    build, shape = LAYERS[name]
    layer, x = build(), torch.randn(4, *shape, dtype=torch.float64)
    with torch.no_grad():
        output = layer(x)
    gradient = torch.randn_like(output)
    found = rule_of(layer)
    assert found is not None
    factors = found.function(layer, [x.unsqueeze(1)], gradient.unsqueeze(1))
    for own, weight in layer.named_parameters():
        if not isinstance(factors[own], Sums):
            continue
        size = weight.numel()
        # A sample's part of the batch's gradient comes through its own output gradients alone.
        expected = torch.empty(4, size, dtype=torch.float64)
        for i in range(4):
            layer.zero_grad()
            of_one = torch.zeros_like(gradient)
            of_one[i] = gradient[i]
            (layer(x) * of_one).sum().backward()
            assert weight.grad is not None
            expected[i] = weight.grad.flatten()
        factor = factors[own].held() if held else factors[own]
        each = FactoredGradient([factor], 4, weight.detach())
        torch.testing.assert_close(each.form().flatten(1), expected)
        many = torch.randint(size, (3 * size,))
        for budget in (2**20, 100):
            each = FactoredGradient([factor], 4, weight.detach(), budget)
            for flat in (
                torch.tensor([size - 2]),
                torch.tensor([4, 0, 2]),
                torch.arange(size),
                many,
            ):
                for one in (each, each.held(flat)):
                    taken = torch.zeros(4, len(flat), dtype=torch.float64)
                    for part, at, values in one.take(one.coordinates(flat)):
                        taken[part, at] += values
                    torch.testing.assert_close(taken, expected[:, flat])


def test_a_long_sum_does_not_depend_on_its_batch(two_threads: None) -> None:
    values = torch.randn(3, 1, 4, 300, 301)  # long enough to be cut among threads

    def taken(samples: slice) -> Tensor:
        each = FactoredGradient([Sums(values[samples])], len(values[samples]), torch.zeros(4))
        ((_, _, found),) = each.take(each.coordinates(torch.tensor([2])))
        return found

    assert torch.equal(taken(slice(3))[1:2], taken(slice(1, 2)))


def test_what_only_sums_need_is_not_held() -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(64, 3))
    computer = td.FactoredGradientComputer(
        model.eval(), td.LossOutput(nn.CrossEntropyLoss(reduction="none"))
    )
    grads = computer.compute_per_sample_grad([torch.randn(5, 1, 6, 6), torch.randint(3, (5,))])
    assert grads.factored["1.weight"].nbytes == grads.factored["1.bias"].nbytes == 5 * 4 * 4


def test_calibration_holds_sums_not_activations() -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4).eval(), nn.Flatten())
    weights = dict(model.named_parameters())
    whole = _Whole(weights, list(weights))
    live = LiveGradients(model, whole, weights, check=False)
    with live:
        live.begin(5)
        loss = model(torch.randn(5, 1, 6, 6)).square().mean()
        live.expect()
        loss.backward()
        live.end()
    held = whole.taken()
    assert held["1.weight"].nbytes == held["1.bias"].nbytes == 5 * 4 * 4
