"""TRAK's own tests of its projectors, in spirit, for every scheme and dtype of ours.

After MadryLab/trak, tests/test_jl.py: the same calls and properties, with bounds from the variance.
"""

import itertools

import numpy as np
import pytest
import torch
from torch import Tensor, testing

from trak_dropout import DropoutProjector

CASES = list(
    itertools.product(
        [0, 10**8],  # seed
        ["dropout", "unit_dropout", "weighted_dropout"],
        [torch.float16, torch.bfloat16, torch.float32, torch.float64],
        [(8, 10_000), (9, 10_002), (45, 1049)],  # shape of the gradients
        [512, 1024],  # proj_dim
    )
)
parametrized = pytest.mark.parametrize(("seed", "proj_type", "dtype", "shape", "proj_dim"), CASES)


def gradients(shape: tuple[int, int], dtype: torch.dtype) -> dict[int, Tensor]:
    """Gradients in pieces, as TRAK's chunked projector takes them."""
    matrix = testing.make_tensor(*shape, device="cpu", dtype=dtype, low=-1, high=1)
    return dict(enumerate(matrix.chunk(3, dim=1)))


def projector(
    seed: int, proj_type: str, dtype: torch.dtype, shape: tuple[int, int], proj_dim: int
) -> DropoutProjector:
    return DropoutProjector(
        grad_dim=shape[-1],
        proj_dim=proj_dim,
        proj_type=proj_type,
        seed=seed,
        device="cpu",
        dtype=dtype,
        max_batch_size=32,
    )


@parametrized
def test_seeds_model_ids_and_batches(
    seed: int, proj_type: str, dtype: torch.dtype, shape: tuple[int, int], proj_dim: int
) -> None:
    g = gradients(shape, dtype)
    first = projector(seed, proj_type, dtype, shape, proj_dim)
    result = first.project(g, model_id=0)
    assert result.dtype == dtype
    assert result.shape == (shape[0], proj_dim)
    testing.assert_close(first.project(g, model_id=0), result)
    again = projector(seed, proj_type, dtype, shape, proj_dim)
    testing.assert_close(again.project(g, model_id=0), result)
    # Another model_id or seed projects elsewhere, and coming back gives the same.
    other = first.project(g, model_id=1)
    elsewhere = projector(seed + 1, proj_type, dtype, shape, proj_dim).project(g, model_id=0)
    for different in (other, elsewhere):
        cosine = torch.cosine_similarity(different.double(), result.double(), dim=1)
        assert cosine.abs().max() < 6 / np.sqrt(proj_dim) + (0.1 if shape[1] < 4000 else 0)
    testing.assert_close(first.project(g, model_id=0), result)
    halves = [
        first.project({name: grad[rows] for name, grad in g.items()}, model_id=0)
        for rows in (slice(0, 3), slice(3, None))
    ]
    testing.assert_close(torch.cat(halves), result)


@parametrized
def test_norms_and_products_are_preserved(
    seed: int, proj_type: str, dtype: torch.dtype, shape: tuple[int, int], proj_dim: int
) -> None:
    g = gradients(shape, dtype)
    p = projector(seed, proj_type, dtype, shape, proj_dim).project(g, model_id=0).double()
    flat = torch.cat(list(g.values()), dim=1).double()
    true, found = flat @ flat.T, p @ p.T / proj_dim
    scale = torch.outer(flat.norm(dim=1), flat.norm(dim=1))
    # Gradients of even size: the error is at most about that of a Gaussian projection, whose
    # standard deviation is sqrt(2 / k) of the norms at most.
    error = (found - true).abs() / scale
    assert error.max() < 5 * np.sqrt(2 / proj_dim)
    assert error.square().mean().sqrt() < 1.2 * np.sqrt(2 / proj_dim)
