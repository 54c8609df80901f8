"""Which modules of a model are its decoder blocks, and what nobody here can prune, refused before anything is done.

Blocks are found by observation: the largest list of modules that one forward pass uses must hold modules of one class,
called once each, in order. Hybrids, where some blocks mix tokens by a recurrence or a convolution instead of attention,
are refused by the trace that all of them leave: a convolution along time inside a block.

B = rows of a batch, S = tokens of a row.
"""

from collections import defaultdict
from collections.abc import Callable
from itertools import pairwise
from typing import Any, cast

import torch
from jaxtyping import Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from secateur.errors import ModelError
from secateur.models.elementwise import elementwise
from secateur.models.experts import Linear
from secateur.models.hooks import hooked

NOT_MATRICES = (nn.Embedding,)
"""Modules whose parameters have two axes or more without being a matrix that multiplies tokens: relative position
tables. They are left as they are."""
PRUNABLE_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def refuse_quantized(model: PreTrainedModel) -> None:
    """ModelError for a model whose weights are codes and scales instead of numbers.

    A model read from GGUF may be marked as quantized and have plain weights: there the weights' dtypes decide, below.
    """
    quantization = getattr(model.config, "quantization_config", None)
    if quantization is not None and getattr(quantization, "quant_method", None) != "gguf":
        raise ModelError(
            f"{model.config.name_or_path or type(model).__name__} is already quantized; prune the original 16 or 32 "
            "bit model, then quantize the result"
        )


def find_blocks(model: PreTrainedModel, input_ids: Int[Tensor, "B S"]) -> tuple[str, list[nn.Module], int]:
    """Name and members of the largest list of modules that a forward pass uses, and how many items they answer with.

    The largest or none: a smaller list would leave most of the model unpruned without a word.
    """
    lists = {name: list(module) for name, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    members = list(dict.fromkeys(member for blocks in lists.values() for member in blocks))
    called, items = _called(model, members, input_ids)
    used = [name for name, blocks in lists.items() if _only(blocks, called)]
    if not used:
        raise ModelError(
            f"{type(model).__name__} has no list of blocks; secateur prunes decoders built of equal blocks"
        )
    name = max(used, key=lambda name: sum(p.numel() for block in lists[name] for p in block.parameters()))
    blocks = lists[name]
    _refuse_mixers(name, blocks)
    if len({type(block) for block in blocks}) > 1 or _only(blocks, called) != blocks:
        kinds = " and ".join(dict.fromkeys(type(block).__name__ for block in blocks))
        raise ModelError(
            f"{name} is no list of same-class blocks that run once each, one after the other: it holds {kinds}; "
            "secateur prunes decoders built of equal blocks"
        )
    return name, blocks, items[blocks[0]]


def _called(
    model: PreTrainedModel, modules: list[nn.Module], input_ids: Int[Tensor, "B S"]
) -> tuple[list[nn.Module], dict[nn.Module, int]]:
    """Those modules that a forward pass calls, in order, and how many items each answers with (0: a bare tensor)."""
    called: list[nn.Module] = []
    items: dict[nn.Module, int] = {}

    def note(module: nn.Module, args: Any, output: Any) -> None:
        called.append(module)
        items[module] = len(output) if isinstance(output, tuple | list) else 0

    with torch.no_grad(), hooked(module.register_forward_hook(note) for module in modules):
        model(input_ids=input_ids.to(embedding(model).weight.device), use_cache=False)
    return called, items


def _refuse_mixers(name: str, blocks: list[nn.Module]) -> None:
    """State-space, recurrent and convolutional token mixers: each shifts tokens through a convolution along time."""
    for i, block in enumerate(blocks):
        for inner, module in block.named_modules():
            if isinstance(module, nn.Conv1d):
                mixer, _, last = f"{i}.{inner}".rpartition(".")
                kind = type(block.get_submodule(inner.rpartition(".")[0])).__name__
                raise ModelError(
                    f"{name}.{mixer} ({kind}) mixes tokens by a convolution along time ({last}), as state-space, "
                    "recurrent and convolutional hybrids do; only blocks that mix tokens by attention are supported"
                )


def _only(wanted: list[nn.Module], modules: list[nn.Module]) -> list[nn.Module]:
    members = set(wanted)
    return [module for module in modules if module in members]


def refuse_uncovered(
    block_name: str, block: nn.Module, linears: dict[str, Linear], known: set[str], replay: Callable[[], None]
) -> None:
    """Unknown or quantized matrices: parameters which `linears` would miss in silence, or could not read."""
    uncovered = {}
    for name, parameter in block.named_parameters():
        owner = name.rpartition(".")[0]
        covered = owner in linears or name in known
        if parameter.ndim >= 2 and not covered and not isinstance(block.get_submodule(owner), NOT_MATRICES):
            uncovered[name] = parameter
    for name in elementwise(block, uncovered, replay) if uncovered else ():
        del uncovered[name]
    if uncovered:
        described = ", ".join(f"{name} ({'x'.join(map(str, p.shape))})" for name, p in uncovered.items())
        raise ModelError(
            f"{block_name} holds matrices outside any linear: {described}; secateur cannot read them there yet"
        )
    for name, linear in linears.items():
        if linear.weight.dtype not in PRUNABLE_DTYPES:
            raise ModelError(f"{block_name}.{name} holds {linear.weight.dtype} weights; load the model in 16 or 32 bit")


def refuse_tied(model: PreTrainedModel, block_names: list[str]) -> None:
    """One parameter under two names: pruning it for one of its uses would change the other."""
    names: dict[int, list[str]] = defaultdict(list)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names[id(parameter)].append(name)
    prefixes = tuple(f"{name}." for name in block_names)
    for shared in names.values():
        for first, second in pairwise(shared):
            if first.startswith(prefixes) or second.startswith(prefixes):
                raise ModelError(f"{first} and {second} are one tensor; weights shared by blocks are not supported yet")


# ------------------------------------------------------------------------------------------------------------- plumbing


def embedding(model: PreTrainedModel) -> nn.Embedding:
    return cast(nn.Embedding, model.get_input_embeddings())
