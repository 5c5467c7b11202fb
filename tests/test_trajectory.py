"""Trajectory scores against sums over visits of plain inner products."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from cases import digits, target_set, train_set, trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, WeightedRandomSampler

import trak_dropout as td
from trak_dropout.lightning import GradientCollector

N, TARGETS, COLUMNS = 60, 7, 650


class Linear(pl.LightningModule):
    """Logistic regression: 650 parameters, all of which may be kept."""

    def __init__(self, rates: tuple[float, ...] = (0.5,)) -> None:
        super().__init__()
        self.layer = nn.Linear(64, 10)
        self.rates = rates

    def forward(self, images: Tensor) -> Tensor:
        return self.layer(images.flatten(1))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        weights = [{"params": [w], "lr": r} for w, r in zip(self.parameters(), self.rates)]  # noqa: B905
        groups = weights if len(self.rates) > 1 else [{"params": self.parameters(), "lr": 0.5}]
        optimizer = torch.optim.SGD(groups)
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


def loss_of(outputs: Tensor, labels: Tensor) -> Tensor:
    return nn.functional.cross_entropy(outputs, labels)


@pytest.fixture(scope="module")
def collected(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Any]]:
    """A run with every coordinate kept, by a sampler that repeats; its weights and batches."""
    path = tmp_path_factory.mktemp("store")
    seen: list[Any] = []

    class Note(pl.Callback):
        def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, _: int) -> None:
            weights = {n: w.detach().clone() for n, w in module.layer.state_dict().items()}
            seen.append((weights, batch[1], trainer.optimizers[0].param_groups[0]["lr"]))

    pl.seed_everything(0, verbose=False)
    gatherer = GradientCollector(path, td.LossOutput(loss_of), proj_dim=COLUMNS, mode="training")
    data = train_set(N)
    sampler = WeightedRandomSampler(torch.linspace(0.2, 1, N).tolist(), N)
    module = Linear()
    trainer(callbacks=[Note(), gatherer]).fit(module, DataLoader(data, 16, sampler=sampler))
    gatherer.store.add_targets("test", DataLoader(target_set(TARGETS), 4))
    return path, seen


def gradient(weights: dict[str, Tensor], image: Tensor, label: Tensor) -> Tensor:
    layer = nn.Linear(64, 10).double()
    layer.load_state_dict(weights)
    loss = loss_of(layer(image.double().flatten().unsqueeze(0)), label.unsqueeze(0))
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(layer.parameters()))])


def by_hand(path: Path, seen: list[Any], weighting: str) -> np.ndarray:
    store = td.open_store(path)
    images, labels = digits()
    scores = np.zeros((N, TARGETS))
    for model_id in store.model_ids:
        end = {n.removeprefix("layer."): w for n, w in store.weights(model_id).items()}
        targets = [gradient(end, x, y) for x, y in target_set(TARGETS)]
        visits = td.block_visits(store, model_id)
        for index, batch in zip(visits.index, visits.batch, strict=True):
            weights, batch_labels, rate = seen[batch - 1]
            own = gradient(weights, images[index], labels[index])
            share = 1.0 if weighting == "learning_rate" else 1 / len(batch_labels)
            scores[index] += [rate * share * float(own @ target) for target in targets]
    return scores


@pytest.mark.parametrize("weighting", ["learning_rate", "change"])
def test_scores_are_sums_over_visits(collected: Any, weighting: Any) -> None:
    path, seen = collected
    store = td.open_store(path)
    expected = by_hand(path, seen, weighting)
    found = td.trajectory_scores(store, "test", weighting=weighting)
    assert np.abs(found - expected).max() <= 1e-4 * np.abs(expected).max()
    never = np.setdiff1d(
        np.arange(N), np.concatenate([td.block_visits(store, m).index for m in store.model_ids])
    )
    assert len(never)
    assert not found[never].any()
    for harmful in (False, True):
        indices, values = td.trajectory_influences(
            store, "test", 5, harmful=harmful, weighting=weighting, memory=2**18
        )
        signed = -found.T if harmful else found.T
        best = np.sort(signed, axis=1)[:, ::-1][:, :5]
        np.testing.assert_allclose(-values if harmful else values, best, rtol=1e-5, atol=1e-7)
        np.testing.assert_array_equal(np.take_along_axis(found.T, indices, 1), values)


def test_change_foretells_what_a_step_does(collected: Any) -> None:
    """The change of the loss along the run, to first order, is the sum of the samples' scores."""
    path, seen = collected
    store = td.open_store(path)
    found = td.trajectory_scores(store, "test", weighting="change").sum(0)
    end = {n.removeprefix("layer."): w for n, w in store.weights(store.model_ids[-1]).items()}

    def losses(weights: dict[str, Tensor]) -> Tensor:
        layer = nn.Linear(64, 10)
        layer.load_state_dict(weights)
        images, labels = target_set(TARGETS)[:]
        outputs = layer(images.flatten(1))
        return nn.functional.cross_entropy(outputs, labels, reduction="none").detach()

    fell = (losses(seen[0][0]) - losses(end)).numpy()
    assert np.corrcoef(fell, found)[0, 1] > 0.9


def test_self_influence_is_a_sum_of_squared_norms(collected: Any) -> None:
    path, seen = collected
    store = td.open_store(path)
    images, labels = digits()
    expected = np.zeros(N)
    for model_id in store.model_ids:
        visits = td.block_visits(store, model_id)
        for index, batch in zip(visits.index, visits.batch, strict=True):
            weights, _, rate = seen[batch - 1]
            expected[index] += rate * float(
                gradient(weights, images[index], labels[index]).square().sum()
            )
    np.testing.assert_allclose(td.trajectory_self_influence(store), expected, rtol=1e-4)


def test_top_influences_reads_blocks(collected: Any) -> None:
    """What reads a store reads blocks as well: samples that never came have scores of zero."""
    path, _ = collected
    indices, values = td.top_influences(td.open_store(path), "test", 3)
    assert indices.shape == (TARGETS, 3)
    assert np.isfinite(values).all()


def test_bad_arguments_are_refused(collected: Any, tmp_path: Path) -> None:
    store = td.open_store(collected[0])
    with pytest.raises(ValueError, match="weighting"):
        td.trajectory_scores(store, "test", weighting="lr")
    with pytest.raises(ValueError, match="group=1"):
        td.trajectory_scores(store, "test", group=1)
    with pytest.raises(ValueError, match="k=61"):
        td.trajectory_influences(store, "test", N + 1)
    with pytest.raises(td.IncompleteStoreError, match="no targets"):
        td.trajectory_scores(store, "other")
    gatherer = GradientCollector(tmp_path, td.LossOutput(loss_of), proj_dim=64, mode="training")
    fitter = trainer(callbacks=[gatherer], max_epochs=1)
    fitter.fit(Linear((0.1, 0.2)), DataLoader(train_set(N), 16))
    gatherer.store.add_targets("test", DataLoader(target_set(TARGETS), 4))
    with pytest.raises(ValueError, match="different learning rates"):
        td.trajectory_scores(gatherer.store, "test")
    first = td.trajectory_scores(gatherer.store, "test", group=0)
    second = td.trajectory_scores(gatherer.store, "test", group=1)
    np.testing.assert_allclose(2 * first, second, rtol=1e-5)


def test_checkpoint_stores_have_no_visits(tmp_path: Path) -> None:
    gatherer = GradientCollector(tmp_path, td.LossOutput(loss_of), proj_dim=64)
    trainer(callbacks=[gatherer], max_epochs=1).fit(Linear(), DataLoader(train_set(N), 16))
    with pytest.raises(td.IncompleteStoreError, match="mode='training'"):
        td.trajectory_self_influence(gatherer.store)
