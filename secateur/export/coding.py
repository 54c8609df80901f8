"""A tensor's bytes as zstd frames: a chunk of at most ``CHUNK`` bytes becomes one frame that can be read alone.

The streams of a chunk (mask, planes) are told to zstd one after the other, so that no block of the frame mixes two: a
block has one Huffman table. Searching for repetitions is nearly switched off (a tiny hash, matches of seven bytes and
more): weights hardly repeat, and what is found costs more than it saves. Runs of zeros are found all the same.

A frame is opened only when its header says that it holds no more bytes than its chunk can have: memory is bounded
whatever a file claims. Each frame carries zstd's own checksum.
"""

import torch
import zstandard
from torch import Tensor

from secateur.core.packing import from_planes, join, kept_elements, mask_bytes, planes, split
from secateur.models.container import BITS

CHUNK = 1 << 20
"""Bytes of a tensor in one frame: what a core's cache holds while it is coded."""
MASK, PLANES = "mask", "planes"
"""The codings: a mask and the planes of what is not zero, or the planes of everything."""
MASK_FROM = {1: 1 / 2, 2: 1 / 16, 4: 1 / 32, 8: 1 / 64}
"""By bytes of an element: the share of zeros above which a mask is worth its bit for every element. Single bytes are
left to zstd longer: it stores a frequent byte in about a bit, too, and several times faster."""
_PARAMETERS = zstandard.ZstdCompressionParameters(
    strategy=zstandard.STRATEGY_FAST, window_log=17, hash_log=6, chain_log=6, search_log=1, min_match=7,
    target_length=0, write_checksum=True, write_content_size=True,
)  # fmt: skip


def raw(data: Tensor) -> memoryview:
    """The bytes of a uint8 tensor, not copied."""
    return data.numpy().data


def width_of(dtype: str) -> int:
    """Bytes of an element; types with fewer than eight bits are coded as the bytes they are packed in."""
    return max(BITS[dtype] // 8, 1)


def choose(chunk: Tensor, width: int) -> str:
    """The coding that suits these bytes."""
    elements = len(chunk) // width
    return MASK if elements - kept_elements(chunk, width) > MASK_FROM[width] * elements else PLANES


def encode(chunk: Tensor, width: int, coding: str) -> bytes:
    """One frame from the bytes (uint8) of a chunk."""
    data = split(chunk, width) if coding == MASK else planes(chunk, width)
    cut = mask_bytes(len(chunk) // width) if coding == MASK else 0
    plane = (len(data) - cut) // width
    streams = [stream for stream in data.split([cut, *[plane] * width]) if len(stream)]
    compressor = zstandard.ZstdCompressor(compression_params=_PARAMETERS).compressobj(size=len(data))
    parts: list[bytes] = []
    for stream in streams:
        parts += compressor.compress(raw(stream)), compressor.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK)
    return b"".join([*parts, compressor.flush()])


def decode(frame: bytes, width: int, coding: str, size: int) -> Tensor:
    """The `size` bytes of a chunk. Raises ValueError for a frame that does not hold just these."""
    elements = size // width
    most = size + (mask_bytes(elements) if coding == MASK else 0)
    try:
        said = zstandard.get_frame_parameters(frame).content_size
        if said > most:
            raise ValueError(f"a frame of {said} bytes where at most {most} can be")
        held = zstandard.ZstdDecompressor().decompress(frame, max_output_size=most, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise ValueError(str(error)) from error
    if coding == PLANES and len(held) != size:
        raise ValueError(f"a frame of {len(held)} bytes where {size} were promised")
    data = torch.frombuffer(bytearray(held), dtype=torch.uint8) if held else torch.empty(0, dtype=torch.uint8)
    return join(data, width, elements) if coding == MASK else from_planes(data, width)
