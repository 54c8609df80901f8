"""What a quantized linear carries beside its weight, as buffers of its own module: grid, and range of the inputs.

The weight itself holds the values that the codes stand for, in the model's type, so that everything else (replays,
errors, perplexity) works on an ordinary model; codes are found again from value and scale when the model is written
(``secateur.quantization``). The buffers move with the model and are not part of its ``state_dict``. They are:

    quantized_scale, quantized_zero_point    (R, G), float32
    quantized_input                          (1,), float32: the largest |input| that was seen
    quantized_divisor                        (C,), float32, of a norm or a linear: what its output was divided by
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from secateur.core.grid import Grid
from secateur.errors import ModelError

SCALE, ZERO, INPUT, DIVISOR = "quantized_scale", "quantized_zero_point", "quantized_input", "quantized_divisor"
OWN = (SCALE, ZERO, INPUT, DIVISOR)


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
    """Put back what ``grid_tensors`` gave, and divide again what was divided but is no weight of a planned linear."""
    for name in filter(is_grid, tensors):
        path, _, own = name.rpartition(".")
        module = block.get_submodule(path)
        module.register_buffer(own, tensors[name], persistent=False)
        if own == DIVISOR:
            divide(module, tensors[name], weight=not isinstance(module, nn.Linear))


def divisions(model: nn.Module) -> list[str]:
    """Names of the modules that were divided."""
    return [name.removesuffix(f".{DIVISOR}") for name, _ in model.named_buffers() if name.endswith(DIVISOR)]


def divide(module: nn.Module, s: Tensor, *, weight: bool = True) -> None:
    """Divide what a norm or a linear gives by s, powers of two: its bias and, if asked, its weight."""
    for name, parameter in module.named_parameters(recurse=False):
        if name == "bias" or weight:
            shaped = s.view(-1, *[1] * (parameter.ndim - 1)).to(parameter.device, parameter.dtype)
            parameter.detach().div_(shaped)


def is_grid(name: str) -> bool:
    return name.rpartition(".")[2] in OWN
