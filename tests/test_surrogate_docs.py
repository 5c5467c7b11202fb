"""The snippet of docs/surrogate.md, and the command that selects."""

import re
from pathlib import Path

import numpy as np
import pytest
from cases import Classifier, digits, loader, mlp, trainer
from scipy.stats import spearmanr
from torch.utils.data import TensorDataset

import trak_dropout as td
from trak_dropout.cli import main
from trak_dropout.lightning import GradientCollector
from trak_dropout.surrogate import PredictedInfluences, sampled_influences, select

PAGE = Path(__file__).parents[1] / "docs/surrogate.md"


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_the_snippet_and_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    images, labels = digits()
    names = {  # what the reader has: a trained module, its data, and data that came later
        "module": Classifier(mlp()),
        "train_set": TensorDataset(images[:800], labels[:800]),
        "target_set": TensorDataset(images[800:1200], labels[800:1200]),
        "later_set": TensorDataset(images[1200:1300], labels[1200:1300]),
    }
    collector = GradientCollector("trak_store", proj_dim=128)
    train_loader = loader(names["train_set"], shuffle=True)
    trainer(max_epochs=3, callbacks=[collector]).fit(names["module"], train_loader)

    (snippet,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert len([line for line in snippet.splitlines() if line.strip()]) <= 16
    exec(compile(snippet, str(PAGE), "exec"), names)
    network, predicted = names["network"], names["predicted"]
    assert predicted.shape == (800, 400)
    assert names["best"].shape == (100, 5)

    # On pairs of unseen examples, against the influences themselves.
    store = td.open_store("trak_store", model=names["module"])
    scores = store.attribute(loader(names["target_set"]), damping=10.0, progress=False)
    rows = np.setdiff1d(np.arange(800), names["rows"])
    columns = np.setdiff1d(np.arange(400), names["columns"])
    unseen = np.ix_(rows, columns)
    assert spearmanr(scores[unseen].ravel(), predicted[unseen].ravel())[0] > 0.3

    chosen = names["chosen"]
    assert len(chosen) == 240
    np.testing.assert_array_equal(chosen, select(predicted))
    sources, targets = names["sources"], names["targets"]
    rows_ = PredictedInfluences(network, sources, targets)
    np.testing.assert_array_equal(select(rows_, method="top"), select(predicted, method="top"))

    np.save("sources.npy", sources)
    np.save("targets.npy", targets)
    np.save("predicted.npy", predicted)
    np.save("given.npy", chosen[:10])
    three = ["--network", "influence.safetensors", "--sources", "sources.npy"]
    assert main(["select", *three, "--targets", "targets.npy", "--method", "top"]) == 0
    printed = [int(line) for line in capsys.readouterr().out.split()]
    assert printed == select(predicted, method="top").tolist()
    options = ["--influences", "predicted.npy", "--count", "7", "--given", "given.npy"]
    assert main(["select", *options, "--plain", "--out", "chosen.npy"]) == 0
    expected = select(predicted, count=7, given=chosen[:10], helpful_first=False)
    np.testing.assert_array_equal(np.load("chosen.npy"), expected)
    capsys.readouterr()
    assert (
        main(["select", "--store", "trak_store", "--experiment", "sample", "--out", "c.txt"]) == 0
    )
    kept = [int(line) for line in Path("c.txt").read_text().split()]
    assert kept == select(sampled_influences(store, "sample")).tolist()

    capsys.readouterr()
    Path("broken.npy").write_text("no array")
    np.savez("several.npz", np.eye(3))
    np.save("complex.npy", np.eye(3) * 1j)
    for arguments, message in (
        ([], "give exactly one of"),
        (["--influences", "predicted.npy", "--store", "x"], "give exactly one of"),
        ([*three], "give exactly one of"),
        (["--influences", "none.npy"], "none.npy"),
        (["--influences", "broken.npy"], "broken.npy is no array"),
        (["--influences", "several.npz"], "several.npz is an archive of arrays"),
        (["--influences", "complex.npy"], "complex.npy holds complex128, expected real numbers"),
        (["--influences", "predicted.npy", "--share", "2"], "share must be in"),
        (["--store", "trak_store", "--experiment", "none"], "none_grads"),
    ):
        assert main(["select", *arguments]) == 1
        error = capsys.readouterr().err
        assert error.startswith("trak-dropout select: ")
        assert message in error
        assert error.count("\n") == 1
