"""GradientCollector under DDP: two real processes on the CPU."""

import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cases import Classifier, convnet, loader, target_set, trainer
from lightning_run import Epochwise, Noisy
from pytorch_lightning.strategies import FSDPStrategy
from pytorch_lightning.utilities.exceptions import MisconfigurationException

from trak_dropout import open_store
from trak_dropout.lightning import GradientCollector
from trak_dropout.lightning.data import set_random_states

SCRIPT = Path(__file__).with_name("lightning_run.py")


def start(out: Path, **options: Any) -> subprocess.CompletedProcess[str]:
    out.mkdir()
    words = json.dumps({"out": str(out), "devices": 2, **options})
    return subprocess.run(
        [sys.executable, str(SCRIPT), words], capture_output=True, text=True, timeout=300
    )


def one_process_rows(
    weights: list[dict], n: int, save_dir: Path, **options: Any
) -> list[np.ndarray]:
    """Rows that a run of one process collects at two sets of weights."""

    class Given(Classifier):
        def take(self, i: int) -> None:
            self.load_state_dict(weights[i])
            self.trainer.save_checkpoint(save_dir.with_suffix(".ckpt"))

        def on_train_start(self) -> None:
            self.take(0)

        def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
            if batch_idx == 0:
                self.take(1)

    settings: dict[str, Any] = {"proj_dim": 16, "batch_size": 10, **options}
    collector = GradientCollector(save_dir, when="checkpoint", **settings)
    trainer(max_epochs=1, callbacks=[collector]).fit(Given(convnet()), loader(Noisy(n), 7))
    return [np.array(collector.store.grads(m)) for m in (0, 1)]


@pytest.fixture
def _one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # as the processes have it: sums run in another order with more
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("_one_thread")
@pytest.mark.parametrize("strategy", ["ddp", "ddp_spawn"])
@pytest.mark.parametrize("n", [103, 7])  # 7: less than a batch, so one process has nothing to do
def test_rows_are_those_of_one_process(tmp_path: Path, strategy: str, n: int) -> None:
    if (strategy, n) == ("ddp_spawn", 7):
        pytest.skip("as with ddp")
    options: dict[str, Any] = {}
    if n == 7:
        options = {"proj_type": "weighted_dropout", "fold": 2, "use_half_precision": True}
    spawned = strategy == "ddp_spawn"
    result = start(tmp_path / "ddp", strategy=strategy, n=n, sampler=spawned, collector=options)
    assert result.returncode == 0, result.stderr[-3000:]
    store = open_store(tmp_path / "ddp" / "store", Epochwise(convnet()))
    assert store.model_ids == [0, 1]
    expected = one_process_rows([store.weights(m) for m in (0, 1)], n, tmp_path / "one", **options)
    for model_id, rows in enumerate(expected):
        np.testing.assert_array_equal(store.grads(model_id), rows)
        assert rows.shape == (n, 16)
        assert len(np.unique(rows, axis=0)) == n
    assert store.attribute(loader(target_set()), progress=False).shape == (n, 20)


def test_training_is_bit_equal(tmp_path: Path) -> None:
    weights = []
    for collect in (True, False):
        result = start(tmp_path / str(collect), strategy="ddp", collect=collect)
        assert result.returncode == 0, result.stderr[-3000:]
        weights.append(torch.load(tmp_path / str(collect) / "weights.pt"))
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


@pytest.mark.parametrize("rank", [0, 1])
def test_a_dead_process_is_told_of_by_the_other(tmp_path: Path, rank: int) -> None:
    result = start(tmp_path / "ddp", strategy="ddp", kill_rank=rank)
    assert result.returncode != 0
    assert "another process of this run has died" in result.stderr


def test_an_error_in_one_process_is_raised_in_both(tmp_path: Path) -> None:
    result = start(tmp_path / "ddp", strategy="ddp", collector={"proj_dim": 10**6})
    assert result.returncode != 0
    assert result.stderr.count("proj_dim=1000000 is above grad_dim") >= 2


def test_strategies_that_split_the_weights_are_refused(tmp_path: Path) -> None:
    runner = trainer()
    runner.strategy.__class__ = FSDPStrategy  # which Lightning does not build without a GPU
    with pytest.raises(MisconfigurationException, match="which FSDPStrategy does not give it"):
        GradientCollector(tmp_path).setup(runner, Classifier(), "fit")


def test_random_states_are_set_all_three() -> None:
    drawn = []
    for number in (3, 4, 3):
        set_random_states(0, number)
        drawn.append((random.random(), np.random.random(), torch.rand(1).item()))  # noqa: NPY002
    assert drawn[0] == drawn[2]
    assert all(a != b for a, b in zip(drawn[0], drawn[1], strict=True))
