"""Truncated, bit-flipped and hostile files: one line says what is wrong, nothing crashes, memory stays where it was."""

import json
import random
import struct
import zlib

import pytest
import torch
import zstandard
from safetensors.torch import save_file

from secateur.errors import ArtefactError
from secateur.export.coding import CHUNK, MASK, PLANES, encode
from secateur.export.sparse_safetensors import HEADER, LARGEST_CHUNK, pack_file, unpack_file
from secateur.models.container import Entry, header_text, read_header


def nobody(_: int) -> None:
    pass


def unpacked(packed, folder) -> bytes:
    unpack_file(packed, folder / "again", nobody)
    return (folder / "again").read_bytes()


def outcome(path, folder) -> bytes | str:
    """The unpacked bytes, or the line that says why there are none; any other exception fails the test."""
    try:
        return unpacked(path, folder)
    except ArtefactError as error:
        return str(error)


def test_truncated_anywhere(packed, tmp_path):
    whole = packed.read_bytes()
    for length in range(0, len(whole), 64):
        (tmp_path / "cut").write_bytes(whole[:length])
        said = outcome(tmp_path / "cut", tmp_path)
        assert isinstance(said, str), length
        assert "copy or download it again" in said


def test_flipped_bits_are_found_or_do_nothing(dense, packed, tmp_path):
    whole, original = packed.read_bytes(), dense.read_bytes()
    header = read_header(packed).data_at
    moments = random.Random(0)
    places = [moments.randrange(header) for _ in range(700)] + [
        moments.randrange(header, len(whole)) for _ in range(300)
    ]
    found = 0
    for place in places:
        damaged = bytearray(whole)
        damaged[place] ^= 1 << moments.randrange(8)
        (tmp_path / "flipped").write_bytes(damaged)
        result = outcome(tmp_path / "flipped", tmp_path)
        assert isinstance(result, str) or result == original, place
        found += isinstance(result, str)
    assert found > 800  # the rest fell on padding, or on what does not matter


def test_bytes_that_are_cut_out_or_put_in(dense, packed, tmp_path):
    whole, original = packed.read_bytes(), dense.read_bytes()
    moments = random.Random(1)
    for _ in range(300):
        start, length = moments.randrange(len(whole)), moments.randrange(1, 40)
        filling = moments.randbytes(moments.randrange(40))
        (tmp_path / "spliced").write_bytes(whole[:start] + filling + whole[start + length :])
        result = outcome(tmp_path / "spliced", tmp_path)
        assert isinstance(result, str) or result == original


ANYTHING = [
    None,
    True,
    0,
    -1,
    7,
    1 << 31,
    1 << 64,
    10**30,
    1.5,
    float("nan"),
    "",
    "x",
    "\ud800",
    [],
    {},
    [[1]],
    {"a": 1},
]


def places_in(value, way=()):
    """The way to every value inside a JSON value."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in inner:
        yield (*way, key)
        yield from places_in(child, (*way, key))


def with_value(text: str, way, value) -> str:
    found = json.loads(text)
    *path, last = way
    place = found
    for key in path:
        place = place[key]
    place[last] = value
    return json.dumps(found)


def test_every_value_of_every_header_may_be_anything(tmp_path):
    """Found, or without effect; only a dense header that is forged with its checksum may give another sound file."""
    save_file({"W": torch.eye(8), "b": torch.ones(3)}, tmp_path / "dense", metadata={"format": "pt"})
    pack_file(tmp_path / "dense", tmp_path / "packed", nobody)
    whole, original = (tmp_path / "packed").read_bytes(), (tmp_path / "dense").read_bytes()
    at = read_header(tmp_path / "packed").data_at
    outer = whole[8:at].decode()
    metadata = json.loads(outer)["__metadata__"]

    def attempt(text: str) -> bytes | str:
        header = text.encode()
        (tmp_path / "forged").write_bytes(struct.pack("<Q", len(header)) + header + whole[at:])
        return outcome(tmp_path / "forged", tmp_path)

    for value in ANYTHING:
        for way in places_in(json.loads(outer)):
            result = attempt(with_value(outer, way, value))
            assert isinstance(result, str) or result == original, (way, value)
        for way in places_in(json.loads(metadata["packing"])):
            changed = with_value(metadata["packing"], way, value)
            result = attempt(with_value(outer, ("__metadata__", "packing"), changed))
            assert isinstance(result, str) or result == original, (way, value)
        for way in places_in(json.loads(metadata["header"])):
            changed = with_value(metadata["header"], way, value)
            packing = with_value(metadata["packing"], ("header_crc32",), zlib.crc32(changed.encode()))
            attempt(
                json.dumps({**json.loads(outer), "__metadata__": {**metadata, "header": changed, "packing": packing}})
            )


def forged(path, change, frames=b""):
    """A packed file of one small tensor, written after ``change(entries, metadata, packing)`` had its way."""
    dense = {"W": Entry("BF16", (4, 4), 0, 32)}
    frame = encode(torch.arange(32, dtype=torch.uint8), 2, PLANES)
    entries = {"W": {"dtype": "U8", "shape": [len(frame)], "data_offsets": [0, len(frame)]}}
    crc = zlib.crc32(bytes(range(32)))
    row = {"coding": PLANES, "width": 2, "crc32": crc, "frames": [len(frame)]}
    packing = {"chunk": CHUNK, "tensors": {"W": row}}
    metadata = {"sparse_safetensors": "1", "header": header_text(dense, {}).decode()}
    entries, frames = change(entries, metadata, packing) or (entries, frames)
    packing.setdefault("header_crc32", zlib.crc32(metadata["header"].encode()))
    metadata.setdefault("packing", json.dumps(packing))
    text = json.dumps({"__metadata__": metadata, **entries}).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + (frames or frame))


def stored(frame: bytes, row: dict) -> tuple[dict, bytes]:
    """What ``change`` returns to put another frame into the file."""
    row["frames"] = [len(frame)]
    return {"W": {"dtype": "U8", "shape": [len(frame)], "data_offsets": [0, len(frame)]}}, frame


def dense_header(metadata, dtype, *shape, end=None):
    size = end if end is not None else 2 * torch.Size(shape).numel()
    metadata["header"] = json.dumps({"W": {"dtype": dtype, "shape": shape, "data_offsets": [0, size]}})


def bomb(size: int) -> bytes:
    compressor = zstandard.ZstdCompressor(level=1).compressobj(size=size)
    pieces = [compressor.compress(bytes(min(CHUNK, size - at))) for at in range(0, size, CHUNK)]
    return b"".join([*pieces, compressor.flush()])


def liar(size: int) -> bytes:
    """A frame whose header says 32 bytes and whose blocks hold more."""
    frame, honest = bytearray(bomb(size)), zstandard.ZstdCompressor(level=1).compress(bytes(32))
    header = zstandard.frame_header_size(bytes(frame))
    return honest[: zstandard.frame_header_size(honest)] + bytes(frame[header:])


def unknown_size(size: int) -> bytes:
    return zstandard.ZstdCompressor(level=1, write_content_size=False).compress(bytes(size))


HOSTILE = {
    "version 99": (lambda e, m, p: m.update(sparse_safetensors="99"), "version '99', this secateur reads 1"),
    "no version": (lambda e, m, p: m.pop("sparse_safetensors") and None, "not packed"),
    "no header": (lambda e, m, p: m.update(header="") and None, "its dense header"),
    "header not that of the checksum": (lambda e, m, p: p.update(header_crc32=0), "not the one that was packed"),
    "no packing": (lambda e, m, p: m.update(packing="[]"), "damaged packing"),
    "packing of nonsense": (lambda e, m, p: m.update(packing="[" * 100_000), "damaged packing"),
    "packing is null": (lambda e, m, p: m.update(packing="null"), "damaged packing"),
    "names twice": (lambda e, m, p: m.update(packing='{"chunk":8,"chunk":8}'), "a name comes twice"),
    "a terabyte in one frame": (lambda e, m, p: dense_header(m, "BF16", 1 << 20, 1 << 19), "1 frames, wanted 1048576"),
    "a terabyte in one chunk": (
        lambda e, m, p: dense_header(m, "BF16", 1 << 20, 1 << 19) or p.update(chunk=1 << 40),
        "chunks of 1099511627776 bytes",
    ),
    "a chunk too large": (lambda e, m, p: p.update(chunk=2 * LARGEST_CHUNK), "chunks of 8388608 bytes"),
    "a shape beyond all numbers": (lambda e, m, p: dense_header(m, "BF16", *[1 << 62] * 60, end=32), "in 32 bytes"),
    "too many dimensions": (lambda e, m, p: dense_header(m, "BF16", *[1] * 10_000, end=2), "10000 dimensions"),
    "negative sizes": (lambda e, m, p: dense_header(m, "BF16", -4, -4, end=32), "numbers from 0 on"),
    "a hole in front": (
        lambda e, m, p: m.update(header='{"W":{"dtype":"U8","shape":[2],"data_offsets":[2,4]}}'),
        "begins at 2, wanted 0",
    ),
    "a type from elsewhere": (lambda e, m, p: dense_header(m, "BF17", 4, 4), "'BF17', wanted one of F64"),
    "another name": (lambda e, m, p: e.update(V=e.pop("W")), "names of the packed and of the dense"),
    "a part is missing": (lambda e, m, p: p.update(tensors={}), "names of the packed and of the dense"),
    "no frames": (lambda e, m, p: p["tensors"]["W"].update(frames=[]), "0 frames, wanted 1"),
    "frames of words": (lambda e, m, p: p["tensors"]["W"].update(frames=["a"]), "frames of other sizes"),
    "frames below zero": (lambda e, m, p: p["tensors"]["W"].update(frames=[-1]), "frames of other sizes"),
    "a frame too large for its chunk": (lambda e, m, p: p["tensors"]["W"].update(frames=[1 << 40]), "of other sizes"),
    "frames that miss the tensor's end": (lambda e, m, p: p["tensors"]["W"].update(frames=[7]), r"wanted U8 of \(7,\)"),
    "an unknown coding": (lambda e, m, p: p["tensors"]["W"].update(coding="magic"), "coded as 'magic'"),
    "another width": (lambda e, m, p: p["tensors"]["W"].update(width=4), "elements of 4 bytes"),
    "another checksum": (lambda e, m, p: p["tensors"]["W"].update(crc32=1), "not 1"),
    "a checksum of words": (lambda e, m, p: p["tensors"]["W"].update(crc32="1"), "checksum"),
    "the other coding": (lambda e, m, p: p["tensors"]["W"].update(coding=MASK), "W is damaged"),
    "stored as floats": (lambda e, m, p: e["W"].update(dtype="F8_E4M3"), "stored as F8_E4M3"),
    "a bomb": (lambda e, m, p: stored(bomb(1 << 30), p["tensors"]["W"]), "1073741824 bytes where at most 32 can be"),
    "a bomb of unknown size": (lambda e, m, p: stored(unknown_size(1 << 26), p["tensors"]["W"]), "at most 32 can be"),
    "a bomb that says it is none": (lambda e, m, p: stored(liar(1 << 26), p["tensors"]["W"]), "W is damaged"),
    "a frame too short": (lambda e, m, p: stored(bomb(31), p["tensors"]["W"]), "31 bytes where 32 were promised"),
    "two frames in one": (lambda e, m, p: stored(bomb(32) * 2, p["tensors"]["W"]), "W is damaged"),
    "no frame": (lambda e, m, p: stored(b"not zstd at all", p["tensors"]["W"]), "W is damaged"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_are_refused_in_a_line(name, tmp_path, bounded):
    change, said = HOSTILE[name]
    forged(tmp_path / "forged", change)
    with bounded(), pytest.raises(ArtefactError, match=said):
        unpacked(tmp_path / "forged", tmp_path)


ALMOST = HEADER - 3000


def frames_of(value):
    def change(entries, metadata, packing):
        one = json.dumps(json.dumps(value, separators=(",", ":")))
        packing["tensors"]["W"]["frames"] = [value] * (ALMOST // (len(one) - 1))
        metadata["packing"] = json.dumps(packing, separators=(",", ":"))

    return change


def names_in(place):
    names = {f"{number:x}": [] for number in range(ALMOST // 14)}
    return lambda e, m, p: {"entries": e, "packing": p, "rows": p["tensors"]}[place].update(names)


def shapes_of(value):
    return lambda e, m, p: e["W"].update(shape=[value] * (ALMOST // (len(json.dumps(value)) + 2)))


LONG = {
    "frames that are lists": frames_of([]),
    "frames that are objects": frames_of({}),
    "frames that are nothing": frames_of(0),
    "frames that are lists of lists": frames_of(json.loads("[" * 500 + "]" * 500)),
    "frames that are objects of objects": frames_of(json.loads('{"a":' * 300 + "0" + "}" * 300)),
    "shapes that are objects": shapes_of({}),
    "names of tensors": names_in("entries"),
    "names of rows": names_in("rows"),
    "names in the packing": names_in("packing"),
    "words outside Latin": lambda e, m, p: m.update(note="𝄞" + "x" * ALMOST, header="{"),
}


@pytest.mark.parametrize("name", LONG)
def test_the_longest_hostile_headers_take_what_is_documented(name, tmp_path, bounded):
    forged(tmp_path / "forged", LONG[name])
    size = (tmp_path / "forged").stat().st_size
    assert 0.7 * HEADER < size < HEADER
    with bounded(50 * HEADER):
        outcome(tmp_path / "forged", tmp_path)


def test_longer_headers_are_not_read(tmp_path, bounded):
    forged(tmp_path / "forged", lambda e, m, p: p["tensors"]["W"].update(frames=[[]] * 4_000_000))
    with bounded(1_000_000), pytest.raises(ArtefactError, match=r"header would have \d+ bytes, wanted 2 to 500000;"):
        unpacked(tmp_path / "forged", tmp_path)


def test_what_would_not_be_read_is_not_packed(tmp_path):
    """Thousands of tensors of nothing; the same header before enough data is welcome."""
    tensors = {f"W{number}": torch.zeros(0) for number in range(2700)}
    save_file(tensors, tmp_path / "dense")
    with pytest.raises(ArtefactError, match=r"/dense has too many tensors for its size, headers take \d+ bytes; save"):
        pack_file(tmp_path / "dense", tmp_path / "packed", nobody)
    save_file(tensors | {"W": torch.randint(0, 256, (40_000_000,), dtype=torch.uint8)}, tmp_path / "dense")
    pack_file(tmp_path / "dense", tmp_path / "packed", nobody)
    assert read_header(tmp_path / "packed").data_at > HEADER
    assert unpacked(tmp_path / "packed", tmp_path) == (tmp_path / "dense").read_bytes()


def test_the_largest_chunk_takes_what_is_documented(tmp_path, bounded):
    """A few bytes that stand for as many as can be, of the kind that takes the most memory: single ones, masked."""

    def ones(entries, metadata, packing):
        dense_header(metadata, "U8", LARGEST_CHUNK, end=LARGEST_CHUNK)
        row = {"coding": MASK, "width": 1, "crc32": zlib.crc32(b"\1" * LARGEST_CHUNK)}
        packing.update(chunk=LARGEST_CHUNK, tensors={"W": row})
        return stored(encode(torch.ones(LARGEST_CHUNK, dtype=torch.uint8), 1, MASK), row)

    forged(tmp_path / "forged", ones)
    with bounded(12 * LARGEST_CHUNK):
        unpack_file(tmp_path / "forged", tmp_path / "again", nobody)
    assert (tmp_path / "again").read_bytes().endswith(b"\1" * LARGEST_CHUNK)


def test_the_forger_forges_well(tmp_path):
    """Unchanged, its file is sound: what is refused above is refused for the change."""
    forged(tmp_path / "forged", lambda *_: None)
    assert unpacked(tmp_path / "forged", tmp_path).endswith(bytes(range(32)))


@pytest.mark.parametrize(
    ("header", "said"),
    [
        (b"[1]", "not a safetensors header"),
        (b'{"W": 3}', "not a safetensors header"),
        (b'{"W":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"W":{}}', "a name comes twice"),
        (b'{"W":{"dtype":"U8","shape":[true],"data_offsets":[0,1]}}', "numbers from 0 on"),
        (b'{"W":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"V":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}',
         "V begins at 0, wanted 1"),
        (b'{"W":{"dtype":"U8","shape":[1],"data_offsets":[1,0]}}', "in -1 bytes"),
        (b'{"W":{"dtype":"U8","shape":[2],"data_offsets":[0,2]}}', "bytes and"),
        (b'{"__metadata__":{"a":1}}', "metadata are not words"),
        (b'{"__metadata__":null}', "not a safetensors header"),
        (b"\xff\xfe", "not a safetensors header"),
        (b"[" * 50_000, "not a safetensors header"),
    ],
)  # fmt: skip
def test_dense_files_with_broken_headers_are_not_packed(header, said, tmp_path):
    (tmp_path / "dense").write_bytes(struct.pack("<Q", len(header)) + header + b"\x01")
    with pytest.raises(ArtefactError, match=said):
        pack_file(tmp_path / "dense", tmp_path / "packed", nobody)


@pytest.mark.parametrize("start", [b"", b"\x01", b"\xff" * 8 + b"{}", struct.pack("<Q", 10**12) + b"{}"])
def test_what_is_no_safetensors_file(start, tmp_path):
    (tmp_path / "dense").write_bytes(start)
    with pytest.raises(ArtefactError, match="no safetensors file, its header would have"):
        pack_file(tmp_path / "dense", tmp_path / "packed", nobody)
