"""The largest scores against a stable sort of all of them."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trak_dropout import GramError
from trak_dropout.largest import PIECE, Largest


def blocks(scores: torch.Tensor, size: int) -> list[tuple[torch.Tensor, int]]:
    """Cut up, each filled to whole pieces."""
    cut = [(scores[:, i : i + size], i) for i in range(0, scores.shape[1], size)]
    pad = torch.nn.functional.pad
    return [(pad(b, (0, -b.shape[1] % PIECE), value=-math.inf), i) for b, i in cut]


@settings(deadline=None, max_examples=150)
@given(
    n=st.integers(1, 700),
    k=st.integers(1, 150),
    block=st.integers(1, 300),
    levels=st.sampled_from([1, 3, 10**6]),
    trend=st.sampled_from([-1, 0, 1]),
    seed=st.integers(0, 99),
)
def test_ties_go_to_the_earlier_sample(
    n: int, k: int, block: int, levels: int, trend: int, seed: int
) -> None:
    random = torch.Generator().manual_seed(seed)
    scores = torch.randint(0, levels, (3, n), generator=random).float()
    scores[1] += trend * torch.arange(n)
    k = min(k, n)
    best = Largest(3, k, "cpu")
    for part, first in blocks(scores, block):
        best.add(part, first)
    values, indices = best.settle()
    order = torch.sort(scores, dim=1, descending=True, stable=True).indices[:, :k]
    np.testing.assert_array_equal(indices.numpy(), order.numpy())
    np.testing.assert_array_equal(values.numpy(), scores.gather(1, order).numpy())


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_is_refused(value: float) -> None:
    best = Largest(2, 3, "cpu")
    best.add(torch.zeros(2, PIECE), 0)
    scores = torch.zeros(2, PIECE)
    scores[1, 5] = value
    with pytest.raises(GramError, match="leave the range of float32"):
        best.add(scores, PIECE)
