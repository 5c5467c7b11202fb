"""What the studies share computes what it says; a study runs; the documents quote the results."""

import argparse
import dataclasses
import itertools
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import _measure
import _methods
import _settings
import _study
import _training
import document
import folds
import mislabel
import numpy as np
import pytest
import retrain
import run_all
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
    auto = automatic_ridge(gram if k <= n else x.double() @ x.double().T, n, k)
    assert spectrum.ridge("auto") == pytest.approx(auto, rel=1e-4)


def test_checkpoints_are_stages_of_one_training(tmp_path: Path) -> None:
    setting = dataclasses.replace(_settings.digits(60, 5), epochs=6)
    stages = _training.checkpoints(setting, 3, tmp_path)
    for model, epochs in zip(stages, (2, 4, 6), strict=True):
        shorter = dataclasses.replace(setting, epochs=epochs)
        alone = _training.train(shorter, torch.arange(60), 3).state_dict()
        again = _training.checkpoints(setting, 3, tmp_path)[epochs // 2 - 1].state_dict()
        for name, value in model.state_dict().items():
            assert torch.equal(value, alone[name])
            assert torch.equal(value, again[name])
    last = _training.trained(setting, 3, tmp_path).state_dict()
    assert all(torch.equal(v, last[name]) for name, v in stages[-1].state_dict().items())


def test_more_seeds_of_folds_add_to_those_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    setting = dataclasses.replace(_settings.digits(60, 5), epochs=2)
    monkeypatch.setattr(folds, "SCHEMES", {"Gaussian": None, "uniform": ("dropout", 2)})
    options = argparse.Namespace(
        halves=4, checkpoints=1, proj_dims=[8, 16], seeds=1, cache=tmp_path
    )
    rows: list[dict] = []
    assert list(folds.study(setting, rows, options)) == [0]
    first = [dict(row["by_seed"][0]) for row in rows]
    options.seeds = 2
    assert list(folds.study(setting, rows, options)) == [1]
    assert len(rows) == 4
    assert [row["by_seed"][0] for row in rows] == first
    afresh: list[dict] = []
    assert list(folds.study(setting, afresh, options)) == [0, 1]
    assert afresh == rows


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
    "study",
    ["lds", "mislabel", "retrain", "crosssource", "scale", "folds", "damping", "trajectory"],
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
    said = document.mislabel_verdict(found)
    assert said.count("hold") == 7
    costs = {row["method"]: row for row in found["cost"]}
    assert set(costs) == {*(f"dropout, fold {fold}" for fold in mislabel.FOLDS), "Gaussian"}
    assert all(row["added"] > -1 and row["of_trak"] > 0 for row in costs.values())


def test_normalized_scores_are_cosines_in_the_damped_metric(problem: _methods.Problem) -> None:
    found = _methods.run(_methods.methods()["dropout"], problem, 64)
    itself = dataclasses.replace(problem, wanted="self")
    own = _methods.run(_methods.methods()["dropout"], itself, 64)
    assert found is not None
    assert own is not None
    weight = found.values[1.0] / (found.normalized[1.0] * own.values[1.0][:, None] ** 0.5)
    # What is left of the quotient is the out-to-loss gradient of the training sample.
    np.testing.assert_allclose(weight, np.broadcast_to(weight[:, :1], weight.shape), rtol=1e-5)
    dot = _methods.run(_methods.methods()["gradient dot product"], problem, 0)
    assert dot is not None
    assert np.abs(dot.normalized["none"]).max() > 0


def test_groups_are_targets_of_one_label() -> None:
    setting = _settings.digits(200, 60)
    groups = retrain.groups_of(setting, 12, 2)
    labels = [setting.targets[-1][group].unique() for group in groups]
    assert [len(label) for label in labels] == [1] * 12
    assert int(labels[0]) == int(labels[10])  # they take turns
    assert not set(groups[0].tolist()) & set(groups[10].tolist())
    with pytest.raises(MissingError, match="too few targets"):
        retrain.groups_of(setting, 200, 5)
    options = argparse.Namespace(trainings=1)
    orders = retrain.rankings(setting, retrain.SAME, 0, groups, options)
    assert orders is not None
    for group, order in zip(groups, orders, strict=True):
        same = setting.train[-1][order] == setting.targets[-1][group[0]]
        assert bool((same[:-1] >= same[1:]).all())
        assert sorted(order.tolist()) == list(range(200))


def test_effects_are_paired_with_the_training_that_lost_nothing() -> None:
    cells = []
    losses = {("nothing removed", 0.0): 1.0, ("dropout", 0.1): 1.7, ("Gaussian", 0.1): 1.5,
              ("random", 0.1): 1.1}  # fmt: skip
    for seed, shift in enumerate((0.0, 5.0, -0.5)):
        for (method, share), loss in losses.items():
            cells += [
                {"setting": "s", "seed": seed, "method": method, "share": share, "again": 0,
                 "group": group, "loss": loss + shift + group, "accuracy": 0.5}
                for group in (0, 1)
            ]  # fmt: skip
    rows = retrain.summarize(cells)
    effect = {r["method"]: r["effect"] for r in rows}
    assert effect["dropout"]["mean"] == pytest.approx(0.7)
    assert effect["dropout"]["high"] == pytest.approx(0.7)  # the same for every seed
    pairs = retrain.compared(rows)
    found = {"rows": rows, "compared": pairs}
    assert document.retrain_verdict(found).count("**holds**") == 2
    gaussian = next(r for r in pairs if r["peer"] == "Gaussian" and r["share"] is None)
    assert gaussian["effect"]["mean"] == pytest.approx(0.2)


def test_words_of_verdicts() -> None:
    def word(low: float, high: float, clear: bool) -> str:
        value = {"mean": (low + high) / 2, "low": low, "high": high}
        return re.findall(r"\*\*(.*)\*\*", document.as_much("claim", value, clear, ""))[0]

    assert word(0.1, 0.3, True) == "holds"
    assert word(-0.3, 0.1, True) == "holds within the spread of seeds"
    assert word(-0.3, 0.1, False) == "does not hold"
    assert word(-0.3, -0.1, True) == "does not hold"


def test_results_of_an_older_form_are_not_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(document, "HERE", tmp_path)
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "lds.json").write_text("{}")
    (tmp_path / "results" / "retrain.json").write_text("{}")
    assert document.results("lds") == {}
    assert document.results("retrain") is None
    assert document.results("scale") is None


def test_tensors_that_were_there_before_are_not_counted() -> None:
    weight = torch.randn(1000, 100)

    def make() -> Callable[[], Tensor]:
        return lambda: weight.T @ torch.ones(1000, 1)

    assert _measure.peak_of_tensors(make) < 0.02


@pytest.mark.parametrize("quick", [False, True])
def test_every_study_is_run_once(
    quick: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    started = []

    class Process:
        def __init__(self, command: list[str], env: dict[str, str]) -> None:
            started.append((Path(command[1]).stem, env["OMP_NUM_THREADS"], "--quick" in command))

        def wait(self) -> int:
            return int(started[-1][0] == "scale" and len(started) < 6)

    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(run_all, "HERE", tmp_path)
    monkeypatch.setattr("subprocess.Popen", Process)
    monkeypatch.setattr("subprocess.run", lambda *_, **__: None)
    monkeypatch.setattr(sys, "argv", ["run_all.py", *(["--quick"] if quick else [])])
    with pytest.raises(SystemExit, match="scale failed"):
        run_all.main()
    assert started == [(name, "1", quick) for name in run_all.STUDIES]
    run_all.main()  # only what failed
    assert started[5:] == [("scale", "1", quick)]


def test_the_evidence_page_is_made_of_the_results() -> None:
    pages = [page.read_text() for page in document.PAGES]
    assert list(map(document.written, pages)) == pages, "run benchmarks/document.py"
    names = re.findall(r"<!-- (?!end)([a-z ]+) -->", "".join(pages))
    assert set(names) == set(document.BLOCKS)
    prose = re.sub(r"<!-- ([a-z ]+) -->\n.*?<!-- end -->", "", pages[0], flags=re.DOTALL)
    assert not re.findall(r"\d+\.\d+", prose), "figures belong into the generated blocks"
