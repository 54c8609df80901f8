"""What the files of a checkpoint say about themselves: the headers of its shards, read without the weights.

A header is eight bytes of length and then JSON. They are read by hand: the library maps the whole file, which a full
machine refuses. Everything that can be seen to be wrong here is refused here, before a weight is read.
"""

import json
from pathlib import Path
from typing import NamedTuple

import torch

from secateur.errors import ModelError

INDEX, WHOLE = "model.safetensors.index.json", "model.safetensors"
SPARSE = ".sparse.safetensors"
"""How packed files end, see ``secateur.export``: the names of weights that must be unpacked first."""
LONGEST_HEADER = 100_000_000
"""Bytes; safetensors allows no more."""
STORED = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
"""Types of safetensors in which weights may be stored."""


class Size(NamedTuple):
    """Of one stored tensor."""

    elements: int
    bytes: int
    """In the file, packed or not."""


Headers = dict[str, tuple[tuple[int, ...], str]]
"""Shape and type of every stored tensor."""


def shards(directory: Path) -> list[Path]:
    """The files that transformers would read: the one whole file, or those of the index. ModelError where one lacks."""
    index = directory / INDEX
    if (directory / WHOLE).is_file() or not index.is_file():
        return [directory / WHOLE]
    names = sorted(set(_places(index).values()))
    missing = [name for name in names if not (directory / name).is_file()]
    if missing:
        raise ModelError(
            f"{directory} lacks {len(missing)} of {len(names)} shards, such as {missing[0]}; copy them too"
        )
    return [directory / name for name in names]


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
    return json.loads(index.read_text(encoding="utf-8"))["weight_map"]


def _header(path: Path) -> Headers:
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= min(size - 8, LONGEST_HEADER):
            raise ModelError(
                f"{path} is no safetensors file, its header would have {length} bytes; copy or download it again"
            )
        entries = json.loads(file.read(length))
    entries.pop("__metadata__", None)
    end = max((entry["data_offsets"][1] for entry in entries.values()), default=0)
    if 8 + length + end != size:
        raise ModelError(f"{path} has {size} bytes and {8 + length + end} by its header; copy or download it again")
    return {name: (tuple(entry["shape"]), entry["dtype"]) for name, entry in entries.items()}
