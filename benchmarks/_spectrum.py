"""Scores and self-influence at any damping, from one decomposition."""

from __future__ import annotations

import math

import torch
from torch import Tensor

FLATNESS = 6.0  # of damping="auto", see docs/damping.md


class Spectrum:
    """The eigenvalues of compressed gradients, and what any damping makes of them.

    With ``X`` the training gradients and ``T`` those of targets, scores are
    ``X (X^T X + ridge)^-1 T^T`` and self-influence is ``x_i^T (X^T X + ridge)^-1 x_i``.

    Args:
        x: training gradients ``(n, k)``.
        targets: those of the targets ``(m, k)``.
    """

    def __init__(self, x: Tensor, targets: Tensor) -> None:
        self.n, self.k = x.shape
        dual = self.k > self.n
        if dual:
            gram, right = product(x, x), product(x, targets)
        else:
            x, targets = x.double(), targets.double()
            gram, right = x.T @ x, targets.T
        self.trace = float(gram.trace())
        self.values, vectors = torch.linalg.eigh(gram)
        self.values.clamp_(min=0)
        # Over all n eigenvalues of X X^T, of which n - k are zero where k < n.
        self.mean = self.trace / self.n
        squares = float(self.values.square().sum())
        self.rms = math.sqrt(squares / self.n)
        # Without what the projection itself adds to it.
        self.denoised = math.sqrt(max((squares - self.trace**2 / self.k) / self.n, self.mean**2))
        self.right = vectors.T @ right
        self.left = vectors if dual else x @ vectors
        # In the dual form X (X^T X + ridge)^-1 X^T has eigenvalues e / (e + ridge).
        self._weights = self.values if dual else torch.ones_like(self.values)

    def ridge(self, damping: float | str) -> float:
        """The absolute damping for one in units of the mean squared norm, or for ``"auto"``."""
        if damping == "auto":
            return FLATNESS * self.mean * self.mean / self.denoised
        return float(damping) * self.mean

    def scores(self, ridge: float) -> Tensor:
        """Scores ``(n, m)`` without out-to-loss gradients."""
        return self.left @ (self.right / (self.values + ridge).unsqueeze(1))

    def self_influence(self, ridge: float) -> Tensor:
        """Self-influence ``(n,)``."""
        return self.left.square() @ (self._weights / (self.values + ridge))


def product(a: Tensor, b: Tensor, columns: int = 4096) -> Tensor:
    """``a @ b.T``, some columns at a time, added up in double precision."""
    total = torch.zeros(len(a), len(b), dtype=torch.float64, device=a.device)
    for start in range(0, a.shape[1], columns):
        total += a[:, start : start + columns] @ b[:, start : start + columns].T
    return total
