"""`FactoredGradientComputer`: per-sample gradients as factors, never formed."""

from __future__ import annotations

import copy
import dataclasses
import functools
import logging
import math
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from trak.modelout_functions import AbstractModelOutput

from trak_dropout.gradients.alone import TOLERANCE, Alone, Entries, Single, least_precise
from trak_dropout.gradients.aside import run_aside
from trak_dropout.gradients.dense import BatchError, DenseGradientComputer, check_batch, refused
from trak_dropout.gradients.factors import (
    DEFAULT_BUDGET,
    Factor,
    FactoredGradient,
    FactoredGradients,
    Formed,
)
from trak_dropout.gradients.intake import Intake, Shares
from trak_dropout.gradients.rules import rule_of
from trak_dropout.gradients.taps import (
    FactorError,
    NoWayError,
    OutsideReads,
    Physical,
    Place,
    Recorder,
    Site,
    leaves_of,
    place_of,
    tapped,
    to_front,
)
from trak_dropout.outputs import batch_output_of, out_to_loss_of

_LOG = logging.getLogger(__name__)
_FEW = 2  # samples on which ways are found where factors are not to be held


class FactoredGradientComputer(DenseGradientComputer):
    """Per-sample gradients as factors: neither they nor weight gradients are ever formed.

    Runs the model on the batch and back, without weight gradients, and keeps what each layer was
    given and the gradient of what it returned. `DropoutProjector` computes the kept coordinates
    from these; read by anything else, the result is the mapping of per-sample gradients.

    Each parameter goes one of these ways, which `describe` tells:

    - a rule (see `rule`) of the layer that it belongs to;
    - in a batched run, a small layer without a rule is run again by itself, under ``vmap``;
    - everything else, such as parameters outside of layers or weights that other modules read
      directly, gets exact per-sample gradients, formed for just these parameters.

    A task with a method ``get_batch_output(model, weights, buffers, *batch) -> (B,)``, such as
    `LossOutput`, is run on whole batches, so that attention kernels and autocast work as in
    training, and so are TRAK's image and text classification; any other task, and a model whose
    samples do not stay apart that way, runs ``get_output`` under ``torch.func.vmap``.

    Args:
        model: the model. Batch normalization must be in evaluation mode.
        task: the model output function.
        grad_dim: number of gradient coordinates; kept for TRAK's interface.
        dtype: TRAK's storage type; gradients keep the parameters' own.
        device: kept for TRAK's interface; gradients lie where the parameters do.
        grad_wrt: names of the parameters to take gradients of; all when None. Nothing is computed
            for the others, and nothing flows back further than needed.
        self_check: compare some coordinates of two samples with autograd, and see that the samples
            of a batch stay apart: on the first batch, on the first with samples of another shape or
            with other weights (in `compute_into` by a single sample then), and on the second,
            fourth, eighth ... batch of each shape. What a model does otherwise on the batches
            between these only, such as reading a weight past its layer, is not seen.
        exact: names of parameters to be formed exactly whatever rules there are.
        batched: whether to run whole batches where the task allows it.
        budget: bytes that taking coordinates may use for intermediate values at a time.

    Raises:
        TypeError: the task is one for TRAK's ``IterativeGradientComputer``.
        ValueError: ``exact`` names a parameter that the model does not have.
    """

    def __init__(
        self,
        model: nn.Module,
        task: AbstractModelOutput,
        grad_dim: int | None = None,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
        grad_wrt: Iterable[str] | None = None,
        *,
        self_check: bool = True,
        exact: Iterable[str] = (),
        batched: bool = True,
        budget: int = DEFAULT_BUDGET,
    ) -> None:
        super().__init__(model, task, grad_dim, dtype, device, grad_wrt)
        unknown = sorted(set(exact) - dict(model.named_parameters()).keys())
        if unknown:
            raise ValueError(f"exact names {', '.join(unknown)}, which the model does not have")
        self.self_check = self_check
        self.budget = budget
        self.batched = batched
        self._asked = frozenset(exact)
        self._plan: _Plan | None = None
        self._plans: dict[Any, _Plan] = {}
        # The batch whose gradients were computed last, as it was given and as it was run.
        self._given: Any = None
        self._batch: Any = None
        self._outputs: Tensor | None = None

    def compute_per_sample_grad(self, batch: Sequence[Tensor]) -> FactoredGradients:
        """Compute the gradient of the task's output for each sample, as factors.

        Args:
            batch: tensors with one first dimension ``B``, as many as the task takes.

        Returns:
            Parameter name to gradients ``(B, *parameter.shape)``, in ``named_parameters()``
            order, of the parameters' dtypes; formed only if read.

        Raises:
            BatchError: the task cannot take the batch.
            FactorError: the model is in a state or does something for which factors do not give
                its gradients, such as batch normalization in training mode, or they differ from
                autograd's.
        """
        samples = check_batch(self.modelout_fn, batch)
        self._refuse_training_statistics()
        self._given, self._outputs = batch, None
        batch = self._batch = [part.detach() for part in batch]
        try:
            with torch.enable_grad(), _for_gradients(self.model):
                if samples == 0:
                    return self._gathered({}, 0)
                key = self._key(batch)
                known = self._plans.get(key)
                if known is not None and self.self_check and not known.checked:
                    again = self._check_again(known, batch)
                    if again is not None:
                        self._plan = known
                        return again
                    known = None
                if known is None:
                    self._plan, grads = self._settle(batch)
                    self._plans[key] = self._plan
                    return grads
                self._plan = known
                grads = self._run(known, batch)[0]
                known.runs += 1
                if self.self_check and known.due:
                    self._check(known, batch, grads)
                return grads
        except NoWayError as error:
            self._form(error)
            return self.compute_per_sample_grad(batch)
        except (torch.OutOfMemoryError, FactorError, BatchError):
            raise
        except Exception as error:
            raise refused(self.modelout_fn, batch, error) from error

    def _form(self, error: NoWayError) -> None:
        """Form from now on what a layer that is used otherwise on a later batch leaves no way."""
        if not error.parameters - self._asked:
            raise error
        _LOG.warning("some gradients are formed from now on, which takes longer: %s", error)
        self._asked |= error.parameters
        self._plans, self._plan = {}, None

    def compute_into(self, batch: Sequence[Tensor], shares: Shares) -> Tensor:
        """Compute compressed gradients, taken as they flow back, so that no factors are held.

        The first samples of a batch serve to find the ways and to compare with autograd; whether
        samples stay apart is seen on whole batches, as by `compute_per_sample_grad`. For other
        weights a sample of the whole batch is compared with autograd of it alone.

        Args:
            batch: as for `compute_per_sample_grad`.
            shares: the mask, such as ``DropoutProjector.shares(model_id, device)``.

        Returns:
            ``(B, proj_dim)``, on the mask's scale; not checked for NaN and infinities.

        Raises:
            BatchError: the task cannot take the batch.
            FactorError: as for `compute_per_sample_grad`.
        """
        samples = check_batch(self.modelout_fn, batch)
        if samples <= _FEW:
            return _taken(self.compute_per_sample_grad(batch), shares, samples)
        key = self._key(batch)
        fresh = key not in self._plans
        if fresh:
            self.compute_per_sample_grad([part[:_FEW] for part in batch])
        known = self._plans[key]
        other = self.self_check and not known.checked  # what held for other weights may not now
        self._refuse_training_statistics()
        if not fresh:
            known.runs += 1
        due = self.self_check and known.due
        self._given, self._outputs = batch, None
        self._batch = [part.detach() for part in batch]
        try:
            with torch.enable_grad(), _for_gradients(self.model):
                look = other or (due and not fresh)
                alone = self._alone(known, self._batch, _some(known, samples)) if look else None
                rows, exact = self._streamed(known, self._batch, shares, alone=alone)
                if due and known.batched and (fresh or not other):
                    self._check_weighted(known, self._batch, shares, rows)
                if alone is not None:
                    known.checked |= self._agree(known, self._batch, alone)
                return self._with_formed(rows, exact, shares)
        except torch.OutOfMemoryError:
            raise
        except NoWayError as error:
            self._form(error)
            return self.compute_into(batch, shares)
        except FactorError as error:
            if not fresh and not other:
                raise
            # What holds for other weights, or for a few samples, does not here: found out anew.
            _LOG.info("ways are found anew: %s", error)
            del self._plans[key]
            if not fresh:
                return self.compute_into(batch, shares)
            return _taken(self.compute_per_sample_grad(batch), shares, samples)
        except Exception as error:
            raise refused(self.modelout_fn, batch, error) from error

    def compute_loss_grad(self, batch: Sequence[Tensor]) -> Tensor:
        """Compute the gradient of the loss with respect to the output, for each sample.

        For the batch whose gradients were computed last, TRAK's classification tasks need no
        further forward pass: it is a function of the margin.

        Args:
            batch: as for `compute_per_sample_grad`.

        Returns:
            Tensor ``(B, 1)``.

        Raises:
            BatchError: the task cannot take the batch.
        """
        outputs, self._outputs = self._outputs, None
        known = out_to_loss_of(self.modelout_fn)
        if outputs is None or known is None or batch is not self._given:
            return super().compute_loss_grad(batch)
        return known(outputs).unsqueeze(1)

    def describe(self) -> str:
        """Tell which way each parameter goes and what it holds, as a table.

        Returns:
            A line for each parameter. Before the first batch it is what the layers' types suggest;
            what else the model does with a parameter is found out then.
        """
        plan = self._plan or self._first_plan(self._can_batch())
        kinds: dict[str, list[str]] = {name: [] for name in self._wanted()}
        for site in plan.sites:
            again = " run again" if site.again else ""
            for name in site.parameters.values():
                kinds[name].append(type(site.module).__name__ + again)
        ways = {
            name: f"rule of {found[0]}" if len(found) == 1 and "run again" not in found[0]
            else f"rules of {', '.join(sorted(found))}" if len(found) > 1
            else found[0] if found else "exact: formed for each sample"
            for name, found in kinds.items()
        }  # fmt: skip
        lines = [f"{'parameter':40} {'shape':>18}  {'way':30} {'bytes per sample':>16}"]
        for name, parameter in self._wanted().items():
            held = plan.bytes.get(name)
            if held is None and name in plan.exact:
                held = parameter.numel() * parameter.element_size()
            lines.append(
                f"{name:40} {tuple(parameter.shape)!s:>18}  {ways[name]:30} "
                f"{'' if held is None else f'{held:,.0f}':>16}"
            )
        run = (
            "run as one forward on the whole batch" if plan.batched else "run one sample under vmap"
        )
        if plan.batched and plan.exact:
            run += ", then each sample by itself for the exact ones"
        lines.append(run + ("" if self._plan else " (before the first batch)"))
        return "\n".join(lines)

    def bytes_per_sample(self, batch: Sequence[Tensor]) -> float:
        """Return the size of a sample and of what a model's layers return for it, in bytes.

        It bounds what a larger batch takes, also where gradients of a few layers are asked for.

        Args:
            batch: a batch whose gradients were computed last.

        Returns:
            The size; infinite where it is unknown, or samples are run by themselves.
        """
        plan = self._plan
        if plan is None or not plan.batched or plan.exact:
            return math.inf
        some = [part[:_FEW] for part in batch]
        found = sum(part.nbytes for part in some)

        def count(_: nn.Module, __: Any, output: Any) -> None:
            nonlocal found
            found += sum(value.nbytes for value in tree_leaves(output) if isinstance(value, Tensor))

        handles = []
        try:
            for module in self.model.modules():
                handles.append(module.register_forward_hook(count))
            with torch.enable_grad(), _for_gradients(self.model):
                self._batch_output(some)
        except Exception as error:  # of what a hook cannot be put on or see through
            _LOG.info("unknown what a sample takes: %s", error)
            return math.inf
        finally:
            for handle in handles:
                handle.remove()
        return found / len(some[0])

    @staticmethod
    def _key(batch: Sequence[Tensor]) -> Any:
        """What batches that go the same ways have in common."""
        # A model may use its layers otherwise for samples of another shape, and a single sample
        # does not tell where its batch dimension is.
        return (len(batch[0]) > 1, *((part.shape[1:], part.dtype) for part in batch))

    def _wanted(self) -> dict[str, Tensor]:
        """Parameters that gradients are taken of, in order."""
        return {
            name: weight
            for name, weight in self.func_weights.items()
            if self.grad_wrt is None or name in self.grad_wrt
        }

    def _refuse_training_statistics(self) -> None:
        for name, module in self.model.named_modules():
            statistics = isinstance(module, nn.modules.batchnorm._BatchNorm)
            if statistics and (module.training or module.running_mean is None):
                raise FactorError(
                    f"{name or 'the model'} is a {type(module).__name__} that normalizes with the "
                    "statistics of the batch, so no sample has a gradient of its own; call "
                    "model.eval() (and do not set track_running_stats=False)"
                )

    # Which way each parameter goes

    def _first_plan(self, batched: bool, exact: Iterable[str] = ()) -> _Plan:
        """Choose ways by what the layers are."""
        names = {id(weight): name for name, weight in self.model.named_parameters()}
        wanted = self._wanted().keys() - self._asked - set(exact)
        sites: list[Site] = []
        for path, module in self.model.named_modules(remove_duplicate=True):
            own = {
                local: names[id(weight)]
                for local, weight in module.named_parameters(recurse=False, remove_duplicate=False)
                if names.get(id(weight)) in wanted
            }
            known = rule_of(module)
            if known is not None:
                own = {local: name for local, name in own.items() if local in known.parameters}
                function = known.function
            else:
                # A layer of its own that holds nothing else can be run again by itself.
                alone = batched and not isinstance(module, nn.RNNBase)
                own = own if alone and next(module.children(), None) is None else {}
                function = _run_again
            if own:
                sites.append(Site(path, module, function, own, function is _run_again))
        # A parameter that one of its modules has no way for is formed as a whole.
        covered = {name for site in sites for name in site.parameters.values()}
        for module in self.model.modules():
            for local, weight in module.named_parameters(recurse=False, remove_duplicate=False):
                by_site = any(s.module is module and local in s.parameters for s in sites)
                if not by_site:
                    covered.discard(names.get(id(weight), ""))
        sites = [_restricted(site, covered) for site in sites]
        formed = [name for name in self._wanted() if name not in covered]
        return _Plan(batched, [site for site in sites if site.parameters], formed)

    def _can_batch(self) -> bool:
        return self.batched and batch_output_of(self.modelout_fn) is not None

    def _settle(self, batch: Sequence[Tensor]) -> tuple[_Plan, FactoredGradients]:
        """Find out on a batch which ways hold, run it, and check it."""
        failure: Exception | None = None
        for batched in (True, False) if self._can_batch() else (False,):
            try:
                plan, grads = self._find_ways(batch, batched)
                if self.self_check:
                    self._check(plan, batch, grads)
            except torch.OutOfMemoryError:
                raise
            except Exception as error:
                failure = failure or error
                continue
            if failure is not None:
                _LOG.warning("running the model on one sample at a time, because %s", failure)
            return plan, grads
        assert failure is not None
        if not self._can_batch() and not isinstance(failure, FactorError):
            self._explain(batch, failure)
        raise failure

    def _explain(self, batch: Sequence[Tensor], failure: Exception) -> None:
        """Say so where nothing but ``vmap`` is in the way.

        Raises:
            BatchError: a sample runs by itself.
        """
        try:
            self._autograd([part[0] for part in batch], list(self._wanted()))
        except Exception:
            return
        raise BatchError(
            f"{refused(self.modelout_fn, batch, failure)}. A sample runs by itself, but not under "
            "torch.func.vmap: give the task a method get_batch_output(model, weights, buffers, "
            "*batch) -> (B,), as trak_dropout.LossOutput has, and leave batched=True, so that "
            "whole batches are run"
        ) from failure

    def _check_again(self, plan: _Plan, batch: Sequence[Tensor]) -> FactoredGradients | None:
        """Run a batch as for earlier weights, and check it; None where that does not hold now."""
        try:
            grads, plan.lowest = self._run(plan, batch)
            self._check(plan, batch, grads)
        except FactorError as error:
            _LOG.info("with other weights, ways are found anew: %s", error)
            return None
        plan.runs += 1
        return grads

    def _find_ways(self, batch: Sequence[Tensor], batched: bool) -> tuple[_Plan, FactoredGradients]:
        """Find out which way each parameter can go, and run the batch that way."""
        exact: set[str] = set()
        while True:
            plan = self._first_plan(batched, exact)
            if batched and plan.exact:
                # Formed along the way where a sample can run under vmap; where it cannot, at the
                # cost of a run of each sample by itself.
                try:
                    return self._find_ways(batch, False)
                except torch.OutOfMemoryError:
                    raise
                except Exception as error:
                    _LOG.info("a sample does not run under vmap: %s", error)
            reads = OutsideReads(self._weights, plan.sites)
            try:
                if batched and (unbatched := self._find_batch(plan, batch)):
                    exact |= unbatched
                    continue
                with reads.watching():
                    grads, plan.lowest = self._run(plan, batch)
            except NoWayError as error:
                exact |= error.parameters
                continue
            if reads.found:
                exact |= reads.found
                continue
            held = grads.factored.items()
            plan.bytes = {name: gradient.nbytes / len(gradient) for name, gradient in held}
            return plan, grads

    def _find_batch(self, plan: _Plan, batch: Sequence[Tensor]) -> set[str]:
        """Find where each layer's tensors hold the batch, from runs of two and of three samples.

        Returns:
            Names of parameters of layers that work on no batch, and must not.
        """
        shapes = []
        for count in (2, 3):
            rows = torch.arange(count, device=batch[0].device) % len(batch[0])
            calls: list[tuple[Site, list[torch.Size]]] = []

            def handler(
                site: Site, inputs: list[Tensor], output: Tensor, calls: Any = calls
            ) -> Tensor:
                calls.append((site, [value.shape for value in (output, *inputs)]))
                return output.detach().requires_grad_().clone()

            with tapped(plan.sites, handler):
                self._batch_output([part[rows] for part in batch])
            shapes.append(calls)
        two, three = shapes
        calls_of = [Counter(site.name for site, _ in calls) for calls in shapes]
        routed = {
            name
            for site in plan.sites
            if calls_of[0][site.name] != calls_of[1][site.name]
            for name in site.parameters.values()
        }
        if routed:  # by content, as in a mixture of experts
            return routed
        if [site for site, _ in two] != [site for site, _ in three]:
            raise FactorError(
                "the model calls its layers in another order for other samples; name their "
                "parameters in FactoredGradientComputer's exact=, or leave them out of grad_wrt"
            )
        for (site, first), (_, second) in zip(two, three, strict=True):
            try:
                places = [place_of(a, b) for a, b in zip(first, second, strict=True)]
            except FactorError:  # it gets some of the samples, or some of their positions
                routed |= set(site.parameters.values())
            else:
                plan.places.append((site, places))
        if routed:
            return routed
        plan.leads = [bool(first[0]) and first[0][0] == 1 for _, first in two]
        if all(places[0] is not None for _, places in plan.places):
            return set()
        try:  # a layer whose output has no batch dimension gets one, if the model takes it
            twice = [part[:2].expand(2, *part.shape[1:]) for part in batch]
            self._run_batched(plan, twice, Recorder(list(self._wanted())))
        except Exception:
            return {
                name
                for site, places in plan.places
                if places[0] is None
                for name in site.parameters.values()
            }
        return set()

    # Running the model

    def load_model_params(self, model: nn.Module) -> None:
        """Take up the model's parameters and buffers, which may be other tensors than before."""
        if model is not self.model:
            self.model: nn.Module = model
            self._plans, self._plan = {}, None
        super().load_model_params(model)
        for plan in getattr(self, "_plans", {}).values():
            plan.checked = False
        self._outputs = None
        self._weights = {name: weight.detach() for name, weight in self.func_weights.items()}

    def _output_of(self, held: dict[str, Any]) -> Callable[..., Tensor]:
        """The task's output as a function of some weights and a sample."""
        task, weights = self.modelout_fn, self._weights

        def output(varied: dict[str, Tensor], *sample: Tensor) -> Tensor:
            held["anchor"] = sample[0]
            value: Tensor = task.get_output(
                self.model, {**weights, **varied}, self.func_buffers, *sample
            )
            return value

        return output

    def _batch_output(
        self, batch: Sequence[Tensor], weights: dict[str, Tensor] | None = None
    ) -> Tensor:
        output = batch_output_of(self.modelout_fn)
        assert output is not None
        weights = self._weights if weights is None else weights
        values = output(self.model, weights, self.func_buffers, *batch)
        if values.shape != batch[0].shape[:1]:
            raise FactorError(
                f"get_batch_output of {type(self.modelout_fn).__name__} returned shape "
                f"{tuple(values.shape)} for {len(batch[0])} samples, expected one value for each"
            )
        return values

    def _run(self, plan: _Plan, batch: Sequence[Tensor]) -> tuple[FactoredGradients, torch.dtype]:
        """Run forward and back."""
        recorder = Recorder(list(self._wanted()))
        exact = (self._run_batched if plan.batched else self._run_mapped)(plan, batch, recorder)
        factors = recorder.factors
        factors.update({name: [Formed(grad)] for name, grad in exact.items()})
        return self._gathered(factors, len(batch[0])), recorder.lowest

    def _with_formed(self, rows: Tensor, exact: Mapping[str, Tensor], shares: Shares) -> Tensor:
        """Add the shares of gradients that are formed."""
        if exact:
            samples, wanted = len(rows), self._wanted()
            formed = Intake(shares, samples)
            for name, grad in exact.items():
                formed.add(name, FactoredGradient([Formed(grad)], samples, wanted[name]))
            rows += formed.finish()
        return rows

    def _streamed(
        self,
        plan: _Plan,
        batch: Sequence[Tensor],
        shares: Shares,
        weights: Tensor | None = None,
        alone: Alone | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Compressed gradients without those formed, and these; ``alone`` sees what is found."""
        samples, wanted = len(batch[0]), self._wanted()
        intake = Intake(shares, samples)

        def take(name: str, factor: Factor) -> None:
            gradient = FactoredGradient([factor], samples, wanted[name], self.budget)
            intake.add(name, gradient)
            if alone is not None and name not in plan.exact:
                alone.see(name, gradient)

        recorder = Recorder(list(wanted), take)
        if plan.batched:
            exact = self._run_batched(plan, batch, recorder, weights)
        else:
            exact = self._run_mapped(plan, batch, recorder)
        return intake.finish(), exact

    def _run_mapped(
        self, plan: _Plan, batch: Sequence[Tensor], recorder: Recorder
    ) -> dict[str, Tensor]:
        """One sample's function under vmap; what is exact goes in once for each sample."""
        held: dict[str, Any] = {}

        def handler(site: Site, inputs: list[Tensor], output: Tensor) -> Tensor:
            def catch(inputs: list[Tensor], output: Tensor) -> Tensor:
                return recorder.catch(site, inputs, output, lambda gradient: gradient)

            return Physical.apply(catch, held["anchor"], output, *inputs)  # type: ignore[no-untyped-call]

        weights = self._weights
        exact = {
            name: weights[name].expand(len(batch[0]), *weights[name].shape).requires_grad_()
            for name in plan.exact
        }
        mapped = torch.func.vmap(self._output_of(held), randomness="different")
        with tapped(plan.sites, handler):
            output = mapped(exact, *batch)
            if output.numel() != len(batch[0]):
                raise FactorError(
                    f"get_output of {type(self.modelout_fn).__name__} returned shape "
                    f"{tuple(output.shape[1:])} for a sample, expected one value"
                )
            recorder.recording = False
            grads = _backward(output, [*exact.values(), *recorder.leaves])
        return dict(zip(exact, grads, strict=False))

    def _run_batched(
        self,
        plan: _Plan,
        batch: Sequence[Tensor],
        recorder: Recorder,
        weights: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """The model's own forward on the batch; what is exact by one run for each sample.

        With weights, every sample's output is multiplied by its own, and nothing is formed.
        """
        samples = len(batch[0])
        calls = iter(zip(plan.places, plan.leads, strict=True))

        def handler(site: Site, inputs: list[Tensor], output: Tensor) -> Tensor:
            if not recorder.recording:
                return output if output.requires_grad else recorder.catch(site, [], output, None)
            (expected, places), leads = next(calls, ((None, []), False))
            if expected is not site or len(places) != 1 + len(inputs):
                raise NoWayError(site, "is called at another point than for the first batch")
            place = places[0]
            if place is None and leads and output.shape[0] != 1:
                raise NoWayError(site, "is used otherwise now: it works on a batch")
            if place is None:  # give it a batch dimension, so that each sample has its gradient
                if leads:
                    output, place = output.expand(samples, *output.shape[1:]), (0, 1)
                else:
                    output = output.unsqueeze(0).expand(samples, *output.shape)
            try:
                given = [to_front(x, p, samples) for x, p in zip(inputs, places[1:], strict=True)]
                if place is not None:
                    to_front(output.detach(), place, samples)
            except FactorError as error:
                raise NoWayError(site, f"is used otherwise now: {error}") from error

            def front(gradient: Tensor) -> Tensor:
                return gradient if place is None else to_front(gradient, place, samples)

            return recorder.catch(site, given, output, front)

        with tapped(plan.sites, handler):
            output = self._batch_output(batch)
            recorder.recording = False
            if batch is self._batch and weights is None:
                self._outputs = output.detach()
            output = output if weights is None else output * weights.to(output)
            # Where inputs ask for gradients (Hugging Face's enable_input_require_grads), layers
            # behind them have no leaf of ours.
            # A copy of the recorder's list: a checkpoint may add some meanwhile.
            leaves = leaves_of(output) if recorder.foreign else list(recorder.leaves)
            _backward(output, leaves)
        if not plan.exact or weights is not None:
            return {}
        rows = [self._autograd([part[i] for part in batch], plan.exact) for i in range(samples)]
        return {name: torch.stack([row[name] for row in rows]) for name in plan.exact}

    def _autograd(self, sample: Sequence[Tensor], names: Sequence[str]) -> dict[str, Tensor]:
        """Gradients of one sample by plain autograd."""
        weights = dict(self._weights)
        varied = {name: weights[name].detach().requires_grad_() for name in names}
        with _for_gradients(self.model, names):
            output = self.modelout_fn.get_output(
                self.model, {**weights, **varied}, self.func_buffers, *sample
            )
            return dict(zip(names, _backward(output, list(varied.values())), strict=True))

    def _gathered(self, factors: Mapping[str, list[Factor]], samples: int) -> FactoredGradients:
        return FactoredGradients(
            {
                name: FactoredGradient(factors.get(name, []), samples, weight, self.budget)
                for name, weight in self._wanted().items()
            }
        )

    # The self-check

    def _check_apart(
        self, plan: _Plan, batch: Sequence[Tensor], grads: FactoredGradients, overall: float
    ) -> None:
        """See whether each sample's factors depend on its own output alone.

        Each output is multiplied by a weight of its own: so must be the sample's gradients, and
        what layers were given must stay as it was.
        """
        count = len(batch[0])
        weights = _weights_of(count, batch[0].device)
        recorder = Recorder(list(self._wanted()))
        self._run_batched(plan, batch, recorder, weights)
        tolerance = TOLERANCE[least_precise([plan.lowest, torch.float32])]
        # Formed gradients that cancel, such as those of the bias of attention's keys or of a
        # convolution before instance normalization, are noise beside the whole gradient.
        noise = 1e-3 * overall
        for name, factors in recorder.factors.items():
            if name in plan.exact:
                continue
            for factor, other in zip(grads.factored[name].factors, factors, strict=True):
                for part, again in zip(factor.parts, other.parts, strict=True):
                    scale = weights.view(-1, *[1] * (part.ndim - 1)).to(part)
                    bound = tolerance * float(part.abs().max()) if part.numel() else 0.0
                    bound += tolerance * noise if isinstance(factor, Formed) else 0.0
                    if not math.isfinite(bound):
                        continue  # the projector names samples with such gradients
                    errors = (float((again - part * by).abs().max()) for by in (1, scale))
                    if part.numel() and not min(errors) <= bound:
                        raise FactorError(
                            f"the samples of a batch do not stay apart where {name} is used: the "
                            "output of one depends on others, or they change places on the way. "
                            "FactoredGradientComputer runs one at a time with batched=False, and "
                            f"forms this gradient without a rule with exact=[{name!r}]; or leave "
                            f"{name} out of grad_wrt{_before(plan)}"
                        )

    def _check_weighted(
        self, plan: _Plan, batch: Sequence[Tensor], shares: Shares, rows: Tensor
    ) -> None:
        """`_check_apart` for compressed gradients."""
        weights = _weights_of(len(rows), rows.device)
        found, _ = self._streamed(plan, batch, shares, weights)
        if _differ(plan, found, rows * weights.unsqueeze(1).to(rows)):
            raise FactorError(
                "the samples of a batch do not stay apart: the output of one depends on "
                "others, or they change places on the way. FactoredGradientComputer runs one at a "
                f"time with batched=False{_before(plan)}"
            )

    def _check(self, plan: _Plan, batch: Sequence[Tensor], grads: FactoredGradients) -> None:
        """Compare the first and the last sample with plain autograd, and see if all stay apart."""
        alone = self._alone(plan, batch, sorted({0, len(batch[0]) - 1}))
        if plan.batched and len(batch[0]) > 1:
            self._check_apart(plan, batch, grads, alone.overall)
        for name, gradient in grads.factored.items():
            if name not in plan.exact:
                alone.see(name, gradient)
        plan.checked |= self._agree(plan, batch, alone)

    def _alone(self, plan: _Plan, batch: Sequence[Tensor], which: Sequence[int]) -> Alone:
        """Run some samples by plain autograd, each by itself."""
        names = [name for name in self._wanted() if name not in plan.exact]
        samples = {}
        for i in which:
            found: dict[str, Entries] = {}

            def look(name: str, grad: Tensor, found: Any = found) -> None:
                found[name] = Entries.of(grad)

            sample = [part[i] for part in batch]
            output = self._each_gradient(
                lambda weights, sample=sample: self.modelout_fn.get_output(  # type: ignore[misc]
                    self.model, weights, self.func_buffers, *sample
                ),
                names,
                look,
            )
            samples[i] = Single(output, {name: found[name] for name in names if name in found})
        return Alone(samples, {name: self._weights[name].dtype for name in names})

    def _agree(self, plan: _Plan, batch: Sequence[Tensor], alone: Alone) -> bool:
        """Return whether what was found is what plain autograd says, and it says something."""

        def output_of(i: int, weights: dict[str, Tensor]) -> Tensor:
            if plan.batched:
                return self._batch_output(batch, weights)[i]
            mapped = torch.func.vmap(
                self._output_of({}), in_dims=(None, *[0] * len(batch)), randomness="different"
            )
            outputs: Tensor = mapped(weights, *batch)
            return outputs[i]

        def within(i: int, which: dict[str, Tensor]) -> tuple[float, dict[str, Tensor]]:
            found: dict[str, Tensor] = {}

            def look(name: str, grad: Tensor) -> None:
                found[name] = grad[which[name]].double()

            return self._each_gradient(functools.partial(output_of, i), list(which), look), found

        return alone.agrees(plan.lowest, within, _before(plan))

    def _each_gradient(
        self,
        output_of: Callable[[dict[str, Tensor]], Tensor],
        names: Sequence[str],
        look: Callable[[str, Tensor], None],
    ) -> float:
        """Have all gradients of an output, flattened, looked at; returns the output.

        Each is let go as it comes: all of them together are as large as the model.
        """
        varied = {
            name: self._weights[name].detach().requires_grad_()
            for name in names
            if self._weights[name].numel()
        }
        seen = set()

        def arrived(weight: Tensor, name: str) -> None:
            grad, weight.grad = weight.grad, None
            assert grad is not None
            seen.add(name)
            look(name, (grad.to_dense() if grad.is_sparse else grad).flatten())

        for name, weight in varied.items():
            weight.register_post_accumulate_grad_hook(functools.partial(arrived, name=name))
        with _for_gradients(self.model, varied):
            output = output_of({**self._weights, **varied})
            if varied and output.requires_grad:  # nothing but these gets a gradient
                output.sum().backward(inputs=list(varied.values()))  # type: ignore[no-untyped-call]
        for name in varied.keys() - seen:
            look(name, torch.zeros_like(varied[name]).flatten())
        return float(output.detach().sum())


class _Plan:
    """Which way each parameter goes.

    Args:
        batched: whether the model runs on whole batches.
        sites: the modules whose parameters' gradients are factors.
        exact: names of all other parameters.
    """

    def __init__(self, batched: bool, sites: list[Site], exact: list[str]) -> None:
        self.batched, self.sites, self.exact = batched, sites, exact
        self.places: list[tuple[Site, list[Place]]] = []
        self.bytes: dict[str, float] = {}
        self.leads: list[bool] = []
        self.lowest = torch.float64
        self.checked = False
        self.runs = 1

    @property
    def due(self) -> bool:
        """Whether this batch is the first, second, fourth, eighth ... one."""
        return self.runs & (self.runs - 1) == 0


def _run_again(module: nn.Module, inputs: Sequence[Tensor], gradient: Tensor) -> dict[str, Factor]:
    """Exact per-sample gradients of one layer's own parameters, by running just it again."""
    alone = copy.copy(module)
    alone._forward_hooks, alone._forward_pre_hooks = OrderedDict(), OrderedDict()
    weights = {name: weight.detach() for name, weight in module.named_parameters(recurse=False)}

    def product(weights: dict[str, Tensor], sample: list[Tensor], gradient: Tensor) -> Tensor:
        output: Tensor = torch.func.functional_call(alone, weights, tuple(sample))
        return (output * gradient).sum()

    with torch.enable_grad():
        try:
            grads = torch.func.vmap(torch.func.grad(product), in_dims=(None, 0, 0))(
                weights, list(inputs), gradient
            )
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            raise FactorError(f"it does not run by itself: {error}") from error
    return {name: Formed(grad.detach()) for name, grad in grads.items()}


def _restricted(site: Site, names: set[str]) -> Site:
    own = {local: name for local, name in site.parameters.items() if name in names}
    return dataclasses.replace(site, parameters=own)


@contextmanager
def _for_gradients(model: nn.Module, wanted: Iterable[str] = ()) -> Iterator[None]:
    """Let just some of a model's own parameters require gradients, and leave it as it was."""
    names = set(wanted)
    changed: list[Tensor] = []
    fused = torch.backends.mha.get_fastpath_enabled()
    for name, parameter in model.named_parameters():
        # Activation checkpoints run again with the model's own parameters.
        if parameter.requires_grad != (name in names):
            parameter.requires_grad_(name in names)
            changed.append(parameter)
    # Where no weight requires a gradient, attention layers take a path that has none.
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with run_aside():
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
        for weight in changed:
            weight.requires_grad_(not weight.requires_grad)


def _backward(output: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    """Gradients of the sum of outputs; zeros where one has no part in it."""
    if not inputs or not output.requires_grad:
        return [torch.zeros_like(value) for value in inputs]
    grads = torch.autograd.grad(output.sum(), inputs, allow_unused=True)
    return [
        torch.zeros_like(value) if grad is None else grad
        for value, grad in zip(inputs, grads, strict=True)
    ]


def _some(plan: _Plan, samples: int) -> list[int]:
    """One sample of a batch, or a few where the plan is due; others each time."""
    generator = torch.Generator().manual_seed(plan.runs)
    return torch.randperm(samples, generator=generator)[: _FEW if plan.due else 1].tolist()


def _weights_of(samples: int, device: torch.device) -> Tensor:
    """A weight of its own for each sample."""
    weights = torch.linspace(0.5, 1.5, samples, device=device)
    return weights[torch.randperm(samples, generator=torch.Generator().manual_seed(samples))]


def _differ(plan: _Plan, found: Tensor, expected: Tensor) -> bool:
    """Whether compressed gradients differ by more than rounding."""
    tolerance = TOLERANCE[least_precise([plan.lowest, torch.float32])]
    error, size = float((found - expected).abs().max()), float(expected.abs().max())
    # The projector names samples with gradients that are not finite.
    return math.isfinite(error) and not error <= tolerance * size


def _taken(grads: FactoredGradients, shares: Shares, samples: int) -> Tensor:
    """Compressed gradients of factors that are held."""
    intake = Intake(shares, samples)
    for name, gradient in grads.factored.items():
        intake.add(name, gradient)
    return intake.finish()


def _before(plan: _Plan) -> str:
    """What an error that shows on a later batch means for those before."""
    return ". Rows of batches before it may be wrong, too" if plan.runs > 1 else ""
