"""A directory that ``secateur export --to torch-2:4`` wrote, opened; its own reader, with errors of this package."""

from pathlib import Path
from typing import Any

from torch import Tensor

from secateur.errors import ArtefactError, DeviceError
from secateur.models import sparse24_loader
from secateur.models.sparse24_loader import SUFFIX, TOKENS, Choice, read_state


def is_sparse24(directory: Path) -> bool:
    return any(directory.glob(f"*{SUFFIX}"))


def load_sparse(directory: str | Path, device: str = "cuda", tokens: int = TOKENS) -> tuple[Any, list[Choice]]:
    """The model on a GPU with sparse tensor cores, and what was chosen for each 2:4 matrix.

    DeviceError where this machine lacks something; ArtefactError for a directory that is damaged or of a later version.
    """
    try:
        return sparse24_loader.load_sparse(str(directory), device, tokens)
    except sparse24_loader.NotHereError as error:
        raise DeviceError(str(error)) from error
    except sparse24_loader.DamagedError as error:
        raise ArtefactError(str(error)) from error


def dense_state(directory: str | Path) -> dict[str, Tensor]:
    """All tensors with their zeros, on any machine."""
    try:
        return read_state(str(directory))[0]
    except sparse24_loader.DamagedError as error:
        raise ArtefactError(str(error)) from error
