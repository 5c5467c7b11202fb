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
from trak_dropout.rowfile import IncompleteStoreError
from trak_dropout.scoring import DampedScoreComputer, GramError
from trak_dropout.shards import RankError
from trak_dropout.store import (
    ManifestSaver,
    Store,
    StoreMismatchError,
)
from trak_dropout.streaming import self_influence
from trak_dropout.trajectory import (
    block_visits,
    trajectory_influences,
    trajectory_scores,
    trajectory_self_influence,
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
    "RankError",
    "Store",
    "StoreMismatchError",
    "__version__",
    "block_visits",
    "gradients",
    "metrics",
    "open_store",
    "plugin",
    "self_influence",
    "surrogate",
    "top_influences",
    "trajectory_influences",
    "trajectory_scores",
    "trajectory_self_influence",
]


def __getattr__(name: str) -> Any:
    """Load what needs Lightning when it is asked for."""
    if name == "surrogate":
        return import_module("trak_dropout.surrogate")
    if name == "InfluenceNetwork":
        return import_module("trak_dropout.surrogate").InfluenceNetwork
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
