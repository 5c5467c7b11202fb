"""How far embeddings lie from those that a network was trained on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

_REFERENCES = 512
_PROBES = 2048
_BLOCK = 4096


class ExtrapolationWarning(UserWarning):
    """Predictions were asked for embeddings unlike those trained on."""


@dataclass(frozen=True)
class Support:
    """Where the embeddings lie that a network was trained on.

    Distances are Euclidean, between standardised embeddings, to the nearest of some reference
    embeddings out of those trained on.

    Args:
        reference: ``(r, d)``.
        typical: the distance that 95 % of the embeddings trained on stay below (each measured
            without itself).
        farthest: their largest distance.
    """

    reference: Tensor
    typical: float
    farthest: float

    @classmethod
    def of(cls, embeddings: Tensor, generator: torch.Generator) -> Support:
        """Describe standardised embeddings ``(n, d)`` by a random sample of them."""
        order = torch.randperm(len(embeddings), generator=generator)
        reference = embeddings[order[:_REFERENCES]].clone()
        probes = embeddings[order[:_PROBES]]
        if len(probes) < 2:
            return cls(reference, 0.0, 0.0)
        apart = torch.cdist(probes, reference)
        apart.diagonal().fill_(torch.inf)  # references are the first probes
        nearest = apart.min(1).values
        return cls(reference, float(nearest.quantile(0.95)), float(nearest.max()))

    def distances(self, embeddings: Tensor) -> Tensor:
        """Distance of each standardised embedding ``(n, d)`` to its nearest reference, ``(n,)``."""
        lengths, right = self.reference.square().sum(1), self.reference.T
        nearest = []
        for block in torch.split(embeddings, _BLOCK):
            least = torch.addmm(lengths, block, right, alpha=-2).amin(1)
            nearest.append((least + block.square().sum(1)).clamp_min(0).sqrt())
        return torch.cat(nearest)

    def complaint(self, name: str, embeddings: Tensor) -> str | None:
        """Say how far embeddings lie from those trained on, or None where they do not.

        They do where one is more than twice as far as any trained on was from the others, or where
        a fifth of them (and at least five) lie beyond what 95 % of those trained on kept to.
        """
        found = self.distances(embeddings)
        beyond = int((found > self.typical).sum())
        far = int((found > 2 * self.farthest).sum())
        if not far and (beyond < 5 or beyond <= len(found) / 5):
            return None
        times = float(found.max()) / self.farthest if self.farthest else float("inf")
        return (
            f"{name}: {beyond} of {len(found)} ({beyond / len(found):.0%}) lie farther from the "
            f"embeddings trained on than 95 % of those do from each other, the farthest "
            f"{times:.1f} times as far as any of those; influences predicted there are guesses. "
            "Fit again with a sample of such data"
        )

    def to_tensors(self, prefix: str) -> dict[str, Tensor]:
        """Return what `from_tensors` takes."""
        limits = torch.tensor([self.typical, self.farthest], dtype=torch.float64)
        return {f"{prefix}.reference": self.reference, f"{prefix}.limits": limits}

    @classmethod
    def from_tensors(cls, prefix: str, tensors: Mapping[str, Tensor]) -> Support:
        """Restore from `to_tensors`."""
        typical, farthest = tensors[f"{prefix}.limits"].tolist()
        return cls(tensors[f"{prefix}.reference"], typical, farthest)
