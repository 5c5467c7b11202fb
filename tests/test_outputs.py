"""LossOutput against autograd, and task names."""

import copy
from collections.abc import Sequence
from functools import partial
from typing import Any

import pytest
import torch
from cases import convnet, digits, per_sample_gradients, trained
from torch import Tensor, nn
from trak.gradient_computers import IterativeGradientComputer
from trak.modelout_functions import ImageClassificationModelOutput
from trak.utils import get_num_params

from trak_dropout import DenseGradientComputer, FactoredGradientComputer, LossOutput
from trak_dropout.gradients import BatchError
from trak_dropout.outputs import resolve_task, task_name


def batch(n: int = 6) -> list[Tensor]:
    images, labels = digits()
    return [images[:n], labels[:n]]


@pytest.mark.parametrize(
    "loss",
    [
        nn.functional.cross_entropy,
        nn.CrossEntropyLoss(label_smoothing=0.1),
        lambda o, t: nn.functional.cross_entropy(o, t, reduction="none"),
        lambda o, t: nn.functional.cross_entropy(2 * o, t, reduction="sum"),
    ],
)
def test_gradients_are_those_of_minus_the_loss(loss) -> None:
    model = trained(convnet(), 1)
    expected = per_sample_gradients(model, lambda m, x, y: -loss(m(x), y).sum(), batch())
    grads = DenseGradientComputer(model, LossOutput(loss)).compute_per_sample_grad(batch())
    flat = torch.cat([g.reshape(6, -1) for g in grads.values()], 1)
    torch.testing.assert_close(flat, expected, rtol=1e-3, atol=1e-5)


def test_works_with_traks_iterative_computer() -> None:
    model, output = trained(convnet(), 1), LossOutput(nn.CrossEntropyLoss())
    iterative = IterativeGradientComputer(
        model, output, get_num_params(model), torch.float32, "cpu"
    ).compute_per_sample_grad(batch())
    dense = DenseGradientComputer(model, output).compute_per_sample_grad(batch())
    flat = torch.cat([g.reshape(6, -1) for g in dense.values()], 1)
    torch.testing.assert_close(iterative, flat, rtol=1e-3, atol=1e-5)


def test_regression_with_several_inputs() -> None:
    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(3, 2)

        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return self.linear(a + b)

    model, data = Sum(), [torch.randn(5, 3), torch.randn(5, 3), torch.randn(5, 2)]
    output = LossOutput(nn.functional.mse_loss)
    expected = per_sample_gradients(
        model, lambda m, a, b, t: -nn.functional.mse_loss(m(a, b), t), data
    )
    grads = DenseGradientComputer(model, output).compute_per_sample_grad(data)
    torch.testing.assert_close(torch.cat([g.reshape(5, -1) for g in grads.values()], 1), expected)


def test_out_to_loss_gradient_is_one() -> None:
    computer = DenseGradientComputer(convnet(), LossOutput(nn.functional.cross_entropy))
    assert torch.equal(computer.compute_loss_grad(batch()), torch.ones(6, 1))


def test_bad_losses() -> None:
    with pytest.raises(TypeError, match="loss_fn must be callable"):
        LossOutput("cross_entropy")
    per_class = LossOutput(lambda output, target: output)
    with pytest.raises(ValueError, match="one value for one sample"):
        DenseGradientComputer(convnet().eval(), per_class).compute_per_sample_grad(batch())


def test_models_that_return_more_than_a_tensor_are_told_to_be_wrapped() -> None:
    class Named(nn.Linear):
        def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"logits": super().forward(x)}

    data = torch.randn(4, 3), torch.randint(2, (4,))
    for kind in (DenseGradientComputer, FactoredGradientComputer):
        computer = kind(Named(3, 2), LossOutput(nn.functional.cross_entropy))
        with pytest.raises(BatchError, match="returned a dict, LossOutput takes a tensor; wrap"):
            computer.compute_per_sample_grad(data)


def test_tasks_by_name() -> None:
    assert isinstance(resolve_task("image_classification"), ImageClassificationModelOutput)
    output = LossOutput(nn.functional.mse_loss)
    assert resolve_task(output) is output
    assert task_name("clip") == "clip"
    assert task_name(output) == "LossOutput(torch.nn.functional.mse_loss)"
    assert task_name(LossOutput(nn.MSELoss())) == "LossOutput(MSELoss())"
    assert task_name(ImageClassificationModelOutput()) == "image_classification"
    with pytest.raises(ValueError, match="task='images' is not known; use one of image_class"):
        resolve_task("images")
    with pytest.raises(TypeError, match="task must be a name"):
        resolve_task(LossOutput)


class Focal(nn.Module):
    """A loss of somebody's own."""

    def __init__(self, gamma: float, inner: Any, *more: Any, size: Sequence[int] = (1,)) -> None:
        super().__init__()
        self.gamma, self.inner, self.size = gamma, inner, size

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        return self.inner(output, target) ** self.gamma


def test_losses_with_other_settings_have_other_names() -> None:
    weights = [torch.ones(10), torch.ones(10) * 2, torch.ones(10, dtype=torch.bfloat16)]
    cross_entropy = nn.functional.cross_entropy
    losses = [
        nn.CrossEntropyLoss(),
        nn.CrossEntropyLoss(label_smoothing=0.1),
        nn.CrossEntropyLoss(label_smoothing=0.2, reduction="sum"),
        *(nn.CrossEntropyLoss(weight, reduction="sum") for weight in weights),
        nn.BCEWithLogitsLoss(pos_weight=torch.tensor(2.0)),
        nn.BCEWithLogitsLoss(pos_weight=torch.tensor(3.0)),
        cross_entropy,
        partial(cross_entropy, label_smoothing=0.1),
        partial(cross_entropy, label_smoothing=0.2),
        partial(nn.functional.l1_loss),
        Focal(1.0, cross_entropy),
        Focal(2.0, cross_entropy),
        Focal(2.0, nn.functional.mse_loss, 1, size=[1]),
        Focal(2.0, nn.functional.mse_loss, 1, size=[2]),
    ]
    names = [task_name(LossOutput(copy.deepcopy(loss))) for loss in losses]
    assert len(set(names)) == len(names)
    assert names[1] == "LossOutput(CrossEntropyLoss() with label_smoothing=0.1)"
    assert not any("0x" in name for name in names)  # addresses are others in the next process
    assert names == [task_name(LossOutput(copy.deepcopy(loss))) for loss in losses]
