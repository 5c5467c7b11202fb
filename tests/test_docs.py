"""The documentation: snippets run, figures are the benchmarks', nothing public is left out."""

import ast
import importlib
import inspect
import json
import pkgutil
import re
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cases import Classifier, loader, mlp, target_set, train_set, trainer
from pytorch_lightning import LightningDataModule
from snippets import ROOT, run, snippets

import trak_dropout

DOCS = ROOT / "docs"
ELSEWHERE = {"surrogate"}  # test_surrogate_docs runs it
PAGES = sorted(p for p in DOCS.glob("*.md") if snippets(p) and p.stem not in ELSEWHERE)
RESULTS = ROOT / "benchmarks/results"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_snippets_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names = run(page, GIVEN.get(page.stem, dict)())
    check = CHECKS.get(page.stem)
    if check is not None:
        check(names)
    if "report.write" in page.read_text():
        assert (tmp_path / "report.html").stat().st_size > 10_000


def of_lightning() -> dict[str, Any]:
    """What the reader of the callback's pages has: a Trainer, a module, data."""
    train = loader(train_set(), shuffle=True)
    return {
        "Trainer": lambda max_epochs, callbacks: trainer(max_epochs=2, callbacks=callbacks),
        "module": Classifier(mlp(64)),  # with enough parameters for the columns shown
        "train_loader": train,
        "datamodule": LightningDataModule.from_datasets(train_set(), batch_size=50),
        "target_loader": loader(target_set()),
    }


GIVEN = {"callback": of_lightning, "curvature": of_lightning}


def check_of_lightning(names: dict[str, Any]) -> None:
    assert names["scores"].shape == (300, 20)
    assert np.isfinite(names["scores"]).all()


def check_training_mode(names: dict[str, Any]) -> None:
    assert names["scores"].shape == (250, 50)
    assert np.isfinite(names["scores"]).all()


def check_start(names: dict[str, Any]) -> None:
    assert names["same_class"] > 0.6
    assert names["scores"].shape == (1000, 100)
    assert len(names["store"].model_ids) == 3


def check_mislabeled(names: dict[str, Any]) -> None:
    auc = trak_dropout.metrics.mislabel_auc(names["suspicion"], names["flipped"])
    assert auc > 0.9


def check_language_model(names: dict[str, Any]) -> None:
    assert (names["indices"][:3, 0] == names["chosen"]).all()  # a text explains itself best
    assert len(names["texts"]) > 200


def check_extending(names: dict[str, Any]) -> None:
    assert "Gate run again" in names["before"].gradient_computer.describe()
    assert "rule of Gate" in names["after"].gradient_computer.describe()
    x, y = names["train_set"].tensors
    outputs = names["Prediction"].get_out_to_loss_grad(
        names["model"], dict(names["model"].named_parameters()), {}, (x, y)
    )
    assert np.allclose(outputs, (names["model"](x) - y).detach())


def check_scaling(names: dict[str, Any]) -> None:
    whole = names["open_traker"]("whole")
    whole.load_checkpoint(names["model"].state_dict(), model_id=0)
    for batch in names["DataLoader"](names["train_set"], 20):
        whole.featurize(batch=batch, num_samples=len(batch[0]))
    whole.finalize_features()
    assert np.allclose(names["suspicion"], trak_dropout.self_influence(whole), rtol=1e-5)


CHECKS = {
    "callback": check_of_lightning,
    "curvature": check_of_lightning,
    "training_mode": check_training_mode,
    "start": check_start,
    "mislabeled": check_mislabeled,
    "language_model": check_language_model,
    "extending": check_extending,
    "scaling": check_scaling,
}


def rows(page: Path, head: str) -> list[list[str]]:
    """The rows of the first table that has ``head`` in its first line."""
    lines = page.read_text().splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("|") and head in line)
    found = []
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            return found
        found.append([cell.strip() for cell in line.strip("|").split("|")])
    return found


def results(page: Path, place: int) -> list[dict[str, Any]]:
    """The rows of the results file that a page names first, second ..."""
    names = dict.fromkeys(re.findall(r"benchmarks/results/(\w+\.json)", page.read_text()))
    content = json.loads((RESULTS / list(names)[place]).read_text())
    return content["rows"] if isinstance(content, dict) else content


def test_figures_for_choosing_are_the_benchmarks() -> None:
    page = DOCS / "choosing.md"
    lds = {(r["method"], r["setting"], r["k"]): r["lds"] for r in results(page, 0)}
    cells = [(s, k) for s in ("cnn", "lm", "mlp") for k in (1024, 2048)]

    def scores(method: str) -> np.ndarray:
        return np.array([lds[(method, *cell)] for cell in cells])

    for method, *figures in rows(page, "cnn 1024"):
        assert figures == [f"{score:.3f}" for score in scores(method)], method

    seconds = {(r["setting"], r["method"]): r["of_plain"] for r in results(page, 1)}
    for method, ratio, *times in rows(page, "mean ratio to Gaussian"):
        mean = np.mean(scores(method) / scores("Gaussian"))
        assert ratio == f"{mean:.3f}", method
        scheme, fold = method.replace("dropout", "uniform").split(", fold ")
        name = f"factored, {scheme}, k = 2048" + (f", fold {fold}" if fold != "1" else "")
        settings = ("mlp", "resnet9", "gpt-neox-10m")
        assert times == [f"{seconds[s, name]:.2f}" for s in settings], method

    studied = [r for r in results(page, 2) if r["setting"] in ("mlp", "cnn", "lm")]
    for rule, *figures in rows(page, "share of the best score"):
        shares = [r["rules"][rule] / r["best"] for r in studied]
        assert figures == [f"{np.mean(shares):.3f}", f"{min(shares):.3f}"], rule


def test_figures_for_scaling_are_the_benchmarks() -> None:
    page = DOCS / "scaling.md"
    text = " ".join(page.read_text().split())
    small, large = results(page, 0)
    for row in (small, large):
        assert f"{row['seconds']:.0f} s" in text
        assert f"{row['peak_rss_megabytes']:.0f} MB" in text
    assert f"of which {small['gram_and_solve_seconds']:.0f} s" in text
    assert (small["n"], small["k"], large["n"], large["k"]) == (100_000, 4096, 1_000_000, 1024)


def public_modules() -> list[types.ModuleType]:
    names = [name for _, name, _ in pkgutil.walk_packages(trak_dropout.__path__, "trak_dropout.")]
    hidden = ("trak_dropout.demo", "trak_dropout.cli", "trak_dropout.commands")
    return [
        importlib.import_module(name)
        for name in names
        if not name.startswith(hidden) and not any(part.startswith("_") for part in name.split("."))
    ]


def exported() -> dict[str, Any]:
    """What the package and its subpackages list in ``__all__``, by the name where it is defined."""
    found = {}
    for module in [trak_dropout, *public_modules()]:
        for name in getattr(module, "__all__", []):
            thing = getattr(module, name)
            if inspect.isclass(thing) or inspect.isfunction(thing):
                found[f"{thing.__module__}.{thing.__qualname__}"] = thing
    return found


def members(cls: type) -> dict[str, Any]:
    """A class's own public methods and properties, without those that only refuse to work."""
    found = {}
    for name, value in vars(cls).items():
        routine = value.__func__ if isinstance(value, classmethod | staticmethod) else value
        known_as = getattr(routine, "fget", routine)
        if not name.startswith("_") and getattr(known_as, "__name__", None) == name:
            found[name] = routine
    return found


def test_every_public_name_has_a_docstring_of_its_own() -> None:
    assert len(exported()) > 25
    bare = []
    for name, thing in exported().items():
        text = thing.__doc__ or ""
        if not text or text.startswith(f"{thing.__name__}("):  # what dataclass makes up
            bare.append(name)
        if inspect.isclass(thing):
            bare += [f"{name}.{m}" for m, value in members(thing).items() if not value.__doc__]
    assert bare == []


def test_docstrings_name_every_argument() -> None:
    lacking = []
    for name, thing in exported().items():
        routines = {name: thing}
        if inspect.isclass(thing):
            routines = {
                f"{name}.{m}": v for m, v in members(thing).items() if inspect.isfunction(v)
            }
            if "__init__" in vars(thing) and not issubclass(thing, Exception):
                routines[name] = thing
        for called, routine in routines.items():
            text = inspect.getdoc(routine) or ""
            if routine is not thing and "\n" not in text:
                continue  # a line says it all
            for parameter in inspect.signature(routine).parameters:
                if parameter not in ("self", "cls", "kwargs") and not re.search(
                    rf"^ *\**{parameter}: ", text, re.MULTILINE
                ):
                    lacking.append(f"{called}({parameter})")
    assert lacking == []


def test_reference_has_every_public_name() -> None:
    text = (DOCS / "reference.md").read_text()
    documented = set()
    for module, options in re.findall(r"automodule:: (\S+)\n((?:   :.*\n?)*)", text):
        listed = re.search(r":members:(.*)", options)
        assert listed, module
        names = [name.strip() for name in listed[1].split(",") if name.strip()]
        loaded = importlib.import_module(module)
        names = names or [
            name
            for name, thing in vars(loaded).items()
            if getattr(thing, "__module__", None) == module and not name.startswith("_")
        ]
        for name in names:
            assert getattr(loaded, name).__doc__, f"{module}.{name}"
        things = [getattr(loaded, name) for name in names]
        documented |= {f"{thing.__module__}.{thing.__qualname__}" for thing in things}
    assert sorted(set(exported()) - documented) == []


def test_every_page_is_in_the_index_and_links_resolve() -> None:
    index = (DOCS / "index.md").read_text()
    for page in DOCS.glob("*.md"):
        if page.stem != "index":
            assert re.search(rf"^{page.stem}$", index, re.MULTILINE), page
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"
        for target in re.findall(r"\{doc\}`(\w+)`", page.read_text()):
            assert (DOCS / f"{target}.md").is_file(), f"{page.name}: {target}"


def test_snippets_are_plain_python() -> None:
    for page in [*PAGES, ROOT / "README.md"]:
        for snippet in snippets(page):
            ast.parse(snippet)
