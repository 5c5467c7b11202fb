"""Gradient computers: TRAK's second socket."""

from trak_dropout.gradients.dense import BatchError, DenseGradientComputer

__all__ = ["BatchError", "DenseGradientComputer"]
