"""Hooks that catch what layers are given and the gradients of what they return.

Two ways to run a model share them: one sample's function under ``torch.func.vmap``, and the model's
own forward on a whole batch. In both, the batch is a plain leading dimension where the hooks look,
gradients flow by ordinary autograd, and no weight requires a gradient, so that none is computed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from trak_dropout.gradients.factors import Factor
from trak_dropout.gradients.rules import RuleFunction


class FactorError(RuntimeError):
    """Factors of a layer's gradient cannot be had, or are not what autograd says."""


class NoWayError(FactorError):
    """A layer's gradients cannot be made at its output, so they have to be formed.

    Args:
        site: the layer.
        why: what is in the way.
    """

    def __init__(self, site: Site, why: str) -> None:
        names = ", ".join(site.parameters.values())
        super().__init__(
            f"{site.name} {why}; name its parameters ({names}) in FactoredGradientComputer's "
            "exact=, or leave them out of grad_wrt"
        )
        self.parameters = set(site.parameters.values())


@dataclass(frozen=True)
class Site:
    """A module whose parameters' gradients are made at its output.

    Args:
        name: the module's name in the model.
        module: the module.
        function: its rule.
        parameters: for each of its own parameters that is wanted, its name in the model.
        again: whether the function runs the module again with the tensors that it was given.
    """

    name: str
    module: nn.Module
    function: RuleFunction
    parameters: Mapping[str, str]
    again: bool = False


Handler = Callable[[Site, list[Tensor], Tensor], Tensor]


@contextmanager
def tapped(sites: Sequence[Site], handler: Handler) -> Iterator[None]:
    """Call a handler at each call of the sites' modules.

    Args:
        sites: the modules.
        handler: takes the site, the tensors that its module was given and the one it returned, and
            returns what to go on with.
    """

    def hook_for(site: Site) -> Any:
        def hook(_: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
            given = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
            if not isinstance(output, Tensor):
                raise NoWayError(site, f"returns a {type(output).__name__}, not a tensor")
            if site.again and (kwargs or len(given) < len(args)):
                raise NoWayError(site, "has no rule and is given more than tensors by position")
            return handler(site, given, output)

        # Before hooks of the user, which may change what the layer computed.
        return site.module.register_forward_hook(hook, prepend=True, with_kwargs=True)

    handles = [hook_for(site) for site in sites]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def no_view(module: nn.Module, output: Tensor) -> Tensor:
    """Return a module's output as a tensor whose hooks stay when it is changed in place.

    Args:
        module: the module.
        output: what it returned; the hooks of a view are lost.
    """
    if output._base is None:
        return output
    if type(module) is nn.Linear:  # of a matrix that nobody else has
        alone: Tensor = torch.ops.aten._unsafe_view(output, output.shape)
        return alone
    return output.clone()


class Recorder:
    """Collects factors while a model runs forward and gradients flow back.

    Args:
        parameters: names of the parameters that factors are collected for.
        sink: takes each factor as it comes, with the name of its parameter; when None they are held
            in ``factors``.

    Attributes:
        leaves: where gradients have to flow back to.
        foreign: whether something else in the model asks for gradients, too.
    """

    def __init__(
        self, parameters: Sequence[str], sink: Callable[[str, Factor], None] | None = None
    ) -> None:
        factors: dict[str, list[Factor]] = {name: [] for name in parameters}
        self.factors = factors
        # A function that held this object would hold the batch until Python's collector comes by.
        self.keep = sink or (lambda name, factor: factors[name].append(factor.held()))
        self.leaves: list[Tensor] = []
        self.foreign = False
        self.lowest = torch.float64
        self.recording = True

    def catch(self, site: Site, inputs: Sequence[Tensor], output: Tensor, front: Any) -> Tensor:
        """Take note of a call.

        Args:
            site: whose.
            inputs: what its module was given, ``(B, *sample)``.
            output: what it returned.
            front: brings the gradient of the output into the form ``(B, *sample)``.

        Returns:
            The output, which requires a gradient now.
        """
        if not torch.is_grad_enabled():  # nothing flows back through here
            return output
        if not output.requires_grad:
            leaf = output.detach().requires_grad_()
            self.leaves.append(leaf)
            output = leaf.clone()  # a leaf could not be changed in place
        else:
            self.foreign |= not self.leaves
            output = no_view(site.module, output)
        if not self.recording:  # an activation checkpoint runs the layer again
            return output
        held = [value.detach() for value in inputs]
        versions = [value._version for value in inputs]

        def arrived(gradient: Tensor) -> None:
            if [value._version for value in held] != versions:
                raise FactorError(
                    f"what {site.name} was given has been changed in place since, so the gradients "
                    f"of {', '.join(site.parameters.values())} cannot be made from it; use an "
                    "operation that is not in place there (such as inplace=False), name these "
                    "parameters in FactoredGradientComputer's exact=, or leave them out of grad_wrt"
                )
            types = [value.dtype for value in (gradient, *held) if value.is_floating_point()]
            self.lowest = max(self.lowest, *types, key=lambda dtype: torch.finfo(dtype).eps)
            try:
                made = site.function(site.module, list(held), front(gradient))
            except FactorError as error:
                if site.again:
                    raise NoWayError(site, str(error)) from error
                raise
            held.clear()  # this hook lives as long as the graph; what factors need they hold
            for own, name in site.parameters.items():
                self.keep(name, made[own])

        output.register_hook(arrived)  # type: ignore[no-untyped-call]
        return output


def leaves_of(output: Tensor) -> list[Tensor]:
    """Return the tensors at which the graph behind a tensor ends."""
    found, seen, behind = [], set(), [output.grad_fn]
    while behind:
        node = behind.pop()
        if node is not None and node not in seen:
            seen.add(node)
            behind += [before for before, _ in node.next_functions]
            if hasattr(node, "variable"):
                found.append(node.variable)
    return found


class Physical(torch.autograd.Function):
    """Hands the tensors behind one level of ``vmap`` to a function, batch dimension first."""

    @staticmethod
    def forward(handler: Any, anchor: Tensor, output: Tensor, *inputs: Tensor) -> Tensor:
        """Never runs: ``vmap`` calls the rule below."""
        raise FactorError("a layer was called outside of the batch")

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        """Nothing is kept."""

    @staticmethod
    def vmap(info: Any, in_dims: Any, handler: Any, anchor: Tensor, *tensors: Tensor) -> Any:
        """Call the handler on output and inputs, all ``(B, *sample)``."""
        output, *inputs = (
            value.expand(info.batch_size, *value.shape)
            if dim is None
            else (value if dim == 0 else value.movedim(dim, 0))
            for value, dim in zip(tensors, in_dims[2:], strict=True)
        )
        return handler(inputs, output), 0


Place = tuple[int, int] | None
"""Which dimension of a tensor holds the batch, and how many entries each sample has in it."""


def place_of(two: torch.Size, three: torch.Size) -> Place:
    """Find the batch in a tensor's shapes for two samples and for three; None if it has none.

    Raises:
        FactorError: shapes differ in some other way.
    """
    if len(two) == len(three):
        differ = [i for i, (a, b) in enumerate(zip(two, three, strict=True)) if a != b]
        if not differ:
            return None
        (dim, *others) = differ
        if not others and two[dim] % 2 == 0 and 3 * two[dim] == 2 * three[dim]:
            return dim, two[dim] // 2
    raise FactorError(f"no batch dimension in shapes {tuple(two)} and {tuple(three)}")


def to_front(value: Tensor, place: Place, samples: int) -> Tensor:
    """Bring the batch to the front, ``(B, *sample)``, a sample keeping all its dimensions.

    Raises:
        FactorError: the tensor does not hold that many samples there.
    """
    if place is None:
        return value.expand(samples, *value.shape)
    dim, each = place
    if value.ndim <= dim or value.shape[dim] != samples * each:
        raise FactorError(
            f"a layer's tensor of shape {tuple(value.shape)} was expected to hold {samples} "
            f"samples in dimension {dim}, {each} entries each, as for an earlier batch (does a "
            "collate_fn leave samples out?)"
        )
    if each == 1:  # in the fewest calls, which count where layers are small
        value = value.unsqueeze(dim + 1)
        return value if dim == 0 else value.movedim(dim, 0)
    return torch.unflatten(value, dim, (samples, each)).movedim(dim, 0)


class OutsideReads(TorchFunctionMode):
    """Finds parameters that are read by anything but the module they belong to.

    Args:
        weights: parameters by name, the tensors that the model runs with.
        sites: the modules that may read them.
    """

    def __init__(self, weights: Mapping[str, Tensor], sites: Sequence[Site]) -> None:
        super().__init__()
        self._names = {id(tensor): name for name, tensor in weights.items()}
        self._owned = {name for site in sites for name in site.parameters.values()}
        self._sites = sites
        self._inside: list[Site] = []
        self.found: set[str] = set()

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Call the function, and take note of parameters among its arguments."""
        result = func(*args, **(kwargs or {}))
        read = {
            self._names[id(value)]
            for value in tree_leaves((args, kwargs))
            if isinstance(value, Tensor) and id(value) in self._names
        } & self._owned
        if self._inside:
            read -= set(self._inside[-1].parameters.values())
        if read and any(isinstance(value, Tensor) for value in tree_leaves(result)):
            self.found |= read
        return result

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Know which module runs, and watch."""
        handles = []
        for site in self._sites:

            def enter(_: nn.Module, __: Any, site: Site = site) -> None:
                self._inside.append(site)

            def leave(_: nn.Module, __: Any, ___: Any) -> None:
                self._inside.pop()

            handles += [
                site.module.register_forward_pre_hook(enter),
                site.module.register_forward_hook(leave, prepend=True, always_call=True),
            ]
        try:
            with self:
                yield
        finally:
            for handle in handles:
                handle.remove()
