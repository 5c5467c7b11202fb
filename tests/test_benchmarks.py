"""What the studies share computes what it says; a study runs; the documents quote the results."""

import argparse
import itertools
import json
import re
import subprocess
import sys
from pathlib import Path

import _methods
import _settings
import _study
import document
import mislabel
import numpy as np
import pytest
import torch
from _data import MissingError
from _spectrum import Spectrum
from scipy.stats import t as student
from torch import Tensor, nn

from trak_dropout.scoring import automatic_ridge

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"


@pytest.mark.parametrize(("n", "k"), [(20, 7), (7, 20)])
def test_spectrum_is_the_damped_solve(n: int, k: int) -> None:
    torch.manual_seed(0)
    x, targets = torch.randn(n, k), torch.randn(3, k)
    spectrum = Spectrum(x, targets)
    ridge = spectrum.ridge(0.3)
    gram = x.double().T @ x.double()
    assert ridge == pytest.approx(0.3 * float(gram.trace()) / n)
    inverse = torch.linalg.inv(gram + ridge * torch.eye(k))
    scores = x.double() @ inverse @ targets.double().T
    torch.testing.assert_close(spectrum.scores(ridge), scores, rtol=1e-4, atol=1e-6)
    leverages = (x.double() @ inverse * x.double()).sum(1)
    torch.testing.assert_close(spectrum.self_influence(ridge), leverages, rtol=1e-4, atol=1e-6)
    auto = automatic_ridge(gram if k <= n else x.double() @ x.double().T, n)
    assert spectrum.ridge("auto") == pytest.approx(auto, rel=1e-4)


def test_damping_is_chosen_on_the_other_seeds() -> None:
    seeds = [{"a": 1.0, "b": 0.0}, {"a": 0.0, "b": 0.9}, {"a": 0.2, "b": 0.8, "auto": 9.0}]
    # The first sees b win on the others; the second a (1.2 to 0.8); the third a (1.0 to 0.9).
    assert _study.cross_fitted(seeds) == [0.0, 0.0, 0.2]
    assert _study.fitted_to(seeds, [{"a": 5, "b": 6}] * 3) == [6, 5, 5]


def test_interval_is_students() -> None:
    found = _study.interval([1.0, 2.0, 4.0])
    low, high = student.interval(0.95, 2, np.mean([1, 2, 4]), np.std([1, 2, 4], ddof=1) / 3**0.5)
    assert (found["low"], found["high"]) == pytest.approx((low, high))
    assert _study.ratio(found, {"values": [1.0, 1.0, 2.0]})["values"] == [1.0, 2.0, 2.0]


def test_cells_survive_a_kill_and_not_other_options(tmp_path: Path) -> None:
    options = argparse.Namespace(quick=False, cache=tmp_path, n=3, seeds=3)
    cells = _study.Cells(options, "study")
    cells.add({"seed": 0, "value": 1.5})
    with (tmp_path / "study.cells.jsonl").open("a") as file:
        file.write('{"seed": 1, "val')
    again = _study.Cells(options, "study")
    assert again.get(seed=0) == {"seed": 0, "value": 1.5}
    assert again.get(seed=1) is None
    again.add({"seed": 1, "value": 2.5})
    assert len(_study.Cells(options, "study").rows) == 2
    assert again.used == again.rows
    options.seeds = 5  # names itself in every cell
    assert len(_study.Cells(options, "study").rows) == 2
    options.n = 4
    assert _study.Cells(options, "study").rows == []


def test_sparse_transform_keeps_products_on_average_over_signs() -> None:
    torch.manual_seed(0)
    g, h = torch.randn(2, 1, 6)
    sparse = _methods.Sparse(6, 3, 0)
    products = []
    for signs in itertools.product((-1.0, 1.0), repeat=6):
        sparse._sign = torch.tensor(signs)
        a, b = sparse.project({"w": g}, 0), sparse.project({"w": h}, 0)
        assert a.shape == (1, 3)
        products.append(float(a @ b.T))
    assert np.mean(products) == pytest.approx(float(g @ h.T), abs=1e-5)


@pytest.fixture(scope="module")
def problem() -> _methods.Problem:
    setting = _settings.digits(30, 5)
    torch.manual_seed(0)
    return _methods.Problem(setting, [setting.model().eval()])


def by_hand(problem: _methods.Problem) -> tuple[Tensor, Tensor]:
    """Gradients of minus the loss of each sample, by plain autograd."""
    setting, model = problem.setting, problem.models[0]
    found = []
    for part in (setting.train, setting.targets):
        rows = []
        for x, y in zip(*part, strict=True):
            loss = -nn.functional.cross_entropy(model(x[None]), y[None])
            grads = torch.autograd.grad(loss, list(model.parameters()))
            rows.append(torch.cat([g.flatten() for g in grads]))
        found.append(torch.stack(rows).double())
    return found[0], found[1]


def test_methods_without_compression_are_the_formula(problem: _methods.Problem) -> None:
    x, targets = by_hand(problem)
    dots = _methods.run(_methods.methods()["gradient dot product"], problem, 0)
    assert dots is not None
    np.testing.assert_allclose(dots.values["none"], x @ targets.T, rtol=1e-3, atol=1e-4)
    ridge = float(x.square().sum()) / len(x)
    kernel = x @ x.T
    scores = torch.linalg.solve(kernel + ridge * torch.eye(len(x)), x @ targets.T)
    whole = _methods.run(_methods.methods()["no compression"], problem, 0)
    # Every coordinate kept, each in a column of its own, is no compression at all.
    pure = _methods.run(_methods.methods()["dropout, fold 1"], problem, x.shape[1])
    for found in (whole, pure):
        assert found is not None
        np.testing.assert_allclose(found.values[1.0], scores, rtol=1e-3, atol=1e-5)


def test_every_sized_method_gives_scores_and_what_they_cost(problem: _methods.Problem) -> None:
    for name in ("dropout", "unit dropout", "weighted dropout", "Gaussian", "SJLT"):
        found = _methods.run(_methods.methods()[name], problem, 64)
        assert found is not None
        assert set(found.values) == {*_methods.GRID, "auto"}
        assert all(v.shape == (30, 5) and np.isfinite(v).all() for v in found.values.values())
        assert found.seconds >= found.collecting > 0


def test_what_is_missing_is_said(
    problem: _methods.Problem, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for name in ("dattri TRAK", "kronfluence EK-FAC"):
        assert _methods.run(_methods.methods()[name], problem, 64) is None
        assert "is not installed" in capsys.readouterr().out
    monkeypatch.setattr(_settings._data, "SOURCES", {})
    with pytest.raises(MissingError, match="sources of text"):
        _settings._data.sources(6, 1000)


def test_flipped_labels_are_other_labels() -> None:
    setting = _settings.digits(200, 5)
    flipped_setting, flipped = mislabel.flip(setting, 0.1, 3)
    changed = setting.train[-1] != flipped_setting.train[-1]
    assert torch.equal(changed, flipped)
    assert int(flipped.sum()) == 20
    assert not torch.equal(mislabel.flip(setting, 0.1, 4)[1], flipped)


@pytest.mark.parametrize(
    "study", ["lds", "mislabel", "retrain", "crosssource", "scale", "folds", "damping"]
)
def test_studies_have_help(study: str) -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / f"{study}.py"), "--help"]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "--quick" in said


def test_a_study_runs_and_goes_on_where_it_stopped(tmp_path: Path) -> None:
    command = [
        sys.executable, str(ROOT / "benchmarks" / "mislabel.py"), "--quick", "--seeds", "2",
        "--methods", "dropout", "Gaussian", "no compression", "loss",
        "--cache", str(tmp_path / "cache"), "--out", str(tmp_path / "mislabel.json"),
    ]  # fmt: skip
    subprocess.run(command, check=True, capture_output=True)
    found = json.loads((tmp_path / "mislabel.json").read_text())
    auc = {row["method"]: row["auc"]["mean"] for row in found["rows"]}
    assert set(auc) == {"dropout", "Gaussian", "no compression", "loss"}
    assert min(auc.values()) > 0.8
    assert (tmp_path / "mislabel.png").stat().st_size > 1000
    assert "mislabel verdict" in document.BLOCKS
    assert "holds" in document.mislabel_verdict(found)


def test_the_evidence_page_is_made_of_the_results() -> None:
    pages = [page.read_text() for page in document.PAGES]
    assert list(map(document.written, pages)) == pages, "run benchmarks/document.py"
    names = re.findall(r"<!-- (?!end)([a-z ]+) -->", "".join(pages))
    assert set(names) == set(document.BLOCKS)
    prose = re.sub(r"<!-- ([a-z ]+) -->\n.*?<!-- end -->", "", pages[0], flags=re.DOTALL)
    assert not re.findall(r"\d+\.\d+", prose), "figures belong into the generated blocks"
