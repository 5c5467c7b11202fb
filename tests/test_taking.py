"""Every way to the kept coordinates gives those of the gradients, formed by plain algebra."""

import itertools
import math

import pytest
import torch
from torch import Tensor, nn

import trak_dropout as td
from trak_dropout.gradients import factors, patches
from trak_dropout.gradients.factors import (
    Coordinates,
    FactoredGradient,
    FactoredGradients,
    Formed,
    Lookups,
    Outer,
    Products,
)
from trak_dropout.gradients.patches import Patches
from trak_dropout.gradients.vectors import Sums


def outer(samples: int = 5, positions: int = 7) -> tuple[Products, Tensor]:
    left, right = (torch.randn(samples, positions, d, dtype=torch.float64) for d in (6, 9))
    return Outer(left, right), torch.einsum("btr,btc->brc", left, right)


def convolution(
    size: tuple[int, ...],
    kernel: tuple[int, ...],
    stride: tuple[int, ...],
    dilation: tuple[int, ...],
    padding: tuple[int, ...],
    each: int = 1,
    groups: int = 1,
    mode: str = "constant",
) -> tuple[Products, Tensor]:
    """The factor, and gradients of the sum of outputs times ``left``, sample by sample."""
    inputs = torch.randn(4, each, 3 * groups, *size, dtype=torch.float64)
    weight = torch.randn(5 * groups, 3, *kernel, dtype=torch.float64, requires_grad=True)
    settings = {"stride": stride, "dilation": dilation, "groups": groups}
    run = (nn.functional.conv1d, nn.functional.conv2d, nn.functional.conv3d)[len(size) - 1]
    around = [side for one in reversed(padding) for side in (one, one)]
    rows = []
    left: list[Tensor] = []
    for sample in inputs:
        output = run(nn.functional.pad(sample, around, mode), weight, **settings)
        left.append(torch.randn_like(output).detach())
        rows.append(torch.autograd.grad((output * left[-1]).sum(), weight)[0].flatten(1))
    factor = Patches(torch.stack(left), inputs, around, mode, kernel, stride, dilation, groups)
    return factor, torch.stack(rows)


FACTORS = [
    *(lambda b=b, t=t: outer(b, t) for b, t in ((5, 7), (5, 1), (1, 3), (40, 2))),
    *(
        lambda s=s: convolution(*s)
        for s in (
            ((9, 8), (2, 3), (1, 1), (1, 1), (1, 1)),
            ((9, 8), (2, 3), (2, 2), (1, 1), (0, 0)),
            ((9, 8), (2, 3), (1, 1), (2, 2), (2, 2), 3),
            ((9, 7), (3, 2), (2, 3), (3, 1), (2, 0), 2),
            ((7, 8), (1, 1), (3, 2), (1, 1), (0, 0)),
            ((17,), (4,), (3,), (2,), (5,)),
            ((5, 4, 6), (2, 1, 3), (2, 1, 1), (1, 1, 2), (1, 0, 2)),
            ((9, 7), (3, 2), (2, 1), (1, 2), (2, 1), 2, 1, "reflect"),
            ((6, 7), (3, 3), (1, 2), (1, 1), (1, 2), 1, 1, "circular"),
            ((6, 7), (3, 2), (1, 1), (1, 1), (1, 0), 2, 4),
            ((8, 7), (2, 2), (2, 1), (2, 1), (1, 1), 1, 2, "replicate"),
        )
    ),
]


@pytest.mark.parametrize("number", range(len(FACTORS)))
@pytest.mark.parametrize("count", [1, 3, 200])
def test_every_way_gives_the_same(number: int, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(number)
    factor, formed = FACTORS[number]()
    flat = formed.flatten(1)
    which = torch.randint(flat.shape[1], (count,))  # in no order, some of them twice
    seen = set()
    for room in (1, 2**23):  # a sample at a time, or all at once
        limited = [(factors, "_LAID_OUT"), (factors, "PIECE"), (patches, "_INDICES")]
        for module, name in limited:
            monkeypatch.setattr(module, name, room)
        for way in factor.costs(Coordinates(which, *formed.shape[1:])):
            at = Coordinates(which, *formed.shape[1:])
            monkeypatch.setattr(
                type(factor),
                "costs",
                lambda self, at, way=way: {way: (1.0, 4.0 * flat.shape[1])},
            )
            found = torch.zeros(len(flat), count, dtype=torch.float64)
            for part, columns, values in factor.take(at, 2**20):
                found[part, columns] += values
            monkeypatch.undo()
            for module, name in limited:
                monkeypatch.setattr(module, name, room)
            torch.testing.assert_close(found, flat[:, which], rtol=1e-12, atol=1e-12)
            seen.add(way)
    positions = factor.positions > 1
    assert {"gather", "form"} <= seen
    few = count <= math.prod(Coordinates(which, *formed.shape[1:]).laid_out)
    grouped = getattr(factor, "_groups", 1) > 1  # no two rows of a group see the same columns
    assert ("dots" in seen) == (positions and few and not grouped)


def test_inputs_that_skip_entries_in_memory() -> None:
    """Of which a flat view has steps, where it is one."""
    torch.manual_seed(0)
    inputs = torch.randn(4, 1, 3, 6, 10, dtype=torch.float64)[..., ::2]
    left = torch.randn(4, 1, 5, 5, 4, dtype=torch.float64)
    factor = Patches(left, inputs, [0] * 4, "constant", (2, 2), (1, 1), (1, 1), 1)
    at = Coordinates(torch.arange(60), 5, 12)
    torch.testing.assert_close(factor.dots(slice(None), at), factor.form(slice(None)).flatten(1))


def test_what_is_kept_for_sizes_of_inputs_is_bounded() -> None:
    at = Coordinates(torch.arange(5), 5, 3)
    for length in range(4, 40):
        inputs, left = torch.randn(2, 1, 1, length), torch.randn(2, 1, 5, length - 2)
        factor = Patches(left, inputs, [0, 0], "constant", (3,), (1,), (1,), 1)
        factor.gather(slice(None), at), factor.dots(slice(None), at)
    assert len(at._known) <= 8


def gradients(samples: int, dtype: torch.dtype) -> tuple[FactoredGradients, dict[str, Tensor]]:
    """Factors of all kinds, those with a single position among them, and what they stand for."""
    a, b, c, d = (torch.randn(samples, n, dtype=dtype) for n in (6, 9, 4, 11))
    several = torch.randn(samples, 3, 6, dtype=dtype)
    rows = torch.randint(5, (samples, 3))
    values = torch.randn(samples, 3, 4, dtype=dtype)
    table = torch.zeros(samples, 5, 4, dtype=dtype)
    for i, t in itertools.product(range(samples), range(3)):
        table[i, rows[i, t]] += values[i, t]
    kinds = {
        "single": (Outer(a[:, None], b[:, None]), torch.einsum("br,bc->brc", a, b)),
        "bias": (Sums(a[:, None]), a),
        "second": (Outer(c[:, None], d[:, None]), torch.einsum("br,bc->brc", c, d)),
        "formed": (Formed(torch.stack([c, 2 * c], 1)), torch.stack([c, 2 * c], 1)),
        "several": (Sums(several), several.sum(1)),
        "table": (Lookups(rows, values, 5), table),
    }
    held = {
        name: FactoredGradient([factor], samples, dense[0])
        for name, (factor, dense) in kinds.items()
    }
    return FactoredGradients(held), {name: dense for name, (_, dense) in kinds.items()}


@pytest.mark.parametrize("fold", [1, 3, 16])
@pytest.mark.parametrize("samples", [1, 2, 33])
def test_columns_are_those_of_formed_gradients(
    fold: int, samples: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(fold)
    factored, dense = gradients(samples, torch.float64)
    layout = {name: tensor.shape[1:] for name, tensor in dense.items()}
    model = nn.ParameterDict({n: nn.Parameter(torch.zeros(*s)) for n, s in layout.items()})
    for piece in (1, 300, 2**20):
        monkeypatch.setattr(factors, "PIECE", piece)
        monkeypatch.setattr(td.taking, "BUFFER", piece)
        for module in (factors, td.taking):
            monkeypatch.setattr(module, "DEFAULT_BUDGET", 100 * piece)
        projector = td.DropoutProjector.from_model(model, 8, 1, dtype=torch.float64, fold=fold)
        mask = projector.mask(0)
        matrix = torch.zeros(projector.grad_dim, 8, dtype=torch.float64)
        matrix[mask.coordinates, mask.columns] += torch.as_tensor(mask.weights)
        ordered = dict(model.named_parameters())
        everything = torch.cat([dense[name].flatten(1) for name in ordered], 1)
        found = projector.project(factored, 0)
        torch.testing.assert_close(found, everything @ matrix, rtol=1e-12, atol=1e-12)
        assert found.is_contiguous()


def test_small_factors_do_not_vanish_before_they_are_multiplied() -> None:
    left, right = (torch.full((2, 1, 3), x, dtype=torch.float64) for x in (1e-60, 1e60))
    gradient = FactoredGradient([Outer(left, right)], 2, torch.zeros(3, 3, dtype=torch.float64))
    bias = FactoredGradient([Sums(left)], 2, torch.zeros(3, dtype=torch.float64))
    model = nn.ParameterDict(
        {"w": nn.Parameter(torch.zeros(3, 3)), "z": nn.Parameter(torch.ones(3))}
    )
    projector = td.DropoutProjector.from_model(model, 2, 0, fold=4)
    found = projector.project(FactoredGradients({"w": gradient, "z": bias}), 0)
    assert float(found.abs().min()) > 0.1
    assert bool(torch.isfinite(found).all())


def test_single_positions_a_page_wide() -> None:
    torch.manual_seed(0)
    model = nn.Linear(1024, 3)
    left, right = torch.randn(5, 1, 3), torch.randn(5, 1, 1024)
    factored = {
        "weight": FactoredGradient([Outer(left, right)], 5, model.weight),
        "bias": FactoredGradient([Formed(left[:, 0])], 5, model.bias),
    }
    formed = {"weight": left.mT @ right, "bias": left[:, 0]}
    projector = td.DropoutProjector.from_model(model, 64, fold=50)  # every coordinate
    found = projector.project(FactoredGradients(factored), 0)
    torch.testing.assert_close(found, projector.project(formed, 0))
