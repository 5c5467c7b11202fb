"""Training-data attribution by dropout of gradient coordinates: a plugin for TRAK and Lightning."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from trak_dropout import gradients, metrics
from trak_dropout._version import __version__
from trak_dropout.attribution import AttributionStore, open_store
from trak_dropout.gradients import (
    BatchError,
    DenseGradientComputer,
    FactoredGradientComputer,
    FactoredGradients,
    FactorError,
)
from trak_dropout.outputs import CausalLMOutput, LossOutput
from trak_dropout.plugin import plugin
from trak_dropout.projector import DropoutProjector, NonFiniteGradientError
from trak_dropout.ranking import top_influences
from trak_dropout.scoring import DampedScoreComputer, GramError, self_influence
from trak_dropout.store import (
    IncompleteStoreError,
    ManifestSaver,
    Store,
    StoreMismatchError,
)

if TYPE_CHECKING:
    from trak_dropout import surrogate
    from trak_dropout.surrogate import InfluenceNetwork

__all__ = [
    "AttributionStore",
    "BatchError",
    "CausalLMOutput",
    "DampedScoreComputer",
    "DenseGradientComputer",
    "DropoutProjector",
    "FactorError",
    "FactoredGradientComputer",
    "FactoredGradients",
    "GramError",
    "IncompleteStoreError",
    "InfluenceNetwork",
    "LossOutput",
    "ManifestSaver",
    "NonFiniteGradientError",
    "Store",
    "StoreMismatchError",
    "__version__",
    "gradients",
    "metrics",
    "open_store",
    "plugin",
    "self_influence",
    "surrogate",
    "top_influences",
]


def __getattr__(name: str) -> Any:
    """Load what needs Lightning when it is asked for."""
    if name == "surrogate":
        return import_module("trak_dropout.surrogate")
    if name == "InfluenceNetwork":
        return import_module("trak_dropout.surrogate").InfluenceNetwork
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
