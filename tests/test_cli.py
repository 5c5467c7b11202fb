"""The command line, and the demo as `make demo` runs it."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from trak_dropout import __version__, open_store
from trak_dropout.cli import main


def test_demo_finds_the_flipped_labels(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "report.html").write_text("of an earlier run")
    assert main(["demo", "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    figures = json.loads((tmp_path / "results.json").read_text())
    rows = {row["method"]: row for row in figures["rows"]}
    ours = rows["trak_dropout (callback)"]
    gaussian, defaults = rows["TRAK, Gaussian, our damping"], rows["TRAK, its defaults"]
    assert ours["auc"] >= 0.99
    assert ours["auc"] >= gaussian["auc"] - 0.005
    assert ours["same_class"] >= 1.4 * defaults["same_class"]
    assert len(open_store(tmp_path / "store").model_ids) == figures["checkpoints"] == 3
    for row in rows.values():
        numbers = [row["auc"], *(row["recalls"] or []), row["same_class"]]
        assert all(f"{x:.2f}"[:3] in printed for x in numbers if x is not None)
    page = (tmp_path / "report.html").read_text()
    assert page.count("<img") > 60
    assert f"{ours['auc']:.4f}" in page
    assert np.isfinite(open_store(tmp_path / "store").self_influence()).all()


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
