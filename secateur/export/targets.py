"""The table behind ``secateur export --to``."""

from collections.abc import Callable
from pathlib import Path

from secateur.errors import UsageError
from secateur.export.directory import Watch, pack_directory
from secateur.export.sizes import Sizes

TARGETS: dict[str, Callable[[Path, Path, Watch], Sizes]] = {"sparse-safetensors": pack_directory}
"""What a directory can be written as: each writes all of OUT or nothing."""


def target_named(name: str) -> Callable[[Path, Path, Watch], Sizes]:
    """UsageError for a name that is not in the table."""
    if name not in TARGETS:
        raise UsageError(f"unknown target {name!r}; there is {', '.join(TARGETS)}")
    return TARGETS[name]
