"""What attribution will cost: a model of time and space, with constants measured on this machine.

Collecting compressed gradients of a sample takes a fixed time, a time for each multiply-add of the
model (forward, and back to the inputs of layers), and a time for each coordinate that is taken at
each position. Scores take products of the compressed gradients with themselves. The constants come
from short runs of a small transformer (`calibrate`); sizes are counted.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from trak_dropout.gradients import FactoredGradientComputer
from trak_dropout.masks import DEFAULT_FOLD
from trak_dropout.outputs import CausalLMOutput
from trak_dropout.projector import DropoutProjector


@dataclass(frozen=True)
class Work:
    """What a model does for one sample.

    Args:
        parameters: number of parameters.
        multiply_adds: of one forward pass.
        tokens: positions in a sample, 1 where there is only one.
        activations: numbers that are kept from the forward pass until gradients are taken.
    """

    parameters: float
    multiply_adds: float
    tokens: int
    activations: float

    @classmethod
    def transformer(cls, width: int, layers: int, vocabulary: int, tokens: int) -> Work:
        """A GPT-NeoX model: untied embeddings, feed-forward layers of four times the width."""
        blocks = layers * (12 * width**2 + 13 * width)
        head = vocabulary * width
        attention = 2 * layers * tokens**2 * width
        # Inputs and outputs of a block's layers, what autograd keeps between them, and logits with
        # their gradients: found with GPT-NeoX models by benchmarks/scale.py.
        kept = tokens * (layers * 56 * width + 6 * vocabulary)
        return cls(
            blocks + 2 * head + 2 * width, (blocks + head) * tokens + attention, tokens, kept
        )

    @classmethod
    def dense(cls, parameters: float, tokens: int, multiply_adds: float | None = None) -> Work:
        """A model of which little is known: each parameter is used once at each position.

        Args:
            parameters: number of parameters.
            tokens: positions in a sample.
            multiply_adds: of one forward pass, where that is known (convolutions).
        """
        kept = tokens * 8 * math.sqrt(parameters)
        return cls(parameters, multiply_adds or parameters * tokens, tokens, kept)


@dataclass(frozen=True)
class Speed:
    """Constants of a machine, in seconds.

    Args:
        batch: of a batch, whatever is in it.
        multiply_add: of each multiply-add of a forward pass, with what flows back.
        coordinate: of each coordinate taken at each position.
        product: of each multiply-add of a matrix product in double precision.
    """

    batch: float
    multiply_add: float
    coordinate: float
    product: float


@dataclass(frozen=True)
class Estimate:
    """What an attribution will take.

    Args:
        collecting: seconds to collect the training set's compressed gradients, all checkpoints.
        scoring: seconds to collect the targets' and to score.
        store: bytes on disk.
        memory: bytes at most beside weights: activations of a batch, gradients, matrices.
        weights: bytes of the weights.
    """

    collecting: float
    scoring: float
    store: float
    memory: float
    weights: float


def estimate(
    work: Work,
    speed: Speed,
    samples: int,
    proj_dim: int,
    *,
    fold: int = DEFAULT_FOLD,
    checkpoints: int = 1,
    targets: int = 100,
    batch_size: int = 16,
    bytes_of_weight: int = 4,
    bytes_of_feature: int = 4,
) -> Estimate:
    """Predict time and space of an attribution.

    Args:
        work: what the model does for a sample.
        speed: the machine's constants.
        samples: size of the training set.
        proj_dim: number of columns k.
        fold: coordinates summed into each column.
        checkpoints: number of checkpoints.
        targets: number of targets.
        batch_size: samples in a batch.
        bytes_of_weight: 4 for float32, 2 for bfloat16.
        bytes_of_feature: 4 as the callback stores them, 2 as TRAK does by default.

    Returns:
        The prediction.

    Raises:
        ValueError: a size is not positive.
    """
    sizes = {
        "samples": samples, "proj_dim": proj_dim, "fold": fold, "checkpoints": checkpoints,
        "targets": targets, "batch_size": batch_size,
    }  # fmt: skip
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name} must be at least 1, got {size!r}")
    sample = _sample_seconds(work, speed, proj_dim * fold) + speed.batch / batch_size
    n, k = samples, proj_dim
    small = min(n, k)
    solve = speed.product * (2 * n * k * small + small**3 / 3 + n * k * targets)
    matrices = 8 * (small**2 * 2 + (n * k if k > n else 4096 * k))
    collecting_memory = batch_size * work.activations * 4 + batch_size * k * 4
    return Estimate(
        collecting=checkpoints * n * sample,
        scoring=checkpoints * (targets * sample + solve),
        store=checkpoints * (n * k * bytes_of_feature + work.parameters * bytes_of_weight),
        memory=max(collecting_memory, matrices + n * k * 4),
        weights=work.parameters * bytes_of_weight,
    )


def _sample_seconds(work: Work, speed: Speed, coordinates: int) -> float:
    """Seconds of a sample; taking many coordinates never costs more than a whole product."""
    model = speed.multiply_add * work.multiply_adds
    taken = min(coordinates, work.parameters) * work.tokens * speed.coordinate
    return model + min(taken, model / 2)


class _Block(nn.Module):
    """A transformer block with parallel attention and feed-forward, as GPT-NeoX has."""

    def __init__(self, width: int, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Return ``(B, T, width)``."""
        batch, tokens, width = x.shape
        h = self.norm(x)
        shape = (batch, tokens, 3, self.heads, width // self.heads)
        q, k, v = self.qkv(h).reshape(shape).permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        mixed = mixed.transpose(1, 2).reshape(batch, tokens, width)
        up: Tensor = self.up(h)
        return x + self.out(mixed) + self.down(nn.functional.gelu(up))


def _reference(width: int, layers: int, vocabulary: int) -> nn.Module:
    return nn.Sequential(
        nn.Embedding(vocabulary, width),
        *(_Block(width) for _ in range(layers)),
        nn.LayerNorm(width),
        nn.Linear(width, vocabulary, bias=False),
    )


def calibrate(
    tokens: int = 64,
    *,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    proj_type: str = "dropout",
    repeats: int = 5,
    vocabulary: int = 512,
) -> Speed:
    """Measure this machine's constants; takes about half a minute on two cores.

    Args:
        tokens: positions in a sample; speed depends on them.
        device: where gradients will be computed.
        dtype: of the weights.
        proj_type: the scheme that will be used.
        repeats: rounds of which the median counts.
        vocabulary: of the model that is run.

    Returns:
        The constants.
    """
    with torch.random.fork_rng(devices=[] if device == "cpu" else None):
        torch.manual_seed(0)
        return _calibrate(tokens, device, dtype, proj_type, repeats, vocabulary)


def _calibrate(
    tokens: int, device: str, dtype: torch.dtype, proj_type: str, repeats: int, vocabulary: int
) -> Speed:
    batch_size = max(2, 1024 // tokens)
    shapes = ((64, 2, 64), (320, 4, 64), (320, 4, 32_768))
    calls: list[Callable[[], object]] = []
    works = []
    for width, layers, coordinates in shapes:
        model = _reference(width, layers, vocabulary).to(device, dtype).eval()
        size = sum(parameter.numel() for parameter in model.parameters())
        batch = (torch.randint(vocabulary, (batch_size, tokens), device=device),)
        computer = FactoredGradientComputer(model, CausalLMOutput(), size, dtype, device)
        projector = DropoutProjector.from_model(
            model, coordinates // DEFAULT_FOLD, 0, proj_type, device, dtype, fold=DEFAULT_FOLD
        )

        def call(
            computer: FactoredGradientComputer = computer,
            batch: tuple[Tensor, ...] = batch,
            projector: DropoutProjector = projector,
        ) -> object:
            return projector.project(computer.compute_per_sample_grad(batch), 0)

        calls.append(call)
        works.append(Work.transformer(width, layers, vocabulary, tokens).multiply_adds * batch_size)
    square = torch.randn(768, 768, dtype=torch.float64, device=device)
    calls.append(lambda: square @ square)
    small, large, taking, product = _medians(calls, repeats, device)
    per_add = max(large - small, 1e-9) / (works[1] - works[0])
    coordinates = (shapes[2][2] - shapes[1][2]) * batch_size * tokens
    return Speed(
        batch=max(small - per_add * works[0], 0.0),
        multiply_add=per_add,
        coordinate=max(taking - large, 0.0) / coordinates,
        product=product / 768**3,
    )


def _medians(calls: list[Callable[[], object]], repeats: int, device: str) -> list[float]:
    """Median seconds of each call, in rounds, so that what disturbs one disturbs all."""
    seconds: list[list[float]] = [[] for _ in calls]
    for round_ in range(repeats + 2):
        for call, found in zip(calls, seconds, strict=True):
            started = time.perf_counter()
            call()
            if device != "cpu":
                torch.cuda.synchronize()
            if round_ >= 2:  # the first runs check and warm up
                found.append(time.perf_counter() - started)
    return [statistics.median(found) for found in seconds]
