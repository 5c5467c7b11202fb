"""Methods of other packages: dattri and kronfluence, where they are installed.

    pip install -c constraints.txt '.[benchmarks]'
    pip install --no-deps -r benchmarks/peers.txt

Without dependencies, because they ask for torchvision, which none of what is used here needs and
which brings another torch.
"""

from __future__ import annotations

import contextlib
import io
import logging
import tempfile
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from _data import MissingError
from _measure import Measured
from _settings import Setting
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from trak_dropout import CausalLMOutput

if TYPE_CHECKING:
    from _methods import Attribution, Problem

# dattri's dampings are absolute; these are relative to the mean squared norm of a gradient.
DATTRI_GRID = (0.3, 1.0)
# kronfluence's own heuristic is 0.1 of the mean eigenvalue of each layer; others are relative to
# the mean eigenvalue of all layers.
EKFAC_GRID: tuple[float | str, ...] = ("heuristic", 0.1)
# dattri's influence function adds an absolute damping to the Hessian of the mean loss.
ARNOLDI_GRID = (0.1, 3.0)
# Its iteration loses orthogonality, and the smaller half of the eigenvalues is then spurious, with
# negative ones among them of which it takes roots.
_KRYLOV = 40


def _require(package: str) -> None:
    from importlib.util import find_spec

    if find_spec(package) is None:
        raise MissingError(f"{package} is not installed (benchmarks/_peers.py says how)")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            logging.disable(level)


def _dattri_task(problem: Problem, of_output: bool) -> Any:
    """The training loss, or else the measured output, and that as target, in dattri's terms."""
    from dattri.task import AttributionTask

    setting = problem.setting
    if not setting.dense:
        raise MissingError("dattri runs the model under vmap, which this model does not allow")
    model = problem.models[0]

    class Call(nn.Module):
        """Calls the model with other parameters."""

        def __init__(self, params: dict[str, Tensor]) -> None:
            super().__init__()
            self.params = params

        def __call__(self, *inputs: Tensor) -> Tensor:
            return torch.func.functional_call(model, self.params, inputs)

    def batched(data: Any) -> tuple[Tensor, ...]:
        # Under vmap a sample comes without its batch dimension.
        ndim = setting.train[-1].ndim
        return tuple(data) if data[-1].ndim == ndim else tuple(part[None] for part in data)

    def loss(params: Any, data: Any) -> Tensor:
        return setting.losses(Call(params), batched(data)).mean()

    def target(params: Any, data: Any) -> Tensor:
        return setting.output(Call(params), batched(data)).mean()

    states = [{k: v.clone() for k, v in m.state_dict().items()} for m in problem.models]
    trained = target if of_output else loss
    return AttributionTask(trained, model, states, target_func=target), target


def _loaders(setting: Setting, size: int) -> tuple[Any, Any]:
    return (
        DataLoader(TensorDataset(*setting.train), batch_size=size),
        DataLoader(TensorDataset(*setting.targets), batch_size=size),
    )


def dattri_trak(problem: Problem, k: int) -> Attribution:
    """Dattri's TRAK, with its Gaussian projection."""
    _require("dattri")
    from _methods import Attribution
    from dattri.algorithm.trak import TRAKAttributor
    from dattri.func.projection import random_project

    if problem.wanted != "scores":
        raise MissingError("dattri's TRAK has no self-influence")
    task, target = _dattri_task(problem, of_output=True)
    loaders = _loaders(problem.setting, 250)
    p = sum(parameter.numel() for parameter in problem.models[0].parameters())
    grads = task.get_grad_loss_func(in_dims=(None, 0))(
        task.get_param(0)[0], tuple(part[:64] for part in problem.setting.train)
    )
    projection = {
        "proj_dim": k,
        "proj_seed": problem.seed,
        "proj_max_batch_size": 32,
        "device": problem.device,
        "proj_type": "normal",
    }
    found = Attribution()
    with _quiet():
        few = random_project(grads.detach() / p**0.5, len(grads), **projection)
        unit = float(few(grads.detach() / p**0.5, ensemble_id=0).square().sum(1).mean())
        for damping in DATTRI_GRID:
            attributor = TRAKAttributor(
                task,
                lambda params, data: torch.sigmoid(target(params, data)),
                projection,
                device=problem.device,
                regularization=damping * unit,
            )
            with Measured() as measured:
                attributor.cache(loaders[0])
                scores = attributor.attribute(loaders[1])
            found.values[damping] = scores.detach().double().cpu().numpy()
            found.seconds, found.megabytes = measured.seconds, measured.megabytes
    return found


# Settings on which the Hessian's products, batches of 250, were ended by a machine with 24 GB.
_OVER_20_GB = ("lm",)


def dattri_arnoldi(problem: Problem, k: int) -> Attribution:
    """Dattri's influence function by Arnoldi iteration on the Hessian of the loss."""
    _require("dattri")
    from _methods import Attribution
    from dattri.algorithm.influence_function import IFAttributorArnoldi

    if problem.wanted != "scores":
        raise MissingError("dattri's influence function would need a run for each training sample")
    if problem.setting.name in _OVER_20_GB:
        raise MissingError("dattri's influence function takes more than 20 GB on this model")
    task, _ = _dattri_task(problem, of_output=False)
    loaders = _loaders(problem.setting, 250)
    found = Attribution()
    with _quiet():
        for damping in ARNOLDI_GRID:
            with Measured() as measured:
                attributor = IFAttributorArnoldi(
                    task,
                    device=problem.device,
                    precompute_data_ratio=0.25,
                    proj_dim=_KRYLOV // 2,
                    max_iter=_KRYLOV,
                    regularization=damping,
                    seed=problem.seed,
                )
                attributor.cache(loaders[0])
                scores = attributor.attribute(*loaders).detach().double().cpu().numpy()
            if not np.isfinite(scores).all():
                continue  # a negative eigenvalue was among the larger half
            # A gradient of the loss times one of the output: a sample that lowers the loss along
            # it raises the output.
            found.values[damping] = -scores
            found.seconds, found.megabytes = measured.seconds, measured.megabytes
    if not found.values:
        raise MissingError("its scores are not finite at any damping")
    return found


def ekfac(problem: Problem, k: int) -> Attribution:
    """Kronfluence's EK-FAC, on the layers that it tracks (linear and convolution)."""
    _require("kronfluence")
    import copy

    from _methods import Attribution
    from kronfluence.analyzer import Analyzer, prepare_model
    from kronfluence.arguments import FactorArguments, ScoreArguments
    from kronfluence.task import Task

    setting = problem.setting

    class Measure(Task):
        """The setting in kronfluence's terms."""

        def compute_train_loss(self, batch: Any, model: nn.Module, sample: bool = False) -> Tensor:
            logits, labels = setting.predict(model, batch)
            if sample:
                with torch.no_grad():
                    drawn = torch.distributions.Categorical(logits=logits.detach()).sample()
                labels = drawn
            losses = nn.functional.cross_entropy(logits.movedim(-1, 1), labels, reduction="none")
            return (losses.flatten(1).mean(1) if losses.ndim > 1 else losses).sum()

        def compute_measurement(self, batch: Any, model: nn.Module) -> Tensor:
            return setting.output(model, batch).sum()

    if isinstance(setting.task, CausalLMOutput):
        raise MissingError("GPT-NeoX's heads call layers in a way that kronfluence does not track")
    train, targets = TensorDataset(*setting.train), TensorDataset(*setting.targets)
    found = Attribution()
    total: dict[float | str, Any] = {}
    for model in problem.models:
        with tempfile.TemporaryDirectory() as folder, _quiet():
            task = Measure()
            torch.manual_seed(problem.seed)
            analyzer = Analyzer(
                "study",
                prepare_model(copy.deepcopy(model), task),
                task,
                cpu=problem.device == "cpu",
                disable_tqdm=True,
                output_dir=folder,
            )
            with Measured() as measured:
                analyzer.fit_all_factors(
                    "ekfac",
                    train,
                    per_device_batch_size=problem.batch_size,
                    factor_args=FactorArguments("ekfac"),
                )
            factors = measured.seconds
            lambdas = analyzer.load_all_factors("ekfac")["lambda_matrix"].values()
            counts = analyzer.load_all_factors("ekfac")["num_lambda_processed"].values()
            parts = [total_ / c for total_, c in zip(lambdas, counts, strict=True)]
            unit = float(sum(part.sum() for part in parts) / sum(part.numel() for part in parts))
            for number, damping in enumerate(EKFAC_GRID):
                arguments = ScoreArguments(
                    damping_factor=None if damping == "heuristic" else damping * unit
                )
                with Measured() as measured:
                    if problem.wanted == "scores":
                        analyzer.compute_pairwise_scores(
                            f"scores{number}",
                            "ekfac",
                            targets,
                            train,
                            per_device_query_batch_size=len(targets),
                            per_device_train_batch_size=problem.batch_size,
                            score_args=arguments,
                        )
                        scores = analyzer.load_pairwise_scores(f"scores{number}")["all_modules"].T
                    else:
                        analyzer.compute_self_scores(
                            f"scores{number}",
                            "ekfac",
                            train,
                            per_device_train_batch_size=problem.batch_size,
                            score_args=arguments,
                        )
                        scores = analyzer.load_self_scores(f"scores{number}")["all_modules"]
                if number == 0:
                    found.seconds += factors + measured.seconds
                    found.megabytes = max(found.megabytes or 0.0, measured.megabytes or 0.0)
                sign = -1 if problem.wanted == "scores" else 1
                total[damping] = total.get(damping, 0.0) + sign * scores.double().numpy()
    found.values = total
    return found
