"""Embeddings for `InfluenceNetwork`: of a model's penultimate layer, or of texts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor, nn

from trak_dropout._checks import check_integer, check_model
from trak_dropout.attribution import own_precision, preserved, to_device
from trak_dropout.reading import in_dataset_order


def penultimate_embeddings(
    model: nn.Module,
    loader: Iterable[Any],
    layer: str | None = None,
    forward: Callable[[nn.Module, Any], Any] | None = None,
) -> NDArray[np.float32]:
    """Compute what a model's last linear layer is given.

    One forward pass without gradients, in evaluation mode; the model is left as it was found.

    Args:
        model: the model, such as a LightningModule.
        loader: batches of samples; a shuffling ``DataLoader`` is read in data-set order.
        layer: name of the layer whose input to take; when None, the ``nn.Linear`` that comes last
            in ``named_modules``.
        forward: how to run the model on a batch, ``forward(model, batch)``; when None, the model is
            called with the first entry of a list or tuple, with a mapping as keyword arguments, or
            with the batch itself.

    Returns:
        float32 ``(n, d)``, in the loader's order; the mean over positions where the layer's input
        has further dimensions.

    Raises:
        TypeError: ``model`` is no module.
        ValueError: there is no such layer, it did not run once for a batch, the loader is empty, or
            an embedding is NaN or infinite.
    """
    check_model(model)
    modules = dict(model.named_modules())
    if layer is None:
        linear = [name for name, module in modules.items() if isinstance(module, nn.Linear)]
        if not linear:
            raise ValueError("layer: the model has no nn.Linear; name another kind of layer")
        layer = linear[-1]
    if layer not in modules:
        raise ValueError(f"layer={layer!r} is no module of the model; it has {list(modules)[1:]}")
    seen: list[Tensor] = []

    def keep(_: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        seen.append(next(iter((*inputs, *named.values()))).detach())

    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    parts = []
    handle = modules[layer].register_forward_pre_hook(keep, with_kwargs=True)
    try:
        # A DataLoader draws a seed whenever it is read.
        with preserved(model, weights=False), torch.no_grad(), torch.random.fork_rng(devices=[]):
            model.eval()
            for raw in in_dataset_order(loader):
                seen.clear()
                with own_precision(model):
                    (forward or _call)(model, to_device(model, raw, device))
                if len(seen) != 1:
                    raise ValueError(
                        f"layer={layer!r} ran {len(seen)} times in a forward pass, expected once; "
                        "name another layer"
                    )
                value = seen[0].float()
                parts.append(value.flatten(1, -2).mean(1).cpu() if value.ndim > 2 else value.cpu())
    finally:
        handle.remove()
    if not parts:
        raise ValueError("loader: there are no samples in it")
    return _finite("the model's embeddings", torch.cat(parts).numpy())


def text_embeddings(
    encoder: Any, texts: Sequence[str], batch_size: int = 64
) -> NDArray[np.float32]:
    """Encode texts with a sentence-transformers model, or anything with its ``encode``.

    Args:
        encoder: an object with ``encode(texts, batch_size=..., show_progress_bar=False)``.
        texts: the texts.
        batch_size: texts in a batch.

    Returns:
        float32 ``(len(texts), d)``.

    Raises:
        TypeError: the encoder has no ``encode``, or ``texts`` is one string.
        ValueError: there are no texts, or the encoder does not give one finite row for each.
    """
    if not callable(getattr(encoder, "encode", None)):
        raise TypeError(
            f"encoder must have a method encode, such as a SentenceTransformer, got {encoder!r}"
        )
    if isinstance(texts, str):
        raise TypeError("texts must be a sequence of strings, got one string")
    texts = list(texts)
    if not texts:
        raise ValueError("texts is empty")
    found = encoder.encode(texts, batch_size=batch_size, show_progress_bar=False)
    rows = np.asarray(found.cpu() if isinstance(found, Tensor) else found, dtype=np.float32)
    if rows.ndim != 2 or len(rows) != len(texts):
        raise ValueError(f"encoder gave shape {rows.shape} for {len(texts)} texts")
    return _finite("the encoder's embeddings", rows)


def with_labels(
    embeddings: ArrayLike, labels: ArrayLike, classes: int, products: bool = False
) -> NDArray[np.float32]:
    """Append labels, one-hot: the influence of a sample depends on its label.

    Args:
        embeddings: ``(n, d)``.
        labels: integers from 0 to ``classes - 1``, ``(n,)``.
        classes: number of classes.
        products: append the embedding once more for each class, scaled to unit length, zero but for
            the sample's own; a network then need not learn that likeness counts within a class.

    Returns:
        float32 ``(n, d + classes)``, or with products ``(n, d + classes + classes d)``.

    Raises:
        ValueError: shapes do not match, or a label is out of range.
    """
    rows, numbers = np.asarray(embeddings, dtype=np.float32), np.asarray(labels)
    check_integer("classes", classes, minimum=1)
    if rows.ndim != 2 or numbers.shape != rows.shape[:1] or numbers.dtype.kind not in "iu":
        raise ValueError(
            f"labels must be one integer for each of embeddings {rows.shape}, got "
            f"{numbers.shape} of {numbers.dtype}"
        )
    if len(numbers) and not (numbers.min() >= 0 and numbers.max() < classes):
        raise ValueError(
            f"labels must lie from 0 to {classes - 1}, got {numbers.min()} to {numbers.max()}"
        )
    own = np.eye(classes, dtype=np.float32)[numbers]
    parts = [rows, own]
    if products:
        length = np.linalg.norm(rows, axis=1, keepdims=True)
        unit = rows / np.where(length > 0, length, 1)
        parts.append((own[:, :, None] * unit[:, None]).reshape(len(rows), classes * rows.shape[1]))
    return np.concatenate(parts, axis=1)


def _call(model: nn.Module, batch: Any) -> Any:
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(batch[0] if isinstance(batch, list | tuple) else batch)


def _finite(name: str, rows: NDArray[np.float32]) -> NDArray[np.float32]:
    bad = np.flatnonzero(~np.isfinite(rows).all(1))
    if len(bad):
        raise ValueError(f"{name} of samples {bad[:10].tolist()} are NaN or infinite")
    return rows
