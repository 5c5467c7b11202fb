"""InfluenceNetwork: what it learns, what it keeps, what it refuses."""

import functools
import json
import random
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pytorch_lightning.callbacks import EarlyStopping
from pytorch_lightning.loggers import CSVLogger
from safetensors.torch import load_file
from scipy.stats import spearmanr
from sklearn.datasets import load_digits

import trak_dropout as td
from trak_dropout.surrogate import ExtrapolationWarning, InfluenceNetwork, PredictedInfluences

D = 12


def data(n: int = 120, m: int = 60, seed: int = 0) -> tuple[Any, Any, Any]:
    """Digits' first principal components, and a product of theirs that a network can learn."""
    pixels = load_digits(return_X_y=True)[0]
    centred = pixels - pixels.mean(0)
    parts = np.linalg.svd(centred, full_matrices=False)[2][:D]
    order = np.random.default_rng(seed).permutation(len(pixels))
    x = (centred @ parts.T)[order].astype(np.float32) / 20
    source, target = x[:n], x[n : n + m]
    return source, target, np.tanh(source[:, :4] @ target[:, :4].T) * 3 + 7


def small(**options: Any) -> InfluenceNetwork:
    return InfluenceNetwork(D, 20, **options)


@functools.cache
def fitted(architecture: Any) -> InfluenceNetwork:
    return small(architecture=architecture).fit(*data(40, 30), max_epochs=1)


def test_parameter_count_is_the_papers() -> None:
    assert InfluenceNetwork(1024).num_parameters == 205_001
    assert InfluenceNetwork(D, 7).num_parameters == 2 * D * 7 + 7 + 7 + 1
    assert td.InfluenceNetwork is InfluenceNetwork


@pytest.mark.parametrize("architecture", ["concat", "product"])
def test_predicts_pairs_of_unseen_examples(architecture: Any) -> None:
    source, target, influences = data(400, 200)
    network = InfluenceNetwork(D, architecture=architecture)
    network.fit(source[:200], target[:100], influences[:200, :100], max_epochs=20)
    predicted = network.predict(source[200:], target[100:])
    unseen = influences[200:, 100:]
    assert predicted.shape == (200, 100)
    assert predicted.dtype == np.float32
    assert spearmanr(predicted.ravel(), unseen.ravel())[0] > 0.8
    assert np.square(predicted - unseen).mean() < 0.4 * unseen.var()
    summary = network.summary
    assert summary["pairs"] == 20_000
    assert summary["held_out_pairs"] == 20_000 - 180 * 90
    assert 0 < summary["held_out_error"] < 0.5


@pytest.mark.parametrize("architecture", ["concat", "product"])
def test_prediction_is_the_network_written_out(architecture: Any) -> None:
    """Against plain NumPy, with means and deviations taken anew; no validation split."""
    source, target, influences = data()
    network = small(architecture=architecture, rank=5)
    network.fit(source, target, influences, validation=0, max_epochs=2)
    w = {name: p.detach().numpy()[0] for name, p in network.net.named_parameters()}
    s = (source - source.mean(0)) / source.std(0)
    t = (target - target.mean(0)) / target.std(0)
    if architecture == "concat":
        both = np.concatenate([np.repeat(s, len(t), 0), np.tile(t, (len(s), 1))], 1)
        first = np.concatenate([w["source"], w["target"]])
        hidden = np.maximum(both @ first + w["hidden_bias"], 0)
        found = (hidden @ w["output"] + w["output_bias"]).reshape(len(s), len(t))
    else:
        sides = [
            np.maximum(x @ w[side] + w[f"{side}_bias"], 0) @ w[f"{side}_output"]
            + w[f"{side}_output_bias"]
            for side, x in (("source", s), ("target", t))
        ]
        found = sides[0] @ sides[1].T / np.sqrt(5)
    expected = found * influences.std() + influences.mean()
    np.testing.assert_allclose(network.predict(source, target), expected, atol=1e-4)
    np.testing.assert_allclose(
        network(torch.tensor(source[:9]), torch.tensor(target[:9])).detach(),
        expected[np.arange(9), np.arange(9)],
        atol=1e-4,
    )


def test_one_step_is_adams_on_the_mean_squared_error() -> None:
    source, target, influences = data(20, 10)
    network, twin = small(), small()
    network.fit(
        source, target, influences, validation=0, max_epochs=1, batch_size=200, learning_rate=0.01
    )
    twin.net.reset(0)
    optimizer = torch.optim.Adam(twin.net.parameters(), 0.01)
    s, t = (torch.tensor((x - x.mean(0)) / x.std(0)) for x in (source, target))
    y = torch.tensor((influences - influences.mean()) / influences.std(), dtype=torch.float32)
    left, right = twin.net.encode(s, t)
    (twin.net.grid(left, right)[0] - y).square().mean().backward()
    optimizer.step()
    for ours, theirs in zip(network.net.parameters(), twin.net.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


def test_fit_is_deterministic_and_leaves_random_states() -> None:
    source, target, influences = data()

    def states() -> list[Any]:
        return [
            torch.get_rng_state().tolist(),
            np.random.get_state()[1].tolist(),  # noqa: NPY002  # the global one may not move
            random.getstate(),
        ]

    before = states()
    predictions = []
    for seed in (0, 0, 2**63 + 5):
        network = small(ensemble=2).fit(source, target, influences, seed=seed, ranking=0.5)
        predictions.append(network.predict(source, target))
        torch.rand(3)  # the second fit starts from another state
        torch.set_rng_state(torch.tensor(before[0], dtype=torch.uint8))
    assert states() == before
    np.testing.assert_array_equal(predictions[0], predictions[1])
    assert np.abs(predictions[0] - predictions[2]).max() > 1e-3
    network.fit(source, target, influences, seed=0, ranking=0.5)
    np.testing.assert_array_equal(network.predict(source, target), predictions[0])


def test_ensemble_is_members_side_by_side() -> None:
    source, target, influences = data()
    options = {"validation": 0, "max_epochs": 3}
    several = small(ensemble=3).fit(source, target, influences, **options)
    first = small().fit(source, target, influences, **options)
    alone = dict(first.net.named_parameters())
    for name, parameter in several.net.named_parameters():
        torch.testing.assert_close(parameter[:1], alone[name], atol=1e-4, rtol=1e-3)
        assert not torch.allclose(parameter[0], parameter[1])
    mean, spread = several.predict(source, target, return_std=True)
    assert mean.shape == spread.shape == (120, 60)
    assert (spread > 0).all()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExtrapolationWarning)
        _, far = several.predict(20 * source, 20 * target, return_std=True)
    assert np.median(far) > 3 * np.median(spread)
    with pytest.raises(ValueError, match="return_std needs an ensemble"):
        first.predict(source, target, return_std=True)


def test_ranking_loss_changes_the_fit_and_orders_within_targets() -> None:
    source, target, influences = data(100, 100)
    # Between targets, so that squared errors hardly see the order within a target.
    offsets = 400 * target[:, 5]
    plain, ranked = (
        InfluenceNetwork(D, architecture="product").fit(
            source, target, influences + offsets, ranking=ranking, validation=0, max_epochs=4
        )
        for ranking in (0.0, 10.0)
    )
    by_target = []
    for network in (plain, ranked):
        found = network.predict(source, target)
        by_target.append(np.mean([spearmanr(found[:, j], influences[:, j])[0] for j in range(100)]))
    assert by_target[1] > by_target[0] + 0.02


def test_pairs_equal_the_matrix() -> None:
    source, target, influences = data(30, 20)
    index = np.argwhere(np.ones((30, 20)))
    whole = small().fit(source, target, influences)
    listed = small().fit(source, target, influences[tuple(index.T)], pairs=index)
    some = torch.tensor(index[::3])
    few = small().fit(
        torch.tensor(source),
        torch.tensor(target),
        torch.tensor(influences)[tuple(some.T)],
        pairs=some,
    )
    np.testing.assert_array_equal(listed.predict(source, target), whole.predict(source, target))
    assert few.summary["pairs"] == 200
    one_each = np.stack([np.arange(20), np.arange(20)], 1)
    diagonal = influences[one_each[:, 0], one_each[:, 1]]
    assert small().fit(source, target, diagonal, pairs=one_each, ranking=1).summary["pairs"] == 20


@settings(deadline=None, max_examples=25)
@given(
    n=st.integers(1, 40),
    m=st.integers(1, 30),
    k=st.integers(1, 12),
    harmful=st.booleans(),
    architecture=st.sampled_from(["concat", "product"]),
)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_top_k_and_rows_are_those_of_all_predictions(
    n: int, m: int, k: int, harmful: bool, architecture: Any
) -> None:
    source, target, _ = data(40, 30)
    network = fitted(architecture)
    everything = network.predict(source[:n], target[:m])
    k = min(k, n)
    sign = -1 if harmful else 1
    order = np.argsort(-sign * everything, axis=0, kind="stable")[:k].T
    indices, values = network.predict_top_k(source[:n], target[:m], k, harmful=harmful)
    np.testing.assert_allclose(values, np.take_along_axis(everything.T, order, 1), atol=1e-5)
    np.testing.assert_allclose(np.take_along_axis(everything.T, indices, 1), values, atol=1e-5)
    rows = PredictedInfluences(network, source[:n], target[:m])
    assert rows.shape == (n, m)
    np.testing.assert_allclose(rows[np.arange(n)[::-1]], everything[::-1], atol=1e-5)
    np.testing.assert_allclose(rows[n // 2 :], everything[n // 2 :], atol=1e-5)


def test_save_and_load_predict_to_the_bit(tmp_path: Path) -> None:
    source, target, influences = data()
    for options in ({}, {"architecture": "product", "rank": 3, "ensemble": 2}):
        network = small(**options).fit(source, target, influences)
        network.save(tmp_path / "net.safetensors")
        loaded = InfluenceNetwork.load(str(tmp_path / "net.safetensors"))
        assert loaded.summary == network.summary
        np.testing.assert_array_equal(
            loaded.predict(source, target), network.predict(source, target)
        )
        np.save(tmp_path / "x.npy", source)
        np.save(tmp_path / "y.npy", target)
    code = (
        "import numpy as np, sys, trak_dropout as td;"
        "n = td.InfluenceNetwork.load(sys.argv[1] + '/net.safetensors');"
        "x, y = (np.load(sys.argv[1] + f) for f in ('/x.npy', '/y.npy'));"
        "np.save(sys.argv[1] + '/p.npy', n.predict(x, y))"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)
    np.testing.assert_allclose(np.load(tmp_path / "p.npy"), network.predict(source, target))
    with pytest.warns(ExtrapolationWarning):
        loaded.predict(source + 100, target)
    assert "settings" in load_file(tmp_path / "net.safetensors")  # any reader of the format


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    from trak_dropout._safetensors import load_tensors, save_tensors

    source, target, influences = data()
    path = tmp_path / "net.safetensors"
    with pytest.raises(RuntimeError, match="learnt nothing yet"):
        small().save(path)
    assert not path.exists()
    small().fit(source, target, influences).save(path)
    tensors = load_tensors(path)
    content = json.loads(bytes(tensors["settings"].tolist()))
    for changed, message in (
        ({"format_version": 9}, "format_version 9"),
        ({"hidden_dim": 21}, "holds no InfluenceNetwork"),
        ({"unheard": 1}, "holds no InfluenceNetwork"),
    ):
        text = torch.tensor(list(json.dumps({**content, **changed}).encode()), dtype=torch.uint8)
        save_tensors(tmp_path / "bad", {**tensors, "settings": text})
        with pytest.raises(ValueError, match=message):
            InfluenceNetwork.load(tmp_path / "bad")
    save_tensors(tmp_path / "bad", {"other": torch.zeros(2)})
    with pytest.raises(ValueError, match="holds no InfluenceNetwork"):
        InfluenceNetwork.load(tmp_path / "bad")
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(ValueError, match="cut short"):
        InfluenceNetwork.load(path)
    with pytest.raises(FileNotFoundError):
        InfluenceNetwork.load(tmp_path / "none")


def test_refusals_of_fit_name_what_is_wrong() -> None:
    source, target, influences = data(20, 10)

    def bad(array: Any, value: float) -> Any:
        changed = np.array(array)
        changed[3, 2] = value
        return changed

    for change, message in (
        (
            {"source": source[:, :-1]},
            r"source_embeddings must be of .* got \(20, 11\)",
        ),
        ({"target": target[0]}, r"target_embeddings must be of shape \(n, 12\)"),
        ({"source": bad(source, np.nan)}, r"source_embeddings: rows \[3\] are NaN"),
        ({"target": bad(target, np.inf)}, r"target_embeddings: rows \[3\] are NaN or infinite"),
        ({"source": [["a"] * D] * 20}, "source_embeddings must be an array of numbers"),
        ({"influences": bad(influences, np.nan)}, "influences: 1 of 200 are NaN"),
        ({"influences": influences.T}, r"influences must be of shape \(20, 10\)"),
        ({"influences": np.full((20, 10), 0.3)}, r"influences are all equal \(0.3\)"),
        ({"influences": np.zeros((20, 10))}, r"influences are all equal \(0\)"),
        ({"source": source[:0], "influences": influences[:0]}, "n > 0"),
        ({"influences": [], "pairs": np.zeros((0, 2))}, "no pairs"),
        ({"influences": [], "pairs": []}, "pairs must be of shape"),
        ({"influences": [1.0, 2.0], "pairs": [[0, 0], [20, 1]]}, "within 20 sources and 10"),
        ({"influences": [1.0, 2.0], "pairs": [[0, 0], [1, -1]]}, "within 20 sources and 10"),
        ({"influences": [1.0, 2.0], "pairs": [[0, 0], [1, 1.5]]}, "pairs must be integers"),
        ({"influences": [1.0], "pairs": [[0, 0]]}, "all equal"),
        ({"influences": 1e39 * influences.astype(float)}, "range of float32"),
        ({"influences": 1e200 * influences.astype(float)}, "range of float32"),
        ({"learning_rate": 0.0}, "learning_rate"),
        ({"learning_rate": 1e30}, "training diverged"),
        ({"ranking": -1.0}, "ranking"),
        ({"validation": 1.0}, "validation"),
        ({"max_epochs": 0}, "max_epochs"),
        ({"batch_size": 0}, "batch_size"),
        ({"seed": -1}, "seed"),
    ):
        given = {"source": source, "target": target, "influences": influences, **change}
        three = (given.pop("source"), given.pop("target"), given.pop("influences"))
        with pytest.raises(ValueError, match=message):
            small().fit(*three, **given)
    for arguments, error in (((0,), ValueError), ((4, 0), ValueError), ((4.5,), TypeError)):
        with pytest.raises(error, match="must be"):
            InfluenceNetwork(*arguments)
    with pytest.raises(ValueError, match="architecture"):
        InfluenceNetwork(4, architecture="deep")
    with pytest.raises(RuntimeError, match="learnt nothing yet"):
        small().predict(source, target)


def test_the_default_type_does_not_matter() -> None:
    source, target, influences = data(20, 10)
    for architecture in ("concat", "product"):
        plain = small(architecture=architecture).fit(source, target, influences, max_epochs=1)
        torch.set_default_dtype(torch.float64)
        try:
            again = small(architecture=architecture).fit(source, target, influences, max_epochs=1)
            predicted, best = again.predict(source, target), again.predict_top_k(source, target, 3)
        finally:
            torch.set_default_dtype(torch.float32)
        assert predicted.dtype == best[1].dtype == np.float32
        np.testing.assert_array_equal(predicted, plain.predict(source, target))
        for found, expected in zip(best, plain.predict_top_k(source, target, 3), strict=True):
            np.testing.assert_array_equal(found, expected)


def test_refusals_of_predict() -> None:
    source, target, influences = data(20, 10)
    network = small().fit(source, target, influences)
    with pytest.raises(ValueError, match=r"target_embeddings must be of shape \(n, 12\)"):
        network.predict(source, target[:, :5])
    with pytest.raises(ValueError, match=r"source_embeddings: rows \[0, 1"):
        network.predict(source * np.nan, target)
    for k, error in ((0, ValueError), (21, ValueError), (2.0, TypeError)):
        with pytest.raises(error, match="k"):
            network.predict_top_k(source, target, k)


def test_far_embeddings_are_told_with_a_figure() -> None:
    source, target, influences = data(300, 150)
    network = small().fit(source[:200], target[:100], influences[:200, :100])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        network.predict(source[200:], target[100:])
    strange = source[200:].copy()
    strange[7] += 50
    message = r"source_embeddings: \d+ of 100 .* the farthest \d+\.\d times as far"
    with pytest.warns(ExtrapolationWarning, match=message):
        network.predict(strange, target[100:])
    with pytest.warns(ExtrapolationWarning, match=r"target_embeddings: 50 of 50 \(100%\)"):
        network.predict_top_k(source[200:], -3 * target[100:], 2)


def test_noise_is_told() -> None:
    source, target, influences = data()
    noise = np.random.default_rng(0).standard_normal(influences.shape)
    with pytest.warns(UserWarning, match="times that of predicting the mean"):
        small().fit(source, target, noise, learning_rate=0.05)


def test_scale_and_offset_of_influences_do_not_matter() -> None:
    source, target, influences = data()
    plain = small().fit(source, target, influences).predict(source, target)
    tiny = small().fit(source, target, 1e-12 * influences + 1e-9).predict(source, target)
    np.testing.assert_allclose((tiny - 1e-9) * 1e12, plain, rtol=1e-2, atol=0.05)


def test_a_trainer_of_ones_own(tmp_path: Path) -> None:
    source, target, influences = data()
    logger = CSVLogger(tmp_path)
    trainer = pl.Trainer(
        max_epochs=3,
        accelerator="cpu",
        logger=logger,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
        log_every_n_steps=1,
        callbacks=[EarlyStopping("val_loss")],
    )
    network = small().fit(source, target, influences, trainer=trainer)
    assert network.summary["epochs"] == 3
    logger.save()
    written = (Path(logger.log_dir) / "metrics.csv").read_text()
    assert "train_loss" in written
    assert "val_loss" in written


def test_constant_columns_do_no_harm() -> None:
    source, target, influences = data()
    source[:, 3], target[:, 5] = 0.1, 0
    predicted = small().fit(source, target, influences).predict(source, target)
    assert np.isfinite(predicted).all()
    assert spearmanr(predicted.ravel(), influences.ravel())[0] > 0.5


@pytest.mark.parametrize("architecture", ["concat", "product"])
def test_rectangular_batches_learn_the_same_from_fewer_encodings(architecture: Any) -> None:
    source, target, influences = data(400, 200)
    network = InfluenceNetwork(D, architecture=architecture)
    block = influences[:200, :100]
    network.fit(source[:200], target[:100], block, batch_size=(32, 32), max_epochs=20)
    unseen = influences[200:, 100:]
    predicted = network.predict(source[200:], target[100:])
    assert spearmanr(predicted.ravel(), unseen.ravel())[0] > 0.8
    plain = InfluenceNetwork(D, architecture=architecture)
    plain.fit(source[:200], target[:100], block, max_epochs=1)
    for key in ("pairs", "held_out_pairs"):  # the same examples are held out
        assert network.summary[key] == plain.summary[key]
    for side in ("source", "target"):
        torch.testing.assert_close(network._scales[side], plain._scales[side])
    torch.testing.assert_close(network._scales["influences"], plain._scales["influences"])


def test_one_rectangle_is_one_step_on_all_its_pairs() -> None:
    source, target, influences = data(20, 10)
    options: dict[str, Any] = {"validation": 0, "max_epochs": 1, "learning_rate": 0.01}
    pairs, rectangle = small(), small()
    pairs.fit(source, target, influences, batch_size=200, **options)
    rectangle.fit(source, target, influences, batch_size=(20, 10), **options)
    for ours, theirs in zip(rectangle.net.parameters(), pairs.net.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)
    # The error on what was held out is that of the best weights, which predict what was held out.
    held = small().fit(source, target, influences, batch_size=(7, 4), max_epochs=3)
    assert held.summary["held_out_pairs"] == 200 - 18 * 9
    assert held.summary["held_out_error"] > 0


def test_every_pair_comes_once_in_an_epoch_and_every_other_is_checked() -> None:
    from trak_dropout.surrogate.batches import Rectangles

    n, m = 23, 11
    numbers = torch.arange(n * m).reshape(n, m)
    sides = torch.arange(n)[:, None], torch.arange(m)[:, None]
    rectangles = Rectangles(*sides, numbers)
    rows, columns = torch.randperm(n)[:17], torch.randperm(m)[:8]
    loader = rectangles.shuffled(rows, columns, (5, 3), torch.Generator().manual_seed(0))
    assert len(loader) == 4 * 3
    epochs = []
    for _ in range(2):
        seen = []
        for source, target, values in loader:
            torch.testing.assert_close(values, source * m + target.T)
            assert values.shape[0] <= 5
            assert values.shape[1] <= 3
            seen += values.flatten().tolist()
        assert sorted(seen) == sorted(numbers[rows][:, columns].flatten().tolist())
        epochs.append(seen)
    assert epochs[0] != epochs[1]
    for some, few in ((rows, columns), (rows, torch.arange(m)), (torch.arange(n), columns)):
        others = [v for batch in rectangles.outside(some, few) for v in batch[2].flatten().tolist()]
        wanted = set(numbers.flatten().tolist()) - set(numbers[some][:, few].flatten().tolist())
        assert sorted(others) == sorted(wanted)


def test_rectangular_batches_rank_hold_out_and_repeat() -> None:
    source, target, influences = data(100, 100)
    offsets = 400 * target[:, 5]
    by_target = []
    for ranking in (0.0, 10.0):
        network = InfluenceNetwork(D, architecture="product").fit(
            source, target, influences + offsets,
            ranking=ranking, validation=0, max_epochs=20, batch_size=(32, 32),
        )  # fmt: skip
        found = network.predict(source, target)
        by_target.append(np.mean([spearmanr(found[:, j], influences[:, j])[0] for j in range(100)]))
    assert by_target[1] > by_target[0] + 0.02
    twice = [
        small(ensemble=2).fit(source, target, influences, batch_size=(16, 16), max_epochs=2, seed=3)
        for _ in range(2)
    ]
    np.testing.assert_array_equal(
        twice[0].predict(source, target), twice[1].predict(source, target)
    )


def test_rectangular_batches_need_a_matrix_and_two_sizes() -> None:
    source, target, influences = data(20, 10)
    listed = {"pairs": [[0, 0], [1, 1]], "batch_size": (4, 4)}
    with pytest.raises(ValueError, match="needs a matrix of influences"):
        small().fit(source, target, [1.0, 2.0], **listed)
    for size, error in (((4, 4, 4), ValueError), ((4, 0), ValueError), ((4, 2.5), TypeError)):
        with pytest.raises(error, match="batch_size"):
            small().fit(source, target, influences, batch_size=size)


@pytest.mark.parametrize("ensemble", [1, 3])
def test_predictions_are_the_mean_of_the_members_in_double_precision(ensemble: int) -> None:
    """Scale, shift and ensemble are folded into one product: against each done on its own."""
    source, target, influences = data()
    for architecture in ("concat", "product"):
        network = small(architecture=architecture, ensemble=ensemble)
        network.fit(source, target, 1e3 * influences - 5e4, max_epochs=2)
        mean, scale = network._scales["influences"]
        s, t = (
            network._standardised(side, torch.tensor(x)).double()
            for side, x in (("source", source), ("target", target))
        )
        twin = network.net.double()
        with torch.no_grad():
            expected = twin.grid(*twin.encode(s, t)).mean(0) * scale + mean
        network.net.float()
        predicted = network.predict(source, target)
        tolerance = 1e-5 * float(abs(mean))
        np.testing.assert_allclose(predicted, expected, atol=tolerance, rtol=0)
        rows = PredictedInfluences(network, source, target)
        np.testing.assert_array_equal(rows[:], predicted)
