"""Damped scores against dense float64 algebra."""

import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from cases import checkpoints, loader, mlp, per_sample_gradients, quickstart, target_set, train_set
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from trak_dropout import (
    DampedScoreComputer,
    GramError,
    LossOutput,
    plugin,
)
from trak_dropout.scoring import automatic_ridge


def dense_features(x: Tensor, damping: float | None = None, ridge: float = 0.0) -> Tensor:
    """By explicit inverses."""
    x = x.double()
    gram = x.T @ x
    if damping is not None:
        ridge = damping * gram.trace() / x.shape[1]
    elif not ridge:
        eigenvalues = torch.linalg.eigvalsh(x @ x.T)
        mean, noise = eigenvalues.mean(), eigenvalues.sum() ** 2 / x.shape[1] / len(x)
        mean_square = torch.maximum(eigenvalues.square().mean() - noise, mean**2)
        ridge = 6 * mean**2 / mean_square.sqrt()
    return x @ torch.linalg.inv(gram + ridge * torch.eye(x.shape[1], dtype=torch.float64))


def test_automatic_damping_does_not_depend_on_the_columns() -> None:
    """The spectrum of the gradients counts, not what their projection adds to it."""
    torch.manual_seed(0)
    g = torch.randn(400, 3000, dtype=torch.float64) * torch.linspace(1, 0, 3000) ** 8
    exact = automatic_ridge(g @ g.T, 400, 10**9)
    for k in (50, 200, 1000):
        found = []
        for _ in range(5):
            x = g @ torch.randn(3000, k, dtype=torch.float64) / k**0.5
            found.append(automatic_ridge(x @ x.T, 400, k) / exact)
        assert abs(np.mean(found) - 1) < 0.05


def leverages_of(
    computer: DampedScoreComputer, x: Tensor, dampings: Sequence[float | str | None] = (None,)
) -> Tensor:
    n, k = x.shape
    gram = computer.get_xtx(x)
    if k > n:
        return computer.dual_leverages(gram, n, k, dampings)
    return computer.leverages(gram, n, k, dampings)(x)


@settings(deadline=None, max_examples=80)
@given(
    n=st.integers(1, 40),
    k=st.integers(1, 40),
    damping=st.sampled_from([1e-3, 0.1, 1.0, 10.0, None]),
    scale=st.sampled_from([1e-6, 1.0, 1e4]),
    dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]),
    kind=st.sampled_from(["full", "rank one", "constant columns", "duplicates", "dead columns"]),
    seed=st.integers(0, 100),
)
def test_equals_dense_algebra(
    n: int,
    k: int,
    damping: float | None,
    scale: float,
    dtype: torch.dtype,
    kind: str,
    seed: int,
) -> None:
    random = torch.Generator().manual_seed(seed)
    scale = 1.0 if dtype == torch.float16 else scale  # its range is that of test_scaling
    x = scale * torch.randn(n, k, generator=random, dtype=torch.float64).to(dtype)
    if kind == "rank one":
        x = x[:, :1].expand(n, k).clone()
    elif kind == "constant columns":
        x[:, ::2] = scale
    elif kind == "duplicates":
        x[:] = x[0].clone()
    elif kind == "dead columns":
        x[:, 1::2] = 0
    computer = DampedScoreComputer(damping="auto" if damping is None else damping)
    gram = computer.get_xtx(x)
    assert gram.shape == (min(n, k), min(n, k))  # the dual form where k > n
    expected = dense_features(x, damping)
    features = computer.get_x_xtx_inv(x, gram)
    assert features.dtype == torch.float32
    bound = 1e-5 * expected.abs().max().item()
    torch.testing.assert_close(features.double(), expected, rtol=1e-5, atol=bound)
    leverages = (expected * x.double()).sum(1)
    found = leverages_of(computer, x)
    torch.testing.assert_close(found[0], leverages, rtol=1e-6, atol=1e-9 * leverages.max().item())
    # Several dampings, from eigenvectors.
    other = (dense_features(x, 3.0) * x.double()).sum(1)
    both = leverages_of(computer, x, [computer.damping, 3.0])
    for values, reference in zip(both, (leverages, other), strict=True):
        bound = 1e-6 * reference.max().item()
        torch.testing.assert_close(values, reference, rtol=1e-5, atol=bound)
    targets = scale * torch.randn(3, k, generator=random)
    scores = expected @ targets.double().T
    bound = 1e-6 * scores.abs().max().item()
    found = computer.scores(x, gram, targets)
    torch.testing.assert_close(found, scores, rtol=1e-6, atol=bound)


def test_blocks_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(50, 20)
    for features in (x, x.T):
        whole = DampedScoreComputer()
        expected = whole.get_x_xtx_inv(features, whole.get_xtx(features))
        monkeypatch.setattr("trak_dropout.scoring._BLOCK_ROWS", 7)
        torch.testing.assert_close(whole.get_x_xtx_inv(features, whole.get_xtx(features)), expected)
        monkeypatch.undo()


def test_scores_add_to_the_accumulator(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trak_dropout.scoring._BLOCK_ROWS", 7)
    features, targets, total = torch.randn(30, 8), torch.randn(5, 8), torch.ones(30, 5)
    DampedScoreComputer().get_scores(features, targets, total)
    torch.testing.assert_close(total, 1 + features @ targets.T)
    half = torch.zeros(30, 5)
    DampedScoreComputer().get_scores(features.half(), targets.half(), half)
    torch.testing.assert_close(half, features.half().float() @ targets.half().float().T)


def test_lambda_reg_keeps_its_meaning() -> None:
    x = torch.randn(30, 8)
    computer = DampedScoreComputer(lambda_reg=0.7, logging_level=logging.ERROR)
    torch.testing.assert_close(
        computer.get_x_xtx_inv(x, computer.get_xtx(x)), dense_features(x, ridge=0.7).float()
    )


def test_half_precision_features_fit_their_storage() -> None:
    # Gradients of 1e-4 give features of the order of 1e4 / n: over float16's range when scaled up.
    x = 1e-4 * torch.randn(30, 8)
    for scale in (1e-3, 1.0, 1e6):
        computer = DampedScoreComputer(dtype=torch.float16)
        features = computer.get_x_xtx_inv(scale * x, computer.get_xtx(scale * x))
        stored = features.half()
        assert torch.isfinite(stored).all()
        expected = dense_features(scale * x)
        by = 2.0 ** np.floor(np.log2(expected.abs().mean().item()))  # a power of two loses nothing
        torch.testing.assert_close(stored.double(), expected / by, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("shape", [(20, 6), (6, 20)])
def test_singular_gram_matrix_is_refused(shape: tuple[int, int]) -> None:
    x = torch.randn(shape)
    if shape[0] > shape[1]:
        x[:, 2] = 0
    else:
        x[2] = x[1]
    computer = DampedScoreComputer(damping=0.0)
    with pytest.raises(GramError, match=r"singular with damping=0.0.*use damping='auto'"):
        computer.get_x_xtx_inv(x, computer.get_xtx(x))
    for dampings in ([None], [0.1, 0.0]):
        with pytest.raises(GramError, match="singular with damping=0.0"):
            leverages_of(computer, x, dampings)
    full = torch.randn(20, 6)
    torch.testing.assert_close(
        computer.get_x_xtx_inv(full, computer.get_xtx(full)), dense_features(full, 0.0).float()
    )


@pytest.mark.parametrize("seed", range(10))
def test_rank_deficiency_at_rounding_level_is_refused(seed: int) -> None:
    # Cholesky may succeed on noise: the inverse would be noise as well.
    torch.manual_seed(seed)
    x = torch.randn(40, 3) @ torch.randn(3, 8)
    computer = DampedScoreComputer(damping=0.0)
    with pytest.raises(GramError, match="singular"):
        computer.get_x_xtx_inv(x.double(), computer.get_xtx(x.double()))
    wide = torch.randn(5, 8)  # more columns than samples: singular, though X X^T is not
    with pytest.raises(GramError, match="5 samples and 8 columns is singular"):
        computer.get_x_xtx_inv(wide, computer.get_xtx(wide))


def test_nothing_infinite_comes_out() -> None:
    x = 1e-41 * torch.randn(20, 4).double()
    computer = DampedScoreComputer()
    with pytest.raises(GramError, match="leave the range of float32"):
        computer.get_x_xtx_inv(x, computer.get_xtx(x))
    targets = torch.randn(3, 4)
    targets[1, 2] = float("nan")
    with pytest.raises(GramError, match=r"targets \[1\] are NaN"):
        computer.get_scores(torch.randn(20, 4), targets, torch.zeros(20, 3))


def test_unusable_gram_matrices_are_refused() -> None:
    with pytest.raises(GramError, match="every compressed gradient is zero"):
        DampedScoreComputer().get_xtx(torch.zeros(5, 3))
    x = torch.randn(5, 3)
    x[3, 1] = float("nan")
    with pytest.raises(GramError, match=r"samples \[3\] are NaN"):
        DampedScoreComputer().get_xtx(x)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"damping": -1}, "damping must be 'auto' or a number not below 0, got -1"),
        ({"damping": "high"}, "damping must be"),
        ({"damping": float("nan")}, "damping must be"),
        ({"damping": True}, "damping must be"),
        ({"lambda_reg": -1.0}, "lambda_reg must be finite"),
        ({"damping": 0.1, "lambda_reg": 0.1}, "both given"),
    ],
)
def test_bad_arguments(arguments: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        DampedScoreComputer(**arguments)


def test_loss_output_gives_the_influence_function(tmp_path: Path) -> None:
    # g_target^T (F + lambda I)^-1 g_train with F = G^T G / n: pure dropout of k = p coordinates
    # keeps all of them, so the features are G, and n times TRAK's score is the influence itself.
    model = mlp(4)
    states = checkpoints(model, 1)
    p, n, m = sum(w.numel() for w in model.parameters()), 40, 6
    loss = LossOutput(nn.functional.cross_entropy)
    _, scores = quickstart(
        model,
        states,
        tmp_path,
        task=loss,
        n_train=n,
        n_targets=m,
        use_half_precision=False,
        **plugin(model, p, damping=0.1, fold=1),
    )

    def output(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return nn.functional.cross_entropy(net(x), y)

    train = per_sample_gradients(model, output, next(iter(loader(train_set(n), n)))).double()
    target = per_sample_gradients(model, output, next(iter(loader(target_set(m), m)))).double()
    fisher = train.T @ train / n
    damped = fisher + 0.1 * fisher.trace() / p * torch.eye(p, dtype=torch.float64)
    influence = train @ torch.linalg.solve(damped, target.T)
    np.testing.assert_allclose(
        n * scores, influence.numpy(), rtol=2e-3, atol=2e-4 * float(influence.abs().max())
    )
