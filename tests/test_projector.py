"""DropoutProjector against TRAK's vectorize, and everything it must refuse."""

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cases import checkpoints, convnet, digits, loader, mlp, quickstart, target_set
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from trak import TRAKer
from trak.gradient_computers import FunctionalGradientComputer
from trak.modelout_functions import ImageClassificationModelOutput
from trak.projectors import ProjectionType
from trak.utils import vectorize

from trak_dropout import DropoutProjector, NonFiniteGradientError, plugin
from trak_dropout.statistics import GradientStatistics


def gradients(model: nn.Module, n: int = 7, grad_wrt: list[str] | None = None) -> dict:
    images, labels = digits()
    computer = FunctionalGradientComputer(
        model.eval(), ImageClassificationModelOutput(), 0, torch.float32, "cpu", grad_wrt
    )
    grads = computer.compute_per_sample_grad((images[:n], labels[:n]))
    return {name: grad.detach() for name, grad in grads.items()}


def matrix_of(projector: DropoutProjector, model_id: int = 0) -> Tensor:
    """The projection as a dense matrix, read off the mask."""
    mask = projector.mask(model_id)
    matrix = torch.zeros(projector.grad_dim, projector.proj_dim, dtype=torch.float64)
    matrix[mask.coordinates, mask.columns] = torch.tensor(mask.weights)
    return matrix


@pytest.mark.parametrize("grad_wrt", [None, ["0.weight", "5.factor", "7.bias"]])
def test_pure_dropout_is_picking_and_scaling(grad_wrt: list[str] | None) -> None:
    model = convnet()
    grads = gradients(model, grad_wrt=grad_wrt)
    projector = DropoutProjector.from_model(model, 37, seed=3, grad_wrt=grad_wrt, fold=1)
    flat = vectorize(grads, device="cpu")
    for model_id in (0, 5):
        kept = projector.mask(model_id).coordinates
        expected = flat[:, kept] * np.sqrt(flat.shape[1])
        assert torch.equal(projector.project(grads, model_id), expected)
        assert torch.equal(projector.project(flat, model_id), expected)


@pytest.mark.parametrize("fold", [2, 16, 1000])
def test_folded_is_the_masks_matrix(fold: int) -> None:
    grads = gradients(mlp())
    projector = DropoutProjector.from_model(mlp(), 64, fold=fold, dtype=torch.float64)
    flat = vectorize(grads, device="cpu")
    expected = flat.double() @ matrix_of(projector)
    torch.testing.assert_close(projector.project(grads, 0), expected)
    torch.testing.assert_close(projector.project(flat, 0), expected)


def test_from_model_and_plain_constructor_draw_the_same_masks() -> None:
    model, grads = mlp(), gradients(mlp())
    known = DropoutProjector.from_model(model, 16, seed=4)
    plain = DropoutProjector(known.grad_dim, 16, seed=4)
    assert torch.equal(known.project(grads, 2), plain.project(grads, 2))


def test_each_model_id_has_its_own_mask_whatever_the_order_of_calls() -> None:
    grads = gradients(mlp())
    projector = DropoutProjector.from_model(mlp(), 16)
    first, second = projector.project(grads, 0), projector.project(grads, 1)
    projector.free_memory()
    assert torch.equal(projector.project(grads, 1), second)
    assert torch.equal(projector.project(grads, np.int64(0)), first)
    assert not torch.equal(first, second)


def test_batches_do_not_matter() -> None:
    grads = gradients(mlp())
    projector = DropoutProjector.from_model(mlp(), 16)
    whole = projector.project(grads, 0)
    parts = [
        projector.project({k: g[i : i + 3] for k, g in grads.items()}, 0) for i in range(0, 7, 3)
    ]
    assert torch.equal(torch.cat(parts), whole)


def test_output_is_fresh_and_writable() -> None:
    # k = p, fold = 1: even where every coordinate is kept, TRAKer's in-place division is safe.
    grads = torch.randn(3, 8)
    before = grads.clone()
    projector = DropoutProjector(8, 8, fold=1)
    result = projector.project(grads, 0)
    result /= 3
    assert torch.equal(grads, before)
    again = projector.project(grads, 0)
    assert torch.equal(again, before * np.sqrt(8))
    assert not projector.project(grads.requires_grad_(), 0).requires_grad


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_any_shapes_and_strides(data: st.DataObject) -> None:
    shapes = data.draw(
        st.lists(st.lists(st.integers(1, 4), max_size=4).map(tuple), min_size=1, max_size=5)
    )
    batch = data.draw(st.integers(0, 3))
    grads = {}
    for i, shape in enumerate(shapes):
        block = torch.randn(batch, *shape)
        if data.draw(st.booleans()):  # strided: the same values, another order in memory
            block = block.movedim(0, -1).contiguous().movedim(-1, 0)
        if data.draw(st.booleans()):
            block = torch.stack([block, block], dim=-1)[..., 0]
        grads[f"p{i}"] = block
    total = sum(int(np.prod(shape)) for shape in shapes)
    proj_dim = data.draw(st.integers(1, total))
    projector = DropoutProjector(total, proj_dim, fold=data.draw(st.integers(1, 4)))
    flat = torch.cat([g.reshape(batch, int(np.prod(g.shape[1:]))) for g in grads.values()], 1)
    expected = flat.double() @ matrix_of(projector)
    result = projector.project(grads, 0)
    assert result.shape == (batch, proj_dim)
    torch.testing.assert_close(result, expected.float())
    strided = torch.stack([flat, flat], 1)[:, 0]
    torch.testing.assert_close(projector.project(strided, 0), result)


@pytest.mark.parametrize(
    "given_dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64]
)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtypes(given_dtype: torch.dtype, dtype: torch.dtype) -> None:
    grads = torch.randn(4, 50).to(given_dtype)
    projector = DropoutProjector(50, 6, dtype=dtype, fold=3)
    result = projector.project(grads, 0)
    assert result.dtype == dtype
    # Sums run in float32 at least: the only rounding to a half type is the last.
    exact = (grads.double() @ matrix_of(projector)).to(dtype)
    torch.testing.assert_close(result, exact, rtol=2e-2 if dtype.itemsize == 2 else 1e-5, atol=1e-2)


def test_mappings_are_read_by_name() -> None:
    grads = gradients(mlp())
    projector = DropoutProjector.from_model(mlp(), 16)
    shuffled = dict(reversed(grads.items()))
    assert torch.equal(projector.project(shuffled, 0), projector.project(grads, 0))


def test_trak_can_build_it_as_it_builds_its_own() -> None:
    projector = DropoutProjector(
        grad_dim=100,
        proj_dim=10,
        seed=1,
        proj_type=ProjectionType.rademacher,
        max_batch_size=32,
        block_size=100,
        model_id=0,
        dtype=torch.float16,
        device="cpu",
    )
    assert projector.proj_type == "dropout"
    assert type(projector.proj_type) is str
    assert "proj_dim=10" in repr(projector)


def test_preserves_inner_products_on_average() -> None:
    # Mean over 2000 independent masks; the tolerance is 5 standard errors of that mean.
    torch.manual_seed(1)
    g, h = torch.randn(2, 300, dtype=torch.float64)
    projector = DropoutProjector(300, 20, dtype=torch.float64, fold=4)
    pair = torch.stack([g, h])
    products = []
    for model_id in range(2000):
        a, b = projector.project(pair, model_id)
        products.append(float(a @ b))
    error = np.std(products) / np.sqrt(len(products))
    assert abs(np.mean(products) - 20 * float(g @ h)) < 5 * error


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_gradients_name_the_samples(bad: float) -> None:
    grads = torch.randn(6, 40)
    projector = DropoutProjector(40, 10, fold=4)  # every coordinate is kept
    grads[2, 5] = bad
    grads[4] = bad
    with pytest.raises(NonFiniteGradientError, match=r"samples 2, 4 .* NaN or infinite") as caught:
        projector.project(grads, 3)
    assert caught.value.samples == [2, 4]
    assert "model_id=3" in str(caught.value)


def test_overflow_of_the_output_type_is_refused() -> None:
    projector = DropoutProjector(40, 10, dtype=torch.float16)
    with pytest.raises(NonFiniteGradientError, match=r"samples 0, 1 .*float16; use dtype"):
        projector.project(torch.full((2, 40), 5e4), 0)


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"proj_dim": 101}, ValueError, "proj_dim=101 is above grad_dim=100"),
        ({"proj_dim": 0}, ValueError, "proj_dim must be at least 1"),
        ({"proj_dim": -3}, ValueError, "proj_dim must be at least 1, got -3"),
        ({"grad_dim": 0}, ValueError, "grad_dim must be at least 1"),
        ({"proj_type": "gaussian"}, ValueError, "proj_type='gaussian' is not known"),
        ({"proj_type": "normal"}, ValueError, "proj_type='normal' is not known"),
        ({"fold": 0}, ValueError, "fold must be at least 1"),
        ({"fold": 1.5}, TypeError, "fold must be an integer"),
        ({"seed": "x"}, TypeError, "seed must be an integer"),
        ({"dtype": torch.int32}, TypeError, "dtype must be a floating-point"),
        ({"folds": 2}, TypeError, "no argument folds"),
    ],
)
def test_bad_arguments(arguments: dict, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        DropoutProjector(**{"grad_dim": 100, "proj_dim": 10, **arguments})


def test_bad_grad_wrt() -> None:
    with pytest.raises(ValueError, match="grad_wrt names nope"):
        DropoutProjector.from_model(mlp(), 4, grad_wrt=["1.weight", "nope"])
    with pytest.raises(ValueError, match="grad_wrt is empty"):
        DropoutProjector.from_model(mlp(), 4, grad_wrt=[])
    with pytest.raises(TypeError, match="list of parameter names"):
        DropoutProjector.from_model(mlp(), 4, grad_wrt="1.weight")
    with pytest.raises(ValueError, match="the model has none"):
        DropoutProjector.from_model(nn.ReLU(), 4)


def test_what_is_no_model_is_refused() -> None:
    nothing: Any = None
    a_class: Any = nn.Linear
    with pytest.raises(TypeError, match=r"model must be an nn.Module, got NoneType"):
        DropoutProjector.from_model(nothing, 4)
    with pytest.raises(TypeError, match="got the class Linear; give an instance of it"):
        DropoutProjector.from_model(a_class, 4)


def test_gradients_of_another_model_are_refused() -> None:
    projector = DropoutProjector.from_model(mlp(32), 16)
    wider, other = gradients(mlp(33)), gradients(convnet())
    with pytest.raises(ValueError, match=r"grads\['1.weight'\] has shape \(7, 33, 64\), expected"):
        projector.project(wider, 0)
    with pytest.raises(ValueError, match="missing 3.weight, 3.bias; unexpected 0.weight"):
        projector.project(other, 0)
    with pytest.raises(ValueError, match="grad_dim=2410"):
        projector.project(torch.randn(2, 2409), 0)
    with pytest.raises(ValueError, match="expected \\(B, grad_dim\\)"):
        projector.project(torch.randn(2410), 0)
    with pytest.raises(ValueError, match="2443 coordinates"):
        DropoutProjector(2410, 16).project(gradients(mlp(32)) | {"x": torch.randn(7, 33)}, 0)
    with pytest.raises(ValueError, match="one batch size"):
        DropoutProjector(4, 2).project({"a": torch.randn(3, 2), "b": torch.randn(2, 2)}, 0)
    with pytest.raises(TypeError, match="mapping of tensors or a tensor, got list"):
        projector.project([1.0], 0)
    restricted = DropoutProjector.from_model(mlp(32), 16, grad_wrt=["1.weight"])
    with pytest.raises(ValueError, match="Give the same grad_wrt"):
        restricted.project(gradients(mlp(32)), 0)


SCHEMES = ["dropout", "unit_dropout", "weighted_dropout"]


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("fold", [1, 4])
def test_every_scheme_is_its_masks_matrix(scheme: str, fold: int) -> None:
    model = convnet()
    grads = gradients(model)
    projector = DropoutProjector.from_model(
        model, 40, seed=1, proj_type=scheme, dtype=torch.float64, fold=fold
    )
    projector.calibrate(grads)
    flat = vectorize(grads, device="cpu")
    for model_id in (0, 3):
        expected = flat.double() @ matrix_of(projector, model_id)
        torch.testing.assert_close(projector.project(grads, model_id), expected)
        torch.testing.assert_close(projector.project(flat, model_id), expected)
    assert projector.proj_type == scheme


@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_scheme_works_without_a_layout(scheme: str) -> None:
    grads = torch.randn(5, 200)
    projector = DropoutProjector(200, 10, proj_type=scheme, fold=2)
    result = projector.project(grads, 0)
    torch.testing.assert_close(result, (grads.double() @ matrix_of(projector)).float())


@pytest.mark.parametrize("scheme", SCHEMES)
def test_inner_products_are_kept_on_average(scheme: str) -> None:
    # Heavy-tailed gradients; the tolerance is 5 standard errors of the mean over masks.
    model = mlp(4)
    torch.manual_seed(2)
    size = sum(p.numel() for p in model.parameters())
    g, h = torch.distributions.StudentT(3.0).sample((2, size)).double()
    projector = DropoutProjector.from_model(model, 30, proj_type=scheme, fold=3)
    projector.calibrate(torch.stack([g, g + h]))
    products = []
    for model_id in range(1500):
        a, b = projector.project(torch.stack([g, h]), model_id)
        products.append(float(a @ b))
    error = np.std(products) / np.sqrt(len(products))
    assert abs(np.mean(products) - 30 * float(g @ h)) < 5 * error


def test_first_batch_calibrates_for_good(caplog: pytest.LogCaptureFixture) -> None:
    model, grads = mlp(), gradients(mlp())
    projector = DropoutProjector.from_model(model, 16, proj_type="weighted_dropout", fold=1)
    with pytest.raises(ValueError, match="call calibrate"):
        projector.mask(0)
    with caplog.at_level("INFO"):
        first = projector.project(grads, 0)
    assert "7 samples of the first batch" in caplog.text
    other = {name: torch.randn_like(grad) for name, grad in grads.items()}
    projector.project(other, 0)
    assert torch.equal(projector.project(grads, 0), first)
    with pytest.raises(RuntimeError, match="have been projected with other statistics"):
        projector.calibrate(other)
    projector.calibrate(other, model_id=5)  # a checkpoint that has not been projected yet
    assert set(projector.statistics) == {None, 5}
    again = DropoutProjector.from_model(model, 16, proj_type="weighted_dropout", fold=1)
    for owner, statistics in projector.statistics.items():
        again.set_statistics(statistics, owner)
    for model_id in (0, 1, 5):
        assert torch.equal(again.project(grads, model_id), projector.project(grads, model_id))


def test_statistics_that_nothing_keeps_are_warned_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = mlp()
    states = checkpoints(model, 1)

    def projector() -> DropoutProjector:
        return DropoutProjector.from_model(model, 64, proj_type="weighted_dropout")

    def options(given: DropoutProjector) -> dict[str, Any]:
        return {"use_half_precision": False, "lambda_reg": 1e-3, "projector": given}

    first, second = projector(), projector()
    _, expected = quickstart(model, states, tmp_path / "plain", **options(first))
    assert "No store keeps these statistics" in caplog.text
    assert [record.levelname for record in caplog.records if "_dropout" in record.name] == [
        "WARNING"
    ]
    # What the warning says to do, in another process.
    torch.save(first.statistics[None].to_tensors(), tmp_path / "statistics.pt")
    kept = GradientStatistics.from_tensors(torch.load(tmp_path / "statistics.pt"))
    second.set_statistics(kept)
    traker = TRAKer(
        model,
        "image_classification",
        300,
        str(tmp_path / "plain"),
        device="cpu",
        logging_level=logging.ERROR,
        **options(second),
    )
    traker.start_scoring_checkpoint("again", states[0], 0, 20)
    for batch in loader(target_set()):
        traker.score(batch, num_samples=len(batch[0]))
    np.testing.assert_array_equal(np.array(traker.finalize_scores("again")), expected)
    # A store keeps them.
    caplog.clear()
    with caplog.at_level("INFO"):
        plugs = plugin(model, 64, proj_type="weighted_dropout")
        quickstart(model, states, tmp_path / "store", **plugs)
    assert "was not calibrated" in caplog.text
    assert "No store" not in caplog.text


def test_calibrate_takes_a_loader() -> None:
    images, labels = digits()
    model = mlp()
    computer = FunctionalGradientComputer(
        model, ImageClassificationModelOutput(), 0, torch.float32, "cpu"
    )
    batches = [(images[i : i + 50], labels[i : i + 50]) for i in range(0, 500, 50)]
    projector = DropoutProjector.from_model(model, 16, proj_type="weighted_dropout")
    projector.calibrate(batches, compute=computer.compute_per_sample_grad, samples=120)
    assert projector.statistics[None].samples == 150
    with pytest.raises(ValueError, match="no samples to calibrate with"):
        projector.calibrate([])
    with pytest.raises(ValueError, match="missing 3.weight"):
        projector.calibrate([gradients(convnet())])
    with pytest.raises(ValueError, match="calibrate with gradients of this model"):
        DropoutProjector(9, 3).set_statistics(projector.statistics[None])


@pytest.mark.parametrize("fold", [1, 4])
def test_threads_do_not_change_a_row(fold: int) -> None:
    grads = torch.randn(5, 300, generator=torch.Generator().manual_seed(0))
    projector = DropoutProjector(300, 16, fold=fold)
    dense = torch.zeros(300, 16, dtype=torch.float64)
    mask = projector.mask(0)
    dense[mask.coordinates, mask.columns] = torch.as_tensor(mask.weights)
    threads = torch.get_num_threads()
    found = []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            found.append(projector.project(grads, 0))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*found)
    torch.testing.assert_close(found[0].double(), grads.double() @ dense, rtol=1e-5, atol=1e-4)
