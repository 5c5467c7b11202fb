"""Masks: exact expectation, exact inclusion, determinism, and nothing of the size of the model."""

import dataclasses
import itertools
import tracemalloc
from collections.abc import Iterable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from trak_dropout.masks import Layout, Mask, draw_mask, fold_coordinates, spans

GOLDEN_COORDINATES = [311938, 366759, 548582, 798545, 858403, 972824]
GOLDEN_COLUMNS = [2, 1, 2, 0, 1, 0]
GOLDEN_SIGNS = [1.0, -1.0, -1.0, 1.0, 1.0, 1.0]
GOLDEN_SMALL = [1, 2, 3, 8]


def dense(mask: Mask, grad_dim: int) -> np.ndarray:
    matrix = np.zeros((grad_dim, mask.proj_dim))
    matrix[mask.coordinates, mask.columns] = mask.weights
    return matrix


def mean_square(masks: Iterable[Mask], grad_dim: int) -> np.ndarray:
    """Mean of P P^T, which says <Pg, Ph> = g^T (P P^T) h on average for every g and h."""
    squares = [(matrix := dense(mask, grad_dim)) @ matrix.T for mask in masks]
    return np.mean(squares, axis=0)


@pytest.mark.parametrize(("grad_dim", "proj_dim"), [(5, 2), (6, 3), (4, 1), (4, 4)])
def test_mean_over_all_masks_is_exact(grad_dim: int, proj_dim: int) -> None:
    masks = (
        fold_coordinates(np.array(kept), np.ones(proj_dim), grad_dim, proj_dim)
        for kept in itertools.combinations(range(grad_dim), proj_dim)
    )
    expected = proj_dim * np.eye(grad_dim)
    np.testing.assert_allclose(mean_square(masks, grad_dim), expected, atol=1e-9)


@pytest.mark.parametrize(
    ("grad_dim", "proj_dim", "fold"), [(5, 2, 2), (4, 1, 3), (6, 1, 4), (4, 2, 2)]
)
def test_mean_over_all_draws_and_signs_is_exact(grad_dim: int, proj_dim: int, fold: int) -> None:
    n = proj_dim * fold
    masks = (
        fold_coordinates(np.array(drawn), np.array(signs), grad_dim, proj_dim)
        for drawn in itertools.permutations(range(grad_dim), n)
        for signs in itertools.product([1.0, -1.0], repeat=n)
    )
    expected = proj_dim * np.eye(grad_dim)
    np.testing.assert_allclose(mean_square(masks, grad_dim), expected, atol=1e-9)


@pytest.mark.parametrize(
    ("grad_dim", "proj_dim", "fold"), [(3, 2, 2), (5, 3, 3), (3, 3, 3), (5, 2, 5), (4, 3, 99)]
)
def test_mean_over_all_signs_is_exact_where_every_coordinate_is_kept(
    grad_dim: int, proj_dim: int, fold: int
) -> None:
    for seed in range(5):
        drawn = draw_mask("dropout", grad_dim, proj_dim, seed, 0, fold)
        n = len(drawn.weights)
        masks = (
            dataclasses.replace(drawn, weights=np.abs(drawn.weights) * np.array(signs))
            for signs in itertools.product([1.0, -1.0], repeat=n)
        )
        expected = proj_dim * np.eye(grad_dim)
        np.testing.assert_allclose(mean_square(masks, grad_dim), expected, atol=1e-9)


@pytest.mark.parametrize(("grad_dim", "n"), [(6, 2), (6, 4)])  # rejection, and sorting of keys
def test_ordered_draws_are_uniform(grad_dim: int, n: int) -> None:
    # fold=n, proj_dim=1: all drawn coordinates share a column; the set of them is what varies.
    sets = list(itertools.combinations(range(grad_dim), n))
    counts = dict.fromkeys(sets, 0)
    for seed in range(3000):
        counts[tuple(draw_mask("dropout", grad_dim, 1, seed, 0, fold=n).coordinates)] += 1
    assert stats.chisquare(list(counts.values())).pvalue > 1e-3


@pytest.mark.parametrize(("grad_dim", "proj_dim", "fold"), [(30, 5, 3), (30, 10, 4)])
def test_inclusion_columns_and_signs_are_uniform(grad_dim: int, proj_dim: int, fold: int) -> None:
    included, signs = np.zeros(grad_dim), np.zeros(grad_dim)
    columns = np.zeros((grad_dim, proj_dim))
    for model_id in range(4000):
        mask = draw_mask("dropout", grad_dim, proj_dim, 7, model_id, fold)
        np.add.at(included, mask.coordinates, 1)
        columns[mask.coordinates, mask.columns] += 1
        np.add.at(signs, mask.coordinates, mask.weights > 0)
    assert stats.chisquare(included).pvalue > 1e-3
    assert stats.chisquare(columns.reshape(-1)).pvalue > 1e-3
    z = (signs - included / 2) / np.sqrt(included / 4)
    assert np.abs(z).max() < 4.5  # 30 standard normal values


@settings(deadline=None, max_examples=150)
@given(st.data())
def test_structure(data: st.DataObject) -> None:
    grad_dim = data.draw(st.integers(1, 400))
    proj_dim = data.draw(st.integers(1, grad_dim))
    fold = data.draw(st.integers(1, 20))
    mask = draw_mask("dropout", grad_dim, proj_dim, data.draw(st.integers()), 0, fold)
    per_column = min(fold, grad_dim)
    n = per_column * proj_dim
    assert len(mask.coordinates) == n
    assert np.all(np.diff(mask.coordinates) >= 0)
    assert 0 <= mask.coordinates[0] <= mask.coordinates[-1] < grad_dim
    # As many coordinates in every column, and none of them twice.
    assert (np.bincount(mask.columns, minlength=proj_dim) == per_column).all()
    assert len(set(zip(mask.coordinates, mask.columns, strict=True))) == n
    copies = np.bincount(mask.coordinates, minlength=grad_dim)
    assert copies.max() - copies.min() <= 1
    kept = min(n, grad_dim)
    assert (copies > 0).sum() == kept
    squares = np.bincount(mask.coordinates, mask.weights**2, grad_dim)
    np.testing.assert_allclose(squares[copies > 0], proj_dim * grad_dim / kept)


def test_pure_dropout_keeps_order_and_sign() -> None:
    mask = draw_mask("dropout", 1000, 50, 0, 0, fold=1)
    np.testing.assert_array_equal(mask.columns, np.arange(50))
    assert (mask.weights > 0).all()
    assert not mask.folded
    assert draw_mask("dropout", 1000, 50, 0, 0, fold=2).folded


@pytest.mark.parametrize(
    "other",
    [
        {"seed": 1},
        {"model_id": 1},
        {"seed": 1, "model_id": -1},
        {"fold": 2},
        {"grad_dim": 100_001},
    ],
)
def test_every_argument_counts(other: dict[str, int]) -> None:
    base = {"grad_dim": 100_000, "proj_dim": 64, "seed": 0, "model_id": 0, "fold": 1}
    first = draw_mask("dropout", **base)
    again = draw_mask("dropout", **base)
    np.testing.assert_array_equal(first.coordinates, again.coordinates)
    differs = draw_mask("dropout", **{**base, **other})
    # Independent masks share each coordinate with probability under 1e-3.
    assert len(np.intersect1d(first.coordinates, differs.coordinates)) < 8


def test_golden_vector() -> None:
    # A change here changes every mask ever drawn: stores would silently stop to match.
    mask = draw_mask("dropout", 1_000_000, 3, 42, 7, fold=2)
    assert mask.coordinates.tolist() == GOLDEN_COORDINATES
    assert mask.columns.tolist() == GOLDEN_COLUMNS
    assert np.sign(mask.weights).tolist() == GOLDEN_SIGNS
    assert draw_mask("dropout", 9, 4, 42, 7, fold=1).coordinates.tolist() == GOLDEN_SMALL


def test_memory_follows_what_is_kept() -> None:
    tracemalloc.start()
    mask = draw_mask("dropout", 7_000_000_000, 16_384, 0, 0, fold=1)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(np.unique(mask.coordinates)) == 16_384
    assert mask.coordinates[-1] > 2**32
    assert peak < 5e6


def test_spans_cut_a_mask_at_parameters() -> None:
    layout = Layout(("a", "b", "c", "d"), ((2, 3), (), (4,), (1, 1)))
    assert layout.sizes == (6, 1, 4, 1)
    assert layout.grad_dim == 12
    mask = draw_mask("dropout", 12, 12, 0, 0, fold=1)
    assert spans(mask, layout.sizes) == [(0, 0, 6), (6, 6, 7), (7, 7, 11), (11, 11, 12)]


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        (("gauss", 10, 2, 0, 0), ValueError, "proj_type='gauss' is not known; use one of dropout"),
        (("dropout", 10, 11, 0, 0), ValueError, "proj_dim=11 is above grad_dim=10"),
        (("dropout", 10, 0, 0, 0), ValueError, "proj_dim must be at least 1, got 0"),
        (("dropout", 10, 2.5, 0, 0), TypeError, "proj_dim must be an integer, got 2.5"),
        (("dropout", 10, 2, 0, 0, 0), ValueError, "fold must be at least 1, got 0"),
        (("dropout", 10, 2, "a", 0), TypeError, "seed must be an integer"),
        (("dropout", 10, 2, 0, None), TypeError, "model_id must be an integer"),
        (("dropout", 10, True, 0, 0), TypeError, "proj_dim must be an integer, got True"),
    ],
)
def test_bad_arguments(arguments: tuple, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        draw_mask(*arguments)
