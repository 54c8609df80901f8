"""A torch decoder as an OpenVINO graph that keeps the keys and values of past tokens itself.

The model is traced once with a past of a few tokens; caches are inputs and outputs of the traced function, and become
states of the graph. Inputs are named as openvino-genai and optimum-intel want them: input_ids, attention_mask,
position_ids, beam_idx (which row each row goes on from).

The mask is made here, causal and padded: the models' own mask functions look at shapes in ways a tracer cannot follow.
Blocks that see only a window of the past are therefore refused unless the window is the whole context.

B = rows, S = new tokens, T = past and new tokens.
"""

import inspect
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from secateur.errors import ModelError
from secateur.models.caches import Past, cache_argument, empty_past, filled, tensors_of
from secateur.models.openvino import openvino
from secateur.models.quiet import quiet

EXAMPLE_ROWS, EXAMPLE_PAST, EXAMPLE_NEW = 2, 5, 3
"""Sizes of the traced call: all different, and none of them 1, so that nothing is taken for a constant."""


class Step(nn.Module):
    """New tokens and caches in, logits and longer caches out."""

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        self.model = model
        self.argument = cache_argument(model)
        self.positions = "position_ids" in inspect.signature(type(model).forward).parameters

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, past: Past
    ) -> tuple[Tensor, ...]:
        cache = filled(past)
        more: dict[str, Any] = {self.argument: cache}
        if self.positions:
            more["position_ids"] = position_ids
        mask = visible(attention_mask, input_ids.shape[1])
        logits = self.model(input_ids=input_ids, attention_mask=mask, use_cache=True, **more).logits
        return logits, *(tensor for pair in tensors_of(cache) for tensor in pair)


def visible(attention_mask: Tensor, new: int) -> Tensor:
    """(B, 1, S, T), True where a new token may look: at itself and what came before, and not at padding."""
    place = torch.arange(attention_mask.shape[1])[None]
    causal = place <= place[:, place.shape[1] - new :].transpose(0, 1)
    return causal[None, None] & (attention_mask[:, None, None] > 0)


def convert(model: PreTrainedModel) -> Any:
    """The graph, with states for keys and values. ModelError where the model cannot be followed."""
    _refuse_windows(model)
    ov = openvino()
    past = _example_past(model)
    ids = torch.ones(EXAMPLE_ROWS, EXAMPLE_NEW, dtype=torch.int64)
    T = EXAMPLE_PAST + EXAMPLE_NEW
    example = {
        "input_ids": ids,
        "attention_mask": torch.ones(EXAMPLE_ROWS, T, dtype=torch.int64),
        "position_ids": torch.arange(EXAMPLE_PAST, T).repeat(EXAMPLE_ROWS, 1),
        "past": past,
    }
    with quiet(), _traceable(model), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            graph = ov.convert_model(Step(model), example_input=example)
        except Exception as error:  # whatever the frontend raises is about this architecture
            lines = str(error).strip().splitlines() or [type(error).__name__]
            raise ModelError(f"OpenVINO cannot convert {type(model).__name__}: {lines[-1].strip()}") from error
    _name(ov, graph, past)
    _reorder(ov, graph, len(past))
    _keep_states(graph, len(past))
    _begin_empty(ov, graph)
    return graph


def _refuse_windows(model: PreTrainedModel) -> None:
    config = model.config.get_text_config()
    window, context = getattr(config, "sliding_window", None), getattr(config, "max_position_embeddings", None)
    kinds = set(getattr(config, "layer_types", None) or ()) - {"full_attention"}
    switched_on = getattr(config, "use_sliding_window", True)
    if (
        window
        and switched_on
        and (context is None or window < context)
        and (kinds or not hasattr(config, "layer_types"))
    ):
        raise ModelError(
            f"{type(model).__name__} sees a window of {window} tokens in some blocks, which this export cannot express "
            "yet; take sparse-safetensors"
        )


def _example_past(model: PreTrainedModel) -> list[tuple[Tensor, Tensor]]:
    return [tuple(_grown(tensor) for tensor in pair) for pair in empty_past(model)]  # pyright: ignore[reportReturnType]


def _grown(empty: Tensor) -> Tensor:
    _, heads, _, width = empty.shape
    return torch.zeros(EXAMPLE_ROWS, heads, EXAMPLE_PAST, width, dtype=empty.dtype)


@contextmanager
def _traceable(model: PreTrainedModel) -> Iterator[None]:
    """Attention as one operation, which OpenVINO knows, whatever the model was loaded with."""
    before = model.config._attn_implementation or "eager"
    model.set_attn_implementation("sdpa")
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def _flat(past: Past) -> list[Tensor]:
    return [tensor for pair in past for tensor in pair]


def _names(kind: str, blocks: int) -> list[str]:
    return [f"{kind}.{block}.{what}" for block in range(blocks) for what in ("key", "value")]


def _name(ov: Any, graph: Any, past: Past) -> None:
    """Ports by name; rows, tokens and past of any number."""
    inputs = ["input_ids", "attention_mask", "position_ids", *_names("past", len(past))]
    outputs = ["logits", *_names("present", len(past))]
    held = {name: port for port in graph.inputs for name in port.get_names() if name in inputs}
    rest = iter([port for port in graph.inputs if not port.get_names() & held.keys()])
    shapes = {
        name: [-1, tensor.shape[1], -1, tensor.shape[3]] for name, tensor in zip(inputs[3:], _flat(past), strict=True)
    }
    for name in inputs:
        if name in held or name in shapes:
            port = held[name] if name in held else next(rest)
            port.get_tensor().set_names({name})
            port.get_node().set_partial_shape(ov.PartialShape(shapes.get(name, [-1, -1])))
    for port, name in zip(graph.outputs, outputs, strict=True):
        port.get_tensor().set_names({name})
    graph.validate_nodes_and_infer_types()


def _reorder(ov: Any, graph: Any, blocks: int) -> None:
    """Rows of the past are gathered by ``beam_idx``: beam search needs it, OpenVINO's fused attention looks for it."""
    ops = ov.opset13
    rows = graph.input("input_ids").get_partial_shape()[0]
    beam = ops.parameter(shape=ov.PartialShape([rows]), dtype=np.int32, name="beam_idx")
    beam.output(0).get_tensor().add_names({"beam_idx"})
    graph.add_parameters([beam])
    for name in _names("past", blocks):
        port = graph.input(name)
        readers = port.get_target_inputs()
        gathered = ops.gather(port, beam, ops.constant(0))
        for reader in readers:
            reader.replace_source_output(gathered.output(0))
    graph.validate_nodes_and_infer_types()


def _keep_states(graph: Any, blocks: int) -> None:
    from openvino._offline_transformations import apply_make_stateful_transformation

    pairs = dict(zip(_names("past", blocks), _names("present", blocks), strict=True))
    apply_make_stateful_transformation(graph, pairs)


def _begin_empty(ov: Any, graph: Any) -> None:
    """A state that was never written, or reset, has as many rows as ``input_ids`` and no token."""
    ops = ov.opset13
    rows = ops.gather(ops.shape_of(graph.input("input_ids"), output_type="i64"), ops.constant([0]), ops.constant(0))
    for node in graph.get_ops():
        if node.get_type_name() == "ReadValue":
            shape = node.get_output_partial_shape(0)
            sizes = [ops.constant(np.array([shape[axis].get_length()])) for axis in (1, 3)]
            whole = ops.concat([rows, sizes[0], ops.constant(np.array([0])), sizes[1]], axis=0)
            node.set_arguments([ops.broadcast(ops.constant(np.float32(0)), whole)])
    graph.validate_nodes_and_infer_types()
