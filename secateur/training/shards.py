"""What this process holds of a tensor: all of it, or some of its rows (FSDP2's DTensor, placed Shard(0)).

``fully_shard`` deals the rows of a parameter out to the processes in order, in equal parts but for the last ones, which
may have fewer or none. The arithmetic of training is on these parts; here is the little that must travel between
processes. A plain tensor is whole in every process, and every function hands it back as it is.

Functions that say "together" talk to the other processes: all that share the parameter must call them, in one order.
"""

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard


def local(tensor: Tensor) -> Tensor:
    """The rows that this process holds, in the tensor's own memory. For use without gradients."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def like(part: Tensor, parameter: Tensor) -> Tensor:
    """A tensor shared as the parameter is, of which this process holds ``part``; no process waits for another."""
    if not isinstance(parameter, DTensor):
        return part
    shared = torch.empty_like(parameter, dtype=part.dtype, requires_grad=False)
    local(shared).copy_(part)
    return shared


def whole(tensor: Tensor) -> Tensor:
    """All rows, in every process. Together."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def part(tensor: Tensor, parameter: Tensor) -> Tensor:
    """Of a whole tensor the rows that this process holds of the parameter."""
    if not isinstance(parameter, DTensor):
        return tensor
    mesh = parameter.device_mesh
    shared = DTensor.from_local(tensor, mesh, [Replicate()] * mesh.ndim, run_check=False)
    return local(shared.redistribute(placements=parameter.placements)).to(tensor.device)


def is_split(parameter: Tensor) -> bool:
    return isinstance(parameter, DTensor) and any(isinstance(placed, Shard) for placed in parameter.placements)


def check_rows(parameter: Tensor) -> None:
    """ValueError where processes hold something else than whole rows of a matrix, or whole matrices of a stack."""
    if isinstance(parameter, DTensor) and any(placed not in (Replicate(), Shard(0)) for placed in parameter.placements):
        raise ValueError(
            f"a parameter of shape {tuple(parameter.shape)} is placed {parameter.placements}; a pattern needs whole "
            "rows, Shard(0) or Replicate(): shard it by rows (fully_shard's default) or give it no pattern"
        )


def total(number: Tensor, parameter: Tensor) -> Tensor:
    """The sum over the processes that hold different rows of the parameter. Together."""
    if isinstance(parameter, DTensor):
        for dimension, placed in enumerate(parameter.placements):
            if isinstance(placed, Shard):
                dist.all_reduce(number, group=parameter.device_mesh.get_group(dimension))
    return number


def norm(part: Tensor, parameter: Tensor) -> Tensor:
    """The Euclidean norm of the whole of which every process has a part. Together."""
    own = torch.linalg.vector_norm(part)
    return total(own.square(), parameter).sqrt() if is_split(parameter) else own


def spread(module: nn.Module, blocks: Iterable[nn.Module], device: torch.device) -> None:
    """Deal the rows of every parameter out to the processes, gathered block by block when they are used (FSDP2).

    No device ever holds the whole: a module that lies in host memory moves to the device block by block.
    """
    mesh = spread_blocks(blocks, device)
    fully_shard(module, mesh=mesh)


def spread_blocks(blocks: Iterable[nn.Module], device: torch.device) -> DeviceMesh:
    """The same for the blocks of a model that is only asked; what is not a block stays whole, where it is."""
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for block in blocks:
        fully_shard(block, mesh=mesh, reshard_after_forward=True)
    return mesh


@torch.no_grad()
def gathered(model: nn.Module) -> None:
    """Whole parameters again, in the first process's host memory; the model can be saved, but not run. Together."""
    found: dict[nn.Parameter, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if isinstance(parameter, DTensor):
                if parameter not in found:
                    every = whole(parameter)  # in all processes, though the first alone keeps it
                    found[parameter] = nn.Parameter(
                        every.cpu() if is_first() else every.new_empty(0), requires_grad=False
                    )
                module._parameters[name] = found[parameter]


def reshard(module: nn.Module) -> None:
    """Drop what FSDP2 has gathered for a forward without a backward: weights that change now would not be seen."""
    if isinstance(module, FSDPModule):
        module.reshard()


# --------------------------------------------------------------------------------------------------- the first process


def wait() -> None:
    """Until all processes are here."""
    if dist.is_initialized():
        dist.barrier()


def is_first() -> bool:
    """Whether this process writes what is written once; alone it is the first."""
    return not dist.is_initialized() or dist.get_rank() == 0


def told(value: Any) -> Any:
    """What the first process says. Together, with all processes."""
    values = [value]
    if dist.is_initialized():
        dist.broadcast_object_list(values, src=0)
    return values[0]


def dealt(tensor: Tensor | None, own: Tensor) -> Tensor:
    """This process's rows of a tensor that the first process has whole; ``own`` is the one they are for.

    The whole passes through every process's device; what others than the first pass is not looked at. Together, with
    all processes.
    """
    received = torch.empty(own.shape, dtype=own.dtype, device=local(own).device)
    if tensor is not None:
        received.copy_(tensor)
    if dist.is_initialized():
        dist.broadcast(received, src=0)
    return part(received, own)
