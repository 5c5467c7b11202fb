"""DenseGradientComputer against TRAK's computer and against autograd one sample at a time."""

from typing import Any

import pytest
import torch
from cases import convnet, digits, mlp, per_sample_gradients, trained
from torch import Tensor, nn
from trak.gradient_computers import FunctionalGradientComputer
from trak.modelout_functions import (
    ImageClassificationModelOutput,
    IterativeImageClassificationModelOutput,
)

from trak_dropout import BatchError, DenseGradientComputer


def batch(n: int = 9) -> list[Tensor]:
    images, labels = digits()
    return [images[:n], labels[:n]]


def margin(model: nn.Module, image: Tensor, label: Tensor) -> Tensor:
    logits = model(image)[0]
    others = torch.cat([logits[: label[0]], logits[label[0] + 1 :]])
    return logits[label[0]] - others.logsumexp(0)


@pytest.mark.parametrize("grad_wrt", [None, ["7.bias", "0.weight"], ("5.factor",)])
def test_equals_trak_to_the_bit(grad_wrt: list[str] | None) -> None:
    model = trained(convnet(), 1)
    task = ImageClassificationModelOutput()
    theirs = FunctionalGradientComputer(model, task, 0, torch.float32, "cpu", grad_wrt)
    ours = DenseGradientComputer(model, task, 0, torch.float32, "cpu", grad_wrt)
    expected, actual = (c.compute_per_sample_grad(batch()) for c in (theirs, ours))
    assert list(actual) == list(expected)
    assert all(torch.equal(actual[name], expected[name]) for name in expected)
    assert torch.equal(ours.compute_loss_grad(batch()), theirs.compute_loss_grad(batch()))


def test_equals_autograd_one_sample_at_a_time() -> None:
    model = trained(convnet(), 1)
    computer = DenseGradientComputer(model, ImageClassificationModelOutput())
    grads = computer.compute_per_sample_grad(batch())
    flat = torch.cat([grad.reshape(9, -1) for grad in grads.values()], 1)
    expected = per_sample_gradients(model, margin, batch())
    torch.testing.assert_close(flat, expected, rtol=1e-3, atol=1e-5)


def test_other_parameters_are_not_differentiated(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    real = torch.func.grad

    def spy(function):
        return lambda varied, *sample: seen.append(list(varied)) or real(function)(varied, *sample)

    monkeypatch.setattr(torch.func, "grad", spy)
    computer = DenseGradientComputer(mlp(), ImageClassificationModelOutput(), grad_wrt=["3.bias"])
    computer.compute_per_sample_grad(batch())
    assert seen == [["3.bias"]]


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda x, y: {"x": x, "y": y}, r"takes a tuple of tensors \(image, label\), got a dict"),
        (lambda x, y: x, "got a Tensor"),
        (lambda x, y: [], "got a list"),
        (lambda x, y: [x], r"got \(float32 \(9, 1, 8, 8\)\)"),
        (lambda x, y: [x, y, y], "got .*int64 .*int64"),
        (lambda x, y: [x, "label"], "str"),
        (lambda x, y: [x, y[:5]], "first dimensions must be equal"),
        (lambda x, y: [x, y.float()], r"failed on .*float32 \(9,\)"),
        (lambda x, y: [x[:, :, :4], y], "failed on"),
    ],
)
def test_batches_the_task_cannot_take(make, words: str) -> None:
    computer = DenseGradientComputer(mlp(), ImageClassificationModelOutput())
    with pytest.raises(BatchError, match=words):
        computer.compute_per_sample_grad(make(*batch()))
    with pytest.raises(BatchError, match=words):
        computer.compute_loss_grad(make(*batch()))


def test_iterative_outputs_are_refused() -> None:
    with pytest.raises(TypeError, match="use task='image_classification'"):
        DenseGradientComputer(mlp(), IterativeImageClassificationModelOutput())


def test_what_is_no_model_is_refused() -> None:
    weights: Any = mlp().state_dict()
    with pytest.raises(TypeError, match="model must be an nn.Module, got OrderedDict"):
        DenseGradientComputer(weights, ImageClassificationModelOutput())
