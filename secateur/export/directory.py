"""A Hugging Face directory packed file by file, and back; its tensors without unpacking it.

``NAME.safetensors`` becomes ``NAME.sparse.safetensors``, so that nobody loads a packed file for weights by accident;
so do low-rank branches in their folder. Everything else (config, tokenizer, index, ``secateur/``) is copied. Nothing
appears at OUT before all of it has been written and, when packing, read back. Memory: one chunk of one tensor.
"""

import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Protocol

import psutil
import torch
from torch import Tensor

from secateur.errors import ArtefactError, UsageError
from secateur.export.sizes import Sizes, sizes_of
from secateur.export.sparse_safetensors import Done, PackedFile, pack_file, unpack_file
from secateur.models.branches import FOLDER
from secateur.models.container import parse_json, read_header
from secateur.models.headers import DENSE, SPARSE, Size, weight_files
from secateur.models.openvino import is_openvino
from secateur.models.save import clear_leftovers, place_of, refuse_nested, staged
from secateur.models.sparse24 import is_sparse24
from secateur.models.sparse24_loader import SUFFIX

MEGABYTE = 10**6
"""What progress is counted in."""
TORCH = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "C64": torch.complex64,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz, "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
"""Types of safetensors that are types of torch, element for element, in every torch that is supported."""


class Shown(Protocol):
    """Told how much of a stage is done."""

    def update(self, done: int, total: int, detail: str = "") -> None: ...


class Watch(Protocol):
    """Times the stages of a run and shows how far they are."""

    @property
    def progress(self) -> Shown: ...
    def stage(self, name: str, said: str = "") -> AbstractContextManager[None]: ...


def pack_directory(source: Path, out: Path, watch: Watch) -> Sizes:
    """Write the packed directory `out`, read it back, and only then give it its name. Stages: pack, check.

    ArtefactError where `source` holds no safetensors, lacks a shard or is packed already, and where a tensor does not
    come back; UsageError where `out` is occupied or inside `source`.
    """
    names = [*dense_names(source), *branch_names(source)]
    sizes = {name: (source / name).stat().st_size for name in names}
    with rebuilt(source, out, names) as stage:
        with watch.stage("pack"):
            for name, done in _counted(sizes, watch):
                pack_file(source / name, stage / _packed(name), done)
        files = [PackedFile.open(stage / _packed(name)) for name in names]
        with watch.stage("check", "read it back"):
            for file, (_, done) in zip(files, _counted(sizes, watch), strict=True):
                file.check(done)
    return sizes_of(files)


def unpack_directory(source: Path, out: Path, watch: Watch) -> int:
    """Write the dense directory `out`, byte for byte what was packed. Stage: unpack. Returns the bytes written.

    ArtefactError for damage of any kind and where the disk has no room; UsageError where `out` is occupied.
    """
    files = packed_files(source) + (packed_files(source / FOLDER) if is_packed(source / FOLDER) else [])
    sizes = {file.path.relative_to(source).as_posix(): file.dense.file_bytes for file in files}
    with rebuilt(source, out, list(sizes)) as stage:
        needed, free = sum(sizes.values()), shutil.disk_usage(stage).free
        if needed > free:
            raise ArtefactError(f"{source} unpacks to {needed:,} bytes, {free:,} are free at {out}; free some")
        with watch.stage("unpack"):
            for name, done in _counted(sizes, watch):
                unpack_file(source / name, stage / _dense(name), done)
    return needed


def dense_names(directory: Path) -> list[str]:
    """The safetensors files of a directory that is not packed."""
    if is_packed(directory):
        raise ArtefactError(f"{directory} is packed already; unpack it with `secateur unpack {directory} --out DIR`")
    if is_sparse24(directory):
        raise ArtefactError(f"{directory} is packed for torch-2:4; give the directory that it was made from")
    return [path.name for path in weight_files(directory)]


def branch_names(directory: Path) -> list[str]:
    """The safetensors files that hold low-rank branches, in any form."""
    return sorted(f"{FOLDER}/{path.name}" for path in (directory / FOLDER).glob(f"*{DENSE}"))


def refuse_stored_branches(source: Path) -> None:
    """UsageError for a directory with low-rank branches, for targets that have no place for them."""
    if (source / FOLDER).is_dir():
        raise UsageError(f"{source} has low-rank branches, which this target cannot carry; prune without --low-rank")


def packed_files(directory: Path) -> list[PackedFile]:
    """All of them, headers checked. ArtefactError where there is none, or one is missing, damaged or there twice."""
    paths = weight_files(directory, SPARSE, "give a directory that `secateur export --to sparse-safetensors` wrote")
    if both := [path.name for path in paths if (directory / _dense(path.name)).exists()]:
        raise ArtefactError(f"{directory} holds {both[0]} and {_dense(both[0])}; move one of them away")
    return [PackedFile.open(path) for path in paths]


def is_packed(directory: Path) -> bool:
    return any(directory.glob(f"*{SPARSE}"))


def form_of(directory: Path) -> str:
    """ "dense", or the target of an export that packed it. ArtefactError for a graph, which names no tensors."""
    if is_openvino(directory) and not any(directory.glob(f"*{DENSE}")):
        raise ArtefactError(
            f"{directory} was exported to openvino; {directory}/secateur/export.json tells its matrices, `secateur "
            "bench` runs it, and promises are checked in the directory before"
        )
    return "sparse-safetensors" if is_packed(directory) else "torch-2:4" if is_sparse24(directory) else "dense"


def stored_sizes(directory: Path) -> dict[str, Size]:
    """Of every tensor, by the name it has unpacked; from the headers alone."""
    if is_packed(directory):
        return {
            name: Size(packed.dense.shape, packed.bytes)
            for file in packed_files(directory)
            for name, packed in file.tensors.items()
        }
    sizes: dict[str, Size] = {}
    for path in _files_as_stored(directory):
        header = read_header(path)
        sizes |= {name: Size(entry.shape, entry.bytes) for name, entry in header.tensors.items()}
        for name in parse_json(header.metadata["packed"]) if "sparse24" in header.metadata else ():
            values, places = sizes.pop(f"{name}.values"), sizes.pop(f"{name}.places")
            sizes[name] = Size((*values.shape[:-1], 2 * values.shape[-1]), values.bytes + places.bytes)
    return sizes


def file_bytes(directory: Path) -> int:
    """Of all files that hold weights, in any form, low-rank branches included."""
    branches = [directory / name for name in branch_names(directory)]
    return sum(path.stat().st_size for path in [*_files_as_stored(directory), *branches])


def _files_as_stored(directory: Path) -> list[Path]:
    suffixes = {"dense": DENSE, "sparse-safetensors": SPARSE, "torch-2:4": SUFFIX}
    return weight_files(directory, suffixes[form_of(directory)])


def _packed(name: str) -> str:
    return name.removesuffix(DENSE) + SPARSE


def _dense(name: str) -> str:
    return name.removesuffix(SPARSE) + DENSE


@contextmanager
def rebuilt(source: Path, out: Path, without: list[str]) -> Iterator[Path]:
    """What becomes `out`: a copy of everything in `source` but the files named, which the caller writes anew.

    Names are paths inside `source`.
    """
    out = place_of(out)
    refuse_nested(out, source.resolve())
    with staged(out) as stage:
        for folder, _, files in os.walk(source, onerror=_fail, followlinks=True):
            inside = Path(folder).relative_to(source)
            (stage / inside).mkdir(exist_ok=True)
            for name in sorted(files):
                if (inside / name).as_posix() not in without:
                    shutil.copyfile(Path(folder) / name, stage / inside / name)
        yield stage
    clear_leftovers(out)  # not before: nothing keeps somebody else from writing there as well


def _fail(error: OSError) -> None:
    """A folder that cannot be listed is not left out in silence, as ``os.walk`` would have it."""
    raise error


def _counted(sizes: Mapping[str, int], watch: Watch) -> Iterator[tuple[str, Done]]:
    """Every file with what tells the progress of all, each megabyte once, from the bytes of this one that are done."""
    total, before, shown = sum(sizes.values()), 0, 0
    for name, size in sizes.items():

        def done(count: int, before: int = before, name: str = name) -> None:
            nonlocal shown
            reached = -(-(before + count) // MEGABYTE)
            if reached > shown:
                watch.progress.update(reached, -(-total // MEGABYTE), name)
                shown = reached

        yield name, done
        before += size


class PackedTensors(Mapping[str, Tensor]):
    """The tensors of a packed directory by name, each decoded and checked when it is asked for, and not kept."""

    def __init__(self, directory: Path) -> None:
        self.files = packed_files(directory)
        self._file_of = {name: file for file in self.files for name in file.tensors}

    def __getitem__(self, name: str) -> Tensor:
        file = self._file_of[name]
        entry = file.tensors[name].dense
        if entry.dtype not in TORCH:
            raise ArtefactError(f"{file.path}: {name} is {entry.dtype}, torch has {', '.join(TORCH)}; unpack it")
        if entry.bytes > (free := psutil.virtual_memory().available):
            raise ArtefactError(
                f"{file.path}: {name} has {entry.bytes:,} bytes, {free:,} are free in memory; unpack it"
            )
        data = torch.empty(entry.bytes, dtype=torch.uint8)
        at = 0
        for chunk in file.chunks(name):
            data[at : at + len(chunk)] = chunk
            at += len(chunk)
        return data.view(TORCH[entry.dtype]).view(entry.shape)

    def __contains__(self, name: object) -> bool:
        return name in self._file_of  # Mapping's own would decode the tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._file_of)

    def __len__(self) -> int:
        return len(self._file_of)


def load_packed(directory: str | os.PathLike[str]) -> PackedTensors:
    """The state dict of a packed directory, bit for bit, one tensor at a time: ``dict(load_packed(DIR))`` holds all.

    Raises ArtefactError for what is not packed, damaged or from a later version.
    """
    return PackedTensors(Path(directory))
