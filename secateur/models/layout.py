"""What a block is made of, found out by running it, not by reading its class.

Hooks on a replay tell in which order the linears run and which of them share one input tensor (q/k/v; gate/up): these
share one Gram matrix and one stacked solve. Three questions are then put to numbers:

1. Where does the attention end? A token's hidden state is changed; the first linear whose input moves at a *later*
   token is the attention's output projection. What ran up to it is the attention, what runs after it the feed-forward
   network, in sequential and in parallel blocks alike.
2. What is the feed-forward network? The input of its last linear must equal phi(up) or phi(gate) * up for some phi of
   ``core.activations`` and some earlier linears, or halves of one fused linear. The nearest candidate wins. xIELU's
   two learned numbers are fitted first, then it is a candidate like the others.
3. Does the network's output enter the residual stream as it is? It is disturbed, and the block's output must move by
   exactly that. It does not where a norm or a factor follows (Gemma 2 and 3, OLMo 2, OPT-350m).

The cost is three replays: observe on a short probe (64 tokens of text will do), not on the calibration rows. Use real
text: on tokens that say nothing, activations are small and all phi look alike.

B = rows, S = tokens of a row, D = hidden size.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import permutations
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from secateur.core.activations import ACTIVATIONS, LEARNED, activation
from secateur.errors import ModelError
from secateur.models.adapter import Call, DecoderAdapter
from secateur.models.experts import Linear, expert_linears
from secateur.models.hooks import hooked

TOLERANCE = {torch.float64: 1e-4, torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 2e-2}
"""Largest relative error, per dtype of the block, at which two tensors count as the same."""

Part = Literal["attention", "ffn"]


@dataclass(frozen=True)
class Group:
    """Linears that read one input tensor, in the order in which they run."""

    linears: tuple[str, ...]
    part: Part


@dataclass(frozen=True)
class Half:
    """Rows `start` to `stop` of a linear: all of it, or one half of a fused gate-and-up matrix."""

    linear: str
    start: int
    stop: int


@dataclass(frozen=True)
class FeedForwardForm:
    """down(phi(up(x))), or with a gate down(phi(gate(x)) * up(x)); phi = activation(name, learned) of core."""

    up: Half
    gate: Half | None
    down: str
    activation: str
    learned: tuple[float, ...] = ()
    """Numbers that the activation learned (xIELU), found by fitting; most have none."""


@dataclass(frozen=True)
class Layout:
    """The structure of one block. Equal layouts compare equal, so that the odd block out is easily found."""

    groups: tuple[Group, ...]
    """In the order in which they run."""
    ffn: FeedForwardForm | None
    ffn_refusal: str | None
    """Why there is no `ffn`, in one line; None when there is one."""
    attention_out: str | None
    """The attention's output projection; None in a block without attention."""
    additive: bool
    """The block's output is something plus the last feed-forward linear's output, unscaled and not normalised again."""


class Ran(NamedTuple):
    """One linear, when it ran in a replay. Holding the tensors keeps their addresses from being used again."""

    linear: str
    input: Tensor
    output: Tensor


def observe(adapter: DecoderAdapter, index: int, hidden: Float[Tensor, "B S D"], call: Call) -> Layout:
    """The layout of block `index`, from three replays on `hidden` (at least two tokens a row)."""
    if hidden.shape[1] < 2:
        raise ValueError(f"a layout is observed on rows of at least 2 tokens, got {hidden.shape[1]}")
    runs, output = _watch(adapter, index, hidden, call)
    attention_out = _attention_out(adapter, index, hidden, call, runs)
    names = [run.linear for run in runs]
    first_ffn = 0 if attention_out is None else names.index(attention_out) + 1
    groups = groups_of(runs[:first_ffn], "attention") + groups_of(runs[first_ffn:], "ffn")
    ffn, refusal = feed_forward(runs[first_ffn:])
    additive = first_ffn < len(runs) and _is_additive(adapter, index, hidden, call, names[-1], output)
    return Layout(groups, ffn, refusal, attention_out, additive)


# ------------------------------------------------------------------------------------------------------------ watching


@contextmanager
def noted(linears: Mapping[str, Linear]) -> Iterator[list[Ran]]:
    """What these linears do in here, in order."""
    runs: list[Ran] = []

    def note(name: str, _: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        runs.append(Ran(name, args[0], output))

    with hooked(linear.register_forward_hook(partial(note, name)) for name, linear in linears.items()):
        yield runs


def unrouted(adapter: DecoderAdapter, index: int) -> dict[str, Linear]:
    """The linears that see every token; those of experts are observed by ``expert_layout``."""
    block = adapter.blocks[index]
    routed = expert_linears(adapter.experts(block))
    return {name: linear for name, linear in adapter.linears(block).items() if name not in routed}


def _watch(adapter: DecoderAdapter, index: int, hidden: Tensor, call: Call) -> tuple[list[Ran], Tensor]:
    """Every linear's run, in order, and the block's output; each linear must run exactly once."""
    linears = unrouted(adapter, index)
    with noted(linears) as runs:
        output = adapter.replay(index, hidden, call)
    times = Counter(run.linear for run in runs)
    for name in linears:
        if times[name] != 1:
            raise ModelError(
                f"{adapter.block_names[index]}.{name} ran {times[name]} times in one pass through its block, 1 wanted; "
                "this architecture is not supported yet"
            )
    return runs, output


def groups_of(runs: list[Ran], part: Part) -> tuple[Group, ...]:
    """Same address and size is the same tensor, also behind a reshape (OPT flattens the batch in its FFN)."""
    sharing: dict[tuple[int, int], list[str]] = {}
    for run in runs:
        sharing.setdefault((run.input.data_ptr(), run.input.numel()), []).append(run.linear)
    return tuple(Group(tuple(names), part) for names in sharing.values())


# ----------------------------------------------------------------------------------------------------------- questions


def _attention_out(adapter: DecoderAdapter, index: int, hidden: Tensor, call: Call, runs: list[Ran]) -> str | None:
    """The first linear whose last token's input feels a change of the token before it (nearer than any window ends)."""
    rows, tokens, _ = hidden.shape
    changed = hidden.clone()
    changed[:, -2] = -hidden[:, -2].roll(1, dims=-1)
    after, _ = _watch(adapter, index, changed, call)
    for one, other in zip(runs, after, strict=True):
        shape = (rows, tokens, -1)
        if not torch.equal(one.input.reshape(shape)[:, -1], other.input.reshape(shape)[:, -1]):
            return one.linear
    return None


def feed_forward(runs: list[Ran]) -> tuple[FeedForwardForm | None, str | None]:
    """Try phi(up) and phi(gate) * up for every phi and every pair of candidates; the nearest one within tolerance."""
    if len(runs) not in (2, 3):
        names = ", ".join(run.linear for run in runs) or "none"
        return None, f"a feed-forward network has 2 or 3 linears after the attention, found {len(runs)}: {names}"
    *sources, down = runs
    if len(groups_of(sources, "ffn")) != 1:
        return None, f"{' and '.join(run.linear for run in sources)} do not read the same input"
    halves = _halves(sources, width=down.input.shape[-1])
    errors = {form: relative(_inner(form, halves), down.input) for form in _forms(halves, down)}
    if not errors:
        return None, f"no linear feeds {down.linear} with its {down.input.shape[-1]} inputs or twice as many"
    best = min(errors, key=lambda form: errors[form])
    if errors[best] <= TOLERANCE[down.input.dtype]:
        return best, None
    known = ", ".join([*ACTIVATIONS, *LEARNED])
    return None, (
        f"the input of {down.linear} is neither phi(up) nor phi(gate) * up for any phi of {known} "
        f"(nearest {best.activation}, relative error {errors[best]:.1e})"
    )


def _halves(sources: list[Ran], width: int) -> dict[Half, Tensor]:
    """The candidates for gate and up with their outputs, tokens flattened."""
    halves = {}
    for run in sources:
        rows = run.output.shape[-1]
        if rows in (width, 2 * width):
            for start in range(0, rows, width):
                halves[Half(run.linear, start, start + width)] = run.output[..., start : start + width]
    return halves


def _forms(halves: dict[Half, Tensor], down: Ran) -> Iterator[FeedForwardForm]:
    """Everything the network may be: every phi over one half, or over each of two with the other beside it."""
    if len(halves) == 1:
        ((up, output),) = halves.items()
        yield from (FeedForwardForm(up, None, down.linear, phi) for phi in ACTIVATIONS)
        for phi, row in LEARNED.items():
            yield FeedForwardForm(up, None, down.linear, phi, row.fit(output.flatten(), down.input.flatten()))
    for gate, up in permutations(halves, 2):
        yield from (FeedForwardForm(up, gate, down.linear, phi) for phi in ACTIVATIONS)


def _inner(form: FeedForwardForm, outputs: dict[Half, Tensor]) -> Tensor:
    """Computed in the block's own dtype, so that 16-bit rounding is the same as the model's."""
    f = activation(form.activation, form.learned).f
    return f(outputs[form.up]) if form.gate is None else f(outputs[form.gate]) * outputs[form.up]


def _is_additive(adapter: DecoderAdapter, index: int, hidden: Tensor, call: Call, down: str, output: Tensor) -> bool:
    """Add the block's own output, shifted by a token, to what `down` says: the block must answer with that more."""
    disturbance = output.roll(1, dims=1)

    def disturb(_: nn.Module, args: tuple[Tensor, ...], said: Tensor) -> Tensor:
        return said + disturbance.reshape(said.shape)

    with unrouted(adapter, index)[down].register_forward_hook(disturb):
        moved = adapter.replay(index, hidden, call)
    return relative(moved.float() - output.float(), disturbance) <= TOLERANCE[output.dtype]


def relative(value: Float[Tensor, "..."], expected: Float[Tensor, "..."]) -> float:
    """Norm of the difference over the norm of what was expected, in float32; shapes may differ by flattening."""
    expected = expected.float().flatten()
    scale = expected.norm().clamp_min(torch.finfo(torch.float32).tiny)
    return ((value.float().flatten() - expected).norm() / scale).item()
