"""Attribution methods behind one interface.

A method takes a `Problem` and returns an `Attribution`: scores of training samples for targets, or
self-influence of training samples, at each of several dampings, with the time and memory it took to
get there at one of them. Dampings of all methods that invert a matrix of gradients are in units of
the mean squared norm of a gradient, the grid is the same for all, and which one counts is chosen
for all by `_study.cross_fitted`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from _data import MissingError
from _measure import Measured
from _settings import Batch, Setting
from _spectrum import Spectrum, product
from torch import Tensor, nn
from trak.gradient_computers import FunctionalGradientComputer
from trak.projectors import BasicProjector, CudaProjector
from trak.utils import vectorize

from trak_dropout import DampedScoreComputer, DropoutProjector, FactoredGradientComputer
from trak_dropout.curvature import row_factors

Damping = float | str
GRID: tuple[Damping, ...] = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)


@dataclass(frozen=True)
class Problem:
    """What is to be attributed.

    Args:
        setting: data and task.
        models: checkpoints.
        seed: of projections.
        wanted: ``"scores"`` or ``"self"``.
        batch_size: of gradients.
    """

    setting: Setting
    models: Sequence[nn.Module]
    seed: int = 0
    wanted: str = "scores"
    batch_size: int = 500

    @property
    def device(self) -> str:
        """Where the data is."""
        return str(self.setting.train[0].device)

    def batches(self, part: Batch, size: int | None = None) -> list[Batch]:
        """The training set, or the targets, in batches."""
        size = size or self.batch_size
        return list(zip(*(tensor.split(size) for tensor in part), strict=True))

    def losses(self, model: nn.Module) -> np.ndarray:
        """The loss of each training sample."""
        with torch.no_grad():
            parts = [self.setting.losses(model, b) for b in self.batches(self.setting.train)]
        return torch.cat(parts).double().cpu().numpy()


@dataclass
class Attribution:
    """What a method found.

    Args:
        values: scores ``(n, m)`` or self-influence ``(n,)``, by damping.
        normalized: scores divided by the root of the training sample's self-influence at the same
            damping, so that samples with large gradients do not lead everywhere (RelatIF, arXiv
            2003.11630), by damping; empty where the method has none.
        seconds: to get there from the trained models, at one damping.
        collecting: of these, until gradients of training set and targets are compressed.
        projecting: of these, in the projection alone, where it can be told apart.
        megabytes: peak of the process beyond what it held before.
    """

    values: dict[Damping, np.ndarray] = field(default_factory=dict)
    normalized: dict[Damping, np.ndarray] = field(default_factory=dict)
    seconds: float = 0.0
    collecting: float = 0.0
    projecting: float | None = None
    megabytes: float | None = None


@dataclass(frozen=True)
class Method:
    """A method by name.

    Args:
        name: as in tables.
        run: takes a problem and k.
        sized: whether k means anything to it.
        ours: whether it is one of this package's schemes.
    """

    name: str
    run: Callable[[Problem, int], Attribution]
    sized: bool = False
    ours: bool = False


class Sparse:
    """Sparse Johnson-Lindenstrauss transform: each coordinate goes with a sign to one column.

    Args:
        grad_dim: number of coordinates.
        proj_dim: number of columns.
        seed: of the hash.
        device: where it runs.
    """

    def __init__(self, grad_dim: int, proj_dim: int, seed: int, device: str = "cpu") -> None:
        random = torch.Generator().manual_seed(seed)
        self.proj_dim = proj_dim
        self._column = torch.randint(proj_dim, (grad_dim,), generator=random).to(device)
        self._sign = (2 * torch.randint(2, (grad_dim,), generator=random) - 1).float().to(device)

    def project(self, grads: Any, model_id: int) -> Tensor:
        """Compress gradients ``(B, p)``, one transform for all checkpoints."""
        flat = vectorize(grads, device=self._sign.device)
        out = torch.zeros(len(flat), self.proj_dim, dtype=flat.dtype, device=flat.device)
        return out.index_add_(1, self._column, flat * self._sign)


class _Whole:
    """All coordinates as they are."""

    def project(self, grads: Any, model_id: int) -> Tensor:
        return vectorize(grads, device=next(iter(grads.values())).device)


def _size(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def _trainable(model: nn.Module) -> list[str] | None:
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    return None if len(names) == len(list(model.parameters())) else names


def compressed(
    problem: Problem, make: Callable[[nn.Module], Any], factored: bool
) -> tuple[list[tuple[Tensor, Tensor, Tensor]], float, float]:
    """Compress the gradients of training set and targets.

    Args:
        problem: the problem.
        make: builds the projector for a model.
        factored: whether gradients come as factors; else by TRAK's own computer where it runs.

    Returns:
        For each checkpoint training gradients, targets' gradients and out-to-loss gradients; the
        seconds it took, and of these the projector's.
    """
    setting, found = problem.setting, []
    projecting = Measured()
    inside = 0.0
    with Measured() as whole:
        for model_id, model in enumerate(problem.models):
            names = _trainable(model)
            projector = make(model)
            kind: Any = (
                FactoredGradientComputer
                if factored or not setting.dense
                else FunctionalGradientComputer
            )
            computer = kind(
                model, setting.task, _size(model), torch.float32, problem.device, grad_wrt=names
            )
            rows: dict[int, list[Tensor]] = {0: [], 1: []}
            out_to_loss = []
            # A dense gradient is p numbers for each sample: fewer at a time where p is large.
            size = (
                problem.batch_size
                if factored
                else max(32, min(problem.batch_size, 10**8 // _size(model)))
            )
            parts = (
                (setting.train,) if problem.wanted == "self" else (setting.train, setting.targets)
            )
            for part, data in enumerate(parts):
                for batch in problem.batches(data, size):
                    grads = computer.compute_per_sample_grad(batch)
                    with Measured() as projecting:
                        rows[part].append(projector.project(grads, model_id))
                    inside += projecting.seconds
                    if part == 0:
                        out_to_loss.append(computer.compute_loss_grad(batch))
            x = torch.cat(rows[0]).float()
            targets = torch.cat(rows[1]).float() if rows[1] else x[:1]
            found.append((x, targets, torch.cat(out_to_loss)))
    return found, whole.seconds, inside


def spectral(
    problem: Problem,
    make: Callable[[nn.Module], Any],
    factored: bool,
    solve: bool = True,
    curvature: str = "output",
) -> Attribution:
    """Scores or self-influence from compressed gradients, at every damping of the grid.

    Args:
        problem: the problem.
        make: builds the projector for a model.
        factored: whether gradients come as factors.
        solve: whether the time is that of the package's own solve; of the decomposition, where
            rows are too long for it, if not.
        curvature: ``"output"`` or ``"loss"``, of the package's scores.
    """
    with Measured() as measured:
        checkpoints, collecting, projecting = compressed(problem, make, factored)
        # Scores of rows multiplied by these are divided by them again.
        factors = [x.new_ones(len(x), 1, dtype=torch.float64) for x, _, _ in checkpoints]
        if curvature == "loss":
            factors = [
                row_factors(torch.linalg.vector_norm(x, dim=1), q.flatten()).unsqueeze(1)
                for x, _, q in checkpoints
            ]
            checkpoints = [
                (x * by.to(x), targets, q)
                for (x, targets, q), by in zip(checkpoints, factors, strict=True)
            ]
        spectra = [] if solve else [Spectrum(x, targets) for x, targets, _ in checkpoints]
        if solve:
            _solve_once(problem, checkpoints)
    attribution = Attribution(
        seconds=measured.seconds,
        collecting=collecting,
        projecting=projecting,
        megabytes=measured.megabytes,
    )
    spectra = spectra or [Spectrum(x, targets) for x, targets, _ in checkpoints]
    weight = sum(q.double() for _, _, q in checkpoints) / len(checkpoints)
    for damping in (*GRID, "auto"):
        ridges = [s.ridge(damping) for s in spectra]
        pairs = list(zip(spectra, ridges, factors, strict=True))
        if problem.wanted == "scores":
            value = sum(s.scores(r) / by for s, r, by in pairs) * weight
            # By roots of self-influence, in which the factors are as well.
            roots = [s.self_influence(r).sqrt().clamp_min(1e-300) for s, r, _ in pairs]
            relative = sum(
                s.scores(r) / root[:, None] for (s, r, _), root in zip(pairs, roots, strict=True)
            )
            attribution.normalized[damping] = relative.cpu().numpy()
        else:
            value = sum(s.self_influence(r) / by[:, 0].square() for s, r, by in pairs)
        attribution.values[damping] = value.cpu().numpy()
    return attribution


def _solve_once(problem: Problem, checkpoints: list[tuple[Tensor, Tensor, Tensor]]) -> None:
    """The package's own solve at one damping, for its time."""
    for x, targets, _ in checkpoints:
        computer = DampedScoreComputer(torch.float32, problem.device)
        if problem.wanted == "self":
            gram, (n, k) = computer.get_xtx(x), x.shape
            if k > n:
                computer.dual_leverages(gram, n, k)
            else:
                computer.leverages(gram, n, k)(x)
            continue
        features = computer.get_x_xtx_inv(x, computer.get_xtx(x))
        scores = torch.zeros(len(x), len(targets), device=x.device)
        computer.get_scores(features, targets, scores)


def dropout(
    proj_type: str, fold: int, curvature: str = "output"
) -> Callable[[Problem, int], Attribution]:
    """A scheme of this package."""

    def run(problem: Problem, k: int) -> Attribution:
        def make(model: nn.Module) -> DropoutProjector:
            return DropoutProjector.from_model(
                model, k, problem.seed, proj_type, problem.device,
                grad_wrt=_trainable(model), fold=fold,
            )  # fmt: skip

        return spectral(problem, make, factored=True, curvature=curvature)

    return run


def gaussian(problem: Problem, k: int, curvature: str = "output") -> Attribution:
    """TRAK's projection: on a GPU its CudaProjector where that runs, else its BasicProjector."""

    def make(model: nn.Module) -> Any:
        p = _size(model)
        if problem.device != "cpu":
            try:
                return CudaProjector(
                    p, k, problem.seed, "normal", problem.device, max_batch_size=32
                )
            except Exception as error:
                print(f"CudaProjector does not run here: {type(error).__name__}")
        return BasicProjector(p, k, problem.seed, "normal", problem.device, block_size=256)

    return spectral(problem, make, factored=False, curvature=curvature)


def sparse(problem: Problem, k: int) -> Attribution:
    """The sparse transform."""
    return spectral(
        problem, lambda m: Sparse(_size(m), k, problem.seed, problem.device), factored=False
    )


def whole(problem: Problem, k: int) -> Attribution:
    """No compression."""
    return spectral(problem, lambda model: _Whole(), factored=False, solve=False)


def dot_product(problem: Problem, k: int) -> Attribution:
    """The product of whole gradients, without a matrix between them."""
    with Measured() as measured:
        checkpoints, collecting, _ = compressed(problem, lambda model: _Whole(), factored=False)
        value: Any = 0.0
        cosine: Any = 0.0
        for x, targets, q in checkpoints:
            squares = torch.cat([part.double().square().sum(1) for part in x.split(256)])
            if problem.wanted == "scores":
                plain = product(x, targets)
                value = value + plain * q
                cosine = cosine + plain / squares.sqrt().clamp_min(1e-300)[:, None]
            else:
                value = value + squares
    return Attribution(
        {"none": value.cpu().numpy()},
        {"none": cosine.cpu().numpy()} if problem.wanted == "scores" else {},
        measured.seconds,
        collecting,
        None,
        measured.megabytes,
    )


def chance(problem: Problem, k: int) -> Attribution:
    """Random scores."""
    random = np.random.default_rng(problem.seed)
    n, m = problem.setting.n, len(problem.setting.targets[0])
    shape = (n, m) if problem.wanted == "scores" else (n,)
    return Attribution({"none": random.standard_normal(shape)})


def loss(problem: Problem, k: int) -> Attribution:
    """The loss of each training sample, as a stand-in for its influence on itself."""
    if problem.wanted != "self":
        raise MissingError("a sample's loss says nothing about a target")
    with Measured() as measured:
        value = sum(problem.losses(model) for model in problem.models)
    return Attribution(
        {"none": np.asarray(value)}, seconds=measured.seconds, megabytes=measured.megabytes
    )


def methods() -> dict[str, Method]:
    """All methods by name, peers from other packages included."""
    import _peers

    ours = [
        Method("dropout", dropout("dropout", 16), True, True),
        Method("dropout, fold 1", dropout("dropout", 1), True, True),
        Method("unit dropout", dropout("unit_dropout", 16), True, True),
        Method("weighted dropout", dropout("weighted_dropout", 1), True, True),
        Method("weighted dropout, fold 16", dropout("weighted_dropout", 16), True, True),
        Method("dropout, loss curvature", dropout("dropout", 16, "loss"), True, True),
    ]
    others = [
        Method("Gaussian", gaussian, True),
        Method("Gaussian, loss curvature", partial(gaussian, curvature="loss"), True),
        Method("SJLT", sparse, True),
        Method("no compression", whole),
        Method("gradient dot product", dot_product),
        Method("dattri TRAK", _peers.dattri_trak, True),
        Method("dattri influence function", _peers.dattri_arnoldi),
        Method("kronfluence EK-FAC", _peers.ekfac),
        Method("loss", loss),
        Method("random", chance),
    ]
    return {method.name: method for method in [*ours, *others]}


def run(method: Method, problem: Problem, k: int) -> Attribution | None:
    """Run a method; None with a printed reason where it does not run here."""
    try:
        return method.run(problem, k)
    except (MissingError, ImportError, NotImplementedError) as error:
        print(f"{problem.setting.name}: {method.name} is left out: {error}", flush=True)
        return None
