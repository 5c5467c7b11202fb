"""Gradient statistics against dense ones."""

import numpy as np
import pytest
import torch

from trak_dropout.statistics import GradientStatistics, as_matrix


def gradients(n: int = 20) -> list[torch.Tensor]:
    return [
        torch.randn(n, 3, 2, 2) * torch.tensor([1.0, 5.0, 0.0])[:, None, None],
        torch.randn(n, 4),
        torch.randn(n),
    ]


def test_marginals_are_those_of_the_mean_squares() -> None:
    blocks = gradients()
    found = GradientStatistics.of([[b[:7] for b in blocks], [b[7:] for b in blocks]])
    assert found.samples == 20
    for block, rows, columns in zip(blocks, found.rows, found.columns, strict=True):
        dense = block.double().square().mean(0).reshape(as_matrix(block.shape[1:])).numpy()
        np.testing.assert_allclose(rows, dense.sum(1))
        np.testing.assert_allclose(columns, dense.sum(0))


def test_weights_are_root_mean_squares_of_separable_gradients() -> None:
    rows, columns = torch.tensor([1.0, 4.0]), torch.tensor([1.0, 9.0, 2.0])
    matrix = torch.outer(rows, columns)
    weights = GradientStatistics.of([[matrix[None], torch.tensor([[3.0, 0.5]])]]).weights()
    found = np.outer(weights[0].rows, weights[0].columns)
    np.testing.assert_allclose(found / found[0, 0], matrix.numpy(), rtol=1e-6)
    np.testing.assert_allclose(weights[1].rows[:, None] * weights[1].columns, [[3.0], [0.5]])
    assert found[0, 0] == pytest.approx(1.0)


def test_no_weight_is_zero() -> None:
    blocks = [torch.zeros(4, 3, 3), torch.ones(4, 2)]
    blocks[0][:, 1, 1] = 2.0
    for weights in GradientStatistics.of([blocks, blocks]).weights():
        assert (weights.rows > 0).all()
        assert (weights.columns > 0).all()
    zero = GradientStatistics.of([[torch.zeros(4, 3, 3), torch.ones(4, 2)]]).weights()
    assert (zero[0].rows > 0).all()


@pytest.mark.filterwarnings("error")
def test_parameters_without_entries() -> None:
    shapes = [(0, 4), (3, 0), (0,)]
    empty, some = [torch.zeros(4, *shape) for shape in shapes], gradients(4)
    found = GradientStatistics.of([[*empty, *some]]).weights()
    assert [(len(w.rows), len(w.columns)) for w in found[:3]] == [(0, 4), (3, 0), (0, 1)]
    for ours, plain in zip(found[3:], GradientStatistics.of([some]).weights(), strict=True):
        np.testing.assert_array_equal(ours.rows, plain.rows)
        np.testing.assert_array_equal(ours.columns, plain.columns)


def test_round_trip_and_digest() -> None:
    first, second = (GradientStatistics.of([gradients()]) for _ in range(2))
    again = GradientStatistics.from_tensors(first.to_tensors())
    assert again.digest == first.digest
    assert again.samples == 20
    assert second.digest != first.digest


@pytest.mark.parametrize(
    ("batches", "words"),
    [
        ([], "no samples"),
        ([[torch.zeros(0, 3)]], "no samples"),
        ([[torch.zeros(3, 3)]], "all of those to calibrate with are zero"),
        ([[torch.full((3, 3), float("nan"))]], "NaN or infinite"),
    ],
)
def test_unusable_gradients(batches: list, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        GradientStatistics.of(batches)
