"""Lossless packing of raw weights for a download: one bit says which elements are there, their bytes follow by planes.

    dense elements        a 0 b c 0 0 d 0            of `width` bytes each
    masked                01001101 | planes of a b c d
    planes                first bytes of all, second bytes of all, ...

A plane is what an entropy coder can shrink: the upper byte of bfloat16 weights (sign and exponent) takes few values,
the lower one nearly all, and side by side they would spoil one another. Elements are compared as bit patterns, never
as numbers: -0.0 is kept, NaNs come back with their payload, and types that torch does not know are bytes like any.

Bit i of a mask byte is element 8 j + i, 1 = kept (not all of its bits are zero); the last byte is filled up with zeros.

n = bytes of all elements, e = elements, v = kept elements, b = bytes of the mask, m = bytes of mask and values.
"""

import torch
from jaxtyping import Bool, Int, Shaped, UInt8
from torch import Tensor

WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""An integer type for every width of elements."""
PIECE = 1 << 16
"""Elements that are compacted at one time."""
_GATHER = 0x0102040810204080
"""Times eight bytes of 0 or 1: byte i goes to bit i of the product's top byte, and nothing carries."""
_SPREAD = ((torch.arange(256)[:, None] >> torch.arange(8)) & 1).to(torch.uint8).view(torch.int64)[:, 0]
"""The eight bytes of 0 or 1 that each mask byte stands for."""


def planes(data: UInt8[Tensor, " n"], width: int) -> UInt8[Tensor, " n"]:
    """The bytes of elements of `width` bytes, sorted by their place in the element."""
    return torch.stack(data.view(len(data) // width, width).unbind(1)).view(-1)


def from_planes(data: UInt8[Tensor, " n"], width: int) -> UInt8[Tensor, " n"]:
    return torch.stack(data.view(width, len(data) // width).unbind(0), dim=1).view(-1)


def to_bits(kept: Bool[Tensor, " e"]) -> UInt8[Tensor, " b"]:
    whole = torch.nn.functional.pad(kept, (0, -len(kept) % 8)).view(torch.int64)
    return ((whole * _GATHER) >> 56).to(torch.uint8)  # the top byte; an arithmetic shift's sign is cut off


def from_bits(bits: UInt8[Tensor, " b"], elements: int) -> Bool[Tensor, " e"]:
    """Raises ValueError where there are not as many mask bytes as so many elements have."""
    if len(bits) != mask_bytes(elements):
        raise ValueError(f"a mask of {elements} elements has {mask_bytes(elements)} bytes, got {len(bits)}")
    return _SPREAD[bits.int()].view(torch.bool)[:elements]


def mask_bytes(elements: int) -> int:
    return -(-elements // 8)


def kept_elements(data: UInt8[Tensor, " n"], width: int) -> int:
    """How many have a bit that is not zero."""
    return int(data.view(WORDS[width]).count_nonzero())


def split(data: UInt8[Tensor, " n"], width: int) -> UInt8[Tensor, " m"]:
    """Mask bytes, then the planes of the kept elements; found a piece at a time, which stays in the cache."""
    masks, values = [], []
    for words in data.view(WORDS[width]).split(PIECE):
        kept = words.bool()  # not zero; the comparison would take ten times as long
        masks.append(kept)
        values.append(_compact(words, kept))
    return torch.cat([to_bits(torch.cat(masks)), planes(torch.cat(values).view(torch.uint8), width)])


def _compact(words: Shaped[Tensor, " e"], kept: Bool[Tensor, " e"]) -> Shaped[Tensor, " v"]:
    """The kept elements. ``masked_select`` gives the same in three times the time.

    Every element is added to the slot of its rank, the number of kept ones up to it: the dropped ones are zero and add
    nothing to a slot that is not theirs.
    """
    slots = words.new_zeros(int(kept.count_nonzero()) + 1)
    return slots.scatter_add_(0, _ranks(kept).long(), words)[1:]


def join(packed: UInt8[Tensor, " m"], width: int, elements: int) -> UInt8[Tensor, " n"]:
    """What ``split`` was given. Raises ValueError where mask and values do not fit one another or `elements`."""
    cut = mask_bytes(elements)
    kept = from_bits(packed[:cut], elements)
    wanted = int(kept.count_nonzero()) * width
    if len(packed) - cut != wanted:
        raise ValueError(f"the mask keeps {wanted} bytes of values, got {len(packed) - cut}")
    values = from_planes(packed[cut:], width).view(WORDS[width])
    return torch.cat([values.new_zeros(1), values]).index_select(0, _ranks(kept)).mul_(kept).view(torch.uint8)


def _ranks(kept: Bool[Tensor, " e"]) -> Int[Tensor, " e"]:
    """How many are kept up to and with each element. A sum over bool would be taken more slowly."""
    return kept.int().cumsum_(0, dtype=torch.int32)
