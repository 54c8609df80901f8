"""Open a 2:4 model on a CUDA GPU. Needs torch, transformers and safetensors, and nothing else: this file lies in every
directory that ``secateur export --to torch-2:4`` wrote, so

    python -c "import sparse24_loader as s; model, report = s.load_sparse('.')"        # run there

Every packed matrix becomes a semi-structured tensor of torch.sparse where that is faster for as many tokens at once as
``tokens`` says, and stays dense where it is not: decoding one token at a time is usually slower with 2:4. What was
measured and chosen is in the report.

    NAME.sparse24.safetensors    every tensor as it was, but a packed one as TENSOR.values (R, C/2) and TENSOR.places
                                 (R, C/8): a byte of places holds two groups of four, the left one in the lower bits,
                                 and of each the places of its two values, two bits each, the lower one first
    its metadata                 sparse24: the version, "1"; packed: JSON {TENSOR: crc32 of values and places}
"""

import json
import statistics
import time
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.nn import functional as F

SUFFIX, VERSION = ".sparse24.safetensors", "1"
CAPABILITY = (8, 0)
"""The first GPUs with sparse tensor cores."""
TOKENS = 2048
"""Tokens multiplied at once for which a choice is made: a prompt, or a large batch."""
REPEATS = 20
"""Timed products of each form."""

Convert = Callable[[Tensor], Tensor]


class DamagedError(RuntimeError):
    """The directory is not what was written."""


class NotHereError(RuntimeError):
    """This machine lacks something."""


class Choice(NamedTuple):
    """What became of one packed matrix."""

    name: str
    shape: tuple[int, int]
    chosen: str
    """A kind of sparse tensor, or "dense"."""
    ms: dict[str, float]
    """Milliseconds of a product with so many tokens, by form; forms that failed are absent."""
    failed: dict[str, str]


def load_sparse(directory: str, device: str = "cuda", tokens: int = TOKENS) -> tuple[Any, list[Choice]]:
    """The model on the GPU, and what was chosen for every packed matrix."""
    from transformers import AutoConfig, AutoModelForCausalLM

    if lacking := lacks():
        raise NotHereError(lacking)
    state, packed = read_state(directory)
    dtype = next(state[name].dtype for name in packed)
    config, auto = AutoConfig.from_pretrained(directory), cast(Any, AutoModelForCausalLM)
    model = auto.from_pretrained(None, config=config, state_dict=state, dtype=dtype)
    model = model.eval().requires_grad_(False).to(device)
    return model, swap(model, packed, tokens, kinds(), time_on_gpu)


def lacks() -> str | None:
    """What this machine lacks for sparse products, in one line; None where it has all."""
    if not torch.cuda.is_available():
        return (
            "torch sees no CUDA device here; 2:4 products need an NVIDIA GPU of compute capability 8.0 or more (Ampere "
            "on) and a CUDA build of torch"
        )
    if (found := torch.cuda.get_device_capability()) < CAPABILITY:
        name = torch.cuda.get_device_name()
        return f"{name} has compute capability {found[0]}.{found[1]}; 2:4 products need 8.0 or more (Ampere on)"
    return None


def kinds() -> dict[str, Convert]:
    """The forms that torch has here."""
    from torch.sparse import SparseSemiStructuredTensorCUSPARSELT, SparseSemiStructuredTensorCUTLASS

    found: dict[str, Convert] = {"cutlass": SparseSemiStructuredTensorCUTLASS.from_dense}
    if torch.backends.cusparselt.is_available():
        found["cusparselt"] = SparseSemiStructuredTensorCUSPARSELT.from_dense
    return found


def swap(
    model: nn.Module, packed: list[str], tokens: int, forms: Mapping[str, Convert], timer: Callable[..., float]
) -> list[Choice]:
    """Give each packed linear the fastest weight, in place. Equal shapes are timed once."""
    timed: dict[tuple[int, int], tuple[dict[str, float], dict[str, str]]] = {}
    report = []
    for name in packed:
        linear = cast(nn.Linear, model.get_submodule(name.removesuffix(".weight")))
        W = linear.weight.detach()
        shape = (W.shape[0], W.shape[1])
        if shape not in timed:
            timed[shape] = _timed(W, tokens, forms, timer)
        ms, failed = timed[shape]
        chosen = min(ms, key=lambda form: ms[form])
        if chosen != "dense":
            linear.weight = nn.Parameter(forms[chosen](W), requires_grad=False)
        report.append(Choice(name, shape, chosen, ms, failed))
    return report


def _timed(
    W: Tensor, tokens: int, forms: Mapping[str, Convert], timer: Callable[..., float]
) -> tuple[dict[str, float], dict[str, str]]:
    """Milliseconds of each form, and why some have none: shapes and types that a kernel does not take."""
    X = torch.ones(tokens, W.shape[1], dtype=W.dtype, device=W.device)
    ms, failed = {"dense": timer(F.linear, X, W)}, {}
    for form, convert in forms.items():
        try:
            ms[form] = timer(F.linear, X, convert(W))
        except (RuntimeError, ValueError, NotImplementedError) as error:
            failed[form] = (str(error).strip() or type(error).__name__).splitlines()[0]
    return ms, failed


def time_on_gpu(f: Callable[..., Any], *args: Tensor) -> float:
    """Median milliseconds, the first calls left out."""
    spent = []
    for _ in range(REPEATS + 5):
        torch.cuda.synchronize()
        start = time.perf_counter()
        f(*args)
        torch.cuda.synchronize()
        spent.append(1000 * (time.perf_counter() - start))
    return statistics.median(spent[5:])


def read_state(directory: str) -> tuple[dict[str, Tensor], list[str]]:
    """All tensors as they were, zeros filled in, and which of them are packed. Works on any machine."""
    files = sorted(Path(directory).glob(f"*{SUFFIX}"))
    if not files:
        raise DamagedError(f"{directory} holds no *{SUFFIX}; give what `secateur export --to torch-2:4` wrote")
    state: dict[str, Tensor] = {}
    packed: list[str] = []
    for path in files:
        try:
            packed += read_file(path, state)
        except (SafetensorError, KeyError, ValueError, OSError) as error:
            raise DamagedError(f"{path} cannot be read ({error}); copy or export it again") from error
    if not packed:
        raise DamagedError(f"{directory} packs no matrix; export it again")
    return state, packed


def read_file(path: Path, into: dict[str, Tensor]) -> list[str]:
    with safe_open(path, framework="pt") as file:
        words = file.metadata() or {}
        if words.get("sparse24") != VERSION:
            raise DamagedError(f"{path} is of version {words.get('sparse24')}, this reads {VERSION}; update secateur")
        sums: dict[str, int] = json.loads(words["packed"])
        parts = {f"{name}.{part}" for name in sums for part in ("values", "places")}
        into.update({name: file.get_tensor(name) for name in file.keys() if name not in parts})  # noqa: SIM118
        for name, wanted in sums.items():
            values, places = file.get_tensor(f"{name}.values"), file.get_tensor(f"{name}.places")
            if checksum(values, places) != wanted:
                raise DamagedError(f"{path}: {name} is damaged, its checksum is another; copy or export it again")
            into[name] = unpack(values, places)
    return list(sums)


def checksum(values: Tensor, places: Tensor) -> int:
    return zlib.crc32(places.numpy().tobytes(), zlib.crc32(values.view(torch.uint8).numpy().tobytes()))


def unpack(values: Tensor, places: Tensor) -> Tensor:
    """(R, C/2) values and (R, C/8) bytes of places as the (R, C) matrix."""
    R, half = values.shape
    nibbles = torch.stack([places & 15, places >> 4], 2).reshape(R, half // 2)
    index = torch.stack([nibbles & 3, nibbles >> 2], 2).long()
    groups = values.new_zeros(R, half // 2, 4)
    return groups.scatter_(2, index, values.view(R, half // 2, 2)).view(R, 2 * half)
