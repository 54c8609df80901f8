"""Small safetensors files with everything in them that is awkward."""

import gc
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from secateur.export.directory import TORCH
from secateur.export.sparse_safetensors import pack_file

MOST_MEMORY = 20_000_000
"""Bytes that no hostile file may make this process grow by, nor a large one while it is packed and unpacked."""


def awkward() -> dict[str, torch.Tensor]:
    """Every type that safetensors and torch share, bit patterns at random; 0-d, empty, sparse, dense, long."""
    generator = torch.Generator().manual_seed(0)

    def bits(dtype: torch.dtype, *shape: int, zeros: float) -> torch.Tensor:
        raw = torch.randint(0, 256, (*shape, dtype.itemsize), dtype=torch.uint8, generator=generator)
        raw[torch.rand(shape, generator=generator) < zeros] = 0
        return (raw % 2 if dtype == torch.bool else raw).view(dtype)[..., 0]

    types = TORCH | {"F8_E8M0": torch.float8_e8m0fnu}
    found = {f"{name}.{zeros}": bits(dtype, 5, 13, zeros=zeros) for name, dtype in types.items() for zeros in (0, 0.7)}
    return found | {
        "scalar": torch.tensor(-0.0),
        "empty": torch.zeros(0, 3, dtype=torch.bfloat16),
        "zeros": torch.zeros(9, 9),
        "nan": torch.tensor([0x7FC00001, -1, 0, 1 << 31], dtype=torch.int64).to(torch.int32).view(torch.float32),
        'ünicode " name': torch.ones(3),
    }


@pytest.fixture(scope="session")
def dense(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("dense") / "model.safetensors"
    save_file(awkward(), path, metadata={"format": "pt", "note": 'quotes " and ünicode'})
    return path


@pytest.fixture(scope="session")
def packed(dense, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("packed") / "model.sparse.safetensors"
    pack_file(dense, path, lambda _: None)
    return path


@pytest.fixture
def bounded() -> Callable[..., AbstractContextManager[None]]:
    """``with bounded():`` fails where this process gets larger than before by ``MOST_MEMORY``, or what is given."""
    reset, status = Path("/proc/self/clear_refs"), Path("/proc/self/status")

    def largest() -> int:
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return 1024 * int(line.split()[1])

    @contextmanager
    def measured(most: int = MOST_MEMORY) -> Iterator[None]:
        gc.collect()
        try:
            reset.write_text("5")
        except OSError as error:
            pytest.skip(f"the kernel does not forget the peak of a process here: {error}")
        before = largest()
        yield
        assert largest() - before < most

    return measured
