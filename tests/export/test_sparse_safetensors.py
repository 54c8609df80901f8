"""Packing is lossless to the byte, and its files are ordinary safetensors of the size that was promised."""

import struct

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from secateur.export.coding import CHUNK, MASK, PLANES, choose, decode, encode
from secateur.export.directory import TORCH
from secateur.export.sparse_safetensors import PackedFile, pack_file, unpack_file
from secateur.models.container import read_header


def nobody(_: int) -> None:
    pass


def unpacked(packed, folder) -> bytes:
    unpack_file(packed, folder / "again", nobody)
    return (folder / "again").read_bytes()


def test_every_type_comes_back_byte_for_byte(dense, packed, tmp_path):
    assert unpacked(packed, tmp_path) == dense.read_bytes()
    codings = {packed.coding for packed in PackedFile.open(packed).tensors.values()}
    assert codings == {MASK, PLANES}


def test_a_packed_file_is_an_ordinary_one(dense, packed):
    with safe_open(packed, "pt") as file, safe_open(dense, "pt") as original:
        assert set(file.keys()) == set(original.keys())
        assert file.metadata()["sparse_safetensors"] == "1"
        assert all(file.get_tensor(name).dtype == torch.uint8 for name in file.keys())  # noqa: SIM118
    assert read_header(packed).data_at % 8 == 0


def test_more_than_one_chunk_and_what_is_told_meanwhile(tmp_path):
    generator = torch.Generator().manual_seed(0)
    W = torch.randn(3 * CHUNK // 4 + 5, generator=generator).bfloat16()
    W[torch.rand(len(W), generator=generator) < 0.5] = 0
    save_file({"W": W, "b": torch.ones(7)}, tmp_path / "dense")
    told: list[int] = []
    pack_file(tmp_path / "dense", tmp_path / "packed", told.append)
    assert told[-1] == (tmp_path / "dense").stat().st_size
    file = PackedFile.open(tmp_path / "packed")
    assert [len(chunk) for chunk in file.chunks("W")] == [CHUNK, CHUNK // 2 + 10]
    assert unpacked(tmp_path / "packed", tmp_path) == (tmp_path / "dense").read_bytes()


def test_a_header_that_others_wrote_comes_back_word_by_word(tmp_path):
    """Spaces, another order of keys and tensors, no padding: not what the library would write."""
    header = (
        b'{ "b":{"shape":[2],"data_offsets":[ 0,2],"dtype":"U8"},\n"a":{"dtype":"I8","shape":[],"data_offsets":[2,3]}}'
    )
    dense = struct.pack("<Q", len(header)) + header + b"\x00\x07\xff"
    (tmp_path / "dense").write_bytes(dense)
    assert set(load_file(tmp_path / "dense")) == {"a", "b"}
    pack_file(tmp_path / "dense", tmp_path / "packed", nobody)
    assert unpacked(tmp_path / "packed", tmp_path) == dense


def test_memory_does_not_grow_with_the_tensor(tmp_path, bounded):
    save_file({"W": torch.zeros(1 << 25)}, tmp_path / "dense")  # 134 MB
    with bounded():
        pack_file(tmp_path / "dense", tmp_path / "packed", nobody)
        unpack_file(tmp_path / "packed", tmp_path / "again", nobody)
    assert (tmp_path / "again").stat().st_size == (tmp_path / "dense").stat().st_size


def test_no_tensors_at_all(tmp_path):
    save_file({}, tmp_path / "dense")
    pack_file(tmp_path / "dense", tmp_path / "packed", nobody)
    assert unpacked(tmp_path / "packed", tmp_path) == (tmp_path / "dense").read_bytes()


@settings(max_examples=100, deadline=None)
@given(
    width=st.sampled_from([1, 2, 4, 8]),
    elements=st.integers(1, 600),
    zeros=st.floats(0, 1),
    seed=st.integers(0, 1000),
    coding=st.sampled_from([MASK, PLANES]),
)
def test_any_chunk_in_either_coding(width, elements, zeros, seed, coding):
    generator = torch.Generator().manual_seed(seed)
    data = torch.randint(0, 256, (elements, width), dtype=torch.uint8, generator=generator)
    data[torch.rand(elements, generator=generator) < zeros] = 0
    frame = encode(data.view(-1), width, coding)
    assert torch.equal(decode(frame, width, coding, data.numel()), data.view(-1))


TENSORS = st.dictionaries(
    st.text(min_size=1, max_size=8).filter(lambda name: name != "__metadata__"),
    st.tuples(
        st.sampled_from(sorted(TORCH)),
        st.lists(st.integers(0, 7), max_size=4),  # 0-d and empty among them
        st.sampled_from([0.0, 0.3, 0.5, 0.95, 1.0]),
    ),
    max_size=6,
)


@settings(max_examples=100, deadline=None)
@given(tensors=TENSORS, metadata=st.dictionaries(st.text(max_size=5), st.text(max_size=5)), seed=st.integers(0, 99))
def test_any_file_comes_back_byte_for_byte(tensors, metadata, seed, tmp_path_factory):
    folder, generator = tmp_path_factory.getbasetemp(), torch.Generator().manual_seed(seed)

    def made(dtype: torch.dtype, shape: list[int], zeros: float) -> torch.Tensor:
        raw = torch.randint(0, 256, (*shape, dtype.itemsize), dtype=torch.uint8, generator=generator)
        raw[torch.rand(shape, generator=generator) < zeros] = 0
        return (raw % 2 if dtype == torch.bool else raw).view(dtype)[..., 0].clone()

    save_file({name: made(TORCH[kind], shape, zeros) for name, (kind, shape, zeros) in tensors.items()},
              folder / "any", metadata=metadata or None)  # fmt: skip
    pack_file(folder / "any", folder / "any.packed", nobody)
    with safe_open(folder / "any.packed", "pt") as file:
        assert set(file.keys()) == set(tensors)
    assert unpacked(folder / "any.packed", folder) == (folder / "any").read_bytes()


@pytest.mark.parametrize(
    ("dtype", "zeros", "coding", "most"),
    [
        (torch.bfloat16, 0.5, MASK, 0.40),
        (torch.bfloat16, 0.7, MASK, 0.25),
        (torch.bfloat16, 0.0, PLANES, 0.72),
        (torch.float32, 0.5, MASK, 0.47),
    ],
)
def test_sizes_that_were_promised(dtype, zeros, coding, most):
    W = 0.02 * torch.randn(1 << 19, generator=torch.Generator().manual_seed(0))
    W[W.abs().argsort()[: round(zeros * len(W))]] = 0
    chunks = W.to(dtype).view(torch.uint8).split(CHUNK)
    assert choose(chunks[0], dtype.itemsize) == coding
    frames = [encode(chunk, dtype.itemsize, coding) for chunk in chunks]
    assert sum(map(len, frames)) < most * dtype.itemsize * len(W)
