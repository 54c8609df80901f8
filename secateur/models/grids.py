"""What a quantized linear carries beside its weight, as buffers of its own module: grid, and range of the inputs.

The weight itself holds the values that the codes stand for, in the model's type, so that everything else (replays,
errors, perplexity) works on an ordinary model; codes are found again from value and scale when the model is written
(``secateur.quantization``). The buffers move with the model and are not part of its ``state_dict``. They are:

    quantized_scale, quantized_zero_point    (R, G), float32
    quantized_input                          (1,), float32: the largest |input| that was seen
"""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from secateur.core.grid import Grid
from secateur.errors import ModelError

SCALE, ZERO, INPUT = "quantized_scale", "quantized_zero_point", "quantized_input"
OWN = (SCALE, ZERO, INPUT)


def check_carriers(linears: Mapping[str, object]) -> None:
    """ModelError for linears that the format has no place for: it knows nn.Linear and nothing else."""
    for name, linear in linears.items():
        if not isinstance(linear, nn.Linear):
            raise ModelError(
                f"{name} is a {type(linear).__name__}; only nn.Linear can be quantized so far, fused experts and "
                "Conv1D cannot: leave them out with ignore"
            )


def attach_grid(linear: object, grid: Grid) -> None:
    """The grid of a linear's weight, in place of an earlier one."""
    assert isinstance(linear, nn.Linear), "check_carriers comes first"
    for name, values in zip((SCALE, ZERO), grid, strict=True):
        linear.register_buffer(name, values.detach().float().contiguous(), persistent=False)


def note_input(linear: nn.Module, X: Tensor) -> None:
    """Widen the range of a linear's inputs to these."""
    largest = X.detach().abs().amax().float().view(1)
    if hasattr(linear, INPUT):
        largest = torch.maximum(largest, linear.get_buffer(INPUT).to(largest.device))
    linear.register_buffer(INPUT, largest, persistent=False)


def grid_of(linear: nn.Module) -> Grid:
    """The grid that was attached."""
    return Grid(linear.get_buffer(SCALE), linear.get_buffer(ZERO))


def largest_input(linear: nn.Module) -> Tensor | None:
    """The largest |input| seen, (1,); None where nobody looked."""
    return linear.get_buffer(INPUT) if hasattr(linear, INPUT) else None


def grid_tensors(block: nn.Module) -> dict[str, Tensor]:
    """All of these buffers of a block, by their names in it."""
    return {name: buffer.contiguous() for name, buffer in block.named_buffers() if is_grid(name)}


def restore_grids(block: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Put back what ``grid_tensors`` gave; other tensors are passed over."""
    for name in filter(is_grid, tensors):
        linear, _, own = name.rpartition(".")
        block.get_submodule(linear).register_buffer(own, tensors[name], persistent=False)


def is_grid(name: str) -> bool:
    return name.rpartition(".")[2] in OWN


def forget_grids(model: nn.Module, linears: Iterable[str]) -> None:
    """The model is an ordinary one again."""
    for name in linears:
        linear = model.get_submodule(name)
        for own in OWN:
            if hasattr(linear, own):
                delattr(linear, own)
