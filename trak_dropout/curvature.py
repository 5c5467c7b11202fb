"""Which gradients the matrix that scores invert is made of: those of outputs, or of losses.

TRAK inverts ``sum x x^T``, with ``x`` the gradient of a sample's model output, whatever its
loss is. How far the weights give way to a sample is a matter of the curvature of the *loss*. With
``q`` the out-to-loss gradient, a loss has the gradient ``q x``, and the empirical Fisher matrix is
``sum q^2 x x^T``; but it counts the few samples that are still wrong far too much (Kunstner, Hennig
and Balles, arXiv 1905.12558): of the logistic loss, whose ``q`` is one minus the probability of the
label, the Fisher matrix is ``sum q (1 - q) x x^T``, about ``q`` where the model is confident.
So here each term of the empirical Fisher matrix is divided by the norm of its gradient,
``sum q x x^T / |x|``, which has ``q`` to the first power and is the same whether a task measures
margins or losses. The matrix is scaled to the trace of TRAK's, so that a damping means the same.

Row i of ``X`` enters it as ``s_i x_i``, and scores are ``(s_i x_i) M^-1 t / s_i``.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from trak_dropout.rowfile import RowFile
from trak_dropout.scoring import GramError, refuse_zero
from trak_dropout.shards import Shards
from trak_dropout.store import FeatureFiles

CURVATURES = ("output", "loss")
# In units of the mean: rows of samples that are fitted to the last digit are divided by their
# factors again.
_SMALLEST = 1e-4


def check_curvature(curvature: str) -> str:
    """Return the name of a curvature.

    Args:
        curvature: ``"output"`` or ``"loss"``.

    Raises:
        ValueError: it is neither.
    """
    if curvature not in CURVATURES:
        raise ValueError(f"curvature must be one of {', '.join(CURVATURES)}, got {curvature!r}")
    return curvature


def row_factors(norms: Tensor, out_to_loss: Tensor) -> Tensor:
    """Compute the factors ``s`` of rows for ``curvature="loss"``.

    Args:
        norms: of compressed gradients, ``(n,)``.
        out_to_loss: out-to-loss gradients of the same checkpoint, ``(n,)``.

    Returns:
        ``sqrt(c |q| / |x|)``, float64 ``(n,)``, with ``c`` such that ``sum |s x|^2`` is
        ``sum |x|^2``; 1 for rows of zeros.

    Raises:
        GramError: a value is NaN or infinite, or all norms or all out-to-loss gradients are zero.
    """
    norms, slopes = norms.double(), out_to_loss.double().abs()
    for name, values in (("compressed", norms), ("out-to-loss", slopes)):
        bad = torch.nonzero(~torch.isfinite(values)).flatten().tolist()
        if bad:
            raise GramError(f"{name} gradients of samples {bad[:10]} are NaN or infinite")
    refuse_zero(norms.sum().reshape(1, 1))
    if not bool(slopes.any()):
        raise GramError(
            "out-to-loss gradients of all samples are zero, so the loss has no curvature; "
            "use curvature='output'"
        )
    slopes = slopes / slopes.max()
    slopes = slopes.clamp_min(_SMALLEST * float(slopes.mean()))
    norms = norms / norms.max()
    weights = torch.where(norms > 0, slopes / norms, 0.0)
    scale = norms.square().sum() / (slopes * norms).sum()
    return torch.where(norms > 0, weights * scale, 1.0).sqrt()


class ScaledRows(RowFile):
    """A matrix in a file whose rows are multiplied by factors as they are read.

    Args:
        rows: the file.
        factors: ``(n,)``.
    """

    def __init__(self, rows: RowFile, factors: Tensor) -> None:
        super().__init__(rows.file)
        self._factors = factors.float().unsqueeze(1)

    def rows(self, start: int = 0, stop: int | None = None) -> Tensor:
        """As ``RowFile.rows``, in float32."""
        found = super().rows(start, stop)
        return found * self._factors[start : start + len(found)]

    def blocks(
        self, rows: int, start: int = 0, stop: int | None = None
    ) -> Iterator[tuple[int, Tensor]]:
        """As ``RowFile.blocks``, in float32."""
        for first, block in super().blocks(rows, start, stop):
            yield first, block * self._factors[first : first + len(block)]


def curved(
    files: FeatureFiles, model_id: int, curvature: str, shards: Shards, memory: int
) -> tuple[RowFile, Tensor]:
    """Return the rows of which the inverted matrix is made, and by what factors they differ.

    Args:
        files: the store.
        model_id: the checkpoint, with ``n`` rows.
        curvature: ``"output"`` or ``"loss"``.
        shards: which rows this process reads.
        memory: bytes for blocks of rows.

    Returns:
        Rows, and the factors of all of them, float64 ``(n,)``.

    Raises:
        GramError: as `row_factors`.
        RankError: another process has failed.
    """
    file = files.file(model_id, "grads")
    if curvature == "output":
        return file, torch.ones(len(file), dtype=torch.float64)
    step = max(1, memory // (24 * file.shape[1]))
    with shards.agreed():
        blocks = file.blocks(step, shards.start, shards.stop)
        parts = [torch.linalg.vector_norm(block.double(), dim=1) for _, block in blocks]
        own = torch.cat([torch.empty(0, dtype=torch.float64), *parts])
    slopes = files.file(model_id, "out_to_loss").rows()[:, 0]
    factors = row_factors(shards.joined(own.unsqueeze(0))[0], slopes)
    return ScaledRows(file, factors), factors
