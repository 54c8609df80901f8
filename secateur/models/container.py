"""Safetensors files read and written by hand: eight bytes of length, a JSON header, then the bytes of the tensors.

The library wants all tensors at once to write a file, maps all of it to read a header, which a full machine refuses,
and hides the header's text; here a file is written tensor by tensor, and a header can be kept word by word. Nothing in
a header is believed: it must describe the file to the byte, without gaps, overlaps or names that come twice.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from secateur.errors import ArtefactError

AGAIN = "copy or download it again"
LONGEST_HEADER = 100_000_000
"""Bytes; safetensors allows no more."""
BITS = {
    "F64": 64, "F32": 32, "F16": 16, "BF16": 16, "C64": 64,
    "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "F6_E2M3": 6, "F6_E3M2": 6, "F4": 4,
    "I64": 64, "I32": 32, "I16": 16, "I8": 8, "U64": 64, "U32": 32, "U16": 16, "U8": 8, "BOOL": 8,
}  # fmt: skip
"""Of an element, for every type that safetensors has."""
MOST_DIMENSIONS = 64
"""torch's own limit."""


@dataclass(frozen=True)
class Entry:
    """One tensor of a file."""

    dtype: str
    """As safetensors spells it."""
    shape: tuple[int, ...]
    start: int
    """Bytes behind the header."""
    end: int

    @property
    def bytes(self) -> int:
        return self.end - self.start

    @property
    def elements(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class Header:
    """What a header says."""

    text: bytes
    """Word by word, with its padding."""
    tensors: dict[str, Entry]
    """In the order in which they lie."""
    metadata: dict[str, str]

    @property
    def data_at(self) -> int:
        """Where the first tensor's first byte lies in the file."""
        return 8 + len(self.text)

    @property
    def file_bytes(self) -> int:
        return self.data_at + max((entry.end for entry in self.tensors.values()), default=0)


def read_header(path: Path, longest: int = LONGEST_HEADER) -> Header:
    """ArtefactError for a file that is not what its header says, and for a header of more bytes than ``longest``."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        most = min(size - 8, longest)
        if not 2 <= length <= most:
            raise ArtefactError(
                f"{path} is no safetensors file, its header would have {length} bytes, wanted 2 to {most}; {AGAIN}"
            )
        header = parse_header(file.read(length), str(path))
    if header.file_bytes != size:
        raise ArtefactError(f"{path} has {size} bytes and {header.file_bytes} by its header; {AGAIN}")
    return header


def parse_header(text: bytes, where: str) -> Header:
    """ArtefactError for a header that describes no file."""
    try:
        parsed = parse_json(text.decode("utf-8"))
        metadata = parsed.pop("__metadata__", {})
        tensors = {name: _entry(name, value) for name, value in parsed.items()}
        if not all(isinstance(value, str) for value in metadata.values()):
            raise ValueError("its metadata are not words")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ArtefactError(f"{where}: not a safetensors header ({error}); {AGAIN}") from error
    tensors = dict(sorted(tensors.items(), key=lambda item: (item[1].start, item[1].end)))
    end = 0
    for name, entry in tensors.items():
        if entry.start != end:
            raise ArtefactError(f"{where}: {name} begins at {entry.start}, wanted {end}; {AGAIN}")
        end = entry.end
    return Header(text, tensors, metadata)


def parse_json(text: str) -> Any:
    """Raises ValueError for what is no JSON and for an object that has a name twice."""
    return json.loads(text, object_pairs_hook=_unique)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name comes twice")
    return found


def _entry(name: str, value: dict[str, Any]) -> Entry:
    dtype, shape, (start, end) = value["dtype"], value["shape"], value["data_offsets"]
    if dtype not in BITS:
        raise ValueError(f"{name} has the type {dtype!r}, wanted one of {', '.join(BITS)}")
    if not all(is_count(number) for number in (*shape, start, end)):
        raise ValueError(f"{name} has the shape {shape} at {start}:{end}, wanted numbers from 0 on")
    if len(shape) > MOST_DIMENSIONS:
        raise ValueError(f"{name} has {len(shape)} dimensions, wanted at most {MOST_DIMENSIONS}")
    entry = Entry(dtype, tuple(shape), start, end)
    if entry.elements * BITS[dtype] != 8 * entry.bytes:
        raise ValueError(f"{name} is {dtype} of shape {shape} in {entry.bytes} bytes")
    return entry


def is_count(value: Any) -> bool:
    """A whole number from 0 on that a file can have; JSON's true is none."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 63


def header_text(tensors: Mapping[str, Entry], metadata: Mapping[str, str], room: int = 0) -> bytes:
    """The JSON, padded with spaces to `room` bytes and to a multiple of eight. ArtefactError where it is too long."""
    entries: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    for name, entry in tensors.items():
        entries[name] = {"dtype": entry.dtype, "shape": entry.shape, "data_offsets": (entry.start, entry.end)}
    text = json.dumps(entries, separators=(",", ":")).encode()
    if len(text) > LONGEST_HEADER:
        raise ArtefactError(
            f"the header would have {len(text)} bytes, safetensors allows {LONGEST_HEADER}; save it in smaller shards"
        )
    return text.ljust(max(room, len(text) + -len(text) % 8))


def write_header(file: BinaryIO, text: bytes) -> None:
    file.write(len(text).to_bytes(8, "little"))
    file.write(text)
