"""Selection against exhaustive and plain greedy facility location."""

from itertools import combinations
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trak_dropout.surrogate import select


def value(influences: np.ndarray, rows: Any) -> float:
    return float(np.maximum(influences[list(rows)].max(0), 0).sum())


def plain_greedy(influences: np.ndarray, count: int, given: list[int]) -> list[int]:
    """One round, every gain anew at every step."""
    chosen: list[int] = []
    while len(chosen) < count:
        before = value(influences, given + chosen) if given + chosen else 0.0
        gains = [
            -np.inf if i in given + chosen else value(influences, [*given, *chosen, i]) - before
            for i in range(len(influences))
        ]
        best = int(np.argmax(gains))
        if gains[best] <= 1e-12:
            break
        chosen.append(best)
    return chosen


@settings(deadline=None, max_examples=150)
@given(
    n=st.integers(1, 40),
    m=st.integers(1, 12),
    count=st.integers(1, 40),
    known=st.integers(0, 3),
    levels=st.booleans(),
    seed=st.integers(0, 999),
)
def test_first_round_is_greedy(
    n: int, m: int, count: int, known: int, levels: bool, seed: int
) -> None:
    random = np.random.default_rng(seed)
    influences = random.integers(-3, 4, (n, m)) / 1 if levels else random.standard_normal((n, m))
    there = random.permutation(n)[: min(known, n - 1)].tolist()
    count = min(count, n - len(there))
    chosen = select(influences, count=count, given=there, helpful_first=False)
    assert len(set(chosen.tolist())) == len(chosen) == count
    assert not set(chosen.tolist()) & set(there)
    expected = plain_greedy(influences, count, there)
    assert chosen[: len(expected)].tolist() == expected


def test_within_the_bound_of_the_best() -> None:
    random = np.random.default_rng(1)
    for _ in range(20):
        influences = random.standard_normal((9, 6))
        best = max(value(influences, rows) for rows in combinations(range(9), 3))
        found = value(influences, select(influences, count=3, helpful_first=False))
        assert found >= (1 - 1 / np.e) * best


def test_rounds_and_the_rest() -> None:
    influences = np.array([[3.0, 0], [0, 3], [2, 0], [0, 2], [1, 1.5], [-1, -1], [-9, 0]])
    chosen = select(influences, share=1.0).tolist()
    assert chosen[:2] == [0, 1]
    assert sorted(chosen[2:5]) == [2, 3, 4]  # a second round covers again
    assert chosen[5:] == [5, 6]  # least harm first
    assert select(influences, count=1, given=[0]).tolist() == [1]  # conditional gain


def test_helpful_first_puts_off_what_harms_on_the_whole() -> None:
    influences = np.array([[9.0, -10], [1, 1], [1.5, 0], [-1, 8]])
    assert select(influences, count=2, helpful_first=False).tolist() == [0, 3]
    assert select(influences, count=2).tolist() == [3, 2]
    assert select(influences, count=4).tolist()[-1] == 0


@settings(deadline=None, max_examples=50)
@given(n=st.integers(2, 40), kinds=st.integers(1, 5), share=st.floats(0.05, 1), top=st.booleans())
def test_groups_get_the_same_share(n: int, kinds: int, share: float, top: bool) -> None:
    random = np.random.default_rng(n)
    influences, groups = random.standard_normal((n, 5)), random.integers(0, kinds, n)
    method: Any = "top" if top else "facility_location"
    chosen = select(influences, share, groups=groups, method=method)
    assert len(set(chosen.tolist())) == len(chosen) == max(1, round(share * n))
    for group in range(kinds):
        members = np.flatnonzero(groups == group)
        some = chosen[np.isin(chosen, members)]
        assert abs(len(some) - len(chosen) * len(members) / n) < 1
        if len(some):
            alone = select(influences[members], count=len(some), method=method)
            assert some.tolist() == members[alone].tolist()


def test_top_takes_the_largest_means() -> None:
    influences = np.random.default_rng(0).standard_normal((50, 7))
    expected = np.argsort(-influences.mean(1), kind="stable")
    np.testing.assert_array_equal(select(influences, 0.2, method="top"), expected[:10])
    there = expected[:3]
    np.testing.assert_array_equal(
        select(influences, count=4, method="top", given=there), expected[3:7]
    )


def test_reads_a_few_rows_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trak_dropout.surrogate.selection._BLOCK_VALUES", 100)
    influences = np.random.default_rng(0).standard_normal((200, 10))

    class Rows:
        shape = influences.shape
        widest = 0

        def __getitem__(self, rows: Any) -> Any:
            Rows.widest = max(Rows.widest, len(rows))
            return influences[rows]

    np.testing.assert_array_equal(select(Rows(), 0.3), select(influences, 0.3))
    assert Rows.widest <= 16


def test_refusals_name_what_is_wrong() -> None:
    good = np.eye(4)
    for influences, options, message in (
        (good, {"share": 0.0}, "share"),
        (good, {"share": 1.5}, "share"),
        (good, {"share": float("nan")}, "share"),
        (good, {"count": 0}, "count"),
        (good, {"count": 5}, "count=5 is above the 4"),
        (good, {"count": 3, "given": [0, 1]}, "count=3 is above the 2"),
        (good, {"given": [4]}, "given"),
        (good, {"given": [-1]}, "given"),
        (good, {"given": [0.5]}, "given"),
        (good, {"method": "best"}, "method"),
        (good, {"groups": [0, 1]}, "groups"),
        (good, {"groups": [0.5] * 4}, "groups"),
        (good[:0], {}, "shape"),
        (good[0], {}, "shape"),
        (good * np.where(good > 0, np.nan, 1), {}, "NaN or infinite"),
        (good * 1j, {}, "real numbers, got complex128"),
    ):
        with pytest.raises(ValueError, match=message):
            select(influences, **options)
    with pytest.raises(TypeError, match="count"):
        select(good, count=2.0)
    with pytest.raises(ValueError, match="count"):
        select(good, given=[0, 1, 2, 3])
