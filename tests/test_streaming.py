"""Self-influence streamed from files, restarts, and several processes."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cases import checkpoints, loader, mlp, quickstart, train_set

from trak_dropout import (
    DropoutProjector,
    RankError,
    plugin,
    self_influence,
    top_influences,
)
from trak_dropout.largest import Largest
from trak_dropout.rowfile import RowFile
from trak_dropout.store import FeatureFiles, remove_store


@pytest.mark.parametrize("half", [False, True])
def test_self_influence_is_the_diagonal_of_the_scores(tmp_path: Path, half: bool) -> None:
    model = mlp()
    traker, scores = quickstart(
        model,
        checkpoints(model, 2),
        tmp_path,
        targets=loader(train_set()),
        n_targets=300,
        use_half_precision=half,
        **plugin(model, 64),
    )
    values = self_influence(traker)
    assert values.shape == (300,)
    if half:  # features are rescaled per checkpoint there, as TRAK rescales them
        assert np.corrcoef(values, np.diag(scores))[0, 1] > 0.99
    else:
        np.testing.assert_allclose(values, np.diag(scores), rtol=1e-4)
    np.testing.assert_array_equal(values, self_influence(FeatureFiles(tmp_path)))
    one = self_influence(traker, model_ids=[1])
    assert not np.allclose(one, values)
    assert not np.allclose(self_influence(traker, damping=0.1), values)


def test_self_influence_takes_the_trakers_damping(tmp_path: Path) -> None:
    model = mlp()
    states = checkpoints(model, 1)
    damped, _ = quickstart(model, states, tmp_path / "a", **plugin(model, 64, damping=0.01))
    plain, _ = quickstart(
        model, states, tmp_path / "b", projector=DropoutProjector.from_model(model, 64)
    )
    ours, theirs = self_influence(damped), self_influence(plain, damping=0.01)
    np.testing.assert_allclose(ours, theirs, rtol=1e-3)  # rounding of two gradient computers
    assert np.abs(self_influence(damped, damping=0.1) / theirs - 1).max() > 0.1
    with pytest.raises(TypeError, match="must be a store or a TRAKer"):
        self_influence(tmp_path)


def test_several_dampings_are_those_one_by_one(tmp_path: Path) -> None:
    model = mlp()
    for columns in (64, 512):  # 512 columns of 300 samples: the dual form
        folder = tmp_path / str(columns)
        quickstart(model, checkpoints(model, 2), folder, **plugin(model, columns))
        store = FeatureFiles(folder)
        dampings = [0.01, "auto", 3.0]
        together = self_influence(store, damping=dampings)
        assert together.shape == (3, 300)
        for damping, values in zip(dampings, together, strict=True):
            np.testing.assert_allclose(values, self_influence(store, damping=damping), rtol=1e-7)
    with pytest.raises(ValueError, match="damping is an empty list"):
        self_influence(store, damping=[])


def small_store(folder: Path) -> FeatureFiles:
    model = mlp()
    options = {"use_half_precision": False, **plugin(model, 64)}
    quickstart(model, checkpoints(model, 2), folder, **options)
    return FeatureFiles(folder)


def unfinished(store: FeatureFiles) -> list[Path]:
    return list(store.save_dir.glob(".unfinished*"))


FEW = 20 * 64 * 30  # bytes for about 30 rows at a time


@pytest.mark.parametrize("at", [1, 5, 9, 15, 18])
def test_an_interrupted_self_influence_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    store = small_store(tmp_path)
    expected = self_influence(store)
    monkeypatch.setattr("trak_dropout.progress._SECONDS", 0.0)
    read = RowFile._fill
    blocks = 0

    def counted(self: RowFile, values: np.ndarray, start: int) -> None:
        nonlocal blocks
        blocks += self.file.name == "grads.mmap"
        if blocks == stop:
            raise KeyboardInterrupt
        read(self, values, start)

    monkeypatch.setattr(RowFile, "_fill", counted)
    stop = 10**9
    np.testing.assert_allclose(self_influence(store, memory=FEW), expected, rtol=1e-6)
    whole, blocks, stop = blocks, 0, at
    with pytest.raises(KeyboardInterrupt):
        self_influence(store, memory=FEW)
    assert unfinished(store)
    blocks, stop = 0, 10**9
    np.testing.assert_allclose(self_influence(store, memory=FEW), expected, rtol=1e-6)
    # What was read ahead but not yet used when the interrupt came is read again.
    assert blocks <= whole - at + 3
    assert not unfinished(store)


KILLED = """
import os, signal, sys
from trak_dropout import progress, top_influences
from trak_dropout.largest import Largest
from trak_dropout.scoring import DampedScoreComputer
from trak_dropout.store import FeatureFiles, remove_store

progress._SECONDS = 0.0
calls, at = 0, int(sys.argv[2])
def counted(function):
    def call(*arguments):
        global calls
        calls += 1
        if calls == at:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*arguments)
    return call
DampedScoreComputer.add_to_gram = counted(DampedScoreComputer.add_to_gram)
Largest.add = counted(Largest.add)
indices, values = top_influences(FeatureFiles(sys.argv[1]), "test", 7, memory=40_000)
print(calls, indices.tolist())
"""


@pytest.mark.parametrize("at", [14, 27])
def test_a_killed_ranking_goes_on(tmp_path: Path, at: int) -> None:
    store = small_store(tmp_path)
    expected, _ = top_influences(store, "test", 7)

    def run(stop: int) -> subprocess.CompletedProcess:
        command = [sys.executable, "-c", KILLED, str(tmp_path), str(stop)]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    whole, _, indices = run(10**9).stdout.partition(" ")
    assert indices.strip() == str(expected.tolist())
    assert int(whole) == 30
    assert run(at).returncode == -signal.SIGKILL
    assert unfinished(store)
    other, _ = top_influences(store, "test", 5)  # other arguments: not of that computation
    np.testing.assert_array_equal(other, expected[:, :5])
    left, _, indices = run(10**9).stdout.partition(" ")
    assert indices.strip() == str(expected.tolist())
    assert int(left) <= int(whole) - at + 2
    assert not unfinished(store)


def test_other_inputs_are_not_taken_for_the_interrupted_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = small_store(tmp_path)
    monkeypatch.setattr("trak_dropout.progress._SECONDS", 0.0)
    add = Largest.add

    def interrupted(*arguments: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Largest, "add", interrupted)
    with pytest.raises(KeyboardInterrupt):
        top_influences(store, "test", 5)
    with pytest.raises(KeyboardInterrupt):
        top_influences(store, "test", 6)
    assert len(unfinished(store)) == 2
    monkeypatch.setattr(Largest, "add", add)
    grads = np.load(tmp_path / "0" / "grads.mmap")
    np.save((tmp_path / "0" / "grads.mmap").open("wb"), grads[::-1])
    _, values = top_influences(store, "test", 5)
    assert not unfinished(store)
    np.testing.assert_array_equal(values, top_influences(store, "test", 5)[1])


def test_errors_of_the_machine_keep_what_was_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = small_store(tmp_path)
    quick = top_influences(store, "test", 5)
    monkeypatch.setattr("trak_dropout.progress._SECONDS", 0.0)
    for error in (OSError(28, "No space left on device"), MemoryError(), RankError("another")):
        with monkeypatch.context() as context:

            def fails(*arguments: Any, error: BaseException = error) -> None:
                raise error

            context.setattr(Largest, "add", fails)
            with pytest.raises(type(error)):
                top_influences(store, "test", 5)
            assert len(unfinished(store)) == 1
        # Neither the end of another computation nor that of a part of it removes it.
        self_influence(store)
        top_influences(store, "test", 5, model_ids=[0])
        assert len(unfinished(store)) == 1
        np.testing.assert_array_equal(top_influences(store, "test", 5)[0], quick[0])
        assert not unfinished(store)
    monkeypatch.setattr(Largest, "add", fails)
    with pytest.raises(RankError):
        top_influences(store, "test", 5)
    remove_store(tmp_path)
    assert not unfinished(store)


TWO = """
import os, signal, sys
import numpy as np
from lightning_fabric import Fabric
from torch import distributed
from trak_dropout import self_influence, top_influences
from trak_dropout.largest import Largest
from trak_dropout.store import FeatureFiles, remove_store

def work(fabric, store, out, dies):
    if dies and fabric.global_rank == 1:
        Largest.add = lambda *arguments: os.kill(os.getpid(), signal.SIGKILL)
    files = FeatureFiles(store)
    found = [*top_influences(files, "test", 7, fabric=fabric),
             *top_influences(files, "test", 250, harmful=True, method="dot", fabric=fabric),
             self_influence(files, fabric=fabric),
             self_influence(files, damping=[0.1, 1.0], fabric=fabric)]
    np.savez(f"{out}_{fabric.global_rank}.npz", *found)
    distributed.destroy_process_group()

if __name__ == "__main__":
    fabric = Fabric(accelerator="cpu", devices=2, strategy="ddp_spawn")
    fabric.launch(work, sys.argv[1], sys.argv[2], sys.argv[3] == "dies")
"""


def test_two_processes_give_what_one_gives(tmp_path: Path) -> None:
    store = small_store(tmp_path / "store")
    script = tmp_path / "two.py"
    script.write_text(TWO)
    command = [sys.executable, str(script), str(store.save_dir), str(tmp_path / "out")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    options: Any = {"capture_output": True, "text": True, "env": environment, "timeout": 300}
    done = subprocess.run([*command, "lives"], check=False, **options)
    assert done.returncode == 0, done.stderr
    expected = [
        *top_influences(store, "test", 7),
        *top_influences(store, "test", 250, harmful=True, method="dot"),
        self_influence(store),
        self_influence(store, damping=[0.1, 1.0]),
    ]
    for rank in (0, 1):
        found = np.load(tmp_path / f"out_{rank}.npz")
        for i, values in enumerate(expected):
            if values.dtype == np.int64:
                np.testing.assert_array_equal(found[f"arr_{i}"], values)
            else:
                np.testing.assert_allclose(found[f"arr_{i}"], values, rtol=1e-5, atol=1e-12)
    assert not unfinished(store)
    died = subprocess.run([*command, "dies"], check=False, **options)
    assert died.returncode != 0
    assert "process 1 terminated with signal SIGKILL" in died.stderr


BOTH = """
import sys
from lightning_fabric import Fabric
from trak_dropout import RankError, self_influence
from trak_dropout.store import FeatureFiles, remove_store

fabric = Fabric(accelerator="cpu", devices=2, strategy="ddp")
fabric.launch()
try:
    self_influence(FeatureFiles(sys.argv[1]), fabric=fabric)
except Exception as error:
    print(f"{fabric.global_rank}: {type(error).__name__}: {error}", flush=True)
"""


def test_an_error_in_one_process_is_one_in_all(tmp_path: Path) -> None:
    store = small_store(tmp_path / "store")
    grads = np.load(store.save_dir / "0" / "grads.mmap", mmap_mode="r+")
    grads[250] = np.nan
    grads.flush()
    script = tmp_path / "both.py"
    script.write_text(BOTH)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*torchrun, str(script), str(store.save_dir)],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    reason = "GramError: compressed gradients of samples [250] are NaN or infinite"
    assert f"1: {reason}" in done.stdout, done.stderr
    assert f"0: RankError: process 1 of 2 failed: {reason}" in done.stdout
