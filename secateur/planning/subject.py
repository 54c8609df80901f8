"""The model as a plan sees it: its shapes and sizes, from the headers of its files or from the object that it is."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch

from secateur.config import PruneConfig
from secateur.models.adapter import DecoderAdapter
from secateur.models.branches import attached, refuse_branches
from secateur.models.load import Loaded
from secateur.models.offload import is_offloaded, stays_on_disk
from secateur.models.skeleton import skeleton
from secateur.planning.cost import FLOAT32

if TYPE_CHECKING:
    from secateur.runs import Source

GGUF_COPIES = 2
"""Of a tensor in float32 while it is dequantized, besides the one that the model gets."""


@dataclass(frozen=True)
class Subject:
    """A model that is to be planned for."""

    adapter: DecoderAdapter
    source: str
    dtype: torch.dtype
    file_bytes: int | None
    gguf: bool

    def to_dict(self) -> dict[str, Any]:
        return {
            "source": self.source,
            "class": type(self.adapter.model).__name__,
            "dtype": str(self.dtype).removeprefix("torch."),
            "parameters": self.parameters,
            "bytes": self.bytes,
        }

    @property
    def parameters(self) -> int:
        return sum(p.numel() for p in self.adapter.model.parameters())

    @property
    def bytes(self) -> int:
        return self.parameters * self.dtype.itemsize

    @property
    def unpacking(self) -> int:
        """Bytes that reading a GGUF file takes besides the model: the file, and copies of its largest tensor."""
        if not self.gguf:
            return 0
        largest = max(p.numel() for p in self.adapter.model.parameters())
        return (self.file_bytes or 0) + GGUF_COPIES * largest * FLOAT32

    def on_disk(self, offload: Literal["auto", "on", "off"]) -> bool:
        """Whether the run leaves the blocks there; an object has them where they are."""
        if self.file_bytes is None:
            return is_offloaded(self.adapter.model)
        return stays_on_disk(offload, self.file_bytes, gguf=self.gguf)

    @property
    def outside_blocks(self) -> int:
        """Bytes of embeddings, last norm and head."""
        inside = sum(p.numel() for block in self.adapter.blocks for p in block.parameters())
        return (self.parameters - inside) * self.dtype.itemsize


@contextmanager
def subject_of(model: "Source", config: PruneConfig) -> Iterator[Subject]:
    """The model by its shapes, or as the object it is."""
    if isinstance(model, str | os.PathLike):
        bones = skeleton(os.fspath(model), config.dtype)
        with bones.adapter() as adapter:
            yield Subject(adapter, bones.source, bones.dtype, bones.file_bytes, bones.gguf)
        return
    held = model.model if isinstance(model, Loaded) else model
    refuse_branches(attached(held), "this model")
    source = model.source if isinstance(model, Loaded) else model.name_or_path or type(model).__name__
    yield Subject(DecoderAdapter(held), source, held.dtype, None, False)
