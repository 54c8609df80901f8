"""What the files of a checkpoint say about themselves: the headers of its shards, read without the weights.

Everything that can be seen to be wrong here is refused here, before a weight is read.
"""

import json
import math
from pathlib import Path
from typing import NamedTuple

import torch

from secateur.errors import ArtefactError, ModelError
from secateur.models.container import AGAIN, read_header

DENSE = ".safetensors"
INDEX, WHOLE = "model.safetensors.index.json", "model.safetensors"
SPARSE = ".sparse.safetensors"
"""How packed files end, see ``secateur.export``: the names of weights that must be unpacked first."""
STORED = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
"""Types of safetensors in which weights may be stored."""


class Size(NamedTuple):
    """Of one stored tensor."""

    shape: tuple[int, ...]
    """Unpacked."""
    bytes: int
    """In the file, packed or not."""

    @property
    def elements(self) -> int:
        return math.prod(self.shape)


Headers = dict[str, tuple[tuple[int, ...], str]]
"""Shape and type of every stored tensor."""


def weight_files(
    directory: Path, suffix: str = DENSE, advice: str = "give a directory that save_pretrained wrote"
) -> list[Path]:
    """The files that transformers would read: the one whole file, or those of the index; without either, all.

    ``suffix``: how they end in a directory that was packed. ArtefactError where there is none, or one lacks.
    """
    if not directory.is_dir():
        raise ArtefactError(f"no directory {directory}; {advice}")
    held = sorted(path for path in directory.glob(f"*{suffix}") if path.is_file())
    if not held:
        raise ArtefactError(f"{directory}: no {suffix} file; {advice}")
    if (whole := directory / f"model{suffix}") in held:
        return [whole]
    if not (directory / INDEX).is_file():
        return held
    wanted = {directory / (name.removesuffix(DENSE) + suffix) for name in _places(directory / INDEX).values()}
    if missing := sorted(wanted - {*held}):
        raise ArtefactError(f"{directory}: {INDEX} asks for {missing[0].name}, which is not there; {AGAIN}")
    return sorted(wanted)


def shards(directory: Path) -> list[Path]:
    """The files of a model that is to be loaded. ModelError where one lacks."""
    try:
        return weight_files(directory)
    except ArtefactError as error:
        raise ModelError(str(error)) from error


def read_headers(files: list[Path], codes: bool = False) -> Headers:
    """All of them. ModelError for a file that is not what its header or the index says, or whose weights are codes.

    ``codes``: these are what is wanted.
    """
    held = {path.name: _header(path) for path in files}
    headers = {name: entry for header in held.values() for name, entry in header.items()}
    for name, (shape, kind) in headers.items():
        if not codes and name.endswith(".weight") and len(shape) > 1 and kind not in STORED:
            raise ModelError(
                f"{files[0].parent}: {name} is stored as {kind}, wanted one of {', '.join(STORED)}; prune the model "
                "that was not quantized, or copy or download it again"
            )
    if files and files[0].name != WHOLE:
        for name, file in _places(files[0].parent / INDEX).items():
            if name not in held[file]:
                raise ModelError(
                    f"{files[0].parent}: the index has {name} in {file}, which lacks it; copy or download it again"
                )
    return headers


def _places(index: Path) -> dict[str, str]:
    try:
        return {name: str(file) for name, file in json.loads(index.read_text(encoding="utf-8"))["weight_map"].items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ArtefactError(f"{index}: no index ({type(error).__name__}: {error}); {AGAIN}") from error


def _header(path: Path) -> Headers:
    try:
        return {name: (entry.shape, entry.dtype) for name, entry in read_header(path).tensors.items()}
    except ArtefactError as error:
        raise ModelError(str(error)) from error
