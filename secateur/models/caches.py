"""Keys and values of past tokens, as plain tensors: what a decoder needs to go on from where it stopped.

transformers renamed the argument that takes them, and its cache objects make empty tensors that a tracer would keep for
ever; both are dealt with here and nowhere else.
"""

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache, DynamicLayer

from secateur.errors import ModelError

ARGUMENTS = ("cache", "past_key_values")
"""What forward calls it, newest first."""

Past = Sequence[tuple[Tensor, Tensor]]
"""Keys and values of every block, (B, heads, tokens, width)."""


def cache_argument(model: PreTrainedModel) -> str:
    """The name under which this model's forward takes a cache."""
    known = inspect.signature(type(model).forward).parameters
    found = next((name for name in ARGUMENTS if name in known), None)
    if found is None:
        raise ModelError(
            f"{type(model).__name__} takes none of {', '.join(ARGUMENTS)}, so it cannot decode step by step"
        )
    return found


def filled(past: Past) -> DynamicCache:
    """A cache that holds these tensors themselves."""
    cache = DynamicCache()
    for keys, values in past:
        layer: Any = DynamicLayer()
        layer.dtype, layer.device, layer.is_initialized = keys.dtype, keys.device, True
        layer.keys, layer.values = keys, values
        cache.layers.append(layer)
    return cache


def tensors_of(cache: DynamicCache) -> list[tuple[Tensor, Tensor]]:
    """Keys and values of every block. ModelError for blocks that keep something else, such as the state of a mixer."""
    for layer in cache.layers:
        if not isinstance(layer, DynamicLayer):
            raise ModelError(f"blocks that keep a {type(layer).__name__} are not supported; wanted keys and values")
    layers: list[Any] = cache.layers
    return [(layer.keys, layer.values) for layer in layers]


@torch.inference_mode()
def empty_past(model: PreTrainedModel) -> list[tuple[Tensor, Tensor]]:
    """What the model keeps after no token at all, from keeping one."""
    cache = DynamicCache()
    ids = torch.zeros(1, 1, dtype=torch.int64, device=model.device)
    model(input_ids=ids, use_cache=True, **{cache_argument(model): cache})
    return [(keys[:, :, :0].clone(), values[:, :, :0].clone()) for keys, values in tensors_of(cache)]
