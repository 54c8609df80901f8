"""Linears of a torch model in int8, weights and inputs, with scales from calibration: what an exported graph computes.

    y ≈ (s * codes) @ (a * (q - z)),   codes = round(W * d / s) by rows,   q = round(x / d / a) + z

``Int8Linear`` writes that with operations that converters know: OpenVINO recognises them and multiplies integers.
Embeddings and head keep float inputs, their weights are int8 per row. A zero weight has the code 0 whatever s and d.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from secateur.core.balance import smoothing
from secateur.core.grid import Scheme, fit_grid, to_codes
from secateur.core.int8 import LEVELS, Extremes, input_step
from secateur.errors import ModelError
from secateur.models.adapter import DecoderAdapter
from secateur.models.hooks import hooked
from secateur.models.linears import matrix

PER_ROW = Scheme(8)
PACKED_SIDE = 64
"""OpenVINO packs matrices both of whose sides this divides."""
NO_EXPERTS = "blocks with routed experts cannot be exported as W8A8 yet; take sparse-safetensors"


@dataclass(frozen=True)
class Int8Record:
    """What became of one linear."""

    name: str
    shape: tuple[int, int]
    sparsity: float
    """Share of codes that are 0; at least that of zero weights."""
    packable: bool
    """Both sides fit OpenVINO's sparse kernels."""


class Int8Linear(nn.Module):
    """y = codes * scale @ (x / divide, rounded to 256 steps)."""

    def __init__(
        self, W: Float[Tensor, "R C"], bias: Tensor | None, divide: Float[Tensor, " C"], step: float, zero: int
    ):
        super().__init__()
        codes, scale = row_codes(W * divide)
        self.codes, self.scale, self.inverse = (nn.Buffer(tensor) for tensor in (codes, scale, 1 / divide))
        self.bias = None if bias is None else nn.Buffer(bias.detach().clone())
        self.step, self.zero = step, zero

    def forward(self, x: Float[Tensor, "*batch C"]) -> Float[Tensor, "*batch R"]:
        x = torch.fake_quantize_per_tensor_affine(x * self.inverse, self.step, self.zero, 0, LEVELS)
        return F.linear(x, self.codes.to(x.dtype) * self.scale, self.bias)


class Int8Table(nn.Module):
    """An embedding, or a head that may share its numbers: weights int8 per row, everything else as it was."""

    def __init__(self, codes: Tensor, scale: Tensor, bias: Tensor | None = None, *, looks_up: bool):
        super().__init__()
        self.codes, self.scale, self.bias, self.looks_up = codes, scale, bias, looks_up

    def forward(self, x: Tensor) -> Tensor:
        if self.looks_up:
            return F.embedding(x, self.codes).to(self.scale.dtype) * F.embedding(x, self.scale)
        return F.linear(x, self.codes.to(x.dtype) * self.scale, self.bias)


@torch.inference_mode()
def calibrate(model: PreTrainedModel, windows: Iterable[Int64[Tensor, "B S"]]) -> dict[str, Extremes]:
    """Extremes of the input columns of every linear in the blocks. ModelError for blocks with routed experts."""
    linears = _linears(model)
    found = {name: Extremes.zeros(matrix(linear).shape[1]) for name, linear in linears.items()}

    def note(name: str, _: nn.Module, args: tuple[Tensor, ...]) -> None:
        found[name].update(args[0])

    with hooked(linear.register_forward_pre_hook(partial(note, name)) for name, linear in linears.items()):
        for ids in windows:
            model(input_ids=ids, use_cache=False)
    return found


def to_int8(model: PreTrainedModel, seen: dict[str, Extremes], share: float) -> list[Int8Record]:
    """Replace linears, embedding and head of a float32 model, in place. ``share``: the strength of `smoothing`."""
    records = []
    for names in _sharing(seen):
        linears = [model.get_submodule(name) for name in names]
        weights = torch.stack([matrix(linear).abs().amax(0) for linear in linears]).amax(0)
        extremes = seen[names[0]]
        divide = smoothing(extremes.peak, weights, share)
        step, zero = input_step(float((extremes.low / divide).min()), float((extremes.high / divide).max()))
        for name, linear in zip(names, linears, strict=True):
            new = Int8Linear(matrix(linear), linear.bias, divide, step, zero)  # pyright: ignore[reportArgumentType]
            model.set_submodule(name, new)
            records.append(_record(name, new.codes))
    _tables_to_int8(model)
    return records


def row_codes(W: Float[Tensor, "R C"]) -> tuple[Tensor, Tensor]:
    """Codes, and the scale of every row (R, 1)."""
    grid = fit_grid(W.float(), PER_ROW)
    return to_codes(W.float(), grid, PER_ROW), grid.scale


def _record(name: str, codes: Tensor) -> Int8Record:
    rows, columns = codes.shape
    sparsity = 1 - int(codes.count_nonzero()) / codes.numel()
    return Int8Record(name, (rows, columns), sparsity, rows % PACKED_SIDE == columns % PACKED_SIDE == 0)


def _tables_to_int8(model: PreTrainedModel) -> None:
    """Embedding and head where they are the plain ones; whoever scales what it looks up keeps its float numbers."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    names = {id(module): name for name, module in model.named_modules()}
    made: dict[int, Iterable[Tensor]] = {}
    for module, kind in ((embedding, nn.Embedding), (head, nn.Linear)):
        if type(module) is not kind:
            continue
        weight: Tensor = module.weight  # pyright: ignore[reportAssignmentType]
        if weight.data_ptr() not in made:
            made[weight.data_ptr()] = [nn.Buffer(tensor) for tensor in row_codes(weight.detach())]
        codes, scale = made[weight.data_ptr()]
        bias = getattr(module, "bias", None)
        table = Int8Table(codes, scale, bias, looks_up=kind is nn.Embedding)
        model.set_submodule(names[id(module)], table)


def _linears(model: PreTrainedModel) -> dict[str, nn.Module]:
    """By full name, of all blocks, in order."""
    adapter = DecoderAdapter(model)
    if any(adapter.experts(block) for block in adapter.blocks):
        raise ModelError(NO_EXPERTS)
    names = {id(module): name for name, module in model.named_modules()}
    return {names[id(one)]: one for block in adapter.blocks for one in adapter.linears(block).values()}  # pyright: ignore[reportReturnType]


def _sharing(seen: dict[str, Extremes]) -> list[list[str]]:
    """Linears that read one tensor: to the bit the same extremes in every column. They are balanced together."""
    groups: dict[bytes, list[str]] = {}
    for name, extremes in seen.items():
        groups.setdefault(torch.cat([extremes.low, extremes.high]).numpy().tobytes(), []).append(name)
    return list(groups.values())
