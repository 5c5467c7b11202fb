"""Rows from a training backward are micro-batch gradients, and training does not notice."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from trak_dropout import DropoutProjector
from trak_dropout.gradients import FactorError
from trak_dropout.gradients.live import (
    LiveGradients,
    NoRuleError,
    check_samples,
    find_layouts,
)

cross_entropy = nn.functional.cross_entropy


class Language(nn.Module):
    """A small transformer: token and position embeddings, a layer used twice, a tied head."""

    def __init__(self, sequence_first: bool = False, checkpointed: bool | None = None) -> None:
        super().__init__()
        self.tokens = nn.Embedding(11, 6, padding_idx=0)
        self.positions = nn.Embedding(5, 6)
        self.norm = nn.LayerNorm(6)
        self.mix = nn.Linear(6, 6)
        self.drop = nn.Dropout(0.3)
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.tokens.weight
        self.sequence_first, self.checkpointed = sequence_first, checkpointed

    def block(self, x: Tensor) -> Tensor:
        time = 0 if self.sequence_first else 1
        return x + torch.tanh(self.drop(self.mix(input=self.norm(x)))).cumsum(time)

    def forward(self, ids: Tensor) -> Tensor:
        ids = ids.T if self.sequence_first else ids
        steps = torch.arange(5, device=ids.device)
        x = self.tokens(ids) + self.positions(steps.unsqueeze(1) if self.sequence_first else steps)
        for _ in range(2):
            if self.checkpointed is None:
                x = self.block(x)
            else:
                x = checkpoint(self.block, x, use_reentrant=self.checkpointed)
        out = self.head(x)
        return out.transpose(0, 1) if self.sequence_first else out


class Wide(nn.Module):
    """Convolutions, normalizations without batch statistics, changes in place."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(2, 4, 3, padding=1),
            nn.GroupNorm(2, 4),
            nn.ReLU(inplace=True),
            nn.Conv2d(4, 6, 3, stride=2, groups=2),
            nn.BatchNorm2d(6).eval(),
            nn.ReLU(inplace=True),
            nn.Flatten(),
            nn.Linear(24, 11),
        )

    def forward(self, images: Tensor) -> Tensor:
        return self.net(images)


def language_loss(model: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
    logits = model(batch[0])
    return cross_entropy(logits[:, :-1].flatten(0, 1), batch[0][:, 1:].flatten())


def image_loss(model: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
    return cross_entropy(model(batch[0]), batch[1])


Loss = Callable[[nn.Module, tuple[Tensor, ...]], Tensor]


def sentences(count: int, seed: int = 0) -> tuple[Tensor, ...]:
    return (torch.randint(11, (count, 5), generator=torch.Generator().manual_seed(seed)),)


def pictures(count: int, seed: int = 0) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(count, 2, 6, 6, generator=generator, dtype=torch.float64)
    return images, torch.randint(11, (count,), generator=generator)


CASES: dict[str, tuple[Callable[[], nn.Module], Loss, Callable[..., tuple[Tensor, ...]]]] = {
    "language": (Language, language_loss, sentences),
    "sequence first": (lambda: Language(sequence_first=True), language_loss, sentences),
    "checkpointed": (lambda: Language(checkpointed=False), language_loss, sentences),
    "checkpointed, reentrant": (lambda: Language(checkpointed=True), language_loss, sentences),
    "images": (Wide, image_loss, pictures),
}


def names_of(model: nn.Module) -> list[str]:
    return [name for name, _ in model.named_parameters()]


def live_of(
    model: nn.Module, loss: Loss, data: Callable[..., tuple[Tensor, ...]], **options: Any
) -> tuple[LiveGradients, DropoutProjector]:
    k = min(60, sum(weight.numel() for weight in model.parameters()))
    projector = DropoutProjector.from_model(
        model, k, fold=options.pop("fold", 1), dtype=torch.float64
    )
    layouts = find_layouts(model, names_of(model), lambda count: loss(model, data(count)))
    live = LiveGradients(
        model, projector.shares(0, "cpu"), names_of(model), layouts=layouts, **options
    )
    return live, projector


def expected_rows(
    model: nn.Module, projector: DropoutProjector, losses: Iterator[Tensor]
) -> Tensor:
    """The oracle: autograd on each loss by itself, projected as a mapping."""
    parameters = dict(model.named_parameters())
    rows = []
    for loss in losses:
        grads = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
        dense = {
            name: torch.zeros_like(weight) if grad is None else grad
            for (name, weight), grad in zip(parameters.items(), grads, strict=True)
        }
        rows.append(projector.project({n: g.unsqueeze(0) for n, g in dense.items()}, 0))
    return torch.cat(rows)


def single(batch: tuple[Tensor, ...]) -> Iterator[tuple[Tensor, ...]]:
    for i in range(len(batch[0])):
        yield tuple(part[i : i + 1] for part in batch)


@pytest.mark.parametrize("fold", [1, 3])
@pytest.mark.parametrize("case", [name for name in CASES if "reentrant" not in name])
def test_rows_are_micro_batch_gradients(case: str, fold: int) -> None:
    build, loss, data = CASES[case]
    torch.manual_seed(1)
    model = build().double().eval()
    live, projector = live_of(model, loss, data, fold=fold)
    with live:
        for seed, count in enumerate((4, 4, 1, 3)):  # partial batches, too
            batch = data(count, seed)
            live.begin(count)
            value = loss(model, batch)
            live.expect()
            value.backward()
            rows = live.end()
            micro = expected_rows(model, projector, (loss(model, one) for one in single(batch)))
            torch.testing.assert_close(rows, micro, rtol=1e-10, atol=1e-12)


def test_reentrant_checkpoints_are_counted_once() -> None:
    plain, again = Language(), Language(checkpointed=True)
    again.load_state_dict(plain.state_dict())
    found = []
    for model in (plain.double().eval(), again.double().eval()):
        live, _ = live_of(model, language_loss, sentences)
        with live:
            live.begin(4)
            value = language_loss(model, sentences(4))
            live.expect()
            value.backward()
            found.append(live.end())
    torch.testing.assert_close(found[0], found[1], rtol=1e-10, atol=1e-12)


@settings(max_examples=20, deadline=None)
@given(
    samples=st.integers(1, 6),
    steps=st.integers(1, 4),
    scale=st.sampled_from([1.0, 0.25, 65536.0]),
    reduction=st.sampled_from(["mean", "sum"]),
)
def test_scales_are_taken_out(samples: int, steps: int, scale: float, reduction: Any) -> None:
    """Loss scaling and accumulation, for both reductions, and for a scale that is a tensor."""
    torch.manual_seed(2)
    model = nn.Sequential(nn.Linear(7, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    projector = DropoutProjector.from_model(model, 30, fold=1, dtype=torch.float64)
    live = LiveGradients(model, projector.shares(0, "cpu"), names_of(model), reduction=reduction)
    x, y = torch.randn(samples, 7).double(), torch.randint(3, (samples,))
    with live:
        live.begin(samples)
        value = cross_entropy(model(x), y, reduction=reduction) / steps * scale
        live.expect(torch.tensor(scale / steps, dtype=torch.float64))
        value.backward()
        rows = live.end()
    micro = expected_rows(model, projector, (cross_entropy(model(a), b) for a, b in single((x, y))))
    torch.testing.assert_close(rows, micro, rtol=1e-10, atol=1e-12)


def test_batch_statistics_give_each_sample_its_own_copy_of_the_weights() -> None:
    """The meaning of a row where samples meet, computed with one copy of the weights a sample."""
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3)).double()
    nn.init.normal_(model[1].weight)
    projector = DropoutProjector.from_model(model, 53, fold=1, dtype=torch.float64)
    live = LiveGradients(model, projector.shares(0, "cpu"), names_of(model))
    x, y = torch.randn(6, 4).double(), torch.randint(3, (6,))
    with live:
        live.begin(6)
        value = cross_entropy(model(x), y)
        live.expect()
        value.backward()
        rows = live.end()

    copies = {
        name: weight.detach().expand(6, *weight.shape).clone().requires_grad_()
        for name, weight in model.named_parameters()
    }
    hidden = torch.einsum("boi,bi->bo", copies["0.weight"], x) + copies["0.bias"]
    normal = (hidden - hidden.mean(0)) / torch.sqrt(hidden.var(0, unbiased=False) + model[1].eps)
    hidden = torch.tanh(normal * copies["1.weight"] + copies["1.bias"])
    out = torch.einsum("boi,bi->bo", copies["3.weight"], hidden) + copies["3.bias"]
    cross_entropy(out, y).backward()
    expected = projector.project({name: 6 * copy.grad for name, copy in copies.items()}, 0)
    torch.testing.assert_close(rows, expected, rtol=1e-9, atol=1e-12)


class Restless(nn.Module):
    """Batch norm, dropout, in-place changes, a position embedding, a frozen layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.places = nn.Embedding(4, 16)
        self.body = nn.Linear(16, 8)
        self.frozen = nn.Linear(8, 8).requires_grad_(False)
        self.head = nn.Linear(32, 11)

    def forward(self, images: Tensor) -> Tensor:
        x = nn.functional.relu_(self.norm(self.conv(images))).flatten(2)
        x = nn.functional.dropout(x + self.places(torch.arange(4)), 0.2, self.training)
        return self.head(self.frozen(torch.tanh(self.body(x))).flatten(1))


def test_training_is_the_same_to_the_bit() -> None:
    results = []
    for watched in (False, True):
        torch.manual_seed(4)
        model = Restless()
        optimizer = torch.optim.Adam([w for w in model.parameters() if w.requires_grad], 1e-2)
        trained = [name for name, weight in model.named_parameters() if weight.requires_grad]
        projector = DropoutProjector.from_model(model, 200, grad_wrt=trained)
        layouts = find_layouts(
            model, trained, lambda count, model=model: model(pictures(count)[0].float())
        )
        live = LiveGradients(model, projector.shares(0, "cpu"), trained, layouts=layouts)
        model.norm.reset_running_stats()
        torch.manual_seed(5)
        if watched:
            live.start()
        for step in range(6):
            images, labels = pictures(7, step)
            optimizer.zero_grad()
            if watched:
                live.begin(7)
            loss = cross_entropy(model(images.float()), labels)
            if watched:
                live.expect()
            loss.backward()
            if watched:
                assert bool(live.end().any())
            optimizer.step()
        live.stop()
        results.append([*model.state_dict().values(), torch.rand(3)])
    assert all(map(torch.equal, *results))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attend = nn.MultiheadAttention(4, 2, batch_first=True)
        self.slope = nn.PReLU()
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.slope(self.attend(x, x, x)[0]).mean(1))


def test_parameters_without_a_rule_are_named() -> None:
    model = Attention()
    projector = DropoutProjector.from_model(model, 20)
    with pytest.raises(NoRuleError, match=r"attend.in_proj_weight .*slope.weight \(PReLU\)"):
        LiveGradients(model, projector.shares(0, "cpu"), names_of(model))
    head = ["head.weight", "head.bias"]
    projector = DropoutProjector.from_model(model, 15, grad_wrt=head, fold=1)
    live = LiveGradients(model, projector.shares(0, "cpu"), head)
    with live:
        live.begin(2)
        value = model(torch.randn(2, 5, 4)).sum()
        live.expect()
        value.backward()
        assert live.end().shape == (2, 15)


def test_weights_read_behind_their_layer_are_noticed() -> None:
    """The attention kernel reads its child's weights; the child itself is never called."""
    model = Attention()
    wanted = ["attend.out_proj.weight", "attend.out_proj.bias"]
    projector = DropoutProjector.from_model(model, 20, grad_wrt=wanted, fold=1)
    live = LiveGradients(model, projector.shares(0, "cpu"), wanted)
    with live:
        live.begin(2)
        value = model(torch.randn(2, 5, 4)).sum()
        live.expect()
        value.backward()
        with pytest.raises(FactorError, match=r"gradients of attend\.out_proj"):
            live.end()


def test_layers_that_nothing_is_seen_of_do_not_give_zeros() -> None:
    model = nn.Sequential(nn.Linear(4, 3))
    projector = DropoutProjector.from_model(model, 8, fold=1)
    with LiveGradients(
        model, projector.shares(0, "cpu"), ["0.weight", "0.bias"], check=False
    ) as live:
        live.begin(2)
        nn.functional.linear(torch.randn(2, 4), model[0].weight).sum().backward()
        live.expect()
        with pytest.raises(FactorError, match="none of the layers was seen to run"):
            live.end()


def test_what_flows_back_within_the_forward_is_not_taken() -> None:
    torch.manual_seed(6)
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    projector = DropoutProjector.from_model(model, 30, fold=1, dtype=torch.float64)
    live = LiveGradients(model, projector.shares(0, "cpu"), names_of(model))
    x, y = torch.randn(3, 5).double().requires_grad_(), torch.randint(3, (3,))

    def step(penalty: bool) -> Tensor:
        live.begin(3)
        value = cross_entropy(model(x), y)
        slope = torch.autograd.grad(value, x, create_graph=penalty, retain_graph=True)[0]
        with torch.no_grad():
            model(x)
        live.expect()
        (value + slope.square().sum() if penalty else value).backward()
        return live.end()

    with live:
        rows = step(penalty=False)
        micro = expected_rows(
            model, projector, (cross_entropy(model(a), b) for a, b in single((x.detach(), y)))
        )
        torch.testing.assert_close(rows, micro, rtol=1e-10, atol=1e-12)
        with pytest.raises(FactorError, match="do not add up"):
            step(penalty=True)


def hooks_on(model: nn.Module) -> int:
    count = sum(
        len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks)
        for m in model.modules()
    )
    return count + sum(len(w._backward_hooks or ()) for w in model.parameters())


def test_no_hook_is_left() -> None:
    model = nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3))
    projector = DropoutProjector.from_model(model, 10)
    live = LiveGradients(model, projector.shares(0, "cpu"), names_of(model))

    def interrupt(_: Tensor) -> None:
        raise KeyboardInterrupt

    def step(where: str) -> None:
        with live:
            assert hooks_on(model)
            live.begin(2)
            out = model(torch.randn(2, 5))
            if where == "forward":
                raise KeyboardInterrupt
            live.expect()
            out.register_hook(interrupt)
            out.sum().backward()

    for where in ("forward", "backward"):
        with pytest.raises(KeyboardInterrupt):
            step(where)
        assert not hooks_on(model)
    with pytest.raises(FactorError, match="no module"), live:  # the trial's hooks as well
        find_layouts(model, names_of(model), lambda count: _fail())
    assert not hooks_on(model)


def _fail() -> None:
    raise FactorError("no module")


@pytest.mark.parametrize("how", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_are_not_looked_into(how: Callable[[nn.Module], nn.Module]) -> None:
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))
    projector = DropoutProjector.from_model(model, 10)
    live = LiveGradients(model, projector.shares(0, "cpu"), names_of(model))
    inputs = torch.randn(2, 5)

    def rows(other: Callable[[Tensor], Tensor]) -> Tensor:
        live.begin(2)
        loss = model(inputs).sum() + 0 * other(inputs).sum()
        live.expect()
        loss.backward()
        return live.end()

    with live:
        twin = how(model)
        assert torch.equal(twin(inputs), model(inputs))
        alone, together = rows(lambda given: given), rows(twin)
    assert torch.equal(alone, together)
    assert b"trak_dropout" not in pickle.dumps(twin)


def test_calls_out_of_order_are_refused() -> None:
    model = nn.Linear(3, 2)
    live = LiveGradients(
        model, DropoutProjector.from_model(model, 5).shares(0, "cpu"), names_of(model)
    )
    with live:
        with pytest.raises(RuntimeError, match="no batch has begun"):
            live.expect()
        live.begin(2)
        with pytest.raises(RuntimeError, match="end"):
            live.end()
        live.expect()
        with pytest.raises(RuntimeError, match="second backward"):
            live.expect()


def test_an_unknown_place_of_the_samples_is_refused() -> None:
    model = nn.Linear(3, 2)
    live = LiveGradients(
        model, DropoutProjector.from_model(model, 5).shares(0, "cpu"), names_of(model)
    )
    with live:
        live.begin(4)
        with pytest.raises(FactorError, match="find_layouts"):
            model(torch.randn(8, 4, 3))  # time first?
        live.begin(4)
        with pytest.raises(FactorError, match="find_layouts"):
            model(torch.randn(6, 3))


@pytest.mark.parametrize("case", CASES)
def test_the_trial_tells_the_reduction(case: str) -> None:
    build, loss, data = CASES[case]
    torch.manual_seed(7)
    model = build().double().eval()
    batch = data(3)
    names = names_of(model)
    shares = DropoutProjector.from_model(model, 50, dtype=torch.float64).shares(0, "cpu")
    layouts = find_layouts(model, names, lambda count: loss(model, data(count)))

    def mean(which: Any) -> Tensor:
        return loss(model, tuple(part[list(which)] for part in batch))

    assert check_samples(model, shares, names, layouts, mean) == "mean"
    summed = check_samples(model, shares, names, layouts, lambda w: len(w) * mean(w))
    assert summed == "sum"
    with pytest.raises(FactorError, match="depends on others"):
        check_samples(model, shares, names, layouts, lambda w: mean(w).square())


def test_rounding_over_a_kink_is_no_error() -> None:
    torch.manual_seed(0)
    model, x = nn.Linear(5, 7), torch.randn(3, 5)
    names = names_of(model)
    shares = DropoutProjector.from_model(model, 30, fold=1).shares(0, "cpu")

    def loss_of(which: Any, shift: float, weight: float) -> Tensor:
        y = model(x[list(which)])
        near = y - y.detach() + (shift if len(which) > 1 else -shift)
        return y.square().sum(1).mean() + weight * near.relu().sum(1).mean()

    layouts = find_layouts(model, names, lambda count: loss_of(range(count), 1e-9, 0.01))
    assert check_samples(model, shares, names, layouts, lambda w: loss_of(w, 1e-9, 0.01)) == "mean"
    for shift, weight in ((0.1, 0.01), (1e-9, 3.0)):  # another loss; more than a few units
        with pytest.raises(FactorError, match="depends on others"):
            check_samples(
                model, shares, names, layouts, lambda w, s=shift, b=weight: loss_of(w, s, b)
            )


def test_samples_that_change_places_are_noticed() -> None:
    """Two views one after the other: rows of the first half belong to other samples."""
    model = nn.Linear(3, 2).double()
    x = torch.randn(3, 3).double()
    shares = DropoutProjector.from_model(model, 8, dtype=torch.float64).shares(0, "cpu")

    def loss_of(which: Any) -> Tensor:
        some = x[list(which)]
        return model(torch.cat([some, 2 * some])).square().mean()

    layouts = find_layouts(model, names_of(model), lambda count: loss_of(range(count)))
    with pytest.raises(FactorError, match="depends on others"):
        check_samples(model, shares, names_of(model), layouts, loss_of)


@pytest.mark.parametrize("first", [0, 2], ids=["in their order", "in reverse"])
def test_samples_that_are_sorted_on_the_way_are_noticed(first: int) -> None:
    model = nn.Linear(3, 2).double()
    x = torch.randn(3, 3).double()
    x[:, 0] = torch.tensor([1.0, 2.0, 3.0]) if first == 0 else torch.tensor([3.0, 2.0, 1.0])
    shares = DropoutProjector.from_model(model, 8, dtype=torch.float64).shares(0, "cpu")

    def loss_of(which: Any) -> Tensor:
        some = x[list(which)]
        return model(some[some[:, 0].argsort()]).square().mean()

    layouts = find_layouts(model, names_of(model), lambda count: loss_of([0] * count))
    with pytest.raises(FactorError, match="samples change places"):
        check_samples(model, shares, names_of(model), layouts, loss_of)
