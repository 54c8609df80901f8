"""What packing saved: bytes of files, bits of a weight."""

from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from secateur.export.coding import MASK
from secateur.export.sparse_safetensors import Packed, PackedFile
from secateur.models.branches import FOLDER

FLOATING = ("F", "BF")
"""How the types begin whose elements are weights, one each; an integer may hold several codes."""


@dataclass(frozen=True)
class FileSize:
    """A safetensors file before and after, in bytes."""

    name: str
    dense: int
    packed: int


@dataclass(frozen=True)
class Group:
    """Tensors added up."""

    tensors: int
    elements: int
    dense_bytes: int
    packed_bytes: int

    @property
    def bits(self) -> float | None:
        """Of an element as packed; None where there is none."""
        return 8 * self.packed_bytes / self.elements if self.elements else None


@dataclass(frozen=True)
class Sizes:
    """Of all safetensors files of a directory."""

    files: tuple[FileSize, ...]
    sparse: Group
    """Floating-point matrices that are packed with a mask: the pruned ones."""
    matrices: dict[str, tuple[int, ...]]
    """Their shapes, as stored."""
    codes: Group
    """Matrices of integers, whatever a quantizer put into them."""
    whole: Group
    """Every tensor, but those of low-rank branches, which are in the files alone."""

    @property
    def dense_bytes(self) -> int:
        return sum(file.dense for file in self.files)

    @property
    def packed_bytes(self) -> int:
        return sum(file.packed for file in self.files)

    @property
    def bits_per_weight(self) -> float | None:
        """The files' bits for each element of the model; None where integers hold codes, nobody here knows how many."""
        return 8 * self.packed_bytes / self.whole.elements if self.whole.elements and not self.codes.tensors else None

    def to_dict(self) -> dict[str, Any]:
        share = self.packed_bytes / self.dense_bytes
        bits = {"sparse": self.sparse.bits, "whole": self.bits_per_weight}
        sizes = {"dense_bytes": self.dense_bytes, "packed_bytes": self.packed_bytes, "share": share}
        return {**asdict(self), **sizes, "bits_per_weight": bits}


def sizes_of(files: Sequence[PackedFile]) -> Sizes:
    own = [file for file in files if file.path.parent.name != FOLDER]
    tensors = {name: packed for file in own for name, packed in file.tensors.items()}
    matrices = {name: packed for name, packed in tensors.items() if len(packed.dense.shape) >= 2}
    floating = {name: packed for name, packed in matrices.items() if packed.dense.dtype.startswith(FLOATING)}
    sparse = {name: packed for name, packed in floating.items() if packed.coding == MASK}
    return Sizes(
        tuple(FileSize(file.path.name, file.dense.file_bytes, file.header.file_bytes) for file in files),
        sparse=_group(sparse.values()),
        matrices={name: packed.dense.shape for name, packed in sparse.items()},
        codes=_group([packed for name, packed in matrices.items() if name not in floating]),
        whole=_group(tensors.values()),
    )


def _group(tensors: Collection[Packed]) -> Group:
    dense = sum(packed.dense.bytes for packed in tensors)
    elements = sum(packed.dense.elements for packed in tensors)
    return Group(len(tensors), elements, dense, sum(packed.bytes for packed in tensors))
