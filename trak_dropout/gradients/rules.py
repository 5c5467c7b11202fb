"""One rule for each layer type: its parameters' per-sample gradients as factors.

A rule is a function ``(module, inputs, gradient) -> {parameter: factor}``. Tensors have one more
leading dimension than the module sees: ``inputs[0]`` is ``(B, *what the module is given for one
sample)``, and ``gradient``, the gradient of the output, likewise; what the module itself takes
for a batch dimension is part of the sample and summed over. Register one for a layer of your own::

    @rule(MyLayer, "weight")
    def my_layer(module, inputs, gradient):
        return {"weight": Outer(gradient, inputs[0])}
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from trak_dropout.gradients.factors import Factor, Lookups, Outer
from trak_dropout.gradients.patches import Patches
from trak_dropout.gradients.vectors import Sums, entries

RuleFunction = Callable[[nn.Module, Sequence[Tensor], Tensor], Mapping[str, Factor]]


@dataclass(frozen=True)
class Rule:
    """How a layer type's gradients are made.

    Args:
        function: the rule.
        parameters: names of the layer's own parameters that it covers.
        applies: whether it holds for a module, as it is set; None for always.
    """

    function: RuleFunction
    parameters: tuple[str, ...]
    applies: Callable[[nn.Module], bool] | None = None


_RULES: dict[type[nn.Module] | str, Rule] = {}


def rule(
    layer: type[nn.Module] | str,
    *parameters: str,
    applies: Callable[[nn.Module], bool] | None = None,
) -> Callable[[RuleFunction], RuleFunction]:
    """Register the decorated function as the rule of a layer type, in place of one it has.

    Subclasses that do not override ``forward`` take over the rule.

    Args:
        layer: the type, or its full dotted name, so that its package need not be installed.
        *parameters: names of the layer's own parameters that the rule covers.
        applies: tells whether the rule holds for a module, by its settings.

    Returns:
        The decorator; it returns the function as it is.

    Raises:
        TypeError: the layer is neither a module type nor a name.
        ValueError: no parameter is named.
    """
    if not (isinstance(layer, str) or (isinstance(layer, type) and issubclass(layer, nn.Module))):
        raise TypeError(f"layer must be an nn.Module type or its dotted name, got {layer!r}")
    if not parameters:
        raise ValueError(f"parameters: name those of {layer} that the rule covers")

    def register(function: RuleFunction) -> RuleFunction:
        _RULES[layer] = Rule(function, parameters, applies)
        return function

    return register


def rule_of(module: nn.Module) -> Rule | None:
    """Return the rule of a module; None where it has none."""
    for kind in type(module).__mro__:
        found = _RULES.get(kind) or _RULES.get(f"{kind.__module__}.{kind.__qualname__}")
        if found is not None:
            same = getattr(type(module), "forward", None) is getattr(kind, "forward", None)
            same = same and "forward" not in vars(module)
            return found if same and (found.applies is None or found.applies(module)) else None
    return None


def _rows(values: Tensor, trailing: int = 1) -> Tensor:
    """Merge the dimensions between the first and the last few: ``(B, T, *trailing)``."""
    # (len() of a tensor costs more than all of this.) Not -1, which a size of zero leaves open.
    shape, last = values.shape, values.ndim - trailing
    if last == 2:
        return values
    return values.reshape(shape[0], shape[1:last].numel(), *shape[last:])


@rule(nn.Linear, "weight", "bias")
def linear(module: nn.Module, inputs: Sequence[Tensor], gradient: Tensor) -> dict[str, Factor]:
    """``y = x W^T + b``: outer products of output gradients and inputs."""
    rows = _rows(gradient)
    return {"weight": Outer(rows, _rows(inputs[0])), "bias": Sums(rows, shared=True)}


@rule("transformers.pytorch_utils.Conv1D", "weight", "bias")
def transposed_linear(
    module: nn.Module, inputs: Sequence[Tensor], gradient: Tensor
) -> dict[str, Factor]:
    """``y = x W + b``, as in GPT-2."""
    rows = _rows(gradient)
    return {"weight": Outer(_rows(inputs[0]), rows), "bias": Sums(rows, shared=True)}


@rule(nn.Conv1d, "weight", "bias")
@rule(nn.Conv2d, "weight", "bias")
@rule(nn.Conv3d, "weight", "bias")
def convolution(module: nn.Module, inputs: Sequence[Tensor], gradient: Tensor) -> dict[str, Factor]:
    """Products of output gradients and the windows of the padded input."""
    assert isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d)
    axes = len(module.kernel_size)
    values = inputs[0]
    if values.ndim == axes + 2:  # the module was given a sample without its own batch dimension
        values, gradient = values.unsqueeze(1), gradient.unsqueeze(1)
    factor = Patches(
        gradient,
        values,
        _padding(module),
        "constant" if module.padding_mode == "zeros" else module.padding_mode,
        module.kernel_size,
        module.stride,
        module.dilation,
        module.groups,
    )
    return {"weight": factor, "bias": Sums(gradient)}


def _padding(module: nn.Conv1d | nn.Conv2d | nn.Conv3d) -> list[int]:
    """Padding as ``nn.functional.pad`` takes it: last axis first, before and after."""
    padding: list[int] = []
    for axis in reversed(range(len(module.kernel_size))):
        if isinstance(module.padding, str):
            whole = module.dilation[axis] * (module.kernel_size[axis] - 1)
            whole = whole if module.padding == "same" else 0
            padding += [whole // 2, whole - whole // 2]
        else:
            padding += [module.padding[axis]] * 2
    return padding


@rule(
    nn.Embedding,
    "weight",
    applies=lambda module: module.max_norm is None and not module.scale_grad_by_freq,
)
def embedding(module: nn.Module, inputs: Sequence[Tensor], gradient: Tensor) -> dict[str, Factor]:
    """Each row of the table gets the output gradients of where it was looked up."""
    assert isinstance(module, nn.Embedding)
    rows = inputs[0].reshape(len(gradient), -1).long()
    if module.padding_idx is not None:
        rows = rows.masked_fill(rows == module.padding_idx, -1)
    return {"weight": Lookups(rows, _rows(gradient), module.num_embeddings)}


def _normalized_rows(
    inputs: Tensor, gradient: Tensor, shape: Sequence[int], normalize: Callable[[Tensor], Tensor]
) -> dict[str, Factor]:
    """Gradients of ``y = x * weight + bias``, with ``x`` normalized over the last dimensions."""

    def rows(values: Tensor) -> Tensor:
        return _rows(values, len(shape)).flatten(2)

    def normalized(which: Tensor | None) -> Tensor:
        return entries(rows(normalize(inputs)), which)

    each = rows(gradient)
    return {"weight": Sums(each, normalized), "bias": Sums(each)}


@rule(nn.LayerNorm, "weight", "bias")
def layer_norm(module: nn.Module, inputs: Sequence[Tensor], gradient: Tensor) -> dict[str, Factor]:
    """Output gradients times normalized inputs."""
    assert isinstance(module, nn.LayerNorm)
    shape, eps = module.normalized_shape, module.eps
    return _normalized_rows(
        inputs[0], gradient, shape, lambda x: nn.functional.layer_norm(x, shape, eps=eps)
    )


def rms_norm(module: nn.Module, inputs: Sequence[Tensor], gradient: Tensor) -> dict[str, Factor]:
    """Output gradients times inputs over their root-mean-square."""
    assert isinstance(module, nn.RMSNorm)
    shape, eps = module.normalized_shape, module.eps
    axes = tuple(range(-len(shape), 0))

    def normalize(values: Tensor) -> Tensor:
        least = torch.finfo(values.dtype).eps if eps is None else eps
        values = values.to(torch.promote_types(values.dtype, torch.float32))
        return values * torch.rsqrt(values.square().mean(axes, keepdim=True) + least)

    return {"weight": _normalized_rows(inputs[0], gradient, shape, normalize)["weight"]}


if hasattr(nn, "RMSNorm"):  # since PyTorch 2.4
    rule(nn.RMSNorm, "weight")(rms_norm)


@rule(nn.GroupNorm, "weight", "bias")
def group_norm(module: nn.Module, inputs: Sequence[Tensor], gradient: Tensor) -> dict[str, Factor]:
    """As layer norm, over groups of channels."""
    assert isinstance(module, nn.GroupNorm)
    values, groups, eps = inputs[0], module.num_groups, module.eps

    def normalized(which: Tensor | None) -> Tensor:
        flat = nn.functional.group_norm(values.flatten(0, 1), groups, eps=eps)
        return entries(torch.unflatten(flat, 0, values.shape[:2]), which)

    return {"weight": Sums(gradient, normalized), "bias": Sums(gradient)}


@rule(nn.BatchNorm1d, "weight", "bias")
@rule(nn.BatchNorm2d, "weight", "bias")
@rule(nn.BatchNorm3d, "weight", "bias")
def batch_norm(module: nn.Module, inputs: Sequence[Tensor], gradient: Tensor) -> dict[str, Factor]:
    """In evaluation mode running statistics normalize, in training mode those of the batch.

    With those of the batch, samples do not stay apart; who calls this must know what that means.
    """
    assert isinstance(module, nn.modules.batchnorm._BatchNorm)
    values, eps = inputs[0], module.eps
    of_batch = module.training or module.running_mean is None
    running = None if of_batch else (module.running_mean, module.running_var)

    def normalized(which: Tensor | None) -> Tensor:
        some = entries(values, which).flatten(0, 1)
        mean, variance = running or (None, None)
        if mean is not None and variance is not None and which is not None:
            mean, variance = mean[which], variance[which]
        flat = nn.functional.batch_norm(some, mean, variance, training=mean is None, eps=eps)
        return torch.unflatten(flat, 0, values.shape[:2])

    return {"weight": Sums(gradient, normalized), "bias": Sums(gradient)}
