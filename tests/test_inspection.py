"""`trak-dropout inspect` and `verify` on stores that are whole and on ones that are not."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cases import Classifier, loader, mlp, target_set
from test_lightning import fit

from trak_dropout.cli import main
from trak_dropout.inspection import inspect_store


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("whole") / "store"
    fit(root, Classifier(mlp()), targets={"mine": loader(target_set())})
    return root


def told(command: str, store: Path, capsys: pytest.CaptureFixture) -> tuple[int, dict[str, Any]]:
    code = main([command, str(store), "--json"])
    return code, json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("command", ["inspect", "verify"])
def test_a_whole_store(whole: Path, capsys: pytest.CaptureFixture, command: str) -> None:
    code, report = told(command, whole, capsys)
    assert code == 0
    assert report["ok"]
    assert report["settings"]["train_set_size"] == 300
    assert report["experiments"] == {"mine": 20}
    assert [c["state"] for c in report["checkpoints"]] == ["complete", "complete"]
    assert [c["rows"] for c in report["checkpoints"]] == [300, 300]
    assert [c["facts"]["epoch"] for c in report["checkpoints"]] == [0, 1]
    assert all(c["bytes"] >= 300 * 49 * 4 for c in report["checkpoints"])
    assert main([command, str(whole)]) == 0
    text = capsys.readouterr().out
    assert "2 of 2 checkpoints complete" in text
    assert ("everything is as it was written" in text) == (command == "verify")


def damage(store: Path, kind: str) -> None:
    grads = store / "1" / "grads.mmap"
    if kind == "cut":
        grads.write_bytes(grads.read_bytes()[:-100])
    elif kind == "gone":
        (store / "0" / "out_to_loss.mmap").unlink()
    elif kind == "shape":
        np.save(grads.with_suffix(".npy"), np.zeros((300, 47), np.float32))
        grads.with_suffix(".npy").rename(grads)
    elif kind == "weights":
        file = store / "1" / "weights.safetensors"
        file.write_bytes(file.read_bytes()[:50])
    elif kind == "flags":
        flags = np.lib.format.open_memmap(store / "0" / "_is_featurized.mmap", "r+")
        flags[7] = 0
        flags.flush()
    elif kind == "metadata":
        (store / "metadata.json").write_text("{")
    elif kind == "experiments":
        (store / "experiments.json").write_text("[1]")
    elif kind == "targets":
        file = store / "0" / "mine_grads.mmap"
        file.write_bytes(file.read_bytes()[:-1])
    elif kind == "nan":
        rows = np.lib.format.open_memmap(grads, "r+")
        rows[123, 4] = np.nan
        rows.flush()
    elif kind == "bit":
        rows = np.lib.format.open_memmap(grads, "r+")
        rows[5, 5] = np.nextafter(rows[5, 5], np.float32(9))
        rows.flush()


@pytest.mark.parametrize(
    ("kind", "words", "quick"),
    [
        ("cut", "model_id 1: .*damaged or cut short", True),
        ("gone", "model_id 0: .*out_to_loss.mmap does not exist", True),
        ("shape", "300 rows and 47 columns, but the store's .* says 300 and 48", True),
        ("weights", "weights.safetensors is damaged", True),
        ("flags", "called complete, but 1 rows are missing", True),
        ("metadata", "metadata.json cannot be read", True),
        ("experiments", "experiments.json is damaged: no object, but a list", True),
        ("targets", "mine_grads.mmap is damaged or cut short", True),
        ("nan", r"NaN or infinite values in rows \[123\]", False),
        ("bit", "grads.mmap has CRC-32 .* it has changed", False),
    ],
)
def test_damage_is_found(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture, kind: str, words: str, quick: bool
) -> None:
    import re

    store = tmp_path / "store"
    shutil.copytree(whole, store)
    damage(store, kind)
    for command in ("inspect", "verify"):
        code, report = told(command, store, capsys)
        problems = inspect_store(store, thorough=command == "verify").all_problems
        found = any(re.search(words, text) for text in problems)
        assert found == (quick or command == "verify")
        assert code == (1 if found else 0)
        assert report["ok"] == (not found)


def test_an_interrupted_collection_is_no_problem(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    store = tmp_path / "store"
    shutil.copytree(whole, store)
    damage(store, "flags")
    (store / "id_0.json").write_text('{"0": {"is_featurized": 0, "is_finalized": 0}}')
    code, report = told("verify", store, capsys)
    assert code == 0
    assert report["checkpoints"][0]["state"] == "incomplete"
    assert report["checkpoints"][0]["notes"] == ["299 of 300 rows; a resumed run collects the rest"]


def test_what_is_no_store(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["inspect", str(tmp_path)]) == 1
    assert "holds no store" in capsys.readouterr().err
    (tmp_path / "manifest.json").write_text("{")
    (tmp_path / "metadata.json").write_text("{}")
    assert main(["verify", str(tmp_path)]) == 1
    assert "manifest.json is damaged" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["inspect", "verify", "score", "report"])
@pytest.mark.parametrize(
    ("manifest", "words"),
    [
        ('{"format_version": 2}', "lacks settings, statistics, run, model_ids"),
        ("[]", "no object, but a list"),
        ('{"format_version": 2, "settings": {"seed": 0}, "statistics": {}, "run": {}, '
         '"model_ids": {}}', "its settings cannot be read"),
    ],
)  # fmt: skip
def test_a_manifest_that_is_no_manifest(
    tmp_path: Path, capsys: pytest.CaptureFixture, command: str, manifest: str, words: str
) -> None:
    (tmp_path / "manifest.json").write_text(manifest)
    (tmp_path / "metadata.json").write_text("{}")
    assert main([command, str(tmp_path)]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{tmp_path}/manifest.json is damaged" in line
    assert words in line
