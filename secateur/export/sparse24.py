"""``--to torch-2:4``: a directory whose 2:4 matrices are stored without their zeros, for GPUs that multiply them so.

Weights of 16 bit, or int8 codes with a scale for each row, as int-quantized directories hold them.

The reader, ``sparse24_loader``, is copied into the directory: it needs torch and transformers, not Secateur. Its
docstring is the definition of the files. Memory: one file of the source.
"""

import json
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from secateur.core.pattern import NM
from secateur.core.two_of_four import PER_BYTE, first_broken_row, pack
from secateur.errors import ArtefactError, UsageError
from secateur.export.directory import Watch, dense_names, rebuilt, refuse_stored_branches, stored_sizes
from secateur.models import sparse24_loader
from secateur.models.container import read_header
from secateur.models.headers import DENSE, INDEX, Size
from secateur.models.promises import read_promises
from secateur.models.skeleton import linear_weights
from secateur.models.sparse24_loader import SUFFIX, VERSION, checksum, read_file

LOADER = "sparse24_loader.py"


def export_sparse24(source: Path, out: Path, watch: Watch) -> dict[str, Any]:
    """Write `out`, read it back, and only then give it its name. Stages: pack, check.

    UsageError naming the first tensor that was promised to be 2:4 and is not, or what was promised otherwise or is no
    linear where that is all; where none is 2:4, and for low-rank branches.
    """
    names = dense_names(source)
    refuse_stored_branches(source)
    for name in names:
        read_header(source / name)  # says in which file damage is
    linears = linear_weights(source)
    promised, others = _promised(source, linears)
    sizes = {"dense_bytes": 0, "packed_bytes": 0}
    matrices: dict[str, list[int]] = {}
    with rebuilt(source, out, [*names, INDEX]) as stage:
        shutil.copyfile(sparse24_loader.__file__, stage / LOADER)
        with watch.stage("pack"):
            for done, name in enumerate(names, 1):
                target = stage / (name.removesuffix(DENSE) + SUFFIX)
                matrices |= _pack_file(source / name, target, promised, linears)
                sizes["dense_bytes"] += (source / name).stat().st_size
                sizes["packed_bytes"] += target.stat().st_size
                watch.progress.update(done, len(names), name)
        if not matrices:
            first = _first_matrix(source, names)
            raise UsageError(f"{first} is not 2:4, nor is any matrix of {source}; prune with --pattern 2:4 first")
        with watch.stage("check", "read it back"):
            _check(source, stage, names)
        elements, bits = _bits(stored_sizes(stage), matrices, sizes["packed_bytes"])
    share = sizes["packed_bytes"] / sizes["dense_bytes"]
    left = [f"{name} {why}" for name, why in others.items() if name not in matrices]
    told = {**sizes, "share": share, "elements": elements, "bits_per_weight": bits, "matrices": matrices}
    return {**told, "left_dense": left}


def _bits(sizes: Mapping[str, Size], matrices: Collection[str], file_bytes: int) -> tuple[int, dict[str, float]]:
    """How many weights there are; bits of one of the 2:4 matrices, scales of int8 included, and of any, headers too."""
    scales = {f"{name}_scale" for name in matrices} & sizes.keys()
    packed = sum(sizes[name].bytes for name in (*matrices, *scales))
    weights = sum(size.elements for name, size in sizes.items() if name not in scales)
    sparse = 8 * packed / sum(sizes[name].elements for name in matrices)
    return weights, {"sparse": sparse, "whole": 8 * file_bytes / weights}


def _promised(source: Path, own: set[str]) -> tuple[set[str], dict[str, str]]:
    """Linears that are promised to be 2:4, and why the other promised matrices need not be packed.

    UsageError where these are all.
    """
    promises = read_promises(source)
    held: set[str] = set()
    others: dict[str, str] = {}
    for one in promises.linears if promises else ():
        if not (isinstance(one.pattern, NM) and one.pattern.m == 4 and one.pattern.n <= 2):
            others[one.name] = f"is not 2:4 but {one.pattern}"
        elif one.name not in own or one.at:
            others[one.name] = "is no linear of its own in the model, which torch.sparse wants"
        else:
            held.add(one.name)
    if others and not held:
        name, why = next(iter(others.items()))
        raise UsageError(f"{name} {why}; prune with --pattern 2:4, or take another target")
    return held, others


def _pack_file(source: Path, target: Path, promised: set[str], linears: set[str]) -> dict[str, list[int]]:
    tensors, shapes = load_file(source), {}
    for name, W in list(tensors.items()):
        if name not in promised and not (name in linears and _happens_to_be(W, f"{name}_scale" in tensors)):
            continue
        try:
            values, places = pack(W)
        except ValueError as error:
            raise UsageError(f"{name} is {error}; prune with --pattern 2:4 first") from error
        del tensors[name]
        tensors |= {f"{name}.values": values, f"{name}.places": places}
        shapes[name] = list(W.shape)
    sums = {name: checksum(tensor) for name, tensor in tensors.items()}
    words = {"sparse24": VERSION, "packed": json.dumps(list(shapes)), "sums": json.dumps(sums)}
    save_file(tensors, target, metadata={"format": "pt", **words})
    return shapes


def _happens_to_be(W: Tensor, codes: bool) -> bool:
    fits = W.ndim == 2 and (W.is_floating_point() or codes) and W.shape[1] % PER_BYTE == 0
    return fits and first_broken_row(W) is None


def _first_matrix(source: Path, names: list[str]) -> str:
    return next((key for name in names for key, W in load_file(source / name).items() if W.ndim == 2), "no matrix")


def _check(source: Path, stage: Path, names: list[str]) -> None:
    for name in names:
        state: dict[str, Tensor] = {}
        read_file(stage / (name.removesuffix(DENSE) + SUFFIX), state)
        for tensor, wanted in load_file(source / name).items():
            if not torch.equal(state[tensor], wanted):  # -0.0 equals 0.0, NaN nothing: neither is in a promised matrix
                raise ArtefactError(f"{tensor} did not come back as it was; is it finite?")
