"""What benchmarks/surrogate.py measures is what it says, against algebra on small data."""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import surrogate
import torch
from _influence import Clock, Truth, every, gradients, kept, sampled
from _tasks import Task
from cases import digits, mlp
from scipy.stats import spearmanr
from torch import Tensor, nn

ROOT = Path(__file__).parents[1]


def task(n: int = 120, m: int = 30, **options: Any) -> Task:
    images, labels = digits()
    parts = [slice(0, n), slice(n, n + m), slice(n + m, n + m + 300)]
    data = [(images[some], labels[some]) for some in parts]
    return Task("digits", mlp, 10, *data, **{"epochs": (1, 2), **options})


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[Task, list[nn.Module]]:
    one = task()
    return one, one.checkpoints(tmp_path_factory.mktemp("models") / "models.pt")


def written_out(found: list[Any], damping: float, rows: Any, columns: Any, base: Any) -> Tensor:
    """TRAK's scores by inverting, with the Gram matrix of some rows for that of all."""
    total, weight = 0, 0
    for grads, factors, targets in found:
        x, t = grads.double(), targets.double()
        n, k = x.shape
        gram = x[base].T @ x[base] * (n / len(x[base]))
        damped = gram + damping * gram.trace() / k * torch.eye(k)
        total = total + x[rows] @ torch.linalg.inv(damped) @ t[columns].T
        weight = weight + factors[rows].double()
    return total * weight / len(found) ** 2


@pytest.mark.parametrize("k", [32, 64])  # fewer and more columns than sampled rows
def test_influences_are_the_formula(small: tuple[Task, list[nn.Module]], k: int) -> None:
    one, models = small
    found = gradients(one, models, k, Clock())
    whole = written_out(found, 0.5, slice(None), slice(None), slice(None))
    columns, some, clock = np.array([2, 5, 11]), np.array([1, 2]), Clock()
    truth, others, relative = every(found, 0.5, columns, clock, {2.0: some, "auto": some})
    np.testing.assert_allclose(truth.values, whole[:, columns], rtol=1e-3, atol=1e-6)
    np.testing.assert_allclose(truth.means, whole.mean(1), rtol=1e-3, atol=1e-6)
    np.testing.assert_array_equal(truth.columns, columns)
    strong = written_out(found, 2.0, slice(None), some, slice(None))
    np.testing.assert_allclose(others[2.0].values, strong, rtol=1e-3, atol=1e-6)
    assert relative["0.5"] == pytest.approx(0.5)
    assert relative["auto"] > 0
    assert set(clock.cpu) == set(clock.wall) == {"gram", "solve", "product"}

    rows = np.arange(3, 120, 2)[:40]
    few = gradients(one, models, k, clock, rows, columns)
    for part, full in zip(few, found, strict=True):
        torch.testing.assert_close(part.train, full.train[rows])
        torch.testing.assert_close(part.targets, full.targets[columns])
    block = sampled(few, 0.5, 120, clock)
    expected = written_out(found, 0.5, rows, columns, rows)
    np.testing.assert_allclose(block, expected, rtol=1e-3, atol=1e-6)


def test_checkpoints_are_of_one_run_and_kept(tmp_path: Path) -> None:
    one = task()
    file = tmp_path / "models.pt"
    first, second = one.checkpoints(file)
    again = one.checkpoints(file)
    images = one.test[0]
    torch.testing.assert_close(again[1](images), second(images))
    assert not torch.allclose(first(images), second(images))
    torch.manual_seed(0)
    alone = one.model()
    one.steps(alone, torch.arange(120), 2)  # batches of 64 and 56: an epoch
    torch.testing.assert_close(alone.eval()(images), first(images))


def test_truth_gives_what_was_kept_and_nothing_else(tmp_path: Path) -> None:
    values = np.arange(12, dtype=np.float32).reshape(4, 3)
    truth = Truth(values, np.array([3, 5, 9]), values.mean(1))
    np.testing.assert_array_equal(truth.block(np.array([2, 0]), np.array([9, 3])), [[8, 6], [2, 0]])
    with pytest.raises((AssertionError, IndexError)):
        truth.block(np.array([0]), np.array([4]))
    file = tmp_path / "truth.npz"
    assert kept(file) is None
    kept(file, truth)
    found = kept(file)
    assert found is not None
    np.testing.assert_array_equal(found.values, values)


def test_quality_is_on_seen_and_unseen_pairs() -> None:
    random = np.random.default_rng(0)
    values = random.standard_normal((60, 20)).astype(np.float32)
    truth = Truth(values, np.arange(20), values.mean(1))
    axes, unseen = (np.arange(10), np.arange(5)), np.arange(12, 20)
    seen_rows, seen_columns = np.arange(60) < 10, np.arange(20) < 5

    def right_where_both_are_unseen(rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
        known = seen_rows[rows][:, None] | seen_columns[columns]
        return np.where(known, -1, 1) * values[np.ix_(rows, columns)]

    found = surrogate.quality(truth, right_where_both_are_unseen, axes, unseen, 60)
    assert [found[q]["spearman"] for q in surrogate.QUADRANTS] == pytest.approx([-1, -1, -1, 1])
    assert found["both unseen"]["error"] == 0
    a, b = random.standard_normal((2, 50)).round(1)
    assert surrogate.spearman(a, b) == pytest.approx(spearmanr(a, b)[0])
    assert surrogate.spearman(a, np.ones(50)) == 0


def test_simple_predictors_are_least_squares() -> None:
    random = np.random.default_rng(0)
    x, y = (random.standard_normal((n, 3)).astype(np.float32) for n in (30, 20))
    axes = (np.arange(12), np.arange(8))
    cosines = surrogate.cosine(x, y)
    block = 3 * cosines(*axes) - 2
    everywhere = surrogate.scaled(cosines, axes, block)(np.arange(30), np.arange(20))
    np.testing.assert_allclose(
        everywhere, 3 * cosines(np.arange(30), np.arange(20)) - 2, rtol=1e-4, atol=1e-5
    )
    assert cosines(np.array([4]), np.array([7]))[0, 0] == pytest.approx(
        x[4] @ y[7] / np.linalg.norm(x[4]) / np.linalg.norm(y[7])
    )
    # A sum of one for each side is all that a linear model of both can say.
    summed = (x @ [1, 2, 3])[:, None] + (y @ [4, 5, 6])[None] + 7
    guess = surrogate.ridge(x, y, *axes, summed[np.ix_(*axes)])(np.arange(30), np.arange(20))
    assert np.corrcoef(guess.ravel(), summed.ravel())[0, 1] > 0.98


def test_the_study_goes_on_where_it_stopped(tmp_path: Path) -> None:
    options = argparse.Namespace(
        quick=True, cache=tmp_path, seeds=1, proj_dim=32, damping=10.0, shares=[0.2], n=120, m=30
    )
    bench = surrogate.Bench(task(), options, "digits")
    found = bench.run()
    methods = {row["method"] for row in found["quality"]}
    assert {surrogate.MAIN, "mean", "ridge", "cosine", "network (product), damping auto"} <= methods
    ours = next(r for r in found["quality"] if r["method"] == surrogate.MAIN)
    assert set(ours["quadrants"]) == set(surrogate.QUADRANTS)
    (cost,) = found["cost"]["network"]
    parts = {"gradients", "gram", "solve", "fit", "predict", "embedding"}
    assert set(cost["seconds"]["cpu"]) == parts
    assert surrogate.cost_shares(found)[0] > 0
    assert {row["who"] for row in found["selection"]} > {"random", "top: true", "top: predicted"}
    assert "facility location by class: predicted" in surrogate.table(found)
    alone = surrogate.Bench(task(), options, "alone", studied=False).run()
    assert {row["method"] for row in alone["quality"]} == {
        surrogate.MAIN, "mean", "ridge", "cosine", "cosine with label", "cosine if same label"
    }  # fmt: skip
    assert not alone["selection"]
    surrogate.draw([found, alone], tmp_path / "drawn.png")

    again = surrogate.Bench(task(), options, "digits")
    before = len(again.cells.rows)
    repeated = again.run()
    assert len(again.cells.rows) == before
    assert json.dumps(repeated["quality"]) == json.dumps(found["quality"])


def test_the_study_has_help() -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "surrogate.py"), "--help"]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "--quick" in said
