"""Secateur prunes pretrained language models.

    from secateur import PruneConfig, prune

    result = prune("HuggingFaceTB/SmolLM2-135M-Instruct", PruneConfig(sparsity=0.5), data="c4", out="smaller")

Importing this package imports neither torch nor transformers: the names below are fetched when first used.
"""

import sys
from importlib import import_module
from importlib.metadata import version
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from secateur.api import evaluate, prune
    from secateur.config import PruneConfig

    __version__: str

__all__ = ["PruneConfig", "__version__", "evaluate", "prune"]

_HOMES = {"PruneConfig": "secateur.config", "evaluate": "secateur.api", "prune": "secateur.api"}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return version("secateur")
    if name not in _HOMES:
        raise AttributeError(f"module 'secateur' has no attribute {name!r}; it offers {', '.join(__all__)}")
    return getattr(import_module(_HOMES[name]), name)


class _Package(ModuleType):
    """Keeps ``secateur.prune`` and ``secateur.evaluate`` the functions when the packages of the same name are imported.

    Python binds an imported subpackage as an attribute of its parent; for these two names it is not bound.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _HOMES and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
