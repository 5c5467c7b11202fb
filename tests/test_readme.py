"""The README's snippets run, one after the other, as a reader would paste them."""

from pathlib import Path

import numpy as np
import pytest
from cases import Classifier, checkpoints, loader, mlp, target_set, train_set
from snippets import ROOT, run, snippets

README = ROOT / "README.md"


def test_snippets_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model = mlp()
    names = {  # what the reader has: a model, its checkpoints, data
        "model": model,
        "checkpoints": checkpoints(model, 2),
        "train_set": train_set(),
        "train_loader": loader(train_set()),
        "target_set": target_set(),
        "target_loader": loader(target_set()),
        "module": Classifier(mlp()),
    }
    assert len(snippets(README)) == 3
    names = run(README, names)
    assert names["scores"].shape == (300, 20)
    assert names["suspicion"].shape == (300,)
    assert np.isfinite(names["scores"]).all()
    assert len(names["checkpoints"]) == 3


def test_names_the_two_commands() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for command in ("demo", "test", "docs"):
        assert f"make {command}" in README.read_text()
        assert f"\n{command}: " in makefile
    assert (ROOT / "docs/demo.png").is_file()
