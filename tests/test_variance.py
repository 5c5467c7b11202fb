"""The formulas of docs/variance.md against simulation, on heavy-tailed gradients."""

import numpy as np
import pytest
import torch
from test_masks import dense, layout, statistics

from trak_dropout.masks import Layout, draw_mask
from trak_dropout.sampling import Stream, UnequalSample, allot, block_shape
from trak_dropout.statistics import as_matrix

LAYOUT = layout((6, 7), (5,), (4, 3), (3,))


def pair(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Two correlated gradients with heavy tails."""
    random = np.random.default_rng(seed)
    g = random.standard_t(3, LAYOUT.grad_dim)
    return g, 0.5 * g + random.standard_t(3, LAYOUT.grad_dim)


def joint(scheme: str, of: Layout, n: int, fold: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities that two coordinates are both drawn, and that they share a column as well.

    The diagonals hold the probabilities of single ones.
    """
    p = of.grad_dim
    if scheme == "weighted_dropout":
        return systematic_joint(of, n, fold)
    if scheme == "dropout":
        both = np.full((p, p), n * (n - 1) / (p * (p - 1)))
        np.fill_diagonal(both, n / p)
    else:
        both = unit_joint(of, n)
    # Dealt out in random order.
    return both, both * ((fold - 1) / (n - 1) if n > 1 else 0.0)


def systematic_joint(of: Layout, n: int, fold: int) -> tuple[np.ndarray, np.ndarray]:
    """Weighted dropout: the share of starting points for which both are hit, and meet."""
    weights = statistics(of).weights()
    sample, points = UnequalSample(weights, n), 4000
    size = np.concatenate([np.outer(w.rows, w.columns).reshape(-1) for w in weights])
    both, meet = np.zeros((of.grad_dim, of.grad_dim)), np.zeros((of.grad_dim, of.grad_dim))

    class Point(Stream):
        def fraction(self) -> float:
            return self.at

    for i in range(points):
        point = Point()
        point.at = (i + 0.5) / points
        drawn = sample.draw(point)[0]
        hit = np.zeros(of.grad_dim)
        hit[drawn] = 1
        both += np.outer(hit, hit) / points
        # By falling size: first to last column, last to first, and so on.
        k, falling = n // fold, sorted(drawn.tolist(), key=lambda i: -size[i])
        for column in range(k):
            turns = (r * k + (k - 1 - column if r % 2 else column) for r in range(fold))
            members = [falling[t] for t in turns]
            meet[np.ix_(members, members)] += 1 / points
    return both, meet


def unit_joint(of: Layout, n: int) -> np.ndarray:
    """Blocks: by whether two entries share a row, a column, or neither; groups are independent."""
    groups = [size for size, shape in zip(of.sizes, of.shapes, strict=True) if len(shape) > 1]
    pool = of.grad_dim - sum(groups)
    counts, inclusion = allot(Stream(), n, [*groups, pool])
    owner, single = np.zeros(of.grad_dim, dtype=int), np.zeros(of.grad_dim)
    both = np.zeros((of.grad_dim, of.grad_dim))
    start = matrix = 0
    for size, shape in zip(of.sizes, of.shapes, strict=True):
        here = slice(start, start + size)
        start += size
        if len(shape) < 2:
            owner[here], single[here] = len(groups), inclusion[-1]
            continue
        owner[here], single[here] = matrix, inclusion[matrix]
        (height, width), taken = as_matrix(shape), counts[matrix]
        full, wide, rest = block_shape(taken, height, width)
        in_row = full * wide * (wide - 1) + rest * (rest - 1)
        in_column = rest * (full + 1) * full + (wide - rest) * full * (full - 1)
        apart = taken**2 - taken - in_row - in_column
        rows, columns = np.divmod(np.arange(size), width)
        same_row, same_column = rows[:, None] == rows, columns[:, None] == columns
        entries = height * width
        both[here, here] = np.where(
            same_row,
            in_row / (entries * max(width - 1, 1)),
            np.where(
                same_column,
                in_column / (entries * max(height - 1, 1)),
                apart / (entries * max((height - 1) * (width - 1), 1)),
            ),
        )
        matrix += 1
    vectors = owner == len(groups)
    both[np.ix_(vectors, vectors)] = counts[-1] * (counts[-1] - 1) / (pool * (pool - 1))
    across = owner[:, None] != owner
    both[across] = np.outer(single, single)[across]
    np.fill_diagonal(both, single)
    return both


def variance(g: np.ndarray, h: np.ndarray, both: np.ndarray, meet: np.ndarray, k: int) -> float:
    """Variance of <Pg, Ph>: of which coordinates are drawn, and of the signs in a column."""
    pi = np.diag(both)
    x = g * h
    drawn = k**2 * x @ (both / np.outer(pi, pi) - 1) @ x
    cross = (np.outer(g, h) + np.outer(h, g)) ** 2
    np.fill_diagonal(cross, 0)
    return float(drawn + k**2 * (meet / np.outer(pi, pi) * cross).sum() / 2)


def simulated(scheme: str, k: int, fold: int, draws: int = 6000) -> np.ndarray:
    g, h = pair()
    products = []
    for model_id in range(draws):
        mask = draw_mask(scheme, LAYOUT, k, 3, model_id, fold, statistics(LAYOUT))
        matrix = dense(mask, LAYOUT.grad_dim)
        products.append((g @ matrix) @ (h @ matrix))
    return np.array(products)


def check(products: np.ndarray, mean: float, expected: float) -> None:
    """Compare mean and variance within 5 standard errors."""
    n = len(products)
    assert abs(products.mean() - mean) < 5 * products.std() / np.sqrt(n)
    squares = (products - products.mean()) ** 2
    assert abs(squares.mean() - expected) < 5 * squares.std() / np.sqrt(n)


@pytest.mark.parametrize("scheme", ["dropout", "unit_dropout", "weighted_dropout"])
@pytest.mark.parametrize(("k", "fold"), [(12, 1), (6, 4), (50, 1)])
def test_mean_and_variance(scheme: str, k: int, fold: int) -> None:
    g, h = pair()
    expected = variance(g, h, *joint(scheme, LAYOUT, k * fold, fold), k)
    check(simulated(scheme, k, fold), k * (g @ h), expected)


def test_variance_where_every_coordinate_is_kept() -> None:
    g, h = pair()
    p, k, fold = LAYOUT.grad_dim, 31, 4  # 124 entries: each of the 62 coordinates twice
    assert k * fold == 2 * p
    x = g * h
    around = (g @ g) * (h @ h) + (g @ h) ** 2 - 2 * x @ x
    expected = k * (1 - 1 / fold) * p / (p - 1) * around
    check(simulated("dropout", k, fold), k * (g @ h), expected)


def test_closed_form_of_uniform_dropout() -> None:
    g, h = pair()
    p, k, x = LAYOUT.grad_dim, 12, g * h
    expected = p**2 * k * (1 - k / p) * x.var(ddof=1)
    assert variance(g, h, *joint("dropout", LAYOUT, k), k) == pytest.approx(expected)
    fold = 4
    both, meet = joint("dropout", LAYOUT, k * fold, fold)
    around = (g @ g) * (h @ h) + (g @ h) ** 2 - 2 * x @ x
    drawn = p**2 * k / fold * (1 - fold * k / p) * x.var(ddof=1)
    folded = k * (1 - 1 / fold) * p / (p - 1) * around
    assert variance(g, h, both, meet, k) == pytest.approx(drawn + folded)


def test_variance_of_gaussian_projection() -> None:
    g, h = map(torch.tensor, pair())
    k = 12
    torch.manual_seed(0)
    matrices = torch.randn(6000, LAYOUT.grad_dim, k, dtype=torch.float64)
    products = ((g @ matrices) * (h @ matrices)).sum(1).numpy()
    check(products, float(k * (g @ h)), float(k * ((g @ g) * (h @ h) + (g @ h) ** 2)))
