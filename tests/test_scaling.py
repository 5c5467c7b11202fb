"""Gradients far out of float16's range, stored in float16."""

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cases import checkpoints, loader, mlp, per_sample_gradients, quickstart, target_set, train_set
from test_scoring import dense_features
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from trak import TRAKer

from trak_dropout import (
    DropoutProjector,
    LossOutput,
    Store,
    open_store,
    plugin,
    self_influence,
    top_influences,
)
from trak_dropout.scaling import StorageScales


def loss(scale: float) -> LossOutput:
    return LossOutput(lambda outputs, labels: scale * nn.functional.cross_entropy(outputs, labels))


@pytest.mark.parametrize("columns", [64, 512])  # 512 columns of 300 samples: the dual form
@pytest.mark.parametrize("scale", [1e-12, 1e-7, 1.0, 1e6, 1e12])
def test_scores_are_those_of_float64(tmp_path: Path, scale: float, columns: int) -> None:
    model = mlp()
    states = checkpoints(model, 1)
    plugs = plugin(model, columns)
    traker, scores = quickstart(model, states, tmp_path, task=loss(scale), **plugs)
    store = Store(tmp_path)
    assert store.grads(0).dtype == np.float16
    assert store.scale(0) != 1 or scale == 1
    assert np.log2(store.scale(0)) % 1 == 0

    def output(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return -nn.functional.cross_entropy(net(x), y)  # scores do not depend on the scale

    model.load_state_dict(states[0])
    model.double()
    projector = DropoutProjector.from_model(model, columns, dtype=torch.float64)
    found = []
    for data in (train_set(), target_set()):
        images, labels = data.tensors
        grads = per_sample_gradients(model, output, (images.double(), labels))
        found.append(projector.project(grads, 0))
    expected = (dense_features(found[0]) @ found[1].T).numpy()
    model.float()

    assert np.isfinite(scores).all()
    assert (scores != 0).any(axis=1).all()
    correlation = np.corrcoef(scores.astype(np.float64).ravel(), expected.ravel())[0, 1]
    assert correlation > 0.999
    own = (dense_features(found[0]) * found[0]).sum(1).numpy()
    assert np.corrcoef(self_influence(traker), own)[0, 1] > 0.999
    indices, values = top_influences(store, "test", 300)
    everything = np.take_along_axis(expected.T, indices, 1)
    assert np.corrcoef(values.ravel(), everything.ravel())[0, 1] > 0.999
    # Inner products of gradients themselves carry the scale that they were given.
    dots, values = top_influences(store, "test", 300, method="dot")
    products = (found[1] @ found[0].T).numpy() / found[0].shape[1]
    np.testing.assert_allclose(
        np.corrcoef(values.ravel(), np.take_along_axis(products, dots, 1).ravel())[0, 1], 1, 1e-3
    )


def shouting(first: float, second: float, n: int = 300) -> Any:
    """Samples of one magnitude, and from the 100th on of another."""
    images, labels = (part[:n] for part in train_set(n).tensors)
    magnitudes = torch.full((n, 1, 1, 1), first)
    magnitudes[100:] = second
    return TensorDataset(images * magnitudes, labels)


def collected(folder: Path, data: Any, half: bool = True, **options: Any) -> tuple[TRAKer, Any]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10, bias=False))
    traker = TRAKer(
        model,
        loss(1.0),
        300,
        str(folder),
        device="cpu",
        logging_level=logging.ERROR,
        use_half_precision=half,
        **plugin(model, 64),
        **options,
    )
    traker.load_checkpoint(model.state_dict(), 0)
    for batch in DataLoader(data, 50):
        traker.featurize(batch, num_samples=len(batch[0]))
    return traker, model


def test_rows_written_before_a_larger_one_are_scaled_down(tmp_path: Path) -> None:
    data = shouting(1e-2, 1e6)
    half, _ = collected(tmp_path / "half", data)
    full, _ = collected(tmp_path / "full", data, half=False)
    store = Store(tmp_path / "half")
    expected = np.array(Store(full.save_dir).grads(0), np.float64)
    found = np.array(store.grads(0), np.float64) / store.scale(0)
    assert np.isfinite(found).all()
    assert store.scale(0) < 2**-10
    # Eight decades below the others rows are subnormal, yet there.
    for rows, bound in ((slice(100, None), 1e-3), (slice(100), 0.5)):
        size = np.abs(expected[rows]).max(axis=1, keepdims=True)
        np.testing.assert_allclose(found[rows] / size, expected[rows] / size, atol=bound)
    assert found[:100].any(axis=1).all()
    half.finalize_features()


def test_rows_that_a_larger_one_wipes_out_are_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        collected(tmp_path, shouting(1e-7, 1e6))
    assert "samples [0, 1, 2, 3, 4, 5, 6, 7, 8, 9] have gradients so small beside" in caplog.text


def test_checkpoints_weigh_what_they_weigh_in_float32(tmp_path: Path) -> None:
    # The factors of checkpoints differ, as do the magnitudes that TRAK's features are brought to.
    model = mlp()
    states = checkpoints(model, 3)
    scores = {}
    for scale in (0.11, 0.2, 1.0, 1e6):
        for half in (True, False):
            folder = tmp_path / f"{scale}{half}"
            plugs = plugin(model, 64)
            _, found = quickstart(
                model, states, folder, task=loss(scale), use_half_precision=half, **plugs
            )
            scores[scale, half] = found.astype(np.float64).ravel()
        assert np.corrcoef(scores[scale, True], scores[scale, False])[0, 1] > 0.9999
        assert np.corrcoef(scores[scale, True], scores[0.11, False])[0, 1] > 0.9999


def test_a_crash_while_rescaling_loses_the_rows_not_the_store(tmp_path: Path) -> None:
    data = shouting(1.0, 1.0)
    traker, _ = collected(tmp_path, data)
    expected = np.array(traker.saver.current_store["grads"])
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    manifest["model_ids"]["0"]["rescaling"] = 0.5
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    traker, _ = collected(tmp_path, data)
    np.testing.assert_array_equal(traker.saver.current_store["grads"], expected)
    assert "rescaling" not in (tmp_path / "manifest.json").read_text()


def test_usual_gradients_are_stored_as_they_are(tmp_path: Path) -> None:
    half, _ = collected(tmp_path / "half", shouting(1.0, 1.0))
    full, _ = collected(tmp_path / "full", shouting(1.0, 1.0), half=False)
    assert Store(half.save_dir).scale(0) == 1
    stored = np.array(full.saver.current_store["grads"]).astype(np.float16)
    np.testing.assert_array_equal(half.saver.current_store["grads"], stored)
    assert "scale" not in json.loads((tmp_path / "full" / "manifest.json").read_text())["model_ids"]


def test_targets_out_of_range_are_refused(tmp_path: Path) -> None:
    traker, model = collected(tmp_path, shouting(1e-6, 1e-6))
    traker.finalize_features()
    traker.start_scoring_checkpoint("test", model.state_dict(), 0, 50)
    batch = next(iter(DataLoader(shouting(1e6, 1e6), 50)))
    with pytest.raises(ValueError, match=r"targets for model_id=0 do not fit the float16 store"):
        traker.score(batch, num_samples=50)


def test_targets_in_a_new_process(tmp_path: Path) -> None:
    model = mlp()
    states = checkpoints(model, 2)
    _, expected = quickstart(model, states, tmp_path, task=loss(1e-7), **plugin(model, 64))
    again = TRAKer(
        model,
        loss(1e-7),
        300,
        str(tmp_path),
        device="cpu",
        logging_level=logging.ERROR,
        **plugin(model, 64),
    )
    for model_id, state in enumerate(states):
        again.start_scoring_checkpoint("again", state, model_id, 20)
        for name in ("grads", "is_featurized"):
            file = Path(again.saver.current_store[name].filename)
            assert file.parent.name == str(model_id)
        for batch in loader(target_set()):
            again.score(batch, num_samples=len(batch[0]))
    np.testing.assert_array_equal(np.array(again.finalize_scores("again")), expected)


def test_targets_out_of_range_leave_other_checkpoints_alone(tmp_path: Path) -> None:
    traker, model = collected(tmp_path, shouting(1.0, 1.0))
    traker.finalize_features()
    traker.load_checkpoint(model.state_dict(), 1)
    batch = next(iter(DataLoader(shouting(1.0, 1.0), 50)))
    traker.featurize(batch, num_samples=50)  # the rows open last are those of a checkpoint begun
    traker.start_scoring_checkpoint("test", model.state_dict(), 0, 50)
    stored = {m: np.array(Store(tmp_path).grads(m)) for m in (0, 1)}
    manifest = (tmp_path / "manifest.json").read_text()
    batch = next(iter(DataLoader(shouting(1e6, 1e6), 50)))
    with pytest.raises(ValueError, match=r"targets for model_id=0 do not fit the float16 store"):
        traker.score(batch, num_samples=50)
    assert (tmp_path / "manifest.json").read_text() == manifest
    for m, rows in stored.items():
        np.testing.assert_array_equal(Store(tmp_path).grads(m), rows)


def test_vanishing_rows_are_named(caplog: pytest.LogCaptureFixture) -> None:
    scales = StorageScales(1.0, choose=lambda *_: None)
    values = torch.ones(4, 3)
    values[2] = 1e-12
    with caplog.at_level(logging.WARNING):
        stored = scales.apply(0, values)
    assert "samples [2] of a batch (model_id=0)" in caplog.text
    assert not stored[2].any()
    assert stored[[0, 1, 3]].all()
    assert scales.apply(1, torch.zeros(2, 3)).shape == (2, 3)  # says nothing of the scale
    assert 1 not in scales.factors
    assert scales.apply(1, torch.empty(0, 3)).shape == (0, 3)


def test_lambda_reg_means_what_it_means_without_scaling(tmp_path: Path) -> None:
    data = shouting(1e-4, 1e-4)
    for reg in (1e-9, 1e-7):
        trakers = []
        for half in (True, False):
            folder = tmp_path / f"{reg}{half}"
            traker, _ = collected(folder, data, half=half, lambda_reg=reg)
            traker.finalize_features()
            trakers.append(traker)
        assert Store(trakers[0].save_dir).scale(0) > 1
        half, full = (np.array(t.saver.current_store["features"], np.float64) for t in trakers)
        assert np.corrcoef(half.ravel(), full.ravel())[0, 1] > 0.999
        half, full = (self_influence(t) for t in trakers)
        np.testing.assert_allclose(half, full, rtol=2e-2)


def test_stores_of_the_callback(tmp_path: Path) -> None:
    from test_lightning import fit

    runs = []
    for half in (True, False):
        _, model, _ = fit(
            tmp_path / str(half), task=loss(1e-7), use_half_precision=half, proj_dim=64
        )
        store = open_store(tmp_path / str(half), model, loss(1e-7))
        assert (store.scale(0) > 1) == half
        scores = store.attribute(loader(target_set()), progress=False)
        store.add_targets("test", loader(target_set()), progress=False)
        runs.append((scores, *top_influences(store, "test", 300)))
    assert np.corrcoef(runs[0][0].ravel(), runs[1][0].ravel())[0, 1] > 0.9999
    for indices, values in (run[1:] for run in runs):
        whole = np.take_along_axis(runs[1][0].T, indices, 1)
        assert np.corrcoef(whole.ravel(), values.ravel())[0, 1] > 0.9999
