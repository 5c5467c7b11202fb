"""A network that learns influence from a few values and predicts the rest (NN-CIFT).

Source: "NN-CIFT" (arXiv 2502.09969). Needs Lightning, so ``import trak_dropout`` loads it only when
``trak_dropout.InfluenceNetwork`` or ``trak_dropout.surrogate`` is asked for.
"""

from trak_dropout.surrogate.embeddings import (
    penultimate_embeddings,
    text_embeddings,
    with_labels,
)
from trak_dropout.surrogate.network import InfluenceNetwork, PredictedInfluences
from trak_dropout.surrogate.selection import select
from trak_dropout.surrogate.support import ExtrapolationWarning
from trak_dropout.surrogate.values import sample_axes, sampled_influences

__all__ = [
    "ExtrapolationWarning",
    "InfluenceNetwork",
    "PredictedInfluences",
    "penultimate_embeddings",
    "sample_axes",
    "sampled_influences",
    "select",
    "text_embeddings",
    "with_labels",
]
