"""Gradient computers: TRAK's second socket."""

from trak_dropout.gradients.dense import BatchError, DenseGradientComputer
from trak_dropout.gradients.factored import FactoredGradientComputer
from trak_dropout.gradients.factors import (
    Factor,
    FactoredGradient,
    FactoredGradients,
    Formed,
    Lookups,
    Outer,
)
from trak_dropout.gradients.patches import Patches
from trak_dropout.gradients.rules import rule
from trak_dropout.gradients.taps import FactorError
from trak_dropout.gradients.vectors import Sums

__all__ = [
    "BatchError",
    "DenseGradientComputer",
    "Factor",
    "FactorError",
    "FactoredGradient",
    "FactoredGradientComputer",
    "FactoredGradients",
    "Formed",
    "Lookups",
    "Outer",
    "Patches",
    "Sums",
    "rule",
]
