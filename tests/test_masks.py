"""Masks: exact expectation, exact inclusion, determinism, and nothing of the size of the model."""

import dataclasses
import itertools
import math
import tracemalloc
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from trak_dropout.masks import SCHEMES, Layout, Mask, _deal_by_size, draw_mask, spans
from trak_dropout.sampling import Stream, UnequalSample
from trak_dropout.statistics import GradientStatistics, as_matrix

GOLDEN = {
    "dropout": (
        [212775, 390509, 541602, 574402, 773764, 895164],
        [0, 1, 2, 1, 2, 0],
        [1.0, 1.0, -1.0, 1.0, 1.0, 1.0],
    ),
    "unit_dropout": (
        [400044, 400860, 556044, 556860, 905375, 990927],
        [1, 0, 2, 2, 1, 0],
        [1.0, -1.0, -1.0, -1.0, -1.0, 1.0],
    ),
    "weighted_dropout": (
        [42524, 207691, 372857, 538024, 703191, 868357],
        [1, 0, 2, 2, 0, 1],
        [1.0, -1.0, 1.0, 1.0, 1.0, 1.0],
    ),
}


def dense(mask: Mask, grad_dim: int) -> np.ndarray:
    matrix = np.zeros((grad_dim, mask.proj_dim))
    matrix[mask.coordinates, mask.columns] = mask.weights
    return matrix


def mean_square(masks: Iterable[tuple[Mask, float]], grad_dim: int) -> np.ndarray:
    """Mean of P P^T, which says <Pg, Ph> = g^T (P P^T) h on average for every g and h."""
    total, mass = np.zeros((grad_dim, grad_dim)), 0.0
    for mask, probability in masks:
        matrix = dense(mask, grad_dim)
        total += probability * matrix @ matrix.T
        mass += probability
    return total / mass


class Enumerator:
    """Stands in for the random stream, and walks through all that it could return."""

    def __init__(self, *key: object) -> None:
        pass

    points = 2000

    @classmethod
    def everything(cls, draw: Callable[[], Mask]) -> Iterator[tuple[Mask, float]]:
        """Every mask that a draw can give, with its probability."""
        cls.choices, cls.limits = [], []
        while True:
            cls.at = 0
            yield draw(), 1 / math.prod(cls.limits)
            while cls.choices and cls.choices[-1] == cls.limits[-1] - 1:
                cls.choices.pop(), cls.limits.pop()
            if not cls.choices:
                return
            cls.choices[-1] += 1

    def choose(self, options: Iterable[tuple]) -> np.ndarray:
        options = list(options)
        if self.at == len(self.choices):
            self.choices.append(0)
            self.limits.append(len(options))
        self.at += 1
        return np.array(options[self.choices[self.at - 1]])

    def permutation(self, n: int) -> np.ndarray:
        return self.choose(itertools.permutations(range(n))).astype(int)

    def distinct(self, n: int, population: int) -> np.ndarray:
        return self.choose(itertools.permutations(range(population), n)).astype(int)

    def signs(self, n: int) -> np.ndarray:
        return self.choose(itertools.product([1.0, -1.0], repeat=n))

    def fraction(self) -> float:
        # Any u in [0, 1) is as likely as another: the middles of equal parts stand for it.
        return float(self.choose(((i + 0.5) / self.points,) for i in range(self.points))[0])

    deal = Stream.deal


def layout(*shapes: tuple[int, ...]) -> Layout:
    return Layout(tuple(f"p{i}" for i in range(len(shapes))), shapes)


def statistics(of: Layout, seed: int = 0) -> GradientStatistics:
    """Heavy-tailed statistics, with a row and a column that were zero in every sample."""
    random = np.random.default_rng(seed)
    rows, columns = [], []
    for shape in of.shapes:
        height, width = as_matrix(shape)
        squares = random.lognormal(0, 1.5, (height, width))
        if min(height, width) > 1:
            squares[0], squares[:, -1] = 0, 0
        rows.append(squares.sum(1))
        columns.append(squares.sum(0))
    return GradientStatistics(tuple(rows), tuple(columns), 10)


@pytest.mark.parametrize(
    ("scheme", "shapes", "proj_dim", "fold"),
    [
        ("dropout", [(5,)], 2, 1),
        ("dropout", [(4, 1)], 4, 1),
        ("dropout", [(5,)], 2, 2),
        ("dropout", [(4,)], 1, 3),
        ("unit_dropout", [(3, 2)], 3, 1),
        ("unit_dropout", [(3, 2)], 5, 1),  # a ragged row
        ("unit_dropout", [(2, 2), (2,), (1,)], 3, 1),
        ("unit_dropout", [(2, 2), (3, 1), (2,)], 2, 1),  # fewer coordinates than groups
        ("unit_dropout", [(2, 2), (1,)], 2, 2),
    ],
)
def test_mean_over_everything_that_can_be_drawn_is_exact(
    monkeypatch: pytest.MonkeyPatch,
    scheme: str,
    shapes: list[tuple[int, ...]],
    proj_dim: int,
    fold: int,
) -> None:
    monkeypatch.setattr("trak_dropout.masks.Stream", Enumerator)
    of = layout(*shapes)
    masks = Enumerator.everything(lambda: draw_mask(scheme, of, proj_dim, 0, 0, fold))
    expected = proj_dim * np.eye(of.grad_dim)
    # The systematic choice of groups is resolved to 1/2000 by the enumeration.
    np.testing.assert_allclose(mean_square(masks, of.grad_dim), expected, atol=5e-3)


@pytest.mark.parametrize("shapes", [[(3, 3)], [(2, 2), (3,)]])
@pytest.mark.parametrize(("proj_dim", "fold"), [(1, 1), (3, 1), (6, 1), (2, 2), (1, 3)])
def test_mean_over_weighted_masks_is_exact(
    monkeypatch: pytest.MonkeyPatch, shapes: list[tuple[int, ...]], proj_dim: int, fold: int
) -> None:
    monkeypatch.setattr("trak_dropout.masks.Stream", Enumerator)
    monkeypatch.setattr(Enumerator, "points", 2000 if fold == 1 else 50)
    of = layout(*shapes)
    masks = Enumerator.everything(
        lambda: draw_mask("weighted_dropout", of, proj_dim, 0, 0, fold, statistics(of))
    )
    mean = mean_square(masks, of.grad_dim)
    # A coordinate of probability pi is found in pi of the parts, up to two of them.
    sample = UnequalSample(statistics(of).weights(), proj_dim * fold)
    bound = proj_dim * 2 / Enumerator.points / sample.probabilities()
    assert (np.abs(np.diag(mean) - proj_dim) <= bound).all()
    np.testing.assert_allclose(mean - np.diag(np.diag(mean)), 0, atol=1e-12)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize(
    ("grad_dim", "proj_dim", "fold"), [(3, 2, 2), (5, 3, 3), (3, 3, 3), (5, 2, 5), (4, 3, 99)]
)
def test_mean_over_all_signs_is_exact_where_every_coordinate_is_kept(
    scheme: str, grad_dim: int, proj_dim: int, fold: int
) -> None:
    for seed in range(5):
        drawn = draw_mask(scheme, Layout.flat(grad_dim), proj_dim, seed, 0, fold)
        masks = (
            (dataclasses.replace(drawn, weights=np.abs(drawn.weights) * np.array(signs)), 1.0)
            for signs in itertools.product([1.0, -1.0], repeat=len(drawn.weights))
        )
        expected = proj_dim * np.eye(grad_dim)
        np.testing.assert_allclose(mean_square(masks, grad_dim), expected, atol=1e-9)


LAYOUTS = [
    layout((6, 5), (6,), (4, 6), (4,), ()),
    layout((3, 2, 2, 2), (3,), (1, 1), (7,)),
    layout((60,)),
]


def inclusion(scheme: str, of: Layout, n: int, seed: int = 0) -> np.ndarray:
    """The stated inclusion probabilities of n drawn coordinates."""
    if scheme == "weighted_dropout":
        return UnequalSample(statistics(of, seed).weights(), n).probabilities()
    return np.full(of.grad_dim, n / of.grad_dim)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("of", LAYOUTS)
@pytest.mark.parametrize(("proj_dim", "fold"), [(5, 1), (4, 3), (30, 1)])
def test_coordinates_are_included_as_often_as_stated(
    scheme: str, of: Layout, proj_dim: int, fold: int
) -> None:
    draws = 2000
    counts, columns = np.zeros(of.grad_dim), np.zeros(proj_dim)
    signs = squares = 0.0
    weights = np.zeros(of.grad_dim)
    for model_id in range(draws):
        mask = draw_mask(scheme, of, proj_dim, 7, model_id, fold, statistics(of))
        counts[mask.coordinates] += 1
        columns[mask.columns[mask.coordinates == 3]] += 1
        weights[mask.coordinates] = mask.weights**2
        signs += (mask.weights > 0).sum()
        squares += len(mask.weights)
    n = proj_dim * fold
    assert counts.sum() == draws * n
    # Unit dropout shares out n in whole numbers; the weights say the probabilities it used.
    pi = proj_dim / weights if scheme == "unit_dropout" else inclusion(scheme, of, n)
    np.testing.assert_allclose(proj_dim / weights[counts > 0], pi[counts > 0])
    open_ = (pi > 0) & (pi < 1)
    assert (counts[pi == 1] == draws).all()
    z = (counts - draws * pi)[open_] / np.sqrt(draws * (pi * (1 - pi))[open_])
    # Samples without replacement vary less than independent ones, so the bound is a safe one.
    assert (z**2).sum() < stats.chi2.ppf(0.9999, open_.sum())
    if fold > 1:
        assert abs(signs / squares - 0.5) < 5 * 0.5 / np.sqrt(squares)
        if columns.sum():
            assert stats.chisquare(columns).pvalue > 1e-4


@settings(deadline=None, max_examples=200)
@given(st.data())
def test_structure(data: st.DataObject) -> None:
    scheme = data.draw(st.sampled_from(SCHEMES))
    shapes = data.draw(
        st.lists(st.lists(st.integers(1, 6), max_size=3).map(tuple), min_size=1, max_size=6)
    )
    of = layout(*shapes)
    grad_dim = of.grad_dim
    proj_dim = data.draw(st.integers(1, grad_dim))
    fold = data.draw(st.integers(1, 20))
    mask = draw_mask(scheme, of, proj_dim, data.draw(st.integers()), 0, fold, statistics(of))
    per_column = min(fold, grad_dim)
    n = per_column * proj_dim
    assert len(mask.coordinates) == n
    assert np.all(np.diff(mask.coordinates) >= 0)
    assert 0 <= mask.coordinates[0] <= mask.coordinates[-1] < grad_dim
    # As many coordinates in every column, and none of them twice.
    assert (np.bincount(mask.columns, minlength=proj_dim) == per_column).all()
    assert len(set(zip(mask.coordinates, mask.columns, strict=True))) == n
    copies = np.bincount(mask.coordinates, minlength=grad_dim)
    if n < grad_dim:
        assert copies.max() == 1
    else:
        assert copies.max() - copies.min() <= 1
        squares = np.bincount(mask.coordinates, mask.weights**2, grad_dim)
        np.testing.assert_allclose(squares, proj_dim)
    assert np.isfinite(mask.weights).all()
    # A probability is at most one.
    assert (
        np.bincount(mask.coordinates, mask.weights**2)[mask.coordinates] > proj_dim - 1e-6
    ).all()


def test_pure_dropout_keeps_order_and_sign() -> None:
    for scheme in SCHEMES:
        of = layout((30, 30), (100,))
        mask = draw_mask(scheme, of, 50, 0, 0, 1, statistics(of))
        np.testing.assert_array_equal(mask.columns, np.arange(50))
        assert (mask.weights > 0).all()
        assert not mask.folded
        assert draw_mask(scheme, of, 50, 0, 0, 2, statistics(of)).folded


def test_unit_dropout_takes_blocks() -> None:
    of = layout((40, 30), (40,), (10, 40), (10,))
    mask = draw_mask("unit_dropout", of, 400, 0, 0, fold=1)
    cut = spans(mask, of.sizes)
    for i, (height, width) in [(0, (40, 30)), (2, (10, 40))]:
        offset, start, stop = cut[i]
        taken = np.zeros(height * width, dtype=bool)
        taken[mask.coordinates[start:stop] - offset] = True
        taken = taken.reshape(height, width)
        wide = taken.sum(1).max()
        # All rows but one are full over the same columns.
        assert taken.any(0).sum() == wide
        assert sorted(taken.sum(1)[taken.any(1)])[1:] == [wide] * (taken.any(1).sum() - 1)
        assert 0.5 < (taken.any(1).mean() / taken.any(0).mean()) < 2


@settings(deadline=None)
@given(groups=st.integers(2, 40), fold=st.integers(2, 20), seed=st.integers(0, 100))
def test_dealing_by_size(groups: int, fold: int, seed: int) -> None:
    """As many entries in each column, and less noise than by chance: products of their sizes."""
    random = np.random.default_rng(seed)
    sizes = random.lognormal(0, 1, groups * fold)

    def noise(columns: np.ndarray) -> float:
        return float((np.bincount(columns, sizes) ** 2).sum())

    # A change here changes masks that stores rely on.
    assert _deal_by_size(np.array([5.0, 1, 4, 2, 3, 6]), 2).tolist() == [1, 1, 1, 0, 0, 0]
    columns = _deal_by_size(sizes, groups)
    assert np.bincount(columns).tolist() == [fold] * groups
    by_chance = [noise(random.permutation(groups * fold) // fold) for _ in range(50)]
    assert noise(columns) <= np.mean(by_chance)
    top = columns[np.argsort(-sizes)[:groups]]
    assert len(np.unique(top)) == groups  # the largest are apart


def test_weighted_dropout_prefers_large_gradients() -> None:
    of = layout((50, 40), (50,))
    rows, columns = np.ones(50), np.ones(40)
    rows[:5] = 400
    of_stats = GradientStatistics((rows, np.ones(50) / 100), (columns, np.array([0.5])), 1)
    mask = draw_mask("weighted_dropout", of, 200, 0, 0, 1, of_stats)
    large = (mask.coordinates < 5 * 40).mean()
    assert large > 0.5  # a tenth of the entries, twenty times the size
    with pytest.raises(ValueError, match="statistics: weighted_dropout .* has seen none"):
        draw_mask("weighted_dropout", of, 200, 0, 0, 1)
    with pytest.raises(ValueError, match="calibrate with gradients of this model"):
        draw_mask("weighted_dropout", layout((40, 50), (50,)), 200, 0, 0, 1, of_stats)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize(
    "other",
    [
        {"seed": 1},
        {"model_id": 1},
        {"seed": 1, "model_id": -1},
        {"fold": 2},
        {"layout": layout((1000, 100), (1,))},
    ],
)
def test_every_argument_counts(scheme: str, other: dict[str, Any]) -> None:
    base = {"layout": layout((1000, 100)), "proj_dim": 64, "seed": 0, "model_id": 0, "fold": 1}

    def draw(**arguments: Any) -> Mask:
        return draw_mask(scheme, **arguments, statistics=flat_statistics(arguments["layout"]))

    first, again = draw(**base), draw(**base)
    np.testing.assert_array_equal(first.coordinates, again.coordinates)
    # Independent masks share each coordinate with probability of about 1e-3.
    assert len(np.intersect1d(first.coordinates, draw(**{**base, **other}).coordinates)) < 8


def flat_statistics(of: Layout) -> GradientStatistics:
    shapes = [as_matrix(shape) for shape in of.shapes]
    return GradientStatistics(
        tuple(np.full(a, float(b)) for a, b in shapes),
        tuple(np.full(b, float(a)) for a, b in shapes),
        1,
    )


@pytest.mark.parametrize("scheme", SCHEMES)
def test_golden_vector(scheme: str) -> None:
    # A change here changes every mask ever drawn: stores would silently stop to match.
    of = layout((900, 1000), (900,), (100, 900), (100,))
    mask = draw_mask(scheme, of, 3, 42, 7, 2, flat_statistics(of))
    coordinates, columns, signs = GOLDEN[scheme]
    assert mask.coordinates.tolist() == coordinates
    assert mask.columns.tolist() == columns
    assert np.sign(mask.weights).tolist() == signs


@pytest.mark.parametrize("scheme", SCHEMES)
def test_memory_follows_what_is_kept(scheme: str) -> None:
    of = layout(*[(50_000, 40_000), (50_000,)] * 3, (40_000, 25_000))
    assert of.grad_dim > 7e9 - 1e6
    sizes = flat_statistics(of)
    tracemalloc.start()
    mask = draw_mask(scheme, of, 16_384, 0, 0, 1, sizes)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(np.unique(mask.coordinates)) == 16_384
    assert mask.coordinates[-1] > 2**32
    assert peak < (50e6 if scheme == "weighted_dropout" else 10e6)


def test_spans_cut_a_mask_at_parameters() -> None:
    of = layout((2, 3), (), (4,), (1, 1))
    assert of.sizes == (6, 1, 4, 1)
    assert of.grad_dim == 12
    mask = draw_mask("dropout", of, 12, 0, 0, fold=1)
    assert spans(mask, of.sizes) == [(0, 0, 6), (6, 6, 7), (7, 7, 11), (11, 11, 12)]


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
    scheme, grad_dim, *rest = arguments
    with pytest.raises(error, match=words):
        draw_mask(scheme, Layout.flat(grad_dim), *rest)
