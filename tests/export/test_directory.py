"""Whole directories: packed, unpacked, read without unpacking; complete or not there."""

import filecmp
import os
import shutil
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from secateur import load_packed
from secateur.errors import ArtefactError, ModelError, UsageError
from secateur.evaluation.inspect import Checkpoint
from secateur.export.directory import file_bytes, pack_directory, stored_sizes, unpack_directory
from secateur.models.load import load

SHARDS = 4


class Watch:
    """Keeps what it is told."""

    def __init__(self):
        self.stages, self.updates = [], []
        self.progress = SimpleNamespace(update=lambda *told: self.updates.append(told))

    @contextmanager
    def stage(self, name, said=""):
        self.stages.append(name)
        yield


@pytest.fixture
def sharded(tiny_llama, tmp_path) -> Path:
    """Half of the weights zero, several shards with their index, and files of other kinds."""
    for parameter in tiny_llama.parameters():
        if parameter.ndim == 2:
            parameter.masked_fill_(parameter.abs() < parameter.abs().median(), 0.0)
    path = tmp_path / "dense"
    tiny_llama.bfloat16().save_pretrained(path, max_shard_size="15KB")
    assert len(list(path.glob("*.safetensors"))) == SHARDS
    (path / "secateur").mkdir()
    (path / "secateur" / "promise.json").write_text("{}")
    (path / "low_rank").mkdir()
    save_file({"S": torch.ones(2)}, path / "low_rank" / "model.safetensors")
    return path


@pytest.fixture
def packed(sharded, tmp_path) -> Path:
    pack_directory(sharded, tmp_path / "packed", Watch())
    return tmp_path / "packed"


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def same(one: Path, other: Path) -> bool:
    equal, *wrong = filecmp.cmpfiles(one, other, files(one), shallow=False)
    return files(one) == files(other) and wrong == [[], []] and len(equal) == len(files(one))


def test_packed_and_unpacked_is_the_same_directory(sharded, packed, tmp_path):
    assert "model-00001-of-00004.sparse.safetensors" in files(packed)
    assert {"config.json", "secateur/promise.json", "low_rank/model.sparse.safetensors"} <= set(files(packed))
    watch = Watch()
    count = unpack_directory(packed, tmp_path / "again", watch)
    assert same(sharded, tmp_path / "again")
    assert count == sum(path.stat().st_size for path in sharded.rglob("*.safetensors"))
    assert watch.stages == ["unpack"]
    assert watch.updates == [(1, 1, "model-00001-of-00004.sparse.safetensors")]  # less than a megabyte: told once


def test_sizes(sharded, tmp_path):
    sizes = pack_directory(sharded, tmp_path / "packed", watch := Watch())
    assert watch.stages == ["pack", "check"]
    assert sizes.dense_bytes == sum(path.stat().st_size for path in sharded.rglob("*.safetensors"))
    assert sizes.packed_bytes == sum(path.stat().st_size for path in (tmp_path / "packed").rglob("*.safetensors"))
    assert sizes.packed_bytes == file_bytes(tmp_path / "packed")
    held = {name: tensor for path in sharded.glob("*.safetensors") for name, tensor in load_file(path).items()}
    matrices = [tensor for tensor in held.values() if tensor.ndim == 2]
    assert (sizes.whole.tensors, sizes.sparse.tensors, sizes.codes.tensors) == (len(held), len(matrices), 0)
    assert sizes.sparse.elements == sum(tensor.numel() for tensor in matrices)
    assert sizes.bits_per_weight == 8 * sizes.packed_bytes / sum(tensor.numel() for tensor in held.values())
    assert sizes.sparse.bits == 8 * sizes.sparse.packed_bytes / sizes.sparse.elements
    assert 1 + 0.5 * 8 < sizes.sparse.bits < 9


def test_bits_of_codes_are_not_known(tmp_path):
    (tmp_path / "dense").mkdir()
    save_file({"codes": torch.zeros(8, 8, dtype=torch.uint8)}, tmp_path / "dense" / "model.safetensors")
    assert pack_directory(tmp_path / "dense", tmp_path / "packed", Watch()).bits_per_weight is None


def test_tensors_without_unpacking(sharded, packed):
    tensors = load_packed(packed)
    held = {name: tensor for path in sharded.glob("*.safetensors") for name, tensor in load_file(path).items()}
    assert set(tensors) == set(held)
    assert len(tensors) == len(held)
    assert "no such" not in tensors
    for name, tensor in tensors.items():
        assert tensor.dtype == held[name].dtype
        assert torch.equal(tensor, held[name])


def test_one_line_makes_a_model(sharded, packed):
    from transformers import AutoConfig, LlamaForCausalLM

    config = AutoConfig.from_pretrained(packed)
    model = LlamaForCausalLM.from_pretrained(None, config=config, state_dict=dict(load_packed(packed)))
    original = LlamaForCausalLM.from_pretrained(sharded)
    tokens = torch.arange(20)[None]
    assert torch.equal(model(tokens).logits, original(tokens).logits)
    assert model.dtype == torch.bfloat16


def test_every_type_and_awkward_tensor_without_unpacking(dense, tmp_path):
    pack_directory(dense.parent, tmp_path / "packed", Watch())
    wanted = load_file(dense)
    tensors = load_packed(tmp_path / "packed")
    with pytest.raises(ArtefactError, match=r"F8_E8M0.0 is F8_E8M0, torch has F64, .*; unpack it"):
        tensors["F8_E8M0.0"]
    for name in set(tensors) - {"F8_E8M0.0", "F8_E8M0.0.7"}:
        tensor = tensors[name]
        assert (tensor.dtype, tensor.shape) == (wanted[name].dtype, wanted[name].shape), name
        assert tensor.reshape(-1).view(torch.uint8).tolist() == wanted[name].reshape(-1).view(torch.uint8).tolist()


# ---- what is refused


def test_occupied_places(sharded, packed, tmp_path):
    before = (sharded / "config.json").read_bytes()
    for act, source, out in (
        (pack_directory, sharded, sharded),
        (pack_directory, sharded, sharded / "packed"),
        (pack_directory, sharded, packed),
        (unpack_directory, packed, packed / "dense"),
        (unpack_directory, packed, sharded),
    ):
        with pytest.raises(UsageError, match="choose"):
            act(source, out, Watch())
    assert (sharded / "config.json").read_bytes() == before
    assert not (sharded / "packed").exists()


def test_a_link_to_the_source_is_the_source(sharded, tmp_path):
    os.symlink(sharded, tmp_path / "link")
    with pytest.raises(UsageError, match="lies inside"):
        pack_directory(sharded, tmp_path / "link" / "packed", Watch())


def test_what_cannot_be_packed(packed, tmp_path):
    (tmp_path / "empty").mkdir()
    for source, said in (
        (tmp_path / "nowhere", "no directory"),
        (tmp_path / "empty", "no .safetensors file"),
        (packed, "is packed already; unpack it with `secateur unpack"),
    ):
        with pytest.raises(ArtefactError, match=said):
            pack_directory(source, tmp_path / "out", Watch())
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("index", ["[]", "{", '{"weight_map": 3}', '{"weight_map": {"W": "elsewhere.safetensors"}}'])
def test_an_index_that_does_not_fit(sharded, index, tmp_path):
    (sharded / "model.safetensors.index.json").write_text(index)
    with pytest.raises(ArtefactError, match="copy or download it again"):
        pack_directory(sharded, tmp_path / "out", Watch())


def test_what_no_loader_reads_is_not_the_model(sharded, tiny_llama, tmp_path):
    """Saved whole over shards, whose index stays; and tensors of something else."""
    tiny_llama.save_pretrained(sharded)
    assert (sharded / "model.safetensors.index.json").exists()
    save_file({"moments": torch.ones(2, 2)}, sharded / "optimizer.safetensors")
    shutil.rmtree(sharded / "low_rank")
    whole = sharded / "model.safetensors"
    names = set(load_file(whole))
    assert set(Checkpoint(sharded)) == set(stored_sizes(sharded)) == names
    assert file_bytes(sharded) == whole.stat().st_size
    assert [file.name for file in pack_directory(sharded, tmp_path / "packed", Watch()).files] == [
        "model.sparse.safetensors"
    ]
    assert set(load_packed(tmp_path / "packed")) == set(stored_sizes(tmp_path / "packed")) == names


def test_a_missing_shard(packed, sharded, tmp_path):
    for folder, name, act in (
        (packed, "model-00002-of-00004.sparse.safetensors", unpack_directory),
        (sharded, "model-00002-of-00004.safetensors", pack_directory),
    ):
        (folder / name).unlink()
        with pytest.raises(ArtefactError, match=f"asks for {name}, which is not there"):
            act(folder, tmp_path / "out", Watch())


def test_a_dense_file_beside_its_packed_one(packed, tmp_path):
    (packed / "model-00001-of-00004.safetensors").touch()
    with pytest.raises(ArtefactError, match="move one of them away"):
        unpack_directory(packed, tmp_path / "out", Watch())


def test_dense_is_not_packed(sharded, tmp_path):
    with pytest.raises(ArtefactError, match=r"no \.sparse.safetensors file; give a directory that `secateur export"):
        load_packed(sharded)
    shutil.copy(sharded / "model-00001-of-00004.safetensors", sharded / "x.sparse.safetensors")
    (sharded / "model.safetensors.index.json").unlink()
    with pytest.raises(ArtefactError, match="not packed, its metadata have no 'sparse_safetensors'"):
        load_packed(sharded)


def test_a_packed_directory_is_no_model(packed):
    with pytest.raises(ModelError, match="is packed; unpack it with `secateur unpack"):
        load(str(packed))


def test_a_folder_that_cannot_be_listed_is_not_left_out(sharded, tmp_path, monkeypatch):
    scandir = os.scandir

    def closed(folder):
        if str(folder).endswith("low_rank"):
            raise PermissionError(13, "Permission denied", str(folder))
        return scandir(folder)

    monkeypatch.setattr(os, "scandir", closed)
    with pytest.raises(PermissionError, match="low_rank"):
        pack_directory(sharded, tmp_path / "packed", Watch())
    assert not (tmp_path / "packed").exists()


def test_no_room(packed, tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=10))
    with pytest.raises(ArtefactError, match="bytes, 10 are free at"):
        unpack_directory(packed, tmp_path / "out", Watch())
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=10))
    tensors = load_packed(packed)
    with pytest.raises(ArtefactError, match="bytes, 10 are free in memory; unpack it"):
        dict(tensors)


# ---- all or nothing


@pytest.mark.parametrize("stop", [KeyboardInterrupt, OSError(28, "No space left on device"), ArtefactError("x")])
@pytest.mark.parametrize("act", ["pack_file", "unpack_file", "PackedFile.check"])
def test_nothing_is_left_of_what_was_stopped(sharded, packed, tmp_path, monkeypatch, act, stop):
    """In the second shard, or while the result is read back."""
    done = []

    def fail(*args):
        done.append(args)
        if len(done) == 2:
            raise stop

    monkeypatch.setattr(f"secateur.export.directory.{act}", fail)
    source, work = (packed, unpack_directory) if act == "unpack_file" else (sharded, pack_directory)
    before = {path.name for path in tmp_path.iterdir()}
    with pytest.raises(type(stop) if isinstance(stop, Exception) else stop):
        work(source, tmp_path / "out", Watch())
    assert {path.name for path in tmp_path.iterdir()} == before


def test_what_does_not_come_back_is_not_exported(sharded, tmp_path, monkeypatch):
    """A coder that loses a bit is found by reading back, before OUT appears."""
    from secateur.export import sparse_safetensors as module

    def lossy(chunk, width, coding):
        broken = chunk.clone()
        broken[-1] ^= 1
        return encode(broken, width, coding)

    encode = module.encode
    monkeypatch.setattr(module, "encode", lossy)
    with pytest.raises(ArtefactError, match="is damaged"):
        pack_directory(sharded, tmp_path / "out", Watch())
    assert not (tmp_path / "out").exists()
