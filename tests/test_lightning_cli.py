"""The LightningCLI example, as the documentation tells to run it."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from trak_dropout import open_store, top_influences
from trak_dropout.cli import main

EXAMPLE = Path(__file__).parents[1] / "docs" / "examples" / "digits"


def cli(directory: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "digits.py", "fit", "--config", "config.yaml", *words],
        cwd=directory, capture_output=True, text=True, timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def test_example_trains_and_collects(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("jsonargparse")
    directory = tmp_path / "digits"
    shutil.copytree(EXAMPLE, directory)
    result = cli(directory, "--trainer.max_epochs", "2")
    assert result.returncode == 0, result.stderr[-3000:]
    store = open_store(directory / "digits_store")
    assert store.model_ids == [0, 1]
    assert store.train_set_size == 1500
    indices, _ = top_influences(store, "val", 3)
    assert indices.shape == (100, 3)
    assert "last.ckpt" in json.dumps(store.describe(1)["checkpoints"])
    assert main(["inspect", str(store.save_dir)]) == 0
    assert "val (100 targets)" in capsys.readouterr().out
    monkeypatch.chdir(directory)
    assert main(["score", "digits_store", "--experiment", "val"]) == 0
    words = ["--data", "digits.py:train_set", "--targets", "val=digits.py:val_set"]
    assert main(["report", "digits_store", *words]) == 0
    assert (directory / "report.html").stat().st_size > 10_000
    # A mistake in the file is told of before training.
    wrong = cli(directory, "--trainer.callbacks.proj_dim", "many")
    assert wrong.returncode != 0
    resumed = cli(
        directory, "--trainer.max_epochs", "3", "--ckpt_path", "digits_checkpoints/last.ckpt"
    )
    assert resumed.returncode == 0, resumed.stderr[-3000:]
    assert open_store(directory / "digits_store").model_ids == [0, 1, 2]
