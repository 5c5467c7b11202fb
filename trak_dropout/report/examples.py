"""Training samples and targets as a person can look at them: a picture, a text, or named values."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from numbers import Number
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

MAX_TEXT, MAX_LABEL, MAX_FIELDS = 1000, 80, 40
_LABEL_KEYS = ("label", "labels", "target", "y", "class")
_IMAGE_KEYS = ("image", "img", "pixel_values", "picture")


@dataclass(frozen=True)
class Example:
    """What is shown of one sample; whatever is missing is left out.

    Args:
        picture: 8-bit pixels, ``(height, width)`` gray or ``(height, width, 3)`` color.
        text: a text.
        fields: names and values, such as the columns of a row.
        problem: why the sample could not be shown.
    """

    picture: NDArray[np.uint8] | None = None
    text: str | None = None
    fields: Mapping[str, str] = field(default_factory=dict)
    problem: str | None = None


@dataclass(frozen=True)
class Examples:
    """A data set and how to look at it.

    Items may be images (tensors or arrays, channels first or last, gray or color, or PIL images),
    token ids, texts, vectors of numbers, mappings of such (as Hugging Face's data sets give them),
    or tuples of such with a label at the end. For anything else give ``render``.

    Args:
        data: ``data[i]`` is sample ``i``, in the order in which gradients were collected.
        labels: the label each sample was given, ``(n,)``; found in the items when None.
        true_labels: the right labels, ``(n,)``, where they are known.
        classes: names of the labels ``0, 1, ...``.
        tokenizer: makes text of token ids: an object with ``decode``, such as Hugging Face's, or a
            function; ids are shown as numbers when None.
        render: makes of an item what is shown: an `Example`, an image, a text, or a mapping of
            names to values. What it returns is shown as text, never as HTML.

    Raises:
        TypeError: ``data`` has no length or no items, or ``render`` cannot be called.
        ValueError: ``labels`` or ``true_labels`` are not one for each sample.
    """

    data: Any
    labels: Any = None
    true_labels: Any = None
    classes: Sequence[str] | Mapping[Any, str] | None = None
    tokenizer: Any = None
    render: Callable[[Any], Any] | None = None

    def __post_init__(self) -> None:
        if not hasattr(self.data, "__len__") or not hasattr(self.data, "__getitem__"):
            raise TypeError(
                f"data must have a length and items by number, got {type(self.data).__name__}; "
                "give the data set, not its loader"
            )
        if self.render is not None and not callable(self.render):
            raise TypeError(f"render must be a function of an item, got {self.render!r}")
        for name in ("labels", "true_labels"):
            given = getattr(self, name)
            if given is not None and len(given) != len(self.data):
                raise ValueError(f"{name}: {len(given)} for {len(self.data)} samples")

    def __len__(self) -> int:
        return len(self.data)

    def look(self, index: int) -> tuple[Example, str | None]:
        """Look at a sample; an exception on the way becomes its problem.

        Args:
            index: its number.

        Returns:
            What is shown, and the name of the label it was given, None where it has none.
        """
        label = None if self.labels is None else self._name(self.labels[index])
        try:
            item = self.data[index]
            if self.labels is None:
                label = self._name(_label_of(item))
            made = item if self.render is None else self.render(item)
            return shown(made, self.tokenizer), label
        except Exception as error:  # whatever a data set or a render function may raise
            return Example(problem=f"cannot be shown: {type(error).__name__}: {error}"), label

    def label(self, index: int) -> str | None:
        """Return the name of the label that a sample was given, None where it has none."""
        if self.labels is not None:
            return self._name(self.labels[index])
        try:
            return self._name(_label_of(self.data[index]))
        except Exception:  # `look` tells what is wrong
            return None

    def true_label(self, index: int) -> str | None:
        """Return the name of a sample's right label, None where it is not known."""
        return None if self.true_labels is None else self._name(self.true_labels[index])

    @cached_property
    def wrong(self) -> NDArray[np.bool_] | None:
        """Whether each sample's label is known to be wrong, ``(n,)``; None without true labels."""
        if self.true_labels is None:
            return None
        pairs = ((self.label(i), self.true_label(i)) for i in range(len(self)))
        return np.array([given != true for given, true in pairs], dtype=bool)

    def _name(self, label: Any) -> str | None:
        plain = _plain(label)
        if plain is None:
            return None
        # A list counts negative numbers from its end, but -1 often stands for no label.
        unnamed = isinstance(plain, int) and plain < 0 and not isinstance(self.classes, Mapping)
        if self.classes is None or unnamed:
            return str(plain)
        try:
            return str(self.classes[plain])
        except (KeyError, IndexError, TypeError):
            return str(plain)


def shown(item: Any, tokenizer: Any = None) -> Example:
    """Choose how an item is shown.

    Args:
        item: as for `Examples`.
        tokenizer: as for `Examples`.

    Returns:
        What is shown.
    """
    if isinstance(item, Example):
        return item
    if isinstance(item, str):
        return Example(text=item)
    if isinstance(item, bytes):
        return Example(text=item.decode(errors="replace"))
    if isinstance(item, Image.Image):
        return Example(picture=np.asarray(item.convert("RGB")))
    if isinstance(item, Mapping):
        return _shown_mapping(item, tokenizer)
    if isinstance(item, tuple | list) and item and not _is_numbers(item):
        return _shown_parts(item, tokenizer)
    array = _array(item)
    return Example(text=repr(item)) if array is None else _shown_array(item, array, tokenizer)


def _shown_mapping(item: Mapping[Any, Any], tokenizer: Any) -> Example:
    if "input_ids" in item:
        ids = _array(item["input_ids"])
        mask = _array(item.get("attention_mask"))
        if ids is not None:
            return Example(text=_text(ids if mask is None else ids[mask != 0], tokenizer))
    for key in _IMAGE_KEYS:
        if key in item:
            return shown(item[key], tokenizer)
    rest = {str(key): value for key, value in item.items() if key not in _LABEL_KEYS}
    if len(rest) == 1:
        (only,) = rest.values()
        if isinstance(only, str):
            return Example(text=only)
    return Example(fields={key: str(_plain(value, value)) for key, value in rest.items()})


def _shown_parts(item: Sequence[Any], tokenizer: Any) -> Example:
    """A tuple: what comes first, with the mask of token ids where there is one."""
    first = _array(item[0])
    if first is None or first.ndim != 1 or first.dtype.kind not in "iu":
        return shown(item[0], tokenizer)
    for part in reversed(item[1:]):
        mask = _array(part)
        # All of TRAK's text batches have the attention mask behind the token types.
        if mask is not None and mask.shape == first.shape and np.isin(mask, (0, 1)).all():
            return Example(text=_text(first[mask != 0], tokenizer))
    return Example(text=_text(first, tokenizer))


def _shown_array(item: Any, array: NDArray[Any], tokenizer: Any) -> Example:
    if array.ndim == 1 and array.dtype.kind in "iu" and (tokenizer or array.dtype != np.uint8):
        return Example(text=_text(array, tokenizer))
    if array.ndim == 0:
        return Example(text=str(array[()]))
    if array.ndim == 1:
        return Example(fields={str(i): f"{value:.4g}" for i, value in enumerate(array)})
    return Example(picture=pixels(array, channels_first=isinstance(item, torch.Tensor)))


def pixels(array: NDArray[Any], channels_first: bool = True) -> NDArray[np.uint8]:
    """Make 8-bit pixels of an image.

    Args:
        array: ``(height, width)``, ``(channels, height, width)`` or ``(height, width, channels)``,
            with one, three or four channels. Floats in [0, 1] are taken as they are; of any other
            range the lowest value becomes black and the highest white.
        channels_first: where the channels are if the shape leaves it open.

    Returns:
        ``(height, width)`` or ``(height, width, 3)``.

    Raises:
        ValueError: it has another shape, is empty, or holds NaN or infinities.
    """
    known = (1, 3, 4)
    if array.ndim == 3:
        if array.shape[0] in known and (channels_first or array.shape[2] not in known):
            array = np.moveaxis(array, 0, 2)
        if array.shape[2] not in known:
            raise ValueError(f"an image of shape {array.shape} has no 1, 3 or 4 channels")
        array = array[:, :, 0] if array.shape[2] == 1 else array[:, :, :3]
    if array.ndim != 2 + (array.ndim == 3) or array.size == 0:
        raise ValueError(f"shape {array.shape} is no image; give a render function")
    if array.dtype == np.uint8:
        return array
    values = array.astype(np.float64)
    if not np.isfinite(values).all():
        raise ValueError("the image holds NaN or infinite values")
    low, high = float(values.min()), float(values.max())
    if low < 0 or high > 1:
        # Halved first, so that the span of the largest floats is one, too.
        span = high / 2 - low / 2
        values = (values / 2 - low / 2) / (span if span > 0 else 1.0)
    return np.round(values * 255).astype(np.uint8)


def _label_of(item: Any) -> Any:
    if isinstance(item, Mapping):
        return next((item[key] for key in _LABEL_KEYS if key in item), None)
    if isinstance(item, tuple | list) and len(item) > 1 and not _is_numbers(item):
        return item[-1]
    return None


def _is_numbers(item: Sequence[Any]) -> bool:
    return all(isinstance(value, Number) for value in item)


def _plain(value: Any, otherwise: Any = None) -> Any:
    """A single number or text as Python's own; anything else is no label."""
    if isinstance(value, str | int | float):
        return value
    array = _array(value)
    return otherwise if array is None or array.size != 1 else array.reshape(()).item()


def _array(value: Any) -> NDArray[Any] | None:
    """Numbers as an array, None for what is none."""
    if value is None:
        return None
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu()
        value = value.float().numpy() if value.is_floating_point() else value.numpy()
    try:
        array = np.asarray(value)
    except ValueError:
        return None
    return array if array.dtype.kind in "biuf" else None


def _text(ids: NDArray[Any], tokenizer: Any) -> str:
    plain = [int(i) for i in ids.reshape(-1)]
    if tokenizer is None:
        return " ".join(map(str, plain))
    return str(getattr(tokenizer, "decode", tokenizer)(plain))


def clipped(text: str, limit: int = MAX_TEXT) -> str:
    """Return a text without what goes beyond a limit, and with a note of how much that is."""
    rest = len(text) - limit
    return text if rest <= 0 else f"{text[:limit]} … ({rest:,} more characters)"
