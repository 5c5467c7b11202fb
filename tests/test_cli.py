"""The command line, and the demo as `make demo` runs it."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from cases import checkpoints, mlp, quickstart

from trak_dropout import (
    __version__,
    open_store,
    plugin,
    self_influence,
    top_influences,
)
from trak_dropout.cli import main
from trak_dropout.store import Store


def test_demo_finds_the_flipped_labels(demo_results: Path) -> None:
    printed = (demo_results / "printed.txt").read_text()
    figures = json.loads((demo_results / "results.json").read_text())
    rows = {row["method"]: row for row in figures["rows"]}
    ours = rows["trak_dropout (callback)"]
    gaussian, defaults = rows["TRAK, Gaussian, our damping"], rows["TRAK, its defaults"]
    assert ours["auc"] >= 0.99
    assert ours["auc"] >= gaussian["auc"] - 0.005
    assert ours["same_class"] >= 1.4 * defaults["same_class"]
    assert len(open_store(demo_results / "store").model_ids) == figures["checkpoints"] == 3
    for row in rows.values():
        shown = [f"{recall:.2f}" for recall in row["recalls"] or []]
        shown += [f"{row['auc']:.4f}"] if row["auc"] is not None else []
        shown += [f"{row['same_class']:.3f}"] if row["same_class"] is not None else []
        line = next(text for text in printed.splitlines() if text.startswith(row["method"]))
        assert all(number in line for number in shown)
    page = (demo_results / "report.html").read_text()
    assert page.count('"sprite":') > 1000
    assert f"{ours['auc']:.4f}" in page
    assert np.isfinite(open_store(demo_results / "store").self_influence()).all()


def test_version_and_help(capsys: pytest.CaptureFixture) -> None:
    for arguments, text in [(["--version"], __version__), (["demo", "--help"], "--out")]:
        with pytest.raises(SystemExit) as stopped:
            main(arguments)
        assert stopped.value.code == 0
        assert text in capsys.readouterr().out
    with pytest.raises(SystemExit) as stopped:
        main([])
    assert stopped.value.code == 2


def test_missing_extra_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.delitem(sys.modules, "trak_dropout.demo", raising=False)
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    assert main(["demo"]) == 1
    assert "pip install 'trak_dropout[demo]'" in capsys.readouterr().err


@pytest.fixture(scope="module")
def scored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, model = tmp_path_factory.mktemp("store"), mlp()
    quickstart(model, checkpoints(model, 2), folder, **plugin(model, 64))
    return folder


def test_score_of_targets(scored: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    arguments = ["score", str(scored), "--experiment", "test", "-k", "3"]
    assert main([*arguments, "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    indices, values = top_influences(Store(scored), "test", 3)
    assert printed["indices"] == indices.tolist()
    np.testing.assert_allclose(printed["values"], values)
    out = tmp_path / "new/out.npz"
    more = ["--harmful", "--damping", "0.1", "--model-ids", "1", "--out", str(out)]
    assert main([*arguments, *more]) == 0
    assert "target 0: " in capsys.readouterr().out
    expected = top_influences(Store(scored), "test", 3, harmful=True, damping=0.1, model_ids=[1])
    written = np.load(out)
    np.testing.assert_array_equal(written["indices"], expected[0])
    np.testing.assert_array_equal(written["values"], expected[1])


def test_score_in_two_processes(scored: Path) -> None:
    # Lightning starts the processes, which need a script to start from.
    command = [sys.executable, "-m", "trak_dropout", "score", str(scored), "-k", "4", "--json"]
    found = [
        json.loads(subprocess.run([*command, *more], capture_output=True, check=True).stdout)
        for more in ([], ["--devices", "2"])
    ]
    assert found[0]["indices"] == found[1]["indices"]
    suspicion = self_influence(Store(scored))
    assert found[0]["indices"][0] == np.argsort(-suspicion)[:4].tolist()
    np.testing.assert_allclose(found[1]["values"], found[0]["values"], rtol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--experiment", "other"], "known experiments: test"),
        (["-k", "0"], "-k, --devices and --memory must be at least 1"),
        (["--harmful"], "--harmful and --method need targets"),
        (["--model-ids", "7"], "model_ids [7] are not complete"),
        (["--accelerator", "cuda", "--devices", "99"], "fewer than 99; give --accelerator cpu"),
    ],
)
def test_score_says_what_is_wrong(
    scored: Path, capsys: pytest.CaptureFixture, arguments: list[str], words: str
) -> None:
    assert main(["score", str(scored), *arguments]) == 1
    assert words in capsys.readouterr().err


def test_score_of_no_store(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["score", str(tmp_path)]) == 1
    assert "holds no TRAK results" in capsys.readouterr().err
