"""Random sampling: exact probabilities, whole permutations, and streams that stay the same."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trak_dropout.sampling import (
    Separable,
    Stream,
    UnequalSample,
    allot,
    block_shape,
    sample_block,
)


def test_streams_depend_on_the_key_alone() -> None:
    first, again, other = Stream("a", 1), Stream("a", 1), Stream("a", 2)
    words = first.words(5)
    np.testing.assert_array_equal(words, again.words(5))
    assert not np.array_equal(words, other.words(5))


def test_large_populations_are_unbiased() -> None:
    # Taking 64-bit words modulo 3 * 2^62 would make the first third twice as likely.
    drawn = Stream("x").distinct(3000, 3 * 2**61)
    assert abs((drawn < 2**61).mean() - 1 / 3) < 5 * np.sqrt(2 / 9 / 3000)


def test_fractions_and_signs_are_uniform() -> None:
    stream = Stream("y")
    values = np.array([stream.fraction() for _ in range(2000)])
    assert 0 <= values.min() < 0.01
    assert 0.99 < values.max() < 1
    assert abs(values.mean() - 0.5) < 5 / np.sqrt(12 * 2000)
    signs = stream.signs(2000)
    assert set(signs) == {-1.0, 1.0}
    assert abs(signs.mean()) < 5 / np.sqrt(2000)


@settings(deadline=None)
@given(st.data())
def test_deals_use_everything_evenly(data: st.DataObject) -> None:
    population = data.draw(st.integers(1, 40))
    size = data.draw(st.integers(1, population))
    groups = data.draw(st.integers(-(-population // size), 60))
    dealt = Stream(data.draw(st.integers())).deal(groups, size, population).reshape(groups, size)
    assert all(len(set(group)) == size for group in dealt)
    counts = np.bincount(dealt.reshape(-1), minlength=population)
    assert counts.min() >= 1
    assert counts.max() - counts.min() <= 1


@settings(deadline=None)
@given(sizes=st.lists(st.integers(1, 50), min_size=1, max_size=12), data=st.data())
def test_allotments_add_up(sizes: list[int], data: st.DataObject) -> None:
    n = data.draw(st.integers(1, sum(sizes)))
    counts, inclusion = allot(Stream(data.draw(st.integers())), n, sizes)
    assert sum(counts) == n
    assert all(0 <= c <= s for c, s in zip(counts, sizes, strict=True))
    if n >= len(sizes):
        assert min(counts) >= 1
        assert inclusion == [c / s for c, s in zip(counts, sizes, strict=True)]


@settings(deadline=None)
@given(rows=st.integers(1, 30), columns=st.integers(1, 30), data=st.data())
def test_blocks_hold_what_was_asked(rows: int, columns: int, data: st.DataObject) -> None:
    n = data.draw(st.integers(1, rows * columns))
    full, wide, rest = block_shape(n, rows, columns)
    assert full * wide + rest == n
    assert full + (rest > 0) <= rows
    assert wide <= columns
    block = sample_block(Stream(data.draw(st.integers())), n, rows, columns)
    assert len(set(block.tolist())) == n
    assert 0 <= block.min() <= block.max() < rows * columns


@settings(deadline=None, max_examples=150)
@given(st.data())
def test_unequal_samples(data: st.DataObject) -> None:
    random = np.random.default_rng(data.draw(st.integers(0, 1000)))
    spread = data.draw(st.sampled_from([0.0, 1.0, 5.0]))
    weights = [
        Separable(random.lognormal(0, spread, a), random.lognormal(0, spread, b))
        for a, b in data.draw(
            st.lists(st.tuples(st.integers(1, 8), st.integers(1, 8)), min_size=1, max_size=4)
        )
    ]
    total = sum(len(w.rows) * len(w.columns) for w in weights)
    if total < 2:
        return
    n = data.draw(st.integers(1, total - 1))
    sample = UnequalSample(weights, n)
    stated = sample.probabilities()
    assert stated.sum() == pytest.approx(n)
    # min(1, c w) for one c.
    w = np.concatenate([np.outer(x.rows, x.columns).reshape(-1) for x in weights])
    open_ = stated < 1
    if open_.any():
        np.testing.assert_allclose((stated / w)[open_], sample.scale, rtol=1e-9)
    assert (sample.scale * w[~open_] >= 1 - 1e-8).all()
    positions, probabilities, sizes = sample.draw(Stream(data.draw(st.integers())))
    assert len(set(positions.tolist())) == n
    np.testing.assert_array_equal(sizes, w[positions])
    np.testing.assert_allclose(probabilities, stated[positions])


def test_no_entry_is_left_without_a_chance() -> None:
    weights = [Separable(np.array([1.0, 1e-12]), np.array([1.0]))]
    sample = UnequalSample(weights, 1)
    assert sample.probabilities().sum() == pytest.approx(1)
    assert sample.scale * 1e-12 == pytest.approx(1e-12)


def test_unequal_samples_are_drawn_as_stated() -> None:
    random = np.random.default_rng(0)
    weights = [
        Separable(random.lognormal(0, 1, 5), random.lognormal(0, 1, 4)),
        Separable(random.lognormal(0, 1, 6), np.ones(1)),
    ]
    for n in (1, 3, 10, 20, 25):
        sample = UnequalSample(weights, n)
        stated, counts = sample.probabilities(), np.zeros(26)
        for seed in range(3000):
            counts[sample.draw(Stream(seed))[0]] += 1
        deviation = np.sqrt(3000 * stated * (1 - stated)) + 1e-9
        assert (np.abs(counts - 3000 * stated) / deviation).max() < 4.5
