"""A model larger than memory: its blocks stay in their files and are read when they run.

accelerate's hooks do the reading: a block's parameters lie on the meta device, and each module's are read from its
safetensors file before its forward and dropped after it. Everything else of the library sees an ordinary model. Two
things are added here: a block can be brought into memory to be worked on (``at_hand``), and what was written for it
elsewhere becomes what the model reads from then on (``relocate``). Embedding, last norm and head are always in memory.

Memory: the parts outside the blocks, and one block. Every forward of the whole model reads the whole checkpoint.
"""

import ctypes
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, cast

import psutil
import torch
from accelerate.hooks import add_hook_to_module, remove_hook_from_module
from accelerate.utils import OffloadedWeightsLoader, set_module_tensor_to_device
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from secateur.errors import ModelError, UsageError

M_MMAP_THRESHOLD = -3
"""glibc's number for the size from which memory is taken from the system and given back alone."""
MEMORY_SHARE = 0.5
"""Of the memory that is free: a checkpoint larger than that is not loaded as a whole."""


def stays_on_disk(offload: Literal["auto", "on", "off"], size: int, *, gguf: bool = False) -> bool:
    """Whether the blocks of a checkpoint of so many bytes are left in its files; a GGUF file's never are."""
    if gguf:
        if offload == "on":
            raise UsageError("--offload on, but a GGUF file can only be read as a whole; give a directory, or use auto")
        return False
    return offload == "on" or (offload == "auto" and size > MEMORY_SHARE * psutil.virtual_memory().available)


def disk_map(config: PretrainedConfig) -> dict[str, str]:
    """Device map for ``from_pretrained``: blocks on disk, the rest in memory. ModelError for fewer than two blocks."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len({type(member) for member in m}) == 1]
    blocks = max(lists, key=lambda members: sum(p.numel() for p in members.parameters()), default=None)
    if blocks is None or len(blocks) < 2:
        raise ModelError(
            f"{type(model).__name__} has no list of two or more blocks to leave on disk; use --offload off"
        )
    return dict(_places(model, "", blocks))


def _places(module: nn.Module, name: str, blocks: nn.ModuleList) -> Iterator[tuple[str, str]]:
    """Whole submodules as far as they do not hold the blocks."""
    prefix = f"{name}." if name else ""
    if module is blocks:
        yield from ((f"{prefix}{i}", "disk") for i in range(len(blocks)))
    elif blocks in list(module.modules()):
        yield from ((f"{prefix}{own}", "cpu") for own, _ in module.named_parameters(recurse=False))
        for child, submodule in module.named_children():
            yield from _places(submodule, f"{prefix}{child}", blocks)
    else:
        yield name, "cpu"


def check_stored(model: nn.Module, source: str, advice: str) -> None:
    """ModelError where a shape on disk is not that of the parameter: it would be found in the midst of a run."""
    files: dict[str, list[tuple[str, str]]] = {}
    for name, row in cast(dict[str, Any], _loader(model).index).items():
        if "safetensors_file" in row:
            files.setdefault(row["safetensors_file"], []).append((name, row["weight_name"]))
    for path, names in files.items():
        with safe_open(path, framework="pt") as file:
            for name, stored in names:
                found, wanted = tuple(file.get_slice(stored).get_shape()), tuple(model.get_parameter(name).shape)
                if found != wanted:
                    shapes = f"{name} is {found} in the file and {wanted} by config.json"
                    raise ModelError(f"{source}: weights and config do not fit, {shapes}; {advice}")


def return_freed_memory() -> None:
    """From here on, freed tensors go back to the system at once, wherever the C library is glibc.

    It keeps what is smaller than 32 MB for itself and cuts it to pieces: two gigabytes after forty blocks of 100 MB.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, 1 << 20)


def is_offloaded(module: nn.Module) -> bool:
    return any(parameter.is_meta for parameter in module.parameters())


@contextmanager
def at_hand(block: nn.Module) -> Iterator[None]:
    """Inside, the block's parameters are in memory, the block's own to change; afterwards they are on disk again.

    A block that was in memory all along is left alone. What is to outlive the block must be written and ``relocate``d.
    """
    if not is_offloaded(block):
        yield
        return
    hooks = _hooks(block)
    remove_hook_from_module(block, recurse=True)
    for module, hook in hooks.items():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.is_meta:
                set_module_tensor_to_device(module, name, "cpu", value=hook.weights_map[name].clone())
    try:
        yield
    finally:
        for module, hook in hooks.items():
            add_hook_to_module(module, hook)


@contextmanager
def moved(model: PreTrainedModel, device: str) -> Iterator[None]:
    """Inside, the model is on this device; afterwards where it was. One whose blocks stay on disk is left alone."""
    if is_offloaded(model):
        yield
        return
    home = model.device
    nn.Module.to(model, device)
    try:
        yield
    finally:
        nn.Module.to(model, home)


def relocate(model: nn.Module, file: Path, stored: Mapping[str, str]) -> None:
    """From now on the model reads these parameters (full name -> name in the file) from this safetensors file."""
    index = cast(dict[str, Any], _loader(model).index)
    for name, key in stored.items():
        dtype = str(model.get_parameter(name).dtype).removeprefix("torch.")
        index[name] = {"safetensors_file": str(file), "weight_name": key, "dtype": dtype}


def weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the state dict by name, in order of name, read from disk one at a time where it lies there."""
    loader = _loader(model) if is_offloaded(model) else None
    for name, tensor in sorted(model.state_dict().items()):
        yield name, loader[name] if loader is not None and tensor.is_meta else tensor


def _hooks(module: nn.Module) -> dict[nn.Module, Any]:
    """accelerate keeps a module's hook in an attribute of the module."""
    return {part: vars(part)["_hf_hook"] for part in module.modules() if "_hf_hook" in vars(part)}


def _loader(model: nn.Module) -> OffloadedWeightsLoader:
    """The one store that the hooks of all blocks share."""
    maps = (getattr(hook, "weights_map", None) for hook in _hooks(model).values())
    return next(weights_map.dataset for weights_map in maps if weights_map is not None)
