"""Sizes and speed of sparse safetensors on real weights, one thread: the numbers of docs/performance.md.

    python benchmarks/packing.py             the block matrices of SmolLM2-135M-Instruct (``demo``), pruned by magnitude
    python benchmarks/packing.py --rounds 9 --types bfloat16

For each type and share of zeros a file is packed and unpacked, on a disk or a RAM disk as $TMPDIR says. Lines of JSON:
share of the dense file, bits per weight, and the best of the rounds in MB of dense bytes a second, by the clock and by
the processor.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from secateur.core.pattern import NM, Pattern, Unstructured, keep_mask
from secateur.export.sizes import sizes_of
from secateur.export.sparse_safetensors import PackedFile, pack_file, unpack_file
from secateur.models.adapter import DecoderAdapter
from secateur.models.load import load

PATTERNS: dict[str, Pattern | None] = {
    "dense": None, "50%": Unstructured(0.5), "60%": Unstructured(0.6), "70%": Unstructured(0.7),
    "90%": Unstructured(0.9), "2:4": NM(2, 4),
}  # fmt: skip


def int8(W: Tensor) -> Tensor:
    """Codes with one scale a row; zeros stay zeros."""
    return (W / W.abs().amax(1, keepdim=True) * 127).round().to(torch.int8)


def int4(W: Tensor) -> Tensor:
    """Two codes of -7 to 7 a byte, one scale for 64 weights."""
    groups = W.view(len(W), -1, 64)
    codes = (groups / groups.abs().amax(2, keepdim=True).clamp(min=1e-12) * 7).round().to(torch.int8).view(W.shape)
    return ((codes[:, ::2] & 15) | (codes[:, 1::2] << 4)).view(torch.uint8)


TYPES: dict[str, Callable[[Tensor], Tensor]] = {
    "float32": torch.Tensor.float, "bfloat16": torch.Tensor.bfloat16, "float16": torch.Tensor.half,
    "int8": int8, "int4, two a byte": int4,
}  # fmt: skip


def measure(tensors: dict[str, Tensor], weights: int, folder: Path, rounds: int) -> dict[str, Any]:
    dense, packed, again = (folder / name for name in ("dense", "packed", "again"))
    save_file(tensors, dense)
    size = dense.stat().st_size
    encode = [timed(lambda: pack_file(dense, packed, nobody)) for _ in range(rounds)]
    decode = [timed(lambda: unpack_file(packed, again, nobody)) for _ in range(rounds)]
    assert again.read_bytes() == dense.read_bytes()
    held = packed.stat().st_size
    rates = {
        f"{name}_MB_per_{kind}": size / 1e6 / min(times)
        for name, runs in (("encode", encode), ("decode", decode))
        for kind, times in zip(("s", "cpu_s"), zip(*runs, strict=True), strict=True)
    }
    masked = sizes_of([PackedFile.open(packed)]).sparse.tensors
    return {"MB": size / 1e6, "share": held / size, "bits": 8 * held / weights, "masked": masked, **rates}


def timed(work: Callable[[], None]) -> tuple[float, float]:
    clock, cpu = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - clock, time.process_time() - cpu


def nobody(_: int) -> None:
    pass


def lines(rounds: int, types: list[str]) -> Iterator[dict[str, Any]]:
    adapter = DecoderAdapter(load("demo").model)
    matrices = {
        f"{block}.{name}": linear.weight.detach().clone()
        for block, module in zip(adapter.block_names, adapter.blocks, strict=True)
        for name, linear in adapter.linears(module).items()
    }
    weights = sum(W.numel() for W in matrices.values())
    with tempfile.TemporaryDirectory() as folder:
        for name, pattern in PATTERNS.items():
            pruned = {
                key: W if pattern is None else W.masked_fill(~keep_mask(W.abs(), pattern), 0.0)
                for key, W in matrices.items()
            }
            for kind in types:
                made = {key: TYPES[kind](W).contiguous() for key, W in pruned.items()}
                yield {"type": kind, "zeros": name, **measure(made, weights, Path(folder), rounds)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--types", nargs="+", choices=list(TYPES), default=list(TYPES))
    args = parser.parse_args()
    torch.set_num_threads(1)
    for line in lines(args.rounds, args.types):
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
