"""2:4 matrices without their zeros: two values of every four, and where they stood in two bits each.

    group          a 0 0 b        0 0 c 0        0 0 0 0
    values         a b            0 c            0 0
    places         0, 3           0, 2           0, 1         as 2-bit numbers, the lower one first: 4 bits a group
    a byte         two groups, the left one in the lower four bits

Groups with fewer than two non-zeros are filled up with a zero from the left, so that places always rise. 16-bit weights
take 9 bits instead of 16. -0.0 counts as zero and comes back as +0.0; everything else comes back to the bit.

R = out_features, C = in_features, a multiple of 8; V = C / 2 values, P = C / 8 bytes of places in a row.
"""

import torch
from jaxtyping import Shaped, UInt8
from torch import Tensor

GROUP, KEPT, PER_BYTE = 4, 2, 8
"""Weights of a group, those kept, and weights behind one byte of places."""


def first_broken_row(W: Shaped[Tensor, "R C"]) -> int | None:
    """The first row with more than two non-zeros among some four; None where all is well."""
    counts = (W.reshape(len(W), -1, GROUP) != 0).sum(2).amax(1)
    broken = (counts > KEPT).nonzero()
    return int(broken[0]) if len(broken) else None


def pack(W: Shaped[Tensor, "R C"]) -> tuple[Shaped[Tensor, "R V"], UInt8[Tensor, "R P"]]:
    """Values and places. ValueError for a matrix that is not 2:4, or of another width than a multiple of 8."""
    R, C = W.shape
    if C % PER_BYTE:
        raise ValueError(f"2:4 is packed in rows of a multiple of {PER_BYTE} weights, got {C}")
    if (row := first_broken_row(W)) is not None:
        raise ValueError(f"not 2:4: row {row} has more than {KEPT} non-zeros among some {GROUP} weights in a row")
    groups = W.reshape(R, C // GROUP, GROUP)
    kept = (groups != 0).to(torch.int8)
    places = kept.argsort(dim=2, descending=True, stable=True)[..., :KEPT].sort(dim=2).values
    values = groups.gather(2, places) + 0
    nibbles = (places[..., 0] + 4 * places[..., 1]).to(torch.uint8).reshape(R, C // PER_BYTE, 2)
    return values.reshape(R, C // 2).contiguous(), nibbles[..., 0] + 16 * nibbles[..., 1]
