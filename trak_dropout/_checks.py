"""Checks of arguments, shared by every room: the message names the argument and what to do."""

from __future__ import annotations

import operator

from torch import nn


def check_integer(name: str, value: object, minimum: int | None = None) -> int:
    """Return ``value`` as an int.

    Args:
        name: the argument's name, for the message.
        value: what was given.
        minimum: the smallest value allowed, if there is one.

    Returns:
        The value as a Python int.

    Raises:
        TypeError: ``value`` is no integer (booleans are none either).
        ValueError: ``value`` is below ``minimum``.
    """
    if isinstance(value, bool):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    try:
        number = operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise TypeError(f"{name} must be an integer, got {value!r}") from None
    if minimum is not None and number < minimum:
        raise ValueError(f"{name} must be at least {minimum}, got {number}")
    return number


def check_model(model: object) -> None:
    """Refuse what is no model.

    Args:
        model: what was given.

    Raises:
        TypeError: it is no ``nn.Module``.
    """
    if isinstance(model, nn.Module):
        return
    given = type(model).__name__
    if isinstance(model, type):
        given = f"the class {model.__name__}; give an instance of it"
    raise TypeError(f"model must be an nn.Module, got {given}")
