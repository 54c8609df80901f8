"""Mask and planes against a byte-by-byte oracle in plain Python, and back again, bit for bit."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from secateur.core.packing import (
    WORDS,
    from_bits,
    from_planes,
    join,
    kept_elements,
    mask_bytes,
    planes,
    split,
    to_bits,
)


def tensor(data: bytes) -> torch.Tensor:
    return torch.tensor(list(data), dtype=torch.uint8)


def packed_by_hand(data: bytes, width: int) -> bytes:
    elements = [data[i : i + width] for i in range(0, len(data), width)]
    mask = bytearray(-(-len(elements) // 8))
    for i, element in enumerate(elements):
        mask[i // 8] |= any(element) << i % 8
    kept = [element for element in elements if any(element)]
    return bytes(mask) + bytes(element[plane] for plane in range(width) for element in kept)


@st.composite
def contents(draw):
    """A width, and bytes of whole elements of which many are zero."""
    width = draw(st.sampled_from(sorted(WORDS)))
    element = st.one_of(st.just(bytes(width)), st.binary(min_size=width, max_size=width))
    return width, b"".join(draw(st.lists(element, max_size=70)))


@settings(max_examples=200, deadline=None)
@given(contents())
def test_split_is_the_oracles_and_join_undoes_it(content):
    width, data = content
    dense = tensor(data)
    packed = split(dense, width)
    assert bytes(packed.tolist()) == packed_by_hand(data, width)
    assert torch.equal(join(packed, width, len(data) // width), dense)
    assert torch.equal(from_planes(planes(dense, width), width), dense)
    assert kept_elements(dense, width) == sum(any(data[i : i + width]) for i in range(0, len(data), width))


def test_by_hand():
    """Little-endian 16 bit: 1.0, 0, -0.0 (kept: a bit is set), 0, a NaN with a payload."""
    dense = tensor(b"\x80\x3f\x00\x00\x00\x80\x00\x00\x01\x7f")
    assert bytes(split(dense, 2).tolist()) == b"\x15" + b"\x80\x00\x01" + b"\x3f\x80\x7f"
    assert bytes(planes(tensor(b"abcdefgh"), 4).tolist()) == b"aebfcgdh"


@pytest.mark.parametrize("elements", [0, 1, 7, 8, 9, 4096])
def test_bits_and_back(elements):
    kept = torch.rand(elements, generator=torch.Generator().manual_seed(elements)) < 0.5
    bits = to_bits(kept)
    assert len(bits) == mask_bytes(elements)
    assert torch.equal(from_bits(bits, elements), kept)
    assert all(bool(bits[i // 8] >> i % 8 & 1) == bool(kept[i]) for i in range(elements))


def test_a_large_random_matrix_of_every_width():
    generator = torch.Generator().manual_seed(0)
    for width in WORDS:
        dense = torch.randint(0, 256, (20_000, width), dtype=torch.uint8, generator=generator)
        dense[torch.rand(20_000, generator=generator) < 0.6] = 0
        packed = split(dense.view(-1), width)
        assert len(packed) == 2_500 + width * int(dense.any(1).sum())
        assert torch.equal(join(packed, width, 20_000), dense.view(-1))


def test_what_does_not_fit_is_refused():
    packed = split(tensor(b"\x01\x00\x02\x03"), 1)
    with pytest.raises(ValueError, match="keeps 3 bytes of values, got 2"):
        join(packed[:-1], 1, 4)
    with pytest.raises(ValueError, match="keeps 3 bytes of values, got 4"):
        join(torch.cat([packed, packed[-1:]]), 1, 4)
    with pytest.raises(ValueError, match="16 elements has 2 bytes, got 1"):
        join(packed[:1], 1, 16)
