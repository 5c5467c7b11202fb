"""`GradientCollector`, the Lightning callback; nothing else in the package imports Lightning."""

from trak_dropout.lightning.collector import GradientCollector

__all__ = ["GradientCollector"]
