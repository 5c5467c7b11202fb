"""FactoredGradientComputer against autograd one sample at a time, on the models people have."""

from __future__ import annotations

import functools
import gc
import itertools
import weakref
from typing import Any

import pytest
import torch
from cases import convnet, digits, loader, mlp, quickstart, target_set, train_set
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import TensorDataset
from trak.modelout_functions import (
    AbstractModelOutput,
    ImageClassificationModelOutput,
    TextClassificationModelOutput,
)
from trak.projectors import BasicProjector

import trak_dropout as td
from trak_dropout import CausalLMOutput, FactoredGradientComputer, FactorError, LossOutput
from trak_dropout.gradients import Outer, rule
from trak_dropout.gradients.intake import Intake
from trak_dropout.gradients.rules import _RULES
from trak_dropout.outputs import batch_output_of

SCHEMES = ("dropout", "unit_dropout", "weighted_dropout")


class OneByOne(ImageClassificationModelOutput):
    """TRAK's margin as a task of which we know nothing: it runs under vmap."""


MARGIN, LOSS, MAPPED = (
    ImageClassificationModelOutput(),
    LossOutput(nn.functional.cross_entropy),
    OneByOne(),
)
TASKS = pytest.mark.parametrize("task", [MARGIN, LOSS, MAPPED], ids=["margin", "loss", "mapped"])


def oracle(model: nn.Module, task: Any, batch: Any) -> dict[str, Tensor]:
    """Per-sample gradients by autograd, each sample by itself."""
    rows = []
    for i in range(len(batch[0])):
        weights = {n: p.detach().clone().requires_grad_() for n, p in model.named_parameters()}
        buffers = dict(model.named_buffers())
        output = task.get_output(model, weights, buffers, *(part[i] for part in batch))
        grads = torch.autograd.grad(output, list(weights.values()), allow_unused=True)
        rows.append(
            [torch.zeros_like(w) if g is None else g for w, g in zip(weights.values(), grads)]  # noqa: B905
        )
    return {n: torch.stack(part) for n, part in zip(weights, zip(*rows), strict=True)}  # noqa: B905


def check(
    model: nn.Module, task: Any, batch: Any, tolerance: float = 1e-10, k: int = 24, **options: Any
) -> FactoredGradientComputer:
    """Compare kept coordinates of every scheme, and the gradients read as a mapping."""
    model.eval()
    expected = oracle(model, task, batch)
    scale = max(float(grad.abs().max()) for grad in expected.values() if grad.numel())
    computer = FactoredGradientComputer(model, task, **options)
    computer.compute_per_sample_grad([part[:2] for part in batch])  # settles and checks itself
    before = {n: p.requires_grad for n, p in model.named_parameters()}
    grads = computer.compute_per_sample_grad(batch)
    assert before == {n: p.requires_grad for n, p in model.named_parameters()}
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert list(grads) == list(expected)
    for name, grad in grads.items():
        assert grad.shape == expected[name].shape
        torch.testing.assert_close(grad, expected[name], rtol=0, atol=tolerance * scale + 1e-12)
    for scheme, fold in itertools.product(SCHEMES, (1, 3)):
        projector = td.DropoutProjector.from_model(
            model, k, 1, scheme, dtype=torch.float64, fold=fold
        )
        projector.calibrate([expected])
        taken, dense = projector.project(grads, 5), projector.project(expected, 5)
        bound = tolerance * float(dense.abs().max()) + 1e-12
        torch.testing.assert_close(taken, dense, rtol=0, atol=bound)
        for streaming in (computer, FactoredGradientComputer(model, task, **options)):
            rows = streaming.compute_into(batch, projector.shares(5, batch[0].device))
            rows = projector.finish(rows, 5)
            torch.testing.assert_close(rows, dense, rtol=0, atol=bound)
    return computer


def ways(computer: FactoredGradientComputer) -> dict[str, str]:
    """Parameter to the way that `describe` tells."""
    lines = computer.describe().splitlines()[1:-1]
    return {line.split()[0]: line[61:].strip().rsplit("  ", 1)[0].strip() for line in lines}


def images(n: int = 5, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    pixels, labels = digits()
    return pixels[:n].to(dtype), labels[:n]


class ResNet9(nn.Module):
    """The residual network of TRAK's examples, narrow; activations in place."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()

        def block(a: int, b: int, stride: int = 1, kernel: int = 3) -> nn.Module:
            convolution = nn.Conv2d(a, b, kernel, stride, kernel // 2, bias=False)
            return nn.Sequential(convolution, nn.BatchNorm2d(b), nn.ReLU(inplace=True))

        w = width
        self.stem = nn.Sequential(block(1, w), block(w, 2 * w, 2, 5))
        self.first = nn.Sequential(block(2 * w, 2 * w), block(2 * w, 2 * w))
        self.middle = nn.Sequential(block(2 * w, 4 * w), nn.MaxPool2d(2))
        self.second = nn.Sequential(block(4 * w, 4 * w), block(4 * w, 4 * w))
        self.last = nn.Sequential(block(4 * w, 2 * w), nn.AdaptiveMaxPool2d(1), nn.Flatten())
        self.head = nn.Linear(2 * w, 10, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.first(x)
        x = self.middle(x)
        x = x + self.second(x)
        return self.head(self.last(x))


class Zoo(nn.Module):
    """One of every layer with a rule, layers without, used and unused, once and repeatedly."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(1, 8, 3, stride=2, padding=2, dilation=2, padding_mode="circular")
        self.b = nn.Conv2d(8, 8, 3, groups=4, padding="same")
        self.group = nn.GroupNorm(2, 8)
        self.c = nn.Conv1d(8, 6, 2, groups=2, padding=1)
        self.flat = nn.BatchNorm1d(6)
        self.d = nn.Conv3d(1, 2, (1, 2, 3), padding=(0, 1, 0), bias=False)
        self.layer, self.rms = nn.LayerNorm((3, 6)), nn.RMSNorm(6)
        self.again = nn.Linear(6, 6)
        self.scale = nn.Parameter(torch.rand(6))
        self.bilinear = nn.Bilinear(6, 6, 5)
        self.out = nn.Linear(5, 10, bias=False)
        self.unused = nn.Linear(3, 3)
        self.tokens, self.places = nn.Embedding(17, 6, padding_idx=0), nn.Embedding(9, 6)

    def forward(self, x: Tensor) -> Tensor:
        tokens = (x.flatten(1)[:, :9] * 16).long()
        embedded = self.tokens(tokens) + self.places(torch.arange(9))
        h = torch.relu_(self.group(self.b(self.a(x))))
        h = self.flat(self.c(h.flatten(2)))[..., :12].reshape(len(x), 1, 4, 3, 6)
        h = self.d(h)[..., :6].sum((1, 2))
        h = nn.functional.pad(h, (0, 6 - h.shape[-1]))[:, :3]
        h = self.rms(self.again(self.again(self.layer(h)))) * self.scale
        h = h.mean(1) + embedded.mean(1)
        return self.out(self.bilinear(h, h))


class Adapter(nn.Module):
    """A frozen linear layer with a low-rank update beside it, as LoRA has it."""

    def __init__(self, base: nn.Linear, rank: int = 2) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down = nn.Linear(base.in_features, rank, bias=False)
        self.up = nn.Linear(rank, base.out_features, bias=False)
        nn.init.normal_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + 0.5 * self.up(self.down(x))


class Vit(nn.Module):
    """Patches, a class token and positions that are plain parameters, attention."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, 12, 4, 4)
        self.token = nn.Parameter(torch.randn(1, 1, 12))
        self.positions = nn.Parameter(torch.randn(1, 5, 12))
        layer = nn.TransformerEncoderLayer(12, 2, 24, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(12, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.positions
        return self.head(self.encoder(x)[:, 0])


# --- every rule, on real architectures ----------------------------------------------------------


@TASKS
@pytest.mark.parametrize("build", [mlp, convnet, ResNet9, Zoo, Vit])
def test_equals_autograd(build: Any, task: Any) -> None:
    torch.manual_seed(0)
    model = build().double()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            nn.init.uniform_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.uniform_(module.weight)
            nn.init.uniform_(module.bias)
    check(model, task, images())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@TASKS
def test_other_types(dtype: torch.dtype, task: Any) -> None:
    torch.manual_seed(0)
    model = ResNet9().to(dtype).eval()
    batch = images(dtype=dtype)
    grads = FactoredGradientComputer(model, task).compute_per_sample_grad(batch)
    assert all(grad.dtype is dtype for grad in grads.values())
    reference = ResNet9().double().eval()
    reference.load_state_dict({n: v.double() for n, v in model.state_dict().items()})
    expected = oracle(reference, task, (batch[0].double(), batch[1]))
    scale = max(float(grad.abs().max()) for grad in expected.values())
    for name, grad in expected.items():
        bound = 400 * torch.finfo(dtype).eps * scale if dtype is torch.float32 else 0.15 * scale
        torch.testing.assert_close(grads[name].double(), grad, rtol=0, atol=bound)


def language_models() -> dict[str, Any]:
    import transformers as tf

    shape = {"num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    shared = {"vocab_size": 50, "hidden_size": 12, "bos_token_id": 0, "eos_token_id": 0, **shape}
    gpt2 = tf.GPT2Config(
        vocab_size=50,
        n_positions=16,
        n_embd=12,
        n_layer=2,
        n_head=2,
        bos_token_id=0,
        eos_token_id=0,
    )
    neox = tf.GPTNeoXConfig(max_position_embeddings=16, **shared)
    tied = tf.GPTNeoXConfig(max_position_embeddings=16, tie_word_embeddings=True, **shared)
    return {
        "gpt2": lambda: tf.GPT2LMHeadModel(gpt2),
        "gpt_neox": lambda: tf.GPTNeoXForCausalLM(neox),
        "gpt_neox, tied": lambda: tf.GPTNeoXForCausalLM(tied),
        "llama": lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**shared)),
    }


def sequences() -> tuple[Tensor, Tensor]:
    """Tokens and mask of four sequences, two of them padded."""
    generator = torch.Generator().manual_seed(0)
    mask = torch.ones(4, 9, dtype=torch.long)
    mask[1, 6:] = mask[3, 3:] = 0
    return torch.randint(1, 50, (4, 9), generator=generator), mask


@pytest.mark.parametrize("name", ["gpt2", "gpt_neox", "gpt_neox, tied", "llama"])
def test_language_models(name: str) -> None:
    torch.manual_seed(0)
    model = language_models()[name]().double()
    computer = check(model, CausalLMOutput(), sequences())
    assert not any(way.startswith("exact") for way in ways(computer).values())
    if name == "gpt2":  # embeddings are tied to the head: contributions add
        assert ways(computer)["transformer.wte.weight"] == "rules of Embedding, Linear"


def test_gradients_that_cancel_are_no_mixed_samples() -> None:
    """The bias of attention's keys has no influence: in float32 its gradient is noise."""
    import transformers as tf

    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            shape = {"num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
            config = tf.BertConfig(vocab_size=50, hidden_size=32, num_labels=3, **shape)
            self.net = tf.BertForSequenceClassification(config)

        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
            return self.net(input_ids=input_ids, attention_mask=attention_mask).logits

    torch.manual_seed(0)
    model = Encoder().eval()
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(1, 50, (32, 48), generator=generator)
    batch = (tokens, torch.ones_like(tokens), torch.randint(0, 3, (32,), generator=generator))
    loss = LossOutput(nn.CrossEntropyLoss())
    grads = FactoredGradientComputer(model, loss).compute_per_sample_grad(batch)
    expected = oracle(model, loss, batch)
    overall = max(float(grad.abs().max()) for grad in expected.values())
    name = "net.bert.encoder.layer.0.attention.self.key.bias"
    assert float(expected[name].abs().max()) < 1e-5 * overall
    for name, grad in expected.items():
        torch.testing.assert_close(grads[name], grad, rtol=1e-3, atol=1e-5 * overall)


@pytest.mark.parametrize("batch_size", [2, 6, 20])
def test_a_bias_that_normalization_takes_out_is_no_mixed_sample(
    batch_size: int, caplog: pytest.LogCaptureFixture
) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1, padding_mode="reflect", groups=3),
        nn.InstanceNorm2d(6),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(6, 3),
    ).eval()
    computer = FactoredGradientComputer(model, LOSS)
    for _ in range(4):
        batch = torch.randn(batch_size, 3, 8, 8), torch.randint(3, (batch_size,))
        computer.compute_per_sample_grad(batch)
    assert "one forward on the whole batch" in computer.describe()
    assert not caplog.messages


def test_activation_checkpoints_and_autocast() -> None:
    torch.manual_seed(0)
    model = language_models()["gpt_neox"]()
    batch, task = sequences(), CausalLMOutput()
    plain = FactoredGradientComputer(model.eval(), task).compute_per_sample_grad(batch)
    model.gradient_checkpointing_enable()
    model.train()  # where the library checkpoints; there is no dropout in it
    again = FactoredGradientComputer(model, task).compute_per_sample_grad(batch)
    with torch.autocast("cpu", torch.bfloat16):
        rough = FactoredGradientComputer(model.eval(), task).compute_per_sample_grad(batch)
    for name in plain:
        torch.testing.assert_close(again[name], plain[name])
        torch.testing.assert_close(
            rough[name], plain[name], rtol=0, atol=0.1 * float(plain[name].abs().max()) + 2e-3
        )


def test_adapters_and_grad_wrt() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Flatten(), Adapter(nn.Linear(64, 9)), nn.Tanh(), Adapter(nn.Linear(9, 10))
    ).double()
    check(model, MARGIN, images())
    wanted = [name for name, p in model.named_parameters() if p.requires_grad]
    computer = FactoredGradientComputer(model, LOSS, grad_wrt=wanted)
    grads = computer.compute_per_sample_grad(images())
    expected = oracle(model, LOSS, images())
    assert list(grads) == wanted
    for name in wanted:
        torch.testing.assert_close(grads[name], expected[name])


@pytest.mark.parametrize("task", [MARGIN, LOSS], ids=["margin", "loss"])
def test_adapters_behind_an_input_that_asks_for_gradients(task: Any) -> None:
    """As Hugging Face's ``enable_input_require_grads`` makes it ask, for checkpoints and PEFT."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), Adapter(nn.Linear(64, 9)), Adapter(nn.Linear(9, 10)))
    model.double().eval()
    model[0].register_forward_hook(lambda module, args, output: output.requires_grad_())
    expected = oracle(model, task, images())
    wanted = [name for name, p in model.named_parameters() if p.requires_grad]
    computer = FactoredGradientComputer(model, task, grad_wrt=wanted)
    projector = td.DropoutProjector.from_model(model, 16, dtype=torch.float64, grad_wrt=wanted)
    for _ in range(3):
        grads = computer.compute_per_sample_grad(images())
        for name in wanted:
            torch.testing.assert_close(grads[name], expected[name])
        rows = computer.compute_into(images(), projector.shares(0, torch.device("cpu")))
        dense = {name: expected[name] for name in wanted}
        torch.testing.assert_close(projector.finish(rows, 0), projector.project(dense, 0))
    assert "run as one forward" in computer.describe()


def test_grad_wrt_flows_back_no_further_than_needed() -> None:
    class Counted(torch.autograd.Function):
        calls = 0

        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, g: Tensor) -> Tensor:
            Counted.calls += 1
            return g

    class Count(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return Counted.apply(x)

    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), Count(), nn.Linear(8, 10)).eval()
    batch = images(dtype=torch.float32)
    for names, flows in ((["3.weight"], False), (["1.bias"], True)):
        Counted.calls = 0
        computer = FactoredGradientComputer(model, LOSS, grad_wrt=names, self_check=False)
        computer.compute_per_sample_grad(batch)
        assert (Counted.calls > 0) == flows


@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_convolutions_of_all_shapes(data: st.DataObject) -> None:
    draw = data.draw
    axes, groups = draw(st.integers(1, 3)), draw(st.sampled_from([1, 2, 3]))
    few = st.integers(1, 2)
    kernel = tuple(draw(st.integers(1, 3)) for _ in range(axes))
    options: dict[str, Any] = {
        "stride": tuple(draw(few) for _ in range(axes)),
        "dilation": tuple(draw(few) for _ in range(axes)),
        "padding": tuple(draw(st.integers(0, min(2, k))) for k in kernel),
        "groups": groups,
        "bias": draw(st.booleans()),
        "padding_mode": draw(st.sampled_from(["zeros", "reflect", "replicate", "circular"])),
    }
    if draw(st.booleans()):
        options |= {"padding": "same", "stride": 1}
    kind = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[axes - 1]
    torch.manual_seed(0)
    layer = kind(groups * draw(few), groups * draw(few), kernel, **options).double()
    size = tuple(draw(st.integers(5, 6)) for _ in range(axes))
    batch = (
        torch.randn(draw(st.integers(1, 3)), layer.in_channels, *size, dtype=torch.float64),
        torch.zeros(3, dtype=torch.float64),
    )
    batch = (batch[0], batch[1][: len(batch[0])])
    task = LossOutput(lambda output, target: (output.sin() * (1 + target.sum())).sum())
    check(nn.Sequential(layer), task, batch, k=1)


def test_groups_of_a_convolution_with_a_single_position() -> None:
    torch.manual_seed(0)
    layer = nn.Conv1d(4, 2, 3, groups=2, dilation=2).double()
    batch = (torch.randn(2, 4, 5, dtype=torch.float64), torch.zeros(2, dtype=torch.float64))
    task = LossOutput(lambda output, target: (output.sin() * (1 + target.sum())).sum())
    check(nn.Sequential(layer), task, batch, k=1)


@settings(deadline=None, max_examples=40)
@given(data=st.data())
def test_products_and_tables_of_all_shapes(data: st.DataObject) -> None:
    draw = data.draw
    small = st.integers(1, 6)
    b, t, i, o = (draw(small) for _ in range(4))
    torch.manual_seed(0)
    padding = draw(st.sampled_from([None, 0]))
    model = nn.Sequential(
        nn.Embedding(draw(st.integers(2, 9)), i, padding_idx=padding),
        nn.Linear(i, o),
        nn.LayerNorm(o),
    ).double()
    tokens = torch.randint(0, model[0].num_embeddings, (b, t))
    task = LossOutput(lambda output, target: (output.sin() * target).sum())
    check(model, task, (tokens, torch.randn(b, t, o, dtype=torch.float64)), k=1)


@pytest.mark.parametrize("budget", [1, 3000, 10**5])
def test_budgets_give_the_same(budget: int) -> None:
    torch.manual_seed(0)
    check(Zoo().double(), LOSS, images(), budget=budget)
    check(ResNet9().double(), MARGIN, images(), budget=budget)


# --- behind TRAK --------------------------------------------------------------------------------


class TextClassifier(nn.Module):
    """Takes what TRAK's text classification gives."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(50, 8)
        self.types = nn.Embedding(2, 8)
        self.mix = nn.Linear(8, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, input_ids: Tensor, token_type_ids: Tensor, attention_mask: Tensor) -> Tensor:
        x = self.tokens(input_ids) + self.types(token_type_ids)
        x = x + torch.tanh(self.mix(x))
        weights = attention_mask.unsqueeze(-1)
        return self.head((x * weights).sum(1) / weights.sum(1))


def test_same_scores_as_with_traks_computer(tmp_path: Any) -> None:
    torch.manual_seed(0)
    text = TextClassifier()
    ids = torch.randint(0, 50, (60, 7))
    parts = (ids, ids % 2, (torch.rand(60, 7) < 0.8).long().index_fill(1, torch.tensor([0]), 1))
    data = TensorDataset(*parts, ids.sum(1) % 3)
    cases = [
        (convnet(), "image_classification", train_set(60), target_set(20)),
        (mlp(), ImageClassificationModelOutput(), train_set(60), target_set(20)),
        (text, "text_classification", data, TensorDataset(*data[:20])),
        (text, TextClassificationModelOutput(), data, TensorDataset(*data[:20])),
    ]
    for i, (model, task, train, targets) in enumerate(cases):
        model.eval()
        found = {}
        for computer in (None, FactoredGradientComputer):
            options = {} if computer is None else {"gradient_computer": computer}
            _, found[computer] = quickstart(
                model,
                [model.state_dict()],
                tmp_path / f"{i}{computer}",
                loader(train),
                loader(targets),
                task,
                60,
                20,
                use_half_precision=False,
                projector=td.DropoutProjector.from_model(model, 40, 0),
                lambda_reg=1.0,
                **options,
            )
        theirs, ours = found[None], found[FactoredGradientComputer]
        assert abs(ours - theirs).max() < 1e-4 * abs(theirs).max()


def test_another_projector_reads_a_dict() -> None:
    model, batch = convnet().eval(), images(dtype=torch.float32)
    grads = FactoredGradientComputer(model, MARGIN).compute_per_sample_grad(batch)
    dense = td.DenseGradientComputer(model, MARGIN).compute_per_sample_grad(batch)
    p = sum(parameter.numel() for parameter in model.parameters())
    projector = BasicProjector(p, 16, 0, "rademacher", "cpu", block_size=8)
    torch.testing.assert_close(projector.project(grads, 0), projector.project(dense, 0))
    assert isinstance(grads, dict)
    assert len(grads) == len(dense)
    assert "0.weight" in grads
    assert grads.get("no such") is None
    assert set(grads.copy()) == set(dense)
    with pytest.raises(TypeError, match="read-only"):
        grads["0.weight"] = dense["0.weight"]


def test_calibration_reads_factors() -> None:
    model, batch = convnet().eval(), images(20, torch.float32)
    dense = td.DenseGradientComputer(model, MARGIN).compute_per_sample_grad(batch)
    computer = FactoredGradientComputer(model, MARGIN, budget=10**4)
    found = []
    for grads in (dense, computer.compute_per_sample_grad(batch)):
        projector = td.DropoutProjector.from_model(model, 16, 0, "weighted_dropout")
        projector.calibrate([grads])
        found.append(projector.statistics[None])
    assert found[0].samples == found[1].samples == 20
    for axis in ("rows", "columns"):
        for a, b in zip(getattr(found[0], axis), getattr(found[1], axis), strict=True):
            torch.testing.assert_close(
                torch.from_numpy(a), torch.from_numpy(b), rtol=1e-4, atol=1e-9
            )


def test_nothing_of_the_size_of_the_gradients_is_allocated() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 1500), nn.ReLU(), nn.Linear(1500, 10)).eval()
    computer = FactoredGradientComputer(model, MARGIN, self_check=False)
    projector = td.DropoutProjector.from_model(model, 64, 0)
    batch = [part.clone() for part in images(16, torch.float32)]
    projector.project(computer.compute_per_sample_grad(batch), 0)

    weights = {parameter.data_ptr() for parameter in model.parameters()}

    class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
        largest = 0

        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            result = func(*args, **(kwargs or {}))
            for value in torch.utils._pytree.tree_leaves(result):
                if isinstance(value, Tensor) and value.data_ptr() not in weights:
                    Sizes.largest = max(Sizes.largest, value.untyped_storage().nbytes() // 4)
            return result

    with Sizes():
        projector.project(computer.compute_per_sample_grad(batch), 0)
    assert 16 * 1500 <= Sizes.largest < 64 * 1500  # not even one weight gradient


def test_gradients_of_the_models_own_parameters_are_left_alone() -> None:
    model = nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    penalized = LossOutput(lambda y, t: (y - t).square().sum() + model[0].weight.square().sum())
    FactoredGradientComputer(model, penalized).compute_per_sample_grad((noise(3, 6), noise(3, 2)))
    assert all(weight.grad is None for weight in model.parameters())


def test_streamed_factors_are_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    layers = [nn.Sequential(nn.Linear(6, 6), nn.Tanh()) for _ in range(8)]
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(24, 2)).double()
    batch = (noise(7, 4, 6), noise(7, 2))
    shares = td.DropoutProjector.from_model(model, 300, 1).shares(0, "cpu")
    computer = FactoredGradientComputer(model, SQUARES)
    computer.compute_into(batch, shares)
    computer.compute_into(batch, shares)  # the third is not checked
    seen, alive, add = [], [], Intake.add

    def watched(self: Intake, name: str, gradient: Any) -> None:
        if gradient.single() is None:
            seen.append(weakref.ref(gradient.factors[0]))
        alive.append(sum(factor() is not None for factor in seen))
        add(self, name, gradient)

    monkeypatch.setattr(Intake, "add", watched)
    computer.compute_into(batch, shares)
    assert len(seen) == 16
    assert max(alive) <= 2  # those of one layer


@TASKS
@pytest.mark.parametrize("build", [mlp, convnet])
def test_a_batch_is_freed_without_pythons_collector(build: Any, task: Any) -> None:
    model, batch = build().eval(), images(5, torch.float32)
    computers = FactoredGradientComputer(model, task), td.DenseGradientComputer(model, task)
    projector = td.DropoutProjector.from_model(model, 64, 0)
    gc.collect()
    gc.disable()
    try:
        for _ in range(2):  # the first one is checked as well
            for computer in computers:
                projector.project(computer.compute_per_sample_grad(batch), 0)
                computer.compute_loss_grad(batch)
            computers[0].compute_into(batch, projector.shares(0, "cpu"))
        gc.set_debug(gc.DEBUG_SAVEALL)  # what only the collector would have freed
        gc.collect()
        held = [value.shape for value in gc.garbage if isinstance(value, Tensor)]
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.enable()
    assert not held


# --- what must not give wrong numbers -----------------------------------------------------------


def test_batch_normalization_in_training_mode_is_refused() -> None:
    with pytest.raises(FactorError, match=r"1 is a BatchNorm2d .* model.eval\(\)"):
        FactoredGradientComputer(convnet().train(), MARGIN).compute_per_sample_grad(images())


class Mixing(nn.Module):
    """Subtracts the mean over the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        y = self.inner(x.flatten(1))
        return y - 0.5 * y.mean(0) if len(x) > 1 else y


def test_an_output_that_mixes_samples_is_found(caplog: pytest.LogCaptureFixture) -> None:
    # One sample at a time, as TRAK runs it, there is nothing to mix.
    assert "vmap" in check(Mixing().double(), LOSS, images()).describe()
    assert "do not stay apart" in caplog.text
    assert "FactoredGradientComputer runs one at a time with batched=False" in caplog.text
    assert "before it" not in caplog.text

    class Branching(Mixing):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * (2 if bool((x > 0).any()) else 1)

    with pytest.raises(FactorError, match="do not stay apart where inner"):
        FactoredGradientComputer(Branching().double(), LOSS).compute_per_sample_grad(images())


class InPlace(nn.Module):
    """Changes the output of a layer, or what it was given, in place."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.what = what
        self.first, self.second = nn.Linear(64, 10), nn.Linear(10, 10)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x.flatten(1))
        if self.what == "output":
            h.mul_(2).add_(1)
            h[:, :2] += 1
        y = self.second(h)
        if self.what == "input":
            h.mul_(3)
        return y + h


@TASKS
def test_changes_in_place(task: Any) -> None:
    torch.manual_seed(0)
    check(InPlace("output").double(), task, images())
    with pytest.raises(FactorError, match=r"second was given has been changed in place"):
        FactoredGradientComputer(InPlace("input").double(), task).compute_per_sample_grad(images())


class Reader(nn.Module):
    """Reads the weight of a layer that it also calls."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(64, 64)
        self.head = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        h = self.inner(x.flatten(1)).tanh()
        h = nn.functional.linear(h, self.inner.weight.T @ self.inner.weight)
        return self.head(h)


@TASKS
def test_weights_read_by_others_are_formed(task: Any) -> None:
    torch.manual_seed(0)
    computer = check(Reader().double(), task, images())
    assert ways(computer)["inner.weight"].startswith("exact")
    assert ways(computer)["inner.bias"] == "rule of Linear"
    if task is not MAPPED:  # a data-dependent branch does not run under vmap

        class Branching(Reader):
            def forward(self, x: Tensor) -> Tensor:
                return super().forward(x) * (2 if bool((x > 0).any()) else 1)

        computer = check(Branching().double(), task, images())
        assert "each sample by itself" in computer.describe()


class SequenceFirst(nn.Module):
    """Layers that see the batch in another dimension, merged with others, or not at all."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(8, 6), nn.Linear(6, 6), nn.Linear(6, 10)
        self.places = nn.Embedding(8, 6)

    def forward(self, x: Tensor) -> Tensor:
        b = len(x)
        h = self.a(x[:, 0].transpose(0, 1))  # (T, B, ·)
        h = self.b(h.transpose(0, 1).reshape(-1, 6)).tanh()  # (B T, ·)
        h = h.view(b, 8, 6) + self.places(torch.arange(8))
        return self.c(h.mean(1))


def test_batch_in_other_dimensions() -> None:
    torch.manual_seed(0)
    for n in (5, 8):  # with 8 samples every dimension could be the batch
        computer = check(SequenceFirst().double(), LOSS, images(n))
        assert "whole batch" in computer.describe()
        check(SequenceFirst().double(), MARGIN, images(n))


@pytest.mark.parametrize("seed", range(4))
def test_layers_that_get_some_samples_by_their_content(seed: int) -> None:
    torch.manual_seed(seed)

    def routed(net: Any, x: Tensor) -> Tensor:
        shares = net.gate(x).softmax(1)
        out = torch.zeros_like(x)
        for i, expert in enumerate(net.experts):
            mine = shares.argmax(1) == i
            if mine.any():
                out[mine] = expert(x[mine]) * shares[mine, i : i + 1]
        return net.out(out)

    experts = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
    model = Net(routed, gate=nn.Linear(4, 3), experts=experts, out=nn.Linear(4, 2))
    computer = follow(model, *(squared(n, 4) for n in (5, 3, 1, 9, 5)))
    assert ways(computer)["gate.weight"] == "rule of Linear"
    assert any("exact" in way for way in ways(computer).values())


def test_a_sequence_of_a_layers_calls_that_changes_later(caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)

    def routed(net: Any, x: Tensor) -> Tensor:
        return net.out(net.rare(x).tanh() if x.sum() > 50 else x)

    model = Net(routed, rare=nn.Linear(4, 4), out=nn.Linear(4, 2))
    near, far = squared(3, 4), (noise(3, 4) + 99, noise(3, 2))
    follow(model, near, near, far, near, far)
    assert "rare is called at another point" in caplog.text


def test_a_model_without_vmap_is_told_to_run_whole_batches() -> None:
    class Last(nn.LSTM):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x)[0][:, -1]

    class Whole(OneByOne):
        get_batch_output = staticmethod(batch_output_of(MARGIN))

    model = nn.Sequential(Last(3, 4, batch_first=True), nn.Linear(4, 3)).double()
    batch = noise(3, 5, 3), torch.arange(3)
    for task, options in ((MAPPED, {}), (LOSS, {"batched": False})):
        computer = FactoredGradientComputer(model, task, **options)
        with pytest.raises(td.BatchError, match="not under torch.func.vmap.*get_batch_output"):
            computer.compute_per_sample_grad(batch)
    check(model, Whole(), batch)


class Permuted(nn.Module):
    """Hands a layer the samples in another order."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x.flatten(1).flip(0)).flip(0)


def test_samples_in_another_order_are_found() -> None:
    assert "vmap" in check(Permuted().double(), LOSS, images()).describe()


class Overridden(nn.Linear):
    """Is not the linear layer that it derives from."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight * 2, self.bias) ** 2


@TASKS
def test_layers_that_are_not_what_they_derive_from(task: Any) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), Overridden(64, 10)).double()
    assert "rule" not in ways(check(model, task, images()))["1.weight"]
    normed = nn.Sequential(nn.Flatten(), nn.utils.parametrizations.weight_norm(nn.Linear(64, 10)))
    check(normed.double(), task, images())


def test_user_rules_and_wrong_ones() -> None:
    class Doubled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(10, 64))

        def forward(self, x: Tensor) -> Tensor:
            return 2 * x @ self.weight.T

    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), Doubled()).double()
    assert ways(check(model, LOSS, images()))["1.weight"] == "Doubled run again"
    try:

        @rule(Doubled, "weight")
        def right(module: Any, inputs: Any, gradient: Any) -> Any:
            x, g = inputs[0].flatten(1, -2), gradient.flatten(1, -2)
            return {"weight": Outer(2 * g, x)}

        for task in (LOSS, MAPPED):
            assert ways(check(model, task, images()))["1.weight"] == "rule of Doubled"

        @rule(Doubled, "weight")
        def wrong(module: Any, inputs: Any, gradient: Any) -> Any:
            return {"weight": Outer(gradient.flatten(1, -2), inputs[0].flatten(1, -2))}

        with pytest.raises(FactorError, match=r"gradient of 1\.weight .* differs"):
            FactoredGradientComputer(model, LOSS).compute_per_sample_grad(images())
        check(model, LOSS, images(), exact=["1.weight"])
    finally:
        _RULES.pop(Doubled, None)
    with pytest.raises(TypeError, match="layer"):
        rule(3, "weight")
    with pytest.raises(ValueError, match="parameters"):
        rule(Doubled)


def test_hooks_of_the_user_come_after_ours() -> None:
    torch.manual_seed(0)
    model = mlp().double()
    handle = model[1].register_forward_hook(lambda module, args, output: output * 3)
    try:
        computer = FactoredGradientComputer(model.eval(), LOSS)
        grads, expected = computer.compute_per_sample_grad(images()), oracle(model, LOSS, images())
        for name in expected:
            torch.testing.assert_close(grads[name], expected[name])
    finally:
        handle.remove()


def test_checkpoint_of_a_first_layer() -> None:
    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.head = nn.Linear(64, 12), nn.Linear(12, 10)

        def forward(self, x: Tensor) -> Tensor:
            h = checkpoint(lambda x: self.first(x.flatten(1)).tanh(), x, use_reentrant=False)
            return self.head(h)

    torch.manual_seed(0)
    check(Checkpointed().double(), LOSS, images())


@pytest.mark.parametrize("task", [LOSS, MAPPED], ids=["loss", "mapped"])
def test_layers_of_no_width(task: Any) -> None:
    def forward(net: Any, x: Tensor) -> Tensor:
        nothing = net.prelu(net.inner(x) + net.table((x[:, 0] > 0).long()))
        return net.out(torch.cat([x, nothing], 1)) + net.back(nothing)

    layers = {"inner": nn.Linear(4, 0), "back": nn.Linear(0, 10), "table": nn.Embedding(2, 0)}
    model = Net(forward, **layers, prelu=nn.PReLU(0), out=nn.Linear(4, 10)).double()
    check(model, task, (noise(5, 4), torch.arange(5)))


def test_a_gradient_that_is_formed_on_other_batches_only() -> None:
    torch.manual_seed(0)
    model = mlp().double()
    projector = td.DropoutProjector.from_model(model, 24, 1, dtype=torch.float64)
    expected = projector.project(oracle(model, LOSS, images()), 0)
    for exact in ((), ["1.weight"], ["1.weight", "3.weight"], ()):
        computer = FactoredGradientComputer(model, LOSS, exact=exact)
        rows = projector.project(computer.compute_per_sample_grad(images()), 0)
        torch.testing.assert_close(rows, expected)


def test_errors_and_edges() -> None:
    model = mlp().eval()
    computer = FactoredGradientComputer(model, MARGIN)
    empty = computer.compute_per_sample_grad([part[:0] for part in images(dtype=torch.float32)])
    assert empty["1.weight"].shape == (0, 32, 64)
    projector = td.DropoutProjector.from_model(model, 16)
    assert projector.project(empty, 0).shape == (0, 16)
    with pytest.raises(td.BatchError, match="takes a tuple of tensors"):
        computer.compute_per_sample_grad(images()[0])
    with pytest.raises(ValueError, match="exact names nothing"):
        FactoredGradientComputer(model, MARGIN, exact=["nothing"])
    assert "before the first batch" in computer.describe()

    class Vector(AbstractModelOutput):
        def __init__(self) -> None: ...

        def get_output(self, model: Any, weights: Any, buffers: Any, image: Any, label: Any) -> Any:
            return torch.func.functional_call(model, (weights, buffers), (image[None],))[0]

        def get_out_to_loss_grad(self, *args: Any) -> Any: ...

    with pytest.raises(FactorError, match=r"returned shape \(10,\)"):
        FactoredGradientComputer(model, Vector()).compute_per_sample_grad(
            images(dtype=torch.float32)
        )


def test_takes_up_weights_loaded_later() -> None:
    torch.manual_seed(0)
    model, other = mlp().double().eval(), mlp().double()
    computer = FactoredGradientComputer(model, LOSS)
    computer.compute_per_sample_grad(images())
    model.load_state_dict(other.state_dict())
    computer.load_model_params(model)
    expected = oracle(other.eval(), LOSS, images())
    for name, grad in computer.compute_per_sample_grad(images()).items():
        torch.testing.assert_close(grad, expected[name])


# --- later batches that are not like the first --------------------------------------------------


class Net(nn.Module):
    """A forward function with the layers that it uses."""

    def __init__(self, forward: Any, **layers: nn.Module) -> None:
        super().__init__()
        for name, layer in layers.items():
            setattr(self, name, layer)
        self.run = forward

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.run(self, *inputs)


SQUARES = LossOutput(lambda output, target: (output - target).square().sum())


def follow(model: nn.Module, *batches: Any, **options: Any) -> FactoredGradientComputer:
    """Compare one batch after another, with the same computer."""
    computer = FactoredGradientComputer(model.double().eval(), SQUARES, **options)
    streaming = FactoredGradientComputer(model, SQUARES, **options)
    projector = td.DropoutProjector.from_model(model, 8, 1, dtype=torch.float64, fold=3)
    shares = projector.shares(0, "cpu")
    for batch in batches:
        grads, expected = computer.compute_per_sample_grad(batch), oracle(model, SQUARES, batch)
        for name in expected:
            torch.testing.assert_close(grads[name], expected[name])
        rows = projector.finish(streaming.compute_into(batch, shares), 0)
        torch.testing.assert_close(rows, projector.project(expected, 0))
    return computer


def noise(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def squared(n: int, *shape: int) -> tuple[Tensor, Tensor]:
    return noise(n, *shape), noise(n, 2)


def test_lengths_that_change() -> None:
    torch.manual_seed(0)

    def places(net: Any, x: Tensor) -> Tensor:
        return net.out((x + net.table(torch.arange(x.shape[1]))).tanh().sum(1))

    def flattened(net: Any, x: Tensor) -> Tensor:
        return net.out(net.inner(x.reshape(-1, 3)).view(len(x), -1, 4).sum(1))

    def tied(net: Any, x: Tensor) -> Tensor:
        h = net.inner(x).tanh()
        h = nn.functional.linear(h, net.inner.weight) if x.shape[1] > 2 else h
        return net.out(h.sum(1))

    batches = [squared(n, t, 3) for n, t in ((3, 3), (3, 1), (1, 1), (4, 4), (2, 3))]
    follow(Net(places, table=nn.Embedding(8, 3), out=nn.Linear(3, 2)), *batches)
    follow(Net(places, table=nn.Embedding(8, 3), out=nn.Linear(3, 2)), *batches[::-1])
    follow(Net(flattened, inner=nn.Linear(3, 4), out=nn.Linear(4, 2)), *batches)
    follow(Net(tied, inner=nn.Linear(3, 3), out=nn.Linear(3, 2)), squared(3, 2, 3), *batches)


def test_a_first_batch_of_one_sample() -> None:
    torch.manual_seed(0)

    def siamese(net: Any, x: Tensor, y: Tensor) -> Tensor:
        a, b = net.inner(torch.cat([x, y])).tanh().chunk(2)
        return net.out(a * b)

    def centered(net: Any, x: Tensor) -> Tensor:
        h = net.inner(x).tanh()
        return net.out(h + h.mean(0, keepdim=True)) if len(x) > 1 else net.out(2 * h)

    layers = {"inner": nn.Linear(3, 4), "out": nn.Linear(4, 2)}
    follow(Net(siamese, **layers), *[(noise(n, 3), *squared(n, 3)) for n in (1, 4)])
    follow(Net(centered, **layers), squared(1, 3), squared(4, 3))


def test_samples_that_change_places_later() -> None:
    torch.manual_seed(0)

    def by_length(net: Any, x: Tensor, lengths: Tensor) -> Tensor:
        order = lengths.argsort(descending=True)
        return net.out(net.inner(x[order]).tanh()[order.argsort()])

    def batch(*lengths: int) -> Any:
        return noise(len(lengths), 3), torch.tensor(lengths), noise(len(lengths), 2)

    layers = {"inner": nn.Linear(3, 4), "out": nn.Linear(4, 2)}
    follow(Net(by_length, **layers), batch(9, 8, 3, 6, 1))  # seen on the first batch
    with pytest.raises(FactorError, match="do not stay apart where inner"):
        follow(Net(by_length, **layers), batch(9, 8, 7), batch(2, 4, 3))
    model = Net(by_length, **layers).double()
    shares = td.DropoutProjector.from_model(model, 8, 1).shares(0, "cpu")
    streaming = FactoredGradientComputer(model, SQUARES)
    streaming.compute_into(batch(9, 8, 7), shares)
    with pytest.raises(FactorError, match="do not stay apart: the output of one"):
        streaming.compute_into(batch(2, 4, 3), shares)
    follow(Net(by_length, **layers), batch(9, 8, 7), batch(2, 4, 3), batched=False)


def test_samples_that_meet_at_other_weights_only() -> None:
    torch.manual_seed(0)

    def meeting(net: Any, x: Tensor) -> Tensor:
        hidden = net.inner(x)
        if len(x) > 3:  # more than are compared with autograd
            hidden = hidden + net.out.bias[0].relu() * hidden.mean(0)
        return net.out(hidden.tanh())

    model = Net(meeting, inner=nn.Linear(3, 4), out=nn.Linear(4, 2)).double().eval()
    batch, names = (noise(9, 3), noise(9, 2)), ["inner.weight", "inner.bias"]
    shares = td.DropoutProjector.from_model(model, 10, 1, grad_wrt=names).shares(0, "cpu")
    nn.init.constant_(model.out.bias, -1.0)
    computer = FactoredGradientComputer(model, SQUARES, grad_wrt=names)
    for _ in range(2):  # the third is checked for the sake of its weights only
        computer.compute_into(batch, shares)
    nn.init.constant_(model.out.bias, 1.0)
    computer.load_model_params(model)
    by_one = FactoredGradientComputer(model, SQUARES, grad_wrt=names, batched=False)
    torch.testing.assert_close(
        computer.compute_into(batch, shares), by_one.compute_into(batch, shares)
    )


def test_a_weight_read_behind_its_layer_at_other_weights_only() -> None:
    torch.manual_seed(0)

    def reading(net: Any, x: Tensor) -> Tensor:
        hidden = net.inner(x).tanh()
        if net.out.bias[0] > 0:
            hidden = nn.functional.linear(hidden, net.inner.weight)
        return net.out(hidden)

    model = Net(reading, inner=nn.Linear(3, 3), out=nn.Linear(3, 2)).double().eval()
    nn.init.constant_(model.out.bias, -1.0)
    batch = (noise(9, 3), noise(9, 2))
    projector = td.DropoutProjector.from_model(model, 12, 1, dtype=torch.float64)
    computer = FactoredGradientComputer(model, SQUARES)
    for bias in (-1.0, -1.5, 1.0, 1.5, -1.0):
        nn.init.constant_(model.out.bias, bias)
        computer.load_model_params(model)
        rows = projector.finish(computer.compute_into(batch, projector.shares(0, "cpu")), 0)
        expected = oracle(model, SQUARES, batch)
        torch.testing.assert_close(rows, projector.project(expected, 0))


def test_a_weight_read_behind_its_layer_on_later_batches_only() -> None:
    torch.manual_seed(0)

    def reading(net: Any, x: Tensor) -> Tensor:
        hidden = net.inner(x)
        if x.mean() > 5:
            hidden = hidden + nn.functional.linear(x, net.inner.weight)
        return net.out(hidden.tanh())

    def batch(at: float) -> tuple[Tensor, Tensor]:
        return noise(6, 3) / 5 + at, noise(6, 2)

    model = Net(reading, inner=nn.Linear(3, 4), out=nn.Linear(4, 2)).double().eval()
    nn.init.uniform_(model.inner.weight, -0.05, 0.05)
    shares = td.DropoutProjector.from_model(model, 8, 1).shares(0, "cpu")
    for streamed, before in itertools.product((False, True), (1, 3, 7)):
        computer = FactoredGradientComputer(model, SQUARES)
        for _ in range(before):
            computer.compute_per_sample_grad(batch(0.0))
        compute = (
            functools.partial(computer.compute_into, shares=shares)
            if streamed
            else computer.compute_per_sample_grad
        )
        with pytest.raises(FactorError, match="inner.weight.*before it may be wrong, too"):
            compute(batch(9.0))
    follow(model, *map(batch, (0.0, 9.0, 9.0)), exact=["inner.weight"])


def test_zero_gradients_and_other_models_are_checked_again() -> None:
    torch.manual_seed(0)

    def siamese(net: Any, x: Tensor, y: Tensor) -> Tensor:
        a, b = net.inner(torch.cat([x, y])).tanh().chunk(2)
        return net.out(a * b)

    batch = (noise(4, 3), *squared(4, 3))
    model = Net(siamese, inner=nn.Linear(3, 4), out=nn.Linear(4, 2)).double().eval()
    nn.init.zeros_(model.out.weight)
    computer = FactoredGradientComputer(model, SQUARES)
    computer.compute_per_sample_grad(batch)
    nn.init.normal_(model.out.weight)
    computer.load_model_params(model)
    found, expected = computer.compute_per_sample_grad(batch), oracle(model, SQUARES, batch)
    torch.testing.assert_close(found["inner.weight"], expected["inner.weight"])

    first, second = (
        nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2), nn.PReLU())
        .double()
        .eval()
        for _ in range(2)
    )
    second[1].running_mean.normal_()
    batch = squared(3, 3)
    computer = FactoredGradientComputer(first, SQUARES)
    computer.compute_per_sample_grad(batch)
    computer.load_model_params(second)
    expected = oracle(second, SQUARES, batch)
    for name, grad in computer.compute_per_sample_grad(batch).items():
        torch.testing.assert_close(grad, expected[name])


def test_layers_without_rule_given_more_than_tensors() -> None:
    torch.manual_seed(0)

    class Power(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(3))

        def forward(self, x: Tensor, k: float = 1.0) -> Tensor:
            return x * (self.weight * k).exp()

    class Pair(Power):
        def forward(self, x: Tensor, k: float = 1.0) -> Any:
            return x * self.weight, k

    def run(net: Any, x: Tensor) -> Tensor:
        return net.out(net.power(x, 1.0 if x.shape[1] < 4 else 2.0).sum(1))

    def pair(net: Any, x: Tensor) -> Tensor:
        return net.out(net.power(x)[0].sum(1)) * (2 if bool((x == x).all()) else 1)

    batches = squared(3, 3, 3), squared(3, 5, 3)
    follow(Net(run, power=Power(), out=nn.Linear(3, 2)), *batches)
    follow(Net(pair, power=Pair(), out=nn.Linear(3, 2)), *batches)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_out_to_loss_gradients_take_no_second_forward(temperature: float) -> None:
    calls = []

    class Counted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = mlp()

        def forward(self, images: Tensor) -> Tensor:
            calls.append(len(images))
            return self.net(images)

    model = Counted().eval()
    task = ImageClassificationModelOutput(temperature)
    computer = FactoredGradientComputer(model, task, 0)
    batches = [[part[i : i + 9] for part in train_set().tensors] for i in (0, 9)]
    for batch in batches:  # the first one is checked as well
        computer.compute_per_sample_grad(batch)
        before = len(calls)
        ours = computer.compute_loss_grad(batch)
        assert len(calls) == before + (temperature != 1.0)
        theirs = task.get_out_to_loss_grad(
            model, dict(model.named_parameters()), dict(model.named_buffers()), batch
        )
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    # Of another batch, and a second time, it is computed.
    assert computer.compute_loss_grad(batches[0]).shape == (9, 1)
    other = computer.compute_loss_grad([part.clone() for part in batches[1]])
    torch.testing.assert_close(other, theirs, rtol=1e-5, atol=1e-6)
