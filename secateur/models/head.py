"""A causal language model in two halves: the body gives hidden states, the head makes logits of them, a few at a time.

Logits of all tokens are the largest tensors of a training step; whoever wants them in pieces must apply the head to
pieces. What stands between the last hidden state and the logits differs by architecture (a projection, a scale, a cap),
so the head is the model's own forward, with its body replaced by a pass-through. ``check_head`` proves on the model at
hand that the halves make the whole.

B = rows of a batch, S = tokens of a row, D = hidden size, V = vocabulary, T = tokens of any number.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_outputs import MoeModelOutputWithPast

from secateur.errors import ModelError
from secateur.models.hooks import replaced_forward

TOLERANCE = 1e-4
"""Largest difference of logits, relative to the largest of them."""


@dataclass
class Answer(MoeModelOutputWithPast):
    """What a body says, with every field that some head reads, a router's logits among them."""

    cross_attentions: Any = None
    shared_kv_states: Any = None


def body(model: PreTrainedModel, ids: Int[Tensor, "B S"]) -> Float[Tensor, "B S D"]:
    """Hidden states after the final norm."""
    return model.base_model(input_ids=ids, use_cache=False).last_hidden_state


def head(model: PreTrainedModel, hidden: Float[Tensor, "T D"]) -> Float[Tensor, "T V"]:
    """Logits of some hidden states; gradients pass through."""

    def answer(*args: Any, **kwargs: Any) -> Answer:
        return Answer(last_hidden_state=hidden[None])  # pyright: ignore[reportArgumentType]

    base: Any = model.base_model
    bodies = {base, base.get_decoder()}  # OPT calls the decoder inside its base
    with replaced_forward(dict.fromkeys(bodies, answer)):
        nobody = torch.zeros(1, 1, dtype=torch.int64, device=hidden.device)
        return model(input_ids=nobody, use_cache=False).logits[0]


@torch.no_grad()
def check_head(model: PreTrainedModel, ids: Int[Tensor, "B S"]) -> None:
    """ModelError where head(body(ids)) are not the model's own logits."""
    whole = model(input_ids=ids, use_cache=False).logits
    halves = head(model, body(model, ids).flatten(0, 1))
    fits = halves.shape == whole.flatten(0, 1).shape
    apart = float((halves.view_as(whole) - whole).abs().max() / whole.abs().max()) if fits else math.inf
    if not apart < TOLERANCE:
        raise ModelError(
            f"logits of {type(model).__name__} made from its hidden states differ from its own by {apart:.1e} of the "
            f"largest; wanted below {TOLERANCE:g}; this architecture cannot be distilled a few tokens at a time yet"
        )
