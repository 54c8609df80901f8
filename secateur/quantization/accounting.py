"""What a quantized directory really takes: codes, scales, zero points, and all that stayed as it was.

Counted from the headers of what is stored, not from the scheme: of a packed directory it is what lies in the packed
files. The one number that is worked out is what a bitmask would make of it: a bit for each weight, codes of non-zero
weights only, scales and zero points as they are.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from secateur.models.headers import Size
from secateur.quantization.compressed import Dequantized

CODES = ("weight", "weight_packed")
"""Tensors of a quantized linear that hold its codes; the rest of it are scales, zero points and a shape."""


@dataclass(frozen=True)
class Storage:
    """Bytes and bits of a quantized directory."""

    format: str
    """pack-quantized or int-quantized."""
    bits: int
    group_size: int | None
    """Inputs that share a scale; None = all of an output row."""
    symmetric: bool
    activations: str
    """none, dynamic or static."""
    linears: int
    weights: int
    """In the quantized linears."""
    inputs: list[int]
    """How many these have, each number once."""
    zeros: int
    """Among them."""
    pruned: int
    """Zeros that were promised; the others came of rounding."""
    code_bytes: int
    side_bytes: int
    """Scales, zero points, scales of inputs, shapes."""
    other_bytes: int
    """Embeddings, norms, biases and linears that were left alone."""
    other_weights: int
    """Elements of these."""
    file_bytes: int
    """Of the safetensors files, headers included."""

    @property
    def bits_per_weight(self) -> float:
        """Of a quantized weight, as stored."""
        return 8 * (self.code_bytes + self.side_bytes) / max(self.weights, 1)

    @property
    def masked_bits_per_weight(self) -> float:
        """Of a quantized weight, were there a bitmask and no codes of zeros."""
        kept = self.bits * (self.weights - self.zeros)
        return (self.weights + kept + 8 * self.side_bytes) / max(self.weights, 1)

    @property
    def nominal(self) -> float:
        """How many times smaller papers call it: 32 bit over code bits times density, without masks, indices and
        scales. 2:4 in int4 is "16x"."""
        return 32 * self.weights / (self.bits * max(self.weights - self.pruned, 1))

    @property
    def whole_bits_per_weight(self) -> float:
        """Of every number of the model, embeddings included."""
        return 8 * self.file_bytes / max(self.weights + self.other_weights, 1)

    def to_dict(self) -> dict[str, Any]:
        derived = ("bits_per_weight", "masked_bits_per_weight", "whole_bits_per_weight", "nominal")
        return {**asdict(self), **{name: getattr(self, name) for name in derived}}


def storage_of(
    model: Dequantized, zeros: Mapping[str, tuple[int, int]], sizes: Mapping[str, Size], file_bytes: int
) -> Storage:
    """``zeros``: of every weight by its name, those there and those promised, where that is of interest.
    ``sizes``: of what is stored."""
    counts = [zeros.get(f"{linear}.weight", (0, 0)) for linear in model.linears]
    parts = [(name.rpartition(".")[2], sizes[name]) for linear in model.linears for name in model.stored_names(linear)]
    plain = [sizes[name] for name in model.plain]
    arguments, shapes = model.scheme.weights, [_shape(model, linear, sizes) for linear in model.linears]
    return Storage(
        format=model.format,
        bits=arguments.num_bits,
        group_size=arguments.group_size,
        symmetric=arguments.symmetric,
        activations=_activations(model.scheme.input_activations),
        linears=len(model.linears),
        weights=sum(map(math.prod, shapes)),
        inputs=sorted({shape[-1] for shape in shapes}),
        zeros=sum(there for there, _ in counts),
        pruned=sum(promised for _, promised in counts),
        code_bytes=sum(size.bytes for name, size in parts if name in CODES),
        side_bytes=sum(size.bytes for name, size in parts if name not in (*CODES, "bias")),
        other_bytes=sum(size.bytes for size in plain),
        other_weights=sum(size.elements for size in plain),
        file_bytes=file_bytes,
    )


def _shape(model: Dequantized, linear: str, sizes: Mapping[str, Size]) -> tuple[int, ...]:
    told = f"{linear}.weight_shape"
    return tuple(model.stored[told].tolist()) if told in model.stored else sizes[f"{linear}.weight"].shape


def _activations(told: Any) -> str:
    if told is None:
        return "none"
    return "dynamic" if told.dynamic else "static"
