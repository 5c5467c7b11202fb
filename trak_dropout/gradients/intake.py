"""Compressed gradients that are added up as gradients come, so that none have to be held."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor

from trak_dropout.gradients.factors import FactoredGradient


class Shares(Protocol):
    """A mask cut by parameter, such as `DropoutProjector.shares` returns."""

    @property
    def names(self) -> frozenset[str]:
        """The parameters of which a coordinate is kept."""

    def zeros(self, samples: int) -> Tensor:
        """Compressed gradients to begin with."""

    def add(self, out: Tensor, name: str, gradient: FactoredGradient | Tensor) -> None:
        """Add the share of a parameter."""

    def held(self, name: str, gradient: FactoredGradient) -> FactoredGradient:
        """What to hold of a parameter's gradient until `add_all`."""

    def add_all(self, out: Tensor, gradients: Mapping[str, FactoredGradient]) -> None:
        """Add the shares of several parameters at once, which costs less than one by one."""

    def finish(self, out: Tensor) -> Tensor:
        """Apply what is left to apply."""


class Intake:
    """Compressed gradients of a batch, whose parameters come one at a time.

    Args:
        shares: of the parameters.
        samples: number of samples, ``B``.
    """

    def __init__(self, shares: Shares, samples: int) -> None:
        self._shares = shares
        self.rows = shares.zeros(samples)
        # Gradients with a single position are small; taken together they cost less.
        self._waiting: dict[str, FactoredGradient] = {}

    def add(self, name: str, gradient: FactoredGradient) -> None:
        """Take a contribution to the gradients of a parameter; there may be several."""
        if name not in self._shares.names:
            return
        with torch.no_grad():
            gradient = self._shares.held(name, gradient)
        if name in self._waiting or gradient.single() is None:
            with torch.no_grad():
                self._shares.add(self.rows, name, gradient)
        else:
            self._waiting[name] = gradient

    def finish(self) -> Tensor:
        """Return the rows, ``(B, proj_dim)``, when everything has come."""
        waiting, self._waiting = self._waiting, {}
        with torch.no_grad():
            self._shares.add_all(self.rows, waiting)
            return self._shares.finish(self.rows)
