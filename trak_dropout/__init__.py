"""Training-data attribution by dropout of gradient coordinates: a plugin for TRAK and Lightning."""

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
    "top_influences",
    "trajectory_influences",
    "trajectory_scores",
    "trajectory_self_influence",
]
