"""One decoder, block by block: find the blocks, know what each is called with, replay them, read and write weights.

Nothing here knows an architecture by name. The blocks are *found by observation* (``models.blocks``). What each block
is called with (mask, rotary embedding, positions; they differ from block to block with sliding windows) is captured by
letting the model run with its blocks replaced by a pass-through, so that it costs the embedding and not the network.
Whether a replay really equals the model's own forward is for ``verify`` to say, in numbers, before anything is pruned.

Weights are read and written as (out, in), whatever the module (``models.linears``).

    adapter = DecoderAdapter(model)
    call = adapter.calls(batch=1, seq_len=2048)
    hidden = adapter.first_hidden(input_ids)                       # (1, 2048, D), input of block 0
    for block, c in zip(adapter.blocks, call): hidden = adapter.replay(block, hidden, c)

B = rows of a batch, S = tokens of a row, D = hidden size, R = out_features, C = in_features, V = vocabulary.
"""

from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from secateur.errors import ModelError
from secateur.models.blocks import embedding, find_blocks, refuse_quantized, refuse_tied, refuse_uncovered
from secateur.models.experts import ExpertLinear, Experts, Linear, find_experts, known_parameters, with_experts
from secateur.models.hooks import hooked, replaced_forward
from secateur.models.linears import matrix

TOLERANCE = 1e-4
"""Largest difference between replay and forward, relative to the largest hidden activation."""


@dataclass(frozen=True)
class Call:
    """Everything a block is called with except the hidden states."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def to(self, device: torch.device | str) -> "Call":
        """The same call with its tensors on `device`."""
        return Call(_to(self.args, device), _to(self.kwargs, device))


@dataclass(frozen=True)
class Capture:
    """What one batch brings to the blocks: the input of block 0 and every block's call, shared by reference."""

    hidden: Float[Tensor, "B S D"]
    calls: list[Call]


class DecoderAdapter:
    """A decoder seen as a sequence of blocks. Puts the model in eval mode; changes nothing else until `write`."""

    def __init__(self, model: PreTrainedModel):
        refuse_quantized(model)
        self.model = model.eval()
        name, self.blocks, self._items = find_blocks(model, self._tokens(1, 4))
        self.block_names = [f"{name}.{i}" for i in range(len(self.blocks))]
        self._calls: dict[tuple[int, int], list[Call]] = {}
        self._experts = {block: find_experts(block) for block in self.blocks}
        for i, (block_name, block) in enumerate(zip(self.block_names, self.blocks, strict=True)):
            known = known_parameters(self.experts(block))
            refuse_uncovered(block_name, block, self.linears(block), known, partial(self._try, i))
        refuse_tied(model, self.block_names)

    # ------------------------------------------------------------------------------------------------ calls and replay

    def capture(self, input_ids: Int[Tensor, "B S"]) -> Capture:
        """The input of block 0 and the call of every block for these tokens; costs the embedding only."""
        seen = self._enter(input_ids, last=len(self.blocks) - 1)
        return Capture(seen[0][0], [call for _, call in seen])

    def calls(self, batch: int, seq_len: int) -> list[Call]:
        """The call of every block for rows of this shape, which no token can change (`verify` checks that); cached."""
        shape = (batch, seq_len)
        if shape not in self._calls:
            self._calls[shape] = self.capture(self._tokens(*shape)).calls
        return self._calls[shape]

    def first_hidden(self, input_ids: Int[Tensor, "B S"]) -> Float[Tensor, "B S D"]:
        """The input of block 0."""
        return self._enter(input_ids, last=0)[0][0]

    @torch.no_grad()
    def replay(self, block: nn.Module | int, hidden: Float[Tensor, "B S D"], call: Call) -> Float[Tensor, "B S D"]:
        """Run one block. The one place where a block's answer, a tensor or a tuple, becomes hidden states."""
        block = self.blocks[block] if isinstance(block, int) else block
        return _hidden_of(block(hidden, *call.args, **call.kwargs))

    @torch.no_grad()
    def logits(self, input_ids: Int[Tensor, "B S"], hidden: Float[Tensor, "B S D"]) -> Float[Tensor, "B S V"]:
        """What the model makes of `hidden` after its last block: final norm and head, run by the model itself."""

        def answer(*args: Any, **kwargs: Any) -> Any:
            return _answer(hidden, self._items)

        with replaced_forward(dict.fromkeys(self.blocks, answer)):
            return self.model(input_ids=self._placed(input_ids), use_cache=False)[0]

    @torch.no_grad()
    def verify(self, input_ids: Int[Tensor, "B S"]) -> float:
        """Replay everything and compare with the full forward; the largest relative difference, or ModelError."""
        outputs: list[Tensor] = []
        with hooked(
            block.register_forward_hook(lambda block, args, output: outputs.append(_hidden_of(output)))
            for block in self.blocks
        ):
            logits = self.model(input_ids=self._placed(input_ids), use_cache=False)[0]
        hidden, worst = self.first_hidden(input_ids), 0.0
        for i, call in enumerate(self.calls(*input_ids.shape)):
            before, hidden = hidden, self.replay(i, hidden, call)
            worst = max(worst, _checked(f"block {self.block_names[i]}", hidden, outputs[i]))
            self.replay(i, before.flip(1), call)  # other rows, as in pruning: a block that hands on more than its
            # hidden states (keys and values for later blocks) makes the next one differ
        return max(worst, _checked("the head after the last block", self.logits(input_ids, hidden), logits))

    def _try(self, index: int) -> None:
        """Run one block on a few tokens, for those who watch it."""
        capture = self.capture(self._tokens(1, 4))
        self.replay(index, capture.hidden, capture.calls[index])

    def _enter(self, input_ids: Int[Tensor, "B S"], last: int) -> list[tuple[Tensor, Call]]:
        """Run the model up to the door of block `last`, blocks passing their input through: what each was given."""
        seen: list[tuple[Tensor, Call]] = []

        def pass_through(*args: Any, **kwargs: Any) -> Any:
            seen.append(_split(args, kwargs))
            if len(seen) > last:
                raise _AtTheDoorError
            return _answer(seen[-1][0], self._items)

        with torch.no_grad(), replaced_forward(dict.fromkeys(self.blocks, pass_through)), suppress(_AtTheDoorError):
            self.model(input_ids=self._placed(input_ids), use_cache=False)
        return seen

    def _placed(self, input_ids: Int[Tensor, "B S"]) -> Int[Tensor, "B S"]:
        return input_ids.to(embedding(self.model).weight.device)

    def _tokens(self, batch: int, seq_len: int) -> Int[Tensor, "B S"]:
        """Some tokens, where it does not matter which."""
        return (torch.arange(seq_len) % embedding(self.model).num_embeddings).expand(batch, -1)

    # -------------------------------------------------------------------------------------------------------- weights

    def linears(self, block: nn.Module) -> dict[str, Linear]:
        """The prunable linears of a block by their name inside it, in order of definition, fused experts' last."""
        found = {name: module for name, module in block.named_modules() if isinstance(module, Linear)}
        return with_experts(found, self.experts(block))

    def experts(self, block: nn.Module) -> tuple[Experts, ...]:
        """The experts of a block, one entry per sparse part; none in an ordinary block."""
        return self._experts[block]

    def left_alone(self) -> list[str]:
        """Full names of what decides instead of work, routers and gates beside experts: never among the linears."""
        pairs = zip(self.block_names, self.blocks, strict=True)
        return [f"{name}.{p}" for name, block in pairs for experts in self.experts(block) for p in experts.left_alone]

    def holders(self, block: nn.Module, names: Iterable[str]) -> dict[str, nn.Parameter]:
        """The block's parameters that hold these linears, by their name inside it. KeyError for an unknown one."""
        linears = self.linears(block)
        chosen = [linears[name] for name in names]
        found = {id(one.holder if isinstance(one, ExpertLinear) else one.weight) for one in chosen}
        return {name: parameter for name, parameter in block.named_parameters() if id(parameter) in found}

    def shape(self, linear: Linear) -> tuple[int, int]:
        """(out_features, in_features)."""
        R, C = matrix(linear).shape
        return R, C

    def read(self, linear: Linear) -> Float[Tensor, "R C"]:
        """A float32 copy of the weight as (out, in)."""
        return matrix(linear).to(torch.float32, copy=True, memory_format=torch.contiguous_format)

    def write(self, linear: Linear, W: Float[Tensor, "R C"]) -> None:
        """Put (out, in) weights back in the linear's own dtype and place; every zero becomes +0.0."""
        target = matrix(linear)
        if W.shape != target.shape:
            raise ValueError(f"weight of shape {tuple(W.shape)} for a linear of shape {tuple(target.shape)} (out, in)")
        target.copy_(W.to(target.dtype) + 0.0)  # -0.0 + 0.0 = +0.0, after the cast: small values may underflow to -0.0

    def bias(self, linear: Linear) -> Float[Tensor, " R"] | None:
        """A float32 copy of the bias, if the linear has one."""
        return None if linear.bias is None else linear.bias.detach().to(torch.float32, copy=True)


def _checked(what: str, replayed: Float[Tensor, "..."], expected: Float[Tensor, "..."]) -> float:
    scale = expected.float().abs().max().clamp_min(torch.finfo(torch.float32).tiny)
    error = ((replayed.float() - expected.float()).abs().max() / scale).item()
    if not error <= TOLERANCE:
        raise ModelError(
            f"replaying {what} differs from the model's own forward by {error:.1e} (at most {TOLERANCE:.0e} wanted); "
            "this architecture is not supported yet"
        )
    return error


# ------------------------------------------------------------------------------------------------------------- plumbing


class _AtTheDoorError(Exception):
    """Ends a forward pass that has shown what was wanted of it."""


def _split(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Call]:
    """Hidden states are the first argument, or the one of that name; the rest is the call."""
    if args:
        return args[0], Call(args[1:], kwargs)
    return kwargs["hidden_states"], Call((), {name: value for name, value in kwargs.items() if name != "hidden_states"})


def _hidden_of(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple | list) else output


def _answer(hidden: Tensor, items: int) -> Any:
    """What a block that answers with so many items (0: a bare tensor) would say, only its hidden states known."""
    return (hidden, *[None] * (items - 1)) if items else hidden


def _to(value: Any, device: torch.device | str) -> Any:
    match value:
        case Tensor():
            return value.to(device)
        case tuple() | list():
            return type(value)(_to(item, device) for item in value)
        case dict():
            return {key: _to(item, device) for key, item in value.items()}
        case _:
            return value
