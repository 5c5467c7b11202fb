"""Mode "training": rows are gradients at the weights of their very step, training is untouched."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from cases import Classifier, digits, train_set, trainer
from pytorch_lightning.callbacks import (
    ModelCheckpoint,
    OnExceptionCheckpoint,
    StochasticWeightAveraging,
)
from pytorch_lightning.plugins import MixedPrecision
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from test_lightning_hostile import file_limit
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset, WeightedRandomSampler

import trak_dropout as td
from trak_dropout.inspection import inspect_store
from trak_dropout.lightning import GradientCollector
from trak_dropout.lightning.blocks import BlockWriter, keep_others, merge, rows_of
from trak_dropout.lightning.order import RecordingBatchSampler
from trak_dropout.visits import IN_PLACE, NOT_STORED, Visits

N = 75  # divides neither by the batch size nor by two processes


def net() -> nn.Module:
    """No dropout and no batch statistics, so that a sample alone has the same gradient."""
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, stride=2), nn.GroupNorm(2, 4), nn.ReLU(inplace=True),
        nn.Flatten(), nn.Linear(36, 10),
    )  # fmt: skip


def restless_net() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, stride=2), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Dropout(0.3),
        nn.Flatten(), nn.Linear(36, 10),
    )  # fmt: skip


class Stepper(Classifier):
    """A learning rate that changes with every step, and a loss as one likes."""

    def __init__(self, model: nn.Module, reduction: str = "mean") -> None:
        super().__init__(model)
        self.reduction = reduction

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = nn.functional.cross_entropy(self(batch[0]), batch[1], reduction=self.reduction)
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), 0.05, momentum=0.9)
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


BFLOAT16 = 0.15  # of the largest entry, against autograd under the same autocast


class Watcher(pl.Callback):
    """Keeps weights and data indices of every batch: the data set's samples are told apart."""

    def __init__(self) -> None:
        self.weights: list[dict[str, Tensor]] = []
        self.batches: list[Any] = []
        self.rates: list[float] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, _: int) -> None:
        self.weights.append({n: w.detach().clone() for n, w in pl_module.state_dict().items()})
        self.batches.append(batch)
        self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])


def dataset(n: int = N) -> TensorDataset:
    return train_set(n)


def collector(path: Path, **options: Any) -> GradientCollector:
    return GradientCollector(path, **{"proj_dim": 200, "mode": "training", **options})


def fit(
    build: Callable[[], nn.Module],
    callbacks: list[Any],
    loader: dict[str, Any] | None = None,
    **options: Any,
) -> Stepper:
    pl.seed_everything(1, verbose=False)
    module = Stepper(build(), options.pop("reduction", "mean"))
    data = DataLoader(dataset(), **{"batch_size": 16, "shuffle": True, **(loader or {})})
    checkpoint = options.pop("ckpt_path", None)
    trainer(callbacks=callbacks, **options).fit(module, data, ckpt_path=checkpoint)
    return module


def expected_row(
    model: nn.Module, projector: td.DropoutProjector, model_id: int, index: int
) -> Tensor:
    """The oracle: plain autograd on the sample by itself, in the model's precision."""
    images, labels = digits()
    dtype = next(model.parameters()).dtype
    # A float32 model stands for bfloat16 autocast: in float64 other units could be active.
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.float32):
        output = model(images[index : index + 1].to(dtype))
        loss = nn.functional.cross_entropy(output.to(dtype), labels[index : index + 1])
    grads = torch.autograd.grad(loss, list(model.parameters()))
    named = zip((name for name, _ in model.named_parameters()), grads, strict=True)
    row = projector.project({f"net.{n}": g.unsqueeze(0) for n, g in named}, model_id)[0]
    return -row / math.sqrt(projector.grad_dim)


def check_rows(path: Path, watcher: Watcher, tolerance: float, ranks: int = 1) -> None:
    store = td.open_store(path)
    projector = store.projector()
    model = net().float() if tolerance == BFLOAT16 else net().double()
    for model_id in store.model_ids:
        visits, grads = td.block_visits(store, model_id), store.grads(model_id)
        repeats = path / str(model_id) / "repeats.npy"
        further = np.load(repeats) if repeats.is_file() else None
        for i in range(len(visits)):
            weights = watcher.weights[visits.batch[i] - 1]
            model.load_state_dict({n.removeprefix("net."): w for n, w in weights.items()})
            row = expected_row(model, projector, model_id, int(visits.index[i]))
            place = visits.place[i]
            found = grads[visits.index[i]] if place == IN_PLACE else further[place]
            error = float((torch.from_numpy(np.array(found)) - row).abs().max())
            assert error <= tolerance * float(row.abs().max())


WEIGHTED = {"proj_type": "weighted_dropout", "calibration_samples": 60}
SCALER = {"plugins": [MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", 1024.0))]}


@pytest.mark.parametrize(
    ("options", "loader", "settings", "tolerance"),
    [
        ({}, {}, {}, 1e-5),
        ({"precision": "64-true"}, {}, {}, 1e-6),
        ({"precision": "64-true"}, {}, {**WEIGHTED, "calibrate_each": True}, 1e-6),
        ({"accumulate_grad_batches": 3}, {"num_workers": 2}, {"fold": 3}, 1e-5),
        ({"reduction": "sum"}, {"drop_last": True}, {"proj_type": "unit_dropout"}, 1e-5),
        (SCALER, {}, WEIGHTED, 0.02),
        ({"precision": "bf16-mixed"}, {"shuffle": False}, {}, BFLOAT16),
        ({"limit_train_batches": 3}, {"num_workers": 1, "persistent_workers": True}, {}, 1e-5),
    ],
)
def test_rows_are_micro_batch_gradients_of_their_step(
    tmp_path: Path, options: Any, loader: Any, settings: Any, tolerance: float
) -> None:
    watcher = Watcher()
    if options is SCALER:  # a scaler has a state
        options = {"plugins": [MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))]}
    fit(net, [watcher, collector(tmp_path, **settings)], loader, **options)
    check_rows(tmp_path, watcher, tolerance)
    store = td.open_store(tmp_path)
    assert store.model_ids == [0, 1]
    if settings.get("calibrate_each"):
        first, second = (store.projector().statistics[m] for m in (0, 1))
        assert first.digest != second.digest
    accumulated = options.get("accumulate_grad_batches", 1)
    for model_id in store.model_ids:
        visits = td.block_visits(store, model_id)
        images = dataset()[:][0]
        counts = [len(batch[0]) for batch in watcher.batches]
        for number in np.unique(visits.batch):
            mine = visits.index[visits.batch == number]
            assert torch.equal(images[mine].float(), watcher.batches[number - 1][0].float())
            last = min(-(-number // accumulated) * accumulated, 5 * (model_id + 1)) - 1
            if accumulated == 1:
                last = number - 1
                rate = visits.learning_rate[visits.batch == number]
                assert np.all(rate == watcher.rates[last])
            share = visits.share[visits.batch == number]
            size = counts[number - 1] if options.get("reduction") != "sum" else 1
            assert np.allclose(share, 1 / (size * accumulated), rtol=1e-12)
        assert len(np.unique(visits.index)) == len(visits)
        seen = np.load(tmp_path / str(model_id) / "_is_featurized.mmap").astype(bool)
        assert set(np.flatnonzero(seen)) == set(visits.index)


def test_learning_rates_are_those_of_the_step_of_a_window(tmp_path: Path) -> None:
    """Two batches to a step: both get the rate that the optimizer used."""
    used: list[float] = []

    class Note(pl.Callback):
        def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
            used.append(optimizer.param_groups[0]["lr"])

    fit(net, [Note(), collector(tmp_path)], accumulate_grad_batches=2, max_epochs=1)
    visits = td.block_visits(td.open_store(tmp_path), 0)
    rates = [float(visits.learning_rate[visits.batch == b][0, 0]) for b in (1, 2, 3, 4, 5)]
    assert rates == [used[0], used[0], used[1], used[1], used[2]]
    assert [int(visits.step[visits.batch == b][0]) for b in (1, 2, 3, 4, 5)] == [0, 0, 1, 1, 2]


def test_samples_that_come_again_keep_all_their_rows(tmp_path: Path) -> None:
    watcher = Watcher()
    sampler = WeightedRandomSampler(torch.linspace(0.1, 1, N).tolist(), 2 * N)
    fit(net, [watcher, collector(tmp_path)], {"sampler": sampler, "shuffle": False})
    check_rows(tmp_path, watcher, 1e-5)
    visits = td.block_visits(td.open_store(tmp_path), 1)
    assert len(visits) == 2 * N
    assert (visits.place >= 0).sum() == 2 * N - len(np.unique(visits.index))


def test_an_epoch_without_a_step_is_no_block(tmp_path: Path) -> None:
    """After averaging weights, Lightning passes over the data once more for batch statistics."""
    averaging = StochasticWeightAveraging(0.01, swa_epoch_start=1)
    one = collector(tmp_path)
    fit(restless_net, [averaging, one], max_epochs=2)
    assert one.model_ids == [0, 1]
    assert not (tmp_path / "2").exists()
    images, labels = digits()
    one.store.add_targets("few", DataLoader(TensorDataset(images[:4], labels[:4])), progress=False)
    assert td.top_influences(one.store, "few", 3)[0].shape == (4, 3)

    class Pausing(Stepper):
        def training_step(self, batch: list[Tensor], batch_idx: int) -> Any:
            return None if self.current_epoch == 1 else super().training_step(batch, batch_idx)

    another = collector(tmp_path / "pausing")
    trainer(max_epochs=3, callbacks=[another]).fit(Pausing(net()), DataLoader(dataset(), 16))
    assert [another.store.describe(m)["epoch"] for m in another.model_ids] == [0, 2]
    assert td.open_store(tmp_path / "pausing").grads(another.model_ids[1]).any(1).all()


def weights_and_chance(module: nn.Module) -> list[Tensor]:
    return [*module.state_dict().values(), torch.rand(3)]


def twice_net() -> nn.Module:
    shared = nn.Linear(36, 36)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, stride=2), nn.Flatten(), shared, nn.Tanh(), shared, nn.Linear(36, 10)
    )


@pytest.mark.parametrize(
    ("build", "options"), [(net, {}), (twice_net, {}), (net, SCALER)], ids=["", "twice", "scaled"]
)
def test_weighted_dropout_draws_by_gradients_of_training_steps(
    tmp_path: Path, build: Callable[[], nn.Module], options: Any
) -> None:
    pl.seed_everything(1, verbose=False)
    first = Stepper(build())  # before any step
    images, labels = digits()
    # Three batches of 16 from all over the data set, whose order does not matter to a mean.
    spread = np.linspace(0, N - 1, 48).astype(int)
    expected: dict[str, Tensor] = {}
    for i in spread:
        loss = nn.functional.cross_entropy(first(images[i : i + 1].float()), labels[i : i + 1])
        named = list(first.named_parameters())
        for (name, weight), g in zip(
            named, torch.autograd.grad(loss, [w for _, w in named]), strict=True
        ):
            rows = g.reshape(len(weight), -1).double().square().sum(1) / 48
            expected[name] = expected.get(name, 0) + rows
    if options is SCALER:  # small gradients must not vanish in float16
        options = {"plugins": [MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))]}
    fit(build, [collector(tmp_path, **WEIGHTED)], max_epochs=1, **options)
    (taken,) = td.open_store(tmp_path).projector().statistics.values()
    for rows, name in zip(taken.rows, expected, strict=True):
        # Of the mean loss of a batch of 16.
        np.testing.assert_allclose(rows * 16**2, expected[name].numpy(), rtol=1e-4)


@pytest.mark.parametrize("settings", [{}, WEIGHTED | {"calibrate_each": True}])
@pytest.mark.parametrize("workers", [0, 2])
def test_training_is_the_same_to_the_bit(tmp_path: Path, workers: int, settings: Any) -> None:
    loader = {"num_workers": workers, "persistent_workers": bool(workers)}
    options = {"accumulate_grad_batches": 2, "gradient_clip_val": 0.1}
    plain = weights_and_chance(fit(restless_net, [], loader, **options))
    collected = fit(restless_net, [collector(tmp_path, **settings)], loader, **options)
    assert all(map(torch.equal, plain, weights_and_chance(collected)))
    assert td.open_store(tmp_path).manifest["run"]["batch_statistics"] == ["net.1"]


class BrokenOffError(Exception):
    pass


class Interrupt(pl.Callback):
    """Saves a checkpoint after a batch, and fails some batches later."""

    def __init__(self, path: Path, save_at: int, fail_at: int) -> None:
        self.path, self.save_at, self.fail_at = path, save_at, fail_at

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        batches = trainer.fit_loop.total_batch_idx + 1
        if batches == self.save_at:
            trainer.save_checkpoint(self.path)
        if batches == self.fail_at:
            raise BrokenOffError


def files_of(path: Path) -> dict[str, bytes]:
    kept = ("grads.mmap", "out_to_loss.mmap", "_is_featurized.mmap", "visits.safetensors")
    kept = (*kept, "weights.safetensors", "repeats.npy")
    return {
        str(file.relative_to(path)): file.read_bytes()
        for file in sorted(path.rglob("*"))
        if file.is_file() and (file.name in kept or file.name.startswith("statistics_"))
    }


def calm_net() -> nn.Module:
    """Batch statistics, but no dropout: a resumed run draws other random numbers."""
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, stride=2), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(36, 10)
    )


@pytest.mark.parametrize("settings", [{}, WEIGHTED, WEIGHTED | {"calibrate_each": True}])
@pytest.mark.parametrize(("save_at", "fail_at"), [(5, 7), (10, 13), (5, 12), (10, 11)])
def test_an_interrupted_run_ends_like_an_undisturbed_one(
    tmp_path: Path, save_at: int, fail_at: int, settings: Any
) -> None:
    """Going back to the end of an epoch, also behind blocks that were finished already."""
    order = {"shuffle": False}
    whole = fit(calm_net, [collector(tmp_path / "whole", **settings)], order, max_epochs=3)
    checkpoint, broken = tmp_path / "at.ckpt", tmp_path / "broken"
    breaking = [Interrupt(checkpoint, save_at, fail_at), collector(broken, **settings)]
    with pytest.raises(BrokenOffError):
        fit(calm_net, breaking, order, max_epochs=3)
    module = Stepper(calm_net())
    resumed = trainer(callbacks=[collector(broken, **settings)], max_epochs=3)
    resumed.fit(module, DataLoader(dataset(), 16), ckpt_path=checkpoint)
    assert all(map(torch.equal, whole.state_dict().values(), module.state_dict().values()))
    assert files_of(tmp_path / "whole") == files_of(broken)
    assert not list(broken.rglob("*.earlier"))
    assert td.open_store(broken).model_ids == [0, 1, 2]


def test_within_an_epoch_what_was_seen_before_is_kept(tmp_path: Path) -> None:
    """Resumed within an epoch, the loader begins anew; rows from before stay."""
    checkpoint, watcher = tmp_path / "at.ckpt", Watcher()
    breaking = [watcher, Interrupt(checkpoint, 7, 9), collector(tmp_path / "store")]
    with pytest.raises(BrokenOffError):
        fit(net, breaking, max_epochs=3)
    del watcher.weights[7:]
    module = Stepper(net())
    resumed = trainer(callbacks=[watcher, collector(tmp_path / "store")], max_epochs=3)
    resumed.fit(module, DataLoader(dataset(), 16, shuffle=True), ckpt_path=checkpoint)
    check_rows(tmp_path / "store", watcher, 1e-5)
    visits = td.block_visits(td.open_store(tmp_path / "store"), 1)
    assert sorted(set(visits.batch)) == list(range(6, 11))


def test_a_run_that_ended_within_an_epoch_goes_on(tmp_path: Path) -> None:
    watcher, order = Watcher(), {"shuffle": False}
    pl.seed_everything(1, verbose=False)
    saver = Interrupt(tmp_path / "at.ckpt", 7, -1)
    first = trainer(max_steps=7, callbacks=[watcher, saver, collector(tmp_path / "store")])
    first.fit(Stepper(net()), DataLoader(dataset(), 16))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*went another way")
        fit(
            net,
            [watcher, collector(tmp_path / "store")],
            order,
            max_epochs=2,
            ckpt_path=tmp_path / "at.ckpt",
        )
    assert not list((tmp_path / "store").rglob("*.earlier"))
    visits = td.block_visits(td.open_store(tmp_path / "store"), 1)
    assert sorted(set(visits.batch)) == list(range(6, 11))
    check_rows(tmp_path / "store", watcher, 1e-4)


def test_a_checkpoint_of_an_exception_has_the_rows_before_it(tmp_path: Path) -> None:
    """Lightning saves it after the collector has heard of the exception."""
    watcher, saving = Watcher(), OnExceptionCheckpoint(tmp_path)
    callbacks = [watcher, collector(tmp_path / "store"), Interrupt(tmp_path, 0, 8), saving]
    with pytest.raises(BrokenOffError):
        fit(net, callbacks, max_epochs=3, enable_checkpointing=True)
    resumed = trainer(callbacks=[watcher, collector(tmp_path / "store")], max_epochs=3)
    resumed.fit(Stepper(net()), DataLoader(dataset(), 16), ckpt_path=saving.ckpt_path)
    check_rows(tmp_path / "store", watcher, 1e-5)
    visits = td.block_visits(td.open_store(tmp_path / "store"), 1)
    assert sorted(set(visits.batch)) == list(range(6, 11))


@pytest.mark.parametrize("by_hand", [False, True])
def test_a_disk_that_is_full_is_told_of(
    tmp_path: Path, by_hand: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """Where it is the collector that fails; another exception is not hidden by it."""

    class Fills(pl.Callback):
        def on_train_batch_start(self, trainer: pl.Trainer, *rest: Any) -> None:
            if trainer.global_step == 8:
                limit(30_000)  # less than 75 x 200 x 4 bytes

        def on_train_batch_end(self, trainer: pl.Trainer, *rest: Any) -> None:
            if by_hand and trainer.global_step == 9:
                raise BrokenOffError

    told = r"no room for the rows of an epoch: File too large.*make room"
    error = pytest.raises(BrokenOffError) if by_hand else pytest.raises(OSError, match=told)
    with error, file_limit() as limit:
        fit(net, [Fills(), collector(tmp_path / "store")], max_epochs=3)
    assert ("the last rows could not be written" in caplog.text) == by_hand
    assert td.open_store(tmp_path / "store").model_ids == [0]


def test_nothing_is_left_behind(tmp_path: Path) -> None:
    module, data = Stepper(net()), DataLoader(dataset(), 16)
    before = data.batch_sampler

    class Fail(pl.Callback):
        def on_after_backward(self, *_: Any) -> None:
            assert isinstance(data.batch_sampler, RecordingBatchSampler)
            assert any(part._forward_hooks for part in module.modules())
            raise BrokenOffError

    fitted = trainer(callbacks=[Fail(), collector(tmp_path)])
    with pytest.raises(BrokenOffError):
        fitted.fit(module, data)
    assert data.batch_sampler is before
    assert not any(part._forward_hooks for part in module.modules())
    assert not any(weight._backward_hooks for weight in module.parameters())
    assert "process_dataloader" not in vars(fitted.strategy)


def test_a_module_whose_network_is_a_hyperparameter_is_saved(tmp_path: Path) -> None:
    class Kept(Stepper):
        def __init__(self, model: nn.Module) -> None:
            super().__init__(model)
            self.save_hyperparameters()

    saving = ModelCheckpoint(tmp_path, save_last=True)
    module, callbacks = Kept(calm_net()), [saving, collector(tmp_path / "store")]
    fitted = trainer(callbacks=callbacks, enable_checkpointing=True, max_epochs=1)
    fitted.fit(module, DataLoader(dataset(), 16))
    loaded = Kept.load_from_checkpoint(saving.last_model_path, weights_only=False)
    images = dataset()[:][0]
    assert torch.equal(loaded.eval()(images), module.eval()(images))


def test_blocks_are_inspected_and_verified(tmp_path: Path) -> None:
    fit(net, [collector(tmp_path)], {"drop_last": True}, max_epochs=1)
    report = inspect_store(tmp_path, thorough=True)
    (block,) = report.checkpoints
    assert (block.state, block.rows, block.problems) == ("complete", 64, [])
    assert "64 visits of 64 of 75 samples" in block.notes
    file = tmp_path / "0" / "visits.safetensors"
    file.write_bytes(file.read_bytes()[:-8])
    (block,) = inspect_store(tmp_path).checkpoints
    assert "damaged" in block.problems[0]


def test_a_trial_run_leaves_no_store(tmp_path: Path) -> None:
    fit(net, [collector(tmp_path / "store")], fast_dev_run=True)
    assert not (tmp_path / "store").exists()


class Manual(Stepper):
    automatic_optimization = property(lambda self: False, lambda self, value: None)


class Contrastive(Stepper):
    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        out = self(batch[0])
        return (out @ out.T).logsumexp(1).mean()


class Attending(Stepper):
    def __init__(self) -> None:
        super().__init__(nn.Flatten())
        self.attend = nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Linear(64, 10)

    def forward(self, images: Tensor) -> Tensor:
        x = images.view(-1, 8, 8)
        return self.head(self.attend(x, x, x)[0].flatten(1))


class Still(Stepper):
    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return 0 * super().training_step(batch, batch_idx)


class Quasi(Stepper):
    def configure_optimizers(self) -> Any:
        return torch.optim.LBFGS(self.parameters())


@pytest.mark.parametrize(
    ("module", "options", "words"),
    [
        (lambda: Manual(net()), {}, "automatic optimization"),
        (lambda: torch.compile(Stepper(net())), {}, "torch.compile"),
        (lambda: Contrastive(net()), {}, "depends on others"),
        (Attending, {}, r"attend.in_proj_weight \(MultiheadAttention\).*grad_wrt=\['head.weight'"),
        (lambda: Still(net()), WEIGHTED, "could not calibrate with training steps.*all.*zero"),
        (lambda: Stepper(net()), {"reduction": "sum"}, "is the mean"),
        (lambda: Quasi(net()), {}, "one backward"),
    ],
)
def test_what_cannot_be_right_is_refused(
    tmp_path: Path, module: Any, options: Any, words: str
) -> None:
    with pytest.raises(MisconfigurationException, match=words):
        trainer(callbacks=[collector(tmp_path, **options)]).fit(module(), DataLoader(dataset(), 16))


def test_options_of_the_other_mode_are_refused(tmp_path: Path) -> None:
    with pytest.raises(MisconfigurationException, match="when, targets cannot be used"):
        collector(tmp_path, when="epoch", targets="val")
    with pytest.raises(MisconfigurationException, match="mode"):
        collector(tmp_path, mode="live")


def test_parameters_may_be_left_out_by_name(tmp_path: Path) -> None:
    trainer(max_epochs=1, callbacks=[collector(tmp_path, grad_wrt="head.*")]).fit(
        Attending(), DataLoader(dataset(), 16)
    )
    parameters = td.open_store(tmp_path).settings.parameters
    assert [name for name, _ in parameters] == ["head.weight", "head.bias"]


def test_losses_where_samples_meet_are_taken_when_asked_for(tmp_path: Path) -> None:
    asked = collector(tmp_path, self_check=False)
    trainer(max_epochs=1, callbacks=[asked]).fit(Contrastive(net()), DataLoader(dataset(), 16))
    assert asked.model_ids == [0]


class Looker(pl.Callback):
    """Reads batches of the training loader besides the Trainer."""

    def __init__(self, hook: str) -> None:
        setattr(self, hook, lambda trainer, *_: next(iter(trainer.train_dataloader)))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("hook", ["on_train_start", "on_train_epoch_start", "on_train_epoch_end"])
def test_others_may_look_into_the_loader(tmp_path: Path, hook: str, workers: int) -> None:
    watcher = Watcher()
    loader = {"num_workers": workers}
    callbacks = [watcher, Looker(hook), collector(tmp_path)]
    fit(net, callbacks, loader, max_epochs=2, precision="64-true")
    check_rows(tmp_path, watcher, 1e-5)


def test_a_trainer_may_fit_on(tmp_path: Path) -> None:
    watcher = Watcher()
    again = trainer(max_epochs=1, callbacks=[watcher, collector(tmp_path)], precision="64-true")
    module, loader = Stepper(net()), DataLoader(dataset(), 16, shuffle=True)
    again.fit(module, loader)
    again.fit_loop.max_epochs = 2
    again.fit(module, loader)
    assert td.open_store(tmp_path).model_ids == [0, 1]
    check_rows(tmp_path, watcher, 1e-5)


class Reused(torch.utils.data.Sampler[Any]):
    """Yields one buffer again and again."""

    def __iter__(self) -> Any:
        buffer = np.zeros(15, np.int64)
        for begin in range(0, N, 15):
            buffer[:] = range(begin, begin + 15)
            yield buffer

    def __len__(self) -> int:
        return N // 15


def test_a_batch_sampler_may_yield_the_same_buffer(tmp_path: Path) -> None:
    watcher = Watcher()
    given = trainer(max_epochs=1, callbacks=[watcher, collector(tmp_path)], precision="64-true")
    given.fit(Stepper(net()), DataLoader(dataset(), batch_sampler=Reused()))
    assert td.block_visits(td.open_store(tmp_path), 0).index.tolist() == list(range(N))
    check_rows(tmp_path, watcher, 1e-5)


class Reader(Stepper):
    """Reads its Trainer and writes to its logger in a training step."""

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        if self.trainer.current_epoch < self.trainer.max_epochs:
            self.logger.experiment.append(batch_idx)
        return super().training_step(batch, batch_idx)


class Notes(pl.loggers.logger.DummyLogger):
    """A logger whose experiment is a list."""

    def __init__(self) -> None:
        super().__init__()
        self.noted: list[int] = []

    @property
    def experiment(self) -> Any:
        return self.noted


def test_a_training_step_may_read_its_trainer(tmp_path: Path) -> None:
    notes = Notes()
    trainer(max_epochs=1, logger=notes, callbacks=[collector(tmp_path)]).fit(
        Reader(net(), "sum"), DataLoader(dataset(), 16)
    )
    assert td.open_store(tmp_path).manifest["run"]["reduction"] == "sum"
    assert notes.noted == [0, 1, 2, 3, 4]  # and nothing of the trial


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_without_the_self_check_the_loss_is_still_known(tmp_path: Path, reduction: str) -> None:
    fit(net, [collector(tmp_path, self_check=False)], reduction=reduction, max_epochs=1)
    assert td.open_store(tmp_path).manifest["run"]["reduction"] == reduction


class Untried(Stepper):
    """Cannot be tried by itself."""

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        if len(batch[0]) < 4:
            torch.rand(1)
            raise RuntimeError("too few")
        return super().training_step(batch, batch_idx)


def test_where_no_step_can_be_tried_the_user_must_know(tmp_path: Path) -> None:
    def run(*callbacks: Any) -> tuple[Any, Tensor]:
        pl.seed_everything(1, verbose=False)
        module, loader = Untried(restless_net()), DataLoader(dataset(), 16, shuffle=True)
        trainer(max_epochs=1, callbacks=list(callbacks)).fit(module, loader)
        return module.state_dict(), torch.get_rng_state()

    with pytest.raises(MisconfigurationException, match=r"too few.*reduction='mean' or 'sum'"):
        run(collector(tmp_path / "auto"))
    with pytest.warns(UserWarning, match="could not compare rows beforehand"):
        weights, state = run(collector(tmp_path / "mean", reduction="mean"))
    plain, other = run()
    assert torch.equal(state, other)
    assert all(map(torch.equal, weights.values(), plain.values()))


def test_a_data_set_of_another_size_is_refused_when_it_comes(tmp_path: Path) -> None:
    class Shrinking(Stepper):
        def train_dataloader(self) -> Any:
            return DataLoader(dataset(N - 5 * self.trainer.current_epoch), 16)

    reloading = trainer(
        max_epochs=2, callbacks=[collector(tmp_path)], reload_dataloaders_every_n_epochs=1
    )
    with pytest.raises(MisconfigurationException, match="has 70 samples in epoch 1, 75 when"):
        reloading.fit(Shrinking(net()))
    assert td.open_store(tmp_path).model_ids == [0]


class Padded(pl.LightningModule):
    """A classifier of sequences whose batches are as long as their longest sequence."""

    def __init__(self, flat: bool) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 6), nn.Linear(6, 3)
        self.flat = flat

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        values, mask, labels = batch
        hidden = self.first(values.flatten(0, 1)) if self.flat else self.first(values)
        hidden = hidden.view(*values.shape[:2], 6).relu() * mask.unsqueeze(-1)
        return nn.functional.cross_entropy(self.last(hidden.sum(1)), labels)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.1)


def padded(samples: list[tuple[Tensor, int]]) -> list[Tensor]:
    values = nn.utils.rnn.pad_sequence([value for value, _ in samples], batch_first=True)
    lengths = torch.tensor([len(value) for value, _ in samples])
    mask = (torch.arange(values.shape[1]) < lengths.unsqueeze(1)).to(values.dtype)
    return [values, mask, torch.tensor([label for _, label in samples])]


@pytest.mark.parametrize("flat", [False, True], ids=["sequences", "positions"])
def test_batches_may_be_of_any_length(tmp_path: Path, flat: bool) -> None:
    pl.seed_everything(0, verbose=False)
    lengths = [*torch.randint(1, 9, (29,)).tolist(), 12]  # the last sample is one of the trial's
    samples = [(torch.randn(length, 4).double(), i % 3) for i, length in enumerate(lengths)]
    module, watcher = Padded(flat), Watcher()
    trainer(
        max_epochs=1, callbacks=[watcher, collector(tmp_path, proj_dim=40)], precision="64-true"
    ).fit(module, DataLoader(samples, 7, shuffle=True, collate_fn=padded))
    store = td.open_store(tmp_path)
    projector, visits = store.projector(), td.block_visits(store, 0)
    assert sorted(visits.index) == list(range(30))
    for index, batch in zip(visits.index, visits.batch, strict=True):
        module.load_state_dict(watcher.weights[batch - 1])
        module.zero_grad()
        module.training_step(padded([samples[index]]), 0).backward()
        grads = {name: w.grad.unsqueeze(0) for name, w in module.named_parameters()}
        row = -projector.project(grads, 0)[0] / math.sqrt(projector.grad_dim)
        np.testing.assert_allclose(store.grads(0)[index], row.numpy(), rtol=1e-4, atol=1e-6)


class Placed(nn.Module):
    """Rows of an image with their positions, which pass several layers before they meet a batch."""

    def __init__(self, room: bool) -> None:
        super().__init__()
        self.rows, self.places = nn.Linear(8, 6), nn.Embedding(8, 6)
        self.norm, self.mix, self.head = nn.LayerNorm(6), nn.Linear(6, 6), nn.Linear(6, 10)
        self.room = room

    def forward(self, images: Tensor) -> Tensor:
        places = torch.arange(8).unsqueeze(0) if self.room else torch.arange(8)
        x = self.rows(images[:, 0]) + self.mix(torch.relu(self.norm(self.places(places))))
        return self.head(torch.tanh(x).mean(1))


@pytest.mark.parametrize("room", [False, True])
def test_layers_without_a_batch_under_several_collectors(tmp_path: Path, room: bool) -> None:
    """Each of them gives such a layer's output a batch, and the next layer is given it."""
    plain, watcher = fit(lambda: Placed(room), [], max_epochs=1), Watcher()
    collectors = [collector(tmp_path / str(seed), seed=seed) for seed in (0, 1)]
    module = fit(lambda: Placed(room), [watcher, *collectors], max_epochs=1)
    for before, after in zip(plain.parameters(), module.parameters(), strict=True):
        torch.testing.assert_close(after, before)  # sums over samples run in another order
    model = Placed(room).double()
    for one in collectors:
        projector, visits = one.store.projector(), td.block_visits(one.store, 0)
        for index, batch in zip(visits.index, visits.batch, strict=True):
            weights = watcher.weights[batch - 1]
            model.load_state_dict({n.removeprefix("net."): w for n, w in weights.items()})
            image, label = dataset()[int(index)]
            loss = nn.functional.cross_entropy(model(image[None].double()), label[None])
            grads = torch.autograd.grad(loss, list(model.parameters()))
            named = zip((f"net.{n}" for n, _ in model.named_parameters()), grads, strict=True)
            row = projector.project({n: g.unsqueeze(0) for n, g in named}, 0)[0]
            row /= -math.sqrt(projector.grad_dim)
            np.testing.assert_allclose(one.store.grads(0)[index], row, rtol=1e-3, atol=1e-5)


def test_collections_in_the_middle_of_a_step_are_apart(tmp_path: Path) -> None:
    """A batch has begun and its forward has not; or a step that was skipped has begun last."""

    class Skipping(Stepper):
        def training_step(self, batch: list[Tensor], batch_idx: int) -> Any:
            return None if batch_idx == 4 else super().training_step(batch, batch_idx)

    def run(path: Path, *others: Any) -> GradientCollector:
        pl.seed_everything(1, verbose=False)
        live = collector(path)
        saver = ModelCheckpoint(path, every_n_train_steps=2, save_top_k=-1)
        trainer(callbacks=[live, *others, saver], enable_checkpointing=True).fit(
            Skipping(Placed(room=False)), DataLoader(dataset(), 16, shuffle=True)
        )
        return live

    passing = GradientCollector(tmp_path / "passes", proj_dim=50, when=["epoch", "checkpoint"])
    beside, alone = run(tmp_path / "beside", passing), run(tmp_path / "alone")
    assert len(passing.model_ids) == 6
    for model_id in (0, 1):
        np.testing.assert_array_equal(beside.store.grads(model_id), alone.store.grads(model_id))


def longest_first(samples: list[tuple[Tensor, int]]) -> list[Tensor]:
    """As for `nn.utils.rnn.pack_padded_sequence`."""
    return padded(sorted(samples, key=lambda sample: -len(sample[0])))


def test_a_collation_that_sorts_is_refused(tmp_path: Path) -> None:
    """Though the samples of the trial are in its order."""
    samples = [(torch.randn(9 - i // 4, 4), i % 3) for i in range(30)]
    loader = DataLoader(samples, 7, shuffle=True, collate_fn=longest_first)
    with pytest.raises(MisconfigurationException, match=r"\(longest_first\) reorders samples"):
        trainer(callbacks=[collector(tmp_path, proj_dim=40)]).fit(Padded(False), loader)


class Buckets(torch.utils.data.Sampler[Any]):
    """Batches of samples of the same length, which need no padding."""

    def __iter__(self) -> Any:
        return iter([list(range(begin, begin + 5)) for begin in range(0, 30, 5)])

    def __len__(self) -> int:
        return 6


def test_samples_of_the_trial_are_of_one_length_where_they_must(tmp_path: Path) -> None:
    samples = [(torch.randn(1 + i // 5, 4), torch.ones(1 + i // 5), i % 3) for i in range(30)]
    loader = DataLoader(samples, batch_sampler=Buckets())
    found = collector(tmp_path, proj_dim=40)
    trainer(max_epochs=1, callbacks=[found]).fit(Padded(False), loader)
    assert found.model_ids == [0]


class Views(Stepper):
    """A contrastive loss over two views of each sample."""

    def __init__(self, apart: bool) -> None:
        super().__init__(net())
        self.apart = apart

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        pair = batch[0], batch[0].flip(-1)
        both = torch.cat(pair) if self.apart else torch.stack(pair, 1).flatten(0, 1)
        found = self(both)
        first, second = found.chunk(2) if self.apart else (found[::2], found[1::2])
        return nn.functional.cross_entropy(first @ second.T, torch.arange(len(first)))


def test_views_must_lie_side_by_side(tmp_path: Path) -> None:
    def run(apart: bool) -> None:
        asked = collector(tmp_path / str(apart), self_check=False, reduction="mean")
        trainer(max_epochs=1, callbacks=[asked]).fit(Views(apart), DataLoader(dataset(), 16))

    run(apart=False)
    with pytest.raises(MisconfigurationException, match=r"2 entries .* do not lie together"):
        run(apart=True)


class Weighted(Stepper):
    """A mean by class weights, whose gradient of a sample depends on the batch."""

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        weights = torch.arange(1.0, 11.0)
        return nn.functional.cross_entropy(self(batch[0]), batch[1], weights)


def test_a_data_set_in_the_order_of_classes_hides_nothing(tmp_path: Path) -> None:
    images, labels = dataset().tensors
    order = labels.argsort()
    sorted_ = DataLoader(TensorDataset(images[order], labels[order]), 16)
    with pytest.raises(MisconfigurationException, match="loss of a sample depends on others"):
        trainer(max_epochs=1, callbacks=[collector(tmp_path)]).fit(Weighted(net()), sorted_)


class Noisy(Stepper):
    """Draws noise in each step."""

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return super().training_step([batch[0] + torch.randn_like(batch[0]), batch[1]], batch_idx)


def test_a_step_that_draws_random_numbers_is_told_by_that(tmp_path: Path) -> None:
    with pytest.raises(MisconfigurationException, match="draws random numbers of its own"):
        trainer(callbacks=[collector(tmp_path)]).fit(Noisy(net()), DataLoader(dataset(), 16))


class Opened(torch.utils.data.Dataset[Any]):
    """Remembers the process that read it first, as one that opens its file then."""

    opened: int | None = None

    def __getitem__(self, index: int) -> Any:
        self.opened = self.opened or os.getpid()
        assert self.opened == os.getpid()
        return dataset()[index]

    def __len__(self) -> int:
        return N


def test_the_data_set_is_read_where_its_loader_reads_it(tmp_path: Path) -> None:
    data = Opened()
    trainer(max_epochs=1, callbacks=[collector(tmp_path)]).fit(
        Stepper(net()), DataLoader(data, 16, num_workers=1)
    )
    assert data.opened is None


class Growing(Stepper):
    """Trains its first layer from the third batch on, in a parameter group of its own."""

    def __init__(self) -> None:
        super().__init__(net())
        self.net[0].requires_grad_(False)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        if batch_idx == 2:
            self.net[0].requires_grad_(True)
            group = {"params": list(self.net[0].parameters()), "lr": 0.5}
            self.optimizers().optimizer.add_param_group(group)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD([w for w in self.parameters() if w.requires_grad], 0.05)


def test_layers_may_be_unfrozen_within_an_epoch(tmp_path: Path) -> None:
    named = collector(tmp_path / "named", grad_wrt=["net.4.*"], proj_dim=50)
    trainer(max_epochs=1, callbacks=[named]).fit(Growing(), DataLoader(dataset(), 16))
    rates = td.block_visits(td.open_store(tmp_path / "named"), 0).learning_rate
    assert rates[:32].tolist() == [[0.05, 0.0]] * 32
    assert rates[32:].tolist() == [[0.05, 0.5]] * (N - 32)

    with pytest.raises(MisconfigurationException, match=r"net.0.weight, net.0.bias were frozen"):
        trainer(max_epochs=1, callbacks=[collector(tmp_path / "all")]).fit(
            Growing(), DataLoader(dataset(), 16)
        )
    assert td.open_store(tmp_path / "all").model_ids == [0]  # what was collected is there


def test_gradients_that_are_not_finite_are_not_stored(tmp_path: Path) -> None:
    class Spoiled(Stepper):
        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            loss = super().training_step(batch, batch_idx)
            return loss * (float("nan") if batch_idx == 2 and self.trainer.max_epochs else 1)

        def on_before_optimizer_step(self, _: Any) -> None:
            for weight in self.parameters():
                weight.grad.nan_to_num_(0.0)

    with pytest.warns(UserWarning, match="16 training samples of epoch 0 were NaN"):
        trainer(max_epochs=1, callbacks=[collector(tmp_path)]).fit(
            Spoiled(net()), DataLoader(dataset(), 16)
        )
    store = td.open_store(tmp_path)
    visits = td.block_visits(store, 0)
    assert set(visits.index[visits.place == NOT_STORED]) == set(range(32, 48))
    assert not store.grads(0)[32:48].any()
    assert store.describe(0)["not_finite"] == 16


@pytest.mark.parametrize("strategy", ["ddp_fork"])
def test_two_processes(tmp_path: Path, strategy: str) -> None:
    options = {"strategy": strategy, "devices": 2, "max_epochs": 2}
    plain = fit(restless_net, [], **options)
    collected = fit(restless_net, [collector(tmp_path / "two")], **options)
    assert all(map(torch.equal, plain.state_dict().values(), collected.state_dict().values()))

    # Without batch statistics, one process with batches of twice the size does the same steps,
    # but for the last batch, where the sampler fills up with a sample that comes again.
    fit(net, [collector(tmp_path / "pair", **WEIGHTED)], {"batch_size": 8}, **options)
    pl.seed_everything(1, verbose=False)
    store = td.open_store(tmp_path / "pair")
    visits = td.block_visits(store, 0)
    assert store.model_ids == [0, 1]
    assert len(visits) == N + 1
    assert len(np.unique(visits.index)) == N
    assert (visits.place >= 0).sum() == 1
    assert sorted(np.bincount(visits.rank)) == [38, 38]
    assert np.all(visits.share[visits.batch == 1] == 1 / 16)
    assert not list((tmp_path / "pair").rglob("*.part"))
    weights = net()
    pl.seed_everything(1, verbose=False)
    start = Stepper(net())
    weights.load_state_dict(start.net.state_dict())
    model, projector = weights.double(), store.projector()
    # By hand: the steps that both processes take together.
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    images, labels = digits()
    for number in range(1, 6):
        batch = visits.index[visits.batch == number]
        for index in batch:
            place = visits.place[(visits.batch == number) & (visits.index == index)][0]
            if place == IN_PLACE:
                row = expected_row(model, projector, 0, int(index))
                found = torch.from_numpy(np.array(store.grads(0)[index]))
                assert float((found - row).abs().max()) <= 1e-4 * float(row.abs().max())
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images[batch].double()), labels[batch]).backward()
        optimizer.step()
        for group in optimizer.param_groups:
            group["lr"] *= 0.9


@pytest.mark.parametrize("finished", [False, True])
def test_a_run_may_go_on_with_fewer_processes(tmp_path: Path, finished: bool) -> None:
    options = {"strategy": "ddp_fork", "devices": 2}
    fit(net, [collector(tmp_path / "whole")], **options)
    checkpoint, path = tmp_path / "at.ckpt", tmp_path / "broken"
    breaking = [Interrupt(checkpoint, 5, 8 if finished else 6), collector(path)]
    with pytest.raises(Exception, match="BrokenOffError"):
        fit(net, breaking, max_epochs=3, **options)
    going_on = trainer(callbacks=[collector(path)], max_epochs=3)
    going_on.fit(Stepper(net()), DataLoader(dataset(), 16), ckpt_path=checkpoint)
    kept = []
    for root in (tmp_path / "whole", path):
        visits = td.block_visits(td.open_store(root), 1)
        kept.append(visits[visits.batch <= 5])
        assert len(visits) > 64 == len(kept[-1])
    assert np.array_equal(kept[0].index, kept[1].index)
    assert np.array_equal(kept[0].rank, kept[1].rank)
    rows = [
        rows_of(root / "1", v) for root, v in zip((tmp_path / "whole", path), kept, strict=True)
    ]
    np.testing.assert_array_equal(*rows)
    assert not list(path.rglob("*.part"))


def test_of_processes_that_are_gone_only_what_the_run_keeps_counts(tmp_path: Path) -> None:
    """Without batch 2 of the second process: the run goes on in one, after batch 1."""
    np.lib.format.open_memmap(tmp_path / "grads.mmap", "w+", np.float32, (4, 2))
    for rank in (0, 1):
        writer = BlockWriter(tmp_path, 4, 2, rank)
        for batch in (1, 2):
            index = np.array([2 * rank + batch - 1])
            one, zero = np.ones(1), np.zeros(1, np.int64)
            visits = Visits(
                index, zero.copy(), zero + batch, zero, np.full(1, rank), one, one[:, None]
            )
            writer.add(visits, np.full((1, 2), 10.0 * rank + batch, np.float32))
        writer.sync()
        writer.close()
    keep_others(tmp_path, 4, 2, ranks=1, last=1)
    visits = merge(tmp_path)
    assert visits.index.tolist() == [0, 2, 1]
    assert visits.rank.tolist() == [0, 1, 0]
    rows = np.load(tmp_path / "grads.mmap")
    assert rows[:, 0].tolist() == [1, 2, 11, 0]
