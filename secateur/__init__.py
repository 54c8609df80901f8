"""Secateur prunes pretrained language models.

    from secateur import PruneConfig, prune

    result = prune("HuggingFaceTB/SmolLM2-135M-Instruct", PruneConfig(sparsity=0.5), data="c4", out="smaller")

Importing this package imports neither torch nor transformers: the names below are fetched when first used.
"""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from secateur.api import evaluate, evaluate_tasks, load_pruned, prune, quantize, train
    from secateur.config import PruneConfig
    from secateur.export.directory import load_packed
    from secateur.exports import ExportOptions, export_to, unpack
    from secateur.models.sparse24 import load_sparse
    from secateur.planning.plan import plan
    from secateur.planning.report import PlanReport
    from secateur.quantize_config import QuantizeConfig
    from secateur.train_config import TrainConfig

    __version__: str

__all__ = [
    "ExportOptions",
    "PlanReport",
    "PruneConfig",
    "QuantizeConfig",
    "TrainConfig",
    "__version__",
    "evaluate",
    "evaluate_tasks",
    "export_to",
    "load_packed",
    "load_pruned",
    "load_sparse",
    "plan",
    "prune",
    "quantize",
    "train",
    "unpack",
]

_HOMES = {
    "ExportOptions": "secateur.exports",
    "PruneConfig": "secateur.config",
    "PlanReport": "secateur.planning.report",
    "QuantizeConfig": "secateur.quantize_config",
    "TrainConfig": "secateur.train_config",
    "evaluate": "secateur.api",
    "evaluate_tasks": "secateur.api",
    "export_to": "secateur.exports",
    "load_packed": "secateur.export.directory",
    "load_pruned": "secateur.api",
    "load_sparse": "secateur.models.sparse24",
    "plan": "secateur.planning.plan",
    "prune": "secateur.api",
    "quantize": "secateur.api",
    "train": "secateur.api",
    "unpack": "secateur.exports",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return version("secateur")
    if name not in _HOMES:
        raise AttributeError(f"module 'secateur' has no attribute {name!r}; it offers {', '.join(__all__)}")
    return getattr(import_module(_HOMES[name]), name)
