"""What attribution will cost: a model of time and space, with constants measured on this machine.

Collecting compressed gradients of a sample takes a fixed time, a time for each multiply-add of the
model (forward, and back to the inputs of layers), and a time for each coordinate that is taken at
each position. Scores take products of the compressed gradients with themselves. The constants come
from short runs of a small transformer of the model's own width (`calibrate`); sizes are counted.

Memory is counted in tensors: a batch takes the factors of its gradients, which stay until the
projector has read them, and what autograd keeps while it runs. The self-check of some batches runs
them once more while the factors of the first run are still there, so that the peak is the sum, and
takes the whole gradient of single samples, one parameter at a time.
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
from trak_dropout.gradients.factors import DEFAULT_BUDGET
from trak_dropout.masks import DEFAULT_FOLD
from trak_dropout.outputs import CausalLMOutput
from trak_dropout.projector import DropoutProjector
from trak_dropout.scoring import DampedScoreComputer
from trak_dropout.taking import BUFFER

# What a process holds for each byte of tensors. Freed blocks of glibc's heap stay with the process
# where no new tensor fits; with every block mapped by itself (MALLOC_MMAP_THRESHOLD_=16384) this is
# 1.0, as it is on a GPU. Measured by benchmarks/scale.py.
_HELD = 1.45
_MAPPED = 32 * 2**20  # bytes from which on glibc maps every block by itself


@dataclass(frozen=True)
class Work:
    """What a model does for one sample.

    Args:
        parameters: number of parameters.
        multiply_adds: of one forward pass.
        tokens: positions in a sample, 1 where there is only one.
        factors: numbers that factors of gradients hold: what layers with parameters are given, and
            the gradients of what they return.
        graph: numbers that autograd holds besides, at most, while it runs the model and back.
        largest: of these parameters, those of the largest tensor; all when 0.
        logits: of what is held, in each of four tensors of logits and their gradients.
    """

    parameters: float
    multiply_adds: float
    tokens: int
    factors: float
    graph: float
    largest: float = 0.0
    logits: float = 0.0

    @classmethod
    def transformer(cls, width: int, layers: int, vocabulary: int, tokens: int) -> Work:
        """A GPT-NeoX model: untied embeddings, feed-forward layers of four times the width."""
        blocks = layers * (12 * width**2 + 13 * width)
        head = vocabulary * width
        attention = 2 * layers * tokens**2 * width
        # In widths, of each block. Inputs of its four linear layers: 1 + 1 + 1 + 4. Gradients of
        # their outputs: 3 + 4, and 1 that the two which are added to the stream share.
        factors = tokens * (layers * 15 * width + 2 * width + vocabulary)
        # Forward: the stream, two norms, queries, keys and values before (3) and after (2) they are
        # turned, attention's result, twice, the activation's input and output (4 + 4). On the way
        # back the topmost block adds 9; in the loss there are logits, their logarithms and the
        # gradients of both, in which the factors' own gradient of the logits is counted already.
        forward = layers * 18 * width + 3 * width
        graph = tokens * (forward + max(9 * width + vocabulary, 3 * vocabulary))
        return cls(
            blocks + 2 * head + 2 * width,
            (blocks + head) * tokens + attention,
            tokens,
            factors,
            graph,
            max(4 * width**2, head),
            tokens * vocabulary,
        )

    @classmethod
    def dense(cls, parameters: float, tokens: int, multiply_adds: float | None = None) -> Work:
        """A model of which little is known: each parameter is used once at each position.

        For activations it is taken for four square layers; `of_model` counts them.

        Args:
            parameters: number of parameters.
            tokens: positions in a sample.
            multiply_adds: of one forward pass, where that is known (convolutions).
        """
        kept = tokens * 4 * math.sqrt(parameters)
        adds = multiply_adds or parameters * tokens
        return cls(parameters, adds, tokens, kept, kept, parameters / 4)

    @classmethod
    def of_model(cls, model: nn.Module, *inputs: Tensor) -> Work:
        """Count on a model that is there, from one forward pass.

        Linear layers and convolutions are counted as multiply-adds, and what layers are given and
        return as held. Work outside of layers, such as attention's products, is not seen.

        Args:
            model: the model, in evaluation mode.
            *inputs: what it takes, of one sample, with a batch dimension.

        Returns:
            The counts.
        """
        seen: set[int] = set()
        counts = {"multiply_adds": 0, "factors": 0, "graph": 0, "tokens": 1, "back": 0}

        def hook(module: nn.Module, given: tuple[object, ...], output: object) -> None:
            tensors = [value for value in given if isinstance(value, Tensor)]
            if not isinstance(output, Tensor) or not tensors:
                return
            for value in (*tensors, output):  # in place or a view: the same numbers
                place = value.untyped_storage().data_ptr()
                counts["graph"] += value.numel() if place not in seen else 0
                seen.add(place)
                alive.append(value)
            # Their gradients, which exist together while it flows back through this layer.
            counts["back"] = max(counts["back"], tensors[0].numel() + output.numel())
            weight = getattr(module, "weight", None)
            if isinstance(weight, Tensor) and weight.ndim > 1:  # of vectors gradients are formed
                counts["factors"] += tensors[0].numel() + output.numel()
                if isinstance(module, nn.Linear):
                    positions = output.numel() // module.out_features
                    counts["multiply_adds"] += positions * weight.numel()
                    counts["tokens"] = max(counts["tokens"], positions)
                elif isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
                    counts["multiply_adds"] += output[0, 0].numel() * weight.numel()

        alive: list[Tensor] = []  # so that no address is used again
        leaves = [module for module in model.modules() if next(module.children(), None) is None]
        handles = [module.register_forward_hook(hook) for module in leaves]
        try:
            with torch.no_grad():
                model(*inputs)
        finally:
            for handle in handles:
                handle.remove()
        sizes = [parameter.numel() for parameter in model.parameters()]
        return cls(
            sum(sizes),
            counts["multiply_adds"],
            counts["tokens"],
            counts["factors"],
            counts["graph"] + counts["back"],
            max(sizes),
        )


@dataclass(frozen=True)
class Speed:
    """Constants of a machine, in seconds.

    Args:
        batch: of a batch, whatever is in it.
        multiply_add: of each multiply-add of a forward pass, with what flows back.
        coordinate: of each coordinate taken at each position.
        product: of each multiply-add of a matrix product in double precision.
        entry: of each compressed gradient's entry that is read, widened and solved for, beside the
            products; small matrices spend more on this than on products.
    """

    batch: float
    multiply_add: float
    coordinate: float
    product: float
    entry: float = 0.0


@dataclass(frozen=True)
class Estimate:
    """What an attribution will take.

    Args:
        collecting: seconds to collect the training set's compressed gradients, all checkpoints.
        scoring: seconds to collect the targets' and to score.
        store: bytes on disk.
        memory: bytes that a process holds at most beside weights: of a batch, or of matrices.
        tensors: of these, bytes of tensors; a process on the CPU holds more.
        weights: bytes of the weights.
    """

    collecting: float
    scoring: float
    store: float
    memory: float
    tensors: float
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
    device: str = "cpu",
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
        device: where gradients are computed.

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
    solve = speed.product * _products(n, k, targets) + speed.entry * n * k
    matrices = 8 * (small**2 * 2 + (n * k if k > n else 4096 * k))
    # The factors of a batch, and beside them those of the self-check's own run, or what the
    # projector reads from them, one parameter at a time and in float32, half of its budget.
    largest = work.largest or work.parameters
    taken = min(k * fold, work.parameters) * largest / work.parameters
    taking = 4 * batch_size * min(2 * taken * work.tokens, largest + taken)
    if work.multiply_adds <= work.parameters and fold > 1:  # a table, read piece by piece
        values = 2 * 4 * batch_size * min(k * fold, work.parameters)
        taking = min(values, 2 * BUFFER) + 4 * batch_size * (work.factors + k)
    batch = bytes_of_weight * batch_size * work.factors + batch_size * k * 4
    alone = bytes_of_weight * largest  # the self-check's gradient of a parameter for one sample
    graph = bytes_of_weight * batch_size * work.graph
    batch += max(graph, min(taking, DEFAULT_BUDGET / 2), alone)
    process = batch
    if device == "cpu":  # blocks that are mapped by themselves go back when freed
        logits = bytes_of_weight * batch_size * work.logits
        mapped = 4 * logits if logits >= _MAPPED else 0.0
        process = mapped + _HELD * (batch - mapped)
    matrices += n * k * 4
    return Estimate(
        collecting=checkpoints * n * sample,
        scoring=checkpoints * (targets * sample + solve),
        store=checkpoints * (n * k * bytes_of_feature + work.parameters * bytes_of_weight),
        memory=max(process, matrices),
        tensors=max(batch, matrices),
        weights=work.parameters * bytes_of_weight,
    )


def _products(n: int, k: int, targets: int) -> float:
    """Multiply-adds of a Gram matrix, its decomposition, the solve and the scores."""
    small = min(n, k)
    return 2 * n * k * small + small**3 / 3 + n * k * targets


def _sample_seconds(work: Work, speed: Speed, coordinates: int) -> float:
    """Seconds of a sample; taking many coordinates never costs more than a whole product."""
    model = speed.multiply_add * work.multiply_adds
    taken = min(coordinates, work.parameters) * work.tokens * speed.coordinate
    return model + min(taken, model / 2)


class _Block(nn.Module):
    """A transformer block with parallel attention and feed-forward, as GPT-NeoX has."""

    def __init__(self, width: int) -> None:
        super().__init__()
        heads = max(1, width // 64)
        while width % heads:
            heads -= 1
        self.heads = heads
        self.norm, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Return ``(B, T, width)``."""
        batch, tokens, width = x.shape
        shape = (batch, tokens, self.heads, 3 * width // self.heads)
        q, k, v = self.qkv(self.norm(x)).view(shape).transpose(1, 2).chunk(3, dim=-1)
        turn = max(2, q.shape[-1] // 8 * 2)  # a quarter of a head's numbers tell the position
        angle = torch.outer(
            torch.arange(tokens, device=x.device),
            10_000 ** -torch.linspace(0, 1, turn // 2, device=x.device).repeat(2),
        )
        cosine, sine = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
        q, k = (self._turned(value, cosine, sine) for value in (q, k))
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        mixed = mixed.transpose(1, 2).reshape(batch, tokens, width)
        up: Tensor = self.up(self.norm2(x))
        return self.down(nn.functional.gelu(up)) + self.out(mixed) + x

    @staticmethod
    def _turned(value: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
        """A part of each head's numbers turned by an angle that grows with the position."""
        size = cosine.shape[-1]
        part, rest = value[..., :size], value[..., size:]
        one, other = part.chunk(2, dim=-1)
        part = part * cosine + torch.cat([-other, one], dim=-1) * sine
        return torch.cat([part, rest], dim=-1)


def _reference(
    width: int, layers: int, vocabulary: int, device: str, dtype: torch.dtype
) -> nn.Module:
    model = nn.Sequential(
        nn.Embedding(vocabulary, width),
        *(_Block(width) for _ in range(layers)),
        nn.LayerNorm(width),
        nn.Linear(width, vocabulary, bias=False),
    )
    return model.to(device, dtype).eval()


def calibrate(
    tokens: int = 64,
    *,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    proj_type: str = "dropout",
    repeats: int = 5,
    vocabulary: int = 512,
    width: int = 320,
    batch_size: int | None = None,
    density: float = 0.01,
) -> Speed:
    """Measure this machine's constants; takes about a quarter of a minute on two cores.

    Small layers run at a lower rate than large ones, and so do small batches: what is run should be
    like what is to be predicted. One and three blocks are run, so that a block's time is their
    difference.

    Args:
        tokens: positions in a sample; speed depends on them.
        device: where gradients will be computed.
        dtype: of the weights.
        proj_type: the scheme that will be used.
        repeats: rounds of which the median counts.
        vocabulary: of the model that is run.
        width: of its layers; above a thousand the rate no longer changes.
        batch_size: samples in a batch; when None, as many as make a thousand positions.
        density: share of the parameters' coordinates that will be taken.

    Returns:
        The constants.
    """
    with torch.random.fork_rng(devices=[] if device == "cpu" else None):
        torch.manual_seed(0)
        width = max(8, min(width, 1024) // 8 * 8)
        batch_size = batch_size or max(2, 1024 // tokens)
        return _calibrate(
            tokens, device, dtype, proj_type, repeats, vocabulary, width, batch_size, density
        )


def _calibrate(
    tokens: int,
    device: str,
    dtype: torch.dtype,
    proj_type: str,
    repeats: int,
    vocabulary: int,
    width: int,
    batch_size: int,
    density: float,
) -> Speed:
    few, many = (_reference(width, count, vocabulary, device, dtype) for count in (1, 3))
    size = sum(parameter.numel() for parameter in many.parameters())
    wanted = max(64, min(size, round(density * size)) // DEFAULT_FOLD)
    calls: list[Callable[[], object]] = []
    batch = (torch.randint(vocabulary, (batch_size, tokens), device=device),)
    for model, columns in ((few, 4), (many, 4), (many, 4 + wanted)):
        own = sum(parameter.numel() for parameter in model.parameters())
        computer = FactoredGradientComputer(model, CausalLMOutput(), own, dtype, device)
        projector = DropoutProjector.from_model(
            model, columns, 0, proj_type, device, dtype, fold=DEFAULT_FOLD
        )

        def call(
            computer: FactoredGradientComputer = computer,
            projector: DropoutProjector = projector,
        ) -> object:
            return projector.project(computer.compute_per_sample_grad(batch), 0)

        calls.append(call)
    works = [
        Work.transformer(width, count, vocabulary, tokens).multiply_adds * batch_size
        for count in (1, 3)
    ]
    square = torch.randn(768, 768, dtype=torch.float64, device=device)
    calls.append(lambda: square @ square)
    rows, columns, targets = 2048, 256, 16
    matrix = torch.randn(rows, columns, device=device)
    scores = torch.zeros(rows, targets, device=device)

    def solve() -> None:
        score_computer = DampedScoreComputer(torch.float32, device)
        features = score_computer.get_x_xtx_inv(matrix, score_computer.get_xtx(matrix))
        score_computer.get_scores(features, matrix[:targets], scores)

    calls.append(solve)
    small, large, taking, product, solving = _medians(calls, repeats, device)
    product /= 768**3
    per_add = max(large - small, 1e-9) / (works[1] - works[0])
    coordinates = wanted * DEFAULT_FOLD * batch_size * tokens
    return Speed(
        batch=max(small - per_add * works[0], 0.0),
        multiply_add=per_add,
        coordinate=max(taking - large, 0.0) / coordinates,
        product=product,
        entry=max(solving - product * _products(rows, columns, targets), 0.0) / (rows * columns),
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
