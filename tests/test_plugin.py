"""The one-line swap and the four plugs in TRAK's own loop."""

import itertools
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cases import (
    checkpoints,
    convnet,
    digits,
    loader,
    mlp,
    quickstart,
    target_set,
    train_set,
    trained,
)
from torch import nn
from trak import TRAKer
from trak.gradient_computers import FunctionalGradientComputer, IterativeGradientComputer
from trak.modelout_functions import ImageClassificationModelOutput
from trak.utils import vectorize

from trak_dropout import (
    DampedScoreComputer,
    DropoutProjector,
    FactoredGradientComputer,
    LossOutput,
    ManifestSaver,
    Store,
    StoreMismatchError,
    plugin,
)


@pytest.mark.parametrize(
    ("half", "count", "computer", "grad_wrt"),
    [
        *itertools.product([True, False], [1, 3], [FunctionalGradientComputer], [None]),
        *itertools.product([True, False], [2], [IterativeGradientComputer], [None]),
        *itertools.product(
            [True, False], [2], [FunctionalGradientComputer], [["0.weight", "7.weight"]]
        ),
    ],
)
def test_one_line_swap(
    tmp_path: Path, half: bool, count: int, computer: type, grad_wrt: list[str] | None
) -> None:
    model = convnet()
    iterative = computer is IterativeGradientComputer
    traker, scores = quickstart(
        model,
        checkpoints(model, count),
        tmp_path,
        task="iterative_image_classification" if iterative else "image_classification",
        gradient_computer=computer,
        use_half_precision=half,
        grad_wrt=grad_wrt,
        projector=DropoutProjector.from_model(model, 48, grad_wrt=grad_wrt),
    )
    assert scores.shape == (300, 20)
    assert scores.dtype == (np.float16 if half else np.float32)
    assert np.isfinite(scores).all()
    assert (scores != 0).mean() > 0.9
    assert traker.saver.metadata["JL matrix type"] == "dropout"


@pytest.mark.parametrize("computer", [FunctionalGradientComputer, IterativeGradientComputer])
def test_stored_features_are_the_kept_gradients(tmp_path: Path, computer: type) -> None:
    model = trained(mlp(), 1)
    projector = DropoutProjector.from_model(model, 48, seed=5, fold=1)
    iterative = computer is IterativeGradientComputer
    quickstart(
        model,
        [model.state_dict()],
        tmp_path,
        task="iterative_image_classification" if iterative else "image_classification",
        gradient_computer=computer,
        use_half_precision=False,
        projector=projector,
        score_computer=DampedScoreComputer,
    )
    images, labels = digits()
    oracle = TRAKer(
        model=model,
        task="image_classification",
        train_set_size=300,
        save_dir=str(tmp_path / "other"),
        device="cpu",
        proj_dim=8,
        logging_level=logging.ERROR,
    ).gradient_computer
    flat = vectorize(oracle.compute_per_sample_grad((images[:300], labels[:300])), device="cpu")
    # TRAKer divides by sqrt(p), which undoes the scale of pure dropout.
    expected = flat[:, projector.mask(0).coordinates].detach().numpy()
    stored = np.load(tmp_path / "0" / "grads.mmap", mmap_mode="r")
    np.testing.assert_allclose(stored, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("proj_dim", [64, 512])
@pytest.mark.parametrize("half", [True, False])
def test_swap_survives_dark_pixels_without_damping(
    tmp_path: Path, half: bool, proj_dim: int, seed: int
) -> None:
    # Three pixels are dark in every digit and most border pixels in nearly all, so that many
    # coordinates are zero for every sample; TRAK inverts X^T X as it is.
    n, m = 1500, 50
    model = DIGIT_MODELS[seed]()
    trained(model, 6, train_set(n), seed)
    _, scores = quickstart(
        model,
        [model.state_dict()],
        tmp_path,
        loader(train_set(n), 500),
        loader(target_set(m)),
        n_train=n,
        n_targets=m,
        use_half_precision=half,
        projector=DropoutProjector.from_model(model, proj_dim, seed=seed),
    )
    assert np.isfinite(scores).all()
    assert (scores != 0).mean() > 0.9


DIGIT_MODELS = [
    lambda: mlp(128),
    lambda: nn.Sequential(
        nn.Flatten(),
        nn.Linear(64, 256),
        nn.ReLU(),
        nn.Linear(256, 64),
        nn.ReLU(),
        nn.Linear(64, 10),
    ),
    convnet,
]


def test_pure_dropout_needs_damping_there(tmp_path: Path) -> None:
    # Why the default folds: one dead coordinate in a column of its own makes X^T X singular.
    model = trained(mlp(128), 6, train_set(1500))
    options = {
        "train": loader(train_set(1500), 500),
        "n_train": 1500,
        "use_half_precision": False,
        "projector": DropoutProjector.from_model(model, 512, fold=1),
    }
    with pytest.raises(RuntimeError, match="singular"):
        quickstart(model, [model.state_dict()], tmp_path / "a", **options)
    _, scores = quickstart(
        model,
        [model.state_dict()],
        tmp_path / "b",
        score_computer=DampedScoreComputer,
        **options,
    )
    assert np.isfinite(scores).all()


@pytest.mark.parametrize("half", [True, False])
@pytest.mark.parametrize("grad_wrt", [None, ["7.weight", "0.weight"]])
def test_four_plugs(tmp_path: Path, half: bool, grad_wrt: list[str] | None) -> None:
    model = convnet()
    plugs = plugin(model, proj_dim=48, seed=2, device="cpu", grad_wrt=grad_wrt, damping=0.5)
    traker, scores = quickstart(
        model, checkpoints(model, 2), tmp_path, use_half_precision=half, **plugs
    )
    assert isinstance(traker.saver, ManifestSaver)
    assert isinstance(traker.score_computer, DampedScoreComputer)
    assert traker.score_computer.damping == 0.5
    assert np.isfinite(scores).all()
    assert traker.num_params_for_grad == traker.projector.grad_dim
    assert ("grad_wrt" in plugs) == (grad_wrt is not None)


def test_frozen_parameters_count_unless_others_are_named() -> None:
    """As with TRAK's own computers, and as docs/start.md says."""
    model = mlp()
    every = sum(parameter.numel() for parameter in model.parameters())
    model[1].requires_grad_(False)
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    counted = sum(model.get_parameter(name).numel() for name in trained)
    assert counted < every
    for names, expected in ((None, every), (trained, counted)):
        assert plugin(model, 8, grad_wrt=names)["projector"].grad_dim == expected
    page = (Path(__file__).parents[1] / "docs/start.md").read_text()
    (row,) = [line for line in page.splitlines() if "should not count" in line]
    assert "grad_wrt=[names]" in row
    assert "requires_grad_" not in row


def test_float16_scores_follow_float32_scores(tmp_path: Path) -> None:
    model = mlp()
    states = checkpoints(model, 1)
    runs = [
        quickstart(
            model, states, tmp_path / str(half), use_half_precision=half, **plugin(model, 64)
        )
        for half in (True, False)
    ]
    half, full = (scores.astype(np.float64).reshape(-1) for _, scores in runs)
    assert np.corrcoef(half, full)[0, 1] > 0.9999


def test_absolute_regularisation_goes_through(tmp_path: Path) -> None:
    model = mlp()
    traker, _ = quickstart(
        model, checkpoints(model, 1), tmp_path, lambda_reg=0.3, **plugin(model, 64)
    )
    assert traker.score_computer.lambda_reg == 0.3
    with pytest.raises(ValueError, match="both given"):
        TRAKer(
            model,
            "image_classification",
            300,
            str(tmp_path / "b"),
            device="cpu",
            lambda_reg=0.3,
            **plugin(model, 64, damping=0.1),
        )


def test_the_store_knows_the_task(tmp_path: Path) -> None:
    model = mlp()

    def opened(task: Any, **plugs: Any) -> TRAKer:
        return TRAKer(
            model,
            task,
            300,
            str(tmp_path),
            device="cpu",
            logging_level=logging.ERROR,
            **{**plugin(model, 32), **plugs},
        )

    computer = plugin(model, 32)["gradient_computer"]
    assert issubclass(computer, FactoredGradientComputer)
    assert repr(computer) == repr(FactoredGradientComputer)
    plain = {"gradient_computer": FactoredGradientComputer}
    opened("image_classification", **plain)
    assert Store(tmp_path).settings.task is None
    opened(LossOutput(nn.functional.cross_entropy))  # one without a task opens with any
    (tmp_path / "manifest.json").unlink()
    opened("image_classification")
    assert Store(tmp_path).settings.task == "image_classification"
    opened("image_classification")
    opened(ImageClassificationModelOutput())
    opened(LossOutput(nn.functional.cross_entropy), **plain)
    before = (tmp_path / "manifest.json").read_bytes()
    with pytest.raises(
        StoreMismatchError, match=r"task is 'image_classification' .*cross_entropy\)' given"
    ):
        opened(LossOutput(nn.functional.cross_entropy))
    assert (tmp_path / "manifest.json").read_bytes() == before


def test_plugs_serve_again_with_another_task(tmp_path: Path) -> None:
    model = mlp()
    plugs = plugin(model, 32)
    losses = [nn.functional.cross_entropy, nn.functional.multi_margin_loss]
    for i, loss in enumerate(losses):
        quickstart(model, checkpoints(model, 1), tmp_path / str(i), task=LossOutput(loss), **plugs)
        assert loss.__name__ in str(Store(tmp_path / str(i)).settings.task)


def test_bad_arguments() -> None:
    for arguments, words in [
        ({"proj_dim": 10_000}, "proj_dim=10000 is above grad_dim=2410"),
        ({"damping": -1}, "damping must be"),
        ({"proj_type": "x"}, "proj_type='x' is not known"),
        ({"grad_wrt": ["x"]}, "grad_wrt names x"),
    ]:
        with pytest.raises(ValueError, match=words):
            plugin(mlp(), **{"proj_dim": 16, **arguments})
    with pytest.raises(TypeError, match="list of parameter names"):
        plugin(mlp(), 16, grad_wrt="1.weight")


def test_resumed_featurizing_gives_the_same(tmp_path: Path) -> None:
    # TRAKer skips rows that are there; a new process continues where the first stopped.
    model = mlp()
    states = checkpoints(model, 1)
    _, expected = quickstart(model, states, tmp_path / "a", **plugin(model, 64))
    images, labels = digits()

    def traker() -> TRAKer:
        return TRAKer(
            model,
            "image_classification",
            300,
            str(tmp_path / "b"),
            device="cpu",
            logging_level=logging.ERROR,
            **plugin(model, 64),
        )

    first = traker()
    first.load_checkpoint(states[0], 0)
    first.featurize((images[:50], labels[:50]), inds=np.arange(50))
    del first
    second = traker()
    second.load_checkpoint(states[0], 0)
    for start in range(0, 300, 50):
        rows = slice(start, start + 50)
        second.featurize((images[rows], labels[rows]), inds=np.arange(start, start + 50))
    second.finalize_features()
    second.start_scoring_checkpoint("test", states[0], 0, 20)
    for batch in loader(target_set()):
        second.score(batch, num_samples=20)
    np.testing.assert_array_equal(np.array(second.finalize_scores("test")), expected)
    assert torch.equal(model.state_dict()["1.bias"], states[0]["1.bias"])
