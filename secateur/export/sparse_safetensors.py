"""Sparse safetensors: an ordinary .safetensors file in which every tensor is zstd frames of its coded bytes.

docs/sparse_safetensors.md is the definition. A packed file keeps the names; each tensor is one row of U8, the frames of
its chunks one after the other. The metadata tell the rest:

    "sparse_safetensors": "1"       the version
    "header": "{...}   "            the dense file's own header, word by word
    "packing": "{...}"              JSON: {"chunk": bytes, "header_crc32": ..., "tensors": {NAME: {"coding": "mask" or
                                    "planes", "width": bytes of an element, "crc32": of the dense bytes,
                                    "frames": [bytes of each frame]}}}

The dense file is its header and its tensors' bytes in order, each under a checksum, so it comes back byte for byte,
whoever wrote it. Packing and unpacking work on one chunk at a time.
"""

import json
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from io import BufferedReader, BufferedWriter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from secateur.errors import ArtefactError
from secateur.export.coding import CHUNK, MASK, PLANES, choose, decode, encode, raw, width_of
from secateur.models.container import (
    AGAIN,
    Entry,
    Header,
    header_text,
    is_count,
    parse_header,
    parse_json,
    read_header,
    write_header,
)

VERSION = 1
KEY = "sparse_safetensors"
LARGEST_CHUNK = 1 << 22
"""Bytes; a file that asks for more is refused, because a chunk is held in memory, about a dozen times while a mask of
single bytes is undone."""
HEADER, SHARE = 500_000, 64
"""A file whose header has more bytes than so many and than this share of the file is refused: hostile JSON takes almost
fifty times its bytes while it is parsed, which is 25 MB, or less than the file itself has."""
MOST_CRC = (1 << 32) - 1

Done = Callable[[int], None]
"""Told how many bytes of the dense file have been worked on, its header among them."""


@dataclass(frozen=True)
class Packed:
    """How one tensor is packed."""

    dense: Entry
    """Type, shape and place in the dense file."""
    coding: str
    crc32: int
    """Of the dense bytes."""
    frames: tuple[int, ...]
    """Bytes of each frame."""

    @property
    def bytes(self) -> int:
        return sum(self.frames)

    def to_dict(self) -> dict[str, Any]:
        width = width_of(self.dense.dtype)
        return {"coding": self.coding, "width": width, "crc32": self.crc32, "frames": self.frames}


# ---- pack


def pack_file(dense: Path, out: Path, done: Done) -> None:
    """Write `out`. ArtefactError where `dense` is not what its header says.

    The header comes first and is known last: room for the longest it can be is left, what remains is padding.
    """
    header = read_header(dense)
    longest = {
        name: Packed(entry, PLANES, MOST_CRC, (largest_frame(CHUNK),) * chunks_of(entry, CHUNK))
        for name, entry in header.tensors.items()
    }
    room = len(packed_header(header, longest))
    tensors: dict[str, Packed] = {}
    with dense.open("rb") as file, out.open("wb") as to:
        to.seek(8 + room)
        for name, entry in header.tensors.items():
            file.seek(header.data_at + entry.start)
            tensors[name] = pack_tensor(file, entry, to)
            done(header.data_at + entry.end)
        if room > longest_header(to.tell()):
            raise ArtefactError(
                f"{dense} has too many tensors for its size, headers take {room} bytes; save it in shards"
            )
        to.truncate()  # a file of empty tensors has nothing behind its header
        to.seek(0)
        write_header(to, packed_header(header, tensors, room))


def pack_tensor(file: BufferedReader, entry: Entry, to: BufferedWriter) -> Packed:
    """Read a tensor from where `file` stands, write its frames."""
    width, coding, crc, frames = width_of(entry.dtype), PLANES, 0, []
    for size in chunk_sizes(entry, CHUNK):
        data = bytearray(size)
        if file.readinto(data) != size:
            raise ArtefactError(f"{file.name} became shorter while it was read; pack it when it is complete")
        chunk = torch.frombuffer(data, dtype=torch.uint8)
        coding = coding if frames else choose(chunk, width)
        frame = encode(chunk, width, coding)
        to.write(frame)
        frames.append(len(frame))
        crc = zlib.crc32(data, crc)
    return Packed(entry, coding, crc, tuple(frames))


def packed_header(dense: Header, tensors: dict[str, Packed], room: int = 0) -> bytes:
    entries, at = {}, 0
    for name, packed in tensors.items():
        entries[name] = Entry("U8", (packed.bytes,), at, at + packed.bytes)
        at += packed.bytes
    packing = {
        "chunk": CHUNK,
        "header_crc32": zlib.crc32(dense.text),
        "tensors": {name: packed.to_dict() for name, packed in tensors.items()},
    }
    words = {KEY: str(VERSION), "header": dense.text.decode(), "packing": json.dumps(packing, separators=(",", ":"))}
    return header_text(entries, words, room)


def chunk_sizes(entry: Entry, chunk: int) -> Iterator[int]:
    """Bytes of each chunk of a tensor; only the last is shorter."""
    for start in range(0, entry.bytes, chunk):
        yield min(chunk, entry.bytes - start)


def chunks_of(entry: Entry, chunk: int) -> int:
    return -(-entry.bytes // chunk)


def longest_header(file_bytes: int) -> int:
    return max(HEADER, file_bytes // SHARE)


def largest_frame(chunk: int) -> int:
    """Bytes that no frame reaches: zstd adds little to what it cannot shrink, a mask an eighth at most."""
    return 2 * chunk + 1024


# ---- read


@dataclass(frozen=True)
class PackedFile:
    """A packed file whose header has been read and checked."""

    path: Path
    header: Header
    """Its own."""
    dense: Header
    """The dense file's."""
    chunk: int
    tensors: dict[str, Packed]
    """In the order of the dense file."""

    @classmethod
    def open(cls, path: Path) -> "PackedFile":
        """ArtefactError for a file that is not packed, from a later version, or contradicts itself."""
        header = read_header(path, longest_header(path.stat().st_size))
        check_version(path, header.metadata.get(KEY))
        try:
            text = header.metadata["header"].encode()
            packing = parse_json(header.metadata["packing"])
            if zlib.crc32(text) != packing["header_crc32"]:
                raise ValueError("the dense header is not the one that was packed")
            dense = parse_header(text, f"{path}, its dense header")
            if not is_count(packing["chunk"]) or not 8 <= packing["chunk"] <= LARGEST_CHUNK or packing["chunk"] % 8:
                raise ValueError(f"chunks of {packing['chunk']} bytes, wanted a multiple of 8 up to {LARGEST_CHUNK}")
            if not header.tensors.keys() == dense.tensors.keys() == packing["tensors"].keys():
                raise ValueError("the names of the packed and of the dense tensors differ")
            tensors = {
                name: _packed(name, entry, header.tensors[name], packing["tensors"][name], packing["chunk"])
                for name, entry in dense.tensors.items()
            }
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            said = f"no {error}" if isinstance(error, KeyError) else error
            raise ArtefactError(f"{path}: damaged packing ({said}); {AGAIN}") from error
        return cls(path, header, dense, packing["chunk"], tensors)

    def chunks(self, name: str) -> Iterator[Tensor]:
        """The dense bytes of a tensor, a chunk at a time. ArtefactError at the latest behind the last."""
        packed = self.tensors[name]
        width, crc = width_of(packed.dense.dtype), 0
        with self.path.open("rb") as file:
            file.seek(self.header.data_at + self.header.tensors[name].start)
            for length, size in zip(packed.frames, chunk_sizes(packed.dense, self.chunk), strict=True):
                try:
                    data = decode(file.read(length), width, packed.coding, size)
                except ValueError as error:
                    raise ArtefactError(f"{self.path}: {name} is damaged ({error}); {AGAIN}") from error
                crc = zlib.crc32(raw(data), crc)
                yield data
        if crc != packed.crc32:
            raise ArtefactError(f"{self.path}: {name} is damaged (checksum {crc}, not {packed.crc32}); {AGAIN}")

    def check(self, done: Done) -> None:
        """Decode everything. ArtefactError for the first tensor that does not give back the bytes it was made from."""
        for name, packed in self.tensors.items():
            for _ in self.chunks(name):
                pass
            done(self.dense.data_at + packed.dense.end)


def check_version(path: Path, version: str | None) -> None:
    if version is None:
        raise ArtefactError(f"{path}: not packed, its metadata have no {KEY!r}; it can be loaded as it is")
    if version != str(VERSION):
        raise ArtefactError(
            f"{path}: sparse safetensors of version {version[:20]!r}, this secateur reads {VERSION}; install a newer "
            "secateur, or copy or download the file again"
        )


def _packed(name: str, dense: Entry, stored: Entry, told: dict[str, Any], chunk: int) -> Packed:
    """Raises ValueError where a tensor's row of the packing fits neither its dense nor its stored form."""
    packed = Packed(dense, told["coding"], told["crc32"], tuple(told["frames"]))
    if packed.coding not in (MASK, PLANES) or told["width"] != width_of(dense.dtype):
        raise ValueError(f"{name} is coded as {packed.coding!r} with elements of {told['width']!r} bytes")
    if len(packed.frames) != chunks_of(dense, chunk):
        raise ValueError(f"{name} has {len(packed.frames)} frames, wanted {chunks_of(dense, chunk)}")
    if not all(is_count(number) and number <= largest_frame(chunk) for number in packed.frames):
        raise ValueError(f"{name} has frames of other sizes than 0 to {largest_frame(chunk)}")
    if (stored.dtype, stored.shape) != ("U8", (packed.bytes,)):
        raise ValueError(f"{name} is stored as {stored.dtype} of shape {stored.shape}, wanted U8 of ({packed.bytes},)")
    return packed


def unpack_file(packed: Path, out: Path, done: Done) -> None:
    """Write the dense file, byte for byte. ArtefactError for damage; then what was written is worth nothing."""
    file = PackedFile.open(packed)
    with out.open("wb") as to:
        write_header(to, file.dense.text)
        for name, tensor in file.tensors.items():
            for chunk in file.chunks(name):
                to.write(raw(chunk))
            done(file.dense.data_at + tensor.dense.end)
