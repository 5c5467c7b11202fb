"""The cost model counts rightly; its constants are only checked for sense."""

import json
import math
from collections.abc import Callable

import pytest
import torch
from _measure import peak_of_tensors
from torch import Tensor, nn
from trak.modelout_functions import ImageClassificationModelOutput
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from trak_dropout import CausalLMOutput, DropoutProjector, FactoredGradientComputer
from trak_dropout.cli import main
from trak_dropout.estimate import Speed, Work, calibrate, estimate

SPEED = Speed(batch=0.5, multiply_add=1e-3, coordinate=1e-2, product=1e-4, entry=1e-3)


@pytest.mark.parametrize(("width", "layers", "vocabulary"), [(32, 1, 50), (64, 3, 100)])
def test_parameters_are_those_of_a_gpt_neox_model(width: int, layers: int, vocabulary: int) -> None:
    config = GPTNeoXConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        intermediate_size=4 * width,
    )
    model = GPTNeoXForCausalLM(config)
    size = sum(parameter.numel() for parameter in model.parameters())
    assert Work.transformer(width, layers, vocabulary, 16).parameters == size


def test_time_is_the_sum_of_its_parts() -> None:
    work = Work(parameters=1000, multiply_adds=5000, tokens=2, factors=10, graph=7)
    found = estimate(work, SPEED, 30, 4, fold=3, checkpoints=2, targets=7, batch_size=10)
    sample = 5000 * 1e-3 + 12 * 2 * 1e-2 + 0.5 / 10
    assert math.isclose(found.collecting, 2 * 30 * sample)
    solve = 1e-4 * (2 * 30 * 4 * 4 + 4**3 / 3 + 30 * 4 * 7) + 1e-3 * 30 * 4
    assert math.isclose(found.scoring, 2 * (7 * sample + solve))
    assert found.store == 2 * (30 * 4 * 4 + 1000 * 4)
    assert found.weights == 4000


def test_taking_coordinates_costs_at_most_a_product() -> None:
    work = Work.dense(1000, 1)
    few, many = (estimate(work, SPEED, 10, k, fold=1).collecting for k in (10, 10**6))
    model = 10 * (1000 * 1e-3 + 0.5 / 16)
    assert model < few < many
    assert math.isclose(many, model + 10 * 1000 * 1e-3 / 2)


@pytest.mark.parametrize(("width", "layers", "tokens"), [(64, 2, 16), (128, 3, 32)])
def test_tensors_of_a_batch_are_counted(width: int, layers: int, tokens: int) -> None:
    samples, vocabulary = 8, 50
    config = GPTNeoXConfig(
        vocab_size=vocabulary, hidden_size=width, num_hidden_layers=layers,
        num_attention_heads=width // 64, intermediate_size=4 * width,
    )  # fmt: skip

    def make() -> Callable[[], Tensor]:
        model = GPTNeoXForCausalLM(config).eval()
        computer = FactoredGradientComputer(model, CausalLMOutput())
        projector = DropoutProjector.from_model(model, 4, fold=1)
        batch = (torch.randint(vocabulary, (samples, tokens)),)
        return lambda: projector.project(computer.compute_per_sample_grad(batch), 0)

    measured = peak_of_tensors(make)
    work = Work.transformer(width, layers, vocabulary, tokens)
    found = estimate(work, SPEED, samples, 4, fold=1, batch_size=samples, targets=1)
    # Matrices of a few samples are small; in the first batches the self-check runs.
    assert found.tensors / 2**20 == pytest.approx(measured, rel=0.08)
    assert found.memory > found.tensors


def test_large_blocks_leave_no_holes() -> None:
    work = Work.transformer(64, 1, 50_000, 64)
    few, many = (
        estimate(work, SPEED, 2, 4, batch_size=b, targets=1, fold=1) for b in (1, 64)
    )  # one tensor of logits has 13 and 820 megabytes
    assert few.memory / few.tensors == pytest.approx(1.45)
    assert many.memory / many.tensors < 1.1
    on_gpu = estimate(work, SPEED, 2, 4, batch_size=1, targets=1, fold=1, device="cuda")
    assert on_gpu.memory == on_gpu.tensors == few.tensors


def test_a_model_is_counted() -> None:
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(4 * 36, 10)
    ).eval()
    work = Work.of_model(model, torch.randn(1, 1, 8, 8))
    assert work.parameters == 4 * 9 + 4 + 1440 + 10
    assert work.multiply_adds == 36 * 4 * 9 + 1440
    assert work.tokens == 1
    assert work.largest == 1440
    assert work.factors == (64 + 144) + (144 + 10)
    # The activation and the flattening hold nothing new; on the way back two gradients meet there.
    assert work.graph == 64 + 144 + 10 + 2 * 144


@pytest.mark.parametrize(("samples", "fold"), [(4, 16), (64, 16), (16, 1)])
def test_tensors_of_single_positions_are_counted(samples: int, fold: int) -> None:
    def build() -> nn.Module:
        layers = [nn.Linear(784, 1024), nn.ReLU(), nn.Linear(1024, 1000), nn.ReLU()]
        return nn.Sequential(*layers, nn.Linear(1000, 10)).eval()

    def make() -> Callable[[], Tensor]:
        model = build()
        computer = FactoredGradientComputer(model, ImageClassificationModelOutput())
        projector = DropoutProjector.from_model(model, 2048, fold=fold)
        batch = torch.randn(samples, 784), torch.randint(10, (samples,))
        return lambda: projector.project(computer.compute_per_sample_grad(batch), 0)

    work = Work.of_model(build(), torch.randn(1, 784))
    found = estimate(work, SPEED, samples, 2048, fold=fold, batch_size=samples, targets=1)
    assert found.tensors / 2**20 == pytest.approx(peak_of_tensors(make), rel=0.25)


def test_linear_in_samples() -> None:
    work = Work.transformer(64, 2, 100, 16)
    one, ten = (estimate(work, SPEED, n, 64).collecting for n in (100, 1000))
    assert math.isclose(ten, 10 * one)


@pytest.mark.parametrize("name", ["proj_dim", "samples", "batch_size", "checkpoints"])
def test_sizes_must_be_positive(name: str) -> None:
    sizes = {"samples": 10, "proj_dim": 4, name: 0}
    with pytest.raises(ValueError, match=name):
        estimate(Work.dense(1000, 1), SPEED, **sizes)


def test_calibration_leaves_the_random_state_and_gives_constants() -> None:
    torch.manual_seed(3)
    state = torch.get_rng_state()
    speed = calibrate(8, repeats=1, vocabulary=32)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(math.isfinite(value) and value >= 0 for value in vars(speed).values())
    assert speed.multiply_add > 0


def test_command(capsys: pytest.CaptureFixture) -> None:
    words = ["estimate", "--model", "64x2x100", "--tokens", "8", "--samples", "100", "--json"]
    assert main(words) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["parameters"] == Work.transformer(64, 2, 100, 8).parameters
    assert found["collecting"] > 0


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--model", "pythia-9b"], "pythia-9b"),
        (["--model", "64x2"], "WIDTHxLAYERSxVOCABULARY"),
        (["--parameters", "0"], "--parameters"),
        (["--parameters", "1e6", "--tokens", "0"], "--tokens"),
        (["--parameters", "inf"], "--parameters must be a number of at least 1, got inf"),
        (["--parameters", "nan"], "--parameters must be a number of at least 1, got nan"),
        (["--parameters", "1e6", "--multiply-adds", "nan"], "--multiply-adds"),
        (["--parameters", "1e6", "--device", "foo"], "--device 'foo' cannot be used here"),
        (["--parameters", "1e6", "--device", "cuda:99"], "--device 'cuda:99' cannot be used here"),
        (["--parameters", "1e3", "--proj-dim", "100000"], "--proj-dim 100000 is above"),
    ],
)
def test_command_refuses(words: list[str], said: str, capsys: pytest.CaptureFixture) -> None:
    assert main(["estimate", *words, "--samples", "10"]) == 1
    assert said in capsys.readouterr().err
