"""`LiveGradients`: compressed per-sample gradients taken from a training backward as it runs.

Nothing is computed twice: hooks on the live model see what each layer was given and the gradient of
what it returned, take the kept coordinates of the layer's weight gradient from these two, sample by
sample, and let both go. The training step itself is left as it is, to the bit.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from trak_dropout.gradients.alone import least_precise, rounding
from trak_dropout.gradients.aside import running_aside
from trak_dropout.gradients.factors import DEFAULT_BUDGET, FactoredGradient
from trak_dropout.gradients.intake import Intake, Shares
from trak_dropout.gradients.rules import rule_of
from trak_dropout.gradients.taps import FactorError, Place, Site, no_view, place_of, to_front

Reduction = Literal["mean", "sum"]

# Gradients may differ by this where losses do not, relative to the largest entry.
_AT_KINKS = 0.05
# How far sums over samples may lie from autograd's gradient, relative to the sum of magnitudes.
_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.05}


class NoRuleError(FactorError):
    """Parameters whose gradients cannot be taken from a training backward.

    Args:
        owners: the type of the module that holds each, or what else is in the way, by the
            parameter's name.
    """

    def __init__(self, owners: Mapping[str, str]) -> None:
        told = ", ".join(f"{name} ({owner})" for name, owner in owners.items())
        super().__init__(
            "the layers of these parameters have no rule, so their per-sample gradients "
            f"cannot be taken from the training backward: {told}. Leave them out by naming the "
            "others in grad_wrt, give their layer a rule (trak_dropout.gradients.rule), or "
            "collect at checkpoints"
        )
        self.parameters = list(owners)


@dataclass(frozen=True)
class Bare:
    """A tensor without a batch, unless this one or another `LiveGradients` has given it one.

    Args:
        ndim: number of its dimensions.
        room: the first dimension of one, which a batch can take; None where there is none, so that
            it goes in front.
    """

    ndim: int
    room: int | None

    def place(self, value: Tensor) -> Place:
        """Return the batch that such a tensor has been given, by a layer before or by others."""
        given = value.ndim > self.ndim if self.room is None else value.shape[self.room] > 1
        return (self.room or 0, 1) if given else None

    def expanded(self, value: Tensor, samples: int) -> Tensor:
        """Give such a tensor a batch."""
        room = self.room or 0
        value = value.unsqueeze(0) if self.room is None else value
        return value.expand(*value.shape[:room], samples, *value.shape[room + 1 :])


@dataclass(frozen=True)
class CallLayout:
    """Where a call of a layer has its samples.

    Args:
        output: the batch in what it returns.
        inputs: the batch in each tensor that it is given.
    """

    output: tuple[int, int] | Bare
    inputs: tuple[tuple[int, int] | Bare, ...]


Layouts = Mapping[str, Sequence[CallLayout]]
"""By the name of a module, the layout of each of its calls in a step."""


def covered_sites(model: nn.Module, names: Iterable[str]) -> list[Site]:
    """Find the modules whose rules cover parameters.

    Args:
        model: the model.
        names: parameters, as in ``named_parameters()``.

    Returns:
        The modules; one that shares a parameter with others stands beside them.

    Raises:
        NoRuleError: a module that holds one of the parameters has no rule for it.
    """
    sites, without = _look_for_rules(model, names)
    if without:
        raise NoRuleError(without)
    return sites


def _look_for_rules(model: nn.Module, names: Iterable[str]) -> tuple[list[Site], dict[str, str]]:
    """Modules with rules for parameters, and the types of those that have none."""
    wanted = set(names)
    known = {id(weight): name for name, weight in model.named_parameters()}
    sites: list[Site] = []
    without: dict[str, str] = {}
    for path, module in model.named_modules():
        own = {
            local: known[id(weight)]
            for local, weight in module.named_parameters(recurse=False, remove_duplicate=False)
            if known[id(weight)] in wanted
        }
        rule = rule_of(module) if own else None
        ruled = set(rule.parameters) if rule else set()
        without |= {name: type(module).__name__ for local, name in own.items()
                    if local not in ruled}  # fmt: skip
        if rule is not None:
            sites.append(Site(path, module, rule.function, own))
    return sites, {name: without[name] for name in known.values() if name in without}


def find_layouts(
    model: nn.Module, names: Iterable[str], run: Callable[[int], Tensor]
) -> dict[str, list[CallLayout]]:
    """Find where layers have their samples, from runs of two and of three samples.

    Args:
        model: the model; its gradients are lost.
        names: the parameters of interest.
        run: runs the model's training forward on so many samples; what it returns is followed
            back, because an activation checkpoint may call layers only then.

    Returns:
        The layouts, for `LiveGradients`.

    Raises:
        NoRuleError: as for `covered_sites`; or something else than its own layer reads a parameter.
        FactorError: the model calls other layers for other numbers of samples, or shapes do not
            tell where the samples are.
    """
    sites, without = _look_for_rules(model, names)
    weights = dict(model.named_parameters())
    seen: list[list[tuple[str, list[torch.Size]]]] = []
    for count in (2, 3):
        calls: list[tuple[str, list[torch.Size]]] = []

        def note(site: Site, given: list[Tensor], output: Tensor, calls: Any = calls) -> None:
            calls.append((site.name, [value.shape for value in (output, *given)]))

        handles = [_on_call(site, note) for site in sites]
        try:
            with torch.enable_grad():
                run(count).sum().backward()  # type: ignore[no-untyped-call]
            called = {name for name, _ in calls}
            without |= {
                name: f"read past its {type(site.module).__name__}"
                for site in sites
                for name in site.parameters.values()
                if site.name not in called and weights[name].grad is not None
            }
        finally:
            for handle in handles:
                handle.remove()
            model.zero_grad(set_to_none=True)
        seen.append(calls)
    if without:
        raise NoRuleError({name: without[name] for name in weights if name in without})
    two, three = seen
    if [name for name, _ in two] != [name for name, _ in three]:
        raise FactorError("the model calls other layers for two samples than for three")
    found: dict[str, list[CallLayout]] = {}
    for (name, first), (_, second) in zip(two, three, strict=True):
        output, *inputs = (
            place_of(a, b) or Bare(len(a), a.index(1) if 1 in a else None)
            for a, b in zip(first, second, strict=True)
        )
        found.setdefault(name, []).append(CallLayout(output, tuple(inputs)))
    return found


Handler = Callable[[Site, list[Tensor], Tensor], Tensor | None]


class _Hook:
    """Calls a handler wherever a site's module contributes to a gradient.

    A copy of the module, by pickle or in memory, has a hook that does nothing.
    """

    def __init__(self, site: Site, handler: Handler) -> None:
        self._site, self._handler = site, handler

    def __call__(
        self, _: nn.Module, args: Any, kwargs: dict[str, Any], output: Any
    ) -> Tensor | None:
        if running_aside() or not torch.is_grad_enabled():
            return None
        site = self._site
        if not isinstance(output, Tensor):
            raise FactorError(
                f"{site.name} returns a {type(output).__name__}, not a tensor; leave its "
                f"parameters out of grad_wrt ({', '.join(site.parameters.values())})"
            )
        if not output.requires_grad:
            return None
        given = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        return self._handler(site, given, output)

    def __reduce__(self) -> tuple[Any, ...]:
        # Takes whatever it is given and returns None, also where this package is not installed.
        return getattr, (nullcontext(), "__exit__")


def _on_call(site: Site, handler: Handler) -> RemovableHandle:
    """Have a handler called wherever a site's module contributes to a gradient."""
    # Before hooks of the user, which may change what the layer computed.
    return site.module.register_forward_hook(_Hook(site, handler), prepend=True, with_kwargs=True)


@dataclass
class _Step:
    """A batch under way."""

    samples: int
    intake: Intake
    checked: bool
    calls: Counter[str] = field(default_factory=Counter)
    scale: float | Tensor | None = None  # None until the backward begins
    lowest: torch.dtype = torch.float64
    # For the check, of each parameter: the sum over samples, that of magnitudes, and autograd's.
    sums: dict[str, Tensor] = field(default_factory=dict)
    sizes: dict[str, Tensor] = field(default_factory=dict)
    expected: dict[str, Tensor] = field(default_factory=dict)
    handles: list[RemovableHandle] = field(default_factory=list)


class LiveGradients:
    """Takes compressed per-sample gradients of the training loss from the training backward.

    What is taken is, for each sample, the part of the batch's gradient that comes through the
    sample's own inputs and output gradients at every layer: the gradient of the batch's loss with
    respect to a copy of the weights that only this sample uses. Over the samples of a batch it adds
    up to the gradient that training steps by. Where the loss is a mean or a sum of losses that each
    depend on one sample, it is the gradient of the sample's own loss. Where samples meet, as in
    batch normalization with the statistics of the batch, or in a contrastive loss, it contains
    what the sample does to the others' losses, too.

    Values, gradients and random states of the model are left as they are, to the bit. Layers that
    work on no batch, such as position embeddings, have their output expanded to one (where one
    follows another, gradients are added up over samples in another order). Modules that
    are called several times, shared weights and activation checkpoints are counted in full; an
    activation checkpoint saves less memory, because the inputs of layers are held.

    Example::

        live = LiveGradients(model, projector.shares(0, "cpu"), dict(model.named_parameters()))
        with live:
            for batch in loader:
                live.begin(len(batch[0]))
                loss = loss_fn(model(batch[0]), batch[1])
                live.expect()
                loss.backward()
                rows = live.end()  # (len(batch[0]), proj_dim)

    Args:
        model: the model that is trained.
        shares: the mask, such as ``DropoutProjector.shares(model_id, device)``.
        names: the parameters that the mask was drawn for.
        layouts: where layers have their samples, from `find_layouts`; None where it is the first
            dimension everywhere.
        reduction: whether the loss is the mean or the sum of the samples' losses.
        check: compare the sums over samples with the gradients that autograd computes, on the
            first batch and on the second, fourth, eighth, ... after it.
        budget: bytes that taking coordinates may use for intermediate values at a time.

    Raises:
        NoRuleError: a parameter belongs to a layer without a rule.
        ValueError: ``reduction`` is neither.
    """

    def __init__(
        self,
        model: nn.Module,
        shares: Shares,
        names: Iterable[str],
        *,
        layouts: Layouts | None = None,
        reduction: Reduction = "mean",
        check: bool = True,
        budget: int = DEFAULT_BUDGET,
    ) -> None:
        if reduction not in ("mean", "sum"):
            raise ValueError(f"reduction must be 'mean' or 'sum', got {reduction!r}")
        self._sites = covered_sites(model, names)
        self._weights = {
            name: weight
            for name, weight in model.named_parameters()
            if any(name in site.parameters.values() for site in self._sites)
        }
        self._shares, self._layouts, self._reduction = shares, layouts, reduction
        # Where all calls are alike, it does not matter which one this is.
        self._alike = {n: calls[0] for n, calls in (layouts or {}).items() if len(set(calls)) == 1}
        self._check, self._budget = check, budget
        self._handles: list[RemovableHandle] = []
        self._step: _Step | None = None
        self._steps = 0

    def __enter__(self) -> LiveGradients:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def shares(self) -> Shares:
        """The mask in use; may be replaced between batches."""
        return self._shares

    @shares.setter
    def shares(self, shares: Shares) -> None:
        self._drop()
        self._shares = shares
        if self._handles:
            self.stop()
            self.start()

    @property
    def lowest(self) -> torch.dtype:
        """The least precise type that was met in the batch under way."""
        return torch.float64 if self._step is None else self._step.lowest

    def start(self) -> None:
        """Put hooks on the layers of which a coordinate is kept."""
        if not self._handles:
            kept = self._shares.names
            self._handles = [
                _on_call(site, self._called)
                for site in self._sites
                if kept & set(site.parameters.values())
            ]

    def stop(self) -> None:
        """Take all hooks off the model, and forget a batch that is under way."""
        self._drop()
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _drop(self) -> None:
        if self._step is not None:
            for handle in self._step.handles:
                handle.remove()
            self._step = None

    def begin(self, samples: int) -> None:
        """Announce the forward of a batch; one that is under way is forgotten.

        Args:
            samples: number of samples in it.
        """
        self._drop()
        self._steps += 1
        checked = self._check and self._steps & (self._steps - 1) == 0
        self._step = _Step(samples, Intake(self._shares, samples), checked)

    def expect(self, scale: float | Tensor = 1.0) -> None:
        """Announce the backward of the batch; what flows back before is not taken.

        Args:
            scale: what the loss was multiplied by, such as an AMP loss scale over the number of
                batches whose gradients accumulate; a number, or a tensor with one.

        Raises:
            RuntimeError: no batch has begun, or this is its second backward.
        """
        step = self._step
        if step is None or step.scale is not None:
            raise RuntimeError(
                "expect() must be called once after begin(): "
                + ("no batch has begun" if step is None else "this is its second backward")
            )
        step.scale = scale
        if step.checked:
            for name in self._shares.names & self._weights.keys():
                if self._weights[name].requires_grad:
                    step.handles.append(self._watch(step, name))

    def end(self) -> Tensor:
        """Return what the backward gave.

        Returns:
            Compressed gradients of the samples' losses, ``(samples, proj_dim)``, on the mask's
            scale. Not checked for NaN and infinities.

        Raises:
            RuntimeError: no backward was announced.
            FactorError: the sums over samples are not the gradient that autograd computed, or no
                layer was seen in the first batch.
        """
        step = self._step
        if step is None or step.scale is None:
            raise RuntimeError("end() must be called after begin(), expect() and the backward")
        if step.checked:
            self._compare(step)
        elif self._steps == 1 and not step.calls and self._reached():
            raise FactorError(
                "none of the layers was seen to run in a batch, though its loss depends on them, "
                "as where a compiled function calls them; collect at checkpoints"
            )
        self._drop()
        factor = step.samples if self._reduction == "mean" else 1
        return step.intake.finish().mul_(factor / step.scale)

    def _reached(self) -> bool:
        """Whether a parameter of interest has a gradient."""
        return any(self._weights[name].grad is not None for name in self._shares.names)

    # What hooks do

    def _called(self, site: Site, given: list[Tensor], output: Tensor) -> Tensor | None:
        """Have the gradient of a layer's output brought here; returns what to go on with."""
        step = self._step
        if step is None:
            return None
        layout = self._layout(step, site, given, output)
        place = _place(layout.output, output)
        if isinstance(layout.output, Bare) and place is None:
            # A batch dimension, so that each sample has its gradient.
            result = layout.output.expanded(output, step.samples)
            place = layout.output.room or 0, 1
        else:
            result = no_view(site.module, output)
        held = [value.detach() for value in given]
        versions = [value._version for value in held]

        def arrived(gradient: Tensor) -> None:
            if step is not self._step or step.scale is None:
                return  # a gradient within the forward, such as a gradient penalty's
            if [value._version for value in held] != versions:
                raise FactorError(
                    f"what {site.name} was given has been changed in place since, so the gradients "
                    f"of {', '.join(site.parameters.values())} cannot be made from it; use "
                    "inplace=False there, or leave them out of grad_wrt"
                )
            inputs = [
                _to_front(value, _place(at, value), step.samples)
                for value, at in zip(held, layout.inputs, strict=True)
            ]
            held.clear()  # this hook lives as long as the graph
            self._take(step, site, inputs, _to_front(gradient, place, step.samples))

        result.register_hook(arrived)  # type: ignore[no-untyped-call]
        return None if result is output else result

    def _take(self, step: _Step, site: Site, inputs: list[Tensor], gradient: Tensor) -> None:
        """Add a layer's shares of the samples' gradients."""
        kept = self._shares.names
        with torch.no_grad():
            if step.checked:
                types = [x.dtype for x in (gradient, *inputs) if x.is_floating_point()]
                step.lowest = least_precise([step.lowest, *types])
            factors = site.function(site.module, inputs, gradient)
            for own, name in site.parameters.items():
                weight = self._weights[name]
                if name in kept and weight.requires_grad:
                    made = FactoredGradient([factors[own]], step.samples, weight, self._budget)
                    self._add(step, name, made)

    def _add(self, step: _Step, name: str, gradient: FactoredGradient) -> None:
        if not step.checked:
            step.intake.add(name, gradient)
            return
        share = torch.zeros_like(step.intake.rows)
        self._shares.add(share, name, gradient)
        step.intake.rows += share
        step.sums[name] = step.sums.get(name, 0) + share.sum(0)
        step.sizes[name] = step.sizes.get(name, 0) + share.abs().sum(0)

    def _layout(self, step: _Step, site: Site, given: list[Tensor], output: Tensor) -> CallLayout:
        """Where this call has its samples."""
        number = step.calls[site.name]
        step.calls[site.name] += 1
        if self._layouts is None:
            places = [_leading(site, value, step.samples) for value in (output, *given)]
            return CallLayout(places[0], tuple(places[1:]))
        layout = self._alike.get(site.name)
        if layout is None and step.scale is None:
            known = self._layouts.get(site.name, ())
            layout = known[number] if number < len(known) else None
        if layout is None or len(layout.inputs) != len(given):
            raise FactorError(
                f"{site.name} is called otherwise than when the model was tried, so it is unknown "
                "where its tensors have their samples; leave its parameters out of grad_wrt "
                f"({', '.join(site.parameters.values())})"
            )
        return layout

    # The check

    def _watch(self, step: _Step, name: str) -> RemovableHandle:
        """Take note of the gradient that autograd computes for a parameter."""

        def arrived(gradient: Tensor) -> None:
            dense = gradient.detach()
            dense = dense.to_dense() if dense.is_sparse else dense
            whole = self._shares.zeros(1)
            with torch.no_grad():
                self._shares.add(whole, name, dense.unsqueeze(0).to(whole.dtype))
            step.expected[name] = step.expected.get(name, 0) + whole[0]

        return self._weights[name].register_hook(arrived)  # type: ignore[no-untyped-call]

    def _compare(self, step: _Step) -> None:
        """Compare sums over samples with autograd's gradients."""
        zero = self._shares.zeros(1)[0]
        worst = max((float(size.max()) for size in step.sizes.values()), default=0.0)
        for name in sorted(step.sums.keys() | step.expected.keys()):
            found, expected = step.sums.get(name, zero), step.expected.get(name, zero)
            if not bool(torch.isfinite(expected.sum()) & torch.isfinite(found.sum())):
                continue  # such as steps that a loss scale which is too large spoils
            size = max(float(step.sizes.get(name, zero).max()), float(expected.abs().max()))
            lowest = least_precise([step.lowest, step.intake.rows.dtype, self._weights[name].dtype])
            error = float((found - expected).abs().max())
            if not error <= _TOLERANCE.get(lowest, 0.1) * (size + 1e-3 * worst):
                raise FactorError(
                    f"over the samples of a batch, the gradients of {name} do not add up to "
                    f"the one that autograd computed (off by {error:.3g} of {size:.3g}): something "
                    "besides the layer itself reads it, such as an attention kernel or a "
                    "projection tied by hand. Leave it out of grad_wrt, or collect at checkpoints"
                )


def _place(found: tuple[int, int] | Bare, value: Tensor) -> Place:
    """The batch in a tensor."""
    return found.place(value) if isinstance(found, Bare) else found


def _to_front(value: Tensor, place: Place, samples: int) -> Tensor:
    """As `to_front`, where samples may be longer or shorter than in another batch."""
    if place is not None and place[1] > 1 and value.ndim > place[0]:
        dim = place[0]
        if value.shape[dim] % samples == 0:  # entries of a sample, such as positions
            place = dim, value.shape[dim] // samples
    return to_front(value, place, samples)


def _leading(site: Site, value: Tensor, samples: int) -> tuple[int, int]:
    """The first dimension as the batch, where nothing speaks against it."""
    shape = tuple(value.shape)
    sequence_first = len(shape) > 2 and shape[1] == samples != shape[0]
    if not shape or shape[0] % samples or sequence_first:
        raise FactorError(
            f"{site.name} is given or returns a tensor of shape {shape}: it is unknown where its "
            f"{samples} samples are; give layouts, from find_layouts"
        )
    return 0, shape[0] // samples


def check_order(
    model: nn.Module,
    names: Iterable[str],
    layouts: Layouts,
    run: Callable[[Sequence[int]], object],
) -> None:
    """Refuse a model that gives a layer several entries of each sample which do not lie together.

    Such as two views of all samples, one view after the other. What layers are given for one batch
    is compared with what they are given for another, in which only the last sample is another.

    Args:
        model: the model, in a mode without randomness.
        names: the parameters of interest.
        layouts: where layers have their samples, from `find_layouts`.
        run: runs the model's training forward on samples by number.

    Raises:
        FactorError: a layer is given them so.
    """
    seen: list[list[tuple[str, list[Tensor]]]] = []
    for which in ((0, 1, 2), (0, 1, 0)):
        calls: list[tuple[str, list[Tensor]]] = []

        def note(site: Site, given: list[Tensor], _: Tensor, calls: Any = calls) -> None:
            calls.append((site.name, [value.detach().clone() for value in given]))

        handles = [_on_call(site, note) for site in covered_sites(model, names)]
        try:
            with torch.enable_grad():
                run(which)
        finally:
            for handle in handles:
                handle.remove()
        seen.append(calls)
    number: Counter[str] = Counter()
    for (name, first), (_, second) in zip(*seen, strict=False):
        layout = layouts[name][number[name]]
        number[name] += 1
        for one, other, place in zip(first, second, layout.inputs, strict=True):
            if isinstance(place, Bare) or place[1] == 1 or one.shape != other.shape:
                continue
            differ = (one != other).movedim(place[0], 0).flatten(1).any(1)
            where = torch.nonzero(differ).flatten()
            together = len(where) == 0 or bool((where >= 2 * place[1]).all())
            if not together and bool((where % 3 == 2).all()):
                raise FactorError(
                    f"{name} is given {place[1]} entries of each sample that do not lie together, "
                    "such as two views of a batch by torch.cat((first, second)); put those of a "
                    "sample side by side, as torch.stack((first, second), 1).flatten(0, 1) does"
                )


def check_samples(
    model: nn.Module,
    shares: Shares,
    names: Sequence[str],
    layouts: Layouts,
    loss_of: Callable[[Sequence[int]], Tensor],
    samples: int = 3,
) -> Reduction:
    """Compare rows, of samples in their order and in reverse, with autograd on one at a time.

    Args:
        model: the model, in a mode without randomness; its gradients are lost.
        shares: the mask.
        names: the parameters that the mask was drawn for.
        layouts: where layers have their samples.
        loss_of: the training loss of samples by number.
        samples: how many to compare; at least two.

    Returns:
        Whether the loss is the mean or the sum of the samples' losses.

    Raises:
        FactorError: it is neither: the loss of a sample depends on others, samples change places,
            or the model is random.
    """
    weights = {n: w for n, w in model.named_parameters() if n in set(names) and w.requires_grad}
    live = LiveGradients(model, shares, names, layouts=layouts, reduction="sum")
    expected = shares.zeros(samples)
    found, lowest = [], torch.float64
    wholes, singles = [], []
    with live, torch.enable_grad():
        for order in (range(samples), range(samples)[::-1]):
            model.zero_grad(set_to_none=True)
            live.begin(samples)
            loss = loss_of(order)
            live.expect()
            # Not autograd.grad, with which activation checkpoints do not work.
            loss.backward()  # type: ignore[no-untyped-call]
            lowest = least_precise([lowest, live.lowest])
            found.append(live.end()[torch.tensor(order)])
            wholes.append(float(loss.detach()))
        live.stop()
        for i in range(samples):
            model.zero_grad(set_to_none=True)
            loss = loss_of([i])
            loss.backward()  # type: ignore[no-untyped-call]
            singles.append(float(loss.detach()))
            for name, weight in weights.items():
                if weight.grad is not None:
                    grad = weight.grad.to_dense() if weight.grad.is_sparse else weight.grad
                    shares.add(expected[i : i + 1], name, grad.unsqueeze(0).to(expected.dtype))
    model.zero_grad(set_to_none=True)
    expected = shares.finish(expected)
    least = least_precise([lowest, expected.dtype, *(weight.dtype for weight in weights.values())])
    tolerance = _TOLERANCE.get(least, 0.1)
    size = float(expected.abs().max())
    errors: dict[Reduction, float] = {
        "mean": float((samples * torch.stack(found) - expected).abs().max()),
        "sum": float((torch.stack(found) - expected).abs().max()),
    }
    best = min(errors, key=lambda reduction: errors[reduction])
    together = sum(singles) / (samples if best == "mean" else 1)
    if max(abs(together - whole) for whole in wholes) <= rounding(least) * max(1, abs(together)):
        # Rounding may move a sample over a kink, such as a unit that is zero or not.
        tolerance = max(tolerance, _AT_KINKS)
    if not errors[best] <= tolerance * size:
        raise FactorError(
            "gradients of single samples, run by themselves, are not those that a batch of "
            f"{samples} gives each of them (off by {errors[best]:.3g} of {size:.3g}): the loss of "
            "a sample depends on others, or is neither a mean nor a sum over samples, or samples "
            "change places"
        )
    return best
